"""Jobs as they are submitted to a cluster: two nodes beside a head without work, real S3, tokens demanded throughout.

The commands are those of docs/operations.md, as they stand there: every block is run here, or says that it needs a cloud.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from datetime import datetime, timezone
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from checkout import ROOT
from faults import SECONDS, kill, wait_for
from fruit import document, options, read_night
from observability import QUERIES, prometheus
from seaweed import S3

from cluster.local import LocalCluster, free_ports, local_cluster
from xmc_ray import command, storage
from xmc_ray.errors import XmcError
from xmc_ray.on_ray.train import job
from xmc_ray.storage import folders

ROWS, COMMIT_ROWS, GOOD, DAY = 15_000, 600, "2026-11-22", "2026-11-23"
EVERY_ID = sorted(document(number)["id"] for number in range(ROWS))
OPERATIONS = (ROOT / "docs/operations.md").read_text()
BLOCKS = [textwrap.dedent(block) for block in re.findall(r"```bash\n(.*?)```", OPERATIONS, flags=re.DOTALL)]
TRAIN, EVALUATE, TAG, LOOK, REPLACE, ENCRYPT, START = BLOCKS  # in their order; what needs a cloud is not among them


@pytest.fixture(scope="module")
def cluster(s3: S3, fruit: Path) -> Iterator[LocalCluster]:
    """The nodes have the keys to the storage in their own environment; jobs bring none."""
    folders.upload(fruit, s3.uri("cluster/catalogue"))
    storage.write_bytes(s3.uri("cluster/catalogue/labelled.parquet"), (fruit / "test.parquet").read_bytes())
    with local_cluster(LocalCluster(nodes=2, cpus=3, variables=s3.environment)) as running:
        yield running


@pytest.fixture(scope="module")
def names(s3: S3, fruit: Path, tiny_encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What the runbook's variables stand for."""
    places = {name.upper(): s3.uri(f"cluster/{name}") for name in ("catalogue", "models", "tags")}
    settings = command.parse(job.TrainConfig, options(fruit, tiny_encoder, "runs/first", "--label_names=null"))
    config = tmp_path_factory.mktemp("recipe") / "recipe.toml"
    config.write_text(command.to_toml(settings))
    return places | {"CONFIG": str(config), "ENCODER": str(tiny_encoder), "DAY": DAY, "GOOD": GOOD}


@pytest.fixture(scope="module")
def bundle(cluster: LocalCluster, names: dict[str, str]) -> str:
    """The address of a model that the runbook's command has trained."""
    finished = run(cluster, TRAIN, names)
    bundle = f"{names['MODELS']}/first/bundle"
    assert finished.returncode == 0 and f": {bundle}\n" in finished.stdout, finished.stdout
    return bundle


@pytest.fixture(scope="module")
def catalogue(s3: S3, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("catalogue")
    pq.write_table(pa.Table.from_pylist([document(number) for number in range(ROWS)]), folder / "documents.parquet")
    folders.upload(folder, s3.uri("cluster/large"))
    return s3.uri("cluster/large")


def run(cluster: LocalCluster, script: str, names: dict[str, str]) -> "subprocess.CompletedProcess[str]":
    """Commands of somebody who has the cluster's token and address, and nothing else."""
    theirs = {name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "RAY_"))}
    theirs |= {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"} | cluster.environment | names
    together = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "timeout": SECONDS}
    return subprocess.run(["bash", "-euc", script], cwd=ROOT, env=theirs, check=False, **together)  # type: ignore[call-overload,no-any-return]


def submit(
    cluster: LocalCluster, job: str, arguments: Sequence[str], further: str = "", folder: Path = ROOT
) -> "subprocess.CompletedProcess[str]":
    runtime_env = ROOT / "cluster/runtime_env.yaml"
    submission = f"ray job submit --working-dir '{folder}' --runtime-env {runtime_env} {further} -- python jobs/{job}.py "
    return run(cluster, submission + " ".join(f"'{argument}'" for argument in arguments), {})


def night_options(bundle: str, catalogue: str, output: str) -> list[str]:
    settings = {"documents.uri": catalogue, "bundle": bundle, "output": output, "date": DAY, "k": 3, "pool.threads": 1}
    settings |= {"commit_rows": COMMIT_ROWS, "documents.text": '["text"]'}
    settings |= {"pool.token_budget": 16}  # slow enough to meddle with
    return [f"--{name}={value}" for name, value in settings.items()]


def pieces(output: str) -> list[str]:
    try:
        return [file.uri for file in storage.all_files(output) if "/_work/pieces/" in file.uri]
    except XmcError:  # it changed while it was listed
        return []


def ids(output: str) -> list[str]:
    tags, rejects = read_night(storage.join(output, "_nights", f"dt={DAY}"))
    assert not len(rejects)
    return sorted(tags["id"].to_pylist())


@pytest.mark.timeout(1800)  # the cluster and the bundle are made for it, and both cores may be busy and slow
def test_the_runbooks_first_day(cluster: LocalCluster, bundle: str, names: dict[str, str]) -> None:
    evaluated = run(cluster, EVALUATE, names)
    assert evaluated.returncode == 0, evaluated.stdout
    assert storage.read_json(f"{names['MODELS']}/first/evaluation/metrics.json")["documents"] == 48
    good = run(cluster, TAG, names | {"DAY": GOOD})
    assert good.returncode == 0 and "nothing is reused: there is no finished night" in good.stdout, good.stdout
    assert "the bundle passes the gate: P@1 " in good.stdout
    gate = " --gate.documents.uri $CATALOGUE/labelled.parquet --gate.at_least.P@1 0.6 --drift.fail 0.25"
    assert gate in TAG, "the runbook's gate would hold it back"
    bad = run(cluster, TAG.replace("--k 10", "--k 1").replace(gate, ""), names)
    assert bad.returncode == 0, bad.stdout
    night = f"{names['TAGS']}/_nights/dt={DAY}"
    assert {len(labels) for labels in read_night(night)[0]["labels"].to_pylist()} == {1}

    replaced = run(cluster, REPLACE, names)
    assert replaced.returncode == 0, replaced.stdout
    counts = storage.read_json(f"{night}/manifest.json")
    assert (counts["tagged"], counts["reused"]) == (0, 48), "the model has nothing to do"
    assert read_night(night)[0].equals(read_night(f"{names['TAGS']}/_nights/dt={GOOD}")[0])


@pytest.mark.slow
def test_a_second_night_is_refused_and_a_stopped_one_goes_on(
    cluster: LocalCluster, bundle: str, catalogue: str, s3: S3
) -> None:
    """Arguments with spaces, quotes and brackets arrive as they were given."""
    output = s3.uri("cluster/a folder with spaces")
    arguments = night_options(bundle, catalogue, output)
    first = submit(cluster, "tag", arguments, "--no-wait --submission-id=first")
    assert first.returncode == 0, first.stdout
    wait_for(lambda: len(pieces(output)) >= 3, every=1)
    second = submit(cluster, "tag", arguments)
    assert second.returncode != 0
    assert "error: another job works in this folder" in second.stdout and "exit code 2" in second.stdout, second.stdout
    assert "; found job first, process " in second.stdout and "by `ray job stop first`" in second.stdout, second.stdout

    stopped = run(cluster, LOOK, {"NIGHT": "first"})
    assert stopped.returncode == 0 and "was stopped" in stopped.stdout, stopped.stdout
    assert "'first' was stopped" in run(cluster, "ray job status first", {}).stdout
    assert not storage.exists(storage.join(output, "_nights", f"dt={DAY}", "_SUCCESS")), "it was over too soon"
    done = len(pieces(output))

    third = submit(cluster, "tag", [*arguments, "--pool.token_budget=2048"])  # how fast it goes may change
    assert third.returncode == 0, third.stdout
    assert "resuming after" in third.stdout and done >= 3
    assert ids(output) == EVERY_ID
    fourth = submit(cluster, "tag", arguments)
    assert fourth.returncode == 0 and "nothing to do" in fourth.stdout


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_prometheus_sees_a_night_from_its_beginning_to_its_end_and_hears_that_it_was_killed(
    cluster: LocalCluster, bundle: str, s3: S3, tmp_path: Path
) -> None:
    """Rules and dashboard as they stand, evaluated by Prometheus on what a cluster exports; each finds something once."""
    rows = [*map(document, range(6000)), *({"id": f"bad{n}", "text": None} for n in range(50))]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "documents.parquet")
    folders.upload(tmp_path, s3.uri("cluster/watched-catalogue"))
    output, night = s3.uri("cluster/watched"), ""
    today = datetime.now(timezone.utc).date()  # a night made up for later does not count as one that came
    arguments = [*night_options(bundle, s3.uri("cluster/watched-catalogue"), output), f"--date={today}"]
    quiet = ("Night", "ActorsWait", "StorageAway", "LabelsMoved", "Tokens a second B", "Nodes and CPUs D")  # no padding, no GPU
    pending = {name: query for name, query in QUERIES.items() if not name.startswith(quiet)}

    def look() -> None:
        for name in [name for name, query in pending.items() if ask(query)]:
            del pending[name]

    def finds(query: str) -> bool:
        look()
        return bool(ask(query.replace("NIGHT", night)))

    with prometheus(tmp_path, cluster.metrics, *free_ports(1)) as ask:
        night = f'output="{output}",date="{today}"'
        first = submit(cluster, "tag", arguments, "--no-wait --submission-id=watched")
        assert first.returncode == 0, first.stdout
        wait_for(lambda: finds('ray_xmc_ray_documents{NIGHT,outcome="tagged"} == 0'), every=0.5)
        wait_for(lambda: finds('ray_xmc_ray_documents{NIGHT,outcome="tagged"} > 0'), every=0.5)
        wait_for(lambda: kill(cluster.pids("jobs/tag.py", output)), every=0.1)
        assert not ask(f"ray_xmc_ray_failure_seconds{{{night}}}")
        wait_for(lambda: finds('ALERTS{NIGHT,alertname="NightFailed",alertstate="firing"}'), every=0.5)

        second = submit(cluster, "tag", arguments)
        assert second.returncode == 0 and "resuming after" in second.stdout, second.stdout
        wait_for(lambda: finds("ray_xmc_ray_success_seconds{NIGHT}"), every=0.5)
        wait_for(lambda: not finds('ALERTS{NIGHT,alertname="NightFailed"}'), every=0.5)
        assert ask(f"max(ray_xmc_ray_attempt{{{night}}})")[0]["value"] == 2
        done = {sample["outcome"]: sample["value"] for sample in ask(f"max by (outcome) (ray_xmc_ray_documents{{{night}}})")}
        assert done == {"tagged": 6000, "reused": 0, "rejected": 50}

        refused = submit(cluster, "tag", [*night_options("s3://nowhere/bundle", output, output), "--date=1970-01-01"])
        assert refused.returncode != 0
        wait_for(lambda: finds(f'ALERTS{{output="{output}",date="1970-01-01",alertname="NightFailed"}}'), every=0.5)
        assert not ask(f'ALERTS{{{night},alertname=~"Night.*"}}'), "the other night is none the worse for it"
        wait_for(lambda: look() or not pending, every=0.5)


@pytest.mark.slow
def test_training_waits_for_workers_and_says_for_what(cluster: LocalCluster, fruit: Path, tiny_encoder: Path, s3: S3) -> None:
    places = [f"--documents.uri={s3.uri('cluster/catalogue/train.parquet')}", "--label_names=null"]
    wanted = ["--workers.count=2", "--workers.cpus=64", "--workers.patience=0.1"]
    finished = submit(cluster, "train", [*options(fruit, tiny_encoder, s3.uri("cluster/waits")), *places, *wanted])
    assert finished.returncode != 0
    assert "waiting for 2 workers of 64 CPU; found 3 nodes, " in finished.stdout, finished.stdout
    assert "error: the cluster has no room for the workers; found 3 nodes, " in finished.stdout, finished.stdout
    assert " of 6 CPUs free" in finished.stdout and "expected 2 workers of 64 CPU" in finished.stdout
    assert not [file for file in storage.all_files(s3.uri("cluster/waits")) if "_driver" in file.uri]


def test_an_entry_point_that_fails_at_import_says_so(cluster: LocalCluster, tmp_path: Path) -> None:
    shutil.copytree(ROOT / "jobs", tmp_path / "jobs")
    (tmp_path / "xmc_ray").mkdir()
    (tmp_path / "xmc_ray" / "__init__.py").write_text("import a_package_that_nobody_has_installed\n")
    finished = submit(cluster, "tag", [], "--submission-id=broken", folder=tmp_path)
    assert finished.returncode != 0
    assert "No module named 'a_package_that_nobody_has_installed'" in run(cluster, "ray job logs broken", {}).stdout
    assert "'broken' failed" in run(cluster, "ray job status broken", {}).stdout


def test_strangers_are_turned_away(cluster: LocalCluster) -> None:
    for path in ("/api/jobs/", "/nodes?view=summary", "/api/cluster_status"):
        with pytest.raises(urllib.error.HTTPError, match="401"):
            urllib.request.urlopen(f"{cluster.dashboard}{path}", timeout=30)
    status = run(cluster, "ray status", {"RAY_AUTH_MODE": "disabled"})
    assert status.returncode != 0 and "Active:" not in status.stdout


def test_nothing_secret_is_in_the_logs(cluster: LocalCluster, bundle: str, s3: S3) -> None:
    """Neither the storage's key nor the cluster's token, in any file that the cluster has written by now."""
    token = Path(cluster.environment["RAY_AUTH_TOKEN_PATH"])
    secrets = {s3.secret_key.encode(), token.read_bytes()}
    files = [path for path in cluster.folder.rglob("*") if path.is_file() and path != token]
    assert len(files) > 20
    assert [path for path in files if any(secret in path.read_bytes() for secret in secrets)] == []
    jobs = run(cluster, "ray job list", {}).stdout
    assert "jobs/train.py" in jobs and not any(secret.decode() in jobs for secret in secrets)


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("openssl"), reason="openssl, which makes the certificates, is not installed")
def test_channels_can_be_encrypted(tmp_path: Path) -> None:
    """With the certificates that the runbook makes, a job runs; without, the cluster cannot even be asked how it is."""
    from ray.util import get_node_ip_address

    names = {"CERTIFICATES": str(tmp_path), "NODE_ADDRESSES": f"127.0.0.1 {get_node_ip_address()}"}
    make, *_ = ENCRYPT.splitlines()
    addresses = names["NODE_ADDRESSES"].split()
    subprocess.run([str(ROOT / make.split()[0]), str(tmp_path), *addresses], check=True, capture_output=True)
    variables = {
        "RAY_USE_TLS": "1",
        "RAY_TLS_CA_CERT": f"{tmp_path}/ca.crt",
        "RAY_TLS_SERVER_CERT": f"{tmp_path}/node.crt",
        "RAY_TLS_SERVER_KEY": f"{tmp_path}/node.key",
    }
    with local_cluster(LocalCluster(nodes=1, cpus=2, variables=variables)) as cluster:
        asked = run(cluster, ENCRYPT, names)
        assert asked.returncode == 0 and "Active:" in asked.stdout, asked.stdout
        script = "import ray; ray.init(); print(ray.get(ray.remote(lambda: 6 * 7).remote()))"
        finished = run(cluster, f"ray job submit -- python -c '{script}'", variables)
        assert finished.returncode == 0 and "\n42\n" in finished.stdout, finished.stdout
        stranger = run(cluster, "timeout 30 ray status", {})
        assert stranger.returncode != 0 and "Active:" not in stranger.stdout
    assert (tmp_path / "ca.key").stat().st_mode & 0o077 == 0


@pytest.mark.slow
def test_a_cluster_for_developers_leaves_nothing_behind() -> None:
    """What `make cluster` starts, used as it says, and ended as a terminal ends it."""
    assert START.startswith("make cluster")
    assert re.search(
        r"^cluster:.*\n\t@.*python cluster/local.py \$\(ARGS\)", (ROOT / "Makefile").read_text(), flags=re.MULTILINE
    )
    words = [sys.executable, "cluster/local.py", "--nodes=1", "--cpus=1"]
    process = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        told = "".join(iter(process.stdout.readline, "Ctrl-C ends it.\n"))
        (use,) = re.findall(r"source (\S+)", told)
        status = subprocess.run(["bash", "-c", f"source {use}; ray status"], capture_output=True, text=True, check=False)
        assert "Active:" in status.stdout, status.stdout + status.stderr
        process.send_signal(signal.SIGINT)
        assert process.wait(SECONDS) == 0
    finally:
        process.kill()
    assert not Path(use).parent.exists()
    left = subprocess.run(["ps", "-ww", "-eo", "args="], capture_output=True, text=True, check=True).stdout
    assert str(Path(use).parent) not in left


@pytest.mark.parametrize("block", re.findall(r"```bash cloud\n(.*?)```", OPERATIONS, flags=re.DOTALL))
def test_commands_that_need_a_cloud_name_files_that_exist(block: str) -> None:
    for name in re.findall(r"cluster/[\w./-]+", block):
        assert (ROOT / name).exists() or list(ROOT.glob(f"{name}*")), name
