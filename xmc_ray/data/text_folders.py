"""Folders of text files, a document each, with their labels beside each one, as Annif keeps them, or in a table."""

import posixpath
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import pyarrow as pa

from xmc_ray import storage
from xmc_ray.data.documents import DocumentsConfig
from xmc_ray.data.inputs import mark_length
from xmc_ray.data.labels import tidy
from xmc_ray.data.reader import read_rows
from xmc_ray.errors import DataError

_READERS = 16  # files that are read at a time
_SCHEMA = pa.schema([("id", pa.string()), ("text", pa.string()), ("labels", pa.list_(pa.string()))])


def read_annif_folder(folder: str, *, rows: int) -> Iterator[pa.Table]:
    """Tables of ``id`` (the name below ``folder``, without .txt), ``text``, ``labels`` of all texts there.

    Labels are the subjects in a .tsv of the same name, without their angle brackets, or the names in a .key; none without
    either. DataError if there is no text, and for a file that is not UTF-8.
    """
    names = {file.uri for file in storage.visible_files(folder)}

    def labels_of(stem: str) -> list[str]:
        if f"{stem}.tsv" in names:
            return [line.partition("\t")[0].strip().strip("<>") for line in _read(f"{stem}.tsv").split("\n")]
        return _read(f"{stem}.key").split("\n") if f"{stem}.key" in names else []

    for stems in _stems(folder, names, rows):
        with ThreadPoolExecutor(_READERS) as pool:
            yield _table(folder, stems, [*pool.map(labels_of, stems)])


def read_texts(folder: str, table: str, *, rows: int, separator: str) -> Iterator[pa.Table]:
    """Tables as of `read_annif_folder`, with the labels that ``table`` has: its columns ``file`` and ``labels``.

    A file is named below ``folder``, with .txt or without; several rows of one add up. DataError for a row of a file that is
    not there.
    """
    names = {file.uri for file in storage.visible_files(folder)}
    config = DocumentsConfig(uri=table, id="file", text=["file"], label_separator=separator)
    labels: dict[str, list[str]] = {}
    for part in read_rows(config, labelled=True, max_reject_share=0):
        for file, more in zip(part["id"].to_pylist(), part["labels"].to_pylist(), strict=True):
            stem = storage.join(folder, file.removesuffix(".txt"))
            if f"{stem}.txt" not in names:
                raise DataError("a file of the table is not there", where=table, found=file, expected=f"a name below {folder}")
            labels.setdefault(stem, []).extend(more)
    for stems in _stems(folder, names, rows):
        yield _table(folder, stems, [labels.get(stem, []) for stem in stems])


def _stems(folder: str, names: set[str], rows: int) -> Iterator[list[str]]:
    stems = sorted(name.removesuffix(".txt") for name in names if name.endswith(".txt"))
    if not stems:
        raise DataError("no texts", where=folder, found=f"{len(names):,} other files", expected="*.txt")
    for first in range(0, len(stems), rows):
        yield stems[first : first + rows]


def _table(folder: str, stems: Sequence[str], labels: Sequence[Sequence[str]]) -> pa.Table:
    with ThreadPoolExecutor(_READERS) as pool:
        texts = [*pool.map(lambda stem: _read(f"{stem}.txt"), stems)]
    ids = [posixpath.relpath(stem, folder) for stem in stems]
    columns: Mapping[str, Sequence[object]] = {"id": ids, "text": texts, "labels": labels}
    table = pa.table({name: pa.array(values, _SCHEMA.field(name).type) for name, values in columns.items()})
    return table.set_column(2, "labels", tidy(table["labels"].combine_chunks()))


def _read(uri: str) -> str:
    data = storage.patiently(storage.read_bytes, uri)
    try:
        return str(data[mark_length(data, uri) :].decode())
    except UnicodeDecodeError as error:
        way_out = "convert the file, for instance by iconv -f latin1 -t utf8"
        raise DataError("not UTF-8", where=uri, found=f"byte {error.start}", way_out=way_out) from None
