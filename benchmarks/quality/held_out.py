"""What does holding documents out cost, and whose calibration fits a model that was trained on all of them?

The recipe for words by rule, on training documents of a data set, of which a quarter judge and take no part. It is trained on
all of the others, and without the share of them that ``validation.share`` holds out (2 %, of which half calibrate), without a
tenth, and without three quarters, as a trial of the tuning job. Each of these calibrates on what it did without. Documents with
the same words are never divided.

Bar: the calibration of the run without a tenth, taken over by the model of all documents, has an ECE@5 of at most 0.02.
"""

import argparse
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.frame import verdict
from benchmarks.inputs import DATA, minilm, require
from benchmarks.quality.calibration import predictions
from xmc_ray.classifier import XMCClassifier
from xmc_ray.data.labels import LabelIndex
from xmc_ray.data.profile import Profile
from xmc_ray.data.split import ValidationConfig, held_out_use
from xmc_ray.metrics.calibration import Calibration, Predictions, Reliability
from xmc_ray.model.encoder import EncoderConfig
from xmc_ray.model.tokenizer import Tokenizer
from xmc_ray.training.fit import FitConfig
from xmc_ray.training.recipe import LENGTH, candidates, undecided

BAR = 0.02
SHARES = {"everything": 0.0, "without 2 %": 0.02, "without a tenth": 0.1, "a quarter": 0.75}
FIGURES = ("P@1", "P@3", "P@5", "PSP@5")


def parted(data: Path, documents: int) -> tuple[pa.Table, pa.Table]:
    """Random training documents of a data set in two parts: a quarter that judge, and the others; twins are never divided."""
    rows = pq.read_table(require(data) / "train.parquet", columns=["text", "labels"]).combine_chunks()
    rows = rows.take(np.random.default_rng(0).permutation(len(rows))[:documents]).combine_chunks()
    words = [" ".join(re.findall(r"\w+", text.lower())) for text in rows["text"].to_pylist()]
    twins_D = np.unique(words, return_inverse=True)[1]
    judge_D = (np.random.default_rng(1).random(twins_D.max() + 1) < 0.25)[twins_D]
    return rows.filter(pa.array(judge_D)), rows.filter(pa.array(~judge_D))


def recipe(rows: pa.Table) -> FitConfig:
    """The recipe for words by rule."""
    basis = undecided(FitConfig(encoder=EncoderConfig(name=minilm())))
    index = LabelIndex.count([rows["labels"].combine_chunks()])
    tokens = Tokenizer.load(minilm(), LENGTH).encode(rows["text"].combine_chunks())[0]
    data = Profile.of([tokens], [index.encode(rows["labels"].combine_chunks())], index)
    return candidates(data, basis, 0)[0].config


def ece(predicted: Predictions, calibration: Calibration | None) -> float:
    scores, labels, hits = predicted
    reliability = Reliability()
    reliability.update(scores if calibration is None else calibration.calibrated(scores, labels), labels, hits)
    return reliability.result() or 0.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DATA / "debian-tags", help="a folder with train.parquet")
    parser.add_argument("--documents", type=int, default=11_000, help="random training documents, judging ones included")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each")
    arguments = parser.parse_args()
    judges, rest = parted(arguments.data, arguments.documents)
    config, texts = recipe(rest), rest["text"].combine_chunks()
    series = pa.nulls(len(rest), pa.string())
    print(
        f"{arguments.data.name}: {len(rest):,} documents, {len(judges):,} others judge, {config.loop.epochs} passes", flush=True
    )

    reached: dict[str, list[dict[str, Any]]] = {name: [] for name in SHARES}
    for seed in range(arguments.seeds):
        seeded, whole = replace(config, loop=replace(config.loop, seed=seed)), None
        for name, share in SHARES.items():
            use_D = held_out_use(texts, series, ValidationConfig(share=share, calibrate=share == SHARES["without 2 %"]))
            kept, held_out = rest.filter(pa.array(use_D == 0)), rest.filter(pa.array(use_D == use_D.max()))
            classifier = XMCClassifier.fit(kept["text"].to_pylist(), kept["labels"].to_pylist(), config=seeded, device="cpu")
            total = classifier.evaluate(judges["text"].to_pylist(), judges["labels"].to_pylist())["total"]
            own = predictions(classifier, judges)
            whole = own if whole is None else whole
            calibration = Calibration.of(*predictions(classifier, held_out), classifier.bundle.labels.counts) if share else None
            figures = {figure: 100 * total[figure] for figure in FIGURES}
            errors = {"own ECE@5": ece(own, calibration), "ECE@5 of all by it": ece(whole, calibration)}
            reached[name].append(figures | errors | {"calibrating": len(held_out) if share else 0})
            print(seed, name, {key: round(value, 4) for key, value in reached[name][-1].items()}, flush=True)
    print(f"\n| trained on | {' | '.join(reached['everything'][0])} |\n| --- " + "| --- " * len(reached["everything"][0]) + "|")
    for name, runs in reached.items():
        cells = [f"{np.mean([run[key] for run in runs]):.{4 if 'ECE' in key else 2}f}" for key in runs[0]]
        print(f"| {name} | {' | '.join(cells)} |")
    error = float(np.mean([run["ECE@5 of all by it"] for run in reached["without a tenth"]]))
    verdict("held-out", f"ECE@5 {error:.4f}", f"{BAR}", error <= BAR)


if __name__ == "__main__":
    main()
