"""Quality of one recipe and of variants of it: train each in this process, predict the test split, print a table.

    make bench NAME=variants ARGS="--data tate --recipe xmc_ray/recipes/small-cpu.toml --variants '' '--lexical.width 0'"

A variant is a line of settings, as the training job takes them, on top of the recipe; it is named by that line. All documents
are trained on. Finished runs are kept with their predictions, so that several of them can be averaged: a variant ``A + B`` is
the ensemble of the runs A and B. There is no bar: the figures are for decisions.
"""

import argparse
import hashlib
import json
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.inputs import DATA, Split, held_out, minilm, require, training_split
from xmc_ray.bundle.ensemble import Listed, average
from xmc_ray.command import parse
from xmc_ray.metrics.at_k import Metrics
from xmc_ray.model.lexical import term_weights
from xmc_ray.model.lightxml import LightXML
from xmc_ray.model.predict import predict
from xmc_ray.training.fit import FitConfig, build_model, epoch_plan
from xmc_ray.training.loop import TrainState, train

SHOWN = ("P@1", "P@3", "P@5", "PSP@1", "PSP@5")
K = 100  # labels kept of each document, so that averages see more than the first ten


def settings_of(recipe: Path, variant: str) -> FitConfig:
    """The recipe with the variant's settings on top."""
    return parse(FitConfig, [f"--config={recipe}", f"--encoder.name={minilm()}", *variant.split()])


def key_of(folder: Path, documents: int | None, names: bool, config: FitConfig) -> str:
    """What a run is kept by; where the encoder lies makes no difference."""
    config = replace(config, encoder=replace(config.encoder, name=Path(config.encoder.name).name))
    return hashlib.sha256(repr((folder.name, documents, names, config)).encode()).hexdigest()[:16]


def trained(
    folder: Path,
    config: FitConfig,
    split: Split,
    prepare: Callable[[LightXML, Split], None] = lambda model, split: None,
    begin: Callable[[TrainState], None] = lambda state: None,
) -> tuple[Listed, dict[str, float]]:
    """Predictions for the test split, and what training cost; ``prepare`` may change the model, ``begin`` its optimiser."""
    test = held_out(folder, split)
    tokens = split.table["tokens"].combine_chunks()
    weight_F = term_weights([tokens], config.lexical) if config.lexical.width else None
    model = build_model(config, split.tokenizer, split.index, split.groups, weight_F=weight_F)
    prepare(model, split)
    state = TrainState.start(model, config.optim)
    begin(state)
    plan = epoch_plan(config.loop, len(split.table))
    started = time.monotonic()
    for step in train(state, model, lambda first: split.batches(config.loop, first=first), plan.steps, config.loop):
        if step.number % plan.steps == 0:
            print(f"  epoch {step.epoch + 1}: loss {step.loss:.3f}, {time.monotonic() - started:.0f} s", file=sys.stderr)
    seconds = time.monotonic() - started
    state.averager.keep(model)
    listed = predict(model, test["tokens"].combine_chunks(), min(K, len(split.index)), config.loop.prediction)
    return listed, {"seconds": seconds, "GiB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}


def figures(folder: Path, config: FitConfig, listed: Listed, documents: int | None) -> dict[str, float]:
    """Metrics in percent."""
    split = training_split(folder, config, documents)
    truth = held_out(folder, split)["labels"].combine_chunks()
    metrics = Metrics(split.index.counts, split.index.n_documents)
    metrics.update(listed[1][:, : max(metrics.ks)], truth)
    total = metrics.result()["total"]
    return {name: 100 * total[name] for name in SHOWN}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="debian-tags", help="a data set below ../shared/data, or a folder")
    parser.add_argument("--recipe", type=Path, default=Path("xmc_ray/recipes/small-cpu.toml"), help="settings to start from")
    parser.add_argument("--variants", nargs="+", default=[""], help="lines of settings on top of the recipe")
    parser.add_argument("--documents", type=int, help="the first training documents alone")
    parser.add_argument("--names", action="store_true", help="names of labels are documents, too")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--runs", type=Path, default=Path("runs/variants"), help="where finished runs are kept")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    folder = require(DATA / arguments.data if (DATA / arguments.data).exists() else Path(arguments.data))
    arguments.runs.mkdir(parents=True, exist_ok=True)

    def run(variant: str) -> tuple[Listed, dict[str, Any]]:
        config = settings_of(arguments.recipe, variant)
        place = arguments.runs / f"{key_of(folder, arguments.documents, arguments.names, config)}.npz"
        if not place.exists():
            print(f"{folder.name}: {variant or 'the recipe itself'}", flush=True)
            split = training_split(folder, config, arguments.documents, arguments.names)
            (scores, ids), cost = trained(folder, config, split)
            found = {
                "data": folder.name,
                "variant": variant,
                **figures(folder, config, (scores, ids), arguments.documents),
                **cost,
            }
            np.savez_compressed(place, scores=scores, ids=ids, figures=np.array(json.dumps(found)))
            print("  " + "  ".join(f"{name} {found[name]:.2f}" for name in SHOWN), flush=True)
        with np.load(place) as kept:
            return (kept["scores"], kept["ids"]), json.loads(str(kept["figures"]))

    print(f"| {folder.name} | " + " | ".join(SHOWN) + " | seconds | GiB |")
    rows = []
    for variant in arguments.variants:
        parts = [run(part.strip()) for part in variant.split(" + ")]
        found = dict(parts[0][1])
        if len(parts) > 1:
            config = settings_of(arguments.recipe, variant.split(" + ")[0].strip())
            listed = average([part[0] for part in parts], K)
            found = figures(folder, config, listed, arguments.documents)
            found |= {"seconds": sum(part[1]["seconds"] for part in parts), "GiB": max(part[1]["GiB"] for part in parts)}
        cells = [f"{found[name]:.2f}" for name in SHOWN] + [f"{found['seconds']:.0f}", f"{found['GiB']:.1f}"]
        rows.append(f"| {variant or 'the recipe itself'} | " + " | ".join(cells) + " |")
    print("\n".join(rows))


if __name__ == "__main__":
    main()
