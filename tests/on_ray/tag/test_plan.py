"""The plan of a night: which rows make a piece, and what is kept for whoever resumes it."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from xmc_ray.on_ray.tag.plan import PIECES, REUSED, Plan, merged, pack, piece_name, reused, unpacked
from xmc_ray.storage.files import FileInfo

FILES = [FileInfo(uri=name, size=1, version="") for name in ("a", "b")]
ROWS = [(0, 0, 10, None), (0, 10, 10, None), (1, 0, 5, "cannot be read"), (1, 5, 20, None)]  # file, row, rows, reason
SEGMENTS = pa.Table.from_pylist(
    [{"file": f, "row": row, "rows": rows, "start": row, "reason": why, "detail": why and "!"} for f, row, rows, why in ROWS]
)


def plan() -> Plan:
    kept = np.zeros(45, bool)
    kept[:10] = kept[12] = kept[30] = True
    pieces = pack(SEGMENTS, FILES, np.array([0, 20, 45]), kept, np.array([[13, 44], [2, 21]]), 20)
    return Plan(pieces, reused(["x", "y"], np.array([0, 3, 8]), np.array([0, 0, 0, 1, 1, 1, 0, 0], bool)), 45, 7, "/before")


def test_segments_are_packed_into_pieces_without_those_that_are_reused() -> None:
    first, second = plan().pieces.to_pylist()
    assert [(s["uri"], s["row"], s["rows"], s["detail"]) for s in first["segments"]] == [("a", 10, 10, None), ("b", 0, 5, "!")]
    assert [(s["uri"], s["row"], s["rows"]) for s in second["segments"]] == [("b", 5, 20)]
    assert (first["rows"], second["rows"]) == (14, 19)
    assert unpacked(first["skip"], 15).nonzero()[0].tolist() == [2] and unpacked(second["skip"], 20).sum() == 1
    assert first["duplicates"] == [{"place": 3, "file": "a", "row": 2}]
    assert second["duplicates"] == [{"place": 19, "file": "b", "row": 1}]
    [copied] = plan().reused.to_pylist()
    assert (copied["number"], copied["uri"], copied["rows"]) == (0, "y", 3)
    assert unpacked(copied["keep"], 5).tolist() == [True, True, True, False, False]
    assert plan().names == {"t000000", "t000001", "r000000"} and piece_name("t", 17) == "t000017"


def test_neighbouring_segments_are_joined_unless_they_cannot_be_read() -> None:
    segments = [
        {"uri": "a", "row": row, "rows": 5, "reason": why} for row, why in ((0, None), (5, None), (10, "!"), (15, None))
    ]
    assert [(s["row"], s["rows"]) for s in merged(segments)] == [(0, 10), (10, 5), (15, 5)]


def test_a_plan_is_kept_and_one_of_an_older_version_is_read(tmp_path: Path) -> None:
    """Its segments have no ``detail``."""
    assert Plan.load(str(tmp_path)) is None
    plan().save(str(tmp_path))
    kept = Plan.load(str(tmp_path))
    assert kept == plan() and kept.pieces.schema == PIECES and kept.reused.schema == REUSED
    rows = plan().pieces.to_pylist()
    for segment in (segment for row in rows for segment in row["segments"]):
        segment.pop("detail")
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "pieces-to-do.parquet")
    older = Plan.load(str(tmp_path))
    assert older is not None and older.pieces.schema == PIECES
    assert [s["reason"] for s in older.pieces.to_pylist()[0]["segments"]] == [None, "cannot be read"]
