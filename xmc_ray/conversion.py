"""The conversion job: a split of a public benchmark, in one of three `layouts`, to one Parquet file of documents."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import reduce
from itertools import chain
from pathlib import Path
from typing import Literal

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from xmc_ray import storage
from xmc_ray.errors import ConfigError, DataError
from xmc_ray.labels import list_lengths
from xmc_ray.layouts import LabelNames, read_json, read_lines, read_tsv


@dataclass(frozen=True, kw_only=True)
class ConvertConfig:
    """Convert a split of a public benchmark to Parquet: id, text (json: title, content), labels."""

    layout: Literal["lines", "json", "tsv"]
    """lines: texts, and labels in another file; json: uid, title, content, target_ind; tsv: labels and text, maybe an id."""
    documents: str
    """File of documents, local or s3://; it may be compressed (.gz, .bz2), and so may the next two."""
    labels: str | None = None
    """File with the labels of a document in the line of the document; for layout lines alone."""
    names: str | None = None
    """File of label names: JSON lines (.json, .jsonl) of uid and title, or a name a line, the first of which is label 0's."""
    separator: str | None = None
    """What stands between the labels of a line; None is white space. For layouts lines and tsv."""
    output: str
    """Parquet file to write, local or s3://."""
    names_output: str | None = None
    """Parquet file to write label names to (label, name), as the training job reads them."""
    rows: int = 8192
    """Documents in a row group, which are in memory together."""
    overwrite: bool = False
    """Replace files that are there already."""

    def __post_init__(self) -> None:
        if (self.layout == "lines") != (self.labels is not None):
            found = f"layout {self.layout}, labels {self.labels}"
            raise ConfigError("layout lines needs a file of labels, and it alone", found=found)
        if self.separator is not None and (not self.separator or self.layout == "json"):
            raise ConfigError("separator does not fit", found=repr(self.separator), expected="layout lines or tsv, and not ''")
        if self.names_output is not None and self.names is None:
            raise ConfigError("names_output lacks its input", found=self.names_output, way_out="set names")
        for output in self.outputs():
            if not output.endswith(".parquet"):
                raise ConfigError("not the name of a Parquet file", found=output, expected="*.parquet")
        if self.rows < 1:
            raise ConfigError("rows does not fit", found=self.rows, expected="at least 1")

    def outputs(self) -> list[str]:
        """The files to write."""
        return [output for output in (self.output, self.names_output) if output is not None]


def run(config: ConvertConfig) -> dict[str, int]:
    """Convert; print and return the counts: documents, unlabelled, without_text, labels (distinct), occurrences.

    Documents without labels or without text are kept. A file appears when it is complete. Raises ConfigError, with nothing
    written, where one is there already, and DataError for a file that has not the layout.
    """
    for output in config.outputs():
        if not config.overwrite and storage.exists(output):
            raise ConfigError("the output is there already", where=output, way_out="choose another one or set overwrite")
    names = LabelNames.read(config.names, rows=config.rows) if config.names is not None else None
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


def _tables(config: ConvertConfig, names: LabelNames | None) -> Iterator[pa.Table]:
    if config.labels is not None:
        return read_lines(config.documents, config.labels, rows=config.rows, separator=config.separator, names=names)
    if config.layout == "tsv":
        return read_tsv(config.documents, rows=config.rows, separator=config.separator, names=names)
    return read_json(config.documents, rows=config.rows, names=names)


def _counted(tables: Iterator[pa.Table], counts: Counter[str]) -> Iterator[pa.Table]:
    """The tables as they are; ``counts`` is filled on the way."""
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
    """A row group a table; no file where there is no table."""
    first = next(tables, None)
    if first is None:
        return
    with pq.ParquetWriter(path, first.schema, compression="zstd") as writer:
        for table in chain([first], tables):
            writer.write_table(table)
