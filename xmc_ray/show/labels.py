"""Labels of a night, from its counts: the most frequent ones that a search takes, and one label over all nights."""

import heapq
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds

from xmc_ray import storage
from xmc_ray.errors import DataError
from xmc_ray.on_ray.tag.nights import COUNTS
from xmc_ray.storage.files import join

_ROWS = 1 << 16


class Count(NamedTuple):
    """A label, the documents that got it, and the mean of its scores."""

    label: str
    documents: int
    mean: float


class Counts(NamedTuple):
    """The most frequent of the ``matching`` labels that were given at all."""

    most: list[Count]
    matching: int


def frequent(folder: str, containing: str = "", n: int = 100) -> Counts:
    """The ``n`` most frequent labels of a night that contain some letters, in any case. DataError as `count_of`."""
    most, matching = list[Count](), 0
    given = ds.field("documents") > 0
    if containing:
        given &= pc.match_substring(ds.field("label"), containing, ignore_case=True)
    for batch in _batches(folder, given):
        matching += len(batch)
        top = np.argsort(-np.asarray(batch["documents"]), kind="stable")[:n]
        most = heapq.nsmallest(n, [*most, *_counts(batch.take(pa.array(top)))], key=lambda each: (-each.documents, each.label))
    return Counts(most, matching)


def count_of(folder: str, label: str) -> Count | None:
    """What the night in ``folder`` counts of a label; None if it does not know it.

    DataError if the counts cannot be read.
    """
    for batch in _batches(folder, ds.field("label") == label):
        if len(batch):
            return _counts(batch)[0]
    return None


def _counts(batch: pa.RecordBatch) -> list[Count]:
    rows: list[dict[str, Any]] = batch.to_pylist()
    return [Count(row["label"], row["documents"], row["scores"] / max(1, row["documents"])) for row in rows]


def _batches(folder: str, taken: ds.Expression) -> Iterator[pa.RecordBatch]:
    uri = join(folder, COUNTS)
    filesystem, path = storage.arrow_filesystem(uri)
    with storage.explained(uri):
        try:
            fragment = ds.ParquetFileFormat().make_fragment(path, filesystem)
            columns = ["label", "documents", "scores"]
            yield from fragment.to_batches(columns=columns, filter=taken, batch_size=_ROWS, use_threads=False)
        except (pa.ArrowException, KeyError) as error:
            raise DataError("the counts of labels cannot be read", where=uri, found=error) from None
