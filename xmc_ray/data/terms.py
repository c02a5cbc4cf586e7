"""Terms: the tokens of a document and its pairs of neighbouring tokens, hashed into columns.

    term(a) = a + 1        term(a, b) = FIRST_OF_PAIR (a + 1) + b + 1        column = (SPREAD term mod 2^64 >> 32) mod F

Multiplication by a large odd number spreads ids over the high bits (Knuth's multiplicative hashing). In a document with fields
(`data.fields`) a term has the same column in all of them, and a pair does not span two. `model.lexical` computes the same
columns in torch; trained vectors belong to them, so the constants never change.

Letters: D documents, F columns.
"""

from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from scipy import sparse

from xmc_ray.data.fields import ids_of, numbers_of
from xmc_ray.data.labels import IntArray, list_lengths

SPREAD, FIRST_OF_PAIR = 0x5851F42D4C957F2D, 0x14057B7EF767814F


def count_terms(tokens: pa.ListArray, n_columns: int, weights: Sequence[float] = ()) -> sparse.csr_array:
    """float32[D, F]: how often each column occurs in each document, of tokens (list<int32>).

    With ``weights``, of the fields, an occurrence counts as much as its field weighs.
    """
    lengths, flat = list_lengths(tokens), pc.list_flatten(tokens).to_numpy()
    fields, singles = numbers_of(flat), ids_of(flat).astype(np.uint64) + np.uint64(1)
    rows = np.repeat(np.arange(len(lengths)), lengths)
    is_pair = (rows[1:] == rows[:-1]) & (fields[1:] == fields[:-1])
    pairs = (singles[:-1] * np.uint64(FIRST_OF_PAIR) + singles[1:])[is_pair]
    columns = (np.concatenate([singles, pairs]) * np.uint64(SPREAD) >> np.uint64(32)) % np.uint64(n_columns)
    counts = np.ones(len(columns), np.float32)
    if weights:
        counts = np.asarray(weights)[np.concatenate([fields, fields[1:][is_pair]])]
    cells = (counts, (np.concatenate([rows, rows[1:][is_pair]]), columns))
    return sparse.coo_array(cells, shape=(len(lengths), n_columns)).tocsr().astype(np.float32, copy=False)


def saturated(count: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """g(x) of the weighted counts of terms: 1 + log x from 1 on, x below; without weights the usual 1 + log tf."""
    return np.where(count < 1, count, 1 + np.log(np.maximum(count, 1)))


def document_frequency(counts: Iterable[sparse.csr_array]) -> tuple[int, IntArray]:
    """The number of documents in all ``counts`` (each D_i x F), and int64[F], in how many of them each column occurs."""
    n_documents, frequency_F = 0, np.zeros(1, np.int64)
    for chunk in counts:
        n_documents += chunk.shape[0]
        frequency_F = frequency_F + np.bincount(chunk.indices, minlength=chunk.shape[1])
    return n_documents, frequency_F


def inverse_document_frequency(n_documents: int, frequency_F: IntArray) -> npt.NDArray[np.float64]:
    """float64[F]: 1 + log((1 + D) / (1 + df))."""
    return 1 + np.log((1 + n_documents) / (1 + frequency_F))
