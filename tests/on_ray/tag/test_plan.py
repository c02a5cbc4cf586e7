"""The plan of a night: which rows make a piece, and what is kept for whoever resumes it."""

import tracemalloc
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from xmc_ray.errors import DataError
from xmc_ray.on_ray.tag.plan import Plan, merged, pack, piece_name, reused, unpacked
from xmc_ray.storage.files import FileInfo

BEFORE = [FileInfo(uri=name, size=2, version="v") for name in ("x", "y")]
FILES = [FileInfo(uri=name, size=1, version="") for name in ("a", "b")]
ROWS = [(0, 0, 10, None), (0, 10, 10, None), (1, 0, 5, "cannot be read"), (1, 5, 20, None)]  # file, row, rows, reason
SEGMENTS = pa.Table.from_pylist(
    [{"file": f, "row": row, "rows": rows, "start": row, "reason": why, "detail": why and "!"} for f, row, rows, why in ROWS]
)


def plan() -> Plan:
    kept = np.zeros(45, bool)
    kept[:10] = kept[12] = kept[30] = True
    pieces = pack(SEGMENTS, FILES, np.array([0, 20, 45]), kept, np.array([[13, 44], [2, 21]]), 20)
    return Plan(pieces, reused(BEFORE, np.array([0, 3, 8]), np.array([0, 0, 0, 1, 1, 1, 0, 0], bool)), 45, 7, "/before")


def test_segments_are_packed_into_pieces_without_those_that_are_reused() -> None:
    first, second = plan().pieces.to_pylist()
    assert [(s["uri"], s["row"], s["rows"], s["detail"]) for s in first["segments"]] == [("a", 10, 10, None), ("b", 0, 5, "!")]
    assert [(s["uri"], s["row"], s["rows"]) for s in second["segments"]] == [("b", 5, 20)]
    assert (first["rows"], second["rows"]) == (14, 19)
    assert unpacked(first["skip"], 15).nonzero()[0].tolist() == [2] and unpacked(second["skip"], 20).sum() == 1
    assert first["repeats"] == {"place": [3], "file": [0], "row": [2], "files": ["a"]}
    assert second["repeats"] == {"place": [19], "file": [0], "row": [1], "files": ["b"]}
    [copied] = plan().reused.to_pylist()
    assert copied | {"keep": None} == {"number": 0, "uri": "y", "size": 2, "version": "v", "rows": 3, "keep": None}
    assert unpacked(copied["keep"], 5).tolist() == [True, True, True, False, False]
    assert plan().names == {"t000000", "t000001", "r000000"} and piece_name("t", 17) == "t000017"


def test_neighbouring_segments_are_joined_unless_they_cannot_be_read() -> None:
    segments = [
        {"uri": "a", "row": row, "rows": 5, "reason": why} for row, why in ((0, None), (5, None), (10, "!"), (15, None))
    ]
    assert [(s["row"], s["rows"]) for s in merged(segments)] == [(0, 10), (10, 5), (15, 5)]


def test_a_plan_is_kept_and_one_of_another_version_is_refused(tmp_path: Path) -> None:
    assert Plan.load(str(tmp_path)) is None
    plan().save(str(tmp_path))
    assert Plan.load(str(tmp_path)) == plan()
    older = plan().pieces.drop_columns(["repeats"])
    pq.write_table(older, tmp_path / "pieces-to-do.parquet")
    with pytest.raises(DataError, match=rf"begun by another version: {tmp_path}; give --overwrite"):
        Plan.load(str(tmp_path))


def test_rows_that_repeat_an_id_are_numbers_and_no_objects() -> None:
    """Kind: memory. A catalogue that is listed twice must not cost the driver hundreds of bytes a row."""
    rows = 200_000
    files = [FileInfo(uri=f"s3://bucket/catalogue/{n}.parquet", size=1, version="") for n in range(2)]
    segments = pa.Table.from_pylist(
        [
            {"file": file, "row": row, "rows": 1000, "start": row, "reason": None, "detail": None}
            for file in range(2)
            for row in range(0, rows, 1000)
        ]
    )
    repeats = np.stack([np.arange(rows, 2 * rows), np.arange(rows)])
    tracemalloc.start()
    pieces = pack(segments, files, np.array([0, rows, 2 * rows]), np.zeros(2 * rows, bool), repeats, 10_000)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 40 * rows, "435 bytes each before"
    lists = pieces["repeats"].combine_chunks()
    assert lists.field("place").flatten().to_pylist() == [*range(10_000)] * 20
    assert lists.field("row").flatten().to_pylist() == [*range(rows)]
