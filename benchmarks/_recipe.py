"""A recipe of ours as a row of the table: train one model a seed, then predict with all of them, as a peer's script does.

    _recipe.py DATA OUT --config FILE --seeds 1 2 3 [--loop.minutes 4 ...]

Training is the job itself, in a process of its own for each seed; prediction is the library's, scores averaged over the seeds.
What is not an option of this file goes to the job. Seconds run from texts to bundles, and from bundles in memory and texts to
labels, as for the peers.
"""

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from _quality import DEPTH, ROOT
from _setup import minilm

from xmc_ray.ensemble import Ensemble
from xmc_ray.loop import LoopConfig

THREADS = 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--config", required=True)
    parser.add_argument("--seeds", type=int, nargs="+", required=True)
    given, settings = parser.parse_known_args()

    started = time.monotonic()
    bundles = [train(given.data, given.out / f"seed-{seed}", given.config, seed, settings) for seed in given.seeds]
    trained = time.monotonic()
    torch.set_num_threads(THREADS)
    ensemble, texts = Ensemble.load(bundles), pq.read_table(given.data / "test.parquet", columns=["text"])["text"]
    loaded = time.monotonic()
    scores_Dk, labels_Dk = ensemble.predict(ensemble.encode(texts.combine_chunks()), DEPTH, LoopConfig(), "exact")
    ended = time.monotonic()

    names = ensemble.labels.labels.to_pylist()
    lists = [[names[label] for label in row if label >= 0] for row in labels_Dk.tolist()]
    scores = [row[: len(labels)] for row, labels in zip(scores_Dk.tolist(), lists, strict=True)]
    table = pa.table({"labels": pa.array(lists, pa.list_(pa.string())), "scores": pa.array(scores, pa.list_(pa.float32()))})
    pq.write_table(table, given.out / "predictions.parquet")
    size = sum(file.stat().st_size for bundle in bundles for file in bundle.rglob("*") if file.is_file())
    costs = {"train_seconds": trained - started, "predict_seconds": ended - loaded, "model_bytes": size}
    (given.out / "costs.json").write_text(json.dumps(costs))


def train(data: Path, run: Path, config: str, seed: int, settings: list[str]) -> Path:
    """The bundle of a run of the training job; labels have their names, the encoder is the small one unless told otherwise."""
    places = {"config": config, "documents.uri": data / "train.parquet", "output": run, "loop.seed": seed}
    if (data / "labels.parquet").exists():
        places["label_names"] = data / "labels.parquet"
    if not any(setting.startswith("--encoder.name") for setting in settings):
        places["encoder.name"] = minilm()
    options = [f"--{name}={value}" for name, value in places.items()]
    subprocess.run([sys.executable, ROOT / "jobs" / "train.py", *options, *settings], check=True)
    shutil.rmtree(run / "checkpoints", ignore_errors=True)
    return run / "bundle"


if __name__ == "__main__":
    main()
