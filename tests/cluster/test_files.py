"""The files in cluster/: valid by schema, in agreement with each other and with the code, locked, and without a secret."""

import copy
import re
import shlex
import subprocess
import uuid
from pathlib import Path

import pytest
import yaml
from checkout import ROOT
from schemas import VERSIONS, Document, accepts, check, documents, having, keys, misspelt

from xmc_ray import command
from xmc_ray.errors import ConfigError
from xmc_ray.on_ray.tag.config import TagConfig
from xmc_ray.on_ray.train.config import TrainConfig

FOLDER = ROOT / "cluster"
README = (FOLDER / "README.md").read_text()
JOBS: dict[str, type] = {"jobs/tag.py": TagConfig, "jobs/train.py": TrainConfig}
DAY = "2026-11-23"
DEFAULT = ["access.yaml", "cluster.yaml", "monitor.yaml", "nightly.yaml", "train.yaml"]  # nightly-raycronjob.yaml needs 1.7
FREE = {
    "annotations",
    "data",
    "hard",
    "labels",
    "limits",
    "matchLabels",
    "metadata",
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


@pytest.mark.parametrize("kuberay", VERSIONS)
def test_the_default_is_valid_with_every_operator_that_the_readme_names(kuberay: str) -> None:
    """The oldest knows no tokens; the readme has the command that makes do without."""
    assert f"| {kuberay.removeprefix('v')} |" in README
    (edit,) = re.findall(r"^sed '(.*authOptions.*)' cluster/", README, flags=re.MULTILINE)
    for name in DEFAULT:
        text = (FOLDER / "kuberay" / name).read_text()
        if kuberay == "v1.4.2":
            edited = subprocess.run(["sed", edit], input=text, capture_output=True, text=True, check=True).stdout
            gone = set(text.splitlines()) - set(edited.splitlines())
            assert all(re.match(r" *(authOptions: {mode: token} |image: &image )", line) for line in gone)
            text = edited
        for manifest in documents(text):
            check(manifest, kuberay)


def test_what_an_older_operator_lacks_is_known() -> None:
    night, job = of_kind("nightly-raycronjob.yaml", "RayCronJob"), of_kind("train.yaml", "RayJob")
    assert [version for version in VERSIONS if accepts(night, version)] == ["v1.7.0"]
    assert [version for version in VERSIONS if accepts(job, version)] == ["v1.5.1", "v1.6.2", "v1.7.0"]
    cluster_of(prior := copy.deepcopy(job))["workerGroupSpecs"][1]["priority"] = 1
    assert [version for version in VERSIONS if accepts(prior, version)] == ["v1.7.0"]


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
    pods = list(having(manifest, "containers"))
    boxes = [box for pod in pods for box in [*pod["containers"], *pod.get("initContainers", ())]]
    for container in [*boxes, *options]:
        locked = {"allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]}}
        assert container["securityContext"] == locked
        assert {"name": "tmp", "mountPath": "/tmp"} in container["volumeMounts"]
        requests, limits = container["resources"]["requests"], container["resources"]["limits"]
        assert requests == limits and {"cpu", "memory", "ephemeral-storage"} <= set(requests)


def test_pods_ask_for_the_disk_that_they_may_fill() -> None:
    """A node without it would evict them."""
    for part in having([param.values[0] for param in OF_RAY], "sizeLimit"):
        assert part == {"sizeLimit": "100Gi"}
    for pod in having([cluster_of(param.values[0]) for param in OF_RAY], "containers"):  # type: ignore[arg-type]
        (ray,) = pod["containers"]
        assert ray["resources"]["requests"]["ephemeral-storage"] == "110Gi"


@pytest.mark.parametrize("manifest", OF_RAY)
def test_a_cluster_scales_from_nothing_and_asks_for_the_token(manifest: Document) -> None:
    cluster = cluster_of(manifest)
    assert cluster["authOptions"] == {"mode": "token"}
    assert f"\nray=={cluster['rayVersion']}\n" in (ROOT / "constraints.txt").read_text()
    assert cluster["enableInTreeAutoscaling"] and cluster["autoscalerOptions"]["version"] == "v2"
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    groups = {group["groupName"]: group for group in cluster["workerGroupSpecs"]}
    gpus = {name: "nvidia.com/gpu" in str(group["template"]["spec"]["containers"]) for name, group in groups.items()}
    assert gpus == {"cpu": False, "gpu": True}
    for group in groups.values():
        assert group["minReplicas"] == 0 < group["maxReplicas"]
        assert not group["template"]["spec"]["automountServiceAccountToken"]


def test_it_is_the_same_cluster_everywhere_under_an_account_for_what_it_does() -> None:
    texts = {}
    for name, file in FILES.items():
        for manifest in file:
            if manifest["apiVersion"] == "ray.io/v1":
                cluster = cluster_of(manifest)
                (account,) = {pod["serviceAccountName"] for pod in having(cluster, "containers")}
                texts[name, account] = (
                    str(cluster)
                    .replace(account.replace("xmc-ray-", "object-storage-"), "SECRET")
                    .replace(f"'{account}'", "ACCOUNT")
                )
    accounts = {"cluster.yaml": "people", "train.yaml": "train", "nightly.yaml": "tag", "nightly-raycronjob.yaml": "tag"}
    assert set(texts) == {(name, f"xmc-ray-{account}") for name, account in accounts.items()} and len(set(texts.values())) == 1
    made = {each["metadata"]["name"]: each for each in FILES["access.yaml"] if each["kind"] == "ServiceAccount"}
    assert set(made) == {f"xmc-ray-{account}" for account in accounts.values()}
    for name, account in made.items():
        assert account["metadata"]["annotations"]["eks.amazonaws.com/role-arn"].endswith(f":role/{name}")
        assert not account["automountServiceAccountToken"]


@pytest.mark.parametrize("manifest", OF_RAY)
def test_logs_and_events_outlive_their_pod(manifest: Document) -> None:
    """A sidecar keeps them, beside every Ray container; a pod that ends has time for what a spot machine may do."""
    for pod in having(cluster_of(manifest), "containers"):
        (keep,), (ray,) = pod["initContainers"], pod["containers"]
        assert keep["restartPolicy"] == "Always" and keep["command"][:2] == ["python", "cluster/node/keep.py"]
        variables = {variable["name"]: variable.get("value") for variable in ray["env"]}
        assert (ROOT / keep["command"][1]).exists() and "KEEP_AS" in {variable["name"] for variable in keep["env"]}
        port = re.search(r"^PORT = (\d+)", (ROOT / keep["command"][1]).read_text(), flags=re.MULTILINE)
        assert port is not None
        assert variables["RAY_DASHBOARD_AGGREGATOR_AGENT_EVENTS_EXPORT_ADDR"] == f"http://127.0.0.1:{port[1]}"
        assert float(variables["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"] or 0) < pod["terminationGracePeriodSeconds"]


def test_prometheus_finds_the_ports_that_a_head_has() -> None:
    (monitor,) = FILES["monitor.yaml"]
    asked = [endpoint["port"] for endpoint in monitor["spec"]["podMetricsEndpoints"]]
    (head,) = cluster_of(of_kind("cluster.yaml", "RayCluster"))["headGroupSpec"]["template"]["spec"]["containers"]
    ports = {port["name"]: port["containerPort"] for port in head["ports"]}
    assert [ports[name] for name in asked] == [8080, 44217, 44227]


@pytest.mark.parametrize("name", FILES)
def test_the_image_is_named_once_a_file(name: str) -> None:
    version = re.search(r'^version = "(.*)"', (ROOT / "pyproject.toml").read_text(), flags=re.MULTILINE)
    assert version is not None
    text = (FOLDER / "kuberay" / name).read_text()
    images = {part["image"] for part in having(FILES[name], "image")} - {"KUBECTL"}
    assert len(re.findall(r"image: .*xmc_ray:", text)) == len(images) == ("containers" in text)
    assert images <= {f"REGISTRY/xmc_ray:{version[1]}-cu130"}
    told = re.findall(r"REGISTRY/xmc_ray:([\d.]+)-", (ROOT / "cluster" / "Dockerfile").read_text())
    assert told and set(told) == {version[1]}


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


def test_a_night_is_over_before_the_next_begins() -> None:
    job, night = of_kind("nightly.yaml", "RayJob")["spec"], of_kind("nightly.yaml", "CronJob")["spec"]
    minute, hour, *every = night["schedule"].split()
    assert (night["timeZone"], night["concurrencyPolicy"], every) == ("Etc/UTC", "Forbid", ["*", "*", "*"])
    begin, attempts = int(hour) * 3600 + int(minute) * 60, (1 + job["backoffLimit"]) * job["activeDeadlineSeconds"]
    assert attempts < night["jobTemplate"]["spec"]["activeDeadlineSeconds"]
    assert begin + night["startingDeadlineSeconds"] + night["jobTemplate"]["spec"]["activeDeadlineSeconds"] <= 86_400
    other = of_kind("nightly-raycronjob.yaml", "RayCronJob")["spec"]
    assert (other["schedule"], other["timeZone"]) == (night["schedule"], "Etc/UTC")
    assert begin + attempts < 86_400, "its attempts have to fall on one day"


def test_both_nights_are_the_same() -> None:
    job, other = of_kind("nightly.yaml", "RayJob"), of_kind("nightly-raycronjob.yaml", "RayCronJob")["spec"]["jobTemplate"]
    assert job["spec"] == other | {"entrypoint": other["entrypoint"].replace('"$(date -u +%F)"', "DAY")}
    assert other["shutdownAfterJobFinishes"] and job["metadata"]["name"].endswith("-DAY")


@pytest.mark.parametrize("name", ["xmc-ray-night-29923230", "again-2026-11-23"])
def test_the_cronjob_fills_in_the_day_of_its_schedule_and_waits_for_the_end(name: str, tmp_path: Path) -> None:
    job = of_kind("nightly.yaml", "CronJob")["spec"]["jobTemplate"]["spec"]["template"]["spec"]["containers"][0]
    (template,) = of_kind("nightly.yaml", "ConfigMap")["data"].values()
    (tmp_path / "rayjob.yaml").write_text(template)
    kubectl = 'if [ $1 = create ]; then [ ! -e made ] && cat > made; else echo "$2 $3" >> asked; [ $# = 3 ] || cat status; fi'
    (tmp_path / "kubectl").write_text(f"#!/bin/sh\n{kubectl}\n")
    (tmp_path / "kubectl").chmod(0o755)
    script = job["args"][0].replace("/night/", f"{tmp_path}/")
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "JOB": name}
    for status, code in (("Complete", 0), ("Failed", 1)):  # the second finds the RayJob of the first
        (tmp_path / "status").write_text(status)
        done = subprocess.run([*job["command"], script], cwd=tmp_path, env=environment, timeout=30)
        assert done.returncode == code
    made = yaml.safe_load((tmp_path / "made").read_text())
    assert made["metadata"]["name"] == f"xmc-ray-night-{DAY}" and f"--date {DAY} " in made["spec"]["entrypoint"]
    assert set((tmp_path / "asked").read_text().splitlines()) == {f"rayjob xmc-ray-night-{DAY}"}
    check(made)


COMMANDS = [part["entrypoint"] for found in FILES.values() for part in having(found, "entrypoint")]
COMMANDS += re.findall(r"python jobs/(?:[^\n]|\\\n)*", README.replace("\\\n", ""))
COMMANDS += re.findall(r"night\.sh (\$.*) >> ", (FOLDER / "node/night.cron").read_text())


@pytest.mark.parametrize("line", COMMANDS, ids=range(len(COMMANDS)))
def test_a_command_has_options_that_its_job_knows(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    if line.startswith("$"):  # of cron, which reads % as an end of line
        line = f"python jobs/tag.py --date {line.replace(chr(92), '')}"
    program, script, *arguments = shlex.split(line.replace("$(date -u +%F)", DAY).replace("DAY", DAY))
    assert program == "python"
    config = command.parse(JOBS[script], arguments)
    if script == "jobs/tag.py":
        assert (config.date, config.previous) == (DAY, "last")
        assert config.gate.documents is not None and config.gate.at_least and config.drift.fail is not None
    with pytest.raises(ConfigError):
        command.parse(JOBS[script], [*arguments, "--misspelt", "1"])


def test_there_are_commands() -> None:
    assert len(COMMANDS) == 5 and {line.split()[1] for line in COMMANDS if line.startswith("python")} == set(JOBS)


# -- all of them ---------------------------------------------------------------------------------------------------------

KEY_PAIR = r"AKIA[0-9A-Z]{16}|(?<![\w/.-])[A-Za-z0-9+/]{40}(?![\w/.-])|-----BEGIN"
NAMED = r"(?i:secret_access_key|password|auth_token)\s*[:=]\s*[^\s~$]"
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
    ours = [path for path in TEXTS if path.parent.name in ("kuberay", "node")]
    ours += [path for path in FOLDER.iterdir() if path.name.startswith(("aws", "Dockerfile", "image", "prometheus"))]
    for path in ours:
        found = set(re.findall(r"\b(?:" + pattern[1] + r")\b", path.read_text()))
        assert str(path.relative_to(FOLDER)) in README
        filled_in = re.search(r"To be filled in: (.*?)[.(]", path.read_text().replace("\n# ", " "))
        assert filled_in is None or found == set(re.findall("[A-Z]{3,}", filled_in[1])), path
    assert words == {word for path in ours for word in re.findall(r"\b(?:" + pattern[1] + r")\b", path.read_text())}
