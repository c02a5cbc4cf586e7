"""The order of documents: which of them make up step n, for any number of workers.

Documents are stored in *chunks* of 4,096, shuffled once. An epoch takes the chunks in a new order, 16 at a time: a *pool* is
what a worker holds in memory. Inside a pool documents are shuffled, cut into windows, sorted by length within a window and
cut into batches, so that documents of similar length meet and little is padded; which ones meet changes with every epoch.
All cuts are nearly equal, so no batch is a short last one.

Everything follows from (seed, epoch), so a run can resume at any step, on any number of workers.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from xmc_ray.data.labels import IntArray
from xmc_ray.errors import ConfigError

CHUNK = 4096  # documents
POOL = 16  # chunks
_BATCHES_A_WINDOW = 16  # at least, so that cutting a window into whole batches changes their size by little


@dataclass(frozen=True, kw_only=True)
class EpochPlan:
    """Batches of ``batch_size`` documents, give or take a few per cent, out of ``n_documents``."""

    n_documents: int
    batch_size: int
    window: int
    seed: int

    @property
    def steps(self) -> int:
        """Batches in an epoch."""
        return -(-self.n_documents // self.batch_size)

    @cached_property
    def chunk_sizes(self) -> IntArray:
        """int64: documents in each chunk."""
        starts = np.arange(0, self.n_documents, CHUNK)
        return np.minimum(self.n_documents - starts, CHUNK)

    def pools(self, epoch: int) -> list["Pool"]:
        """The pools of an epoch, in order."""
        order = np.random.default_rng([self.seed, epoch]).permutation(len(self.chunk_sizes))
        parts = np.array_split(order, -(-len(order) // POOL))
        ends = np.cumsum([self.chunk_sizes[part].sum() for part in parts])
        numbers = [*(int(end) * self.steps // self.n_documents for end in (0, *ends))]
        return [Pool(self, epoch, part, *numbers[number : number + 2]) for number, part in enumerate(parts)]

    def check(self, parts: int) -> None:
        """ConfigError unless every batch can be divided into ``parts`` (workers times micro-batches)."""
        smallest = self.n_documents // self.steps
        if self.n_documents > max(self.window, _BATCHES_A_WINDOW * self.batch_size):
            smallest = int(self.n_documents / self.steps / 1.1)  # windows of 11 batches and more, one batch more or less
        if parts > max(smallest, 1):
            found, way_out = f"{parts} parts, batches of {smallest} documents", "raise loop.batch_size, or take fewer workers"
            expected = "workers x loop.accumulate at most the documents of a batch"
            raise ConfigError("workers and micro-batches cannot share a batch", found=found, expected=expected, way_out=way_out)


@dataclass(frozen=True)
class Pool:
    """Steps ``first`` to ``last`` (exclusive) of an epoch and the chunks their documents are in."""

    plan: EpochPlan
    epoch: int
    chunks: IntArray
    first: int
    last: int

    def batches(self, lengths: IntArray) -> list[IntArray]:
        """Rows of each step, given the ``lengths`` in tokens of the pool's documents, chunk after chunk."""
        plan, n_rows, n_batches = self.plan, len(lengths), self.last - self.first
        rng = np.random.default_rng([plan.seed, plan.n_documents, self.epoch, self.first])
        n_windows = max(1, min(round(n_rows / plan.window), n_batches // _BATCHES_A_WINDOW))
        windows = np.array_split(rng.permutation(n_rows), n_windows)
        ends = np.cumsum([0, *map(len, windows)]) * n_batches // n_rows
        batches: list[IntArray] = []
        for window, n_here in zip(windows, np.diff(ends), strict=True):
            batches += np.array_split(window[np.argsort(lengths[window], kind="stable")], n_here)
        return [batches[number] for number in rng.permutation(n_batches)]

    def share(self, lengths: IntArray, rank: int, world: int) -> tuple[IntArray, IntArray]:
        """int64[n], int64[n]: the steps, rising and counted since the start of training, and rows of one worker's documents.

        A batch's documents are dealt out one by one, so shares differ by at most one document.
        """
        shares = [batch[rank::world] for batch in self.batches(lengths)]
        steps = np.arange(self.first, self.last) + self.epoch * self.plan.steps
        return np.repeat(steps, [len(share) for share in shares]), np.concatenate(shares)
