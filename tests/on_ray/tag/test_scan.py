"""The scan of the input: rows are counted, repeated ids and rows that the night before has already are found."""

import json
import tempfile
from pathlib import Path
from statistics import median

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import reference
from hypothesis import given, settings
from hypothesis import strategies as st
from in_process import InProcess

from xmc_ray import storage
from xmc_ray.data import line_ranges
from xmc_ray.data.documents import DocumentsConfig, Rules, text_digest
from xmc_ray.errors import DataError
from xmc_ray.on_ray.tag import scan as scanning
from xmc_ray.on_ray.tag.pieces import _Stream, rows_to_tag
from xmc_ray.on_ray.tag.plan import unpacked
from xmc_ray.on_ray.tag.scan import scan

TEXTS = pa.schema([("id", pa.string()), ("text", pa.string())])
IDS = st.lists(st.tuples(st.integers(0, 12), st.integers(0, 2)), max_size=30)  # (id, text)


def record(rows: list[tuple[int, int]], places: list[tuple[int, int]]) -> np.ndarray:
    records = np.zeros(len(rows), scanning._RECORD)
    for number, ((identifier, text), place) in enumerate(zip(rows, places, strict=True)):
        records[number] = ([identifier % 2, identifier], [text, 0], *place)
    return records


@given(IDS, IDS, st.integers(1, 5), st.randoms())
@settings(deadline=None)
def test_the_join_equals_a_plain_loop(now: list[tuple[int, int]], before: list[tuple[int, int]], split: int, order) -> None:  # type: ignore[no-untyped-def]
    """Rows of several files, in records that come in any order."""
    before = list(dict(before).items())
    places = [(row % split, row // split) for row in range(len(now))]
    bases = scanning._bases(np.array([file for file, _ in places], np.int64), np.ones(len(now), np.int64), split)
    records = [record([row], [place]) for row, place in zip(now, places, strict=True)]
    order.shuffle(records)
    base_T = np.array([0, len(before)])
    tags = record(before, [(0, row) for row in range(len(before))])
    same, same_before, repeats, new = scanning._join((bases, base_T), len(records) + 1, tags[:0], *records, tags)
    rows = sorted(zip([int(bases[file]) + row for file, row in places], now, strict=True))
    expected = reference.joined([row for _, row in rows], before)
    assert sorted(same.tolist()) == expected.same
    assert sorted(same_before.tolist()) == expected.same_before
    assert dict(repeats.T.tolist()) == expected.first_of
    assert new == len({row for row, _ in now}) - len(expected.same)


@pytest.mark.parametrize("shares", [1, 3])
def test_pieces_hold_each_row_that_is_left_once(shares: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [f"text {n}" for n in range(500)]
    table = pa.table({"id": [f"d{n}" for n in range(499)] + ["d7"], "text": texts})
    for part in range(5):
        pq.write_table(table.slice(100 * part, 100), tmp_path / f"{part}.parquet", row_group_size=30)
    (tmp_path / "x.parquet").write_bytes(b"none")
    files = storage.list_files(tmp_path)
    before = table.select(["id"]).append_column("text_digest", text_digest(table["text"].combine_chunks())).slice(120, 200)
    pq.write_table(before, tmp_path / "tags")
    monkeypatch.setattr(scanning, "_SHARE_ROWS", 701 // (shares - 1) if shares > 1 else 1 << 40)
    rules = Rules.of(DocumentsConfig(uri=str(tmp_path)), labelled=False)
    plan = scan(files, rules, [storage.stat(tmp_path / "tags")], 25, 4, 1, InProcess())
    assert (plan.rows, plan.to_tag, plan.lost_bytes) == (501, 299, 4)
    assert unpacked(plan.reused["keep"][0].as_py(), 200).all() and plan.reused["rows"].to_pylist() == [200]
    left, doubles, counts = [], [], []
    for piece in plan.pieces.to_pylist():
        rows = [(s["uri"], s["row"] + n) for s in piece["segments"] for n in range(s["rows"])]
        skip = unpacked(piece["skip"], len(rows))
        left += [row for row, skipped in zip(rows, skip, strict=True) if not skipped]
        repeats = piece["repeats"]
        firsts = [(repeats["files"][file], row) for file, row in zip(repeats["file"], repeats["row"], strict=True)]
        doubles += zip([rows[place] for place in repeats["place"]], firsts, strict=True)
        counts.append(piece["rows"])
    expected = [(files[n // 100].uri, n % 100) for n in range(500) if not 120 <= n < 320] + [(files[5].uri, 0)]
    assert left == expected and sum(counts) == 301 and max(counts) <= 25
    assert doubles == [((files[4].uri, 99), (files[0].uri, 7))]


@given(st.lists(IDS, min_size=1, max_size=4), IDS, st.integers(1, 9), st.integers(2, 9), st.data())
@settings(deadline=None, max_examples=40)
def test_a_plan_equals_a_plain_loop(
    parts: list[list[tuple[int, int]]], before: list[tuple[int, int]], share_rows: int, piece_rows: int, data: st.DataObject
) -> None:
    """Whole plans, whatever the files, the shares of the join and the size of pieces; each row is in one place."""
    before = list(dict(before).items())
    with tempfile.TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        patch.setattr(scanning, "_SHARE_ROWS", share_rows)
        patch.setattr(scanning, "_TASK_PARTS", data.draw(st.integers(1, 3)))
        folder = Path(name)
        for number, part in enumerate(parts):
            table = pa.table({"id": pa.array([f"d{i}" for i, _ in part], pa.string()), "text": [f"text {t}" for _, t in part]})
            pq.write_table(table.cast(TEXTS), folder / f"{number}.parquet", row_group_size=data.draw(st.integers(1, 9)))
        digests = text_digest(pa.array([f"text {text}" for _, text in before], pa.string()))
        pq.write_table(
            pa.table({"id": pa.array([f"d{i}" for i, _ in before], pa.string()), "text_digest": digests}), folder / "_t"
        )
        files, tags = storage.list_files(folder, (".parquet",)), [storage.stat(folder / "_t")]
        rules = Rules.of(DocumentsConfig(uri=name), labelled=False)
        plan = scan(files, rules, tags, piece_rows, 1, 1, InProcess())
    rows = [(uri, n) for uri, part in zip([file.uri for file in files], parts, strict=True) for n in range(len(part))]
    expected = reference.joined([row for part in parts for row in part], before)
    left, repeated = [], {}
    for piece in plan.pieces.to_pylist():
        here = [(s["uri"], s["row"] + n) for s in piece["segments"] for n in range(s["rows"])]
        skip = unpacked(piece["skip"], len(here))
        left += [row for row, skipped in zip(here, skip, strict=True) if not skipped]
        assert piece["rows"] == len(here) - skip.sum() <= piece_rows
        repeats = piece["repeats"]
        for place, file, row in zip(repeats["place"], repeats["file"], repeats["row"], strict=True):
            repeated[here[place]] = (repeats["files"][file], row)
    assert plan.rows == len(rows) and left == [row for n, row in enumerate(rows) if n not in expected.same]
    assert repeated == {rows[n]: rows[first] for n, first in expected.first_of.items()}
    kept = [unpacked(reused["keep"], len(before)).nonzero()[0].tolist() for reused in plan.reused.to_pylist()]
    assert kept == ([expected.same_before] if expected.same_before else [])


def test_the_join_is_split_by_rows_and_not_by_the_bytes_of_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kind: memory. Short titles take few bytes, compressed; a task takes some hundred for each row of its share."""
    rows = 40_000
    pq.write_table(pa.table({"id": [f"{n}" for n in range(rows)], "text": ["a"] * rows}), tmp_path / "a.parquet")
    files, given = storage.list_files(tmp_path), []
    join = scanning._join

    def watched(bases: object, n_now: int, *records: np.ndarray) -> object:
        given.append(sum(map(len, records)))
        return join(bases, n_now, *records)

    monkeypatch.setattr(scanning, "_join", watched)
    monkeypatch.setattr(scanning, "_SHARE_ROWS", 5_000)
    rules = Rules.of(DocumentsConfig(uri=str(tmp_path)), labelled=False)
    plan = scan(files, rules, [], 10_000, 1, 0, InProcess())
    assert plan.rows == sum(given) == rows and len(given) == 9 and max(given) < 5_000


def test_too_many_rows_that_repeat_an_id_are_told_before_anything_is_tagged(tmp_path: Path) -> None:
    """Kind: memory. A catalogue that is listed twice is refused while its duplicates are still numbers."""
    for name in ("a", "b"):
        pq.write_table(pa.table({"id": [f"{n}" for n in range(50)], "text": ["x"] * 50}), tmp_path / f"{name}.parquet")
    files, rules = storage.list_files(tmp_path), Rules.of(DocumentsConfig(uri=str(tmp_path)), labelled=False)
    found = rf"found 50\.0%: duplicate id \(50\), such as that of row 0, first at {files[0].uri} row 0; expected at most 49\.0%"
    with pytest.raises(DataError, match=rf"^too many documents are rejected: {files[1].uri}; {found}"):
        scan(files, rules, [], 10, 1, 0.49, InProcess())
    assert scan(files, rules, [], 10, 1, 0.5, InProcess()).rows == 100


def test_the_night_before_may_not_change_while_it_is_scanned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kind: check, then use. Which of its rows are kept goes by their number."""
    pq.write_table(pa.table({"id": ["a"], "text": ["x"]}), tmp_path / "a.parquet")
    tags = pa.table({"id": ["a"], "text_digest": text_digest(pa.array(["x"]))})
    pq.write_table(tags, tmp_path / "_t")
    before = [storage.stat(tmp_path / "_t")]
    pq.write_table(pa.concat_tables([tags, tags]), tmp_path / "_t")
    rules = Rules.of(DocumentsConfig(uri=str(tmp_path)), labelled=False)
    with pytest.raises(DataError, match=f"has changed while it was read: {tmp_path}/_t"):
        scan(storage.list_files(tmp_path), rules, before, 10, 1, 1, InProcess())


LINES = st.lists(
    st.one_of(
        st.builds(lambda n, text: json.dumps({"id": f"d{n}", "text": text}), st.integers(0, 30), st.text("aé😀", max_size=9)),
        st.sampled_from(["", " ", "no JSON", '{"id": "e", "text": ""}', "[]"]),
    ),
    max_size=40,
)


@pytest.mark.parametrize("identifier", ["id", None])
@given(st.lists(LINES, min_size=1, max_size=3), st.sampled_from(["\n", "\r\n"]), st.integers(30, 200), st.integers(1, 9))
@settings(deadline=None, max_examples=50)
def test_a_plan_of_byte_ranges_has_the_rows_of_a_plan_of_whole_files(
    identifier: str | None, lines: list[list[str]], newline: str, size: int, piece_rows: int
) -> None:
    """Every row has its number in its file, in rejects and in ids that are made of it, and is read again by its piece.

    All documents of the night before are those of this one, so all rows with an id are reused if their numbers are right.
    """

    def rows_of(large: int, tags: bool) -> tuple[list[dict[str, object]], int, int]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(line_ranges, "LARGE", large)
            patch.setattr(scanning, "LARGE", large)
            before = [storage.stat(folder / "_tags")] if tags else []
            plan = scan(storage.list_files(folder), rules, before, piece_rows, 1, 1, InProcess())
        found = [
            row
            for piece in plan.pieces.to_pylist()
            for table in rows_to_tag(piece, _Stream(piece["segments"], rules))
            for row in table.to_pylist()
        ]
        return found, plan.rows, sum(plan.reused["rows"].to_pylist())

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for number, part in enumerate(lines):
            (folder / f"{number}.jsonl").write_bytes(newline.join(["", *part]).encode())
        rules = Rules.of(DocumentsConfig(uri=name, id=identifier), labelled=False)
        found, rows, _ = whole = rows_of(1 << 40, tags=False)
        assert rows_of(size, tags=False) == whole and len(found) == rows
        good = [row for row in found if row["reason"] is None]
        tags = {
            "id": [row["id"] for row in good],
            "text_digest": text_digest(pa.array([row["text"] for row in good], pa.string())),
        }
        pq.write_table(pa.table(tags, pa.schema([("id", pa.string()), ("text_digest", pa.string())])), folder / "_tags")
        assert rows_of(size, tags=True) == rows_of(1 << 40, tags=True)
        assert rows_of(size, tags=True)[2] == len(good)


def test_the_shares_of_tasks_are_no_small_objects(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kind: memory. What is small, Ray keeps in the driver: the records of all rows, if there are many tasks and shares."""
    rows = 3_000
    for number in range(30):
        ids = [f"{number} {n}" for n in range(rows // 30)]
        pq.write_table(pa.table({"id": ids, "text": ["a"] * len(ids)}), tmp_path / f"{number:02}.parquet")
    monkeypatch.setattr(scanning, "_SHARE_ROWS", 500)
    monkeypatch.setattr(scanning, "_TASK_PARTS", 1)
    monkeypatch.setattr(scanning, "_OBJECT_ROWS", 100)
    sizes: list[int] = []

    class Watched(InProcess):
        def submit(self, task: object, *arguments: object, returns: int = 1) -> object:
            result = super().submit(task, *arguments, returns=returns)
            if task is scanning._shared:
                sizes.extend(map(len, result))
            return result

    rules = Rules.of(DocumentsConfig(uri=str(tmp_path)), labelled=False)
    plan = scan(storage.list_files(tmp_path), rules, [], 100, 1, 0, Watched())
    assert plan.rows == sum(sizes) == rows and len(sizes) == 7 * 5 and median(sizes) > 50
