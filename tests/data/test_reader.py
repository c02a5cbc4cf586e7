"""Files chunk by chunk: every row comes once and in order, from whatever place the reading begins or is taken up again."""

import gzip
import io
import json
import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from seaweed import S3

from xmc_ray import storage
from xmc_ray.data import line_ranges, reader
from xmc_ray.data.documents import DocumentsConfig, Rules
from xmc_ray.data.inputs import list_inputs
from xmc_ray.data.reader import Segment, read_file
from xmc_ray.data.rejects import Reject
from xmc_ray.errors import DataError, UnavailableError
from xmc_ray.on_ray import stream

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
        patch.setattr(line_ranges, "_BYTES", size)
        parts = list(line_ranges.whole_lines(io.BytesIO(data), 7, count))
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
    monkeypatch.setattr(line_ranges, "_BYTES", 10)
    monkeypatch.setattr(line_ranges, "_LINE", 1 << 20)
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


def test_an_outage_that_is_waited_out_is_no_failure_of_the_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    pq.write_table(pa.Table.from_pylist([{"id": f"{n}", "text": "a"} for n in range(20)]), path)
    monkeypatch.setattr(reader, "_PAUSE", 0.01)
    monkeypatch.setattr(storage, "is_local", lambda uri: False)
    errors = [TimeoutError("away")] * 3 + [OSError("one hiccup")]
    parquet = reader._parquet

    def failing(*arguments: Any) -> Any:
        if errors:
            raise errors.pop(0)
        return parquet(*arguments)

    monkeypatch.setattr(reader, "_parquet", failing)
    assert [row["reason"] for row in rows_of(path)] == [None] * 20 and not errors


def test_a_column_whose_name_is_not_utf8_costs_its_file(tmp_path: Path) -> None:
    pq.write_table(pa.table({"id": ["1"], "text": ["a"], "cafX": ["b"]}), tmp_path / "x.parquet")
    (tmp_path / "x.parquet").write_bytes((tmp_path / "x.parquet").read_bytes().replace(b"cafX", b"caf\xe9"))
    pq.write_table(pa.table({"id": ["2"], "text": ["a"]}), tmp_path / "y.parquet")
    (table,) = [
        table
        for table in reader.read_rows(DocumentsConfig(uri=str(tmp_path)), labelled=False, max_reject_share=1)
        if len(table)
    ]
    assert table["id"].to_pylist() == ["2"]
    with pytest.raises(DataError, match=r"cannot be read: .*x\.parquet"):
        list(reader.read_rows(DocumentsConfig(uri=str(tmp_path / "x.parquet")), labelled=False))


def test_rows_that_cannot_be_read_come_chunk_by_chunk_as_well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.parquet"
    pq.write_table(pa.Table.from_pylist([{"id": f"{n}", "text": "a"} for n in range(20)]), path, row_group_size=10)
    monkeypatch.setattr(reader.Opened, "row_groups", lambda *_: Broken())
    lost = [*read_file(Segment(storage.stat(path)), RULES, 4)]
    places = [(0, 4, 4), (4, 8, 4), (8, 10, 2), (10, 14, 4), (14, 18, 4), (18, 20, 2)]
    assert [(part.start, part.end, len(part.table)) for part in lost] == places
    assert [row for part in lost for row in part.table["row"].to_pylist()] == list(range(20))
    assert not any(Segment(storage.stat(path)).lost_with(part) for part in lost), "their number is known"
    whole = Segment(storage.stat(path), rows=9, reject=Reject("gone"))
    assert [len(part.table) for part in read_file(whole, RULES, 4)] == [4, 4, 1]


class Broken:
    """A file of two row groups that cannot be read."""

    ends = (10, 20)

    def rows(self, *_: int) -> Any:
        """Raises at once."""
        raise OSError("bad page")


def rewrite(path: Path, kind: str, text: str) -> None:
    """The same number of rows and bytes, with another text."""
    rows = [{"id": f"{n}", "text": text} for n in range(20)]
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=5)
    else:
        lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
        path.write_bytes(gzip.compress(lines) if kind.endswith("gz") else lines)


@pytest.mark.parametrize("kind", ["parquet", "jsonl", "jsonl.gz"])
@pytest.mark.parametrize("after", range(5))
def test_a_file_that_changes_while_it_is_read_is_an_error(
    after: int, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kind: check, then use. Its rows may be of two versions, whenever it changes; before the first row they are rejects."""
    monkeypatch.setattr(line_ranges, "_BYTES", 64)
    path = tmp_path / f"x.{kind}"
    rewrite(path, kind, "old")
    chunks, given = read_file(Segment(storage.stat(path)), RULES, chunk=5), []
    for _ in range(after):
        given.append(next(chunks))
    rewrite(path, kind, "new")
    if after:
        with pytest.raises(DataError, match=rf"^a file has changed while it was read: {path}; run again"):
            list(chunks)
    else:
        assert [chunk.reject for chunk in chunks] == [Reject("the file has changed since it was listed")]
    assert {text for chunk in given for text in chunk.table["text"].to_pylist()} <= {"old"}


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_a_file_of_another_size_has_changed_though_its_time_is_kept(kind: str, tmp_path: Path) -> None:
    """Kind: check, then use. ``cp -p`` and ``rsync -t`` keep the time."""
    path = tmp_path / f"x.{kind}"
    rewrite(path, kind, "old")
    file = storage.stat(path)
    chunks = read_file(Segment(file), RULES, chunk=5)
    next(chunks)
    rewrite(path, kind, "much longer")
    os.utime(path, ns=(int(file.version), int(file.version)))
    with pytest.raises(DataError, match="has changed while it was read"):
        list(chunks)
    (whole,) = read_file(Segment(file), RULES)
    assert whole.reject == Reject("the file has changed since it was listed")


def test_a_file_that_changes_while_storage_is_away_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kind: check, then use. Reading goes on in the middle of a file, which is compared with the first one."""
    monkeypatch.setattr(reader, "_PAUSE", 0.01)
    path = tmp_path / "x.jsonl"
    rewrite(path, "jsonl", "old")
    read, failures = reader._json_lines, [OSError("When reading: AWS Error NETWORK_CONNECTION during GetObject operation")]

    def failing(*arguments: Any) -> Any:
        for part in read(*arguments):
            yield part
            if failures:
                rewrite(path, "jsonl", "new")
                raise failures.pop()

    monkeypatch.setattr(reader, "_json_lines", failing)
    with pytest.raises(DataError, match="has changed while it was read"):
        list(read_file(Segment(storage.stat(path)), RULES, chunk=5))


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_an_object_that_changes_while_it_is_read_is_an_error(kind: str, s3: S3, tmp_path: Path) -> None:
    """Kind: check, then use. Each range of an object may be of another version."""
    uri = s3.uri(f"changing/x.{kind}")
    rows = {text: [{"id": f"{n}", "text": f"{text} {n}" * 500} for n in range(4000)] for text in ("old", "new")}
    for text in rows:
        if kind == "parquet":
            pq.write_table(pa.Table.from_pylist(rows[text]), tmp_path / text, row_group_size=500)
        else:
            (tmp_path / text).write_text("".join(json.dumps(row) + "\n" for row in rows[text]))
    storage.write_bytes(uri, (tmp_path / "old").read_bytes())
    file = storage.stat(uri)
    assert sum(len(chunk.table) for chunk in read_file(Segment(file), RULES)) == 4000
    chunks = read_file(Segment(file), RULES)
    next(chunks)
    storage.write_bytes(uri, (tmp_path / "new").read_bytes())
    with pytest.raises(DataError, match=rf"^a file has changed while it was read: {uri}"):
        list(chunks)


def test_all_who_read_documents_hold_a_file_to_what_was_listed(tmp_path: Path) -> None:
    """Kind: check, then use. Extension and explanation read in one process; training and evaluation in tasks."""
    path = tmp_path / "x.jsonl"
    config = DocumentsConfig(uri=str(path))
    for read in (
        lambda: reader.read_rows(config, labelled=False),
        lambda: stream._read(reader.file_parts(list_inputs(config).files), RULES),
    ):
        path.write_text("".join(json.dumps({"id": f"{n}", "text": "old"}) + "\n" for n in range(3000)))
        tables = read()
        while not next(tables):
            pass
        path.write_text("".join(json.dumps({"id": f"{n}", "text": "new"}) + "\n" for n in range(3000)))
        with pytest.raises(DataError, match="has changed while it was read"):
            list(tables)
