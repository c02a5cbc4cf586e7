"""Byte ranges of JSON lines: whatever the lines and wherever the cuts, every line comes once, with the number of its row."""

import bz2
import gzip
import io
import json
from collections.abc import Sequence
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import pytest
import reference
from hypothesis import example, given, settings
from hypothesis import strategies as st

from xmc_ray import storage
from xmc_ray.data import line_ranges, reader
from xmc_ray.data.documents import DocumentsConfig, Rules
from xmc_ray.data.line_ranges import packed_notice, whole_lines
from xmc_ray.data.reader import Segment, file_parts, read_all, read_file
from xmc_ray.storage.listing import FileInfo

RULES = Rules.of(DocumentsConfig(uri="/x"), labelled=False)
TEXTS = st.text(st.sampled_from("aé€😀 \\n"), max_size=12)
LINES = st.lists(
    st.one_of(
        st.builds(lambda id_, text: json.dumps({"id": id_, "text": text}, ensure_ascii=False).encode(), TEXTS, TEXTS),
        st.sampled_from([b"", b"  ", b"\t", b"no JSON", b"[1]", b"null", "€".encode(), b'{"id": "1", "text": "\xff"}']),
        st.integers(30, 90).map(lambda size: json.dumps({"id": "long", "text": "x" * size}).encode()),
    ),
    max_size=25,
)
NEWLINES, LAST = st.sampled_from([b"\n", b"\r\n"]), st.booleans()


def content(lines: Sequence[bytes], newline: bytes, is_last: bool) -> bytes:
    return newline.join(lines) + (newline if is_last else b"")


@given(LINES, NEWLINES, LAST, st.lists(st.integers(0, 400), max_size=12), st.integers(1, 20), st.integers(1, 3))
@example([b"a" * 30, b"b"], b"\n", False, [3, 5, 30, 31], 4, 1)  # lines longer than their ranges, and cuts beside a newline
@settings(deadline=None, max_examples=300)
def test_every_line_is_in_the_range_in_which_it_begins(
    lines: list[bytes], newline: bytes, is_last: bool, cuts: list[int], size: int, count: int
) -> None:
    data = content(lines, newline, is_last)
    bounds = [0, *sorted(cut for cut in cuts if cut < len(data)), max(len(data), 1)]
    given_lines: list[tuple[int, bytes]] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(line_ranges, "_BYTES", size)
        patch.setattr(line_ranges, "_TAIL", max(size // 3, 1))
        for start, stop in pairwise(bounds):
            stream = io.BytesIO(data)
            stream.seek(start)
            for at, part in whole_lines(stream, start, count, stop):
                begins = [at, *(at + place + 1 for place, byte in enumerate(part[:-1]) if byte == ord("\n"))]
                assert all(start <= begin < stop for begin in begins)
                assert part.count(b"\n") <= count
                given_lines.append((at, part))
    assert b"".join(part for _, part in given_lines) == data
    assert [at for at, _ in given_lines] == [0, *accumulate(len(part) for _, part in given_lines)][:-1]


@given(LINES, NEWLINES, LAST, st.booleans(), st.integers(8, 120))
@settings(deadline=None, max_examples=100)
def test_a_file_in_parts_has_the_rows_that_it_has_as_a_whole(
    tmp_path_factory: pytest.TempPathFactory, lines: list[bytes], newline: bytes, is_last: bool, marked: bool, size: int
) -> None:
    """The parts are those that tasks read; ``reference`` is a plain loop over the lines."""
    path = tmp_path_factory.mktemp("file") / "x.jsonl"
    data = content(lines, newline, is_last)
    path.write_bytes(b"\xef\xbb\xbf" * marked + data)
    whole = [row for chunk in read_file(Segment(storage.stat(path)), RULES) for row in chunk.table.to_pylist()]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(line_ranges, "LARGE", size)
        parts = file_parts([storage.stat(path)]).to_pylist()
    is_array = data.lstrip().startswith(b"[")
    assert len(parts) == (-(-path.stat().st_size // size) if data.strip() and not is_array else 1) or not data
    found: list[dict[str, Any]] = []
    for number, part in enumerate(parts):
        chunks = [chunk for _, chunk in read_all([Segment.from_row(part)], RULES, 3)]
        tables = [row for chunk in chunks for row in chunk.table.to_pylist()]
        assert part["part"] == number and [row["row"] for row in tables] == [*range(len(tables))]
        found += [row | {"row": len(found) + n} for n, row in enumerate(tables)]
    assert found == whole
    if not is_array:
        assert len(found) == len(reference.rows_of_lines(data))


def test_a_bad_line_at_the_beginning_of_a_range_is_one_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of a range count from 0, but it does not begin the file."""
    lines = [json.dumps({"id": f"{number}", "text": "text"}) for number in range(8)]
    lines[3] = '[{"id": "x", "text": "y"}]'
    path = tmp_path / "x.jsonl"
    path.write_text("\n".join(lines) + "\n")
    monkeypatch.setattr(line_ranges, "LARGE", len("\n".join(lines[:3])))
    segments = [Segment.from_row(part) for part in file_parts([storage.stat(path)]).to_pylist()]
    rows = [row for segment in segments for part in read_file(segment, RULES) for row in part.table.to_pylist()]
    assert len(segments) > 1 and [row["reason"] for row in rows] == [None] * 3 + ["not a JSON object"] + [None] * 4


def test_what_cannot_be_split_is_one_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(line_ranges, "LARGE", 100)
    text = b'{"id": "1", "text": "a"}\n' * 10
    files = {"x.jsonl": text, "x.jsonl.gz": gzip.compress(text, 0), "x.jsonl.bz2": bz2.compress(text) + bytes(200)}
    files |= {"array.json": b"\n [" + text, "blank.json": b" " * 5000 + text, "utf16.json": text.decode().encode("utf-16")}
    files |= {"small.json": text[:75], "other": text}
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    parts = {name: len(file_parts([storage.stat(tmp_path / name)])) for name in files}
    assert parts == dict.fromkeys(files, 1) | {"x.jsonl": 3, "other": 3}
    gone = FileInfo(uri=f"{tmp_path}/gone.jsonl", size=1000, version="")
    assert len(file_parts([gone])) == 1


def test_large_packed_files_are_one_line(tmp_path: Path) -> None:
    sizes = {
        "a.jsonl": 1 << 40,
        "b.jsonl.gz": 1 << 20,
        "c.json.GZ": 100 << 20,
        "d.ndjson.zst": 3_000_000_000,
        "e.parquet": 1 << 40,
    }
    files = [FileInfo(uri=f"s3://bucket/{name}", size=size, version="") for name, size in sizes.items()]
    assert packed_notice(files[:2]) is None
    notice = packed_notice(files)
    assert notice is not None and "\n" not in notice
    assert notice.startswith(
        "cannot be split, since packed: 2 files of more than 64 MiB, the largest s3://bucket/d.ndjson.zst (3,0"
    )


def test_a_range_is_gone_on_with_where_storage_went_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kind: recovery. No line is lost or read twice at the place where reading is taken up again."""
    monkeypatch.setattr(reader, "_PAUSE", 0.01)
    path = tmp_path / "x.jsonl"
    path.write_text("".join(json.dumps({"id": f"{n}", "text": "a"}) + "\n" for n in range(60)))
    read, failures = reader._json_lines, [0, 2, 1]

    def failing(*arguments: Any) -> Any:
        for number, part in enumerate(read(*arguments)):
            if failures and number == failures[0]:
                failures.pop(0)
                raise OSError("When reading: AWS Error NETWORK_CONNECTION during GetObject operation")
            yield part

    monkeypatch.setattr(reader, "_json_lines", failing)
    monkeypatch.setattr(line_ranges, "LARGE", 700)
    parts = file_parts([storage.stat(path)]).to_pylist()
    ids = [
        [identifier for chunk in read_file(Segment.from_row(part), RULES, 4) for identifier in chunk.table["id"].to_pylist()]
        for part in parts
    ]
    assert len(parts) == 3 and all(ids) and not failures
    assert [int(identifier) for part in ids for identifier in part] == [*range(60)]


def test_only_what_is_in_a_range_is_read(tmp_path: Path) -> None:
    """Kind: cost. The end of its last line besides, and not the rest of the file."""

    class Counted(io.BytesIO):
        given = 0

        def read(self, size: int | None = -1) -> bytes:
            data = super().read(size)
            self.given += len(data)
            return data

    line = json.dumps({"id": "1", "text": "x" * 1000}).encode() + b"\n"
    stream = Counted(line * 20_000)
    start, stop = 8 << 20, 16 << 20
    stream.seek(start)
    assert sum(len(part) for _, part in whole_lines(stream, start, 100, stop)) >= (stop - start) - len(line)
    assert stream.given <= (stop - start) + 3 * (1 << 16)
