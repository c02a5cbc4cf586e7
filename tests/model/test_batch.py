"""Batches: padded only as far as needed, every row once."""

import numpy as np
import pyarrow as pa
from hypothesis import given, settings
from hypothesis import strategies as st

from xmc_ray.model.batch import budget_batches, make_batch

QUICK = settings(max_examples=60, deadline=None, derandomize=True)
INTS = pa.list_(pa.int32())


@QUICK
@given(st.lists(st.lists(st.integers(1, 99), max_size=9), min_size=1, max_size=6), st.integers(0, 3))
def test_a_batch_is_padded_to_its_longest(rows: list[list[int]], n_labels: int) -> None:
    labels = [[row * 10 + label for label in range(n_labels)] for row in range(len(rows))]
    batch = make_batch(pa.array(rows, INTS), pa.array(labels, INTS))
    longest = max(1, *map(len, rows)) if len(rows) > 1 else max(1, len(rows[0]))
    assert batch.tokens_BT.tolist() == [row + [0] * (longest - len(row)) for row in rows]
    assert batch.mask_BT.tolist() == [[place < len(row) for place in range(longest)] for row in rows]
    pairs = [(row, label) for row, true in enumerate(labels) for label in true]
    assert list(zip(batch.row_P.tolist(), batch.label_P.tolist(), strict=True)) == pairs
    sliced = make_batch(pa.array([[7], *rows], INTS).slice(1), pa.array([[7], *labels], INTS).slice(1))
    assert sliced.tokens_BT.tolist() == batch.tokens_BT.tolist()
    assert sliced.label_P.tolist() == batch.label_P.tolist()


@QUICK
@given(st.lists(st.integers(1, 9), min_size=1, max_size=12), st.data())
def test_micro_batches_are_the_batch_cut_in_nearly_equal_parts(lengths: list[int], data: st.DataObject) -> None:
    parts = data.draw(st.integers(1, len(lengths)))
    rows = [[place + 1] * length for place, length in enumerate(lengths)]
    labels = [[10 * place + label for label in range(place % 3)] for place in range(len(rows))]
    batch = make_batch(pa.array(rows, INTS), pa.array(labels, INTS))
    pieces = batch.split(parts)
    sizes = [len(piece) for piece in pieces]
    assert len(pieces) == parts and sum(sizes) == len(batch) and max(sizes) - min(sizes) <= 1
    first = 0
    for piece, size in zip(pieces, sizes, strict=True):
        here = slice(first, first + size)
        expected = make_batch(pa.array(rows[here], INTS), pa.array(labels[here], INTS))
        assert {name: tensor.tolist() for name, tensor in vars(piece).items()} == {
            name: tensor.tolist() for name, tensor in vars(expected).items()
        }
        first += size


@QUICK
@given(st.lists(st.integers(0, 40), max_size=30), st.integers(1, 100))
def test_budget_batches_cover_every_row_once(lengths: list[int], budget: int) -> None:
    batches = list(budget_batches(np.array(lengths, np.int64), budget))
    assert sorted(row for rows in batches for row in rows.tolist()) == list(range(len(lengths)))
    for rows in batches:
        assert len(rows) == 1 or len(rows) * max(lengths[row] for row in rows) <= budget
    longest = [max(lengths[row] for row in rows) for rows in batches]
    assert longest == sorted(longest, reverse=True)


def test_a_micro_batch_of_empty_documents_has_a_column() -> None:
    batch = make_batch(pa.array([[1, 2], [], []], pa.list_(pa.int32())))
    assert [part.tokens_BT.shape for part in batch.split(3)] == [(1, 2), (1, 1), (1, 1)]
