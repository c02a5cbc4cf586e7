"""A row of a file becomes a document, or a reject with the reason why not."""

import hashlib
import json
from itertools import product
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xmc_ray.data import documents
from xmc_ray.data.documents import DocumentsConfig, FilterColumn, Rules, text_digest
from xmc_ray.data.rejects import Reject
from xmc_ray.errors import ConfigError

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
GOOD = {"reason": None, "detail": None}


def parse(lines: bytes, **further: Any) -> list[dict[str, Any]]:
    rows = Rules.of(DocumentsConfig(uri="/folder", **further), labelled=True).from_json(lines, "/folder/file", 7).to_pylist()
    assert [(row.pop("file"), row.pop("row")) for row in rows] == [("/folder/file", 7 + place) for place in range(len(rows))]
    return rows


def from_parquet(table: pa.Table, *texts: str, **further: Any) -> list[dict[str, Any]]:
    config = DocumentsConfig(uri="s3://bucket", text=list(texts or ["text"]), **further)
    rules = Rules.of(config, labelled="labels" in table.column_names)
    rows = rules.from_parquet(table, "s3://bucket/file", 0).to_pylist()
    assert [(row.pop("file"), row.pop("row")) for row in rows] == [("s3://bucket/file", place) for place in range(len(rows))]
    return rows


@pytest.mark.parametrize("line", BAD_LINES)
def test_a_bad_line_is_one_rejected_row(line: str) -> None:
    good = b'{"id": "good", "text": "a", "labels": ["x"]}'
    rows = parse(b"\n".join([good, line.encode(), good]))
    assert [(row["reason"], row["detail"]) for row in rows] == [(None, None), BAD_LINES[line], (None, None)]
    assert rows[0] == rows[2] == {"id": "good", "text": "a", "labels": ["x"]} | GOOD
    assert rows == [parse(good)[0], parse(line.encode())[0], parse(good)[0]]


def test_bytes_that_are_no_text_are_rejected() -> None:
    bad, good = parse(b'{"id": "\xff", "text": "a"}\n{"id": "b", "text": "b"}')
    assert (bad["reason"], bad["detail"], good["reason"]) == ("invalid JSON", "UnicodeDecodeError", None)
    latin = pa.array([b"a", b"\xe4", None]).view(pa.string())
    text = pa.array(["x", "y", "z"])
    assert [row["reason"] for row in from_parquet(pa.table({"id": latin, "text": text}))] == [
        None,
        "id is not UTF-8",
        "id is null",
    ]
    assert [row["reason"] for row in from_parquet(pa.table({"id": text, "text": latin}))] == [
        None,
        "text is not UTF-8",
        "text is null",
    ]


@pytest.mark.parametrize(
    "lines", [b'{"id": 1, "text": "a"}', b'\xef\xbb\xbf{"id": "1", "text": "a"}\r', b'  {"text":"a","id":"1"} ']
)
def test_unusual_but_good_lines(lines: bytes) -> None:
    assert parse(lines + b"\n" + lines) == [{"id": "1", "text": "a", "labels": []} | GOOD] * 2


def test_labels_are_unique_and_never_null() -> None:
    labels = [["b", "a", "b", None], None, [], [None], ["c"]]
    expected = [["b", "a"], [], [], [], ["c"]]
    lines = [json.dumps({"id": n, "text": "t", "labels": row}).encode() for n, row in enumerate(labels)]
    assert [row["labels"] for row in parse(b"\n".join(lines))] == expected
    table = pa.table({"id": range(5), "text": ["t"] * 5, "labels": pa.array(labels, pa.large_list(pa.large_string()))})
    assert [row["labels"] for row in from_parquet(table)] == expected
    assert [row["labels"] for row in from_parquet(table.slice(2))] == expected[2:]


def test_string_types_of_parquet() -> None:
    text = pa.array(["a", None, "a"])
    for kind in (pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())):
        rows = from_parquet(pa.table({"id": pa.array([2**63, 1, 0], pa.uint64()), "text": text.cast(kind)}))
        assert [(row["id"], row["text"]) for row in rows] == [(str(2**63), "a"), ("1", None), ("0", "a")]


def test_series_are_strings_and_read_only_if_asked_for() -> None:
    config = DocumentsConfig(uri="/f")
    rules = Rules.of(config, labelled=True, series="series")
    latin = pa.array([b"a", b"\xe4", None]).view(pa.string())
    table = pa.table({"id": range(3), "text": ["t"] * 3, "labels": pa.array([["x"]] * 3), "series": latin})
    found = rules.from_parquet(table, "/f", 0).to_pylist()
    reasons = [None, "series is not UTF-8", None]
    assert [(row["series"], row["reason"]) for row in found] == list(zip(["a", None, None], reasons, strict=True))
    for ids, series in product(((1, 2), ("1", "2")), ((3, 4), ("3", "4"), (3, "4"))):
        lines = [json.dumps({"id": n, "text": "t", "series": own}).encode() for n, own in zip(ids, series, strict=True)]
        found = rules.from_json(b"\n".join(lines), "/f", 0).to_pylist()
        assert [(row["id"], row["series"]) for row in found] == [("1", "3"), ("2", "4")]
    [wrong] = rules.from_json(b'{"id": "1", "text": "t", "series": [1]}', "/f", 0).to_pylist()
    assert (wrong["reason"], wrong["detail"]) == ("series is not a string or an integer", "list")
    (problem,) = rules.problems("/f", [("id", pa.string()), ("text", pa.string()), ("labels", pa.list_(pa.string()))]).values()
    assert "no column 'series'" in str(problem)
    assert "set validation.series to the right column, or to null for none" in str(problem)
    assert "series" not in Rules.of(config, labelled=True).from_json(b'{"id": "1", "text": "t"}', "/f", 0).column_names


@pytest.mark.parametrize("is_optional", [True, False])
def test_filters_are_known_names(is_optional: bool) -> None:
    filters = FilterColumn("tenant", ("7", "acme"), is_optional)
    rules = Rules.of(DocumentsConfig(uri="/f"), labelled=False, filters=filters)
    latin = pa.array([b"acme", b"\xe4", None, b"o" * 200, b"7"]).view(pa.string())
    table = pa.table({"id": range(5), "text": ["t", "t", "t", "t", None], "tenant": latin})
    null = None if is_optional else "filter is null"
    expected = [None, "filter is not UTF-8", null, "filter is unknown", "text is null"]
    found = rules.from_parquet(table, "/f", 0).to_pylist()
    assert [row["reason"] for row in found] == expected
    assert [row["filter"] for row in found] == ["acme", None, None, "o" * 200, "7"]
    assert [row["detail"] for row in found] == [None, None, None, "o" * 100, None]
    lines = [{"id": n, "text": "t"} | part for n, part in enumerate([{"tenant": 7}, {"tenant": "8"}, {}, {"tenant": ["7"]}])]
    reasons = [None, "filter is unknown", null, "filter is not a string or an integer"]
    for some in (lines[:1], lines[1:3], lines):  # at once, and one by one
        found = rules.from_json("\n".join(map(json.dumps, some)).encode(), "/f", 0).to_pylist()
        assert [row["reason"] for row in found] == [reasons[int(row["id"])] for row in found] and len(found) == len(some)
    (problem,) = rules.problems("/f", [("id", pa.string()), ("text", pa.string())]).values()
    assert "no column 'tenant'" in str(problem) and str(problem).endswith("set filters.column to the right column")


@pytest.mark.parametrize("name", ["text", "labels", "id"])
@pytest.mark.parametrize("row", [{"id": 1, "text": "t"}, {"id": "1", "text": 7}, {"id": "1", "text": "t", "labels": ["x"]}])
def test_a_column_named_twice_is_read_alike_in_good_and_in_odd_company(name: str, row: dict[str, Any]) -> None:
    rules, line = Rules.of(DocumentsConfig(uri="/f"), labelled=True, series=name), json.dumps(row).encode()
    alone = rules.from_json(line, "/f", 0).to_pylist()
    assert alone == rules.from_json(line + b"\nnull", "/f", 0).to_pylist()[:1]


PARTS = st.none() | st.text(st.sampled_from(" \t\n\u3000ab"), max_size=3)


@given(st.lists(st.tuples(PARTS, PARTS, PARTS)), st.sampled_from(["\n", " | ", ""]))
@settings(deadline=None)
def test_joined_texts_are_those_of_a_plain_loop(rows: list[tuple[str | None, ...]], separator: str) -> None:
    columns = {name: pa.array(values, pa.string()) for name, values in zip("abc", zip(*rows, strict=True), strict=False)}
    columns = columns or dict.fromkeys("abc", pa.array([], pa.string()))
    found = from_parquet(pa.table({"id": range(len(rows)), **columns}), "a", "b", "c", separator=separator)
    for row, parts in zip(found, rows, strict=True):
        filled = [part for part in parts if part is not None and part.strip()]
        empty = "text is null" if all(part is None for part in parts) else "text is empty"
        assert row["text"] == (separator.join(filled) if filled else None)
        assert row["reason"] == (None if filled else empty)


VALUES = st.none() | st.integers(0, 9) | st.text(max_size=3) | st.lists(st.none() | st.text(max_size=2), max_size=3)
OBJECTS = st.dictionaries(st.sampled_from(["id", "text", "labels", "other"]), VALUES).map(json.dumps)
ODD = st.sampled_from(["", " ", "null", "3", "[]", "{}", "{", "}{", "{}{}", " {} ", '{"other": {"id": "x"}}'])
ODD |= st.sampled_from(['{"id": 1, "id": 2}', '{"id": null, "id": 2}', '{"text": "a", "text": "a"}', '{"labels": [1, true]}'])


@given(st.lists(OBJECTS | ODD, min_size=1))
@settings(deadline=None)
def test_fast_parser_agrees_with_the_slow_one(lines: list[str]) -> None:
    data = "\n".join(lines).strip().encode() or b"{}"
    slow = [column.to_pylist() for column in documents._parse_one_by_one(data, COLUMNS)]
    fast = documents._parse_at_once(data, COLUMNS)
    assert fast is None or [column.to_pylist() for column in fast] == slow


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(*[PARTS | st.just("a\x1fb")] * 3), min_size=1, max_size=5))
def test_fields_keep_their_places_and_are_rejected_as_joined_texts_are(rows: list[tuple[str | None, ...]]) -> None:
    """Kind: a text that spells the mark, or a column that is null, shifts what follows into another field."""
    config = DocumentsConfig(uri="/folder", text=["x", "y", "z"])
    table = pa.table({"id": [f"{n}" for n in range(len(rows))]} | {c: pa.array(v) for c, v in columns_of(rows).items()})
    joined = Rules.of(config, labelled=False).from_parquet(table, "/f", 0)
    fields = Rules.of(config.with_fields(["x", "y", "z"]), labelled=False).from_parquet(table, "/f", 0)
    lines = "\n".join(json.dumps({"id": f"{n}", **dict(zip("xyz", row, strict=True))}) for n, row in enumerate(rows))
    assert Rules.of(config.with_fields(["x", "y", "z"]), labelled=False).from_json(lines.encode(), "/f", 0) == fields
    assert fields["reason"] == joined["reason"]
    for row, text in zip(rows, fields["text"].to_pylist(), strict=True):
        parts = [(part or "").replace("\x1f", " ") if (part or "").strip() else "" for part in row]
        assert text == ("\x1f".join(parts) if any(parts) else None)


def columns_of(rows: list[tuple[str | None, ...]]) -> dict[str, list[str | None]]:
    return {name: [row[number] for row in rows] for number, name in enumerate("xyz")}


def test_columns_that_are_not_the_fields() -> None:
    config = DocumentsConfig(uri="/f", text=["title", "body"])
    assert config.with_fields([]) is config
    for text in (["body", "title"], ["title"], ["title", "title"], ["title", "body", "end"]):
        with pytest.raises(ConfigError, match=r"documents\.text does not list the model's fields: /f; found"):
            DocumentsConfig(uri="/f", text=text).with_fields(["title", "body"])


def test_text_digest() -> None:
    expected = [hashlib.blake2b(text.encode(), digest_size=16).hexdigest() for text in ("", "Größe")]
    assert text_digest(pa.array(["", None, "Größe"])).to_pylist() == [expected[0], None, expected[1]]


def test_ids_are_made_of_file_and_row_where_there_are_none() -> None:
    assert [row["id"] for row in parse(b'{"text": "a"}\n{"text": "b"}', id=None)] == ["file:7", "file:8"]
    rules = Rules.of(DocumentsConfig(uri="/folder/file", id=None), labelled=False)
    assert rules.from_parquet(pa.table({"text": ["a"]}), "/folder/file", 3)["id"].to_pylist() == ["file:3"]
    assert rules.unreadable(2, Reject("gone", "since Monday"), "/folder/file", 3).to_pylist() == [
        {"id": None, "text": None, "file": "/folder/file", "row": row, "reason": "gone", "detail": "since Monday"}
        for row in (3, 4)
    ]


def test_a_text_that_is_too_long_is_rejected_and_not_carried_along() -> None:
    rows = from_parquet(pa.table({"id": ["a", "b"], "text": ["ä" * 5, "ä" * 5 + "x"]}), max_bytes=10)
    assert [(row["reason"], row["detail"]) for row in rows] == [(None, None), ("text is too long", "more than 10 bytes")]
    assert [row["text"] for row in rows] == ["ä" * 5, None]


def test_reasons_can_be_counted() -> None:
    """Whatever a row holds, its reason is one of few."""
    lines = [*BAD_LINES, *(f'{{"id": {n}, "text": "a" {"x" * n}' for n in range(1, 50))]
    reasons = {row["reason"] for row in parse("\n".join(lines).encode())}
    assert len(reasons) == len({reason for reason, _ in BAD_LINES.values()})
    assert str(Reject("invalid JSON", "at character 3")) == "invalid JSON: at character 3" and str(Reject("gone")) == "gone"


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


@pytest.mark.parametrize("labels", [["", " ", "a", "a ", "\ta\n", None], ["\u3000", "a"], ["a"]])
def test_blank_labels_are_no_labels_and_white_space_is_cut(labels: list[str | None]) -> None:
    """Kind of fault: labels and names were taken as they came."""
    (row,) = parse(json.dumps({"id": "1", "text": "t", "labels": labels}).encode())
    assert (row["labels"], row["reason"]) == (["a"], None)
    table = pa.table({"id": ["1"], "text": ["t"], "labels": [labels]})
    assert from_parquet(table)[0]["labels"] == ["a"]


def test_labels_that_are_not_utf8_make_a_reject() -> None:
    latin = pa.array([b"a", b"\xe4", b"c"]).cast(pa.string(), safe=False)
    labels = pa.ListArray.from_arrays(pa.array([0, 2, 3], pa.int32()), latin)
    rows = from_parquet(pa.table({"id": range(2), "text": ["t"] * 2, "labels": labels}))
    assert [(row["labels"], row["reason"]) for row in rows] == [([], "labels are not UTF-8"), (["c"], None)]


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
