"""The token cache: training documents as tokens and label ids, written once and read in every epoch.

    <folder>/
        tokens.json                         counts, and the folder of the attempt that was completed; written last
        <attempt>/labels.parquet            the label index
        <attempt>/train/part-00000.parquet  tokens, labels, draw (`split.draws`); a row group is a chunk of `epochs.CHUNK`
        <attempt>/validation/...            documents. Those to train on are shuffled, those held out are in the order of
        <attempt>/calibration/...           the files
        <attempt>/held-out-.../             a cache of the same documents with some held out, see `TokenCache.held_out`

A file holds `epochs.POOL` chunks, the last one perhaps fewer. Every attempt writes to a folder of its own, so that runs which
write the same tokens at the same time, or are killed on the way, never mix.
"""

import json
import uuid
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal, get_args

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from xmc_ray import storage
from xmc_ray.data.epochs import CHUNK, POOL
from xmc_ray.data.labels import IntArray, LabelIndex, list_lengths
from xmc_ray.data.split import ValidationConfig, uses
from xmc_ray.errors import DataError

FORMAT = 4
MARKER = "tokens.json"
Split = Literal["train", "validation", "calibration"]
Column = Literal["tokens", "labels"]

_COLUMNS = ["tokens", "labels", "judged"]  # of training; the last one is there with feedback only
_DRAW = "draw"  # decides what is held out


@dataclass(frozen=True)
class TokenCache:
    """Complete tokens at ``folder``, in its folder ``attempt``; ``counts``: documents of each split, rejected and so on."""

    folder: str
    attempt: str
    counts: dict[str, int]

    @classmethod
    def open(cls, folder: str) -> "TokenCache":
        """DataError unless an attempt was completed."""
        marker = storage.read_json(storage.join(folder, MARKER))
        return cls(folder, marker["attempt"], marker["counts"])

    @cached_property
    def labels(self) -> LabelIndex:
        """All labels, without names."""
        return LabelIndex.from_table(storage.read_parquet(self.uri("labels.parquet")))

    def __getstate__(self) -> dict[str, object]:
        """Without the labels, since every task is sent a cache and can read them itself."""
        return {name: value for name, value in vars(self).items() if name != "labels"}

    def uri(self, *names: str) -> str:
        """The address of a file beside the tokens."""
        return storage.join(self.folder, self.attempt, *names)

    def n_chunks(self, split: Split) -> int:
        """The number of a split's `chunks`."""
        return -(-self.counts[split] // CHUNK)

    def some(self, split: Split, documents: int) -> IntArray:
        """int64: evenly spaced numbers of chunks that together hold ``documents`` documents of a split, or all of it."""
        n_chunks = self.n_chunks(split)
        n_taken = min(n_chunks, -(-documents // CHUNK))
        return np.arange(n_taken) * n_chunks // max(1, n_taken)

    def chunks(self, split: Split, numbers: IntArray | None = None, columns: list[str] = _COLUMNS) -> Iterator[pa.Table]:
        """One table (``tokens``, ``labels``, maybe ``judged``: list<int32>) for each of the chunks ``numbers``, by default all.

        They are read `storage.patiently`.
        """
        for number in np.arange(self.n_chunks(split)) if numbers is None else numbers:
            uri = self.uri(split, _part(int(number) // POOL))
            yield storage.patiently(_row_group, uri, int(number) % POOL, columns)

    def held_out(self, validation: ValidationConfig, source: str) -> "TokenCache":
        """The same documents with some held out, if nothing is so far: written beside the tokens once, for each share.

        All are in the order of those to train on. Raises DataError, naming ``source``, when none is left to train on.
        """
        folder = self.uri(f"held-out-{validation.share:.9g}-{validation.calibrate}")
        if not storage.exists(storage.join(folder, MARKER)):
            splits = {split: self._drawn(validation, use) for use, split in enumerate(get_args(Split))}
            write_tokens(folder, self.labels, self.counts, splits, source)
        held_out = TokenCache.open(folder)
        unused = self.counts["train"] - sum(held_out.counts[split] for split in get_args(Split))  # have verdicts alone
        return replace(held_out, counts=held_out.counts | {"unlabelled": held_out.counts.get("unlabelled", 0) + unused})

    def _drawn(self, validation: ValidationConfig, use: int) -> Iterator[pa.Table]:
        """Documents of a use (`split.uses`), chunk by chunk; those held out have labels, not verdicts alone."""
        for table in self.chunks("train", columns=[*_COLUMNS, _DRAW]):
            chosen_D = uses(table[_DRAW].to_numpy(), validation) == use
            if use:
                chosen_D &= list_lengths(table["labels"].combine_chunks()) > 0
            yield table.filter(pa.array(chosen_D))

    def column(self, split: Split, name: Column) -> Iterable[pa.ListArray]:
        """One column, chunk by chunk; it can be iterated more than once."""
        return _Column(self, split, name)


def _row_group(uri: str, number: int, columns: list[str]) -> pa.Table:
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
    folder: str, labels: LabelIndex, counts: Mapping[str, int], splits: Mapping[Split, Iterator[pa.Table]], source: str
) -> None:
    """Write the tables of each split, in portions of any size, and the marker last; DataError when train has no row."""
    attempt = uuid.uuid4().hex[:8]
    total = dict(counts)
    for split, tables in splits.items():
        total[split] = 0
        for number, table in enumerate(_portions(tables, CHUNK * POOL)):
            with storage.new_file(storage.join(folder, attempt, split, _part(number))) as file:
                pq.write_table(table, file, row_group_size=CHUNK)
            total[split] += len(table)
    if not total["train"]:
        raise DataError("no document is left to train on", where=source, found=total)
    with storage.new_file(storage.join(folder, attempt, "labels.parquet")) as file:
        labels.save(file)
    _mark(storage.join(folder, MARKER), json.dumps({"attempt": attempt, "counts": total}, indent=2).encode())


def _mark(uri: str, content: bytes) -> None:
    """Write the marker unless there is one: another run was faster then, and is training on its own tokens."""
    try:
        storage.create(uri, content)
    except NotImplementedError:  # storage that creates nothing atomically: the last marker of a close race stays
        if not storage.exists(uri):
            storage.write_bytes(uri, content)


def _portions(tables: Iterator[pa.Table], rows: int) -> Iterator[pa.Table]:
    """The same rows in tables of ``rows`` rows, the last one perhaps fewer."""
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
