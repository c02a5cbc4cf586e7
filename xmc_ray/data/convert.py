"""Conversion of a public benchmark's split, or of other tools' corpora, in one of five layouts, to a Parquet file of documents.

    lines   a file of texts and a file of labels, one line a document
    json    lines of {uid, title, content, target_ind}, the last being rows of a file of labels, lines of {uid, title};
            the Extreme Classification Repository's layout for data sets with texts
    tsv     labels <tab> text, or id <tab> labels <tab> text; LibMultiLabel's layout
    annif   text <tab> <subject> <subject> ...; or a folder of texts (.txt), each with its subjects beside it, in a file .tsv
            (<subject> <tab> name) or .key (a name a line); the corpora of Annif
    texts   a folder of texts (.txt), and a table with their labels

A layout's reader takes files, local or on S3, compressed or not (.gz, .bz2, .zst), some thousand lines at a time, and gives a
table for each: ``id`` (by default the number of the line), the texts, ``labels`` (list<string>, each label once a row). Memory
does not grow with the files. A line that does not fit is a DataError with file and line.
"""

import io
import posixpath
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, reduce
from itertools import chain, islice, zip_longest
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from xmc_ray import storage
from xmc_ray.data.inputs import format_by_name, mark_length, open_text
from xmc_ray.data.labels import list_lengths, unique_in_rows
from xmc_ray.data.rejects import Reject
from xmc_ray.data.skos import FORMATS, read_skos
from xmc_ray.data.strings import trimmed
from xmc_ray.data.text_folders import read_annif_folder, read_texts
from xmc_ray.data.values import load_object
from xmc_ray.errors import ConfigError, DataError
from xmc_ray.settings import PositiveInt, Settings
from xmc_ray.storage.places import check_apart, check_writable

_EXPECTED = {
    **{"uid": "a string or an integer", "target_ind": "a list of integers from 0 on"},
    **dict.fromkeys(("title", "content"), "a string or null"),
}


@dataclass(frozen=True, kw_only=True)
class ConvertConfig(Settings):
    """Convert a split of a public benchmark, or a corpus of Annif's, to Parquet: id, text (json: title, content), labels."""

    layout: Literal["lines", "json", "tsv", "annif", "texts"]
    """lines: texts, labels in a second file; json: uid, title, content, target_ind; tsv: labels, text, maybe an id; annif:
    text, subjects, or a folder of .txt with .tsv or .key; texts: a folder of .txt, labels in a table."""
    documents: storage.Source
    """File of documents (annif, texts: or folder), local or s3://; files of lines may be compressed (.gz, .bz2, .zst)."""
    labels: storage.Source | None = None
    """Layout lines: file with the labels of each document on the same line as the document. Layout texts: CSV, TSV, JSON lines
    or Parquet with the columns file, such as a/b.txt or a/b, and labels."""
    names: storage.Source | None = None
    """File of label names: JSON lines (.json, .jsonl, .ndjson) with uid and title; a vocabulary in SKOS (.ttl, .nt, .rdf, .xml,
    .owl), or <label> tab name (.tsv); or a name a line, starting with label 0."""
    language: str = "en"
    """Language of the names in SKOS."""
    separator: str | None = None
    """Separator of the labels on a line, or in a cell of a table; None is white space. For layouts lines, tsv and texts."""
    output: storage.Address
    """Parquet file to write, local or s3://."""
    names_output: storage.Address | None = None
    """Parquet file to write label names to (label, name), as the training job reads them."""
    rows: PositiveInt = 8192
    """Documents per row group; a whole row group is held in memory."""
    overwrite: bool = False
    """Replace existing files."""

    def check(self) -> None:
        """Raises ConfigError for settings that do not go together, and for outputs that are not named *.parquet."""
        if (self.layout in ("lines", "texts")) != (self.labels is not None):
            found = f"layout {self.layout}, labels {self.labels}"
            raise ConfigError("labels are required with layout lines or texts, and only allowed there", found=found)
        if self.separator is not None and (not self.separator or self.layout in ("json", "annif")):
            expected = "not empty, and layout lines, tsv or texts"
            raise ConfigError("invalid value of separator", found=repr(self.separator), expected=expected)
        if self.names_output is not None and self.names is None:
            raise ConfigError("names_output requires names", found=self.names_output, way_out="set names")
        for output in self.outputs():
            if not output.endswith(".parquet"):
                raise ConfigError("not the name of a Parquet file", found=output, expected="*.parquet")

    def outputs(self) -> list[str]:
        """The files to write."""
        return [output for output in (self.output, self.names_output) if output is not None]


def run(config: ConvertConfig) -> dict[str, int]:
    """Convert; print and return the counts: documents, unlabelled, without_text, labels (distinct), occurrences.

    Documents without labels or without text are kept. Files are written atomically. ConfigError if an output exists, and
    DataError for a file of another layout.
    """
    reads = {"documents": config.documents, "labels": config.labels, "names": config.names}
    check_apart({"output": config.output, "names_output": config.names_output}, reads)
    check_apart({"names_output": config.names_output}, {"output": config.output})
    for output in config.outputs():
        if not config.overwrite and storage.exists(output):
            raise ConfigError("the output exists", where=output, way_out="choose another one or set overwrite")
        check_writable(posixpath.dirname(output))
    names = LabelNames.read(config.names, rows=config.rows, language=config.language) if config.names is not None else None
    counts: Counter[str] = Counter()
    with storage.new_file(config.output) as path:
        _write(path, _counted(_tables(config, names), counts))
        if counts["documents"] == counts["without_text"]:
            raise DataError("no document has a text", where=config.documents, found=f"{counts['documents']:,} documents")
        if config.names_output is not None and names is not None:
            with storage.new_file(config.names_output) as names_path:
                _write(names_path, iter([pa.table({"label": names.labels, "name": names.names})]))
    shown = "{documents:,} documents ({unlabelled:,} unlabelled, {without_text:,} without text)".format_map(counts)
    print(f"{config.output}: {shown}, {counts['labels']:,} labels, {counts['occurrences']:,} times in all")
    if config.names_output is not None and names is not None:
        print(f"{config.names_output}: {len(names.labels):,} labels with names")
    return dict(counts)


def _tables(config: ConvertConfig, names: "LabelNames | None") -> Iterator[pa.Table]:
    if config.layout == "annif":
        return read_annif(config.documents, rows=config.rows, names=names)
    if config.labels is not None and config.layout == "texts":
        texts = read_texts(config.documents, config.labels, rows=config.rows, separator=config.separator or " ")
        return _known(texts, config.documents, names)
    if config.labels is not None:
        return read_lines(config.documents, config.labels, rows=config.rows, separator=config.separator, names=names)
    if config.layout == "tsv":
        return read_tsv(config.documents, rows=config.rows, separator=config.separator, names=names)
    return read_json(config.documents, rows=config.rows, names=names)


def _counted(tables: Iterator[pa.Table], counts: Counter[str]) -> Iterator[pa.Table]:
    """The same tables; fills ``counts`` as a side effect."""
    distinct: set[str] = set()
    for table in tables:
        labels = table["labels"].combine_chunks()
        blank = [pc.equal(pc.utf8_trim_whitespace(column).fill_null(""), "") for column in table.columns[1:-1]]
        distinct.update(labels.values.unique().to_pylist())
        counts["documents"] += len(table)
        counts["unlabelled"] += int((list_lengths(labels) == 0).sum())
        counts["without_text"] += pc.sum(reduce(pc.and_, blank)).as_py() or 0
        counts["labels"] = len(distinct)
        counts["occurrences"] += len(labels.values)
        yield table


def _write(path: Path, tables: Iterator[pa.Table]) -> None:
    """Write one row group a table, or no file if there is no table."""
    first = next(tables, None)
    if first is None:
        return
    with pq.ParquetWriter(path, first.schema, compression="zstd") as writer:
        for table in chain([first], tables):
            writer.write_table(table)


# -- layouts ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class LabelNames:
    """``labels`` and ``names`` (string[L], the latter with nulls) in the order of the file ``uri``."""

    uri: str
    labels: pa.StringArray
    names: pa.StringArray

    def of(self, values: pa.StringArray) -> pa.StringArray:
        """The labels that ``values`` are, or else the one that they name; null for other values and for names of several."""
        names, counts = pc.value_counts(self.names.drop_null()).flatten()
        once = names.filter(pc.equal(counts, 1))
        named = self.labels.take(pc.index_in(pc.if_else(pc.is_in(values, once), values, None), self.names))
        return pc.if_else(pc.is_in(values, self.labels), values, named)

    @cached_property
    def known(self) -> frozenset[str]:
        """All the labels."""
        return frozenset(self.labels.to_pylist())

    @classmethod
    def read(cls, uri: str, *, rows: int, language: str = "en") -> "LabelNames":
        """From JSON lines (.json, .jsonl, .ndjson) of uid and title, from SKOS (`read_skos`), from lines of <label> tab name
        (.tsv), or from lines of names, whose labels are "0", "1", ...

        DataError if two labels have the same uid.
        """
        if uri.endswith(tuple(FORMATS)):
            concepts = read_skos(uri, language=language)
            return cls(uri, *(concepts[name].combine_chunks() for name in ("label", "name")))
        known = format_by_name(uri)
        labels, names = [pa.array([], pa.string())], [pa.array([], pa.string())]
        for chunk in _chunks(uri, rows):
            if known is not None and known.kind == "tsv":
                subjects, texts = _two_columns(chunk, "<label> tab name")
                labels.append(pc.ascii_trim(subjects, characters="<> "))
                names.append(texts)
            elif known is not None and known.kind == "json":
                _, (uids, titles) = _objects(chunk, ["uid", "title"])
                labels.append(_strings(uids))
                names.append(pa.array(titles, pa.string()))
            else:
                labels.append(pc.subtract(chunk.numbers, 1).cast(pa.string()))
                names.append(chunk.lines)
        read = cls(uri, pa.concat_arrays(labels), trimmed(pa.concat_arrays(names)))
        values, counts = pc.value_counts(read.labels).flatten()
        if len(values) < len(read.labels):
            twice = values.filter(pc.greater(counts, 1))[0]
            raise DataError("two labels have the same uid", where=uri, found=twice, way_out="without names, labels are numbers")
        return read


def read_lines(
    documents: str, labels: str, *, rows: int, separator: str | None = None, names: LabelNames | None = None
) -> Iterator[pa.Table]:
    """Tables of ``id``, ``text``, ``labels``; DataError if the files have different numbers of lines.

    Labels are separated by ``separator``, by default white space; if ``names`` are given, each must be one of them.
    """
    for texts, others in zip_longest(_chunks(documents, rows), _chunks(labels, rows)):
        if texts is None or others is None or len(texts.lines) != len(others.lines):
            n_texts, n_labels = (sum(map(len, _raw_chunks(uri, rows))) for uri in (documents, labels))
            found = f"{n_texts:,} lines, and {n_labels:,} in {labels}"
            raise DataError("texts and labels differ in number", where=documents, found=found, expected="a line a document")
        lists = _split_labels(others, others.lines, separator, names)
        yield pa.table({"id": texts.numbers.cast(pa.string()), "text": texts.lines, "labels": lists})


def read_tsv(documents: str, *, rows: int, separator: str | None = None, names: LabelNames | None = None) -> Iterator[pa.Table]:
    """Tables of ``id``, ``text``, ``labels``, with ``separator`` and ``names`` as in `read_lines`."""
    width = 0
    for chunk in _chunks(documents, rows):
        fields = pc.split_pattern(chunk.lines, "\t")
        widths = list_lengths(fields)
        width = width or int(widths[0])
        bad = np.flatnonzero((widths != width) | (widths < 2) | (widths > 3))
        if len(bad):
            expected = "2 (labels, text) or 3 (id, labels, text), the same in every line"
            raise DataError("wrong number of columns", where=chunk.where(int(bad[0])), found=widths[bad[0]], expected=expected)
        *ids, labels, texts = (pc.list_element(fields, number) for number in range(width))
        lists = _split_labels(chunk, labels, separator, names)
        yield pa.table({"id": ids[0] if ids else chunk.numbers.cast(pa.string()), "text": texts, "labels": lists})


def read_annif(documents: str, *, rows: int, names: LabelNames | None = None) -> Iterator[pa.Table]:
    """Tables of ``id``, ``text``, ``labels`` of a file of text, tab, subjects, or of a folder (`read_annif_folder`).

    With ``names``, each label must be one of them; a name of exactly one of them, as .key files have it, is that label.
    """
    if format_by_name(documents) is None and [file.uri for file in storage.visible_files(documents)] != [documents]:
        yield from _known(read_annif_folder(documents, rows=rows), documents, names)
        return
    for chunk in _chunks(documents, rows):
        texts, subjects = _two_columns(chunk, "text tab subjects")
        lists = _split_labels(chunk, pc.replace_substring_regex(subjects, "[<>]", ""), None, names)
        yield pa.table({"id": chunk.numbers.cast(pa.string()), "text": texts, "labels": lists})


def _two_columns(chunk: "_Chunk", expected: str) -> tuple[pa.StringArray, pa.StringArray]:
    fields = pc.split_pattern(chunk.lines, "\t")
    widths = list_lengths(fields)
    bad = np.flatnonzero(widths != 2)
    if len(bad):
        raise DataError("wrong number of columns", where=chunk.where(int(bad[0])), found=widths[bad[0]], expected=expected)
    return pc.list_element(fields, 0), pc.list_element(fields, 1)


def _known(tables: Iterator[pa.Table], where: str, names: LabelNames | None) -> Iterator[pa.Table]:
    """The tables, with labels where they have names in their place; DataError for what is neither."""
    for table in tables:
        lists = table["labels"].combine_chunks()
        if names is not None:
            labels = names.of(lists.values)
            if labels.null_count:
                row = labels.is_null().index(True).as_py()
                raise DataError("a label without a name", where=where, found=lists.values[row], expected=f"one in {names.uri}")
            lists = unique_in_rows(pa.ListArray.from_arrays(lists.offsets, labels))
        yield table.set_column(table.num_columns - 1, "labels", lists)


def read_json(documents: str, *, rows: int, names: LabelNames | None = None) -> Iterator[pa.Table]:
    """Tables of ``id``, ``title``, ``content``, ``labels``; both texts may be null.

    ``target_ind`` has rows of ``names``; without ``names`` the numbers themselves are the labels.
    """
    for chunk in _chunks(documents, rows):
        lines, (uids, titles, contents, targets) = _objects(chunk, ["uid", "title", "content", "target_ind"])
        if not lines:
            continue
        numbers = pa.array(targets, pa.list_(pa.int64()))
        if names is not None and len(over := np.flatnonzero(numbers.values.to_numpy() >= len(names.labels))):
            where = chunk.where(lines[pc.list_parent_indices(numbers)[int(over[0])].as_py()])
            expected = f"less than {len(names.labels):,}, the labels in {names.uri}"
            raise DataError("target_ind is out of range", where=where, found=numbers.values[int(over[0])], expected=expected)
        labels = numbers.values.cast(pa.string()) if names is None else names.labels.take(numbers.values)
        lists = unique_in_rows(pa.ListArray.from_arrays(numbers.offsets, labels))
        columns = {"id": _strings(uids), "title": pa.array(titles, pa.string()), "content": pa.array(contents, pa.string())}
        yield pa.table({**columns, "labels": lists})


class _Chunk(NamedTuple):
    """Consecutive lines of a file, without line breaks; ``first`` is the number of the first, counted from 1."""

    uri: str
    first: int
    lines: pa.StringArray

    def where(self, row: int) -> str:
        return f"{self.uri}:{self.first + row}"

    @property
    def numbers(self) -> pa.Int64Array:
        return pa.array(np.arange(self.first, self.first + len(self.lines)))


def _chunks(uri: str, rows: int) -> Iterator[_Chunk]:
    """``rows`` lines at a time. Only a newline ends a line, since texts hold all kinds of other breaks."""
    first = 1
    for lines in _raw_chunks(uri, rows):
        try:
            texts = pa.array(lines, pa.binary()).cast(pa.string())
        except pa.ArrowInvalid:
            row = next(row for row, line in enumerate(lines) if line.decode(errors="ignore").encode() != line)
            hints = {"found": repr(lines[row][:40]), "way_out": "convert the file, for instance by iconv -f latin1 -t utf8"}
            raise DataError("not UTF-8", where=f"{uri}:{first + row}", **hints) from None
        yield _Chunk(uri, first, pc.ascii_rtrim(texts, characters="\r\n"))
        first += len(lines)


def _raw_chunks(uri: str, rows: int) -> Iterator[list[bytes]]:
    with storage.explained(uri), io.BufferedReader(open_text(uri), 1 << 20) as stream:
        is_first = True
        while lines := list(islice(stream, rows)):
            if is_first:
                lines[0], is_first = lines[0][mark_length(lines[0], uri) :], False
            yield lines


def _split_labels(chunk: _Chunk, lines: pa.StringArray, separator: str | None, names: LabelNames | None) -> pa.ListArray:
    """list<string>: the labels in ``lines``, which are the lines of ``chunk`` or one column of them."""
    split = pc.utf8_split_whitespace(lines) if separator is None else pc.split_pattern(lines, separator)
    labels = unique_in_rows(pa.ListArray.from_arrays(split.offsets, trimmed(split.values)))
    unknown = set(labels.values.unique().to_pylist()) - names.known if names is not None else set()
    if names is not None and unknown:
        first = int(np.flatnonzero(pc.is_in(labels.values, value_set=pa.array(list(unknown))))[0])
        where = chunk.where(pc.list_parent_indices(labels)[first].as_py())
        raise DataError("a label without a name", where=where, found=labels.values[first], expected=f"one in {names.uri}")
    return labels


def _objects(chunk: _Chunk, keys: Sequence[str]) -> tuple[list[int], list[list[Any]]]:
    """The rows of lines that are not blank, and the values of their objects under each of ``keys``.

    A loop, because Arrow's parser cannot say which line is wrong, and crashes on some (apache/arrow#47409).
    """
    rows: list[int] = []
    columns: list[list[Any]] = [[] for _ in keys]
    for row, line in enumerate(chunk.lines.to_pylist()):
        if not line.strip():
            continue
        value = load_object(line.encode())
        if isinstance(value, Reject):
            raise DataError(value.reason, where=chunk.where(row), found=value.detail)
        for key, column in zip(keys, columns, strict=True):
            if not _fits(key, value.get(key)):
                found = repr(value.get(key))[:60]
                raise DataError(f"{key} does not fit", where=chunk.where(row), found=found, expected=_EXPECTED[key])
            column.append(value.get(key))
        rows.append(row)
    return rows, columns


def _fits(key: str, value: Any) -> bool:
    if key == "uid":
        return type(value) in (str, int)
    if key == "target_ind":
        return isinstance(value, list) and all(type(number) is int and 0 <= number < 2**63 for number in value)
    return isinstance(value, str | None)


def _strings(uids: list[Any]) -> pa.StringArray:
    return pa.array([str(uid) for uid in uids], pa.string())
