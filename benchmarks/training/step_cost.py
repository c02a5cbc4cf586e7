"""A training step at 10 K, 100 K, 1 M and 3 M labels: the same documents, the same small encoder, more labels.

MiniLM cut to 2 layers, 32 documents of 64 tokens and 5 labels, groups of 92 labels or so, vectors of H = 128 in float32,
16 groups shortlisted, two threads. A step is all of it: forward, backward, clipping, all three optimisers. Sizes take turns in
one process; medians are compared.

Memory is that of a child process a size. `above bare`: its peak, less what it held with the encoder loaded and nothing else.
Most of that, whatever the number of labels, is the encoder's activations, gradients and AdamW state; `of labels` is the peak
less that of the same program with a single group of 92 labels. Besides the table that is the recall head (a row of F numbers a
group), 4 bytes a row of optimiser state, 24 bytes a label for the maps from labels to places, and a step's candidates.

Bars: a step at 3 M labels takes at most 1.25 times one at 10 K; what labels add to the peak at 3 M is
at most the table and 20 %.
"""

import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch

from benchmarks.frame import verdict
from benchmarks.inputs import encoder_of, even_groups, small_transformer, synthetic_batches
from xmc_ray.model.batch import Batch
from xmc_ray.model.encoder import TextEncoder
from xmc_ray.model.lightxml import LightXML, ModelConfig
from xmc_ray.training.optim import OptimConfig, Optimizer

SIZES = (10_000, 100_000, 1_000_000, 3_000_000)
GROUP = 92  # labels: 32,609 groups at 3 M
DOCUMENTS, TOKENS, LABELS, WIDTH, SHORTLIST, THREADS = 32, 64, 5, 128, 16, 2
ROUNDS, CHILD_STEPS = 31, 6
TIME_BAR, MEMORY_BAR = 1.25, 1.2


class Trainer:
    """A model of ``n_labels`` labels and the steps that train it; the step is that of `loop.train`, without its counting."""

    def __init__(self, n_labels: int, encoder: TextEncoder) -> None:
        groups = even_groups(n_labels, -(-n_labels // GROUP))
        self.model = LightXML(encoder, groups, ModelConfig(shortlist=SHORTLIST, bottleneck=WIDTH))
        self.optimizer = Optimizer(self.model, OptimConfig())
        self.batches = synthetic_batches(n_labels, 8, DOCUMENTS, TOKENS, LABELS)
        self.done = 0

    @property
    def table_bytes(self) -> int:
        table = self.model.table
        assert table is not None
        return table.weight.nbytes + table.bias.nbytes

    @property
    def recall_bytes(self) -> int:
        return self.model.recall.weight.nbytes + self.model.recall.bias.nbytes

    def next(self) -> Batch:
        self.done += 1
        return self.batches[self.done % len(self.batches)]

    def step(self) -> None:
        losses = self.model(self.next())
        (losses.recall + losses.rank).backward()
        self.optimizer.step(0.05)


def encoder() -> TextEncoder:
    return encoder_of(small_transformer(layers=2))


def memory(line: str) -> int:
    """Bytes of ``VmRSS`` (now) or ``VmHWM`` (at most) of this process; `getrusage` would count the parent's, too."""
    status = Path("/proc/self/status").read_text().split()
    return int(status[status.index(f"{line}:") + 1]) * 1024


def measure_memory(n_labels: int) -> None:
    """In a child: train a few steps, and print table, recall head and peak above the bare process as JSON."""
    torch.set_num_threads(THREADS)
    bare = encoder()
    before = memory("VmRSS")
    trainer = Trainer(n_labels, bare)
    for _ in range(CHILD_STEPS):
        trainer.step()
    print(json.dumps([trainer.table_bytes, trainer.recall_bytes, memory("VmHWM") - before]))


def memory_of(n_labels: int) -> tuple[int, int, int]:
    child = subprocess.run([sys.executable, __file__, str(n_labels)], capture_output=True, text=True, check=True)
    table, recall, peak = json.loads(child.stdout)
    return table, recall, peak


def main() -> None:
    torch.set_num_threads(THREADS)
    trainers = [Trainer(n_labels, encoder()) for n_labels in SIZES]
    seconds = np.zeros((ROUNDS, len(SIZES)))
    for round_ in range(ROUNDS):
        for column, trainer in enumerate(trainers):
            started = time.perf_counter()
            trainer.step()
            seconds[round_, column] = time.perf_counter() - started
    medians = np.median(seconds[3:], axis=0)
    del trainers

    columns = f"{'step':>11}{'ratio':>7}{'table':>11}{'recall head':>13}{'above bare':>12}{'of labels':>12}{'to table':>10}"
    print(f"{'labels':>10}{columns}")
    fixed = memory_of(GROUP)[2]
    for n_labels, median in zip(SIZES, medians, strict=True):
        table, recall, peak = memory_of(n_labels)
        to_table = (peak - fixed) / table
        sizes = "".join(
            f"{size / 2**20:{width}.0f} MiB" for size, width in ((table, 7), (recall, 9), (peak, 8), (peak - fixed, 8))
        )
        print(f"{n_labels:>10,}{1000 * median:8.1f} ms{median / medians[0]:7.2f}{sizes}{to_table:10.2f}")
    ratio = medians[-1] / medians[0]
    bars = f"{TIME_BAR}x, {MEMORY_BAR}x"
    holds = bool(ratio <= TIME_BAR and to_table <= MEMORY_BAR)
    verdict("step-cost", f"{ratio:.2f}x time, {to_table:.2f}x the table's memory", bars, holds)


if __name__ == "__main__":
    measure_memory(int(sys.argv[1])) if len(sys.argv) > 1 else main()
