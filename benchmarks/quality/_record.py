"""The record of a benchmark of quality: rows that are kept, what is still to be run, and the tables made of both."""

import argparse
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

from benchmarks.frame import verdict
from benchmarks.inputs import DATA, require
from benchmarks.quality._quality import ENVIRONMENTS, ROOT, Method, collect, fresh, run, stands
from benchmarks.quality._tables import JUDGED, Runs, lacking, margins, page, told

FRESH = "Nine tenths of each training split, measured on the rest; the test split is not looked at."


def read(record: Path) -> dict[str, Runs]:
    """The rows of a record, by data set."""
    sets: dict[str, Runs] = {}
    for line in record.read_text().splitlines() if record.exists() else ():
        row = json.loads(line)
        sets.setdefault(row.pop("set"), {})[row.pop("method")] = row
    return sets


def write(output: Path, sets: dict[str, Runs], about: str = "") -> None:
    """The tables, and their record: a line a row, sorted, so that two states of it differ in the rows that do."""
    rows = [{"set": set_, "method": name} | sets[set_][name] for set_ in sorted(sets) for name in sorted(sets[set_])]
    partial = output.with_suffix(".partial")
    partial.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    partial.replace(output.with_suffix(".jsonl"))  # a run that is ended here leaves the record whole
    output.write_text(page(sets, about))


def holding(runs: Runs, queue: list[Method], data: Path, same: Sequence[str] = ()) -> Runs:
    """Those of ``runs`` whose methods, in ``queue``, are still made of the same; ``same`` as in `stands`."""
    return {
        one.name: runs[one.name] for one in queue if one.name in runs and stands(told(runs[one.name]), one, data, 0.0, same)
    }


def unfinished(runs: Runs, queue: list[Method], data: Path, minutes: float, same: Sequence[str] = ()) -> list[Method]:
    """What of ``queue`` is to be run: what has no row that stands and is as new as its members', and they."""
    date = {name: told(one).get("date", "") for name, one in runs.items()}
    left = [
        one
        for one in queue
        if not stands(told(runs.get(one.name, {})), one, data, minutes, same)
        or date[one.name] < max((date.get(name, "") for name in one.members), default="")
    ]
    needed = {name for one in left for name in one.members}
    return [one for one in queue if one in left or one.name in needed]


def options(about: str | None, name: str) -> argparse.ArgumentParser:
    """The options of a benchmark that makes such tables; ``name`` is that of its results."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DATA, help="the folder that the data sets are in")
    parser.add_argument(
        "--methods", nargs="+", default=[""], help="only methods whose name begins with one of these, such as omikuji xmc_ray"
    )
    parser.add_argument("--results", type=Path, help=f"where runs are kept; runs/{name}, or {name}-fresh")
    parser.add_argument("--environments", type=Path, default=ENVIRONMENTS, help="where the peers' virtual environments are")
    parser.add_argument(
        "--output", type=Path, help=f"the tables, as Markdown; benchmarks/results/{name}.md, or {name}-fresh.md"
    )
    parser.add_argument("--again", action="store_true", help="repeat finished runs")
    parser.add_argument("--fresh", action="store_true", help="train and test on the training split alone")
    parser.add_argument("--score", action="store_true", help="run nothing: score and compare what is there")
    return parser


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """How tables are made: the ``name`` and the options, minutes that a run may take, and what rows must be ``same`` in."""

    name: str
    given: argparse.Namespace
    minutes: float
    same: tuple[str, ...] = ()

    @property
    def results(self) -> Path:
        kept: Path | None = self.given.results
        return kept or ROOT / "runs" / self._named(self.name)

    @property
    def output(self) -> Path:
        kept: Path | None = self.given.output
        return kept or ROOT / "benchmarks" / "results" / f"{self._named(self.name)}.md"

    def record(self, name: str) -> Path:
        """The record of this benchmark, or of another one, of fresh splits if these are."""
        output = self.output if name == self.name else ROOT / "benchmarks" / "results" / f"{self._named(name)}.md"
        return output.with_suffix(".jsonl")

    def _named(self, name: str) -> str:
        return f"{name}-fresh" if self.given.fresh else name

    def folder(self, set_: str, data: Path) -> Path:
        """``data``, or what `fresh` makes of it."""
        require(data)
        return fresh(data, self.results / "data" / set_) if self.given.fresh else data

    def measure(self, folders: dict[str, Path], known: dict[str, list[Method]], kept: dict[str, Runs]) -> None:
        """Run what of the ``known`` methods was asked for and has no row in ``kept`` that stands; tables, record, verdict.

        The first method of every set comes first, then the second.
        """
        queues = {
            set_: [one for one in queue if one.name.startswith(tuple(self.given.methods))] for set_, queue in known.items()
        }
        sets = {set_: kept.get(set_, {}) for set_ in dict.fromkeys([*kept, *known])}
        for set_, queue in known.items():
            found = sets[set_], collect(folders[set_], self.results / set_, [one.name for one in queue])
            sets[set_] = {name: one for runs in found for name, one in holding(runs, queue, folders[set_], self.same).items()}
        self.output.parent.mkdir(parents=True, exist_ok=True)
        rounds = [] if self.given.score else zip_longest(*([(set_, one) for one in queue] for set_, queue in queues.items()))
        for set_, method in (turn for turns in rounds for turn in turns if turn):
            data, out = folders[set_], self.results / set_ / method.name
            if self.given.again:
                shutil.rmtree(out, ignore_errors=True)
            elif method not in unfinished(sets[set_], queues[set_], data, self.minutes, self.same):
                continue
            run(method, data, out, self.given.environments, self.minutes, self.same)
            sets[set_] |= collect(data, out.parent, [method.name])
            write(self.output, sets, self.about)

        write(self.output, sets, self.about)
        print(page({set_: sets[set_] for set_ in known}, self.about))
        self.judge(sets, queues)

    @property
    def about(self) -> str:
        return FRESH if self.given.fresh else ""

    def judge(self, sets: dict[str, Runs], queues: dict[str, list[Method]]) -> None:
        """The last line: ahead everywhere, and nothing missing."""
        points = [margins(sets[set_]) for set_ in queues]
        least = min((one[name] for one in points if one for name in JUDGED), default=float("-inf"))
        faults = lacking(sets, {set_: [one.name for one in queue] for set_, queue in queues.items()})
        print("\n".join(faults))
        figure = f"{least:+.2f} points at the worst of {', '.join(JUDGED)}" if any(points) else "nothing to compare yet"
        over = ["failure" not in sets[set_].get(one.name, {"failure": ""}) for set_, queue in queues.items() for one in queue]
        holds = all(points) and least > 0 and not faults
        verdict(self.name, f"{figure}, {sum(over)} of {len(over)} runs finished", "above 0 on every set", holds)
