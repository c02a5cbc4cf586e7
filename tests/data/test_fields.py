"""Fields in a string and in a list of tokens, against plain loops."""

import pyarrow as pa
from hypothesis import given, settings
from hypothesis import strategies as st

from xmc_ray.data.fields import (
    MARK,
    MOST,
    Field,
    concatenated,
    ids_of,
    join,
    names_of,
    numbered_lists,
    numbers_of,
    readable,
    split,
)

QUICK = settings(max_examples=60, deadline=None, derandomize=True)
TEXTS = st.one_of(st.none(), st.text(st.sampled_from(["a", "é", " ", "\n", MARK]), max_size=5))
LISTS = st.lists(st.lists(st.integers(0, 2**24 - 1), max_size=4), min_size=3, max_size=3)


def ints(rows: list[list[int]]) -> pa.ListArray:
    return pa.array(rows, pa.list_(pa.int32()))


@QUICK
@given(st.integers(1, 4).flatmap(lambda n: st.lists(st.tuples(*[TEXTS] * n), max_size=6).map(lambda rows: (n, rows))))
def test_fields_come_back_and_no_text_breaks_out_of_its_own(case: tuple[int, list[tuple[str | None, ...]]]) -> None:
    n_fields, rows = case
    columns = [pa.array([row[number] for row in rows], pa.string()) for number in range(n_fields)]
    joined = join(columns)
    assert joined.to_pylist() == [MARK.join((text or "").replace(MARK, " ") for text in row) for row in rows]
    expected = [[(row[number] or "").replace(MARK, " ") for row in rows] for number in range(n_fields)]
    assert [part.to_pylist() for part in split(joined, n_fields)] == expected
    assert [part.to_pylist() for part in split(joined.slice(1), n_fields)] == [part[1:] for part in expected]


def test_a_plain_text_is_the_first_field() -> None:
    assert [part.to_pylist() for part in split(pa.array(["a b", ""]), 3)] == [["a b", ""], ["", ""], ["", ""]]
    assert readable(pa.array(["a b", f"a{MARK}b", None])).to_pylist() == ["a b", "a\nb", None]


@QUICK
@given(st.lists(LISTS, min_size=1, max_size=4), st.integers(0, MOST - 1))
def test_tokens_know_their_id_and_their_field(parts: list[list[list[int]]], number: int) -> None:
    marked = numbered_lists(ints(parts[0]), number)
    assert marked.type == pa.list_(pa.int32())
    tokens = marked.to_pylist()
    assert [[ids_of(token) for token in row] for row in tokens] == parts[0]
    assert {numbers_of(token) for row in tokens for token in row} <= {number}
    whole = concatenated([ints(part) for part in parts])
    assert whole.to_pylist() == [[token for part in parts for token in part[row]] for row in range(3)]
    assert concatenated([ints(part).slice(1) for part in parts]).to_pylist() == whole.to_pylist()[1:]
    assert (numbered_lists(ints(parts[0]), 0).to_pylist(), names_of((Field("title"),))) == (parts[0], ["title"])
