"""Row groups of Parquet files: what of a large file a task reads, and reading that goes forward.

A row group is read as a whole, however few of its rows are wanted. So whoever wants several parts of one reads it once.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from xmc_ray import storage
from xmc_ray.storage.listing import FileInfo


def row_ranges(file: FileInfo, size: int) -> list[tuple[int, int | None]]:
    """First row and number of rows of runs of row groups with about ``size`` bytes each, a larger row group alone.

    (0, None), all of it, for a smaller file and for one that cannot be read.
    """
    if file.size <= size:
        return [(0, None)]
    filesystem, path = storage.arrow_filesystem(file.uri)
    try:
        footer = storage.patiently(lambda: pq.read_metadata(path, filesystem=filesystem))
    except (OSError, pa.ArrowException, UnicodeError):  # the last one: of names of columns
        return [(0, None)]
    most = footer.num_rows * size // file.size
    ranges: list[tuple[int, int | None]] = []
    first = rows = 0
    for group in range(footer.num_row_groups):
        more = footer.row_group(group).num_rows
        if rows and rows + more > most:
            ranges.append((first, rows))
            first, rows = first + rows, 0
        rows += more
    return [*ranges, (first, rows)] if rows else ranges


class RowGroups:
    """A Parquet file that is open: its rows, of which those further on in a row group do not read it again."""

    def __init__(self, uri: str, columns: Sequence[str], chunk: int) -> None:
        """``chunk``: most rows at a time."""
        filesystem, path = storage.arrow_filesystem(uri)
        self.uri, self._columns, self._chunk = uri, columns, chunk
        self._stream = filesystem.open_input_file(path)
        self._file = pq.ParquetFile(self._stream, pre_buffer=True)
        footer = self._file.metadata
        sizes = [footer.row_group(group).num_rows for group in range(footer.num_row_groups)]
        self.ends: list[int] = np.cumsum(sizes, dtype=np.int64).tolist()
        """Where each row group ends, in rows of the file."""
        self._group = -1
        self._batches: Iterator[Any] = iter(())
        self._batch, self._first = pa.table({}), 0  # the last rows that were read, and the number of the first of them

    def rows(self, group: int, start: int, stop: int) -> Iterator[pa.Table]:
        """Rows from ``start`` to before ``stop`` of the file, which lie in a row group; pyarrow's errors as they are."""
        if group != self._group or start < self._first:
            self._first, self._batch = self.ends[group - 1] if group else 0, pa.table({})
            self._batches = self._file.iter_batches(self._chunk, row_groups=[group], columns=self._columns, use_threads=False)
            self._group = group
        while start < stop:
            while self._first + len(self._batch) <= start:
                self._advance()
            rows = self._batch.slice(start - self._first, stop - start)
            yield rows
            start += len(rows)

    def _advance(self) -> None:
        """Read the next rows of the row group; after an error it has to be begun anew."""
        group, self._group = self._group, -1
        self._first += len(self._batch)
        batch = next(self._batches, None)
        if batch is None:
            raise pa.ArrowInvalid("a row group has fewer rows than its footer says")
        self._batch, self._group = pa.Table.from_batches([batch]), group

    def close(self) -> None:
        """Close the file."""
        self._file.close()
        self._stream.close()


class Opened:
    """The Parquet file that was read last, open for whoever goes on in it."""

    def __init__(self) -> None:
        self._last: RowGroups | None = None

    def row_groups(self, uri: str, columns: Sequence[str], chunk: int) -> RowGroups:
        """The file at ``uri``; any other is closed."""
        if self._last is None or self._last.uri != uri:
            self.close()
            self._last = RowGroups(uri, columns, chunk)
        return self._last

    def close(self) -> None:
        """Close the file, as after an error."""
        last, self._last = self._last, None
        if last is not None:
            last.close()
