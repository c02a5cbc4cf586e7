"""What training and prediction cost as labels grow: the recipe for words by rule, at 10 K, 100 K, 1 M and 3 M labels.

    make bench NAME=label-scale ARGS="--sizes 10000 100000"

Synthetic documents, a tenth as many as labels but 20,000 at least: three labels each by a power law (Zipf's, exponent 1), each
of which brings two words of its own, among ten words of a Zipfian vocabulary. Every size is a process of its own with one
thread. Training is all of `XMCClassifier.fit`: tokens, the model in all its passes, its linear ranker. Memory is the peak, less
what the process held with the documents, against the bytes of the trained model, which at small sizes are less than a step's.

Bars: CPU milliseconds a document and pass grow by no more than the logarithm of the labels, from the first size in groups on;
at the largest size memory at most 1.2 times the model; prediction at most 1 ms of CPU a document at 1 M labels.
"""

import argparse
import json
import subprocess
import sys
import time
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from benchmarks.frame import verdict
from benchmarks.quality.held_out import recipe
from benchmarks.training.step_cost import memory
from xmc_ray.classifier import XMCClassifier

SIZES = (10_000, 100_000, 1_000_000, 3_000_000)
LEAST, SHARE, LABELS, WORDS, VOCABULARY = 20_000, 10, 3, 10, 50_000
TESTED, K = 4_000, 10
MEMORY_BAR, PREDICTION_BAR = 1.2, 1.0


def documents_of(n_labels: int, n_documents: int) -> pa.Table:
    """``text`` and ``labels``; a label's words follow from its number."""
    rng = np.random.default_rng(0)
    ranks_DL = (np.exp(rng.random((n_documents, LABELS)) * np.log(n_labels)) - 1).astype(np.int64)
    ranks_DL[:, 0] = rng.integers(0, n_labels, n_documents)  # so that many of them occur
    common_DW = (np.exp(rng.random((n_documents, WORDS)) * np.log(VOCABULARY)) - 1).astype(np.int64)
    own = [_names("a", ranks_DL), _names("b", ranks_DL * 7 % n_labels)]
    words = np.concatenate([*own, _names("c", common_DW)], axis=1)
    labels = pa.array(_names("L", ranks_DL).ravel())
    lists = [
        pa.ListArray.from_arrays(np.arange(n_documents + 1) * width, values)
        for width, values in ((words.shape[1], pa.array(words.ravel())), (LABELS, labels))
    ]
    return pa.table({"text": pc.binary_join(lists[0], " "), "labels": lists[1]})


def _names(letter: str, numbers: Any) -> Any:
    return np.char.add(letter, numbers.astype(str))


def measure(n_labels: int) -> None:
    """In a child: train and predict; prints the figures as JSON."""
    torch.set_num_threads(1)
    documents = documents_of(n_labels, max(LEAST, n_labels // SHARE))
    config = recipe(documents)
    texts, labels = documents["text"].to_pylist(), documents["labels"].to_pylist()
    held, began = memory("VmRSS"), time.process_time()
    classifier = XMCClassifier.fit(texts, labels, config=config, device="cpu")
    trained, peak, model = time.process_time() - began, memory("VmHWM") - held, classifier.bundle.model
    weights = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    classifier.predict(texts[:10], k=K)  # compiles
    began = time.process_time()
    classifier.predict(texts[:TESTED], k=K)
    predicted = 1e3 * (time.process_time() - began) / TESTED
    figures: dict[str, float] = {"labels": len(classifier.bundle.labels), "documents": len(texts), "passes": config.loop.epochs}
    figures |= {"in groups": config.groups.max_size > 1, "seconds": trained, "peak": peak, "model": weights, "ms": predicted}
    print(json.dumps(figures))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES)
    parser.add_argument("--measure", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.measure:
        measure(given.measure)
        return
    heads = (
        "labels",
        "documents",
        "passes",
        "CPU s",
        "ms a document and pass",
        "peak MiB",
        "model MiB",
        "ratio",
        "ms predicted",
    )
    print(f"| {' | '.join(heads)} |\n|{' ---: |' * len(heads)}")
    rows = []
    for size in given.sizes:
        command = [sys.executable, "-m", "benchmarks.training.label_scale", "--measure", str(size)]
        row = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1])
        row["pace"] = 1e3 * row["seconds"] / row["documents"] / row["passes"]
        row["ratio"] = row["peak"] / row["model"]
        rows.append(row)
        cells = [f"{row[name]:,}" for name in ("labels", "documents", "passes")]
        cells += [f"{row['seconds']:.0f}", f"{row['pace']:.2f}", *(f"{row[name] / 2**20:,.0f}" for name in ("peak", "model"))]
        cells += [f"{row[name]:.2f}" for name in ("ratio", "ms")]
        print(f"| {' | '.join(cells)} |", flush=True)
    grouped = [row for row in rows if row["in groups"]] or rows
    growth = grouped[-1]["pace"] / grouped[0]["pace"] / (np.log(grouped[-1]["labels"]) / np.log(grouped[0]["labels"]))
    most = rows[-1]["ratio"]
    slow = max(row["ms"] for row in rows if row["labels"] <= 1_200_000)
    holds = growth <= 1 and most <= MEMORY_BAR and slow <= PREDICTION_BAR
    figure = f"{growth:.2f} times the logarithm, {most:.2f} times the model, {slow:.2f} ms"
    verdict("label-scale", figure, f"1; {MEMORY_BAR}; {PREDICTION_BAR} ms", holds)


if __name__ == "__main__":
    main()
