"""Documents in: the columns of the files, and what becomes of rows that do not fit.

A row is never dropped. One that cannot be used travels on with a ``reason``, past the model and into the rejects, so that
in the end rows in = rows tagged + rows rejected. Files that cannot be used at all are a `DataError` before anything runs.
"""

import hashlib
import json
import posixpath
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import reduce
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.json
import pyarrow.parquet as pq
import ray.data
from pyarrow.fs import FileSystem
from ray.data.block import Block
from ray.data.datasource import FileBasedDatasource

from xmc_ray import storage
from xmc_ray.errors import ConfigError, DataError
from xmc_ray.labels import unique_in_rows
from xmc_ray.storage import FileInfo

_PARQUET, _JSON_LINES = (".parquet",), (".jsonl", ".jsonl.gz", ".json")
_JSON_BYTES = 4 << 20  # parsed at a time; one bad line takes the whole piece from the fast parser to the slow one
_JSON_SAMPLE = 100  # lines whose keys are taken for the columns of a file

_NULL, _STRINGS = pa.scalar(None, pa.string()), pa.list_(pa.string())
_TYPES = {"id": pa.string(), "text": pa.string(), "labels": _STRINGS}
_EXPECTED = {"id": "a string or an integer", "text": "a string", "labels": "a list of strings"}

_Columns = Sequence[tuple[str, str]]  # (setting of DocumentsConfig, column that it names)


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

    def columns(self, *, labelled: bool) -> _Columns:
        """(setting, column that it names) of each column to read: the id, the texts and, if ``labelled``, the labels."""
        labels = [("labels", self.labels)] if labelled else []
        return [("id", self.id), *(("text", name) for name in self.text), *labels]


def list_inputs(config: DocumentsConfig) -> list[FileInfo]:
    """The files that `read_documents` reads, by address; DataError if there are none or if they are of two kinds."""
    files = storage.list_files(config.uri, (*_PARQUET, *_JSON_LINES))
    for file in files:
        if "?" in file.uri:  # Ray takes the rest for a query, and passes over such a file in silence
            raise DataError("a file with a question mark in its name", where=file.uri, way_out="rename it")
    if any(all(file.uri.endswith(suffixes) for file in files) for suffixes in (_PARQUET, _JSON_LINES)):
        return files
    found = " and ".join(sorted({f"*{posixpath.splitext(file.uri)[1]}" for file in files}))
    expected = f"either *{_PARQUET[0]} or *{', *'.join(_JSON_LINES)}"
    raise DataError("documents of unknown or different kinds", where=config.uri, found=found, expected=expected)


def read_documents(config: DocumentsConfig, *, labelled: bool) -> ray.data.Dataset:
    """A stream of ``id``, ``text``, ``labels`` (list<string>, only if ``labelled``), ``file``, ``reason``; else strings.

    ``reason`` is null in a good row and otherwise says why the row cannot be used. Integers become strings as ids, a null
    list of labels becomes an empty one, and a label is there once a row. Raises DataError for columns that are missing or
    of a wrong type, judging by the first file that has rows, and if none has any.
    """
    files = list_inputs(config)
    _check_columns(files, config, labelled)
    filesystem, path = storage.arrow_filesystem(files[0].uri)
    scheme = files[0].uri.removesuffix(path)
    paths = [file.uri.removeprefix(scheme) for file in files]
    rules = _Rules(config.columns(labelled=labelled), config.separator, scheme)
    if not path.endswith(_PARQUET):
        documents: ray.data.Dataset = ray.data.read_datasource(_JsonLines(paths, filesystem, rules))
        return documents
    names = [*dict.fromkeys(name for _, name in rules.columns), "path"]
    try:
        rows = ray.data.read_parquet(paths, filesystem=filesystem, include_paths=True, partitioning=None).select_columns(names)
    except (ValueError, TypeError) as error:
        raise DataError("Ray cannot read these columns of these files", where=config.uri, found=error) from None
    return rows.map_batches(rules.from_parquet, batch_format="pyarrow", batch_size=None)


def text_digest(texts: pa.Array) -> pa.Array:
    """string[n]: BLAKE2b of each text's UTF-8, 16 bytes as 32 hex digits; null stays null.

    A loop, because Arrow has no such kernel: 700,000 texts of 300 letters a second, most of it spent on hashing.
    """
    raw = texts.cast(pa.binary()).to_pylist()
    return pa.array([None if text is None else hashlib.blake2b(text, digest_size=16).hexdigest() for text in raw], pa.string())


def _check_columns(files: list[FileInfo], config: DocumentsConfig, labelled: bool) -> None:
    """DataError unless the first file with rows has the columns that are asked for."""
    for file in files:
        found = _parquet_columns(file.uri) if file.uri.endswith(_PARQUET) else _json_columns(file.uri)
        if found is None:
            continue
        for setting, name in config.columns(labelled=labelled):
            hints = {"expected": _EXPECTED[setting], "way_out": f"set documents.{setting} to the right column"}
            if name not in found:
                raise DataError(f"no column {name!r}", where=file.uri, found=", ".join(found), **hints)
            if found[name] is not None and not _fits(setting, found[name]):
                raise DataError(f"column {name!r} has a wrong type", where=file.uri, found=found[name], **hints)
        return
    raise DataError("no documents", where=config.uri, found=f"{len(files)} files without rows", expected="at least one row")


def _parquet_columns(uri: str) -> dict[str, pa.DataType] | None:
    """Columns and types from the footer; None if the file has no rows."""
    filesystem, path = storage.arrow_filesystem(uri)
    try:
        with storage.explained(uri):
            footer = pq.read_metadata(path, filesystem=filesystem)
    except pa.ArrowInvalid as error:
        raise DataError("not a Parquet file", where=uri, found=error) from None
    schema = footer.schema.to_arrow_schema()
    return dict(zip(schema.names, schema.types, strict=True)) if footer.num_rows else None


def _json_columns(uri: str) -> dict[str, None] | None:
    """Keys of the first objects, without types since each line has its own; None if the file has no lines."""
    filesystem, path = storage.arrow_filesystem(uri)
    with storage.explained(uri), filesystem.open_input_stream(path) as stream:
        lines = next(_whole_lines(stream), b"").split(b"\n")[:_JSON_SAMPLE]
    objects = [value for value in map(_load, lines) if isinstance(value, dict)]
    if lines != [b""] and not objects:
        start = lines[0][:40].decode(errors="replace")
        raise DataError("not JSON lines", where=uri, found=repr(start), expected="an object on each line")
    return dict.fromkeys(name for value in objects for name in value) if objects else None


def _fits(setting: str, kind: pa.DataType) -> bool:
    """Whether columns of type ``kind`` can be read as what the setting names, null columns included."""
    if setting == "labels":
        is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
        return is_list and _fits("text", kind.value_type)
    if pa.types.is_dictionary(kind):
        return _fits(setting, kind.value_type)
    checks = [pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view, pa.types.is_null]
    return any(check(kind) for check in checks) or (setting == "id" and pa.types.is_integer(kind))


@dataclass(frozen=True)
class _Rules:
    """How what a file holds becomes the columns of the stream."""

    columns: _Columns
    separator: str
    scheme: str  # what an address has before the path

    def from_parquet(self, table: pa.Table) -> pa.Table:
        values = [table[name].cast(_TYPES[setting]).combine_chunks() for setting, name in self.columns]
        files = pc.binary_join_element_wise(self.scheme, table["path"].combine_chunks(), "")
        return self._documents(values, pa.nulls(len(table), pa.string()), files)

    def from_json(self, lines: bytes, path: str) -> pa.Table:
        *values, reasons = _parse_at_once(lines, self.columns) or _parse_one_by_one(lines, self.columns)
        return self._documents(values, reasons, pa.repeat(self.scheme + path, len(reasons)))

    def _documents(self, values: Sequence[pa.Array], reasons: pa.Array, files: pa.Array) -> pa.Table:
        """From the values of ``columns``, in the types of `_TYPES`, and the reasons known before."""
        labels = {"labels": unique_in_rows(values[-1])} if self.columns[-1][0] == "labels" else {}
        strings = values[: len(values) - len(labels)]
        (ids, *parts), (id_is_utf8, *part_is_utf8) = zip(*map(_keep_utf8, strings), strict=True)
        text, text_reasons = _join(parts, self.separator)
        reasons = pc.coalesce(
            reasons,
            _unless(id_is_utf8, "id is not UTF-8"),
            _unless(pc.is_valid(ids), "id is null"),
            _unless(pc.not_equal(ids, ""), "id is empty"),
            _unless(reduce(pc.and_, part_is_utf8), "text is not UTF-8"),
            text_reasons,
        )
        return pa.table({"id": ids, "text": text, **labels, "file": files, "reason": reasons})


class _JsonLines(FileBasedDatasource):
    """Files of JSON lines, each read by one task, some megabytes at a time."""

    def __init__(self, paths: list[str], filesystem: FileSystem, rules: _Rules) -> None:
        super().__init__(paths, filesystem=filesystem)
        self._rules = rules

    def _read_stream(self, f: Any, path: str) -> Iterator[Block]:
        with storage.explained(self._rules.scheme + path):
            for lines in _whole_lines(f):
                yield self._rules.from_json(lines, path)


def _whole_lines(stream: Any) -> Iterator[bytes]:
    """The lines of ``stream``, many at a time, without the newline at the end; never only blank ones."""
    rest = b""
    while data := stream.read(_JSON_BYTES):
        lines, _, rest = (rest + data).rpartition(b"\n")
        if lines := lines.strip():
            yield lines
    if rest := rest.strip():
        yield rest


def _parse_at_once(lines: bytes, columns: _Columns) -> list[pa.Array] | None:
    """The columns and no reasons, if every line is an object with values of the right types."""
    n_lines = lines.count(b"\n") + 1
    # Arrow takes a line "null" for a row, or crashes on it (apache/arrow#47409); it must see none that is not an object.
    if not lines.startswith(b"{") or lines.count(b"\n{") + 1 != n_lines:
        return None
    reading = pyarrow.json.ReadOptions(use_threads=False, block_size=len(lines) + 1)
    for id_type in (pa.string(), pa.int64()):
        schema = pa.schema({name: id_type if setting == "id" else _TYPES[setting] for setting, name in columns})
        parsing = pyarrow.json.ParseOptions(explicit_schema=schema, unexpected_field_behavior="ignore")
        try:
            table = pyarrow.json.read_json(pa.BufferReader(lines), reading, parsing)
            table.validate(full=True)
        except pa.ArrowInvalid:
            continue
        if len(table) == n_lines:
            values = [table[name].cast(_TYPES[setting]).combine_chunks() for setting, name in columns]
            return [*values, pa.nulls(n_lines, pa.string())]
    return None


def _parse_one_by_one(lines: bytes, columns: _Columns) -> list[pa.Array]:
    """The columns and the reasons; the slow twin of `_parse_at_once` for lines of any kind."""
    rows = [_parse_line(line, columns) for line in lines.split(b"\n") if line.strip()]
    types = [*(_TYPES[setting] for setting, _ in columns), pa.string()]
    return [pa.array(values, kind) for values, kind in zip(zip(*rows, strict=True), types, strict=True)]


def _parse_line(line: bytes, columns: _Columns) -> tuple[Any, ...]:
    """The values of ``columns``, null where they do not fit, and the reason of the first that does not."""
    loaded = _load(line)
    if isinstance(loaded, str):
        return *[None] * len(columns), loaded
    pairs = [_check_value(setting, loaded.get(name)) for setting, name in columns]
    return *(value for value, _ in pairs), next((reason for _, reason in pairs if reason), None)


def _load(line: bytes) -> dict[str, Any] | str:
    """The object in a line, or the reason why there is none."""
    try:
        value = json.loads(line)
        if b"\\u" in line:
            json.dumps(value, ensure_ascii=False).encode()  # fails on half a surrogate pair, which JSON lets pass
    except (ValueError, RecursionError) as error:
        return f"invalid JSON: {getattr(error, 'msg', type(error).__name__)}"
    return value if isinstance(value, dict) else f"not a JSON object ({type(value).__name__})"


def _check_value(setting: str, value: Any) -> tuple[Any, str | None]:
    """``value`` as Arrow takes it, or null and the reason."""
    if setting == "id" and type(value) is int:
        value = str(value)
    if setting == "labels":
        fits = isinstance(value, list | None) and all(isinstance(label, str | None) for label in value or [])
    else:
        fits = isinstance(value, str | None)
    return (value, None) if fits else (None, f"{setting} is not {_EXPECTED[setting]} ({type(value).__name__})")


def _join(parts: Sequence[pa.Array], separator: str) -> tuple[pa.Array, pa.Array]:
    """The joined text, null where there is none, and the reason for that."""
    filled = [pc.if_else(pc.or_(pc.utf8_is_space(part), pc.equal(part, "")), _NULL, part) for part in parts]
    # Not by null_handling="skip", which leaves out rows whose parts are all null.
    text = reduce(lambda left, right: pc.coalesce(pc.binary_join_element_wise(left, right, separator), left, right), filled)
    is_null = reduce(pc.and_, map(pc.is_null, parts))
    return text, pc.coalesce(_unless(pc.invert(is_null), "text is null"), _unless(pc.is_valid(text), "text is empty"))


def _unless(condition: pa.Array, reason: str) -> pa.Array:
    return pc.if_else(condition, _NULL, reason)


def _keep_utf8(texts: pa.Array) -> tuple[pa.Array, pa.Array]:
    """``texts``, null where they are not UTF-8, and bool[n], false there.

    Parquet files may hold such bytes, of which nothing complains until something decodes them.
    """
    try:
        texts.validate(full=True)
        return texts, pa.repeat(True, len(texts))
    except pa.ArrowInvalid:
        raw = texts.cast(pa.binary()).to_pylist()
        good = [text is None or text.decode(errors="ignore").encode() == text for text in raw]
        kept = [text if is_good else None for text, is_good in zip(raw, good, strict=True)]
        return pa.array(kept, pa.binary()).cast(pa.string()), pa.array(good)
