"""What jobs read: which files there are, what is wrong with their columns, and their rows, without Ray."""

import posixpath
from collections.abc import Iterator

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from xmc_ray import access, storage
from xmc_ray.documents import DocumentsConfig, Rules
from xmc_ray.errors import DataError
from xmc_ray.reading import JSON_LINES, PARQUET, columns, read_file
from xmc_ray.storage import FileInfo

_LOOKS = 10  # files whose columns are looked at before anything runs


def list_inputs(config: DocumentsConfig) -> list[FileInfo]:
    """The files to read, by address; DataError if there are none or if they are of two kinds."""
    files = storage.list_files(config.uri, (*PARQUET, *JSON_LINES))
    if any(all(file.uri.endswith(suffixes) for file in files) for suffixes in (PARQUET, JSON_LINES)):
        return files
    found = " and ".join(sorted({f"*{posixpath.splitext(file.uri)[1]}" for file in files}))
    expected = f"either *{PARQUET[0]} or *{', *'.join(JSON_LINES)}"
    raise DataError("documents of unknown or different kinds", where=config.uri, found=found, expected=expected)


def check_columns(files: list[FileInfo], config: DocumentsConfig, *, labelled: bool, series: str | None = None) -> None:
    """Raises DataError unless one of the first files that have rows has the columns that are asked for.

    So a wrong setting is told before anything runs, while one odd file among many is not taken for it.
    """
    rules, first = Rules.of(config, labelled=labelled, series=series), None
    for looked, file in enumerate(files):
        if looked >= _LOOKS and first is not None:
            break
        try:
            found = columns(file)
            problem = rules.problem(found) if found else None
        except (OSError, pa.ArrowException) as error:
            found, problem = {}, DataError("cannot be read", found=error)
        if found and problem is None:
            return
        if problem is not None and first is None:
            first = DataError(
                problem.what, where=file.uri, found=problem.found, expected=problem.expected, way_out=problem.way_out
            )
    raise first or DataError(
        "no documents", where=config.uri, found=f"{len(files)} files without rows", expected="at least one row"
    )


def read_names(uri: str) -> pa.Table:
    """Columns ``label``, ``name`` of a Parquet file."""
    filesystem, path = access.arrow_filesystem(uri)
    try:
        return pq.read_table(path, filesystem=filesystem)
    except (OSError, pa.ArrowInvalid) as error:
        raise DataError("cannot read label names", where=uri, found=error, expected="a Parquet file: label, name") from error


def read_rows(config: DocumentsConfig, *, labelled: bool) -> Iterator[pa.Table]:
    """Chunks of the rows that can be used, as `documents.Rules` makes them, in this process; those with a reason are left out.

    Raises DataError where `list_inputs` or `check_columns` do, and for a file that cannot be read.
    """
    files, rules = list_inputs(config), Rules.of(config, labelled=labelled)
    check_columns(files, config, labelled=labelled)
    for file in files:
        for chunk in read_file(file, rules):
            if chunk.reason is not None:
                raise DataError("cannot read documents", where=file.uri, found=chunk.reason)
            yield chunk.table.filter(pc.is_null(chunk.table["reason"]))
