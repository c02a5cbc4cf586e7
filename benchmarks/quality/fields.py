"""Do weighted fields help? Title and body of a document told apart, against both joined to one text.

The recipe for words by rule, on training documents of a data set, of which a quarter judge and take no part (`held_out`). A
title is what stands before the first full stop. Rows: both joined; as fields of equal weight, which leaves out the pairs of
words across them; with titles of greater weight; and with the first words of the body alone. All train in one run, one after
the other, with the same seeds; CPU seconds are those of training and of evaluation.

Bar: titles of weight 2 have a mean of P@1, P@3, P@5 and PSP@5 at least as high as joined texts, on every data set.
"""

import argparse
import resource
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from benchmarks.frame import verdict
from benchmarks.inputs import DATA
from benchmarks.quality.held_out import FIGURES, parted, recipe
from xmc_ray.classifier import XMCClassifier
from xmc_ray.model.tokenizer import TextConfig
from xmc_ray.training.fit import FitConfig

FIRST = 40  # tokens of the body, about half of them
JOINED, BAR = "joined", "title 2"
TEXTS = {
    JOINED: TextConfig(max_tokens=2048),
    "fields of weight 1": TextConfig(max_tokens=2048, fields={"title": 1.0, "body": 1.0}),
    BAR: TextConfig(max_tokens=2048, fields={"title": 2.0, "body": 1.0}),
    "title 4": TextConfig(max_tokens=2048, fields={"title": 4.0, "body": 1.0}),
    f"title 2, body's first {FIRST}": TextConfig(max_tokens=2048, fields={"title": 2.0, "body": 1.0}, first={"body": FIRST}),
}


def columns(rows: pa.Table, config: TextConfig) -> Any:
    """The texts as the model of ``config`` takes them."""
    parts = [text.partition(". ") for text in rows["text"].to_pylist()]
    if config.fields:
        return {"title": [title for title, _, _ in parts], "body": [body for _, _, body in parts]}
    return [f"{title}\n{body}" for title, _, body in parts]


def reached(config: FitConfig, rest: pa.Table, judges: pa.Table) -> dict[str, float]:
    """The figures in percent, and CPU seconds."""
    started = cpu()
    classifier = XMCClassifier.fit(columns(rest, config.text), rest["labels"].to_pylist(), config=config, device="cpu")
    trained = cpu()
    total = classifier.evaluate(columns(judges, config.text), judges["labels"].to_pylist())["total"]
    return {name: 100 * total[name] for name in FIGURES} | {"CPU s": trained - started, "CPU s to predict": cpu() - trained}


def cpu() -> float:
    """CPU seconds of this process until now."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    data = [DATA / "debian-tags", DATA / "tate"]
    parser.add_argument("--data", type=Path, nargs="+", default=data, help="folders with train.parquet")
    parser.add_argument("--documents", type=int, default=10_000, help="random training documents, judging ones included")
    parser.add_argument("--seeds", type=int, default=2, help="runs of each")
    parser.add_argument("--passes", type=int, help="at most so many, on a busy machine")
    parser.add_argument("--only", nargs="*", default=[*TEXTS], help="rows")
    arguments = parser.parse_args()
    gains = {}
    for folder in arguments.data:
        judges, rest = parted(folder, arguments.documents)
        config = recipe(rest)
        passes = min(config.loop.epochs, arguments.passes or config.loop.epochs)
        config = replace(config, loop=replace(config.loop, epochs=passes))
        print(f"{folder.name}: {len(rest):,} documents, {len(judges):,} others judge, {passes} passes", flush=True)
        means = {}
        for name in arguments.only:
            seeds = [replace(config.loop, seed=seed) for seed in range(arguments.seeds)]
            runs = [reached(replace(config, text=TEXTS[name], loop=loop), rest, judges) for loop in seeds]
            means[name] = {figure: float(np.mean([run[figure] for run in runs])) for figure in runs[0]}
            print(f"| {name} | {' | '.join(f'{value:.2f}' for value in means[name].values())} |", flush=True)
        print(f"(| texts | {' | '.join(means[JOINED])} |)\n")
        gains[folder.name] = float(np.mean([means[BAR][figure] - means[JOINED][figure] for figure in FIGURES]))
    shown = ", ".join(f"{gain:+.2f} on {name}" for name, gain in gains.items())
    verdict("fields", shown, "+0.00", min(gains.values()) >= 0)


if __name__ == "__main__":
    main()
