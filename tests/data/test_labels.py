"""Labels: their order, ids, counts and names; list columns against plain loops."""

from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xmc_ray.data.labels import (
    LabelIndex,
    label_names,
    list_lengths,
    lists_from_rows,
    tidy,
    unique_in_rows,
)
from xmc_ray.errors import DataError

QUICK = settings(max_examples=60, deadline=None, derandomize=True)
ROWS = st.lists(st.none() | st.lists(st.none() | st.sampled_from("abcdé"), max_size=5), max_size=8)
STRINGS = pa.list_(pa.string())


def lists(rows: object) -> pa.ListArray:
    return pa.array(rows, STRINGS)


def unique(row: list[str | None] | None) -> list[str]:
    return list(dict.fromkeys(value for value in row or [] if value is not None))


def test_most_frequent_first_then_by_name() -> None:
    index = LabelIndex.count([lists([["b", "a"], ["c", "b"]]), lists([["c"], [], ["d", "a"]])])
    assert index.labels.to_pylist() == ["a", "b", "c", "d"]
    assert index.counts.tolist() == [2, 2, 2, 1]
    assert index.n_documents == 5
    other = LabelIndex.count([lists([["d", "a"], [], ["c"]]), lists([["c", "b"], ["b", "a"]])])
    assert other.labels.equals(index.labels)
    assert other.fingerprint == index.fingerprint


def test_a_label_that_stands_twice_in_a_row_counts_once() -> None:
    assert LabelIndex.count([lists([["a", "a", None], ["a"], None])]).counts.tolist() == [2]


@pytest.mark.parametrize("rows", [[], [[]], [None, []], [[None]]])
def test_no_label_at_all(rows: list[object]) -> None:
    with pytest.raises(DataError, match=f"no document has a label; found {len(rows)} documents"):
        LabelIndex.count([lists(rows)])


@QUICK
@given(ROWS, st.integers(0, 3))
def test_encode_equals_a_loop(rows: list[list[str | None] | None], skipped: int) -> None:
    index = LabelIndex.count([lists([["b", "a", "é"], ["b", "é"], ["b"]])])
    ids = {label: number for number, label in enumerate(index.labels.to_pylist())}
    expected = [[ids[label] for label in unique(row) if label in ids] for row in rows[skipped:]]
    assert index.encode(lists(rows).slice(skipped)).to_pylist() == expected
    chunks = pa.chunked_array([lists(rows).slice(skipped), lists([["a"]])])
    assert index.encode(chunks).to_pylist() == [*expected, [ids["a"]]]


@QUICK
@given(ROWS, st.integers(0, 3))
def test_list_columns_equal_loops(rows: list[list[str | None] | None], skipped: int) -> None:
    column = lists(rows).slice(skipped)
    assert unique_in_rows(column).to_pylist() == [unique(row) for row in rows[skipped:]]
    assert list_lengths(column).tolist() == [len(row or []) for row in rows[skipped:]]


def test_lists_from_rows() -> None:
    import numpy as np

    assert lists_from_rows(np.array([1, 1, 3]), pa.array([7, 8, 9]), 5).to_pylist() == [[], [7, 8], [], [9], []]


def test_names_and_round_trip(tmp_path: Path) -> None:
    index = LabelIndex.count([lists([["a", "b"], ["a"]])])
    named = index.with_names(pa.table({"label": ["x", "b"], "name": ["X", "Bee"]}))
    assert named.names.to_pylist() == [None, "Bee"]
    assert named.fingerprint == index.fingerprint != LabelIndex.count([lists([["a", "c"], ["a"]])]).fingerprint
    named.save(tmp_path / "labels.parquet")
    again = LabelIndex.load(tmp_path / "labels.parquet")
    assert again.to_table().equals(named.to_table())
    assert again.n_documents == 2
    with pytest.raises(DataError, match="need one column"):
        index.with_names(pa.table({"label": ["a"], "title": ["A"]}))


# --- label names (kinds of fault: taken as they come; told only after tokenising)


@pytest.mark.parametrize(
    ("columns", "told"),
    [
        ({"uri": ["a"], "title": ["A"]}, "need one column 'label' and one 'name'; found uri, title"),
        ({"label": ["a"]}, "need one column 'label' and one 'name'; found label"),
        ({"label": [1.5], "name": ["A"]}, "column 'label' of the label names has a wrong type; found double"),
        ({"label": ["a"], "name": [["A"]]}, "column 'name' of the label names has a wrong type; found list"),
        ({"label": ["a", "b "], "name": [b"A", b"\xff"]}, "not UTF-8; found column 'name', row 1"),
        ({"label": ["a", " a", "b"], "name": ["A", "Ah", "B"]}, "label 'a' has several names; found 'A' and 'Ah'; keep one"),
    ],
)
def test_label_names_that_do_not_fit_are_told_in_one_line(columns: dict[str, list[object]], told: str) -> None:
    with pytest.raises(DataError, match=told):
        label_names(pa.table(columns))
    doubled = pa.Table.from_arrays([pa.array(["a"])] * 3, ["label", "name", "name"])
    with pytest.raises(DataError, match="found label, name, name"):
        label_names(doubled)


def test_label_names_are_trimmed_once_each_and_integers_are_text() -> None:
    names = [" Bee", "A", "A ", "none", "blank", "\t", "Sea"]
    table = pa.table({"label": ["b ", "a", "a", None, " ", "c", "c"], "name": names})
    expected = [{"label": "b", "name": "Bee"}, {"label": "a", "name": "A"}, {"label": "c", "name": "Sea"}]
    assert label_names(table).to_pylist() == expected
    table = pa.table({"label": [2, 1, None], "name": pa.array(["x", "y", "z"]).dictionary_encode()})
    assert label_names(table).to_pylist() == [{"label": "2", "name": "x"}, {"label": "1", "name": "y"}]
    empty = LabelIndex.count([lists([["a"]])]).with_names(pa.table({"label": pa.nulls(0), "name": pa.nulls(0)}))
    assert empty.names.to_pylist() == [None]


@QUICK
@given(ROWS, st.integers(0, 3))
def test_tidy_equals_a_loop(rows: list[list[str | None] | None], skipped: int) -> None:
    expected = [unique([label.strip() or None for label in row or [] if label]) for row in rows[skipped:]]
    assert tidy(lists(rows).slice(skipped)).to_pylist() == expected
