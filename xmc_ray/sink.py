"""Tags out: what a write task leaves in the folder of a night, and how its rows are counted."""

import uuid
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pyarrow.fs import LocalFileSystem
from ray.data._internal.execution.interfaces import TaskContext
from ray.data._internal.planner.plan_write_op import WRITE_UUID_KWARG_NAME
from ray.data.block import Block, BlockAccessor
from ray.data.datasource import Datasink, WriteResult

from xmc_ray import storage
from xmc_ray.errors import ConfigError

_SCORE_BINS = 20
_STRINGS = pa.list_(pa.string())
_REJECTS = {"file": pa.string(), "id": pa.string(), "reason": pa.string()}
_TAGS = {
    **{"id": pa.string(), "labels": _STRINGS, "scores": pa.list_(pa.float32()), "names": _STRINGS},
    **{"model": pa.string(), "text_digest": pa.string()},
}
_COUNTS = pa.struct({"values": pa.string(), "counts": pa.int64()})


class TagSink(Datasink[dict[str, Any]]):
    """Writes tagged rows to ``<folder>/part-*.parquet`` and rejected ones to ``<folder>/rejects/part-*.parquet``.

    Takes ``id``, ``labels``, ``scores``, ``model``, ``text_digest``, ``file``, ``reason`` and, where known, ``names``;
    other columns are left out. The files of a write task bear its number, so that a second attempt replaces the first.
    ``rows_per_file`` is the least that a task takes, in all but the last; 50,000 rows are some megabytes.

    After ``write_datasink``, ``summary`` holds ``in``, ``tagged``, ``rejected``, all in rows; the sum of each column in
    ``sums``; ``reasons`` and ``labels``, {value: rows}, most frequent first; ``scores``, counts in 20 equal bins of [0, 1].
    """

    def __init__(self, folder: str, *, sums: Sequence[str] = (), rows_per_file: int = 50_000) -> None:
        self.summary: dict[str, Any] = {}
        self._folder = folder
        # Made here and sent to the tasks, whose own environment may lack the credentials.
        self._filesystem, self._path = storage.arrow_filesystem(folder)
        self._sums = tuple(sums)
        self._rows_per_file = rows_per_file

    @property
    def min_rows_per_write(self) -> int:
        """What Ray gathers before it starts a write task."""
        return self._rows_per_file

    def write(self, blocks: Iterable[Block], ctx: TaskContext) -> dict[str, Any]:
        """Write the rows of one task and count them."""
        # Ray keeps all blocks of a write task until it ends, so having them in one piece takes no further memory.
        tables = [table for block in blocks if len(table := BlockAccessor.for_block(block).to_arrow())]
        tags = _concatenate([table.filter(pc.is_null(table["reason"])) for table in tables], _TAGS)
        rejects = _concatenate([table.filter(pc.is_valid(table["reason"])) for table in tables], _REJECTS)
        name = f"part-{ctx.kwargs[WRITE_UUID_KWARG_NAME]}-{ctx.task_idx:06}.parquet"
        self._write_file(name, tags)
        self._write_file(f"rejects/{name}", rejects)
        return {
            "in": sum(map(len, tables)),
            "tagged": len(tags),
            "rejected": len(rejects),
            **{column: sum(pc.sum(table[column]).as_py() or 0 for table in tables) for column in self._sums},
            "reasons": pc.value_counts(rejects["reason"]),
            "labels": pc.value_counts(pc.list_flatten(tags["labels"])),
            "scores": np.histogram(pc.list_flatten(tags["scores"]).to_numpy(), _SCORE_BINS, (0, 1))[0],
        }

    def on_write_complete(self, write_result: WriteResult[dict[str, Any]]) -> None:
        """Add up what the tasks have counted; Ray calls this on the driver."""
        parts = [part for part in write_result.write_returns if part]
        self.summary = {
            **{name: sum(part[name] for part in parts) for name in ("in", "tagged", "rejected", *self._sums)},
            **{name: _add_counts([part[name] for part in parts]) for name in ("reasons", "labels")},
            "scores": sum((part["scores"] for part in parts), np.zeros(_SCORE_BINS, np.int64)).tolist(),
        }

    def _write_file(self, name: str, table: pa.Table) -> None:
        if not len(table):
            return
        buffer = pa.BufferOutputStream()
        pq.write_table(table, buffer, compression="zstd")
        path = f"{self._path}/{name}"
        folder, _, last = path.rpartition("/")
        # An object on S3 appears when it is complete; a local file gets its name then.
        is_local = isinstance(self._filesystem, LocalFileSystem)
        target = f"{folder}/.{last}.{uuid.uuid4().hex}" if is_local else path
        with storage.explained(storage.join(self._folder, name), missing=ConfigError):
            if is_local:
                self._filesystem.create_dir(folder)
            with self._filesystem.open_output_stream(target) as stream:
                stream.write(buffer.getvalue())
            if is_local:
                self._filesystem.move(target, path)


def _concatenate(tables: Sequence[pa.Table], columns: dict[str, pa.DataType]) -> pa.Table:
    """The tables in one, with ``columns`` in their order and types; ``names`` only if all tables have it."""
    has_names = all("names" in table.column_names for table in tables)
    schema = pa.schema({name: kind for name, kind in columns.items() if name != "names" or has_names})
    return pa.concat_tables([schema.empty_table(), *(table.select(schema.names).cast(schema) for table in tables)])


def _add_counts(parts: Sequence[pa.Array]) -> dict[str, int]:
    """{value: count} of several ``value_counts``, by falling count, then by value."""
    table = pa.Table.from_struct_array(pa.chunked_array(parts, _COUNTS)).group_by("values").aggregate([("counts", "sum")])
    table = table.sort_by([("counts_sum", "descending"), ("values", "ascending")])
    return dict(zip(*(column.to_pylist() for column in table.select(["values", "counts_sum"])), strict=True))
