"""Files chunk by chunk: every row comes once and in order, from whatever place the reading begins or is taken up again."""

import gzip
import io
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xmc_ray import storage
from xmc_ray.data import reader
from xmc_ray.data.documents import DocumentsConfig, Reject, Rules
from xmc_ray.data.reader import Segment, read_file
from xmc_ray.errors import UnavailableError

RULES = Rules.of(DocumentsConfig(uri="/x"), labelled=False)


def rows_of(path: Path, segment: tuple[int, int, int] | None = None, chunk: int = 4) -> list[dict[str, Any]]:
    """Number, id and reason of the rows; ``segment`` is (start, row, rows)."""
    file = storage.stat(path)
    tables = [part.table for part in read_file(Segment(file, *segment or ()), RULES, chunk)]
    assert all(len(table) <= chunk for table in tables if not table["reason"][0].is_valid)
    return [{name: row[name] for name in ("row", "id", "reason")} for table in tables for row in table.to_pylist()]


@pytest.mark.parametrize("kind", ["parquet", "jsonl", "jsonl.gz"])
@given(st.lists(st.integers(0, 3), min_size=1, max_size=30), st.data())
@settings(deadline=None, max_examples=30)
def test_every_chunk_can_be_the_beginning(
    kind: str, tmp_path_factory: pytest.TempPathFactory, blank: list[int], data: st.DataObject
) -> None:
    path = tmp_path_factory.mktemp("file") / f"x.{kind}"
    rows = [{"id": f"{n}", "text": "x" * size} for n, size in enumerate(blank)]
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=data.draw(st.integers(1, 9)))
    else:
        text = "".join("\n" * size + json.dumps(row) + "\n" for size, row in zip(blank, rows, strict=True)).encode()
        path.write_bytes(gzip.compress(text) if kind.endswith("gz") else text)
    expected = [{"row": n, "id": f"{n}", "reason": None if size else "text is empty"} for n, size in enumerate(blank)]
    assert rows_of(path) == expected
    file = storage.stat(path)
    for part in read_file(Segment(file), RULES, chunk=4):
        first = part.table["row"][0].as_py()
        count = data.draw(st.integers(1, len(rows) - first))
        assert rows_of(path, (part.start, first, count), chunk=3) == expected[first : first + count]


@given(st.lists(st.binary(max_size=5)), st.integers(1, 9), st.integers(1, 3))
@settings(deadline=None)
def test_no_line_is_lost_between_reads(lines: list[bytes], size: int, count: int) -> None:
    data = b"\n".join(lines)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reader, "_BYTES", size)
        parts = list(reader._whole_lines(io.BytesIO(data), 7, count))
    assert b"".join(part for _, part in parts) == data
    assert [start for start, _ in parts] == [7 + sum(len(part) for _, part in parts[:n]) for n in range(len(parts))]
    assert all(part.endswith(b"\n") for _, part in parts[:-1]) and all(part.count(b"\n") <= count for _, part in parts)


def test_what_a_file_has_lost_since_is_told_row_by_row(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text("".join(json.dumps({"id": f"{n}", "text": "a"}) + "\n" for n in range(5)))
    reason = "the file has fewer rows than before"
    assert [row["reason"] for row in rows_of(path, (0, 0, 8))] == [None] * 5 + [reason] * 3
    file = storage.stat(path)
    path.unlink()
    gone = list(read_file(Segment(file, 0, 2, 3), RULES))
    assert [part.table["row"].to_pylist() for part in gone] == [[2, 3, 4]] and gone[0].reject == Reject(
        "the file has disappeared"
    )
    (whole,) = read_file(Segment(file), RULES)
    assert len(whole.table) == 1 and whole.reject == Reject("the file has disappeared")
    (never,) = read_file(Segment(file, 0, 2, 3, Reject("known to be bad")), RULES)
    assert never.table["reason"].to_pylist() == ["known to be bad"] * 3


def test_a_line_without_an_end_is_no_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader, "_BYTES", 10)
    monkeypatch.setattr(reader, "_LINE", 1 << 20)
    (tmp_path / "x.jsonl").write_bytes(b'{"id": "0", "text": "a"}\n' + bytes(2 << 20))
    found = rows_of(tmp_path / "x.jsonl")
    assert [row["id"] for row in found] == ["0", None] and found[1]["reason"] == "a line of more than 1 MiB"


def test_a_storage_that_is_away_is_waited_for_then_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the middle of a file, without a row lost or read twice."""
    path = tmp_path / "x.parquet"
    pq.write_table(pa.Table.from_pylist([{"id": f"{n}", "text": "a"} for n in range(20)]), path)
    monkeypatch.setattr(reader, "_PAUSE", 0.01)
    parquet, failures = reader._parquet, [3, 1, 0, 2]

    def failing(*arguments: Any) -> Any:
        for number, part in enumerate(parquet(*arguments)):
            if failures and number == failures[0]:
                failures.pop(0)
                raise OSError("When reading: AWS Error NETWORK_CONNECTION during GetObject operation")
            yield part

    monkeypatch.setattr(reader, "_parquet", failing)
    assert [row["row"] for row in rows_of(path)] == list(range(20)) and failures == [2]
    failures[:] = [0] * 10_000
    monkeypatch.setattr(reader, "PATIENCE", 0.1)
    with pytest.raises(UnavailableError, match=r"cannot be read or written.*x\.parquet.*NETWORK_CONNECTION"):
        rows_of(path)
