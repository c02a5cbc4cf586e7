"""What runs beside Ray on every node: keeps logs and events, passes notices on, starts the night."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.request import Request, urlopen

import pytest
import yaml
from checkout import ROOT
from faults import SECONDS, wait_for
from schemas import documents, having
from seaweed import S3

from cluster.local import LocalCluster, free_ports, local_cluster
from cluster.node import keep
from xmc_ray import storage

NODE = ROOT / "cluster" / "node"
SUBMITTED = (
    "import ray; ray.init(); print(ray.get(ray.remote(lambda: 6 * 7).options(num_cpus=0, name='seven-times-six').remote()))"
)


def post(port: int, events: list[object]) -> None:
    urlopen(Request(f"http://127.0.0.1:{port}/v1/events", data=json.dumps(events).encode()), timeout=30).close()


@pytest.fixture
def session(tmp_path: Path) -> Path:
    """A session's folder as Ray leaves it, with a link to it, and a file that is no log."""
    folder = tmp_path / "ray" / "session_2026-11-23_00-30-00_1"
    (folder / "logs" / "old").mkdir(parents=True)
    (folder / "logs" / "raylet.out").write_text("one\n")
    (folder / "logs" / "old" / "gcs.out").write_text("two\n")
    (folder / "node_ip_address.json").write_text("{}")
    (tmp_path / "ray" / "session_latest").symlink_to(folder)
    return folder


def kept(place: str) -> dict[str, str]:
    return {file.uri.removeprefix(f"{place}/"): storage.read_bytes(file.uri).decode() for file in storage.all_files(place)}


def test_logs_are_copied_when_they_have_changed(session: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place, written, write = str(tmp_path / "kept"), [], storage.write_bytes
    monkeypatch.setattr(storage, "write_bytes", lambda uri, data: (written.append(uri), write(uri, data)))
    keeper = keep.Keeper(place, "a-pod", session.parent)
    keeper.turn()
    logs = f"a-pod/{session.name}/logs"
    assert kept(place) == {f"{logs}/raylet.out": "one\n", f"{logs}/old/gcs.out": "two\n"}
    with (session / "logs" / "raylet.out").open("a") as file:
        file.write("more\n")
    keeper.turn()
    assert kept(place)[f"{logs}/raylet.out"] == "one\nmore\n"
    assert [uri.rpartition("/")[2] for uri in written] == ["gcs.out", "raylet.out", "raylet.out"]


def test_events_wait_for_a_storage_that_is_away(
    session: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(keep, "MOST", 3)
    (tmp_path / "kept").write_text("a file, and no folder")
    keeper = keep.Keeper(str(tmp_path / "kept"), "a-pod", session.parent)
    keeper.receive([{"event": number} for number in range(2)])
    keeper.turn()
    assert "not kept yet: " in capsys.readouterr().out
    keeper.receive([{"event": number} for number in range(2, 4)])
    (tmp_path / "kept").unlink()
    keeper.turn()
    (lines,) = [text for name, text in kept(str(tmp_path / "kept")).items() if "/events/" in name]
    assert [json.loads(line)["event"] for line in lines.splitlines()] == [1, 2, 3], "the oldest goes first"


def test_it_ends_with_what_came_last(tmp_path: Path, s3: S3) -> None:
    """As a sidecar is ended: after Ray, by SIGTERM."""
    place, (port,) = s3.uri("kept"), free_ports(1)
    environment = {**os.environ, **s3.environment, "KEEP_AS": "a-pod", "KEEP_PORT": str(port)}
    environment |= {"PYTHONPATH": str(ROOT), "RAY_TMPDIR": str(tmp_path)}  # not the logs of a Ray that runs beside the test
    process = subprocess.Popen([sys.executable, NODE / "keep.py", place, "1000"], env=environment)
    try:

        def listening() -> bool:
            try:
                post(port, [{"event": "last"}])
            except OSError:
                return False
            return True

        wait_for(listening, every=0.2)
        process.send_signal(signal.SIGTERM)
        assert process.wait(SECONDS) == 0
    finally:
        process.kill()
    assert '{"event": "last"}\n' in "".join(kept(place).values())


@pytest.mark.slow
def test_ray_posts_its_events_as_the_manifests_ask(tmp_path: Path) -> None:
    """A real cluster with the variables of a pod; a task's name and its end are among what is kept."""
    (manifest,) = documents(ROOT / "cluster/kuberay/cluster.yaml")
    ray = next(having(manifest, "ports"))
    variables = {variable["name"]: variable["value"] for variable in ray["env"]}
    (port,) = free_ports(1)
    name = "RAY_DASHBOARD_AGGREGATOR_AGENT_EVENTS_EXPORT_ADDR"
    variables[name] = variables[name].replace(str(keep.PORT), str(port))
    with local_cluster(LocalCluster(nodes=0, variables=variables)) as cluster:
        keeper = keep.Keeper(str(tmp_path / "kept"), "a-pod", cluster.folder / "head")
        server = keep.receiver(keeper, port)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        ray_command = str(Path(sys.executable).with_name("ray"))
        submit = [ray_command, "job", "submit", "--", "python", "-c", SUBMITTED]
        environment = {**os.environ, **cluster.environment, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
        done = subprocess.run(submit, env=environment, capture_output=True, text=True, timeout=SECONDS)
        assert done.returncode == 0, done.stdout + done.stderr

        def all_is_kept() -> bool:
            keeper.turn()
            texts = kept(str(tmp_path / "kept"))
            events = "".join(text for name, text in texts.items() if "/events/" in name)
            wanted = ("seven-times-six", "DRIVER_JOB_LIFECYCLE_EVENT", "NODE_DEFINITION_EVENT", "FINISHED")
            return all(word in events for word in wanted) and any(name.endswith("/logs/raylet.out") for name in texts)

        wait_for(all_is_kept, every=1)
        server.shutdown()


# -- scripts -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def tools(tmp_path: Path) -> Path:
    """A folder for the PATH with a `ray` that writes down what it is asked, and fails until there is a file ``works``."""
    (tmp_path / "bin").mkdir()
    ray = tmp_path / "bin" / "ray"
    ray.write_text(f'#!/bin/bash\necho "$@" >> {tmp_path}/asked\n[ $(wc -l < {tmp_path}/asked) -gt 1 ]\n')
    ray.chmod(0o755)
    return tmp_path / "bin"


@pytest.fixture
def metadata() -> Iterator[tuple[str, threading.Event]]:
    """EC2's metadata service, version 2, of a spot machine, and the event upon which it gives notice."""
    notice = threading.Event()

    class Service(BaseHTTPRequestHandler):
        def do_PUT(self) -> None:
            self._answer(200 if self.headers["X-aws-ec2-metadata-token-ttl-seconds"] else 400, b"a token")

        def do_GET(self) -> None:
            known = (
                self.path == "/latest/meta-data/spot/instance-action" and self.headers["X-aws-ec2-metadata-token"] == "a token"
            )
            self._answer(200 if known and notice.is_set() else 404, b'{"action": "terminate"}')

        def _answer(self, status: int, body: bytes) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *arguments: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Service)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", notice
    server.shutdown()


def test_a_notice_of_ec2_reaches_ray(tools: Path, tmp_path: Path, metadata: tuple[str, threading.Event]) -> None:
    """Ray refuses the first time, and is asked again."""
    address, notice = metadata
    environment = {"PATH": f"{tools}:{os.environ['PATH']}", "METADATA": address, "EVERY": "0.2"}
    process = subprocess.Popen([NODE / "spot.sh"], env=environment)
    try:
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(2)
        assert not (tmp_path / "asked").exists()
        notice.set()
        assert process.wait(SECONDS) == 0
    finally:
        process.kill()
    asked = (tmp_path / "asked").read_text().splitlines()
    assert len(asked) == 2 and asked[0].startswith("drain-node --reason DRAIN_NODE_REASON_PREEMPTION ")
    from ray.scripts.scripts import drain_node

    known = {option for parameter in drain_node.params for option in parameter.opts}
    assert {word for word in asked[0].split() if word.startswith("--")} <= known


def test_a_night_that_fails_is_tried_again(tools: Path, tmp_path: Path) -> None:
    environment = {"PATH": f"{tools}:{os.environ['PATH']}", "PAUSE": "0"}
    night = [NODE / "night.sh", "2026-11-23", "--bundle", '["a", "b"]']
    assert subprocess.run(night, env=environment, timeout=60).returncode == 0
    asked = (tmp_path / "asked").read_text().splitlines()
    assert asked == [f'job submit -- python {ROOT}/jobs/tag.py --date 2026-11-23 --bundle ["a", "b"]'] * 2
    (tools / "ray").write_text("#!/bin/bash\nexit 1\n")
    assert subprocess.run(night, env=environment, timeout=60).returncode == 1


def test_what_cron_and_the_files_of_ec2_start_is_there() -> None:
    clusters = {path: path.read_text() for path in (ROOT / "cluster").glob("aws*.yaml")}
    started = re.findall(r"~/xmc_ray/(cluster/node/[\w.]+)", "".join([(NODE / "night.cron").read_text(), *clusters.values()]))
    assert {Path(name).name for name in started} == {"night.sh", "night.cron", "keep.py", "spot.sh"}
    assert all((ROOT / name).exists() for name in started)
    assert all(os.access(NODE / name, os.X_OK) for name in ("night.sh", "spot.sh"))
    for text in clusters.values():
        assert yaml.safe_load(text)["file_mounts"]["~/xmc_ray/cluster/node"] == "cluster/node"
