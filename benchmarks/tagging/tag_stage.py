"""The stage in somebody else's pipeline against the tagging job: tate's documents, Parquet to Parquet on this machine.

`stage`: ``read_parquet -> map_batches(Tagger) -> write_parquet``, 4,096 rows a batch. `job`: jobs/tag.py, as it is. Both have
the same actors, and run in one Ray whose processes are warm.

A side's seconds begin when its first documents are at the model and end when all is written; what the job reads and tokenises
before counts with its CPU seconds, shared among the cores, as in `tag-speed`. The job's scan comes before and is left out. CPU
seconds are those of Ray and all of its workers from the beginning to the end, with the scan and the loading of the models. They
take turns, and the median of the rounds counts.

Tags are compared row by row. Scores of a document differ by rounding with what it is padded together with; where labels are
not the same in the same order, those that have changed places must be as close as rounding brings them (`CLOSE`). The
model: MiniLM with all its layers (unless told) and tate's labels, heads untrained. Bar: 0.95 of the job's rate; not a row
with other tags.
"""

import os
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray.data

from benchmarks.frame import verdict
from benchmarks.tagging._tagging import (
    Diary,
    K,
    Timed,
    descendants,
    diary,
    documents_of,
    label_lists,
    make_bundle,
    noted,
    own_ray,
    parsed,
    parser_of,
    spread,
    tag_config,
    tagger,
    told,
    write_documents,
)
from xmc_ray import storage
from xmc_ray.bundle.members import Members
from xmc_ray.on_ray.pool import PoolConfig
from xmc_ray.on_ray.tag.nights import tag_files
from xmc_ray.on_ray.tag.stage import Tagger

BAR, BATCH, WARM = 0.95, 4096, 256
CLOSE = 2e-3  # of scores in bfloat16


class TimedTagger(Tagger):
    """Notes the loading of the model, and each batch."""

    def __init__(self, bundle: Any, **settings: Any) -> None:
        with noted("load"):
            super().__init__(bundle, **settings)

    def __call__(self, batch: Any) -> pa.Table:
        with noted("tag"):
            return super().__call__(batch)


def pipeline(book: Diary, source: str, bundle: str, target: str, pool: PoolConfig, batch_format: str) -> Timed:
    """A pipeline as its owner would write it, with the actors of a night."""
    began = time.time()
    given = {"bundle": Members.read(bundle), "k": K, "pool": pool}
    dataset = ray.data.read_parquet(source)
    batches: dict[str, Any] = {"batch_size": BATCH, "batch_format": batch_format}
    tagged = dataset.map_batches(TimedTagger, fn_constructor_kwargs=given, **batches, **pool.resources)
    tagged.write_parquet(target)
    return Timed(target, began, time.time(), book.since(began))


@contextmanager
def cpu_seconds() -> Iterator[list[float]]:
    """Puts into the list the CPU seconds of all processes below this one, those included that come and go meanwhile."""
    before, latest, over, seconds = _cpu(), dict[int, float](), threading.Event(), list[float]()

    def watch() -> None:
        while not over.wait(0.5):
            latest.update(_cpu())

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield seconds
    finally:
        over.set()
        watcher.join()
        latest.update(_cpu())
        seconds.append(sum(value - before.get(process, 0.0) for process, value in latest.items()))


def _cpu() -> dict[int, float]:
    used, ticks = {}, os.sysconf("SC_CLK_TCK")
    for process in descendants():
        with suppress(OSError):
            fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
            used[process] = (int(fields[11]) + int(fields[12])) / ticks
    return used


def compared(night: str, target: str) -> tuple[int, int, float]:
    """Rows with the same labels in the same order; rows with other tags than rounding explains; the largest difference."""
    theirs = {row["id"]: row for file in tag_files(night) for row in storage.read_parquet(file.uri).to_pylist()}
    ours = {row["id"]: row for row in pq.read_table(target).to_pylist()}
    same, other, most = 0, len(ours.keys() ^ theirs.keys()), 0.0
    for id in ours.keys() & theirs.keys():
        one, two = ours[id], theirs[id]
        gaps = np.abs(np.subtract(one["scores"], two["scores"])) if len(one["scores"]) == len(two["scores"]) else [np.inf]
        same += one["labels"] == two["labels"]
        most = max(most, *gaps)
        other += not is_close(one, two)
    return same, other, most


def is_close(one: dict[str, Any], two: dict[str, Any]) -> bool:
    """Whether both have the same labels with the same scores, but for rounding; the last ones may be others as good."""
    sides = [dict(zip(row["labels"], row["scores"], strict=True)) for row in (one, two)]
    if len(sides[0]) != len(sides[1]):
        return False
    last = [min(side.values(), default=0.0) for side in sides]
    pairs = [
        tuple(side.get(label, least) for side, least in zip(sides, last, strict=True)) for label in {**sides[0], **sides[1]}
    ]
    return all(abs(a - b) <= CLOSE for a, b in pairs)


def row(name: str, side: Timed, rows: int, cpu: float) -> None:
    print(f"{name:8}{side.seconds:10.1f}{rows / side.seconds:8.1f}{side.ended - side.began:12.1f}{cpu:9.1f}", flush=True)


def main() -> None:
    parser = parser_of(__doc__, documents=12_288, rounds=3)
    parser.add_argument("--format", default="pyarrow", help="of the stage's batches: pyarrow, pandas, or numpy")
    arguments = parsed(parser)
    documents, ratios, cpu_ratios, wrong = documents_of(arguments.data, arguments.documents), [], [], 0
    with tempfile.TemporaryDirectory() as folder, diary() as book, own_ray():
        pool = arguments.pool.settled()
        bundle = make_bundle(Path(folder) / "bundle", tagger(arguments.layers), label_lists(arguments.data))
        few = write_documents(f"{folder}/few", documents.slice(0, WARM))
        source = write_documents(f"{folder}/documents", documents, files=4)
        book.night(tag_config(few, bundle, f"{folder}/warm", pool=pool))
        print(told(arguments))
        print(f"{'':8}{'seconds':>10}{'docs/s':>8}{'from start':>12}{'CPU s':>9}", flush=True)
        for turn in range(arguments.rounds):
            with cpu_seconds() as cpu:
                night = book.night(tag_config(source, bundle, f"{folder}/night-{turn}", pool=pool))
            row("job", night, len(documents), cpu[0])
            with cpu_seconds() as own:
                stage = pipeline(book, source, bundle, f"{folder}/stage-{turn}", pool, arguments.format)
            row("stage", stage, len(documents), own[0])
            ratios.append(night.seconds / stage.seconds)
            cpu_ratios.append(own[0] / cpu[0])
            same, other, most = compared(night.folder, stage.folder)
            wrong += other
            print(f"{same:,} rows have the same labels in the same order, {other} other tags; scores differ by {most:.1e}")
    print(f"rate of the stage by that of the job {spread(ratios)}; CPU seconds {spread(cpu_ratios)}")
    figure = f"{median(ratios):.2f}; {wrong} other rows"
    verdict("tag-stage", figure, f"{BAR:.2f}; 0", median(ratios) >= BAR and not wrong)


if __name__ == "__main__":
    main()
