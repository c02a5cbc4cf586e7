"""Documents in, tags out: the columns of the files, and what becomes of rows that do not fit.

A row is never dropped. One that cannot be used travels on with a ``reason``, past the model and into the rejects, so that
in the end rows in = rows tagged + rows rejected. Files that cannot be used at all are a `DataError` before anything runs.
"""

import hashlib
import json
import uuid
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import reduce
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.json
import pyarrow.parquet as pq
import ray.data
from pyarrow.fs import LocalFileSystem
from ray.data._internal.execution.interfaces import TaskContext
from ray.data._internal.planner.plan_write_op import WRITE_UUID_KWARG_NAME
from ray.data.block import Block, BlockAccessor
from ray.data.datasource import Datasink, FileBasedDatasource, WriteResult

from xmc_ray import storage
from xmc_ray.errors import ConfigError, DataError
from xmc_ray.labels import unique_in_rows
from xmc_ray.storage import FileInfo

PARQUET, JSON_LINES = (".parquet",), (".jsonl", ".jsonl.gz", ".json")

_STRINGS = pa.list_(pa.string())
_REJECT_COLUMNS = {"file": pa.string(), "id": pa.string(), "reason": pa.string()}
_TAG_COLUMNS = {
    "id": pa.string(),
    "labels": _STRINGS,
    "scores": pa.list_(pa.float32()),
    "names": _STRINGS,
    "model": pa.string(),
    "text_digest": pa.string(),
}
_VALUE_COUNTS = pa.struct({"values": pa.string(), "counts": pa.int64()})

_JSON_BYTES = 4 << 20  # read at a time; one bad line takes the whole piece from the fast parser to the slow one
_JSON_SAMPLE = 100  # lines whose keys are taken for the columns of a file
_SCORE_BINS = 20


@dataclass(frozen=True, kw_only=True)
class DocumentsConfig:
    """Where documents lie, and in which columns."""

    uri: str
    """A file, or a folder with all below it, local or s3://: Parquet (.parquet) or JSON lines (.jsonl, .jsonl.gz, .json)."""
    id: str = "id"
    """Column of the ids, strings or integers."""
    text: list[str] = field(default_factory=lambda: ["text"])
    """Columns of the text; several are joined in this order, without those that are null or blank."""
    separator: str = "\n"
    """What stands between joined texts."""
    labels: str = "labels"
    """Column of the labels, a list of strings a document; looked at only where labels are needed."""

    def __post_init__(self) -> None:
        if not self.text:
            raise ConfigError("documents.text names no column", found="[]", expected="at least one column")

    def columns(self, *, labelled: bool) -> list[tuple[str, str]]:
        """(setting, column that it names): the id, each text and, if ``labelled``, the labels."""
        labels = [("labels", self.labels)] if labelled else []
        return [("id", self.id), *(("text", name) for name in self.text), *labels]


def list_inputs(config: DocumentsConfig) -> list[FileInfo]:
    """The files that `read_documents` reads, in the order of their addresses; DataError if none, or of two kinds."""
    files = storage.list_files(config.uri, (*PARQUET, *JSON_LINES))
    expected = f"only *{', or only *'.join((PARQUET[0], ' *'.join(JSON_LINES)))}"
    kinds = [next((kind for kind in (PARQUET, JSON_LINES) if file.uri.endswith(kind)), None) for file in files]
    if kinds[0] is None or len(set(kinds)) > 1:
        raise DataError("not files of one kind", where=config.uri, found=files[0].uri, expected=expected)
    return files


def read_documents(config: DocumentsConfig, *, labelled: bool) -> ray.data.Dataset:
    """A stream of ``id``, ``text``, ``labels`` (if ``labelled``; list<string>, each once), ``file``, ``reason``.

    All but the labels are strings; ``reason`` is null in a good row, and else says why the row cannot be used. Ids that
    are integers become strings, a null list of labels an empty one. Raises DataError, judging by the first file with
    rows, for columns that are missing or of a wrong type, and when there are no rows.
    """
    files = list_inputs(config)
    _check_columns(files, config, labelled)
    filesystem, first = storage.arrow_filesystem(files[0].uri)
    scheme = files[0].uri.removesuffix(first)
    paths = [file.uri.removeprefix(scheme) for file in files]
    if not paths[0].endswith(PARQUET):
        return ray.data.read_datasource(_JsonLines(paths, filesystem, scheme, config, labelled))

    names = list(dict.fromkeys(name for _, name in config.columns(labelled=labelled)))
    unusable = [name for name in names if name == "path"] or [file.uri for file in files if "?" in file.uri]
    if unusable:
        # Ray puts the file's address into that column, and takes a question mark for the end of a file's name.
        raise DataError("Ray cannot read a Parquet column 'path' or a file name with '?'", where=config.uri, found=unusable[0])
    try:
        rows = ray.data.read_parquet(paths, filesystem=filesystem, include_paths=True, partitioning=None)
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise DataError("files do not fit together", where=config.uri, found=error, expected="the same columns in all") from error
    settings = {"config": config, "labelled": labelled, "scheme": scheme}
    return rows.select_columns([*names, "path"]).map_batches(
        _from_parquet, batch_format="pyarrow", batch_size=None, zero_copy_batch=True, fn_kwargs=settings
    )


def text_digest(texts: pa.Array) -> pa.Array:
    """string[n]: BLAKE2b of each text's UTF-8, 16 bytes as 32 hex digits; null stays null.

    Arrow has no such kernel. This loop does 700,000 texts of 300 letters a second, about twice what a tokenizer reads in a minute.
    """
    raw = texts.cast(pa.binary()).to_pylist()
    return pa.array([None if text is None else hashlib.blake2b(text, digest_size=16).hexdigest() for text in raw], pa.string())


class TagSink(Datasink[dict[str, Any]]):
    """Writes tagged rows to ``<folder>/part-*.parquet`` and rejected ones to ``<folder>/rejects/part-*.parquet``.

    Takes ``id``, ``labels``, ``scores``, ``model``, ``text_digest``, ``file``, ``reason`` and, where known, ``names``;
    further columns are left out. A write task has one name for its files, so that a second attempt replaces the first.

    After ``write_datasink`` the driver's ``summary`` holds ``in``, ``tagged``, ``rejected``; the sum of each column in
    ``sums``; ``reasons`` and ``labels``, {value: rows}, most frequent first; ``scores``, counts in 20 equal bins of [0, 1].
    """

    def __init__(self, folder: str, *, sums: Sequence[str] = (), rows_per_file: int = 50_000) -> None:
        self.summary: dict[str, Any] = {}
        # Made here, not in the tasks, whose environment may lack the credentials.
        self._filesystem, self._path = storage.arrow_filesystem(folder)
        self._sums = tuple(sums)
        self._rows_per_file = rows_per_file

    @property
    def min_rows_per_write(self) -> int:
        """Rows that a write task, and so a file, has at least (the last one aside)."""
        return self._rows_per_file

    def write(self, blocks: Iterable[Block], ctx: TaskContext) -> dict[str, Any]:
        """Write one task's rows and count them."""
        # Ray holds on to all blocks of a write task until it ends, so to have them in one piece costs no further memory.
        tables = [table for block in blocks if len(table := BlockAccessor.for_block(block).to_arrow())]
        name = f"part-{ctx.kwargs[WRITE_UUID_KWARG_NAME]}-{ctx.task_idx:06}.parquet"
        good = [table.filter(pc.is_null(table["reason"])) for table in tables]
        tags = _concat(good, _TAG_COLUMNS)
        rejects = _concat([table.filter(pc.is_valid(table["reason"])) for table in tables], _REJECT_COLUMNS)
        self._write_file(name, tags)
        self._write_file(f"rejects/{name}", rejects)
        return {
            "in": sum(map(len, tables)),
            "tagged": len(tags),
            "rejected": len(rejects),
            **{name: sum(pc.sum(table[name]).as_py() or 0 for table in tables) for name in self._sums},
            "reasons": pc.value_counts(rejects["reason"]),
            "labels": pc.value_counts(pc.list_flatten(tags["labels"])),
            "scores": _histogram(pc.list_flatten(tags["scores"]).to_numpy()),
        }

    def on_write_complete(self, write_result: WriteResult[dict[str, Any]]) -> None:
        """Add up what the tasks have counted; Ray calls this on the driver."""
        parts = [part for part in write_result.write_returns if part]
        numbers = {name: sum(part[name] for part in parts) for name in ("in", "tagged", "rejected", *self._sums)}
        counts = {name: _add_counts([part[name] for part in parts]) for name in ("reasons", "labels")}
        scores = sum((part["scores"] for part in parts), np.zeros(_SCORE_BINS, np.int64))
        self.summary = {**numbers, **counts, "scores": scores.tolist()}

    def _write_file(self, name: str, table: pa.Table) -> None:
        if not len(table):
            return
        buffer = pa.BufferOutputStream()
        pq.write_table(table, buffer, compression="zstd")
        path = f"{self._path}/{name}"
        with storage.explained(path, missing=ConfigError):
            if isinstance(self._filesystem, LocalFileSystem):
                folder, _, last = path.rpartition("/")
                self._filesystem.create_dir(folder)
                temporary = f"{folder}/.{last}.{uuid.uuid4().hex}"
                _write_bytes(self._filesystem, temporary, buffer)
                self._filesystem.move(temporary, path)
            else:
                _write_bytes(self._filesystem, path, buffer)
