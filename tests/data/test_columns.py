"""Kind of fault: the Python interface does not check its arguments (sample letters-for-labels)."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch

from xmc_ray.data.columns import document_columns, label_column, name_table, text_column
from xmc_ray.errors import DataError

TEXTS = ["a", ""]
GOOD_TEXTS: list[Any] = [
    *(TEXTS, tuple(TEXTS), (text for text in TEXTS)),
    *(np.array(TEXTS), np.array(TEXTS, object), pd.Series(TEXTS), pd.Series(TEXTS, dtype="string"), pd.Index(TEXTS)),
    *(pa.array(TEXTS), pa.chunked_array([TEXTS]), pa.array(TEXTS).dictionary_encode()),
]
BAD_TEXTS = [
    ("one text", r"texts are no list; found str 'one text'; expected a list of strings; for one of them, write \[texts\]"),
    (b"bytes", "texts are no list; found bytes"),
    ({"a": 1}, "texts are no list; found dict"),
    ({"a"}, "texts are no list; found set"),
    (None, "texts are no list; found NoneType"),
    (7, "texts are no list; found int 7"),
    (np.array("a"), "texts are no list; found ndarray"),
    (np.array([["a"]]), "texts are no list; found ndarray"),
    (pd.DataFrame({"text": ["a"]}), "texts are no list; found DataFrame"),
    (pa.table({"text": ["a"]}), "texts are no list; found Table"),
    (["a", None], r"not a string: texts\[1\]; found NoneType"),
    (pd.Series(["a", None]), r"not a string: texts\[1\]"),
    (["a", float("nan")], r"not a string: texts\[1\]; found float nan"),
    ([b"a"], r"not a string: texts\[0\]; found bytes b'a'"),
    (["a", 3], r"not a string: texts\[1\]; found int 3"),
    ([["a"]], r"not a string: texts\[0\]; found list"),
    (["\ud800"], r"not UTF-8: texts\[0\]"),
    (pa.array([1, 2]), r"not a string: texts\[0\]"),
]


@pytest.mark.parametrize("texts", GOOD_TEXTS, ids=lambda texts: type(texts).__name__)
def test_texts_of_all_containers(texts: Any) -> None:
    assert text_column(texts).to_pylist() == TEXTS


@pytest.mark.parametrize(("texts", "told"), BAD_TEXTS)
def test_what_is_no_list_of_texts_is_an_error_of_one_line(texts: Any, told: str) -> None:
    with pytest.raises(DataError, match=told):
        text_column(texts)


FIELDS = ["title", "body"]
TABLE = {"title": ["a", None], "body": ["b\x1fc", float("nan")]}


@pytest.mark.parametrize(
    "texts",
    [
        *(TABLE, pd.DataFrame(TABLE), pa.table({"body": ["b\x1fc", None], "title": ["a", None]})),
        [{"title": "a", "body": "b\x1fc"}, {}],
        iter([{"body": "b\x1fc", "title": "a"}, {"title": None}]),
    ],
    ids=lambda texts: type(texts).__name__,
)
def test_texts_with_fields_of_all_containers(texts: Any) -> None:
    assert text_column(texts, fields=FIELDS).to_pylist() == ["a\x1fb c", "\x1f"]


@pytest.mark.parametrize(
    ("texts", "told"),
    [
        (["a"], r"a text without fields: texts\[0\]; found str 'a'; expected a mapping of the fields title, body"),
        ("a", "texts are no list; found str 'a'; expected a list of mappings, or a table, of the fields title, body"),
        ([{"title": "a", "end": "b"}], r"unknown field: texts\[0\]; found 'end'; expected title, body"),
        ({"title": ["a"], "body": ["b"], "end": ["c"]}, "unknown field: texts; found 'end'; expected title, body"),
        ({"title": ["a"]}, "texts lack a field; found title; expected title, body"),
        ({"title": ["a"], "body": []}, "the fields of texts differ in length; found 0, 1"),
        ({"title": ["a"], "body": "b"}, r"texts\['body'\] are no list"),
        ([{"title": "a"}, {"title": 3}], r"not a string: texts\[1\], title; found int 3"),
        ([{"title": "\ud800"}], r"not UTF-8: texts\[0\], title"),
    ],
)
def test_texts_with_wrong_fields_are_an_error_of_one_line(texts: Any, told: str) -> None:
    with pytest.raises(DataError, match=told) as caught:
        text_column(texts, fields=FIELDS)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "make",
    [
        *(list, tuple, iter, pd.Series, lambda rows: pa.array([[str(label) for label in row or []] for row in rows])),
        lambda rows: [None if row is None else np.array(row) for row in rows],
        lambda rows: [None if row is None else set(row) for row in rows],
        lambda rows: np.array([*rows, None], object)[:-1],
        lambda rows: pd.Series([float("nan") if row is None else row for row in rows]),
    ],
)
def test_labels_of_all_containers(make: Callable[[Any], Any]) -> None:
    """Integers are decimal text, as in files; blanks are no labels, white space is cut, repeated ones count once."""
    found = label_column(make([[2, 10], None, []])).to_pylist()
    assert [sorted(row) for row in found] == [["10", "2"], [], []]
    texts = label_column(make([["b", " b ", "", "a"], ["\u3000"]])).to_pylist()
    assert [sorted(row) for row in texts] == [["a", "b"], []]


@pytest.mark.parametrize(
    ("labels", "told"),
    [
        (["fruit"], r"no list: labels\[0\]; found str 'fruit'; expected a list of .* for each document; for one label, write"),
        (np.array(["fruit"]), r"no list: labels\[0\]; found str_ "),
        ([1], r"no list: labels\[0\]; found int 1"),
        (pa.array([1]), r"no list: labels\[0\]; found int 1"),
        (np.array([[0, 1]]), r"labels are no list; found ndarray of shape \(1, 2\)"),
        (torch.tensor([[0, 1]]), r"labels are no list; found Tensor of shape \(1, 2\)"),
        ([[10**5000]], r"not a label: labels\[0\]; found Exceeds the limit"),
        (pd.DataFrame({"a": [1]}), "labels are no list; found DataFrame"),
        ("a", "labels are no list; found str"),
        (None, "labels are no list; found NoneType"),
        ([["a"], [1.5]], r"not a string: labels\[1\]; found float 1.5; expected strings or integers"),
        ([[True]], r"not a string: labels\[0\]; found bool True"),
        ([[b"a"]], r"not a string: labels\[0\]; found bytes b'a'"),
        ([[["a"]]], r"not a string: labels\[0\]; found list"),
        ([{"a": 1}], r"no list: labels\[0\]; found dict"),
        ([["\ud800"]], r"not UTF-8: labels\[0\]"),
    ],
)
def test_what_is_no_list_of_labels_is_an_error_of_one_line(labels: Any, told: str) -> None:
    with pytest.raises(DataError, match=told):
        label_column(labels)


def test_what_is_missing_is_no_label_however_it_is_spelt() -> None:
    missing = [None, float("nan"), np.float32("nan"), pd.NA, pd.NaT]
    assert label_column(missing).to_pylist() == [[]] * 5
    assert label_column([["a", *missing]]).to_pylist() == [["a"]]
    table = name_table({f"l{number}": name for number, name in enumerate(missing)})
    assert table is not None and table["name"].null_count == 5


def test_lengths_and_names() -> None:
    with pytest.raises(DataError, match="differ in length; found 1 texts, 2 label lists"):
        document_columns(iter(["a"]), [[], []])
    assert document_columns([], [])[1].type == pa.list_(pa.string())
    assert name_table(None) is None
    table = name_table({1: "One", " b ": " Bee ", "c": None, "d": " "})
    assert table is not None and table.to_pylist() == [
        {"label": "1", "name": "One"},
        {"label": "b", "name": "Bee"},
        {"label": "c", "name": None},
        {"label": "d", "name": None},
    ]
    for names, told in (
        (["a"], "names are no mapping; found list"),
        ({1.5: "a"}, "not a string: names; found float"),
        ({"a": ["A"]}, r"not a string: names\['a'\]; found list"),
        ({"a": "A", "a ": "Ah"}, "label 'a' has several names"),
    ):
        with pytest.raises(DataError, match=told):
            name_table(names)  # type: ignore[arg-type]
