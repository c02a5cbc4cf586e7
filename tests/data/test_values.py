"""Values are the same out of columns and out of JSON lines, parsed at once or one by one; those that do not fit are rejects."""

import json
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pytest
from document_rows import GOOD, from_parquet, parse
from hypothesis import given, settings
from hypothesis import strategies as st

from xmc_ray.data import values
from xmc_ray.data.documents import DocumentsConfig, Rules
from xmc_ray.data.rejects import Reject

COLUMNS = Rules.of(DocumentsConfig(uri="x"), labelled=True).columns

# A line, and what is wrong with it: what can be counted, and the particulars.
BAD_LINES: dict[str, tuple[str, str | None]] = {
    '{"id": "1", "text": null}': ("text is null", None),
    '{"id": "2"}': ("text is null", None),
    '{"id": "3", "text": " \\n\\u3000"}': ("text is empty", None),
    '{"id": "4", "text": 7}': ("text is not a string", "int"),
    '{"id": "5", "text": ["a"]}': ("text is not a string", "list"),
    '{"text": "a"}': ("id is null", None),
    '{"id": "", "text": "a"}': ("id is empty", None),
    '{"id": 1.5, "text": "a"}': ("id is not a string or an integer", "float"),
    '{"id": true, "text": "a"}': ("id is not a string or an integer", "bool"),
    '{"id": "6", "text": "a", "labels": "b"}': ("labels is not a list of strings or integers", "str"),
    '{"id": "7", "text": "a", "labels": ["b", 1.5]}': ("labels is not a list of strings or integers", "list"),
    "null": ("not a JSON object", "NoneType"),
    '["a"]': ("not a JSON object", "list"),
    '{"id": "8", "text": "a"': ("invalid JSON", "Expecting ',' delimiter at character 23"),
    '{"id": "9", "text": "\\ud800"}': ("invalid JSON", "UnicodeEncodeError"),
    "[" * 100_000: ("invalid JSON", "RecursionError"),
}


@pytest.mark.parametrize("line", BAD_LINES)
def test_a_bad_line_is_one_rejected_row(line: str) -> None:
    good = b'{"id": "good", "text": "a", "labels": ["x"]}'
    rows = parse(b"\n".join([good, line.encode(), good]))
    assert [(row["reason"], row["detail"]) for row in rows] == [(None, None), BAD_LINES[line], (None, None)]
    assert rows[0] == rows[2] == {"id": "good", "text": "a", "labels": ["x"]} | GOOD
    assert rows == [parse(good)[0], parse(line.encode())[0], parse(good)[0]]


@pytest.mark.parametrize(
    "lines", [b'{"id": 1, "text": "a"}', b'\xef\xbb\xbf{"id": "1", "text": "a"}\r', b'  {"text":"a","id":"1"} ']
)
def test_unusual_but_good_lines(lines: bytes) -> None:
    assert parse(lines + b"\n" + lines) == [{"id": "1", "text": "a", "labels": []} | GOOD] * 2


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"id": "1", "text": "a", "note": "caf\xe9"}', None),  # what is not wanted need not be UTF-8
        (b'{"id": "1", "text": "a", "note": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", None),
        (b'{"id": "1", "text": "caf\xe9"}', "invalid JSON"),
        (b'{"id": "1", "text": "\xed\xa0\xbd\xed\xb8\x80"}', "invalid JSON"),  # surrogates, as some databases export them
    ],
)
def test_what_becomes_of_a_line_does_not_depend_on_the_lines_beside_it(line: bytes, reason: str | None) -> None:
    """Kind of fault: chunks are cut in one place for one pass and elsewhere for the next, and an id came twice or never."""
    good, odd = b'{"id": "good", "text": "a"}', b'{"id": "3", "text": 7}'
    alone = parse(line)
    assert [row["reason"] for row in alone] == [reason]
    for company in (good, odd):
        assert parse(line + b"\n" + company) == alone + parse(company)


def test_reasons_can_be_counted() -> None:
    """Whatever a row holds, its reason is one of few."""
    lines = [*BAD_LINES, *(f'{{"id": {n}, "text": "a" {"x" * n}' for n in range(1, 50))]
    reasons = {row["reason"] for row in parse("\n".join(lines).encode())}
    assert len(reasons) == len({reason for reason, _ in BAD_LINES.values()})
    assert str(Reject("invalid JSON", "at character 3")) == "invalid JSON: at character 3" and str(Reject("gone")) == "gone"


def test_string_types_of_parquet() -> None:
    text = pa.array(["a", None, "a"])
    for kind in (pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())):
        rows = from_parquet(pa.table({"id": pa.array([2**63, 1, 0], pa.uint64()), "text": text.cast(kind)}))
        assert [(row["id"], row["text"]) for row in rows] == [(str(2**63), "a"), ("1", None), ("0", "a")]


@pytest.mark.parametrize("name", ["text", "labels", "id"])
@pytest.mark.parametrize("row", [{"id": 1, "text": "t"}, {"id": "1", "text": 7}, {"id": "1", "text": "t", "labels": ["x"]}])
def test_a_column_named_twice_is_read_alike_in_good_and_in_odd_company(name: str, row: dict[str, Any]) -> None:
    rules, line = Rules.of(DocumentsConfig(uri="/f"), labelled=True, series=name), json.dumps(row).encode()
    alone = rules.from_json(line, "/f", 0).to_pylist()
    assert alone == rules.from_json(line + b"\nnull", "/f", 0).to_pylist()[:1]


VALUES = st.none() | st.integers(0, 9) | st.text(max_size=3) | st.lists(st.none() | st.text(max_size=2), max_size=3)
OBJECTS = st.dictionaries(st.sampled_from(["id", "text", "labels", "other"]), VALUES).map(json.dumps)
ODD = st.sampled_from(["", " ", "null", "3", "[]", "{}", "{", "}{", "{}{}", " {} ", '{"other": {"id": "x"}}'])
ODD |= st.sampled_from(['{"id": 1, "id": 2}', '{"id": null, "id": 2}', '{"text": "a", "text": "a"}', '{"labels": [1, true]}'])


@given(st.lists(OBJECTS | ODD, min_size=1))
@settings(deadline=None)
def test_fast_parser_agrees_with_the_slow_one(lines: list[str]) -> None:
    data = "\n".join(lines).strip().encode() or b"{}"
    slow = [column.to_pylist() for column in values._parse_one_by_one(data, COLUMNS)]
    fast = values._parse_at_once(data, COLUMNS)
    assert fast is None or [column.to_pylist() for column in fast] == slow


# --- one answer in both formats (kind of fault: one odd file, or row, was taken in one format and refused in the other)


ITEMS: dict[str, st.SearchStrategy[Any]] = {
    "string": st.text(st.sampled_from(" \t\u3000ab"), max_size=3),
    "integer": st.integers(-9, 2**63 - 1),
    "fraction": st.floats(allow_nan=False, allow_infinity=False, width=32),
    "truth": st.booleans(),
    "object": st.fixed_dictionaries({"x": st.integers(0, 9)}),
    "nothing": st.none(),
}
KINDS_OF_COLUMN = ITEMS | {f"lists of {name}": st.lists(st.none() | item, max_size=3) for name, item in ITEMS.items()}
KINDS_OF_COLUMN |= {"lists of lists": st.lists(st.lists(ITEMS["string"], max_size=2), max_size=2)}


@given(st.data(), st.integers(1, 4))
@settings(deadline=None, max_examples=300)
def test_parquet_and_json_lines_give_the_same_for_the_same_odd_rows(data: st.DataObject, rows: int) -> None:
    """A column of each kind, or none at all, or of nulls: the same documents, labels and reasons, whatever the format."""
    columns = {}
    for name in ("id", "text", "labels", "series"):
        kind = data.draw(st.none() | st.sampled_from(sorted(KINDS_OF_COLUMN)), label=name)
        if kind is not None:
            columns[name] = data.draw(st.lists(st.none() | KINDS_OF_COLUMN[kind], min_size=rows, max_size=rows))
    rules = Rules.of(DocumentsConfig(uri="/f"), labelled=True, series="series")
    table = pa.table({**columns, "other": range(rows)})
    lines = [json.dumps({name: values[row] for name, values in columns.items()}) for row in range(rows)]
    as_json = [rules.from_json(part.encode(), "/f", 0) for part in ("\n".join(lines), *lines)]
    together, *alone = ([{**row, "detail": None, "row": None} for row in part.to_pylist()] for part in as_json)
    assert together == [row for part in alone for row in part]
    assert [{**row, "detail": None, "row": None} for row in rules.from_parquet(table, "/f", 0).to_pylist()] == together


LISTS = [
    pa.list_(pa.string()),
    pa.large_list(pa.large_string()),
    pa.list_(pa.string(), 2),
    pa.list_(pa.binary()),
    pa.list_(pa.int32()),
    pa.list_(pa.int64(), 2),
]


@pytest.mark.parametrize("kind", LISTS, ids=str)
def test_labels_of_all_types_of_lists(kind: pa.DataType) -> None:
    """Kind of fault: labels were taken as they came; integers are decimal text, in Parquet and in JSON lines."""
    rows = [["2", "1"], None, ["3", "3"]]
    labels = pa.array([row and [int(part) for part in row] for row in rows] if "int" in str(kind) else rows, kind)
    expected = [["2", "1"], [], ["3"]]
    columns = [labels, labels.dictionary_encode() if pa.types.is_primitive(kind) else labels]
    if not pa.types.is_fixed_size_list(kind):
        values = pc.list_flatten(labels)
        columns.append(pa.ListArray.from_arrays(pa.array([0, 2, 2, 4], pa.int32()), values.dictionary_encode()))
        columns.append(pa.ListViewArray.from_arrays(pa.array([0, 2, 2], pa.int32()), pa.array([2, 0, 2], pa.int32()), values))
    for column in columns:
        table = pa.table({"id": range(3), "text": ["t"] * 3, "labels": column})
        assert [(row["labels"], row["reason"]) for row in from_parquet(table)] == [(row, None) for row in expected]
        assert [row["labels"] for row in from_parquet(table.slice(1))] == expected[1:]


def test_odd_columns_reject_rows_and_not_the_whole_file() -> None:
    """Kind of fault: one odd file takes the whole job down."""
    table = pa.table({"id": [1, 2], "text": ["a", None], "labels": pa.nulls(2)})
    assert [row["reason"] for row in from_parquet(table)] == [None, "text is null"]
    table = pa.table({"id": pa.array([1, None], pa.timestamp("ns")), "text": ["a", "b"]})
    rows = from_parquet(table)
    assert [row["reason"] for row in rows] == ["id is not a string or an integer", "id is null"]
    assert [row["detail"] for row in rows] == ["timestamp[ns]", None]
    twice = pa.Table.from_arrays([pa.array([1]), pa.array(["a"]), pa.array(["b"])], ["id", "text", "text"])
    (row,) = Rules.of(DocumentsConfig(uri="/f"), labelled=False).from_parquet(twice, "/f", 0).to_pylist()
    assert (row["reason"], row["detail"]) == ("text is given twice", "2 columns 'text'")
    (row,) = parse(b'{"id": 1, "text": "a", "text": "b"}')
    assert (row["reason"], row["detail"]) == ("text is given twice", "keys 'text'")
    (row,) = parse(b'{"id": 1, "text": "a", "other": 1, "other": {"text": 1, "text": 2}}')
    assert row["reason"] is None
