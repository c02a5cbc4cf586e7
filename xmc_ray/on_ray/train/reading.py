"""A worker's share of every batch, which Ray Data reads ahead of it.

A task reads the chunks of one pool, cuts the pool into batches as `epochs` says, and keeps the share of the worker that asked.
The order is that of the plan, from any step on, for any number of workers. Tasks have no use for torch.
"""

from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import pyarrow as pa
import ray.data

from xmc_ray.data.epochs import EpochPlan
from xmc_ray.data.labels import list_lengths
from xmc_ray.data.token_cache import TokenCache
from xmc_ray.errors import DataError
from xmc_ray.on_ray.session import arrow_batches, set_up_streams


def share_of_steps(
    tokens: TokenCache, plan: EpochPlan, epochs: int, first_step: int, rank: int, world: int
) -> Iterator[pa.Table]:
    """The documents of worker ``rank`` of ``world`` in each step from ``first_step`` to the end of the last epoch.

    Tables have the columns of `TokenCache.chunks`, and ``step``. Raises DataError if a step is missing.
    """
    pools = [
        {"epoch": epoch, "pool": number}
        for epoch in range(first_step // plan.steps, epochs)
        for number, pool in enumerate(plan.pools(epoch))
        if epoch * plan.steps + pool.last > first_step
    ]
    if not pools:
        return
    share = _Share(tokens, plan, rank, world, first_step)
    set_up_streams()
    # Reading waits more than it computes. It reserves no CPU, since it must never wait for one that the workers hold.
    stream = ray.data.from_items(pools, override_num_blocks=len(pools)).map_batches(
        share, batch_size=1, batch_format="pyarrow", num_cpus=0, compute=ray.data.TaskPoolStrategy(min(2, len(pools)))
    )
    for step, table in enumerate(_by_step(arrow_batches(stream)), first_step):
        if table["step"][0].as_py() != step:
            raise DataError("batches are out of order", found=f"step {table['step'][0]}", expected=f"step {step}")
        yield table


class _Share:
    """A task that gives one worker's share of the pool that a row names: ``step`` (int64, rising) and the cache's columns."""

    def __init__(self, tokens: TokenCache, plan: EpochPlan, rank: int, world: int, first_step: int) -> None:
        self.tokens, self.plan, self.rank, self.world, self.first_step = tokens, plan, rank, world, first_step

    def __call__(self, pools: pa.Table) -> pa.Table:
        (row,) = pools.to_pylist()
        pool = self.plan.pools(row["epoch"])[row["pool"]]
        table = pa.concat_tables(self.tokens.chunks("train", pool.chunks))
        step_N, row_N = pool.share(list_lengths(table["tokens"].combine_chunks()), self.rank, self.world)
        wanted = step_N >= self.first_step
        return table.take(row_N[wanted]).append_column("step", pa.array(step_N[wanted])).combine_chunks()


def _by_step(tables: Iterator[pa.Table]) -> Iterator[pa.Table]:
    """One table for each step, wherever Ray Data has cut the stream."""
    rest: list[pa.Table] = []
    for table in tables:
        table = pa.concat_tables([*rest, table])
        step = table["step"].to_numpy()
        ends = [0, *(np.flatnonzero(np.diff(step)) + 1).tolist()]
        yield from (table.slice(first, last - first) for first, last in pairwise(ends))
        rest = [table.slice(ends[-1])]
    yield from (table for table in rest if len(table))
