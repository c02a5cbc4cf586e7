"""Which columns input files have, and whether those that the settings name are among them, before anything runs."""

import json
from collections.abc import Iterable, Sequence

import pyarrow as pa
import pyarrow.parquet as pq

from xmc_ray import storage
from xmc_ray.data.arrow_files import arrow_columns
from xmc_ray.data.delimited import DELIMITERS, delimited_columns
from xmc_ray.data.documents import Rules
from xmc_ray.data.inputs import format_of, kind_by_name, open_text
from xmc_ray.data.line_ranges import whole_lines
from xmc_ray.data.rejects import Damaged, Reject
from xmc_ray.data.values import load_object
from xmc_ray.errors import DataError
from xmc_ray.storage.listing import FileInfo

_LINES, _SAMPLED_LINES = 1024, 100  # lines that are read at a time; the first ones of a file, whose keys are all looked at
_LOOK_FILES, _LOOK_BYTES = 1000, 1 << 30  # files, and bytes of lines, that are searched for a column


def check_columns(files: list[FileInfo], rules: Rules) -> None:
    """DataError unless each column that is asked for is in one of the files, with a type that fits.

    A file that has it otherwise is an odd file, and no proof of a wrong setting, so the others are searched as well, up to
    `_LOOK_FILES` files and `_LOOK_BYTES` of JSON lines. If more are left then, labels and series may still come.
    """
    left = dict.fromkeys(rules.columns)
    unreadable: DataError | None = None
    any_rows, is_whole, bytes_left = False, True, _LOOK_BYTES
    for number, file in enumerate(files):
        if number >= _LOOK_FILES or bytes_left < 0 or not is_whole:
            is_whole = False
            break
        try:
            found, is_whole = columns(file, rules.names)
        except (OSError, pa.ArrowException, UnicodeError, Damaged) as error:
            if storage.is_unavailable(error):
                with storage.explained(file.uri):
                    raise
            unreadable = unreadable or DataError("cannot be read", where=file.uri, found=error)
            continue
        any_rows = any_rows or bool(found)
        problems = rules.problems(file.uri, found) if found else left
        left = {column: error or problems[column] for column, error in left.items() if column in problems}
        if not left:
            return
        bytes_left -= file.size if kind_by_name(file.uri) == "json" else 0
    if not is_whole and not any(setting in ("id", "text") for setting, _ in left):
        return
    for problem in (*left.values(), unreadable):
        if problem is not None:
            raise problem
    if not any_rows:
        found_files = f"{len(files)} files without rows"
        raise DataError("no documents", where=rules.root, found=found_files, expected="at least one row")


def columns(file: FileInfo, wanted: Sequence[str]) -> tuple[list[tuple[str, pa.DataType | None]], bool]:
    """The columns of a file and their types, None where each row has its own; none if it has no rows.

    JSON lines are read until all ``wanted`` keys have come; false if they have not within `_LOOK_BYTES`. Raises pyarrow's
    errors and `Damaged` for a file that cannot be read, such as one without any JSON object.
    """
    known = format_of(file.uri)
    if known.kind == "arrow":
        return [*arrow_columns(file.uri)], True
    if known.kind in DELIMITERS:
        return [(name, pa.string()) for name in delimited_columns(file.uri, known.kind)], True
    if known.kind == "parquet":
        filesystem, path = storage.arrow_filesystem(file.uri)
        footer = pq.read_metadata(path, filesystem=filesystem)
        schema = footer.schema.to_arrow_schema()
        return [*zip(schema.names, schema.types, strict=True)] if footer.num_rows else [], True
    spelled = {name: {json.dumps(name, ensure_ascii=ascii).encode() for ascii in (True, False)} for name in wanted}
    found: dict[str, None] = {}
    first_line, start = b"", 0
    with open_text(file.uri, known.compression) as stream:
        for start, chunk in whole_lines(stream, 0, _LINES):
            lines = chunk.split(b"\n")
            first_line = first_line or next(filter(None, map(bytes.strip, lines)), b"")
            if not found:
                found |= _keys(lines[:_SAMPLED_LINES])
            missing = [spelling for name in wanted if name not in found for spelling in spelled[name]]
            if not missing or start > _LOOK_BYTES:
                break
            if any(spelling in chunk for spelling in missing):
                found |= _keys(line for line in lines if any(spelling in line for spelling in missing))
    if first_line and not found:
        begins = f"{first_line[:40].decode(errors='replace')!r}, {load_object(first_line)}"
        raise Damaged("not JSON lines", f"found {begins}; expected an object on each line")
    return [(name, None) for name in found], start <= _LOOK_BYTES or found.keys() >= {*wanted}


def _keys(lines: Iterable[bytes]) -> dict[str, None]:
    """The keys of the objects in lines, in order of appearance."""
    objects = (value for value in map(load_object, lines) if not isinstance(value, Reject))
    return dict.fromkeys(name for value in objects for name in value)
