"""Hierarchies of labels: how they are read, their levels and ancestors against plain walks, and what is wrong with bad ones."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hierarchies import above, hierarchies, level
from hypothesis import given, settings
from hypothesis import strategies as st

from xmc_ray.data import hierarchy as module
from xmc_ray.data.hierarchy import Hierarchy, Lists
from xmc_ray.errors import DataError

QUICK = settings(max_examples=60, deadline=None, derandomize=True)
FRUIT = {"label": ["apple", "apple", "fruit", "pear"], "parent": ["fruit", "tree", "food", "fruit"]}


def read(columns: dict[str, Any]) -> Hierarchy:
    return Hierarchy.from_table(pa.table(columns), "h.parquet")


@QUICK
@given(hierarchies())
def test_levels_and_ancestors_against_a_plain_walk(parents: dict[str, list[str]]) -> None:
    hierarchy = read({"label": list(parents), "parent": pa.array(parents.values(), pa.list_(pa.string()))})
    labels = hierarchy.labels.to_pylist()
    assert labels == sorted({*parents, *(label for row in parents.values() for label in row)})
    assert hierarchy.level.tolist() == [level(label, parents) for label in labels]
    assert set(hierarchy.orphans.to_pylist()) == {label for row in parents.values() for label in row} - set(parents)
    nodes = np.arange(len(labels))[::-2]
    owners, values = hierarchy.ancestors(nodes).take(np.arange(len(nodes)))
    found = {labels[node]: [labels[value] for value in values[owners == place]] for place, node in enumerate(nodes)}
    assert found == {labels[node]: sorted(above(labels[node], parents)) for node in nodes}


@given(st.lists(st.lists(st.integers(0, 9), max_size=4), min_size=1, max_size=6), st.data())
@QUICK
def test_lists_are_taken_in_any_order(rows: list[list[int]], data: st.DataObject) -> None:
    owners = np.repeat(np.arange(len(rows)), [len(row) for row in rows])
    lists = Lists.of(owners, np.array([value for row in rows for value in row], np.int64), len(rows))
    ids = data.draw(st.lists(st.integers(0, len(rows) - 1), max_size=8))
    place, values = lists.take(np.array(ids, np.int64))
    assert list(zip(place.tolist(), values.tolist(), strict=True)) == [(n, x) for n, i in enumerate(ids) for x in rows[i]]


def test_rows_lists_and_integers_say_the_same(tmp_path: Path) -> None:
    """Several rows of a label, or one with a list; whatever the order, and with a name or a null more."""
    lists = {"label": ["pear", "apple", "fruit"], "parent": [["fruit", "fruit"], [" tree", "fruit"], ["food", None]]}
    assert read(FRUIT).digest == read(lists).digest == read({name: FRUIT[name][::-1] for name in FRUIT}).digest
    assert read(FRUIT).digest != read({**FRUIT, "parent": ["fruit", "food", "food", "fruit"]}).digest
    assert read(FRUIT).orphans.to_pylist() == ["food", "tree"]
    numbers = read({"label": [7, 8, 9], "parent": [8, 9, None]})
    assert numbers.labels.to_pylist() == ["7", "8", "9"] and not len(numbers.orphans) and numbers.level.tolist() == [2, 1, 0]
    named = read({**FRUIT, "name": ["Apple", None, "Fruit", None]})
    assert named.names.to_pylist() == ["Apple", None, "Fruit", None, None] and named.digest != read(FRUIT).digest
    path = tmp_path / "h.parquet"
    pq.write_table(pa.table(FRUIT), path)
    assert Hierarchy.read(path).digest == read(FRUIT).digest


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (dict.fromkeys(("label", "parent"), pa.array([], pa.string())), r"the hierarchy is empty: h\.parquet; expected"),
        ({"label": ["a"], "broader": ["b"]}, r"needs one column 'label' and one 'parent': h\.parquet; found label, broader"),
        ({"label": ["a"], "parent": [0.5]}, r"column 'parent' of the hierarchy has a wrong type: .*; found double"),
        ({"label": ["a", " "], "parent": ["b", "c"]}, "null, blank or not UTF-8: .*; found row 1"),
        ({"label": ["a"], "parent": pa.array([b"\xe4"]).view(pa.string())}, "null, blank or not UTF-8: .*; found a parent"),
        ({"label": ["a", "a"], "parent": ["b", "c"], "name": ["A", "B"]}, "label 'a' has several names"),
        ({"label": ["a"], "parent": ["a"]}, r"has a cycle: h\.parquet; found 'a' below 'a'; remove one"),
        ({"label": list("xabcd"), "parent": list("abcad")}, "found 'd' below 'd'|found 'a' below 'b' below 'c' below 'a'"),
    ],
)  # fmt: skip
def test_a_bad_table_is_one_line(columns: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message) as refused:
        read(columns)
    assert "\n" not in str(refused.value)


def test_a_cycle_is_named_whole_and_a_long_one_in_part() -> None:
    """Labels that lie below the cycle, or above it, are no part of it."""
    few = {"label": ["below", "a", "b", "c", "b"], "parent": ["a", "b", "c", "a", "top"]}
    with pytest.raises(DataError, match=r"found '(.)' below '(.)' below '(.)' below '\1'; ") as refused:
        read(few)
    assert "below 'below'" not in str(refused.value) and "top" not in str(refused.value)
    many = [f"{n:02}" for n in range(40)]
    with pytest.raises(DataError, match=r"found '00' below '01' .* below '05' and so on, 40 labels; "):
        read({"label": many, "parent": [*many[1:], "00"]})


def test_a_hierarchy_has_its_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    chain = [f"{n:04}" for n in range(1001)]
    with pytest.raises(DataError, match=r"the hierarchy is too deep: h\.parquet; expected at most 1,000 levels"):
        read({"label": chain[:-1], "parent": chain[1:]})
    hierarchy = read({"label": chain[:-2], "parent": chain[1:-1]})
    assert len(hierarchy.ancestors(np.arange(1000)).values) == 1000 * 999 // 2
    monkeypatch.setattr(module, "_MOST_PAIRS", 1000 * 999 // 2 - 1)
    with pytest.raises(DataError, match="the labels have too many ancestors; expected at most 499,499 in all"):
        hierarchy.ancestors(np.arange(1000))
