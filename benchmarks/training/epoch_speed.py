"""An epoch of tate, by the library and by a plain implementation of the method (`benchmarks/plain.py`).

Both start from the same weights and see the same documents in the same batches, with the settings of
jobs/configs/small-cpu.toml: MiniLM cut to 1 layer, at most 96 tokens. They take turns of 50 steps; the seconds of all turns
are added up. Making batches out of token lists counts on both sides, tokenising and grouping on neither.

Both losses are the same sum: cross-entropy over all groups and all candidates, a mean over documents. What differs: the
library's rows and word vectors have their own, sparser optimisers (row-wise Adagrad and lazy Adam against one AdamW), biases
do not decay, and dropout draws different numbers. So the curves are similar, not equal.

Bar: the library is at least 3 times faster.
"""

import argparse
import itertools
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from benchmarks.frame import verdict
from benchmarks.inputs import DATA, small_transformer, training_split
from benchmarks.plain import PlainModel, PlainTrainer
from xmc_ray.model.text import Batch
from xmc_ray.training.fit import epoch_plan
from xmc_ray.training.loop import Step, TrainState, train

TURN, BAR = 50, 3.0


def lists(batch: Batch) -> tuple[list[list[int]], list[list[int]]]:
    """The batch's documents as token lists and label lists."""
    tokens = [row[:length] for row, length in zip(batch.tokens_BT.tolist(), batch.mask_BT.sum(1).tolist(), strict=True)]
    truth: list[list[int]] = [[] for _ in tokens]
    for row, label in zip(batch.row_P.tolist(), batch.label_P.tolist(), strict=True):
        truth[row].append(label)
    return tokens, truth


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DATA / "tate", help="folder with train.parquet and test.parquet")
    parser.add_argument("--documents", type=int, help="only the first documents, for a quick look")
    arguments = parser.parse_args()
    torch.set_num_threads(2)
    config = small_transformer()
    split = training_split(arguments.data, config, arguments.documents)
    plan, model = epoch_plan(config.loop, len(split.table)), split.model(config)
    plain = PlainTrainer(PlainModel(model), config.optim, config.text.max_tokens)
    state, seen = TrainState.start(model, config.optim), []

    def batches(first: int) -> Iterator[Batch]:
        for batch in split.batches(config.loop, first=first):
            seen.append(batch)
            yield batch

    steps: Iterator[Step] = train(state, model, batches, plan.steps, config.loop)
    seconds, losses = np.zeros(2), np.zeros((2, plan.steps))
    while True:
        started, first = time.perf_counter(), state.step
        for step in itertools.islice(steps, TURN):
            losses[0, step.number - 1] = step.loss
        seconds[0] += time.perf_counter() - started
        if state.step == first:
            break
        turn = [lists(batch) for batch in seen]
        seen.clear()
        started = time.perf_counter()
        for number, (tokens, truth) in enumerate(turn, first):
            losses[1, number] = plain.step(tokens, truth, number / plan.steps)
        seconds[1] += time.perf_counter() - started

    print(f"{len(split.table):,} documents, {len(split.index):,} labels, {len(split.groups):,} groups, {plan.steps:,} steps")
    print(f"{'loss, mean of each tenth':26}" + "".join(f"{tenth + 1:8}" for tenth in range(10)))
    for name, curve in zip(("library", "plain"), losses, strict=True):
        print(f"{name:26}" + "".join(f"{part.mean():8.2f}" for part in np.array_split(curve, 10)))
    for name, total in zip(("library", "plain"), seconds, strict=True):
        print(f"{name:26}{total:8.1f} s{len(split.table) / total:8.0f} documents/s")
    ratio = seconds[1] / seconds[0]
    verdict("epoch-speed", f"{ratio:.1f}x", f"{BAR:.0f}x", bool(ratio >= BAR))


if __name__ == "__main__":
    main()
