"""A night with a filter for each document against one without: what filters cost, by CPU seconds of the whole job.

Tate's documents and labels, two models with untrained heads: `words` has the lexical branch alone and scores all labels (flat
mode), so that masks weigh most; `groups` is MiniLM with groups of 32 labels. Four nights take turns in one process, by the
library's own steps without Ray, so that whatever else the machine does hits all alike:

    none      no filter
    tenants   50 filters by a column of the label table, each with a fiftieth of the labels
    denied    50 filters by name that deny a hundredth of the labels each
    own       a filter of its own for every document, with 20 labels

The ratio of the least CPU seconds of all rounds counts: what else a machine does can only add to them, and adds more in a round
than a filter costs. Medians and ranges of the rounds' own ratios are shown as well. Bar: `tenants` and `denied` take at most
1.02 times the CPU seconds; `own` is only shown.
"""

import io
import time
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from benchmarks.frame import verdict
from benchmarks.inputs import DATA
from benchmarks.tagging._tagging import documents_of, label_lists, machine, make_bundle, spread, tag_config, tagger
from xmc_ray.data.filters import FilterConfig, FiltersConfig
from xmc_ray.data.labels import LabelIndex
from xmc_ray.model.lexical import LexicalConfig
from xmc_ray.on_ray.pool import PoolConfig, ScoringConfig
from xmc_ray.on_ray.tag.job import tag
from xmc_ray.on_ray.tag.runner import Predict, Read, Row, Runner, Write

TENANTS, DENIED, OWN, BAR = 50, 100, 20, 1.02
POOL = PoolConfig(min=1, max=1, threads=1)
MODEL = ScoringConfig(precision="float32")  # for bfloat16 the job would ask Ray what the CPUs have


class InThisProcess(Runner):
    """The steps of a night one after the other, without Ray; a value is its own handle."""

    def start(self, pool: PoolConfig) -> PoolConfig:
        return pool

    def make_room(self, pool: PoolConfig) -> None:
        return

    def put(self, value: Any) -> Any:
        return value

    def submit(self, task: Any, *arguments: Any, returns: int = 1) -> Any:
        return task(*arguments)

    def get(self, handle: Any) -> Any:
        return handle

    def run_pieces(
        self, groups: Sequence[pa.Table], read: Read, predictor: Callable[[], Predict], write: Write, pool: PoolConfig
    ) -> Iterator[Row]:
        predict = predictor()
        for group in groups:
            for number, table in read(group.to_pylist()):
                yield write(number, predict(table))


def catalogue(folder: Path, data: Path, documents: int) -> dict[str, FiltersConfig]:
    """Write the documents with the columns that name filters, and the tables of labels; the filters of each night."""
    rows = documents_of(data, documents).select(["id", "text"])
    numbers = np.arange(len(rows))
    tenants, own = (pa.array([f"t{n % TENANTS}" for n in numbers]), pa.array([f"d{n}" for n in numbers]))
    rows = rows.append_column("tenant", tenants).append_column("own", own)
    (folder / "documents").mkdir()
    pq.write_table(rows, folder / "documents" / "part.parquet", row_group_size=8192)
    labels = LabelIndex.count([label_lists(data)]).labels.to_pylist()
    columns = {"label": labels, "tenant": [f"t{n % TENANTS}" for n in range(len(labels))]}
    columns |= {"denied": [f"t{n % DENIED}" for n in range(len(labels))]}
    pq.write_table(pa.table(columns), folder / "tenants.parquet")
    chosen = np.random.default_rng(0).integers(0, len(labels), (len(rows), OWN))
    pairs = {"label": np.array(labels)[chosen.ravel()], "own": np.repeat([f"d{n}" for n in numbers], OWN)}
    pq.write_table(pa.table(pairs), folder / "own.parquet")
    table, named = (
        str(folder / "tenants.parquet"),
        {f"t{n}": FilterConfig(deny_where={"denied": [f"t{n}"]}) for n in range(TENANTS)},
    )
    return {
        "none": FiltersConfig(),
        "tenants": FiltersConfig(column="tenant", by="tenant", table=table),
        "denied": FiltersConfig(column="tenant", named=named, table=table),
        "own": FiltersConfig(column="own", by="own", table=str(folder / "own.parquet")),
    }


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DATA / "tate", help="folder with train.parquet and test.parquet")
    parser.add_argument("--documents", type=int, default=8192, help="the first ones")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--layers", type=int, default=1, help="of MiniLM, in groups")
    parser.add_argument("--models", nargs="+", default=["words", "groups"], choices=["words", "groups"])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    grouped = tagger(arguments.layers)
    words = replace(grouped, encoder=replace(grouped.encoder, layers=0), lexical=LexicalConfig(width=512))
    print(f"{arguments.documents:,} documents, {machine()}; CPU seconds a night, times those without a filter, least by least")
    worst = 0.0
    for name, config, a_group in (("words", words, 1), ("groups", grouped, 32)):
        if name not in arguments.models:
            continue
        with TemporaryDirectory() as temporary:
            folder = Path(temporary)
            nights = catalogue(folder, arguments.data, arguments.documents)
            bundle = make_bundle(folder / "bundle", config, label_lists(arguments.data), a_group=a_group)
            cpu, wall = measured(folder, bundle, nights, arguments.rounds)
        for night, seconds in cpu.items():
            ratios = [filtered / none for filtered, none in zip(seconds, cpu["none"], strict=True)]
            least = min(seconds) / min(cpu["none"])
            told = f"{spread(seconds):>24}{median(wall[night]):8.1f} s{spread(ratios, 3):>26}{least:8.3f}"
            print(f"{name:8}{night:9}{told}", flush=True)
            worst = max(worst, least) if night in ("tenants", "denied") else worst
    verdict("tag-filter", f"{worst:.3f}", f"{BAR:.2f}", worst <= BAR)


def measured(
    folder: Path, bundle: str, nights: dict[str, FiltersConfig], rounds: int
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """CPU and wall seconds of each night in each round; the first round warms up, and their order turns."""
    cpu, wall = defaultdict[str, list[float]](list), defaultdict[str, list[float]](list)
    for number in range(1 + rounds):
        order = [*nights][:: 1 if number % 2 else -1]
        for night in order:
            output = str(folder / f"{night}-{number}")
            config = tag_config(str(folder / "documents"), bundle, output, pool=POOL, model=MODEL, filters=nights[night])
            began, cpu_began = time.perf_counter(), time.process_time()
            with redirect_stdout(io.StringIO()):
                tag(config, InThisProcess())
            if number:
                cpu[night].append(time.process_time() - cpu_began)
                wall[night].append(time.perf_counter() - began)
    return {night: cpu[night] for night in nights}, wall


if __name__ == "__main__":
    main()
