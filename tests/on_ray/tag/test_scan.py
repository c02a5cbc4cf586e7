"""The scan of the input: rows are counted, repeated ids and rows that the night before has already are found."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import reference
from hypothesis import given, settings
from hypothesis import strategies as st
from in_process import InProcess

from xmc_ray import storage
from xmc_ray.data.documents import DocumentsConfig, Rules, text_digest
from xmc_ray.on_ray.tag import scan as scanning
from xmc_ray.on_ray.tag.plan import unpacked
from xmc_ray.on_ray.tag.scan import scan

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
    same, same_before, repeats = scanning._join((bases, base_T), len(records) + 1, tags[:0], *records, tags)
    rows = sorted(zip([int(bases[file]) + row for file, row in places], now, strict=True))
    expected = reference.joined([row for _, row in rows], before)
    assert unpacked(same, len(now)).nonzero()[0].tolist() == expected.same
    assert unpacked(same_before, len(before)).nonzero()[0].tolist() == expected.same_before
    assert dict(repeats.T.tolist()) == expected.first_of


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
    monkeypatch.setattr(scanning, "_SHARE_BYTES", sum(file.size for file in files) // (shares - 1) if shares > 1 else 1 << 40)
    rules = Rules.of(DocumentsConfig(uri=str(tmp_path)), labelled=False)
    plan = scan(files, rules, [str(tmp_path / "tags")], 25, 4, InProcess())
    assert (plan.rows, plan.lost_bytes) == (501, 4)
    assert unpacked(plan.reused["keep"][0].as_py(), 200).all() and plan.reused["rows"].to_pylist() == [200]
    left, doubles, counts = [], [], []
    for piece in plan.pieces.to_pylist():
        rows = [(s["uri"], s["row"] + n) for s in piece["segments"] for n in range(s["rows"])]
        skip = unpacked(piece["skip"], len(rows))
        left += [row for row, skipped in zip(rows, skip, strict=True) if not skipped]
        doubles += [(rows[double["place"]], (double["file"], double["row"])) for double in piece["duplicates"]]
        counts.append(piece["rows"])
    expected = [(files[n // 100].uri, n % 100) for n in range(500) if not 120 <= n < 320] + [(files[5].uri, 0)]
    assert left == expected and sum(counts) == 301 and max(counts) <= 25
    assert doubles == [((files[4].uri, 99), (files[0].uri, 7))]
