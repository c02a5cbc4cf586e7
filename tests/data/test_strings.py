"""Strings out of columns of any type, as a plain loop takes them."""

import decimal

import pyarrow as pa
import pytest

from xmc_ray.data.strings import as_strings, is_text, keep_utf8, plain, trimmed

TEXTS = ["a", None, "ä"]
STRINGS = [
    *(pa.array(TEXTS).cast(kind) for kind in (pa.string(), pa.large_string(), pa.string_view())),
    *(pa.array(TEXTS).cast(pa.binary()).cast(kind) for kind in (pa.binary(), pa.large_binary(), pa.binary_view())),
    pa.array(TEXTS).dictionary_encode(),
    pa.chunked_array([pa.array(TEXTS[:1]), pa.array(TEXTS[1:])]),
    pa.RunEndEncodedArray.from_arrays([1, 2, 3], pa.array(TEXTS)),
]


@pytest.mark.parametrize("column", STRINGS, ids=lambda column: str(column.type))
def test_strings_of_all_types(column: pa.Array) -> None:
    texts, is_wrong = as_strings(column, integers=False)
    assert (texts.to_pylist(), is_wrong.to_pylist(), texts.type) == (TEXTS, [False] * 3, pa.string())
    assert is_text(column.type)


INTEGERS = [pa.int8(), pa.uint64(), pa.int64(), pa.decimal128(10, 0), pa.dictionary(pa.int8(), pa.int64())]


@pytest.mark.parametrize("kind", INTEGERS, ids=str)
def test_integers_are_decimal_text_where_they_are_allowed(kind: pa.DataType) -> None:
    numbers = [decimal.Decimal(7) if pa.types.is_decimal(kind) else 7, None]
    column = pa.array(numbers, kind)
    assert as_strings(column, integers=True)[0].to_pylist() == ["7", None]
    texts, is_wrong = as_strings(column, integers=False)
    assert (texts.to_pylist(), is_wrong.to_pylist()) == ([None, None], [True, False])


@pytest.mark.parametrize(
    "column",
    [
        *(pa.array(values) for values in ([1.5, None], [True, None], [["a"], None], [{"a": 1}, None])),
        *(pa.array([1, None], kind) for kind in (pa.timestamp("ns"), pa.date32(), pa.duration("s"))),
        pa.array([decimal.Decimal("1.5"), None]),
    ],
    ids=lambda column: str(column.type),
)
def test_other_values_are_wrong_and_nulls_are_not(column: pa.Array) -> None:
    texts, is_wrong = as_strings(column, integers=True)
    assert (texts.to_pylist(), is_wrong.to_pylist()) == ([None, None], [True, False])


def test_bytes_that_are_not_utf8_and_blanks() -> None:
    texts, is_wrong = as_strings(pa.array([b"a", b"\xff", None]), integers=False)
    assert not any(is_wrong.to_pylist())
    kept, is_utf8 = keep_utf8(texts)
    assert (kept.to_pylist(), is_utf8.to_pylist()) == (["a", None, None], [True, False, True])
    assert trimmed(pa.array([" a\t", "\u3000", "", None])).to_pylist() == ["a", None, None, None]
    assert plain(pa.chunked_array([], pa.string())).to_pylist() == []
