"""A recipe of ours as a row of the table: train a model, then predict with it, as a peer's script does.

    _recipe.py DATA OUT --config FILE --seed 1 [--loop.minutes 4 ...]
    _recipe.py DATA OUT --tune-minutes 20 [--search 0.3 ...]
    _recipe.py DATA OUT --members recipe-1 recipe-2

Training is the job itself, in a process of its own, or the tuning job; prediction is the library's. Members are rows that have
been trained, in folders beside OUT: their scores are averaged, and what they cost is the ensemble's cost, too. What is not an
option of this file goes to the job. Seconds run from texts to a bundle, and from bundles in memory and texts to labels, as for
the peers.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from benchmarks.inputs import minilm
from benchmarks.quality._quality import DEPTH, ROOT
from xmc_ray.bundle.ensemble import Ensemble
from xmc_ray.model.predict import PredictConfig

THREADS = 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--config")
    parser.add_argument("--seed", type=int)
    parser.add_argument("--tune-minutes", type=float)
    parser.add_argument("--members", nargs="+", default=[])
    given, settings = parser.parse_known_args()

    members = [given.out.parent / name for name in given.members]
    parts = [json.loads((member / "run.json").read_text()) for member in members]

    started = time.monotonic()
    bundles = [member / "run" / "bundle" for member in members]
    if given.tune_minutes is not None:
        bundles = [tune(given.data, given.out / "tuned", given.tune_minutes, settings)]
    elif not members:
        bundles = [train(given.data, given.out / "run", given.config, given.seed, settings)]
    trained = time.monotonic()
    torch.set_num_threads(THREADS)
    ensemble, texts = Ensemble.load(bundles), pq.read_table(given.data / "test.parquet", columns=["text"])["text"]
    loaded = time.monotonic()
    scores_Dk, labels_Dk = ensemble.predict(ensemble.encode(texts.combine_chunks()), DEPTH, PredictConfig())
    ended = time.monotonic()

    names = ensemble.labels.labels.to_pylist()
    lists = [[names[label] for label in row if label >= 0] for row in labels_Dk.tolist()]
    scores = [row[: len(labels)] for row, labels in zip(scores_Dk.tolist(), lists, strict=True)]
    table = pa.table({"labels": pa.array(lists, pa.list_(pa.string())), "scores": pa.array(scores, pa.list_(pa.float32()))})
    pq.write_table(table, given.out / "predictions.parquet")
    size = sum(file.stat().st_size for bundle in bundles for file in bundle.rglob("*") if file.is_file())
    costs = {
        "train_seconds": trained - started + sum(part["train_seconds"] for part in parts),
        "predict_seconds": ended - loaded,
        "model_bytes": size,
        "cpu_seconds": sum(part["cpu_seconds"] for part in parts),
        "peak_bytes": max((part["peak_bytes"] for part in parts), default=0),
    }
    (given.out / "costs.json").write_text(json.dumps(costs))


def train(data: Path, run: Path, config: str, seed: int, settings: list[str]) -> Path:
    """The bundle of the training job on all documents, as the peers train; labels have their names, the encoder is small."""
    seeds = {"loop.seed": seed, "groups.seed": seed}
    job("train", data, {"config": config, "encoder.name": minilm(), "output": run, **seeds, "validation.share": 0}, settings)
    return run / "bundle"


def tune(data: Path, output: Path, minutes: float, settings: list[str]) -> Path:
    """The bundle of the tuning job, by its own defaults: it holds documents out as it does for any user."""
    job("tune", data, {"encoder": minilm(), "output": output, "minutes": minutes}, settings)
    return output / "run" / "bundle"


def job(name: str, data: Path, options: dict[str, Any], settings: list[str]) -> None:
    options = options | {"documents.uri": data / "train.parquet"}
    if (data / "labels.parquet").exists():
        options["label_names"] = data / "labels.parquet"
    given = [f"--{option}={value}" for option, value in options.items()]
    subprocess.run([sys.executable, ROOT / "jobs" / f"{name}.py", *given, *settings], check=True)  # the last one counts


if __name__ == "__main__":
    main()
