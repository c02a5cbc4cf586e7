"""Are calibrated scores chances? The lexical model on a data set, calibrated on held-out documents, measured on its test split.

Trains the recipe on all but some documents of the training split, calibrates on those, and measures on the test split: ECE@5
before and after, and what thresholds for some precisions reach; and what cross-fitting says of the same on the calibrating
documents alone, as `metrics.json` does. Documents with the same words are all held out or all trained on. Beside the one map
that the library uses it shows one map a frequency band, which may reorder the labels of a document. Bar: ECE@5 of at most 0.02.
"""

import argparse
import re
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
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
    cross_fitted,
    fit_map,
    measure,
)
from xmc_ray.classifier import FitConfig, XMCClassifier, predictions_and_hits
from xmc_ray.command import parse
from xmc_ray.labels import list_lengths

ROOT, BAR = Path(__file__).resolve().parents[1], 0.02


def dealt(texts: list[str], share: float) -> tuple[list[int], list[int]]:
    """Places of documents to train on, and of a ``share`` to calibrate on, by what they say."""
    said, place_D = np.unique([" ".join(re.findall(r"\w+", text.lower())) for text in texts], return_inverse=True)
    calibrates = np.random.default_rng(0).random(len(said))[place_D] < share
    return np.flatnonzero(~calibrates).tolist(), np.flatnonzero(calibrates).tolist()


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
    parser.add_argument("--recipe", type=Path, default=ROOT / "jobs" / "configs" / "quality-tate.toml", help="its settings")
    parser.add_argument("--documents", type=int, help="first training documents, calibrating ones included; all unless told")
    parser.add_argument("--share", type=float, default=0.01, help="share of them that calibrates: half of validation.share")
    arguments = parser.parse_args()
    folder = require(arguments.data)
    rows = {name: pq.read_table(folder / f"{name}.parquet", columns=["text", "labels"]) for name in ("train", "test")}
    train = rows["train"].slice(0, arguments.documents)
    trains, calibrates = dealt(train["text"].to_pylist(), arguments.share)
    parts = [train.take(trains), train.take(calibrates), rows["test"]]
    fitted, calibrating, test = ((part["text"].to_pylist(), part["labels"].to_pylist()) for part in parts)
    config = parse(FitConfig, [f"--config={arguments.recipe}", f"--encoder.name={minilm()}"])

    started = time.monotonic()
    classifier = XMCClassifier.fit(*fitted, config=config, device="cpu")
    seconds = time.monotonic() - started
    classifier.calibrate(*calibrating)
    bundle = classifier.bundle
    assert bundle.calibration is not None
    encoded = bundle.tokenizer.encode(rows["test"]["text"].combine_chunks())[0]
    truth = bundle.labels.encode(rows["test"]["labels"].combine_chunks())
    raw = predictions_and_hits(bundle.model, encoded, truth, len(bundle.labels), classifier.loop, DEPTH)
    calibrated = bundle.calibration.calibrated(raw[0], raw[1]), raw[1], raw[2]

    print(f"{folder.name}: trained on {len(fitted[0]):,} documents, {len(bundle.labels):,} labels, {seconds:.0f} s")
    evidence = f"{len(bundle.calibration):,} predictions, by band {bundle.calibration.sizes()}"
    print(f"calibrated on {len(calibrates):,} documents, {evidence}")
    print(f"measured on the {len(test[0]):,} documents of the test split, {torch.get_num_threads()} threads\n")
    print(f"{'':22}{'ECE@5':>9}{'P@1':>9}{'P@3':>9}{'P@5':>9}")
    print(row_of("the model's own scores", raw))
    print(row_of("one map", calibrated))
    print(row_of("one map a band", by_band(bundle.calibration, raw)))
    lists = pa.array(calibrating[1], pa.list_(pa.string()))
    known = pa.array(list_lengths(bundle.labels.encode(lists)) > 0)
    seen = bundle.tokenizer.encode(pa.array(calibrating[0]).filter(known))[0], bundle.labels.encode(lists.filter(known))
    held_out = predictions_and_hits(bundle.model, *seen, len(bundle.labels), classifier.loop, DEPTH)
    told = measure(bundle.calibration, cross_fitted(held_out, bundle.labels.counts))
    print(f"cross-fitted on the calibrating documents: ECE@5 {told['ECE@5 before']:.4f} before, {told['ECE@5']:.4f} after")
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
