"""Runs the steps of a night on Ray.

The steps of a night are plain callables over rows and tables, and know nothing of Ray. A `Runner` calls them in tasks and
actors; most tests have one that calls them in their own process.

Ray Data cuts tables into blocks by size and joins them into batches as it sees fit, but a piece has to stay whole, whatever its
size, from the task that reads it to the task that writes it. All that this takes is here, and nowhere else: a piece travels as
one row, its table serialised in a cell, and a block ends after each row. So an actor begins as soon as one piece is read, and
what a crash costs is counted in pieces.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import ray.data
from ray.data import TaskPoolStrategy

from xmc_ray.on_ray.pool import PoolConfig
from xmc_ray.on_ray.session import arrow_batches, connect, is_cluster, make_room
from xmc_ray.on_ray.tag.gauges import ActorBoard, Board

Row = dict[str, Any]
Read = Callable[[list[Row]], Iterator[tuple[int, pa.Table]]]  # rows of a plan -> number and table of each piece
Predict = Callable[[pa.Table], pa.Table]
Write = Callable[[int, pa.Table], Row]  # number and table of a piece -> its summary

_READING, _WRITING = 0.5, 0.25  # CPUs that a task of each stage asks for
_ONE_PIECE: dict[str, Any] = {"batch_format": "pyarrow", "batch_size": 1}


class Runner:
    """Computes a night on Ray. A subclass may compute it elsewhere: it has handles of its own, and calls the same steps."""

    def start(self, pool: PoolConfig) -> PoolConfig:
        """Join or start Ray, and return the pool with its size settled. Nothing is asked for yet."""
        connect()
        return pool.settled()

    def make_room(self, pool: PoolConfig) -> None:
        """Wait until Ray has room for the actors; ConfigError if it never has."""
        make_room("actors", pool.min, pool.needs, pool.patience, beside=1)

    def board(self, name: str, labels: Mapping[str, str]) -> Board | None:
        """Where the status of a night is shown; None for a Ray of this machine, which exports no metrics."""
        if not is_cluster():
            return None
        connect()
        return ActorBoard(name, labels)

    def put(self, value: Any) -> Any:
        """A handle to a value that many tasks share."""
        return ray.put(value)

    def submit(self, task: Any, *arguments: Any, returns: int = 1) -> Any:
        """Start ``task(*arguments)``; each of these may be a handle. Returns a handle, or a list of ``returns`` handles."""
        return _call.options(num_returns=returns).remote(task, *arguments)

    def get(self, handle: Any) -> Any:
        """The value of a handle, or the values of a list of handles, once they are there."""
        return ray.get(handle)

    def run_pieces(
        self, groups: Sequence[pa.Table], read: Read, predictor: Callable[[], Predict], write: Write, pool: PoolConfig
    ) -> Iterator[Row]:
        """Read, tag and write pieces; yields the summary of each once it is written, in any order.

        ``groups``: rows of a plan, those of a group read by one task in one go; ``predictor`` loads the model.
        """
        with one_block_per_piece():
            for table in arrow_batches(stream(groups, read, predictor, write, pool)):
                yield from map(json.loads, table["summary"].to_pylist())


def stream(
    groups: Sequence[pa.Table], read: Read, predictor: Callable[[], Predict], write: Write, pool: PoolConfig
) -> ray.data.Dataset:
    """The stages of `Runner.run_pieces`; gives ``summary`` as JSON, a row a piece."""
    pieces = ray.data.from_arrow(list(groups))
    tokenised = pieces.map_batches(
        ReadPieces(read).__call__, batch_format="pyarrow", batch_size=None, **_beside(pool, _READING)
    )
    tagged = tokenised.map_batches(TagPieces, fn_constructor_args=(predictor,), **_ONE_PIECE, **pool.resources)
    return tagged.map_batches(WritePieces(write).__call__, **_ONE_PIECE, **_beside(pool, _WRITING))


@contextmanager
def one_block_per_piece() -> Iterator[None]:
    """Streams that run meanwhile end a block after each row, and hand blocks on in any order, as soon as they are ready."""
    context = ray.data.DataContext.get_current()
    size, order = context.target_max_block_size, context.execution_options.preserve_order
    context.target_max_block_size, context.execution_options.preserve_order = 1, False
    try:
        yield
    finally:
        context.target_max_block_size, context.execution_options.preserve_order = size, order


class ReadPieces:
    """A task that reads a group of pieces."""

    def __init__(self, read: Read) -> None:
        self.read = read

    def __call__(self, pieces: pa.Table) -> Iterator[pa.Table]:
        """Rows of the plan in, a row a piece out."""
        for number, table in self.read(pieces.to_pylist()):
            yield _pack(number, table)


class TagPieces:
    """An actor that holds the model."""

    def __init__(self, predictor: Callable[[], Predict]) -> None:
        self.predict = predictor()

    def __call__(self, packed: pa.Table) -> pa.Table:
        """One piece at a time, which is sorted by length as a whole."""
        number, table = _unpack(packed)
        return _pack(number, self.predict(table))


class WritePieces:
    """A task that writes pieces."""

    def __init__(self, write: Write) -> None:
        self.write = write

    def __call__(self, packed: pa.Table) -> pa.Table:
        """A piece in, its summary out."""
        return pa.table({"summary": [json.dumps(self.write(*_unpack(packed)))]})


@ray.remote(num_cpus=1)
def _call(task: Any, *arguments: Any) -> Any:
    return task(*arguments)


def _beside(pool: PoolConfig, cpus: float) -> dict[str, Any]:
    """Arguments of `map_batches` for tasks of ``cpus`` CPUs in the stages before and after the actors.

    Ray Data gives each stage an equal share of a cluster's CPUs, whatever it needs, and a pool on CPUs does not grow beyond
    its share. So the other stages are limited to one task for each actor, which leaves the rest to the actors.
    """
    return {} if pool.gpu else {"compute": TaskPoolStrategy(size=max(2, pool.max)), "num_cpus": cpus}


def _pack(number: int, table: pa.Table) -> pa.Table:
    """A piece as one row: ``piece``, its number, and ``data``, its table as an Arrow stream."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    data = pa.Array.from_buffers(pa.large_binary(), 1, [None, pa.py_buffer(np.array([0, sink.tell()])), sink.getvalue()])
    return pa.table({"piece": [number], "data": data})


def _unpack(packed: pa.Table) -> tuple[int, pa.Table]:
    """ValueError if Ray has put several pieces together, or cut one."""
    [number], [data] = packed["piece"].to_pylist(), packed["data"]
    return number, pa.ipc.open_stream(data.as_buffer()).read_all()
