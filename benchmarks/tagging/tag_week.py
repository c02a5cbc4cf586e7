"""A week of nights as an operator has them: kills, reuse, changes, a bad bundle that is rolled back, old nights that go.

Every night is `python jobs/tag.py` in processes of its own. On most days it is killed with SIGKILL, up to three times, at
moments drawn by chance, and started again by the same command. Each day 3 % of the catalogue is gone, new or revised. On the
fifth day a bundle that has learnt wrong labels is published, and replaced in the morning: `--overwrite` with the bundle of
before, and `--previous` the night of before. Four nights are kept.

After every kill and every night pyarrow, pandas, polars, DuckDB and Ray Data read the folder of the day, all days by partition,
and patterns of files. Somebody downstream applies the changes of each night to the tags of the night before.

Bar: every reader finds no row of an unfinished night, exactly the manifest's rows of a finished one, each id once, and the
downstream copy is the night. The model is of words alone, trained on the catalogue.
"""

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.frame import verdict
from benchmarks.inputs import minilm
from benchmarks.tagging._readers import READERS, read_by_all
from benchmarks.tagging._tagging import documents_of, options, write_documents
from benchmarks.tagging.tag_changes import changed
from xmc_ray import XMCClassifier
from xmc_ray.model.encoder import EncoderConfig
from xmc_ray.model.lexical import LexicalConfig
from xmc_ray.model.tokenizer import TextConfig
from xmc_ray.training.fit import FitConfig
from xmc_ray.training.loop import LoopConfig

ROOT = Path(__file__).resolve().parents[2]
DAYS = [f"2026-11-{day}" for day in range(16, 23)]
BAD, KEPT, KILLS, SECONDS = DAYS[4], 4, 3, (6.0, 30.0)
Copy = dict[str, tuple[Any, Any]]
WORDS = FitConfig(
    encoder=EncoderConfig(name=str(minilm()), layers=0),
    text=TextConfig(max_tokens=64),
    lexical=LexicalConfig(width=64, columns=1 << 16),
    loop=LoopConfig(epochs=2, batch_size=64),
)


def job(name: str, *arguments: object, kill_after: float | None = None) -> bool:
    """Whether ``jobs/<name>.py`` was through before it was killed; what it says is printed. RuntimeError if it fails."""
    command = [sys.executable, str(ROOT / "jobs" / f"{name}.py"), *map(str, arguments)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)
    try:
        said, _ = process.communicate(timeout=kill_after)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        print(f"    kill -9 after {kill_after:.0f} s")
        return False
    lines = [
        line for line in said.splitlines() if line.startswith(("tagged", "resuming", "finished", "removed", "error", "dt="))
    ]
    print("".join(f"    {line}\n" for line in lines), end="", flush=True)
    if process.returncode:
        raise RuntimeError(said)
    return True


def ids_by_ray(tags: Path, day: str) -> list[str]:
    """What Ray Data reads, in a process of its own."""
    program = f"import ray.data; print(*sorted(ray.data.read_parquet({str(tags / f'dt={day}')!r}).to_pandas()['id']))"
    return subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout.split()


def rows_of(table: pa.Table) -> Copy:
    return {row["id"]: (row["labels"], row["scores"]) for row in table.to_pylist()}


def applied(copy: Copy, changes: pa.Table) -> Copy:
    """Tags of the night before, with a night's changes."""
    copy = dict(copy)
    for row in changes.to_pylist():
        if row["kind"] == "removed":
            del copy[row["id"]]
        else:
            copy[row["id"]] = (row["labels"], row["scores"])
    return copy


class Week:
    """The output, those who read it, and what they have found wrong."""

    def __init__(self, output: Path) -> None:
        self.output, self.tags = output, output / "tags"
        self.copy: Copy = {}
        self.copied_run = ""
        self.reads, self.wrong = 0, 0

    def read(self, day: str, expected: set[str] | None) -> None:
        """All readers; ``expected``: ids of the day, None while no night of it is finished."""
        found = read_by_all(self.tags, day) if (self.tags / f"dt={day}").exists() else {name: [] for name in READERS}
        for ids in found.values():
            self.reads += 1
            self.wrong += ids != sorted(expected or [])

    def morning(self, day: str) -> None:
        """A finished night is read, and the copy downstream is brought up to date."""
        night = self.output / "_nights" / f"dt={day}"
        manifest = json.loads((night / "manifest.json").read_text())
        tags = pq.read_table(self.tags / f"dt={day}", partitioning=None)
        ids = tags["id"].to_pylist()
        self.wrong += not (len(ids) == len(set(ids)) == manifest["tagged"] + manifest["reused"])
        self.read(day, set(ids))
        self.reads, self.wrong = self.reads + 1, self.wrong + (ids_by_ray(self.tags, day) != sorted(ids))
        since = manifest["changes_since"]
        if since and since["run"] == self.copied_run:
            changes = pa.concat_tables([pq.read_table(night / name, partitioning=None) for name in manifest["changes"]])
            self.copy = applied(self.copy, changes)
            print(f"    changes: {len(changes):,} of {len(ids):,} rows, applied downstream")
        else:
            self.copy = rows_of(tags)
            print(f"    downstream takes all {len(ids):,} rows: {manifest['no_changes'] or 'its copy is of another run'}")
        self.copied_run = manifest["run"]
        self.wrong += self.copy != rows_of(tags)
        print(f"    {self.wrong} of {self.reads} reads wrong so far", flush=True)


def main() -> None:
    arguments = options(__doc__, documents=6_000)
    documents, chance = documents_of(arguments.data, arguments.documents), random.Random(0)
    started = time.time()
    with tempfile.TemporaryDirectory() as folder:
        week, bundles = Week(Path(folder, "catalogue")), {name: Path(folder, name) for name in ("good", "bad")}
        texts, labels = (documents[name].to_pylist() for name in ("text", "labels"))
        XMCClassifier.fit(texts, labels, config=WORDS).save(bundles["good"])
        XMCClassifier.fit(texts, labels[::-1], config=WORDS).save(bundles["bad"])
        kills = 0
        for number, day in enumerate(DAYS):
            documents = changed(documents, number)
            source = write_documents(str(Path(folder, f"documents-{day}")), documents, files=4)
            bundle = bundles["bad" if day == BAD else "good"]
            command: list[object] = ["--documents.uri", source, "--bundle", bundle, "--output", week.output, "--date", day]
            command += ["--previous", "last", "--keep.nights", KEPT, "--commit_rows", 500, "--k", 5]
            print(f"{day}", flush=True)
            for _ in range(chance.randrange(KILLS + 1)):
                if job("tag", *command, kill_after=chance.uniform(*SECONDS)):
                    break
                kills += 1
                finished = (week.output / "_nights" / f"dt={day}" / "_SUCCESS").exists()
                week.read(day, set(documents["id"].to_pylist()) if finished else None)
            job("tag", *command)
            week.morning(day)
            if day == BAD:
                print("    the bundle is bad: rolled back")
                before = week.output / "_nights" / f"dt={DAYS[number - 1]}"
                command[command.index(bundle)] = bundles["good"]
                command[command.index("last")] = before
                job("tag", *command, "--overwrite")
                week.morning(day)
        print("what is left", flush=True)
        job("nights", "list", "--output", week.output)
        left = sorted(path.name for path in week.tags.iterdir())
        week.wrong += left != [f"dt={day}" for day in DAYS[-KEPT:]]
    figure = f"{week.wrong} of {week.reads} reads wrong, {kills} kills, {time.time() - started:.0f} s"
    verdict("tag-week", figure, "0", not week.wrong)


if __name__ == "__main__":
    main()
