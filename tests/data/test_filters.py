"""Filters: which labels each allows, against sets; and what is wrong with settings and tables, in one line each."""

import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xmc_ray.data.filters import FilterConfig, FiltersConfig, LabelFilters, resolve
from xmc_ray.errors import ConfigError, DataError, XmcError

LABELS = pa.array(["a/1", "a/2", "b/1", "b/2", "c"])
ROWS = [
    {"label": "a/1", "tenant": "acme", "scheme": ["x", "y"], "level": 1},
    {"label": "a/2", "tenant": "acme", "scheme": ["y"], "level": 2},
    {"label": " b/1 ", "tenant": "bolt", "scheme": [], "level": 1},
    {"label": "b/1", "tenant": "acme", "scheme": None, "level": None},
    {"label": "unknown", "tenant": "coop", "scheme": ["z"], "level": 3},
    {"label": None, "tenant": "bolt", "scheme": ["x"], "level": 1},
    {"label": "c", "tenant": None, "scheme": ["x"], "level": 2},
]


@pytest.fixture
def table(tmp_path: Path) -> str:
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "labels.parquet")
    return str(tmp_path / "labels.parquet")


def allowed(filters: LabelFilters) -> dict[str, list[str]]:
    """The labels of each filter."""
    masks = [filters.allowed(number) for number in range(len(filters))]
    return {
        name: LABELS.filter(pa.array(mask)).to_pylist() for name, mask in zip(filters.names.to_pylist(), masks, strict=True)
    }


@given(st.dictionaries(st.text(max_size=2), st.sets(st.integers(0, 6), min_size=1), min_size=1, max_size=5), st.data())
def test_pairs_of_documents_and_labels_are_admitted_as_sets_say(sets: dict[str, set[int]], data: st.DataObject) -> None:
    """And labels beyond the index's, those of a hierarchy, always."""
    filters = LabelFilters.over({name: np.array(sorted(ids)) for name, ids in sets.items()}, 7, column="tenant")
    names = data.draw(st.lists(st.sampled_from(sorted(sets)), min_size=1, max_size=6))
    pairs = data.draw(st.lists(st.tuples(st.integers(0, len(names) - 1), st.integers(0, 8)), max_size=20))
    row_P, label_P = np.array(pairs, np.int64).reshape(-1, 2).T
    admitted = filters.of_documents(pa.array(names), len(names)).admit(row_P, label_P)
    assert admitted.tolist() == [label >= 7 or label in sets[names[row]] for row, label in pairs]


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"allow": ["c", " a/1"]}, ["a/1", "c"]),
        ({"allow": ["c"], "allow_prefixes": ["b/"]}, ["b/1", "b/2", "c"]),
        ({"deny": ["a/1"], "deny_prefixes": ["b"]}, ["a/2", "c"]),
        ({"allow_prefixes": ["a/", "c"], "deny": ["a/1"]}, ["a/2", "c"]),
        ({"allow_where": {"tenant": ["acme"]}}, ["a/1", "a/2", "b/1"]),
        ({"allow_where": {"scheme": ["x"]}}, ["a/1", "c"]),
        ({"allow_where": {"level": ["2"]}}, ["a/2", "c"]),
        ({"allow_where": {"tenant": ["acme"], "scheme": ["x", "y"]}}, ["a/1", "a/2"]),
        ({"deny_where": {"tenant": ["acme"]}}, ["b/2", "c"]),
        ({"allow": ["b/2"], "allow_where": {"level": ["1"]}, "deny_where": {"tenant": ["bolt"]}}, ["a/1", "b/2"]),
    ],
)
def test_one_filter_for_all(config: dict[str, Any], expected: list[str], table: str) -> None:
    needs_table = any(name.endswith("where") for name in config)
    filters = resolve(FiltersConfig(**config, table=table if needs_table else None), LABELS)
    assert allowed(filters) == {"": expected} and filters.documents_column is None
    assert filters.of_documents(None, 3).number_D.tolist() == [0, 0, 0]


def test_filters_by_name_and_by_a_column_of_the_table(table: str) -> None:
    """The filter of the run holds besides; a label of several rows is that of all of them."""
    named = {"all": FilterConfig(), "b": FilterConfig(allow_prefixes=["b"])}
    config = FiltersConfig(column="who", table=table, by="tenant", named=named, default="all", deny=["a/2"], leave_out=True)
    filters = resolve(config, LABELS)
    assert allowed(filters) == {"acme": ["a/1", "b/1"], "all": ["a/1", "b/1", "b/2", "c"], "b": ["b/1", "b/2"], "bolt": ["b/1"]}
    column = filters.documents_column
    assert column is not None and column == ("who", ("acme", "all", "b", "bolt"), True)
    of_documents = filters.of_documents(pa.array(["bolt", None, "acme"]), 3)
    assert [filters.names[number].as_py() for number in of_documents.number_D.tolist()] == ["bolt", "all", "acme"]
    with pytest.raises(DataError, match="documents without a known filter; found 1 of 2"):
        filters.of_documents(pa.array(["bolt", "coop"]), 2)
    with pytest.raises(DataError, match="documents without a known filter"):
        resolve(replace(config, default=None), LABELS).of_documents(pa.array([None], pa.string()), 1)
    by_scheme = resolve(FiltersConfig(column="who", table=table, by="scheme", leave_out=True), LABELS)
    assert allowed(by_scheme) == {"x": ["a/1", "c"], "y": ["a/1", "a/2"]}
    by_level = resolve(FiltersConfig(column="who", table=table, by="level", leave_out=True), LABELS)
    assert allowed(by_level) == {"1": ["a/1", "b/1"], "2": ["a/2", "c"]}


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.dictionaries(st.text(max_size=3), st.sets(st.integers(0, 8), min_size=1), min_size=1))
def test_what_is_kept_of_a_filter_is_the_filter(sets: dict[str, set[int]]) -> None:
    """And no more than half of the labels of each."""
    filters = LabelFilters.over({name: np.array(list(ids)) for name, ids in sets.items()}, 9)
    filters = pickle.loads(pickle.dumps(filters))
    assert {name: set(np.flatnonzero(filters.allowed(n)).tolist()) for n, name in enumerate(filters.names.to_pylist())} == sets
    assert np.diff(filters.start_F1).max() <= 4


def test_the_digest_is_that_of_what_is_resolved(table: str) -> None:
    """Not of where it came from, nor of the order in which it is given."""
    config = FiltersConfig(column="who", named={"a": FilterConfig(allow=["a/1", "c"]), "b": FilterConfig(deny=["c"])})
    digest = resolve(config, LABELS).digest
    turned = {"b": FilterConfig(deny_prefixes=["c"]), "a": FilterConfig(allow=["c", "a/1"])}
    assert resolve(replace(config, named=turned), LABELS).digest == digest
    others = [
        replace(config, default="a"),
        replace(config, column="whose"),
        replace(config, deny=["a/2"]),
        replace(config, named=config.named | {"c": FilterConfig()}),
        replace(config, named={"b": config.named["a"], "a": config.named["b"]}),
    ]
    assert len({digest, *(resolve(other, LABELS).digest for other in others)}) == 6
    by_table = FiltersConfig(allow_where={"tenant": ["acme"]}, table=table)
    before = resolve(by_table, LABELS).digest
    pq.write_table(pa.Table.from_pylist(ROWS[::-1]), table)
    assert resolve(by_table, LABELS).digest == before
    pq.write_table(pa.Table.from_pylist(ROWS[1:]), table)
    assert resolve(by_table, LABELS).digest != before


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "unknown labels": (
        {"deny": ["c", *"defghij"]},
        r"filters\.deny has labels that no label of the bundle has; found 7 of 8, such as 'd', 'e', 'f', 'g', 'h' and 2 more; "
        r"correct them, or set filters\.leave_out",
    ),
    "an unknown beginning": (
        {"allow_prefixes": ["a", "z"]},
        r"filters\.allow_prefixes has beginnings .* found 1 of 2, such as 'z'",
    ),
    "an unknown value": (
        {"allow_where": {"tenant": ["coop"]}, "table": True},
        r"filters\.allow_where\.tenant has values .* found 1 of 1, such as 'coop'",
    ),
    "a value of by without a label": (
        {"column": "who", "by": "tenant", "table": True},
        "a filter leaves no label at all; found filters 'coop'; expected a label of the bundle in each filter",
    ),
    "none of by has a label": (
        {"column": "who", "by": "tenant", "table": True, "deny": LABELS.to_pylist()},
        "a filter leaves no label at all; found filters 'acme', 'bolt'",
    ),
    "no label": ({"allow": []}, "a filter leaves no label at all; expected"),
    "allowed and denied": ({"allow": ["c"], "deny": ["c"]}, "a filter leaves no label at all"),
    "no label by name": (
        {"column": "who", "named": {"one": FilterConfig(allow=["c"])}, "deny": ["c"]},
        "a filter leaves no label at all; found filters 'one'",
    ),
    "no default": (
        {"column": "who", "named": {"one": FilterConfig()}, "default": "two"},
        r"filters\.default is no filter; found two; expected one of 'one'",
    ),
    "twice": (
        {"column": "who", "by": "tenant", "table": True, "named": {"acme": FilterConfig()}},
        r"two filters have one name; found acme; rename filters\.named\.acme",
    ),
    "no column of the table": (
        {"column": "who", "by": "colour", "table": True},
        r"the label table needs one column 'colour': .*; found label, tenant, scheme, level",
    ),
    "a column of a wrong type": (
        {"allow_where": {"weight": ["1"]}, "table": pa.table({"label": ["c"], "weight": [0.5]})},
        "column 'weight' of the label table has a wrong type: .*; found double",
    ),
    "several labels a row": (
        {"allow_where": {"level": ["1"]}, "table": pa.table({"label": [["a/1", "c"]], "level": [1]})},
        "column 'label' of the label table has a wrong type: .*; found list<.*expected strings or integers, one a row",
    ),
    "no labels in the table": (
        {"allow_where": {"weight": ["1"]}, "table": pa.table({"weight": ["1"]})},
        "the label table needs one column 'label'",
    ),
    "no table": ({"by": "tenant", "column": "who"}, r"filters by columns of labels need a table; set filters\.table"),
    "no table for a name": (
        {"column": "who", "named": {"a": FilterConfig(deny_where={"tenant": ["acme"]})}},
        "filters by columns of labels need a table",
    ),
    "a table for nothing": ({"allow": ["c"], "table": True}, r"no filter reads filters\.table"),
    "names without a column": ({"named": {"a": FilterConfig()}}, r"need a column of the documents; set filters\.column"),
    "a default without a column": ({"default": "a"}, r"need a column of the documents; set filters\.column"),
    "a column without names": ({"column": "who"}, r"filters\.column needs filters with names"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_filters_are_one_clear_line(case: str, table: str, tmp_path: Path) -> None:
    values, message = BAD[case]
    place = values.get("table")
    if isinstance(place, pa.Table):
        pq.write_table(place, tmp_path / "other.parquet")
    uri = {"table": str(tmp_path / "other.parquet") if isinstance(place, pa.Table) else table} if place is not None else {}
    with pytest.raises(XmcError, match=message) as refused:
        resolve(FiltersConfig(**values | uri), LABELS)
    assert "\n" not in str(refused.value)


def test_what_no_label_has_may_be_left_out(table: str) -> None:
    filters = resolve(FiltersConfig(allow=["c", "d"], deny_prefixes=["z"], leave_out=True), LABELS)
    assert allowed(filters) == {"": ["c"]}
    with pytest.raises(ConfigError, match="a filter leaves no label at all"):
        resolve(FiltersConfig(allow=["d"], leave_out=True), LABELS)
    with pytest.raises(ConfigError, match=r"no filter has a label of the bundle: .*; found column 'tenant'"):
        resolve(FiltersConfig(column="who", by="tenant", table=table, leave_out=True), pa.array(["something else"]))


def test_blank_cells_name_no_filter_and_others_are_trimmed(tmp_path: Path) -> None:
    (tmp_path / "labels.csv").write_text("label,tenant\n a/1 , acme\na/2,acme \nb/1,  \n")
    filters = resolve(FiltersConfig(column="who", by="tenant", table=str(tmp_path / "labels.csv")), LABELS)
    assert allowed(filters) == {"acme": ["a/1", "a/2"]}


def test_many_filters_take_memory_by_their_labels(tmp_path: Path) -> None:
    n_labels, n_tenants = 20_000, 5_000
    labels = pa.array([f"l{n}" for n in range(n_labels)])
    tenants = [f"t{n % n_tenants}" for n in range(n_labels)]
    pq.write_table(pa.table({"label": labels, "tenant": tenants}), tmp_path / "labels.parquet")
    filters = resolve(FiltersConfig(column="who", by="tenant", table=str(tmp_path / "labels.parquet")), labels)
    assert len(filters) == n_tenants and len(filters.id_E) == n_labels
    assert np.flatnonzero(filters.allowed(filters.names.to_pylist().index("t7"))).tolist() == [7, 5007, 10007, 15007]
