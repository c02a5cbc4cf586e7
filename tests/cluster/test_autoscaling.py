"""A night on a cluster that grows and shrinks: Ray's autoscaler, whose nodes are processes of this machine.

Nodes come for the actors that a night asks for, a node that is taken away in the middle costs no row, and all go in the end.
"""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from checkout import ROOT
from faults import SECONDS, children, kill, wait_for
from fruit import document, options, read_night

from cluster.local import LocalCluster, local_cluster

pytestmark = pytest.mark.slow

ROWS, COMMIT_ROWS, DAY = 40_000, 1_000, "2026-11-23"
ACTOR = "ray::MapWorker(MapBatches(TagPieces"


@pytest.fixture(scope="module")
def cluster() -> Iterator[LocalCluster]:
    with local_cluster(LocalCluster(cpus=3, grow=2, idle_minutes=0.2)) as running:
        assert running.living() == 1, "the head alone, which does no work"
        yield running


def submit(cluster: LocalCluster, *command: str) -> "subprocess.Popen[str]":
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    ray = str(Path(sys.executable).with_name("ray"))
    words = [
        ray,
        "job",
        "submit",
        f"--working-dir={ROOT}",
        f"--runtime-env={ROOT / 'cluster/runtime_env.yaml'}",
        "--",
        *command,
    ]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(words, env=inherited | cluster.environment, **pipes)  # type: ignore[call-overload,no-any-return]


def actors(cluster: LocalCluster) -> dict[int, int]:
    """The raylet, which stands for a node, of each of the cluster's processes that hold the model."""
    return {pid: raylet for raylet in cluster.pids("raylet/raylet") for pid in children(ACTOR, of=raylet)}


def test_a_night_grows_the_cluster_and_survives_the_loss_of_a_node(
    cluster: LocalCluster, trained: Path, tmp_path: Path
) -> None:
    pq.write_table(pa.Table.from_pylist([document(number) for number in range(ROWS)]), tmp_path / "documents.parquet")
    settings = {"documents.uri": tmp_path / "documents.parquet", "bundle": trained / "bundle", "output": tmp_path / "tags"}
    settings |= {"date": DAY, "k": 3, "commit_rows": COMMIT_ROWS, "pool.max": 2, "pool.threads": 1}
    settings |= {"pool.token_budget": 32}  # slow enough for nodes to come in the middle
    job = submit(cluster, "python", "jobs/tag.py", *(f"--{name}={value}" for name, value in settings.items()))
    work = tmp_path / "tags" / "_nights" / f"dt={DAY}" / "_work" / "pieces"

    def done() -> int:
        return len(list(work.glob("[!.]*")))

    wait_for(lambda: cluster.living() >= 2 or job.poll() is not None, every=1)  # a node comes for the first actor
    wait_for(lambda: len(actors(cluster)) == 2 or job.poll() is not None, every=1)  # more come, and the pool grows
    assert job.poll() is None, job.communicate()[0]
    assert len(set(actors(cluster).values())) == 2, "each on a node of its own"

    before = done()
    taken = next(iter(actors(cluster).values()))
    wait_for(lambda: done() > before or job.poll() is not None, every=1)
    assert job.poll() is None, "it was over too soon"
    assert kill([taken])  # as a spot machine goes
    output = job.communicate(timeout=SECONDS)[0]
    assert job.returncode == 0, output
    tags, rejects = read_night(tmp_path / "tags" / "_nights" / f"dt={DAY}")
    assert sorted(tags["id"].to_pylist()) == sorted(document(number)["id"] for number in range(ROWS)) and not len(rejects)

    wait_for(lambda: cluster.living() == 1, every=1)  # nobody needs them any more


def test_training_makes_the_cluster_grow(cluster: LocalCluster, fruit: Path, tiny_encoder: Path, tmp_path: Path) -> None:
    wait_for(lambda: cluster.living() == 1, every=1)
    arguments = options(fruit, tiny_encoder, tmp_path / "run", "--workers.count=2", "--workers.cpus=3", "--loop.epochs=1")
    job = submit(cluster, "python", "jobs/train.py", *arguments)
    started, most = time.monotonic(), 0
    while job.poll() is None and time.monotonic() - started < SECONDS:
        most = max(most, cluster.living())
        time.sleep(1)
    output = job.communicate(timeout=SECONDS)[0]
    assert job.returncode == 0, output
    assert most >= 3 and (tmp_path / "run" / "bundle" / "config.json").exists()
