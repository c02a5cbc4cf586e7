"""The files in cluster/: valid by schema, in agreement with each other and with the code, locked, and without a secret."""

import re
import shlex
import subprocess
import uuid
from pathlib import Path

import pytest
import yaml
from checkout import ROOT
from schemas import Document, accepts, check, documents, having, keys, misspelt

from xmc_ray import command
from xmc_ray.errors import ConfigError
from xmc_ray.on_ray.tag.job import TagConfig
from xmc_ray.on_ray.train.config import TrainConfig

FOLDER = ROOT / "cluster"
README = (FOLDER / "README.md").read_text()
JOBS: dict[str, type] = {"jobs/tag.py": TagConfig, "jobs/train.py": TrainConfig}
DAY = "2026-11-23"
FREE = {
    "annotations",
    "data",
    "hard",
    "labels",
    "limits",
    "matchLabels",
    "metadata",
    "nodeSelector",
    "rayStartParams",
    "requests",
}

FILES = {path.name: documents(path) for path in sorted((FOLDER / "kuberay").glob("*.yaml"))}
MANIFESTS = [
    pytest.param(manifest, id=f"{name}-{manifest['kind']}") for name, manifests in FILES.items() for manifest in manifests
]
OF_RAY = [param for param in MANIFESTS if param.values[0]["apiVersion"] == "ray.io/v1"]
TEXTS = [path for path in sorted(FOLDER.rglob("*")) if path.is_file() and path.suffix != ".pyc"]


def of_kind(name: str, kind: str) -> Document:
    """The one manifest of this kind in a file."""
    (found,) = (manifest for manifest in FILES[name] if manifest["kind"] == kind)
    return found


def cluster_of(manifest: Document) -> Document:
    """The RayCluster's spec in a manifest of Ray's."""
    return next(having(manifest, "headGroupSpec"))


# -- Kubernetes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("manifest", MANIFESTS)
def test_a_manifest_is_valid(manifest: Document) -> None:
    check(manifest)


@pytest.mark.parametrize("manifest", MANIFESTS)
def test_a_misspelt_key_is_noticed(manifest: Document) -> None:
    depth = 99 if manifest["kind"] in {"RayCluster", "NetworkPolicy"} else 4  # the clusters of jobs are the same, see below
    for path in keys(manifest):
        if 1 < len(path) <= depth and not FREE & set(path):
            assert not accepts(misspelt(manifest, path)), path


@pytest.mark.parametrize("manifest", MANIFESTS)
def test_every_pod_is_locked_and_bounded(manifest: Document) -> None:
    for pod in having(manifest, "containers"):
        who = pod["securityContext"]
        assert who["runAsNonRoot"] and who["runAsUser"] == 1000 and who["seccompProfile"] == {"type": "RuntimeDefault"}
        assert pod["restartPolicy"] == "Never"
    options = [part["autoscalerOptions"] for part in having(manifest, "autoscalerOptions")]
    for container in [*(box for pod in having(manifest, "containers") for box in pod["containers"]), *options]:
        locked = {"allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]}}
        assert container["securityContext"] == locked
        assert {"name": "tmp", "mountPath": "/tmp"} in container["volumeMounts"]
        requests, limits = container["resources"]["requests"], container["resources"]["limits"]
        assert requests == limits and {"cpu", "memory"} <= set(requests)


@pytest.mark.parametrize("manifest", OF_RAY)
def test_a_cluster_scales_from_nothing_and_asks_for_the_token(manifest: Document) -> None:
    cluster = cluster_of(manifest)
    assert cluster["authOptions"] == {"mode": "token"}
    assert f"\nray=={cluster['rayVersion']}\n" in (ROOT / "constraints.txt").read_text()
    assert cluster["enableInTreeAutoscaling"] and cluster["autoscalerOptions"]["version"] == "v2"
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    groups = {group["groupName"]: group for group in cluster["workerGroupSpecs"]}
    gpus = {name: "nvidia.com/gpu" in str(group["template"]["spec"]["containers"]) for name, group in groups.items()}
    assert gpus == {"cpu": False, "gpu-spot": True, "gpu": True}
    assert groups["gpu-spot"]["priority"] > groups["gpu"]["priority"]
    for group in groups.values():
        assert group["minReplicas"] == 0 < group["maxReplicas"]
        assert not group["template"]["spec"]["automountServiceAccountToken"]


def test_it_is_the_same_cluster_everywhere() -> None:
    clusters = [cluster_of(param.values[0]) for param in OF_RAY]  # type: ignore[arg-type]
    assert len(clusters) == 4 and all(cluster == clusters[0] for cluster in clusters)


@pytest.mark.parametrize("name", FILES)
def test_the_image_is_named_once_a_file(name: str) -> None:
    version = re.search(r'^version = "(.*)"', (ROOT / "pyproject.toml").read_text(), flags=re.MULTILINE)
    assert version is not None
    text = (FOLDER / "kuberay" / name).read_text()
    images = {part["image"] for part in having(FILES[name], "image")} - {"KUBECTL"}
    assert len(re.findall(r"image: .*xmc_ray:", text)) == len(images) == ("containers" in text)
    assert images <= {f"REGISTRY/xmc_ray:{version[1]}-cu130"}


def test_nothing_listens_outside() -> None:
    manifests = [manifest for found in FILES.values() for manifest in found]
    assert not {"Service", "Ingress", "Secret"} & {manifest["kind"] for manifest in manifests}
    for name in ("serviceType", "headService", "enableIngress", "hostNetwork", "hostPort"):
        assert not list(having(manifests, name))
    quota = of_kind("access.yaml", "ResourceQuota")["spec"]["hard"]
    assert quota["services.loadbalancers"] == quota["services.nodeports"] == "0"
    policy = of_kind("access.yaml", "NetworkPolicy")["spec"]
    assert (policy["podSelector"], policy["policyTypes"]) == ({}, ["Ingress"])
    inside, *others = policy["ingress"]
    assert inside == {"from": [{"podSelector": {}}]}
    opened = {(part["from"][0]["namespaceSelector"]["matchLabels"]["kubernetes.io/metadata.name"], port["port"])
              for part in others for port in part["ports"]}  # fmt: skip
    assert opened == {("kuberay-system", 8265), ("monitoring", 8080), ("monitoring", 44217), ("monitoring", 44227)}
    assert all(part["from"] and part["ports"] for part in others)


# -- nights --------------------------------------------------------------------------------------------------------------


def test_all_attempts_of_a_night_lie_in_one_day() -> None:
    night, old = of_kind("nightly.yaml", "RayCronJob")["spec"], of_kind("nightly-cronjob.yaml", "CronJob")["spec"]
    minute, hour, *every = night["schedule"].split()
    assert (night["timeZone"], every) == ("Etc/UTC", ["*", "*", "*"])
    begin, job = int(hour) * 3600 + int(minute) * 60, night["jobTemplate"]
    attempts = (1 + job["backoffLimit"]) * job["activeDeadlineSeconds"]
    assert begin + attempts < 86_400
    assert (old["schedule"], old["timeZone"], old["concurrencyPolicy"]) == (night["schedule"], "Etc/UTC", "Forbid")
    assert attempts < old["jobTemplate"]["spec"]["activeDeadlineSeconds"]
    assert begin + old["startingDeadlineSeconds"] + old["jobTemplate"]["spec"]["activeDeadlineSeconds"] <= 86_400


def test_both_nights_are_the_same() -> None:
    new, old = of_kind("nightly.yaml", "RayCronJob")["spec"]["jobTemplate"], of_kind("nightly-cronjob.yaml", "RayJob")
    assert old["spec"] == new | {"entrypoint": new["entrypoint"].replace('"$(date -u +%F)"', "DAY")}
    assert new["shutdownAfterJobFinishes"] and old["metadata"]["name"].endswith("-DAY")


def test_the_cronjob_fills_in_the_day_and_waits_for_the_end(tmp_path: Path) -> None:
    job = of_kind("nightly-cronjob.yaml", "CronJob")["spec"]["jobTemplate"]["spec"]["template"]["spec"]["containers"][0]
    (template,) = of_kind("nightly-cronjob.yaml", "ConfigMap")["data"].values()
    (tmp_path / "rayjob.yaml").write_text(template)
    (tmp_path / "date").write_text(f'#!/bin/sh\n[ "$*" = "-u +%F" ] && echo {DAY}\n')
    kubectl = 'if [ $1 = create ]; then [ ! -e made ] && cat > made; else echo "$2 $3" >> asked; [ $# = 3 ] || cat status; fi'
    (tmp_path / "kubectl").write_text(f"#!/bin/sh\n{kubectl}\n")
    for tool in ("date", "kubectl"):
        (tmp_path / tool).chmod(0o755)
    script = job["args"][0].replace("/night/", f"{tmp_path}/")
    for status, code in (("Complete", 0), ("Failed", 1)):  # the second finds the RayJob of the first
        (tmp_path / "status").write_text(status)
        done = subprocess.run([*job["command"], script], cwd=tmp_path, env={"PATH": f"{tmp_path}:/usr/bin:/bin"}, timeout=30)
        assert done.returncode == code
    made = yaml.safe_load((tmp_path / "made").read_text())
    assert made["metadata"]["name"] == f"xmc-ray-night-{DAY}" and f"--date {DAY} " in made["spec"]["entrypoint"]
    assert set((tmp_path / "asked").read_text().splitlines()) == {f"rayjob xmc-ray-night-{DAY}"}
    check(made)


COMMANDS = [part["entrypoint"] for found in FILES.values() for part in having(found, "entrypoint")]
COMMANDS += re.findall(r"python jobs/(?:[^\n]|\\\n)*", README.replace("\\\n", ""))


@pytest.mark.parametrize("line", COMMANDS, ids=range(len(COMMANDS)))
def test_a_command_has_options_that_its_job_knows(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    program, script, *arguments = shlex.split(line.replace("$(date -u +%F)", DAY).replace("DAY", DAY))
    assert program == "python"
    config = command.parse(JOBS[script], arguments)
    if script == "jobs/tag.py":
        assert (config.date, config.previous) == (DAY, "last")
    with pytest.raises(ConfigError):
        command.parse(JOBS[script], [*arguments, "--misspelt", "1"])


def test_there_are_commands() -> None:
    assert len(COMMANDS) == 4 and {shlex.split(line)[1] for line in COMMANDS} == set(JOBS)


# -- all of them ---------------------------------------------------------------------------------------------------------

KEY_PAIR = r"AKIA[0-9A-Z]{16}|(?<![\w/.-])[A-Za-z0-9+/]{40}(?![\w/.-])|-----BEGIN"
NAMED = r"(?i:secret_access_key|password|auth_token)\s*[:=]\s*[^\s~]"
SECRET = re.compile(rf"{KEY_PAIR}|{NAMED}|\b[0-9a-f]{{8}}(-[0-9a-f]{{4}}){{3}}-[0-9a-f]{{12}}\b")


def test_no_file_has_a_secret() -> None:
    for planted in ("aws_secret_access_key: x", "RAY_AUTH_TOKEN=6f9619ff", "AKIA" + "A" * 16, "a1" * 20, str(uuid.uuid4())):
        assert SECRET.search(planted), planted
    for path in TEXTS:
        assert not SECRET.search(path.read_text()), path
    for manifests in FILES.values():
        for part in having(manifests, "value"):
            assert not re.search("TOKEN|SECRET|PASSWORD|KEY", part.get("name", ""))


def test_the_readme_names_what_is_to_be_filled_in_and_every_file() -> None:
    words = set(re.findall(r"^\| `([A-Z]+)` ", README, flags=re.MULTILINE))
    pattern = re.search(r"\\b\((.*?)\)\\b", README)
    assert pattern is not None and set(pattern[1].split("|")) == words
    ours = [path for path in TEXTS if path.parent.name == "kuberay" or path.name.startswith(("aws", "Dockerfile", "image"))]
    for path in ours:
        found = set(re.findall(r"\b(?:" + pattern[1] + r")\b", path.read_text()))
        assert str(path.relative_to(FOLDER)) in README
        filled_in = re.search(r"To be filled in: (.*?)[.(]", path.read_text().replace("\n# ", " "))
        assert filled_in is None or found == set(re.findall("[A-Z]{3,}", filled_in[1])), path
    assert words == {word for path in ours for word in re.findall(r"\b(?:" + pattern[1] + r")\b", path.read_text())}
