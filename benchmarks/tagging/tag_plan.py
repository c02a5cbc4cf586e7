"""Plans nights of 100 million documents, and resumes one with 10,000 finished pieces: what memory does the driver need?

*Plan.* `scan.scan`, the plan, and how it is saved and loaded, as in a night, on a Ray of this machine whose object store has
2 GiB and spills to disk. Files are described, not stored: 50,000 rows in 50 MB each, about 200 words a row. Where a night's
task would read one, the task of the benchmark makes the segments and the records of its rows out of their numbers; all that
follows is the library's. The first night tags all documents. In the next one, 3 % have changed, 1 % are new, and the others are
reused; one in a thousand repeats an id, in either.

*Resume.* `job.tag` goes on with a night all of whose pieces are written: 10,000 documents with 10 tags each, drawn from 1
million labels by Zipf's law with exponent 1.0. Distinct files are made by the library's own writer, and the others are links
to these. The night is stopped where it would publish.

The figure is the peak of the resident memory of the driver's process, libraries included, ten times a second. What the process
sees of the object store is not its own, and has the limit that Ray is given.
"""

import json
import logging
import os
import tempfile
import threading
import time
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import ray

from benchmarks.frame import verdict
from benchmarks.tagging._numbered import FILE_ROWS, NEW, TAG_ROWS, made, made_tags
from benchmarks.tagging._tagging import K, apart, machine, tag_config
from benchmarks.tagging.tag_millions import write_model
from xmc_ray import storage
from xmc_ray.bundle.members import Members
from xmc_ray.data.documents import DocumentsConfig, Rules
from xmc_ray.on_ray.tag import job as tagging
from xmc_ray.on_ray.tag import scan as scanning
from xmc_ray.on_ray.tag.config import TagConfig
from xmc_ray.on_ray.tag.output import Night
from xmc_ray.on_ray.tag.pieces import PieceWriter, TagColumns
from xmc_ray.on_ray.tag.plan import PIECES, REUSED, Plan, piece_name
from xmc_ray.on_ray.tag.runner import Runner
from xmc_ray.storage.listing import FileInfo

BAR = 2 << 30
FILE_BYTES, TAG_BYTES = 50_000_000, 128 << 20  # of a file of documents, and of tags
PIECE_ROWS, ACTORS = 10_000, 20
LABELS, DISTINCT = 1_000_000, 40
STORE = 2 << 30
DAY = "2026-11-23"


def resident() -> int:
    """Resident memory of this process in bytes, without what it sees of the object store."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    resident, stored = (int(status[name].split()[0]) for name in ("VmRSS", "RssShmem"))
    return 1024 * (resident - stored)


@contextmanager
def watched() -> Iterator[list[int]]:
    """`resident`, ten times a second."""
    samples, over = [resident()], threading.Event()

    def watch() -> None:
        while not over.wait(0.1):
            samples.append(resident())

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield samples
    finally:
        over.set()
        watcher.join()


# -- a plan --------------------------------------------------------------------------------------------------------------


def plan_night(documents: int, before: int, work: str) -> dict[str, Any]:
    """Plan a night of so many documents after one of ``before``, in a process of its own."""
    files = [
        FileInfo(uri=f"s3://catalogue/documents/part-{number:06}.parquet", size=FILE_BYTES, version=f"{number:032x}")
        for number in range(documents // FILE_ROWS)
    ]
    sizes = np.diff([*range(0, before, TAG_ROWS), before]).tolist()
    tags = [
        FileInfo(uri=f"s3://nights/part-{number:05}.parquet", size=TAG_BYTES, version=str(rows))
        for number, rows in enumerate(sizes)
    ]
    rules = Rules.of(DocumentsConfig(uri="s3://catalogue/documents"), labelled=False)
    runner = start_ray()
    began = time.monotonic()
    with patch.multiple(scanning, _scan=made, _scan_tags=made_tags), watched() as samples:
        plan = scanning.scan(files, rules, tags, PIECE_ROWS, 12 * ACTORS, 0.01, runner)
        plan.save(work)
    loaded = Plan.load(work)
    assert loaded is not None and loaded.rows == documents
    to_tag, reused = (sum(table["rows"].to_pylist()) for table in (loaded.pieces, loaded.reused))
    assert to_tag + reused == documents and (reused > 0) == (before > 0)
    seconds = time.monotonic() - began
    ray.shutdown()
    counts = {"pieces": len(loaded.pieces), "tasks": len(set(loaded.pieces["task"].to_pylist())), "reused": reused}
    return counts | {"seconds": seconds, "idle": samples[0], "peak": max(samples)}


def start_ray() -> Runner:
    """Ray on this machine with a small object store."""
    settings: dict[str, Any] = {"include_dashboard": False, "log_to_driver": False, "logging_level": logging.WARNING}
    variables = {"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_WAIT_POLICY": "PASSIVE"}
    ray.init(num_cpus=2, object_store_memory=STORE, runtime_env={"env_vars": variables}, **settings)
    return Runner()


# -- a resume ------------------------------------------------------------------------------------------------------------


class Stop(Exception):
    """A night ends here."""


class Killed(Runner):
    """Ends a night before its first piece."""

    def run_pieces(self, *given: Any) -> Iterator[dict[str, Any]]:
        raise Stop


def write_bundle(folder: str) -> None:
    """`LABELS` labels under a tiny model."""
    names = pa.array([f"label {number:07}" for number in range(LABELS)])
    write_model(folder, pa.ListArray.from_arrays(pa.array(np.arange(0, LABELS + 1, K, dtype=np.int32)), names))


def begin_night(folder: str, pieces: int) -> str:
    """A night with a plan of so many pieces, and none of them done; its folder for work."""
    Path(folder, "documents").mkdir()
    pq.write_table(pa.table({"id": ["a"], "text": ["a text"]}), f"{folder}/documents/a.parquet")
    file = asdict(storage.stat(f"{folder}/documents/a.parquet"))
    segment = file | {"start": 0, "row": 0, "rows": PIECE_ROWS, "reason": None, "detail": None}
    repeats: dict[str, Any] = {"place": [], "row": [], "file": [], "files": []}
    piece = {"rows": PIECE_ROWS, "segments": [segment], "skip": b"", "repeats": repeats}
    table = pa.Table.from_pylist([{"number": number, "task": number // 8, **piece} for number in range(pieces)], PIECES)
    plan = Plan(table, REUSED.empty_table(), pieces * PIECE_ROWS, 0, pieces * PIECE_ROWS)
    with patch.object(tagging, "scan", lambda *given: plan), suppress(Stop):
        tagging.tag(night_config(folder), Killed())
    ray.shutdown()
    return f"{folder}/nights/_nights/dt={DAY}/_work"


def night_config(folder: str) -> TagConfig:
    """The night of `begin_night`."""
    return tag_config(f"{folder}/documents", f"{folder}/bundle", f"{folder}/nights", date=DAY)


def write_pieces(folder: str, work: str, pieces: int) -> None:
    """All pieces of the night: `DISTINCT` files of its writer, and links to them."""
    members = Members.read(f"{folder}/bundle")
    index, _ = members.fetch()
    identity = storage.read_json(f"{work}/run.json")
    made_by = {name: identity[name] for name in ("release", "arithmetic")}
    write = PieceWriter(work, TagColumns(index, members.fingerprint, 0.0), made_by)
    chances_L = np.cumsum(1 / np.arange(1, LABELS + 1))
    for number in range(pieces):
        if number < DISTINCT:
            write(number, tagged(chances_L, number, made_by))
        else:
            os.link(*(f"{work}/pieces/{piece_name('t', each)}.parquet" for each in (number % DISTINCT, number)))


def tagged(chances_L: npt.NDArray[np.float64], seed: int, made_by: dict[str, str]) -> pa.Table:
    """What an actor hands to the writer."""
    random = np.random.default_rng(seed)
    ids = np.searchsorted(chances_L, random.random((PIECE_ROWS, K)) * chances_L[-1])
    values = {"ids": ids, "probabilities": -np.sort(-random.random((PIECE_ROWS, K)), axis=1)}
    types = {"ids": pa.int64(), "probabilities": pa.float32()}
    lists = {name: pa.FixedSizeListArray.from_arrays(pa.array(values[name].ravel(), types[name]), K) for name in types}
    strings = {name: [f"{name} {seed} {row}" for row in range(PIECE_ROWS)] for name in ("id", "file")}
    digests = {"text_digest": [f"{row:032x}" for row in random.integers(1 << 62, size=PIECE_ROWS).tolist()]}
    excerpts = pa.array(["the beginning of a text"] * 2 + [None] * (PIECE_ROWS - 2), pa.string())
    nulls = {name: pa.nulls(PIECE_ROWS, pa.string()) for name in ("reason", "detail")}
    counts = {"row": np.arange(PIECE_ROWS), "truncated": np.zeros(PIECE_ROWS, np.int8)}
    return pa.table(
        {**strings, **digests, "excerpt": excerpts, **nulls, **counts, **lists}, metadata={"made_by": json.dumps(made_by)}
    )


def resume_night(folder: str, pieces: int) -> dict[str, Any]:
    """Resume the night up to its publication, in a process of its own."""
    given: dict[str, Any] = {}

    def publish(night: Night, plan: Plan, size: int, manifest: dict[str, Any], *further: Any) -> None:
        given.update(manifest)
        raise Stop

    began = time.monotonic()
    with patch.object(Night, "publish", publish), watched() as samples, suppress(Stop):
        tagging.tag(night_config(folder))
    ray.shutdown()
    assert given["tagged"] == pieces * PIECE_ROWS, given
    return {"seconds": time.monotonic() - began, "labels": given["distinct_labels"], "peak": max(samples)}


# -- both ----------------------------------------------------------------------------------------------------------------


def gib(size: int) -> str:
    return f"{size / (1 << 30):.2f} GiB"


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=100_000_000, help="to plan, in files of 50,000")
    parser.add_argument("--pieces", type=int, default=10_000, help="to resume after")
    arguments = parser.parse_args()
    documents = arguments.documents // FILE_ROWS * FILE_ROWS
    print(f"{documents:,} documents to plan, {arguments.pieces:,} pieces to resume after, {machine()}", flush=True)
    peaks = {}
    with tempfile.TemporaryDirectory() as folder:
        for what, before in (("first night", 0), ("next night", documents - documents // NEW)):
            night = apart(plan_night, documents, before, f"{folder}/{what}")
            peaks[what] = night["peak"]
            found = f"{night['pieces']:,} pieces in {night['tasks']:,} tasks, {night['reused']:,} rows reused"
            print(
                f"{what}: {found}, {night['seconds']:.0f} s, driver {gib(night['peak'])}, idle {gib(night['idle'])}", flush=True
            )
        apart(write_bundle, folder)
        work = apart(begin_night, folder, arguments.pieces)
        apart(write_pieces, folder, work, arguments.pieces)
        night = apart(resume_night, folder, arguments.pieces)
    print(f"resume: {night['labels']:,} labels given, {night['seconds']:.0f} s, driver {gib(night['peak'])}")
    plan, resume = max(peaks.values()), night["peak"]
    figure = f"{gib(plan)} at {documents:,} rows, {gib(resume)} after {arguments.pieces:,} pieces"
    verdict("tag-plan", figure, f"{gib(BAR)} each", max(plan, resume) <= BAR)


if __name__ == "__main__":
    main()
