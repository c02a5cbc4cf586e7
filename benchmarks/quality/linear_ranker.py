"""What does the linear ranker gain, and what does it cost?

    make bench NAME=linear-ranker ARGS="--data ../shared/data/tate --documents 12000"

The recipe for words by rule, on random training documents of a data set, a quarter of which judge and take no part; documents
with the same words are never divided. The model is trained once, and predicts without a ranker and with one of several weights.

Bar: with weight 1, no figure falls by more than 0.2 points, and P@1 or P@5 gains half a point.
"""

import argparse
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa

from benchmarks.frame import verdict
from benchmarks.inputs import DATA
from benchmarks.quality.held_out import FIGURES, parted, recipe
from xmc_ray.classifier import XMCClassifier
from xmc_ray.model.linear import LinearConfig
from xmc_ray.model.svm import train_linear

WEIGHTS = (0.25, 0.5, 1.0, 2.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DATA / "debian-tags", help="a folder with train.parquet")
    parser.add_argument("--documents", type=int, default=12_000, help="random training documents, judging ones included")
    parser.add_argument("--group-size", type=int, help="labels of a group; by default what the rule says")
    given = parser.parse_args()
    judges, rest = parted(given.data, given.documents)
    config = replace(recipe(rest), linear=LinearConfig())
    if given.group_size is not None:
        config = replace(config, groups=replace(config.groups, max_size=given.group_size))

    started = time.process_time()
    classifier = XMCClassifier.fit(rest["text"].to_pylist(), rest["labels"].to_pylist(), config=config, device="cpu")
    bundle, trained = classifier.bundle, time.process_time()
    tokens = bundle.tokenizer.encode(rest["text"].combine_chunks())[0]
    documents = pa.table({"tokens": tokens, "labels": bundle.labels.encode(rest["labels"].combine_chunks())})
    counted = time.process_time()
    ranker = train_linear(bundle.model, documents, LinearConfig(candidates=25), config.loop.prediction)
    ended = time.process_time()
    print(f"{given.data.name}: {len(rest):,} documents, {len(bundle.labels):,} labels, {len(judges):,} others judge")
    print(f"CPU seconds: model {trained - started:.0f}, ranker {ended - counted:.0f} ({len(ranker.weight_W):,} weights)\n")
    print(f"| weight | {' | '.join(FIGURES)} | CPU µs a document |\n| --- " + "| ---: " * (len(FIGURES) + 1) + "|")
    reached = []
    for weight in (0.0, *WEIGHTS):
        ranker.weight, bundle.model.linear = weight, ranker if weight else None
        classifier.predict(judges["text"].to_pylist()[:10])  # compiles
        before = time.process_time()
        total = classifier.evaluate(judges["text"].to_pylist(), judges["labels"].to_pylist())["total"]
        cost = 1e6 * (time.process_time() - before) / len(judges)
        reached.append([100 * total[figure] for figure in FIGURES])
        print(f"| {weight:g} | {' | '.join(f'{value:.2f}' for value in reached[-1])} | {cost:.0f} |", flush=True)
    gains = np.subtract(reached[1 + WEIGHTS.index(1.0)], reached[0])
    holds = gains.min() >= -0.2 and max(gains[0], gains[2]) >= 0.5
    verdict("linear-ranker", " / ".join(f"{gain:+.2f}" for gain in gains), "see above", bool(holds))


if __name__ == "__main__":
    main()
