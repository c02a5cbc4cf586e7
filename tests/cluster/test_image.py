"""The image and the clusters of ``ray up``: checked by hadolint and by Ray, step by step, and against each other."""

import copy
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from checkout import ROOT
from ray.autoscaler._private.util import hash_launch_conf, prepare_config, validate_config
from schemas import Document

FOLDER = ROOT / "cluster"
DOCKERFILE = FOLDER / "Dockerfile"
AWS = {name: yaml.safe_load((FOLDER / name).read_text()) for name in ("aws.yaml", "aws-cpu.yaml")}


@pytest.fixture
def image() -> Any:
    """cluster/image.py as a module."""
    spec = importlib.util.spec_from_file_location("image", FOLDER / "image.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def copied() -> list[str]:
    """What the Dockerfile copies."""
    return [source for line in re.findall(r"^COPY (.*)$", DOCKERFILE.read_text(), flags=re.M) for source in line.split()[:-1]]


# -- ray up --------------------------------------------------------------------------------------------------------------


def prepared(config: Document) -> Document:
    filled = prepare_config(copy.deepcopy(config))
    validate_config(filled)
    return filled


@pytest.mark.parametrize("name", AWS)
def test_ray_takes_the_cluster(name: str) -> None:
    prepared(AWS[name])
    for path in (["available_node_types", "head"], ["provider", "security_group"], ["auth"], []):
        wrong = copy.deepcopy(AWS[name])
        part = wrong
        for key in path:
            part = part.setdefault(key, {})
        part["misspelt"] = 1
        with pytest.raises(jsonschema.ValidationError):
            prepared(wrong)


@pytest.mark.parametrize("name", AWS)
def test_a_cluster_on_aws_is_private_bounded_and_asks_for_the_token(name: str, image: Any) -> None:
    config = AWS[name]
    kinds = config["available_node_types"]
    head, workers = kinds["head"], [kind for node, kind in kinds.items() if node != "head"]
    assert config["head_node_type"] == "head" and head["resources"] == {"CPU": 0}
    assert config["max_workers"] == sum(kind["max_workers"] for kind in workers)
    assert all(kind["min_workers"] == 0 < kind["max_workers"] for kind in workers)
    assert config["provider"]["use_internal_ips"]
    for kind in kinds.values():
        node = kind["node_config"]
        assert node["SubnetIds"] and node["SecurityGroupIds"] and node["IamInstanceProfile"]["Arn"]
        assert node["MetadataOptions"]["HttpTokens"] == "required"
    assert {kind["node_config"]["IamInstanceProfile"]["Arn"].endswith("-worker") for kind in workers} == {True}
    (environment,) = (line for line in config["setup_commands"] if "printf" in line)
    only_the_image = {"PYTHONUNBUFFERED=1", "HF_HUB_OFFLINE=1", "HF_HOME=/tmp/huggingface"}
    set_here = set(re.findall(r"\b\w{5,}=[\w:/.]+", environment))
    exported = {variable for variable in set_here if "event" in variable.lower()}  # a pod's are in its manifest
    assert set(dict(image.steps())["ENV"].split()) - only_the_image == set_here - exported and len(exported) == 3
    (start,) = (line for line in config["head_start_ray_commands"] if "--head" in line)
    assert "--dashboard-host=127.0.0.1" in start and "--num-cpus=0" in start
    for line in (start, config["worker_start_ray_commands"][-1]):
        assert "--metrics-export-port=8080" in line


@pytest.mark.parametrize("name", AWS)
def test_the_head_is_the_same_machine_for_every_engineer(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By Ray's own rule: where its hash differs, ``ray up`` ends the running head."""
    config = prepared(AWS[name])
    head = config["available_node_types"]["head"]["node_config"]
    hashes = []
    for engineer, key in (("one", "key"), ("two", "key"), ("three", "a key of one's own")):
        (tmp_path / engineer / ".ssh").mkdir(parents=True)
        (tmp_path / engineer / ".ssh" / "xmc-ray.pem").write_text(key)
        monkeypatch.setenv("HOME", str(tmp_path / engineer))
        hashes.append(hash_launch_conf(head, config["auth"]))
    assert hashes[0] == hashes[1] != hashes[2]
    assert {kind["node_config"]["KeyName"] for kind in config["available_node_types"].values()} == {"xmc-ray"}
    readme = (FOLDER / "README.md").read_text()
    assert config["auth"]["ssh_private_key"] in readme and config["file_mounts"]["~/.ray/cluster_token"] in readme
    runbook = (ROOT / "docs/operations.md").read_text()
    assert not re.search(r"^ray up.*(--yes|-y\b)", readme + runbook, flags=re.MULTILINE)


@pytest.mark.parametrize("name", AWS)
def test_a_running_head_keeps_its_token(name: str, tmp_path: Path) -> None:
    (command,) = (line for line in AWS[name]["setup_commands"] if "auth_token" in line)
    own, sent = tmp_path / ".ray" / "auth_token", tmp_path / ".ray" / "cluster_token"
    own.parent.mkdir()
    for token, code in (("first", 0), ("first", 0), ("another", 1), ("first", 0)):
        sent.write_text(token)
        done = subprocess.run(
            ["bash", "-c", command], env={**os.environ, "HOME": str(tmp_path)}, capture_output=True, text=True
        )
        assert done.returncode == code and ("error: this cluster has another token" in done.stderr) == bool(code)
        assert own.read_text() == sent.read_text() == "first" and own.stat().st_mode & 0o077 == 0


@pytest.mark.parametrize("name", AWS)
def test_a_new_machine_that_updates_itself_is_waited_for(name: str, tmp_path: Path) -> None:
    """Apt's locks are held at first; an update fails then, and an installation waits."""
    (command,) = (line for line in AWS[name]["setup_commands"] if "apt-get" in line)
    tools = {
        "python3": "[ -e installed ] && echo made > made",
        "sleep": "echo . >> slept",
        "seq": "echo 1 2 3 4 5",
        "apt-get": '[ "$1" = update ] && { [ -e slept ] && [ $(wc -l < slept) = 2 ]; exit; }; '
        '[ "$*" = "-o DPkg::Lock::Timeout=600 install -y python3-venv" ] && touch installed',
        "sudo": '"$@"',
    }
    for tool, script in tools.items():
        (tmp_path / tool).write_text(f"#!/bin/bash\n{script}\n")
        (tmp_path / tool).chmod(0o755)
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "HOME": str(tmp_path)}
    subprocess.run(["bash", "-euc", command], cwd=tmp_path, env=environment, check=True, timeout=30)
    assert (tmp_path / "made").exists() and len((tmp_path / "slept").read_text().splitlines()) == 2


def test_the_nodes_of_aws_are_set_up_from_what_the_image_has() -> None:
    for config in AWS.values():
        sent = {value for value in config["file_mounts"].values() if not value.startswith("~")}
        assert sent == {source.rstrip("/") for source in copied()}
        assert all("-c ~/xmc_ray/constraints.txt" in line for line in config["setup_commands"] if "pip install" in line)


def test_without_gpus_it_is_the_same_cluster() -> None:
    with_gpus, without = copy.deepcopy(AWS["aws.yaml"]), copy.deepcopy(AWS["aws-cpu.yaml"])
    kinds = with_gpus["available_node_types"]
    spot, on_demand = kinds.pop("gpu-spot"), kinds.pop("gpu")
    assert spot["node_config"].pop("InstanceMarketOptions") == {"MarketType": "spot"}
    assert spot.pop("priority") > on_demand.pop("priority") and spot == on_demand and spot["resources"]["GPU"] == 1
    for config in (with_gpus, without):
        del config["cluster_name"], config["max_workers"]
        config["setup_commands"] = [line.partition(" --extra-index-url")[0] for line in config["setup_commands"]]
        config["worker_start_ray_commands"] = [line for line in config["worker_start_ray_commands"] if "spot.sh" not in line]
    assert with_gpus == without


# -- the image -----------------------------------------------------------------------------------------------------------


def test_hadolint_has_nothing_to_say() -> None:
    hadolint = [str(Path(sys.executable).parent / "hadolint"), "--no-color"]
    done = subprocess.run([*hadolint, str(DOCKERFILE)], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")
    worse = DOCKERFILE.read_text().replace("--no-cache-dir -c constraints.txt torch", "torch")
    assert "DL3013" in subprocess.run([*hadolint, "-"], input=worse, capture_output=True, text=True).stdout


def test_all_that_is_copied_is_there_and_reaches_the_builder() -> None:
    ignored, *let_through = [line for line in Path(f"{DOCKERFILE}.dockerignore").read_text().splitlines() if line[:1] != "#"]
    assert ignored == "*"
    assert {line[1:] for line in let_through if line.startswith("!")} == {source.rstrip("/") for source in copied()}
    assert all((ROOT / source).exists() for source in copied())


def test_the_image_is_that_of_the_project_and_runs_as_nobody_special(image: Any) -> None:
    steps = list(image.steps())
    assert steps[-1] == ("USER", "1000:1000") and "--uid 1000 --gid 1000" in dict(steps)["SYSTEM"]
    installed = [value for instruction, value in steps if instruction == "RUN"]
    assert len(installed) == 2 and all("pip install --no-cache-dir -c constraints.txt " in value for value in installed)
    assert {"RAY_AUTH_MODE=token", "PYTHONSAFEPATH=1", "OMP_WAIT_POLICY=PASSIVE"} <= set(dict(steps)["ENV"].split())
    assert re.fullmatch(r"BASE=python:3\.\d+\.\d+-slim-\w+", next(value for name, value in steps if name == "ARG"))


def test_the_steps_run_without_a_container_engine(
    image: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(image.venv, "create", lambda folder, with_pip: (folder / "bin").mkdir(parents=True))
    (tmp_path / "jobs").mkdir()
    (tmp_path / "jobs" / "tag.py").write_text("")
    lines = ["ARG A=default", "FROM x", "# system: for root", "RUN exit 1", "WORKDIR /home/ray", "COPY jobs/ jobs/"]
    lines += ["COPY jobs/tag.py ./", "ENV B=2 C=3", 'RUN echo "$A $B $C" > said \\\n    && ls jobs >> said', "USER 1000"]
    (tmp_path / "Dockerfile").write_text("\n".join(lines))
    environment = image.build(tmp_path / "new", {"A": "given"}, tmp_path / "Dockerfile", tmp_path)
    home = tmp_path / "new" / "home" / "ray"
    assert (home / "said").read_text() == "given 2 3\ntag.py\n" and (home / "tag.py").exists()
    assert environment["PATH"].startswith(str(tmp_path / "new" / "usr" / "local" / "bin")) and "A" not in environment
    (tmp_path / "new" / "usr" / "local" / "bin" / "python").symlink_to("/bin/false")
    with pytest.raises(SystemExit, match="import sys, ray, torch, xmc_ray"):
        image.check(environment)
