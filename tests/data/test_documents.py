"""A row of a file becomes a document, or a reject with the reason why not."""

import hashlib
import json
from itertools import product

import pyarrow as pa
import pytest
from document_rows import from_parquet, parse
from hypothesis import given, settings
from hypothesis import strategies as st

from xmc_ray.data.documents import DocumentsConfig, FilterColumn, Rules, text_digest
from xmc_ray.data.rejects import Reject
from xmc_ray.errors import ConfigError


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


def test_labels_are_unique_and_never_null() -> None:
    labels = [["b", "a", "b", None], None, [], [None], ["c"]]
    expected = [["b", "a"], [], [], [], ["c"]]
    lines = [json.dumps({"id": n, "text": "t", "labels": row}).encode() for n, row in enumerate(labels)]
    assert [row["labels"] for row in parse(b"\n".join(lines))] == expected
    table = pa.table({"id": range(5), "text": ["t"] * 5, "labels": pa.array(labels, pa.large_list(pa.large_string()))})
    assert [row["labels"] for row in from_parquet(table)] == expected
    assert [row["labels"] for row in from_parquet(table.slice(2))] == expected[2:]


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
