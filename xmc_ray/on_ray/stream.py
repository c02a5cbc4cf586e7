"""Streams of documents on Ray Data: read from the files of a catalogue or a training set, and tokenised.

A row that cannot be used has a ``reason``. A file that cannot be read is one such row, with the file's size as ``lost_bytes``;
whoever reads decides how much of that is too much (`rejects`).
"""

from collections.abc import Iterator, Sequence
from functools import partial, reduce

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray.data

from xmc_ray.data.documents import DocumentsConfig, Rules
from xmc_ray.data.input_columns import check_columns
from xmc_ray.data.inputs import list_inputs
from xmc_ray.data.line_ranges import LARGE
from xmc_ray.data.reader import Segment, file_parts, read_file
from xmc_ray.data.split import draws
from xmc_ray.model.tokenizer import Tokenizer
from xmc_ray.storage.listing import FileInfo

_PARTS, _SMALLEST = 64, 512 << 10  # of the Parquet files of an input, about; and bytes of one at least


def read_documents(
    config: DocumentsConfig, *, labelled: bool, series: str | None = None, files: list[FileInfo] | None = None
) -> ray.data.Dataset:
    """The rows of all files as `documents.Rules` gives them, with ``lost_bytes``; ``series`` names the column of the series.

    ``row``, and an id that is made of it, count from the beginning of a byte range where a file is read in several.
    ``files``: what `list_inputs` has returned before, so that no file is read that has arrived since. Raises DataError if
    columns are missing or of a wrong type in the first files that have rows, and if no file has any.
    """
    files = list_inputs(config).files if files is None else files
    rules = Rules.of(config, labelled=labelled, series=series)
    check_columns(files, rules)
    tasks = file_parts(files, _part_size(files))
    blocks = [tasks.slice(row, 1) for row in range(len(tasks))]
    return ray.data.from_arrow(blocks).map_batches(partial(_read, rules=rules), batch_format="pyarrow", batch_size=None)


def _part_size(files: Sequence[FileInfo]) -> int:
    """Bytes of Parquet that one task reads: a single file of some megabytes keeps all cores of a machine busy, too."""
    return min(LARGE, max(_SMALLEST, sum(file.size for file in files) // _PARTS))


def _read(rows: pa.Table, rules: Rules) -> Iterator[pa.Table]:
    """A task that reads the segments that its rows describe."""
    yield rules.empty().append_column("lost_bytes", pa.array([], pa.int64()))  # so that a file without rows has columns
    for segment in map(Segment.from_row, rows.to_pylist()):
        for chunk in read_file(segment, rules):
            lost = np.zeros(len(chunk.table), np.int64)
            lost[:1] = segment.lost_with(chunk)
            yield chunk.table.append_column("lost_bytes", pa.array(lost))


def tokenise(documents: ray.data.Dataset, *tokenizers: Tokenizer, drawn: bool = False) -> ray.data.Dataset:
    """Replaces ``text`` by ``tokens`` (list<int32>, empty for rejects) and ``truncated`` (int8), in CPU tasks.

    Each tokenizer has its own `token_columns`; ``truncated`` says whether any of them cuts a text off. ``drawn``: also adds
    ``draw`` (uint64, `split.draws` by ``series`` or else by ``text``). ``series`` is dropped, too; other columns stay.
    """
    task = partial(tokenise_table, tokenizers=tokenizers, drawn=drawn)
    return documents.map_batches(task, batch_format="pyarrow", batch_size=2048)


def token_columns(n_tokenizers: int) -> list[str]:
    """The column of each tokenizer's tokens: ``tokens``, ``tokens_1``, and so on."""
    return ["tokens", *(f"tokens_{number}" for number in range(1, n_tokenizers))]


def tokenise_table(table: pa.Table, tokenizers: Sequence[Tokenizer], drawn: bool = False) -> pa.Table:
    """A batch of `tokenise`."""
    good = pc.is_null(table["reason"]).combine_chunks()
    texts = pc.if_else(good, table["text"].combine_chunks().fill_null(""), "")
    encoded = [tokenizer.encode(texts) for tokenizer in tokenizers]
    for name, (tokens, _) in zip(token_columns(len(tokenizers)), encoded, strict=True):
        table = table.append_column(name, pc.if_else(good, tokens, pa.scalar([], tokens.type)))
    truncated = reduce(pc.or_, (cut_off for _, cut_off in encoded))
    table = table.append_column("truncated", pc.and_(good, truncated).cast(pa.int8()))
    has_series = "series" in table.column_names
    if drawn:
        series = table["series"].combine_chunks() if has_series else pa.nulls(len(table), pa.string())
        table = table.append_column("draw", pa.array(draws(texts, series)))
    return table.drop_columns(["text", *(["series"] * has_series)])
