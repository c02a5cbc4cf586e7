"""Two workers with a thread each against one worker with two threads: the same global batches, documents a second.

Synthetic documents of tate's shape: 32 tokens, 6 labels out of 15,000 in 469 groups, 32 documents a step; heads as in
xmc_ray/recipes/small-cpu.toml. Workers are processes that speak gloo. Sides take turns, each in fresh processes; the ratio is
the median over the turns. MiniLM cut to 1 layer is the bar's case, all 6 layers are shown beside it.

Bar: two workers reach at least 0.85 of one worker's throughput (they share the cores that it has alone).
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn

from benchmarks.frame import verdict
from benchmarks.inputs import encoder_of, even_groups, small_transformer, synthetic_batches
from xmc_ray.model.lightxml import LightXML
from xmc_ray.model.sharding import Exchange
from xmc_ray.training.loop import TrainState, data_parallel, train

LABELS, GROUP, TRUE, DOCUMENTS, TOKENS, THREADS = 15_000, 32, 6, 32, 32, 2
WARM_UP, BAR = 5, 0.85


def work(rank: int, world: int, layers: int, steps: int, folder: str) -> None:
    """In a process of its own: train, and leave the documents a second in ``folder``."""
    torch.set_num_threads(THREADS // world)
    if world > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)
    config, groups = small_transformer(layers), even_groups(LABELS, -(-LABELS // GROUP))
    model = LightXML(encoder_of(config), groups, config.model, Exchange.of_process_group())
    batches = synthetic_batches(LABELS, WARM_UP + steps, DOCUMENTS, TOKENS, TRUE)
    shares = [batch.split(world)[rank] for batch in batches]
    state = TrainState.start(model, config.optim)
    for step in train(state, data_parallel(model), lambda _: shares, len(shares), config.loop):
        if step.number == WARM_UP:
            started = time.perf_counter()
    rate = DOCUMENTS * steps / (time.perf_counter() - started)
    if rank == 0:
        Path(f"{folder}/result.json").write_text(json.dumps([rate, model.exchange.sent]))
    if world > 1:
        dist.destroy_process_group()


def throughput(world: int, layers: int, steps: int) -> tuple[float, dict[str, int]]:
    """Documents a second of ``world`` workers, and the bytes that one of them sent."""
    with tempfile.TemporaryDirectory() as folder:
        spawn(work, args=(world, layers, steps, folder), nprocs=world)
        rate, sent = json.loads(Path(f"{folder}/result.json").read_text())
        return rate, sent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=5, help="turns of both sides")
    parser.add_argument("--steps", type=int, default=60, help="steps of a turn, at one layer; a quarter at six")
    arguments = parser.parse_args()
    print(f"{'layers':>6}{'one worker':>22}{'two workers':>22}{'ratio':>8}{'sent in a step':>18}")
    ratios = {}
    for layers, steps in ((1, arguments.steps), (6, max(arguments.steps // 4, 5))):
        turns = np.zeros((arguments.turns, 2))
        for turn in range(arguments.turns):
            turns[turn, 0], _ = throughput(1, layers, steps)
            turns[turn, 1], sent = throughput(2, layers, steps)
        one, two = np.median(turns, axis=0)
        ratios[layers] = float(np.median(turns[:, 1] / turns[:, 0]))
        kib = sum(sent.values()) / (steps + WARM_UP) / 1024
        print(f"{layers:6}{one:10.1f} documents/s{two:10.1f} documents/s{ratios[layers]:8.2f}{kib:14,.0f} KiB")
    verdict("workers", f"{ratios[1]:.2f}x", f"{BAR}x", ratios[1] >= BAR)


if __name__ == "__main__":
    main()
