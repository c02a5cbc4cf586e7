"""The token cache: training documents as tokens and label ids, made once and read in every epoch.

    <place>/
        tokens.json                         counts, and the folder of the attempt that was finished; written last
        <attempt>/labels.parquet            the label index
        <attempt>/train/part-00000.parquet  tokens, labels; a row group is a chunk of `epochs.CHUNK` documents, in an order
        <attempt>/validation/...            drawn once, those that are held out in the order of the files
        <attempt>/calibration/...

A file holds `epochs.POOL` chunks, the last one fewer. Every attempt writes to a folder of its own, so two runs that make the
same tokens at the same time, or one that was killed on the way, never mix.
"""

import uuid
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from xmc_ray import storage
from xmc_ray.data.epochs import CHUNK, POOL
from xmc_ray.data.labels import IntArray, LabelIndex
from xmc_ray.errors import DataError

FORMAT = 2


MARKER = "tokens.json"


Split = Literal["train", "validation", "calibration"]


Column = Literal["tokens", "labels"]


@dataclass(frozen=True)
class TokenCache:
    """Finished tokens at ``place``, in its folder ``attempt``; ``counts``: documents by what became of them."""

    place: str
    attempt: str
    counts: dict[str, int]

    @classmethod
    def open(cls, place: str) -> "TokenCache":
        """Raises DataError where nothing is finished."""
        found = storage.read_json(storage.join(place, MARKER))
        return cls(place, found["attempt"], found["counts"])

    @cached_property
    def labels(self) -> LabelIndex:
        """All labels, without names."""
        return LabelIndex.from_table(storage.read_parquet(storage.join(self.place, self.attempt, "labels.parquet")))

    def __getstate__(self) -> dict[str, object]:
        """Without the labels: every task is sent a cache, and can open them again."""
        return {name: value for name, value in vars(self).items() if name != "labels"}

    def n_chunks(self, split: Split) -> int:
        """How many `chunks` a split has."""
        return -(-self.counts[split] // CHUNK)

    def some(self, split: Split, documents: int) -> IntArray:
        """Numbers of the chunks, evenly among all, that hold so many documents of a split, or all."""
        n_chunks = self.n_chunks(split)
        n_taken = min(n_chunks, -(-documents // CHUNK))
        return np.arange(n_taken) * n_chunks // max(1, n_taken)

    def chunks(self, split: Split, numbers: IntArray | None = None, columns: list[str] | None = None) -> Iterator[pa.Table]:
        """``tokens`` list<int32>, ``labels`` list<int32>: the chunks ``numbers``, or all in order, one table each.

        A storage that does not answer is asked again for a while.
        """
        for number in np.arange(self.n_chunks(split)) if numbers is None else numbers:
            uri = storage.join(self.place, self.attempt, split, _part(int(number) // POOL))
            yield storage.patiently(partial(_row_group, uri, int(number) % POOL, columns))

    def column(self, split: Split, name: Column) -> Iterable[pa.ListArray]:
        """One column, chunk by chunk; can be gone through more than once."""
        return _Column(self, split, name)


def _row_group(uri: str, number: int, columns: list[str] | None) -> pa.Table:
    filesystem, path = storage.arrow_filesystem(uri)
    with storage.explained(uri), pq.ParquetFile(path, filesystem=filesystem) as file:
        return file.read_row_group(number, columns=columns)


@dataclass(frozen=True)
class _Column:
    cache: TokenCache
    split: Split
    name: Column

    def __iter__(self) -> Iterator[pa.ListArray]:
        for chunk in self.cache.chunks(self.split, columns=[self.name]):
            yield chunk[self.name].combine_chunks()


def write_tokens(
    place: str, labels: LabelIndex, counts: Mapping[str, int], splits: Mapping[Split, Iterator[pa.Table]], source: str
) -> None:
    """Write the tables of each split, in any portions, and the marker last. Raises DataError when train has no row."""
    attempt = uuid.uuid4().hex[:8]
    found = dict(counts)
    for split, tables in splits.items():
        found[split] = 0
        for number, table in enumerate(_portions(tables, CHUNK * POOL)):
            with storage.new_file(storage.join(place, attempt, split, _part(number))) as file:
                pq.write_table(table, file, row_group_size=CHUNK)
            found[split] += len(table)
    if not found["train"]:
        raise DataError("no document is left to train on", where=source, found=found)
    with storage.new_file(storage.join(place, attempt, "labels.parquet")) as file:
        labels.save(file)
    if not storage.exists(storage.join(place, MARKER)):  # else another run was faster, and is training on what it has made
        storage.write_json(storage.join(place, MARKER), {"attempt": attempt, "counts": found})


def _portions(tables: Iterator[pa.Table], rows: int) -> Iterator[pa.Table]:
    """The same rows in tables of ``rows`` rows; the last one has what is left."""
    waiting: list[pa.Table] = []
    for table in tables:
        waiting.append(table)
        while sum(map(len, waiting)) >= rows:
            joined = pa.concat_tables(waiting).combine_chunks()
            yield joined.slice(0, rows)
            waiting = [joined.slice(rows)]
    if sum(map(len, waiting)):
        yield pa.concat_tables(waiting).combine_chunks()


def _part(number: int) -> str:
    return f"part-{number:05}.parquet"
