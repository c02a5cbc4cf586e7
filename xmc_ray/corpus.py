"""Documents in: the files of a catalogue or of a training set, and a stream of what they hold.

Row by row, what does not fit is told in the column ``reason``. A file that cannot be read is an error here, where a model
is trained or measured; a night of tagging passes over it (`census`).
"""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray.data

from xmc_ray import access
from xmc_ray.documents import DocumentsConfig, Rules
from xmc_ray.errors import DataError
from xmc_ray.inputs import check_columns, list_inputs
from xmc_ray.reading import PARQUET, Segment, read_file
from xmc_ray.storage import FileInfo

_LARGE = 64 << 20  # bytes of a Parquet file that is read by several tasks
_PARTS = pa.schema(
    [("uri", pa.string()), ("size", pa.int64()), ("version", pa.string()), *((n, pa.int64()) for n in ("file", "row", "rows"))]
)


def read_documents(config: DocumentsConfig, *, labelled: bool, series: str | None = None) -> ray.data.Dataset:
    """A stream of what `documents.Rules` makes of the files, file by file and row by row; ``series``: the column of that.

    Raises DataError for columns that are missing or of a wrong type, judging by the first files that have rows, and if none
    has any; a task raises it for a file that cannot be read.
    """
    files = list_inputs(config)
    check_columns(files, config, labelled=labelled, series=series)
    read = _Read(Rules.of(config, labelled=labelled, series=series))
    tasks = parts(files)
    blocks = [tasks.slice(row, 1) for row in range(len(tasks))]
    return ray.data.from_arrow(blocks).map_batches(read.__call__, batch_format="pyarrow", batch_size=None)


class _Read:
    """A task that reads what its rows name."""

    def __init__(self, rules: Rules) -> None:
        self.rules = rules

    def __call__(self, parts: pa.Table) -> Iterator[pa.Table]:
        yield self.rules.unreadable(0, "", "", 0)  # so that a file without rows has columns
        for file, segment in map(from_row, parts.to_pylist()):
            for chunk in read_file(file, self.rules, segment):
                if chunk.reason is not None:
                    raise DataError("cannot read documents", where=file.uri, found=chunk.reason)
                yield chunk.table


def parts(files: list[FileInfo]) -> pa.Table:
    """What can be read by itself, one row each for `from_row`: a file, or a range of rows of a large Parquet file."""
    rows = [
        {**vars(file), "file": number, "row": row, "rows": rows}
        for number, file in enumerate(files)
        for row, rows in (_ranges(file) if file.uri.endswith(PARQUET) and file.size > _LARGE else [(0, None)])
    ]
    return pa.Table.from_pylist(rows, _PARTS)


def from_row(part: Mapping[str, Any]) -> tuple[FileInfo, Segment | None]:
    """The file of a part, and its segment if it is not the whole."""
    file = FileInfo(uri=part["uri"], size=part["size"], version=part["version"])
    return file, None if part["rows"] is None else Segment(file, part["row"], part["row"], part["rows"])


def _ranges(file: FileInfo) -> list[tuple[int, int | None]]:
    """First row and number of rows of each row group; of a file that cannot be read, the whole."""
    filesystem, path = access.arrow_filesystem(file.uri)
    try:
        footer = pq.read_metadata(path, filesystem=filesystem)
    except (OSError, pa.ArrowException):
        return [(0, None)]
    sizes = np.array([footer.row_group(group).num_rows for group in range(footer.num_row_groups)], np.int64)
    return [*zip((sizes.cumsum() - sizes).tolist(), sizes.tolist(), strict=True)]
