"""Are calibrated scores chances? The lexical model on a data set, calibrated on held-out documents, measured on its test split.

Trains the lexical branch alone on all but the last documents of the training split, calibrates on those, and measures on the
test split: ECE@5 before and after, and what thresholds for some precisions reach. Beside the one map that the library uses
it shows one map a frequency band, which may reorder the labels of a document. Bar: ECE@5 of at most 0.02.
"""

import argparse
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
from _frame import verdict
from _setup import DATA, minilm, require

from xmc_ray.calibration import (
    DEPTH,
    ENOUGH_OF_BAND,
    PRECISIONS,
    Calibration,
    Predictions,
    Reliability,
    Selection,
    apply_map,
    fit_map,
    measure,
)
from xmc_ray.classifier import FitConfig, XMCClassifier, predictions_and_hits
from xmc_ray.encoder import EncoderConfig
from xmc_ray.groups import GroupsConfig
from xmc_ray.lexical import LexicalConfig
from xmc_ray.loop import LoopConfig
from xmc_ray.model import ModelConfig
from xmc_ray.optim import OptimConfig
from xmc_ray.text import TextConfig

BAR = 0.02


def lexical_only() -> FitConfig:
    return FitConfig(
        encoder=EncoderConfig(name=minilm(), layers=0),
        text=TextConfig(max_tokens=256),
        groups=GroupsConfig(max_size=1),
        model=ModelConfig(dropout=0.3),
        lexical=LexicalConfig(width=256),
        optim=OptimConfig(weight_decay=0.0),
        loop=LoopConfig(epochs=3, batch_size=64),
    )


def by_band(calibration: Calibration, predicted: Predictions) -> Predictions:
    """The same predictions by one map a band, where that has enough, and in the order of its chances."""
    scores_Dk, labels_Dk, hit_Dk = predicted
    chances_Dk, row_N = calibration.calibrated(scores_Dk, labels_Dk), calibration.band_L[calibration.label_N]
    row_Dk = np.where(labels_Dk >= 0, calibration.band_L[labels_Dk], 0)
    for row in range(1, int(calibration.band_L.max()) + 1):
        own_N = row_N == row
        if own_N.sum() >= ENOUGH_OF_BAND:
            knots = fit_map(calibration.score_N[own_N], calibration.hit_N[own_N])
            chances_Dk = np.where(row_Dk == row, apply_map(knots, scores_Dk), chances_Dk)
    order_Dk = np.argsort(-chances_Dk, axis=1, kind="stable")
    chances_Dk, labels_Dk = np.take_along_axis(chances_Dk, order_Dk, 1), np.take_along_axis(labels_Dk, order_Dk, 1)
    return chances_Dk, labels_Dk, np.take_along_axis(hit_Dk, order_Dk, 1)


def row_of(name: str, predicted: Predictions) -> str:
    reliability = Reliability()
    reliability.update(*predicted)
    precisions = "".join(f"{100 * predicted[2][:, :k].mean():9.2f}" for k in (1, 3, 5))
    return f"{name:22}{reliability.result():9.4f}{precisions}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DATA / "tate", help="a folder with train.parquet and test.parquet")
    parser.add_argument("--documents", type=int, help="first training documents, calibrating ones included; all unless told")
    parser.add_argument("--share", type=float, default=0.01, help="share of them that calibrates: half of validation.share")
    arguments = parser.parse_args()
    folder = require(arguments.data)
    rows = {name: pq.read_table(folder / f"{name}.parquet", columns=["text", "labels"]) for name in ("train", "test")}
    train = (
        rows["train"]
        .slice(0, arguments.documents)
        .take(np.random.default_rng(0).permutation(min(len(rows["train"]), arguments.documents or len(rows["train"]))))
    )
    held = max(1, round(arguments.share * len(train)))
    parts = [train.slice(held), train.slice(0, held), rows["test"]]
    fitted, calibrating, test = ((part["text"].to_pylist(), part["labels"].to_pylist()) for part in parts)

    started = time.monotonic()
    classifier = XMCClassifier.fit(*fitted, config=lexical_only(), device="cpu")
    seconds = time.monotonic() - started
    classifier.calibrate(*calibrating)
    bundle = classifier.bundle
    assert bundle.calibration is not None
    encoded = bundle.tokenizer.encode(rows["test"]["text"].combine_chunks())[0]
    truth = bundle.labels.encode(rows["test"]["labels"].combine_chunks())
    raw = predictions_and_hits(bundle.model, encoded, truth, len(bundle.labels), classifier.loop, DEPTH)
    calibrated = bundle.calibration.calibrated(raw[0], raw[1]), raw[1], raw[2]

    print(f"{folder.name}: trained on {len(fitted[0]):,} documents, {len(bundle.labels):,} labels, {seconds:.0f} s")
    print(f"calibrated on {held:,} documents, {len(bundle.calibration):,} predictions, by band {bundle.calibration.sizes()}")
    print(f"measured on the {len(test[0]):,} documents of the test split, {torch.get_num_threads()} threads\n")
    print(f"{'':22}{'ECE@5':>9}{'P@1':>9}{'P@3':>9}{'P@5':>9}")
    print(row_of("the model's own scores", raw))
    print(row_of("one map", calibrated))
    print(row_of("one map a band", by_band(bundle.calibration, raw)))
    print(f"\n{'asked for':>10}{'precision':>11}{'coverage':>10}{'abstention':>12}{'tags':>8}{'labels never tagged':>21}")
    for precision in PRECISIONS:
        selection = Selection(bundle.calibration.thresholds(precision))
        selection.update(*calibrated)
        told = selection.result()
        shares = [f"{told[name]:.3f}" if told[name] is not None else "–" for name in ("precision", "coverage", "abstention")]
        print(f"{precision:10.2f}{shares[0]:>11}{shares[1]:>10}{shares[2]:>12}{told['tags']:8,}{told['never']:21,}")
    print()
    error = float(measure(bundle.calibration, [(bundle.calibration, raw)])["ECE@5"])
    verdict("calibration", f"ECE@5 {error:.4f}", f"{BAR}", error <= BAR)


if __name__ == "__main__":
    main()
