"""A Ray cluster of several nodes on this machine, for developers and for the tests: `make cluster`.

    python cluster/local.py [--nodes 2] [--cpus 3]       a head without work, and nodes that work
    python cluster/local.py --grow 3                     no node but the head; an autoscaler starts and ends up to three

It runs until Ctrl-C, and then stops everything that it has started. It uses free ports: the dashboard's on 127.0.0.1, the
others on the machine's own address, where Ray listens whatever address it is given; all require the token. Token, logs and
objects are in a temporary folder. It prints the file that a shell has to source to use the cluster.
"""

import argparse
import json
import os
import random
import secrets
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from urllib.error import URLError
from urllib.request import Request, urlopen

HOST = "127.0.0.1"
# Makes a `ray start` the head of an autoscaler whose machines are processes.
HEAD_OF_MAKE_BELIEVE = {
    "RAY_FAKE_CLUSTER": "1",
    "AUTOSCALER_UPDATE_INTERVAL_S": "1",
    "RAY_enable_autoscaler_v2": "1",
    "RAY_CLOUD_INSTANCE_ID": "f" * 51 + "00000",
    "RAY_OVERRIDE_NODE_ID_FOR_TESTING": "f" * 51 + "00000",
}
WORKER = "worker"  # the type of node that the autoscaler starts
_PORTS = (
    "--node-manager-port",
    "--object-manager-port",
    "--dashboard-agent-grpc-port",
    "--dashboard-agent-listen-port",
    "--runtime-env-agent-port",
    "--metrics-export-port",
)
_SERVERS = range(20_000, 32_768)  # ports above those of Ray's workers, and below those that Linux gives to connections
_START_SECONDS, _END_SECONDS = 90, 5
_ATTEMPTS = 3  # to start: a `ray start` that finds one of its ports taken, a moment after it was free, waits for ever
STORE_BYTES = 200_000_000  # of each node's object store: all of them share this machine's memory


@dataclass
class LocalCluster:
    """``nodes`` of ``cpus`` each beside a head without CPUs; with ``grow``, up to that many start and stop on demand."""

    nodes: int = 2
    cpus: int = 3
    grow: int = 0
    idle_minutes: float = 1.0
    variables: Mapping[str, str] = field(default_factory=dict)
    """Further environment variables of every process of the cluster."""
    folder: Path = field(default_factory=lambda: Path(tempfile.mkdtemp(prefix="xmc-")))  # short: paths of sockets are limited
    processes: "list[subprocess.Popen[bytes]]" = field(default_factory=list)

    def __post_init__(self) -> None:
        token = self.folder / "token"
        token.touch(mode=0o600)
        token.write_text(secrets.token_hex(32))
        self._take_ports()

    def _take_ports(self) -> None:
        self.port, self.dashboard_port = free_ports(2)
        self.address, self.dashboard = f"{HOST}:{self.port}", f"http://{HOST}:{self.dashboard_port}"
        self.environment = {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(self.folder / "token"),
            "RAY_API_SERVER_ADDRESS": self.dashboard,
            "RAY_ADDRESS": self.address,
        }

    def start(self) -> None:
        """Start the head and the nodes, and wait until all of them are up, if need be again with other ports.

        RuntimeError if they do not start.
        """
        for left in reversed(range(_ATTEMPTS)):
            try:
                return self._start()
            except RuntimeError:
                if not left:
                    raise
                self._end()
                for place in self.folder.iterdir():
                    if place.is_dir():
                        shutil.rmtree(place, ignore_errors=True)
                self._take_ports()

    def _start(self) -> None:
        options = {"--port": self.port, "--dashboard-port": self.dashboard_port, "--dashboard-host": HOST, "--num-cpus": 0}
        variables = dict(self.variables)
        if self.grow:
            config = self.folder / "autoscaling.json"
            config.write_text(json.dumps(self._autoscaling()))
            options["--autoscaling-config"] = config
            variables |= HEAD_OF_MAKE_BELIEVE | {"PYTHONPATH": str(Path(__file__).parent.parent)}
        self.processes.append(ray_start(self.folder, "head", ["--head"], options, variables))
        self._wait(1)
        if not self.grow:
            for _ in range(self.nodes):
                self.add_node()
            self._wait(1 + self.nodes)

    def add_node(self) -> None:
        """One more node."""
        self.processes.append(start_node(self.folder, self.address, self.cpus, self.variables))

    @property
    def metrics(self) -> list[str]:
        """The metrics endpoint of every node, including those that are gone."""
        return [f"http://{HOST}:{path.read_text()}/metrics" for path in sorted(self.folder.glob("*/metrics-port"))]

    def stop(self) -> None:
        """Stop everything that was started, and remove the folder."""
        self._end()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _end(self) -> None:
        for process in reversed(self.processes):
            process.terminate()
        for process in self.processes:
            try:
                process.wait(_END_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
        for pid in self.pids():
            _kill(pid)
        self.processes.clear()

    def pids(self, *words: str) -> list[int]:
        """This cluster's processes, including drivers of jobs, whose command line has all of ``words``.

        They have the cluster's folder in their command line or, where it can be read, in their environment.
        """
        listed = subprocess.run(["ps", "-ww", "-eo", "pid=,args="], capture_output=True, text=True, check=True).stdout
        commands = {int(pid): command for pid, command in (line.split(None, 1) for line in listed.splitlines())}
        folder = str(self.folder)
        return [
            pid
            for pid, command in commands.items()
            if pid != os.getpid()
            and all(word in command for word in words)
            and (folder in command or f"{folder}/".encode() in _environment(pid))
        ]

    def _wait(self, nodes: int) -> None:
        """Wait until the dashboard reports this many living nodes."""
        give_up = time.monotonic() + _START_SECONDS
        while self.living() < nodes:
            if time.monotonic() > give_up or any(process.poll() is not None for process in self.processes):
                log = (self.folder / "start.log").read_text(errors="replace")[-3000:]
                raise RuntimeError(f"the cluster did not start; its folder is {self.folder}\n{log}")
            time.sleep(0.5)

    def living(self) -> int:
        """The number of nodes that are alive, including the head; 0 while the dashboard does not answer."""
        token = Path(self.environment["RAY_AUTH_TOKEN_PATH"]).read_text()
        request = Request(f"{self.dashboard}/nodes?view=summary", headers={"Authorization": f"Bearer {token}"})
        try:
            with urlopen(request, timeout=10) as answer:
                summary = json.load(answer)["data"]["summary"]
        except (URLError, OSError, ValueError, KeyError):
            return 0
        return sum(node["raylet"].get("state") == "ALIVE" for node in summary)

    def _autoscaling(self) -> dict[str, object]:
        """For Ray's autoscaler: a provider whose machines are processes."""
        kinds = {
            "ray.head.default": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
            WORKER: {
                "resources": {"CPU": self.cpus, "object_store_memory": STORE_BYTES},
                "node_config": {},
                "min_workers": 0,
                "max_workers": self.grow,
            },
        }
        provider = {
            "type": "external",
            "module": "cluster.processes.Processes",
            "folder": str(self.folder),
            "address": self.address,
            "variables": dict(self.variables),
            "disable_launch_config_check": True,
            "disable_node_updaters": True,
            "foreground_node_launch": True,
            "launch_multiple": True,
            "head_node_id": HEAD_OF_MAKE_BELIEVE["RAY_CLOUD_INSTANCE_ID"],
        }
        return {
            "cluster_name": "local",
            "max_workers": self.grow,
            "idle_timeout_minutes": self.idle_minutes,
            "provider": provider,
            "available_node_types": kinds,
            "head_node_type": "ray.head.default",
            "auth": {},
            "upscaling_speed": 1.0,
            **{name: [] for name in ("setup_commands", "head_setup_commands", "worker_setup_commands")},
            **{name: [] for name in ("initialization_commands", "head_start_ray_commands", "worker_start_ray_commands")},
            "file_mounts": {},
            "cluster_synced_files": [],
            "file_mounts_sync_continuously": False,
            "rsync_exclude": [],
            "rsync_filter": [],
            "docker": {},
        }


@contextmanager
def local_cluster(cluster: LocalCluster) -> Iterator[LocalCluster]:
    """Start a cluster, and stop it whatever happens."""
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


def start_node(folder: Path, address: str, cpus: int, variables: Mapping[str, str]) -> "subprocess.Popen[bytes]":
    """A node of the cluster at ``address``, whose folder has its token."""
    return ray_start(folder, f"node-{secrets.token_hex(2)}", [], {"--address": address, "--num-cpus": cpus}, variables)


def ray_start(
    folder: Path, name: str, flags: Sequence[str], options: Mapping[str, object], variables: Mapping[str, str]
) -> "subprocess.Popen[bytes]":
    """`ray start` with its own ports and folder: nodes that share a folder overwrite each other's unpacked job files."""
    place = folder / name
    place.mkdir()
    ports = dict(zip(_PORTS, free_ports(len(_PORTS)), strict=True))
    (place / "metrics-port").write_text(str(ports["--metrics-export-port"]))
    given = {"--temp-dir": place, "--node-ip-address": HOST, "--object-store-memory": STORE_BYTES} | ports | dict(options)
    command = [str(Path(sys.executable).with_name("ray")), "start", "--block", "--disable-usage-stats", *flags]
    environment = {name: value for name, value in os.environ.items() if name not in ("RAY_ADDRESS", "RAY_AUTH_TOKEN")}
    environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(folder / "token"), "OMP_WAIT_POLICY": "PASSIVE"}
    environment |= {"RAY_raylet_start_wait_time_s": "120"}  # Ray's 30 are too few for a machine whose cores are all busy
    environment |= {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"} | dict(variables)
    with (folder / "start.log").open("ab") as log:
        command += [f"{option}={value}" for option, value in given.items()]
        return subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)


def free_ports(number: int) -> list[int]:
    """Distinct ports that are free on all of this machine's addresses; all are held until the last is found.

    Of those from which the system takes one for each connection, any may be gone before a server binds to it: a `ray start`
    that then finds one of its ports taken waits for ever.
    """
    ports = list[int]()
    with ExitStack() as held:
        for port in random.sample(_SERVERS, len(_SERVERS)):
            with suppress(OSError):
                held.enter_context(socket.create_server(("", port)))
                ports.append(port)
            if len(ports) == number:
                return ports
    raise OSError(f"{number} ports from {_SERVERS[0]} to {_SERVERS[-1]} are not free")


def _environment(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:  # it has ended, is another user's, or there is no /proc
        return b""


def _kill(pid: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, default=2, help="worker nodes")
    parser.add_argument("--cpus", type=int, default=3, help="CPUs that each of them announces")
    parser.add_argument("--grow", type=int, default=0, help="start nodes on demand instead, at most this many")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    with local_cluster(LocalCluster(**vars(arguments))) as cluster:
        shell = cluster.folder / "use"
        lines = [f"export {name}={shlex.quote(value)}\n" for name, value in cluster.environment.items()]
        shell.write_text("".join(lines) + f'export PATH={shlex.quote(str(Path(sys.executable).parent))}:"$PATH"\n')
        print(f"ready; in another shell:\n\n    source {shell}", flush=True)
        print("    ray status\n    ray job submit --working-dir . --runtime-env cluster/runtime_env.yaml -- \\")
        print("        python jobs/tag.py --help\n\nCtrl-C ends it.", flush=True)
        try:
            signal.pause()
        except (KeyboardInterrupt, SystemExit):
            print("ending", flush=True)


if __name__ == "__main__":
    main()
