"""The changes of a night are exactly a join of its tags with those of the night before."""

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fruit import document, manifest_of, read_night, write
from hypothesis import given
from hypothesis import strategies as st

from xmc_ray import storage
from xmc_ray.on_ray.tag import changes
from xmc_ray.on_ray.tag.changes import SCHEMA, compare
from xmc_ray.on_ray.tag.nights import tag_files, tags_folder
from xmc_ray.storage.listing import FileInfo

TAGS = pa.schema([("id", pa.string()), ("labels", pa.list_(pa.string())), ("scores", pa.list_(pa.float32()))])
Side = dict[str, tuple[list[str], list[float]]]


def joined(now: Side, before: Side) -> dict[str, tuple[Any, ...]]:
    """The slow twin."""
    kinds = {(True, True): "changed", (True, False): "added", (False, True): "removed"}
    return {
        id: (kinds[id in now, id in before], *(now.get(id) or (None, None)), *(before.get(id) or (None, None)))
        for id in {*now, *before}
        if now.get(id) != before.get(id)
    }


def by_id(table: pa.Table) -> dict[str, tuple[Any, ...]]:
    assert table.schema.equals(SCHEMA)
    rows = {row.pop("id"): tuple(row.values()) for row in table.to_pylist()}
    assert len(rows) == len(table)
    return rows


def side_of(folder: str) -> Side:
    return {row["id"]: (row["labels"], row["scores"]) for row in read_night(folder)[0].to_pylist()}


def changes_of(folder: str) -> pa.Table:
    marker = storage.read_json(Path(folder, "_SUCCESS"))
    tables = [pq.read_table(Path(folder, name), partitioning=None) for name in marker["changes"]]
    assert [len(table) for table in tables] == [marker["rows"][name] for name in marker["changes"]]
    return pa.concat_tables(tables)


tags = st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from([0.25, 0.5, 1.0])), max_size=3)
sides = st.dictionaries(st.sampled_from([f"d{number}" for number in range(12)]), tags)


@given(sides, sides, st.integers(1, 4))
def test_changes_are_a_join(now: dict[str, Any], before: dict[str, Any], chunks: int) -> None:
    """Whatever is empty, equal, longer, shorter or only scored otherwise; in however many chunks."""
    both = [
        {id: ([label for label, _ in row], [score for _, score in row]) for id, row in side.items()} for side in (now, before)
    ]
    tables = []
    for side in both:
        rows = [{"id": id, "labels": labels, "scores": scores} for id, (labels, scores) in side.items()]
        parts = [pa.Table.from_pylist(part.tolist(), TAGS) for part in np.array_split(np.array(rows, object), chunks)]
        tables.append(pa.concat_tables(parts))
    found = compare(*tables)
    assert by_id(found) == joined(*both)
    assert found["id"].to_pylist() == sorted(found["id"].to_pylist())


@pytest.mark.parametrize("share_rows", [1 << 20, 20])
def test_a_night_tells_its_changes(
    share_rows: int, tag: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With tags that are reused and without, rows that are gone, new, rejected by now, or good by now."""
    monkeypatch.setattr(changes, "_SHARE_ROWS", share_rows)
    rows = [document(number) for number in range(60)]
    catalogue = write(tmp_path / "in.parquet", [*rows, {"id": "late", "text": None}])
    nights = [tag(catalogue, date="2026-11-21", max_reject_share=0.5)]
    told = manifest_of(nights[0])
    assert told["changes_since"] is None and told["changes"] == [] and "no finished night" in told["no_changes"]
    rows[7] |= {"text": "a green pear of another text"}
    rows[8] |= {"text": None}
    write(catalogue, [*rows[5:], document(100), document(101), {"id": "late", "text": "a red apple"}])
    nights.append(tag(catalogue, date="2026-11-22", previous="last", max_reject_share=0.5))
    nights.append(tag(catalogue, date="2026-11-23", max_reject_share=0.5, k=2))
    for before, now in pairwise(nights):
        expected = joined(side_of(now), side_of(before))
        assert by_id(changes_of(now)) == expected
        kinds = [kind for kind, *_ in expected.values()]
        told = manifest_of(now)["changes_since"]
        assert told["night"] == before and told["run"] == manifest_of(before)["run"]
        assert [told[kind] for kind in changes.KINDS] == [kinds.count(kind) for kind in changes.KINDS]
    assert manifest_of(nights[1])["reused"] == 53 and len(changes_of(nights[1])) <= 10
    assert (len(storage.read_json(Path(nights[2], "_SUCCESS"))["changes"]) > 1) == (share_rows == 20)


def test_a_night_before_that_is_damaged_does_not_end_this_one(
    tag: Callable[..., str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    catalogue = write(tmp_path / "in.parquet", [document(number) for number in range(10)])
    before = tag(catalogue, date="2026-11-22")
    (file,) = Path(tags_folder(before)).iterdir()
    file.write_bytes(b"PAR1")
    now = tag(catalogue)
    assert manifest_of(now)["tagged"] == 10 and manifest_of(now)["changes_since"] is None
    assert "a finished night is damaged" in manifest_of(now)["no_changes"]
    assert "warning: no changes are told: a finished night is damaged" in capsys.readouterr().out


def test_a_night_before_that_is_removed_meanwhile_does_not_end_this_one(
    tag: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its marker goes after its files were listed."""

    def removed(folder: str) -> list[FileInfo]:
        files = tag_files(folder)
        Path(folder, "_SUCCESS").unlink()
        return files

    catalogue = write(tmp_path / "in.parquet", [document(number) for number in range(10)])
    before = tag(catalogue, date="2026-11-22")
    monkeypatch.setattr(changes, "tag_files", removed)
    now = tag(catalogue)
    assert manifest_of(now)["changes_since"] is None
    assert manifest_of(now)["no_changes"] == f"not a finished night: {before}; found no _SUCCESS"
