"""The plan of a night: which rows make a piece, and what is kept for whoever resumes it."""

import tracemalloc
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xmc_ray.errors import DataError
from xmc_ray.on_ray.tag.plan import Plan, merged, pack, piece_name, reused, unpacked
from xmc_ray.storage.listing import FileInfo

BEFORE = [FileInfo(uri=name, size=2, version="v") for name in ("x", "y")]
FILES = [FileInfo(uri=name, size=1, version="") for name in ("a", "b")]
ROWS = [(0, 0, 10, None), (0, 10, 10, None), (1, 0, 5, "cannot be read"), (1, 5, 20, None)]  # file, row, rows, reason
SEGMENTS = pa.Table.from_pylist(
    [
        {"part": f, "file": f, "row": row, "rows": rows, "start": row, "reason": why, "detail": why and "!"}
        for f, row, rows, why in ROWS
    ]
)


def plan() -> Plan:
    kept = np.zeros(45, bool)
    kept[:10] = kept[12] = kept[30] = True
    pieces = pack(SEGMENTS, FILES, np.array([0, 20, 45]), kept, np.array([[13, 44], [2, 21]]), 20, 1)
    return Plan(pieces, reused(BEFORE, np.array([0, 3, 8]), np.array([0, 0, 0, 1, 1, 1, 0, 0], bool)), 45, 7, 40, "/before")


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


def packed(parts: list[int], piece_rows: int, n_pieces: int, chunk: int, kept: np.ndarray | None = None) -> pa.Table:
    """The pieces of a file whose parts have so many rows."""
    first = np.cumsum([0, *parts])
    segments = [
        {"part": part, "file": 0, "row": row, "rows": min(chunk, stop - row), "start": row, "reason": None, "detail": None}
        for part, (start, stop) in enumerate(pairwise(first.tolist()))
        for row in range(start, stop, chunk)
    ]
    kept = np.zeros(first[-1], bool) if kept is None else kept
    base_F, repeats = np.array([0, first[-1]]), np.empty((2, 0), np.int64)
    return pack(pa.Table.from_pylist(segments), FILES[:1], base_F, kept, repeats, piece_rows, n_pieces)


def tasks_of_parts(pieces: pa.Table, parts: list[int]) -> list[set[int]]:
    """The tasks that read rows of each part."""
    tasks: list[set[int]] = [set() for _ in parts]
    ends = np.cumsum(parts)
    for piece in pieces.to_pylist():
        for segment in piece["segments"]:
            touched = np.searchsorted(ends, [segment["row"], segment["row"] + segment["rows"] - 1], side="right")
            for part in range(touched[0], touched[1] + 1):
                tasks[part].add(piece["task"])
    return tasks


def test_a_row_group_of_a_million_rows_is_read_by_one_task() -> None:
    """Kind: cost. By 12 or 13 before, each of which reads all of it."""
    parts = [1_000_000] * 5
    pieces = packed(parts, 10_000, 4, 1024)
    assert tasks_of_parts(pieces, parts) == [{part} for part in range(5)]
    assert max(pieces["rows"].to_pylist()) <= 10_000 and min(pieces["rows"].to_pylist()) > 4_000
    cut = packed(parts, 10_000, 120, 1024)
    assert [len(tasks) for tasks in tasks_of_parts(cut, parts)] == [4] * 5, "so that all actors have work"


@given(st.lists(st.integers(1, 200), min_size=1, max_size=9), st.integers(4, 30), st.integers(1, 40), st.data())
@settings(deadline=None)
def test_pieces_are_cut_within_tasks_and_tasks_between_parts(
    parts: list[int], piece_rows: int, n_pieces: int, data: st.DataObject
) -> None:
    """Each row that is left is in one piece, in order; only a part that is too large for a task is read by several."""
    rows, share = sum(parts), data.draw(st.sampled_from([0, 0.5, 0.9, 1]))
    kept = np.random.default_rng(rows).random(rows) < share
    pieces = packed(parts, piece_rows, n_pieces, data.draw(st.integers(1, 4)), kept)
    left = []
    for piece in pieces.to_pylist():
        here = np.concatenate([np.arange(s["row"], s["row"] + s["rows"]) for s in piece["segments"]])
        left.append(here[~unpacked(piece["skip"], len(here))])
        assert 0 < len(left[-1]) == piece["rows"] <= piece_rows and len(here) <= 32 * piece_rows
    assert np.concatenate([np.empty(0, int), *left]).tolist() == np.flatnonzero(~kept).tolist()
    tasks = pieces["task"].to_pylist()
    assert tasks == sorted(tasks) and {*tasks} == {*range(len({*tasks}))}
    most = max(8 * piece_rows, 6 * int((~kept).sum()) // n_pieces)
    todo = np.add.reduceat(~kept, np.cumsum([0, *parts])[:-1], dtype=int)
    for rows_to_do, read_by in zip(todo.tolist(), tasks_of_parts(pieces, parts), strict=True):
        assert len(read_by) == -(-rows_to_do // most)


def test_what_is_left_of_a_task_is_read_in_one_go() -> None:
    pieces = packed([1000] * 4, 100, 20, 10)
    whole = Plan(pieces, reused([], np.zeros(1, int), np.zeros(0, bool)), 4000, 0, 4000)
    tasks = whole.tasks(())
    assert pa.concat_tables(tasks) == pieces and all(len({*task["task"].to_pylist()}) == 1 for task in tasks)
    assert len(tasks) == len({*pieces["task"].to_pylist()}) > 3
    done = {"t000001", "t000002", *(piece_name("t", number) for number in tasks[1]["number"].to_pylist())}
    left = whole.tasks(done)
    assert left[0]["number"].to_pylist() == [0, *tasks[0]["number"].to_pylist()[3:]] and left[1:] == tasks[2:]
    assert whole.tasks(whole.names) == []


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
            {"part": file, "file": file, "row": row, "rows": 1000, "start": row, "reason": None, "detail": None}
            for file in range(2)
            for row in range(0, rows, 1000)
        ]
    )
    repeats = np.stack([np.arange(rows, 2 * rows), np.arange(rows)])
    tracemalloc.start()
    pieces = pack(segments, files, np.array([0, rows, 2 * rows]), np.zeros(2 * rows, bool), repeats, 10_000, 1)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 40 * rows, "435 bytes each before"
    lists = pieces["repeats"].combine_chunks()
    assert lists.field("place").flatten().to_pylist() == [*range(10_000)] * 20
    assert lists.field("row").flatten().to_pylist() == [*range(rows)]
