"""Training by the library and by a plain implementation of the method (`benchmarks/plain.py`), with one layer and with six.

    tate          MiniLM cut to 1 layer, 15 K labels, the first 500 steps of an epoch
    debian-deps   all 6 layers of it, 35 K labels, the first 200 steps of an epoch

All start from the same weights and see the same documents in the same batches of 32, cut to 96 tokens, with the same groups,
rates and threads. They take turns of 10 steps; the seconds of all turns are added up. Making batches out of token lists counts
on all sides, tokenising and grouping on none.

All losses are the same sum: cross-entropy over all groups and all candidates, a mean over documents. What differs: the
library's rows and word vectors have their own, sparser optimisers (row-wise Adagrad and lazy Adam against one AdamW), biases
do not decay, and dropout draws different numbers. So the curves are similar, not equal.

Rows in between take the difference apart: the plain implementation with batches padded to their own longest document, and the
library in float32. (On a CPU without bfloat16 the library computes in float32 anyway, and has one row.)

Bar: the library takes at most a third of the CPU seconds, in both cases. (Wall clock is beside it: the same on a machine that
does nothing else, and a matter of luck on one that does.)
"""

import argparse
import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from benchmarks.frame import verdict
from benchmarks.inputs import DATA, Split, small_transformer, training_split
from benchmarks.plain import PlainModel, PlainTrainer
from xmc_ray.model.batch import Batch
from xmc_ray.model.precision import cpu_has_bfloat16
from xmc_ray.training.fit import FitConfig, epoch_plan
from xmc_ray.training.loop import TrainState, train

TURN, BAR = 10, 3.0

Lists = tuple[list[list[int]], list[list[int]]]
"""A batch's documents as token lists and label lists."""
Contestant = Callable[[Sequence[Lists]], list[float]]
"""Trains on the next batches, and returns their losses."""


@dataclass(frozen=True)
class Case:
    """What is trained: a data set, layers of MiniLM, and the number of steps, None for an epoch."""

    data: Path
    layers: int
    steps: int | None


CASES = (Case(DATA / "tate", 1, 500), Case(DATA / "debian-deps", 6, 200))


def lists(batch: Batch) -> Lists:
    """The batch's documents as token lists and label lists."""
    tokens = [row[:length] for row, length in zip(batch.tokens_BT.tolist(), batch.mask_BT.sum(1).tolist(), strict=True)]
    truth: list[list[int]] = [[] for _ in tokens]
    for row, label in zip(batch.row_P.tolist(), batch.label_P.tolist(), strict=True):
        truth[row].append(label)
    return tokens, truth


def library(split: Split, config: FitConfig) -> Contestant:
    """The library, which makes its batches itself."""
    model = split.model(config)
    state, plan = TrainState.start(model, config.optim), epoch_plan(config.loop, len(split.table))
    steps = train(state, model, lambda first: split.batches(config.loop, first=first), plan.steps, config.loop)
    return lambda turn: [step.loss for step in itertools.islice(steps, len(turn))]


def plain(split: Split, config: FitConfig, max_tokens: int | None) -> Contestant:
    """The plain implementation, its batches padded to ``max_tokens``, or if that is None to their longest document."""
    trainer = PlainTrainer(PlainModel(split.model(config)), config.optim, max_tokens)
    n_steps, numbers = epoch_plan(config.loop, len(split.table)).steps, itertools.count()
    return lambda turn: [trainer.step(tokens, truth, next(numbers) / n_steps) for tokens, truth in turn]


def compare(case: Case, documents: int | None) -> float:
    """Prints losses and seconds of all contestants; the plain implementation's CPU seconds divided by the library's."""
    config = small_transformer(case.layers)
    split = training_split(case.data, config, documents)
    contestants = {"library": library(split, config)}
    if cpu_has_bfloat16():
        contestants["library, float32"] = library(split, replace(config, loop=replace(config.loop, precision="float32")))
    contestants |= {"plain, less padding": plain(split, config, None), "plain": plain(split, config, config.text.max_tokens)}
    steps = min(case.steps or len(split.table), epoch_plan(config.loop, len(split.table)).steps)
    batches = itertools.islice(split.batches(config.loop), steps)
    losses: dict[str, list[float]] = {name: [] for name in contestants}
    wall, cpu_seconds, n_documents, n_tokens = dict.fromkeys(contestants, 0.0), dict.fromkeys(contestants, 0.0), 0, 0
    while turn := [lists(batch) for batch in itertools.islice(batches, TURN)]:
        for name, contestant in contestants.items():
            started = time.perf_counter(), time.process_time()
            losses[name] += contestant(turn)
            wall[name] += time.perf_counter() - started[0]
            cpu_seconds[name] += time.process_time() - started[1]
        n_documents += sum(len(tokens) for tokens, _ in turn)
        n_tokens += sum(len(row) for tokens, _ in turn for row in tokens)

    layers = "1 layer" if case.layers == 1 else f"{case.layers} layers"
    shape = f"{len(split.index):,} labels, {len(split.groups):,} groups, {n_tokens / n_documents:.0f} tokens a document"
    print(f"{case.data.name}, {layers}: {n_documents:,} documents, {steps:,} steps, {shape}")
    print(f"{'loss, mean of each tenth':26}" + "".join(f"{tenth + 1:8}" for tenth in range(10)))
    for name, curve in losses.items():
        print(f"{name:26}" + "".join(f"{part.mean():8.2f}" for part in np.array_split(curve, 10)))
    print(f"{'':26}{'seconds':>10}{'of CPU':>10}{'documents/s':>13}{'times plain':>13}{'by CPU':>8}")
    for name, seconds in wall.items():
        times = wall["plain"] / seconds, cpu_seconds["plain"] / cpu_seconds[name]
        print(f"{name:26}{seconds:10.1f}{cpu_seconds[name]:10.1f}{n_documents / seconds:13.0f}{times[0]:13.2f}{times[1]:8.2f}")
    return cpu_seconds["plain"] / cpu_seconds["library"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="one case of your own: a folder with train.parquet and test.parquet")
    parser.add_argument("--layers", type=int, default=6, help="of your own case")
    parser.add_argument("--steps", type=int, help="of your own case; an epoch if not given")
    parser.add_argument("--documents", type=int, help="only the first documents, for a quick look")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    cases = CASES if arguments.data is None else (Case(arguments.data, arguments.layers, arguments.steps),)
    ratios = [compare(case, arguments.documents) for case in cases]
    figure = " and ".join(f"{ratio:.1f}x" for ratio in ratios)
    verdict("epoch-speed", figure, f"{BAR:.0f}x", min(ratios) >= BAR)


if __name__ == "__main__":
    main()
