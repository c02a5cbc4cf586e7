"""Terms: their columns and counts against plain loops."""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pytest
import reference
from hypothesis import given, settings
from hypothesis import strategies as st

from xmc_ray.data.terms import count_terms, document_frequency, inverse_document_frequency, saturated

QUICK = settings(max_examples=40, deadline=None, derandomize=True)
FIELD_TOKENS = st.tuples(st.integers(0, 2), st.integers(0, 5))
WEIGHTS = st.lists(st.floats(0.1, 8), min_size=3, max_size=3)
ROWS = st.lists(st.lists(st.integers(0, 2**24 - 1), max_size=6), min_size=1, max_size=8)


def counts(rows: list[list[int]], n_columns: int, weights: Sequence[float] = ()) -> dict[tuple[int, int], float]:
    cells = count_terms(pa.array(rows, pa.list_(pa.int32())), n_columns, weights).tocoo()
    return dict(zip(zip(*(place.tolist() for place in cells.coords), strict=True), cells.data.tolist(), strict=True))


@QUICK
@given(ROWS, st.sampled_from([1, 97, 2**20]))
def test_counts_equal_a_loop(rows: list[list[int]], n_columns: int) -> None:
    assert counts(rows, n_columns) == reference.terms(rows, n_columns)


@QUICK
@given(st.lists(st.lists(FIELD_TOKENS, max_size=8), min_size=1, max_size=4), WEIGHTS, st.sampled_from([7, 2**20]))
def test_an_occurrence_counts_as_much_as_its_field_weighs(
    rows: list[list[tuple[int, int]]], weights: list[float], n_columns: int
) -> None:
    tokens = [[token + (field << 24) for field, token in sorted(row)] for row in rows]
    expected = reference.weighted_terms([sorted(row) for row in rows], weights, n_columns)
    assert counts(tokens, n_columns, weights) == pytest.approx(expected, rel=1e-6)
    once = reference.weighted_terms([sorted(row) for row in rows], [1.0] * 3, n_columns)
    assert counts(tokens, n_columns) == counts(tokens, n_columns, [1.0] * 3) == once


def test_saturation_is_one_curve() -> None:
    """1 + log x from 1 on, to the last bit; x below; no step in value or slope where they meet."""
    above = np.arange(1, 2000, dtype=np.float32)
    assert (saturated(above) == 1 + np.log(above)).all()
    below = np.linspace(0.001, 1, 50, dtype=np.float32)
    assert (saturated(below) == below).all()
    near = saturated(np.array([0.999, 1, 1.001], np.float64))
    assert near == pytest.approx([0.999, 1, 1.001], abs=1e-6)


def test_columns_never_change() -> None:
    """The vectors of saved bundles belong to them."""
    assert sorted(column for _, column in counts([[0, 1, 30_521]], 2**20)) == [128045, 155868, 256090, 482029, 607745]


@QUICK
@given(ROWS, st.integers(0, 8))
def test_chunks_do_not_matter(rows: list[list[int]], cut: int) -> None:
    chunks = [pa.array(part, pa.list_(pa.int32())) for part in (rows[:cut], rows[cut:])]
    n_documents, frequency_F = document_frequency(count_terms(chunk, 97) for chunk in chunks)
    assert n_documents == len(rows)
    idf_F = inverse_document_frequency(n_documents, frequency_F)
    np.testing.assert_allclose(idf_F, reference.term_weights(rows, 97, rarest=0), rtol=1e-12)
