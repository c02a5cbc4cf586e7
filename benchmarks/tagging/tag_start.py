"""From the command to the first tagged row, on a Ray of its own on this machine: where each second goes.

The command is jobs/tag.py with its stages timed, started as a process for each of the rounds. Times are read off the machine's
clock where things happen: in the command, in the actor, in the tasks. They are a chain: each entry ends where the next one
begins. The bundle and tate's documents are local files; the model is MiniLM with all its layers (unless told) and tate's
labels, heads untrained. Medians of all rounds. There is no bar.
"""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

CHILD = "BENCHMARK_TIMES_ITS_IMPORTS"
STEPS = {
    "python": "Python starts",
    "imports": "the command imports the library, Ray, PyTorch",
    "look": "settings, input, bundle are looked at",
    "connect": "Ray starts",
    "fetch": "labels and tokenizer are loaded, the folder is begun",
    "scan": "scan, with the imports of its tasks",
    "plan": "plan written, settings of the pieces",
    "process": "Ray Data plans and asks for the actor's process",
    "actor": "the actor's process starts and imports",
    "load": "the actor loads the model",
    "wait": "the actor waits for the first piece (its task starts, imports, reads, tokenises)",
    "tag": "the first piece is tagged",
}


def command() -> None:
    """What jobs/tag.py does, with times."""
    began = time.time()
    from xmc_ray.command import run
    from xmc_ray.on_ray.tag import job
    from xmc_ray.on_ray.tag.config import TagConfig

    imported = time.time()
    from benchmarks.tagging._tagging import noted, process_start, timed_stages

    for what, start, end in (("python", process_start(), began), ("imports", began, imported)):
        with noted(what, began=start, ended=end):
            pass
    with timed_stages():
        raise SystemExit(run(job.tag, TagConfig))


def main() -> None:
    from benchmarks.tagging._tagging import (
        Diary,
        diary,
        documents_of,
        label_lists,
        make_bundle,
        options,
        tagger,
        told,
        write_documents,
    )

    arguments = options(__doc__, documents=12_288, rounds=3)
    documents = documents_of(arguments.data, arguments.documents)
    turns: list[dict[str, float]] = []

    def turn(book: Diary, *given: str) -> dict[str, float]:
        began = time.time()
        subprocess.run(
            [sys.executable, __file__, *given], check=True, env={**os.environ, CHILD: "1"}, stdout=subprocess.DEVNULL
        )
        first = {event.what: event for event in sorted(book.since(began), key=lambda event: event.began, reverse=True)}
        marks = {
            "python": first["imports"].began,
            "imports": first["imports"].ended,
            "look": first["connect"].began,
            "connect": first["connect"].ended,
            "fetch": first["scan"].began,
            "scan": first["scan"].ended,
            "plan": first["stream"].began,
            "process": first["actor"].began,
            "actor": first["actor"].ended,
            "load": first["load"].ended,
            "wait": first["tag"].began,
            "tag": first["tag"].ended,
        }
        ends = [began, *marks.values()]
        seconds = {name: end - start for name, start, end in zip(marks, ends, ends[1:], strict=False)}
        return seconds | {"rows": first["tag"].rows, "written": first["write"].ended - began}

    with tempfile.TemporaryDirectory() as folder, diary() as book:
        bundle = make_bundle(Path(folder) / "bundle", tagger(arguments.layers), label_lists(arguments.data))
        source = write_documents(f"{folder}/documents", documents, files=4)
        print(told(arguments))
        for number in range(arguments.rounds):
            settings = [f"--documents.uri={source}", f"--bundle={bundle}", f"--output={folder}/night-{number}", "--k=10"]
            turns.append(turn(book, *settings, f"--pool.token_budget={arguments.token_budget}"))
    print(f"{'':80}{'seconds':>8}{'since start':>13}")
    total = 0.0
    for name, explanation in STEPS.items():
        seconds = median(each[name] for each in turns)
        total += seconds
        print(f"{explanation:80}{seconds:8.1f}{total:13.1f}")
    sums = [sum(each[name] for name in STEPS) for each in turns]
    written = median(each["written"] for each in turns)
    print(f"the first piece has {turns[-1]['rows']:,} rows; it is written {written:.1f} s after the start")
    print(f"tag-start: {median(sums):.1f} s ({min(sums):.1f} to {max(sums):.1f}) to the first tagged row | no bar")


if __name__ == "__main__":
    command() if CHILD in os.environ else main()
