"""From the token cache to the workers: each gets its share of every batch, read ahead by Ray Data.

A task reads the chunks of one pool, cuts the pool into batches as `epochs` says, and keeps what falls to the one worker
that asked. Tasks and workers run side by side; the order is that of the plan, from any step on, for any number of workers.
"""

from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import pyarrow as pa
import ray.data

from xmc_ray.epochs import EpochPlan
from xmc_ray.errors import DataError
from xmc_ray.exchange import Exchange
from xmc_ray.labels import list_lengths
from xmc_ray.session import arrow_batches
from xmc_ray.text import Batch, make_batch
from xmc_ray.tokens import TokenCache


def batches(tokens: TokenCache, plan: EpochPlan, epochs: int, first_step: int, exchange: Exchange) -> Iterator[Batch]:
    """This worker's share of the batches from ``first_step`` to the end of the last epoch."""
    places = [
        {"epoch": epoch, "pool": number}
        for epoch in range(first_step // plan.steps, epochs)
        for number, pool in enumerate(plan.pools(epoch))
        if epoch * plan.steps + pool.last > first_step
    ]
    if not places:
        return
    share = _Share(tokens, plan, exchange.rank, exchange.world, first_step)
    ray.data.DataContext.get_current().execution_options.preserve_order = True
    # Reading waits more than it computes, and must never wait for a CPU that the workers have taken: it asks for none.
    stream = ray.data.from_items(places, override_num_blocks=len(places)).map_batches(
        share, batch_size=1, batch_format="pyarrow", num_cpus=0, compute=ray.data.TaskPoolStrategy(min(2, len(places)))
    )
    for step, table in enumerate(_by_step(arrow_batches(stream)), first_step):
        if table["step"][0].as_py() != step:
            raise DataError("batches are out of order", found=f"step {table['step'][0]}", expected=f"step {step}")
        yield make_batch(table["tokens"].combine_chunks(), table["labels"].combine_chunks())


class _Share:
    """What falls to one worker in the pool that a row names: ``step`` int64 (rising), ``tokens``, ``labels``."""

    def __init__(self, tokens: TokenCache, plan: EpochPlan, rank: int, world: int, first_step: int) -> None:
        self.tokens, self.plan, self.rank, self.world, self.first_step = tokens, plan, rank, world, first_step

    def __call__(self, places: pa.Table) -> pa.Table:
        (place,) = places.to_pylist()
        pool = self.plan.pools(place["epoch"])[place["pool"]]
        table = pa.concat_tables(self.tokens.chunks("train", pool.chunks))
        step_N, row_N = pool.share(list_lengths(table["tokens"].combine_chunks()), self.rank, self.world)
        wanted = step_N >= self.first_step
        return table.take(row_N[wanted]).append_column("step", pa.array(step_N[wanted])).combine_chunks()


def _by_step(tables: Iterator[pa.Table]) -> Iterator[pa.Table]:
    """The rows of each step, one table each, however Ray Data has cut the stream."""
    rest: list[pa.Table] = []
    for table in tables:
        table = pa.concat_tables([*rest, table])
        step = table["step"].to_numpy()
        ends = [0, *(np.flatnonzero(np.diff(step)) + 1).tolist()]
        yield from (table.slice(first, last - first) for first, last in pairwise(ends))
        rest = [table.slice(ends[-1])]
    yield from (table for table in rest if len(table))
