"""What a job costs beside its work: the start of Python, Ray and actors, imports, reading, export and report.

Three jobs, each a command on a Ray of its own on this machine: a training of ten seconds, which are not counted; an evaluation
of the model it made, and a night of it, on 3,000 titles of the test split of tate. The model has one layer of MiniLM. CPU
seconds are those of all processes of the job, of training with those of the ten seconds. Medians of all rounds; with
``--rev COMMIT`` the library of that commit takes turns with this one.

Bars, on two cores: 20 seconds beside a training's ten, and 12 seconds for an evaluation.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median

import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.frame import verdict
from benchmarks.inputs import DATA, minilm
from benchmarks.quality._quality import watched

ROOT = Path(__file__).parents[2]
TRAIN_BAR, EVALUATE_BAR, TRAINING, TITLES = 20, 12, 10, 3_000
QUIET = {"RAY_AUTH_MODE": "disabled", "HF_HUB_OFFLINE": "1", "RAY_USAGE_STATS_ENABLED": "0", "TOKENIZERS_PARALLELISM": "false"}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rev", help="a commit whose library takes turns with this one")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        for split, rows in (("train", None), ("test", TITLES)):
            write_titles(DATA / "tate" / f"{split}.parquet", place / f"{split}.parquet", rows)
        libraries = {"this one": ROOT}
        if arguments.rev:
            libraries[arguments.rev] = library_of(arguments.rev, place / "library")
        taken: dict[tuple[str, str], list[tuple[float, float]]] = {}
        for round_ in range(arguments.rounds):
            for number, (name, library) in enumerate(libraries.items()):
                for job, figures in jobs(library, place, place / f"{round_}-{number}"):
                    taken.setdefault((name, job), []).append(figures)
    medians = {key: [median(column) for column in zip(*figures, strict=True)] for key, figures in taken.items()}
    print("| library | job | seconds | CPU seconds |\n| --- | --- | --- | --- |")
    for (name, job), (seconds, cpu) in medians.items():
        print(f"| {name} | {job} | {seconds:.1f} | {cpu:.1f} |")
    train, evaluate = (medians["this one", job][0] for job in ("train", "evaluate"))
    figure = f"{train:.1f} seconds beside {TRAINING} of training, {evaluate:.1f} for an evaluation"
    holds = train <= TRAIN_BAR and evaluate <= EVALUATE_BAR
    verdict("start", figure, f"{TRAIN_BAR} and {EVALUATE_BAR}", holds)
    return 0 if holds else 1


def jobs(library: Path, place: Path, output: Path) -> Iterator[tuple[str, tuple[float, float]]]:
    """Name, and seconds and CPU seconds, of each job."""
    encoder = [f"--encoder.name={minilm()}", "--encoder.layers=1", "--encoder.feature_layers=2", "--encoder.pooling=mean"]
    training = [*encoder, "--text.max_tokens=32", "--loop.epochs=100", f"--loop.minutes={TRAINING / 60}"]
    train = [f"--documents.uri={place}/train.parquet", f"--output={output}/run", *training]
    seconds, cpu = command(library, "train", train)
    yield "train", (seconds - TRAINING, cpu)
    test = [f"--documents.uri={place}/test.parquet", f"--bundle={output}/run/bundle"]
    yield "evaluate", command(library, "evaluate", test)
    yield "tag", command(library, "tag", [*test, f"--output={output}/tags", "--date=2026-11-23", "--k=10"])


def command(library: Path, job: str, arguments: list[str]) -> tuple[float, float]:
    """Seconds, and CPU seconds of all processes."""
    variables = os.environ | QUIET | {"PYTHONPATH": str(library)}
    began = time.perf_counter()
    with tempfile.TemporaryFile() as log:
        call = [sys.executable, str(library / "jobs" / f"{job}.py"), *arguments]
        process = subprocess.Popen(call, cwd=library, stdout=log, stderr=log, env=variables)  # Ray's workers look there first
        _, cpu, _ = watched(process, None)
        if process.returncode:
            log.seek(0)
            raise SystemExit(f"start: {job} failed\n{log.read().decode(errors='replace')[-3000:]}")
    return time.perf_counter() - began, cpu


def write_titles(source: Path, target: Path, rows: int | None) -> None:
    """The documents in ``source``, their first lines as texts."""
    table = pq.read_table(source).slice(0, rows)
    titles = pa.array([text.partition("\n")[0].partition(". ")[0] for text in table["text"].to_pylist()], pa.string())
    pq.write_table(table.set_column(table.column_names.index("text"), "text", titles), target)


def library_of(commit: str, folder: Path) -> Path:
    """A copy of the library and its jobs as that commit has them."""
    folder.mkdir()
    archive = subprocess.run(["git", "archive", commit, "xmc_ray", "jobs"], cwd=ROOT, stdout=subprocess.PIPE, check=True)
    subprocess.run(["tar", "-x", "-C", folder], input=archive.stdout, check=True)
    return folder


if __name__ == "__main__":
    sys.exit(main())
