"""Which files are input, of which format each is, and how text in them is opened.

All readers of files of documents and of benchmarks ask here, so that a file is taken, left out or refused alike everywhere.
"""

import posixpath
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from xmc_ray import storage
from xmc_ray.data.documents import DocumentsConfig
from xmc_ray.errors import DataError, one_line
from xmc_ray.storage.listing import FileInfo

EXPECTED = (
    "one of *.parquet, *.jsonl, *.csv, *.tsv, *.arrow "
    "(also *.pq, *.parq, *.json, *.ndjson; all but Parquet and Arrow also packed as .gz, .bz2, .zst)"
)

Kind = Literal["parquet", "arrow", "json", "csv", "tsv"]

_NAME = re.compile(
    r"\.((parquet|parq|pq|arrow)|(jsonl|json|ndjson|jsonlines|csv|tsv)(\.(?P<packed>gz|bz2|zst))?)$", re.IGNORECASE
)
_KINDS: dict[str, Kind] = {
    **{"parquet": "parquet", "parq": "parquet", "pq": "parquet", "arrow": "arrow"},
    **{"jsonl": "json", "json": "json", "ndjson": "json", "jsonlines": "json", "csv": "csv", "tsv": "tsv"},
}
_AFTER = ("csv", "tsv")  # are read from a folder that has none of the other kinds: tables lie beside documents
_SPLITS, _OF_DATASETS = "dataset_dict.json", ("dataset_info.json", "state.json")  # files of Hugging Face datasets
_PACKED = {None: None, "gz": "gzip", "bz2": "bz2", "zst": "zstd"}  # by ending, as pyarrow names them
_MAGIC = {b"\x1f\x8b": "gzip", b"BZh": "bz2", b"\x28\xb5\x2f\xfd": "zstd"}
_UTF8_MARK = b"\xef\xbb\xbf"
_OTHER_MARKS = {b"\xff\xfe\0\0": "UTF-32", b"\0\0\xfe\xff": "UTF-32", b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16"}
_SHOWN = 10  # kinds of files left out that are named


class Format(NamedTuple):
    """Of a file of documents: its kind, packed as ``compression`` says if at all."""

    kind: Kind
    compression: str | None = None

    @property
    def has_row_numbers(self) -> bool:
        """Whether places in it are numbers of rows, and not bytes."""
        return self.kind in ("parquet", "arrow")


class LeftOut(NamedTuple):
    """Files of one kind that are not read: how many there are, and the address of one."""

    files: int
    example: str


@dataclass(frozen=True)
class Inputs:
    """The ``files`` to read, sorted by address, and those ``left_out`` of the folder, by their endings."""

    files: list[FileInfo]
    left_out: Mapping[str, LeftOut] = field(default_factory=dict)

    def __str__(self) -> str:
        """What is left out, in words for a log; empty if nothing is."""
        return one_line(f"left out: {_described(self.left_out)}") if self.left_out else ""


def list_inputs(config: DocumentsConfig) -> Inputs:
    """The files of documents at ``config.uri``.

    A file's address gives that file, whatever its name. Of a folder, names that begin with ``_`` or ``.`` are passed over, with
    all below; files with other endings are left out, and counted, and so are CSV and TSV beside other documents. DataError if
    no file remains, for a name that is not UTF-8, if there are several kinds, and for several splits of a dataset.
    """
    files = storage.visible_files(config.uri, lambda name: format_by_name(name) is not None)
    for file in files:
        if file.uri.encode(errors="replace").decode() != file.uri:
            raise DataError("a file name is not UTF-8", where=config.uri, found=repr(file.uri), way_out="rename it")
    if [file.uri for file in files] == [config.uri]:
        format_of(config.uri)
        return Inputs(files)
    _refuse_splits(config.uri, files)
    taken: dict[str, list[FileInfo]] = {}
    for file in files:
        format_ = format_by_name(file.uri)
        taken.setdefault("" if format_ is None else format_.kind, []).append(file)
    if "arrow" in taken:
        taken["json"] = [file for file in taken.get("json", []) if posixpath.basename(file.uri) not in _OF_DATASETS]
    others = taken.pop("", [])
    if any(taken.get(kind) for kind in ("parquet", "arrow", "json")):
        others += [file for kind in _AFTER for file in taken.pop(kind, [])]
    taken = {kind: part for kind, part in taken.items() if part}
    left_out: dict[str, LeftOut] = {}
    for file in sorted(others, key=lambda file: file.uri):
        before = left_out.get(_ending(file.uri), LeftOut(0, file.uri))
        left_out[_ending(file.uri)] = before._replace(files=before.files + 1)
    if not taken:
        raise DataError("no input", where=config.uri, found=_described(left_out) or "nothing", expected=EXPECTED)
    if len(taken) > 1:
        found = " and ".join(sorted({f"*{_ending(file.uri)}" for part in taken.values() for file in part}))
        way_out = "keep them in different folders"
        raise DataError("documents of different kinds", where=config.uri, found=found, expected=EXPECTED, way_out=way_out)
    (files,) = taken.values()
    return Inputs(files, left_out)


def format_of(uri: str) -> Format:
    """The format of a file, by its name, or else by its first bytes.

    DataError for a file that is none by either, such as CSV of another name; errors of the file system as they are.
    """
    known = format_by_name(uri)
    if known is not None:
        return known
    filesystem, path = storage.arrow_filesystem(uri)
    with filesystem.open_input_stream(path, compression=None) as stream:
        head = stream.read(4096)
    if head.startswith(b"PAR1"):
        return Format("parquet")
    for magic, compression in _MAGIC.items():
        if head.startswith(magic):
            return Format("json", compression)
    if head.removeprefix(_UTF8_MARK).lstrip().startswith(b"{"):
        return Format("json")
    raise DataError("neither Parquet nor JSON lines", where=uri, found=repr(head[:20]), expected=EXPECTED)


def open_text(uri: str, compression: str | None = None) -> Any:
    """A stream of the bytes of a file, unpacked if its name or ``compression`` says so; seekable if it is not packed."""
    filesystem, path = storage.arrow_filesystem(uri)
    ending = re.search(r"\.(gz|bz2|zst)$", path, re.IGNORECASE)
    packed = compression or _PACKED[ending[1].lower() if ending else None]
    if packed is None:
        return filesystem.open_input_file(path)
    return filesystem.open_input_stream(path, compression=packed)


def mark_length(head: bytes, uri: str | None = None) -> int:
    """Length of the byte order mark that a file of text begins with, which is not part of the text: 3 or 0.

    DataError for marks of encodings other than UTF-8.
    """
    for mark, encoding in _OTHER_MARKS.items():
        if head.startswith(mark):
            way_out = f"convert the file, for instance by iconv -f {encoding} -t UTF-8"
            raise DataError("not UTF-8", where=uri, found=f"a byte order mark of {encoding}", way_out=way_out)
    return len(_UTF8_MARK) if head.startswith(_UTF8_MARK) else 0


def format_by_name(uri: str) -> Format | None:
    """The format that a file's name says, if any."""
    match = _NAME.search(uri)
    if match is None:
        return None
    packed, ending = match["packed"], (match[2] or match[3]).lower()
    return Format(_KINDS[ending], _PACKED[packed and packed.lower()])


def kind_by_name(uri: str) -> Kind:
    """The kind that a name says; "json" for others, which are looked at when they are read."""
    known = format_by_name(uri)
    return "json" if known is None else known.kind


def _refuse_splits(folder: str, files: Sequence[FileInfo]) -> None:
    """DataError for a folder of several splits of a dataset, which would be read as one."""
    if any(file.uri == storage.join(folder, _SPLITS) for file in files):
        splits = sorted({posixpath.dirname(file.uri) for file in files if file.uri.endswith(".arrow")})
        found = ", ".join(posixpath.basename(split) for split in splits)
        way_out = f"give one, such as {splits[0]}" if splits else None
        raise DataError("a folder of several splits", where=folder, found=found or _SPLITS, way_out=way_out)


def _ending(uri: str) -> str:
    """Such as ``.csv``, ``.csv.gz`` or, without one, ``no ending``."""
    stem, ending = posixpath.splitext(posixpath.basename(uri))
    if ending.lower() in (".gz", ".bz2", ".zst", ".xz", ".lz4", ".zip"):
        ending = posixpath.splitext(stem)[1] + ending
    return ending or "no ending"


def _described(left_out: Mapping[str, LeftOut]) -> str:
    most = sorted(left_out.items(), key=lambda item: (-item[1].files, item[0]))
    words = [
        f"{part.files:,} {kind.replace('.', '*.', 1) if kind.startswith('.') else f'({kind})'}, such as {part.example}"
        for kind, part in most[:_SHOWN]
    ]
    rest = sum(part.files for _, part in most[_SHOWN:])
    return "; ".join([*words, *([f"{rest:,} others"] if rest else [])])
