"""Documents that are numbers: what a scan would find in the files of a catalogue, which nobody has to store.

Tasks of Ray find it by its name, so it is no part of the benchmark's own file.
"""

from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from xmc_ray.data.documents import Rules
from xmc_ray.data.labels import IntArray
from xmc_ray.on_ray.tag import scan
from xmc_ray.storage.listing import FileInfo

FILE_ROWS = 50_000  # of a file of documents
TAG_ROWS = 1_000_000  # of a file of the night before
CHANGED, NEW, REPEATED = 33, 100, 1000  # one in so many


def mixed(numbers: IntArray, salt: int) -> npt.NDArray[np.uint64]:
    """Random bits of each number, always the same (the last step of SplitMix64)."""
    bits: npt.NDArray[np.uint64] = numbers.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(
        salt * 0xBF58476D1CE4E5B9 % 2**64
    )
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1)):
        bits = (bits ^ (bits >> np.uint64(shift))) * np.uint64(factor)
    return bits


def records(part: int, first: int, rows: int, is_now: bool) -> npt.NDArray[Any]:
    """Of the documents ``first``, ``first + 1``, ..., which are the rows of a part; one of today may have changed."""
    number = np.arange(first, first + rows)
    record = np.zeros(rows, scan._RECORD)
    if is_now:
        is_repeat = number % REPEATED == REPEATED - 1
        is_changed = mixed(number, 3) % np.uint64(CHANGED) == 0
    else:
        is_repeat = is_changed = np.zeros(rows, bool)
    for column in range(2):
        record["id"][:, column] = mixed(number - is_repeat, column)
        record["text"][:, column] = mixed(number, 4 + column) ^ is_changed
    record["part"], record["row"] = part, np.arange(rows)
    return record


def made(task: list[dict[str, Any]], rules: Rules, chunk: int, with_texts: bool) -> tuple[pa.Table, npt.NDArray[Any]]:
    """In the place of `scan._scan`: what it would find in files of `FILE_ROWS` good rows."""
    parts = [part["part"] for part in task]
    rows = [
        {"part": part, "start": row, "row": row, "rows": min(chunk, FILE_ROWS - row), "uncounted": False}
        for part in parts
        for row in range(0, FILE_ROWS, chunk)
    ]
    return pa.Table.from_pylist(rows, scan._SEGMENTS), np.concatenate(
        [records(part, part * FILE_ROWS, FILE_ROWS, is_now=True) for part in parts]
    )


def made_tags(number: int, file: FileInfo) -> tuple[int, npt.NDArray[Any]]:
    """In the place of `scan._scan_tags`: the documents of yesterday, in the same order."""
    rows = int(file.version)
    return rows, records(number, number * TAG_ROWS, rows, is_now=False)
