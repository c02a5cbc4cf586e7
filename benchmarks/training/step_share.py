"""How much of a training step is not the encoder: MiniLM with all 6 layers, tate's labels and documents, batches of 32.

The whole step is `loop.train`'s: making the batch, forward, backward, all optimisers. The encoder's share is its forward and
backward alone, on the same batches, in turns of one step each. Everything else counts as outside, the encoder's own AdamW,
clipping and dropout included. The breakdown comes from timers around the parts of the whole step; what they leave over is
the bottleneck, autograd's bookkeeping and the loop. If tate is missing, documents and 15 K labels are synthetic.

Bar: at most 15 % of a step is outside the encoder.
"""

import argparse
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.frame import verdict
from benchmarks.inputs import DATA, encoder_of, even_groups, small_transformer, synthetic_batches, training_split
from xmc_ray.model.batch import Batch
from xmc_ray.model.lightxml import LightXML
from xmc_ray.training.fit import FitConfig
from xmc_ray.training.loop import TrainState, train

BAR = 0.15
LABELS, GROUP = 15_000, 32


class Timers:
    """Seconds of each call, by name."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = defaultdict(list)

    def call(self, name: str, function: Callable[..., Any], *arguments: Any) -> Any:
        started = time.perf_counter()
        result = function(*arguments)
        self.seconds[name].append(time.perf_counter() - started)
        return result

    def around(self, owner: object, method: str, name: str) -> None:
        function = getattr(owner, method)
        object.__setattr__(owner, method, lambda *arguments: self.call(name, function, *arguments))

    def median(self, name: str) -> float:
        return float(np.median(self.seconds[name][2:]))


def setting(folder: Path, config: FitConfig, steps: int) -> tuple[LightXML, Iterator[Batch], str]:
    """A model, batches that are made when they are asked for, and what they are of."""
    if (folder / "train.parquet").exists():
        split = training_split(folder, config)
        return split.model(config), split.batches(config.loop), f"{folder.name}, {len(split.table):,} documents"
    groups = even_groups(LABELS, -(-LABELS // GROUP))
    model = LightXML(encoder_of(config), groups, config.model)
    return model, iter(synthetic_batches(LABELS, steps, config.loop.batch_size, 32, 6)), "made-up documents"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DATA / "tate", help="folder with train.parquet")
    parser.add_argument("--steps", type=int, default=60, help="steps that are timed")
    arguments = parser.parse_args()
    torch.set_num_threads(2)
    config, timers = small_transformer(layers=6), Timers()
    model, made, source = setting(arguments.data, config, arguments.steps)
    state, seen = TrainState.start(model, config.optim), []

    def batches() -> Iterator[Batch]:
        while (batch := timers.call("making the batch", next, made, None)) is not None:
            seen.append(batch)
            yield batch

    def encode(batch: Batch) -> None:
        model.features(batch).sum().backward()

    steps = train(state, model, lambda _: batches(), arguments.steps, config.loop)
    optimizer = state.optimizer
    for owner, method, name in (
        (model.recall, "loss", "recall loss"),
        (model.table, "loss", "ranking loss"),
        (optimizer.rows, "step", "rows' Adagrad"),
        (optimizer.adamw, "step", "AdamW"),
        (optimizer.lazy_adam, "step", "word vectors' Adam"),
        (optimizer, "step", "optimiser, all of it"),
    ):
        timers.around(owner, method, name)
    while timers.call("whole step", next, steps, None) is not None:
        timers.call("encoder alone", encode, seen[-1])
        model.zero_grad(set_to_none=True)
    timers.seconds["whole step"].pop()

    whole, inside = timers.median("whole step"), timers.median("encoder alone")
    print(f"{source}; {len(model.group_L):,} labels, {model.recall.n_groups:,} groups")
    print(f"{'median of a step':28}{'ms':>9}{'share':>8}")
    for name in timers.seconds:
        print(f"{name:28}{1000 * timers.median(name):9.2f}{timers.median(name) / whole:8.1%}")
    pairs = np.array(timers.seconds["encoder alone"][2:]) / np.array(timers.seconds["whole step"][2:])
    outside = 1 - float(np.median(pairs))
    print(f"{'outside, by medians':28}{1000 * (whole - inside):9.2f}{1 - inside / whole:8.1%}")
    verdict("step-share", f"{outside:.1%} outside the encoder", f"{BAR:.0%}", outside <= BAR)


if __name__ == "__main__":
    main()
