"""Terms: their columns and counts against plain loops."""

import numpy as np
import pyarrow as pa
import reference
from hypothesis import given, settings
from hypothesis import strategies as st

from xmc_ray.data.terms import count_terms, document_frequency, inverse_document_frequency

QUICK = settings(max_examples=40, deadline=None, derandomize=True)
ROWS = st.lists(st.lists(st.integers(0, 2**31 - 1), max_size=6), min_size=1, max_size=8)


def counts(rows: list[list[int]], n_columns: int) -> dict[tuple[int, int], int]:
    cells = count_terms(pa.array(rows, pa.list_(pa.int32())), n_columns).tocoo()
    return dict(zip(zip(*(place.tolist() for place in cells.coords), strict=True), cells.data.tolist(), strict=True))


@QUICK
@given(ROWS, st.sampled_from([1, 97, 2**20]))
def test_counts_equal_a_loop(rows: list[list[int]], n_columns: int) -> None:
    assert counts(rows, n_columns) == reference.terms(rows, n_columns)


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
