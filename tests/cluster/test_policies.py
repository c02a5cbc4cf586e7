"""The bucket policies of cluster/policies, enforced by a real server: enough for the jobs, and nothing more."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pyarrow.fs
import pytest
import ray.autoscaler
import yaml
from checkout import ROOT
from faults import SECONDS, submit
from fruit import options
from seaweed import S3, ports_of, weed_command

HEAD = ROOT / "cluster" / "policies" / "head.json"  # of machines; the others are of buckets
POLICIES = sorted(set(HEAD.parent.glob("*.json")) - {HEAD})
BUCKETS = ("my-catalogue", "my-models", "my-tags", "my-logs")
RIGHTS = {
    ("tag", "my-catalogue"): "list read",
    ("tag", "my-models"): "list read",
    ("tag", "my-tags"): "list read write delete",
    ("train", "my-catalogue"): "list read",
    ("train", "my-models"): "list read write delete",
    ("read-tags", "my-tags"): "list read",
    ("keep", "my-logs"): "write",
}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3]:
    """A server that knows a user for each policy, and the buckets with a file in each."""
    folder = tmp_path_factory.mktemp("policies")
    ports = ports_of(*(f"{part}.{port}" for part in ("master", "volume", "filer", "s3") for port in ("port", "port.grpc")))
    server = S3(endpoint=f"http://127.0.0.1:{ports['s3.port']}", folder=folder, bucket="unused")
    server.command = weed_command(folder, server, ports)
    users = [
        {"name": path.stem, "credentials": [keys(path.stem)], "actions": [], "policyNames": [path.stem]} for path in POLICIES
    ]
    policies = [{"name": path.stem, "content": filled_in(path.read_text())} for path in POLICIES]
    identities = {"identities": [*server.identities, *users], "policies": policies}
    (folder / "identities.json").write_text(json.dumps(identities))
    try:
        server.start()
        for bucket in BUCKETS:
            owner = filesystem(server, server.access_key, server.secret_key)
            owner.create_dir(bucket)
            write(owner, f"{bucket}/there")
        yield server
    finally:
        server.stop()


def filled_in(policy: str) -> str:
    for bucket in BUCKETS:
        policy = policy.replace(f":::{bucket.removeprefix('my-').upper()}", f":::{bucket}")
    return policy


def keys(user: str) -> dict[str, str]:
    return {"accessKey": f"{user}-access-key", "secretKey": f"{user}-secret-key"}


def filesystem(server: S3, key: str, secret: str) -> pyarrow.fs.S3FileSystem:
    return pyarrow.fs.S3FileSystem(
        access_key=key, secret_key=secret, endpoint_override=server.endpoint, region="us-east-1", allow_bucket_creation=True
    )


def write(fs: pyarrow.fs.S3FileSystem, path: str) -> None:
    with fs.open_output_stream(path) as stream:
        stream.write(b"content")


def environment(server: S3, user: str) -> dict[str, str]:
    ours = keys(user)
    return server.environment | {"AWS_ACCESS_KEY_ID": ours["accessKey"], "AWS_SECRET_ACCESS_KEY": ours["secretKey"]}


@pytest.mark.parametrize("bucket", BUCKETS)
@pytest.mark.parametrize("user", [path.stem for path in POLICIES])
def test_nobody_may_do_more_than_is_needed(server: S3, user: str, bucket: str) -> None:
    fs = filesystem(server, *keys(user).values())
    attempts = {
        "list": lambda: fs.get_file_info(pyarrow.fs.FileSelector(bucket, recursive=True)),
        "read": lambda: fs.open_input_file(f"{bucket}/there").read(),
        "write": lambda: write(fs, f"{bucket}/new by {user}"),
        "delete": lambda: fs.delete_file(f"{bucket}/new by {user}"),
    }
    allowed = []
    for what, attempt in attempts.items():
        try:
            attempt()
            allowed.append(what)
        except OSError:  # denied
            continue
    assert " ".join(allowed) == RIGHTS.get((user, bucket), "")


def test_jobs_get_along_with_them(server: S3, fruit: Path, tiny_encoder: Path) -> None:
    """Trained with one policy, tagged with another, read with the third."""
    owner = filesystem(server, server.access_key, server.secret_key)
    for name in ("train", "test", "labels"):
        with owner.open_output_stream(f"my-catalogue/{name}.parquet") as stream:
            stream.write((fruit / f"{name}.parquet").read_bytes())
    places = ["--documents.uri=s3://my-catalogue/train.parquet", "--label_names=s3://my-catalogue/labels.parquet"]
    training = [*options(fruit, tiny_encoder, "s3://my-models/run", *places), "--loop.epochs=2", "--checkpoints.steps=5"]
    tagging = [
        "--documents.uri=s3://my-catalogue/test.parquet",
        "--bundle=s3://my-models/run/bundle",
        "--pool.max=1",
        "--pool.threads=1",
    ]
    tagging += ["--output=s3://my-tags", "--date=2026-11-23"]
    for job, arguments in (("train", training), ("tag", tagging)):
        process = submit(job, arguments, **environment(server, job))
        output = process.communicate(timeout=SECONDS)[0]
        assert process.returncode == 0, output
    reader = filesystem(server, *keys("read-tags").values())
    night = "my-tags/_nights/dt=2026-11-23"
    marker = json.loads(reader.open_input_file(f"{night}/_SUCCESS").read())
    assert marker["files"] and all(
        reader.open_input_file(f"my-tags/tags/dt=2026-11-23/{name}").size() for name in marker["files"]
    )


def test_the_head_may_do_what_its_node_provider_asks_of_ec2_and_only_to_its_clusters() -> None:
    """The calls are read from Ray's own code; those that stop and start machines are for clusters that keep them."""
    source = Path(ray.autoscaler.__file__).with_name("_private").joinpath("aws/node_provider.py").read_text()  # needs boto3
    called = set(re.findall(r"meta\.client\.(\w+)|ec2(?:_fail_fast)?\.(create_instances|instances)\b", source))
    asked = {"".join(part.title() for part in "".join(pair).split("_")) for pair in called}
    unused = {"StartInstances", "StopInstances", "DescribeImages"}  # of kept machines, and of CloudWatch's agent
    names = {"Instances": "DescribeInstances", "CreateInstances": "RunInstances"}
    policy = json.loads(HEAD.read_text())["Statement"]
    allowed = {action for part in policy for action in part["Action"]}
    assert allowed == {f"ec2:{names.get(name, name)}" for name in asked - unused} | {"iam:PassRole"}
    clusters = sorted(
        yaml.safe_load((ROOT / "cluster" / name).read_text())["cluster_name"] for name in ("aws.yaml", "aws-cpu.yaml")
    )
    for part in policy:
        if set(part["Action"]) & {"ec2:TerminateInstances"} or part["Sid"] == "StartMachinesOfTheseClusters":
            ((_, only),) = part["Condition"]["StringEquals"].items()
            assert sorted(only) == clusters
