"""Support vector machines: trains the linear ranker (`model.linear`) of a model that is trained, one machine for each label.

    minimise over w, b:  (|w|^2 + b^2) / 2 + C sum over examples of max(0, 1 - y z)^2             z = w . x + b

The examples of a label are the documents that have it (y = 1), and those that do not, but have it among the model's first
candidates (y = -1), since it is among those that it will be ranked (the matcher-aware negatives of PECOS, Yu et al. 2022).
Documents for which an editor has judged it are examples as well, with C times the weight of such a pair (`data.feedback`).
So work grows with documents times candidates, not with documents times labels. Each problem is solved by dual
coordinate descent with shrinking (Hsieh et al. 2008, algorithm 3), in an order of examples that depends on the label alone.

Labels do not depend on each other: any of them can be solved anywhere, from the `Examples` of all documents.

Letters: D documents, F columns, L labels, N candidates, E examples of all labels, W non-zero weights.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numba
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from scipy import sparse

from xmc_ray.data.groups import label_incidence, tfidf
from xmc_ray.data.terms import count_terms
from xmc_ray.model.lightxml import LightXML
from xmc_ray.model.linear import Floats, Ints, LinearConfig, LinearRanker, Longs
from xmc_ray.model.predict import PredictConfig, predict

_PASSES, _TOLERANCE = 20, 0.1  # as in linear trees: more of either changes next to no prediction
_DEPTH = 4  # times the candidates are learned from: those behind show what a wrong label looks like
_PARTS = 8  # of a thread's labels: they differ in work


class Examples(NamedTuple):
    """What the classifiers learn from; 8 bytes a term and 5 a candidate.

    ``x_DF``: float32, the weights of terms, rows of Euclidean norm 1; ``kind_DL``: int8, 1 for a label that is among the
    candidates of a document, 2 or 3 for one that the document has, and 4 more for one that was judged.
    """

    x_DF: sparse.csr_array
    kind_DL: sparse.csr_array


class Weights(NamedTuple):
    """Classifiers of some labels, one after the other: ``size_L`` weights of each, and `LinearRanker`'s other arrays."""

    size_L: Longs
    column_W: Ints
    weight_W: Floats
    bias_L: Floats


def train_linear(model: LightXML, documents: pa.Table, config: LinearConfig, prediction: PredictConfig) -> LinearRanker:
    """A ranker for ``model``, of training ``documents`` with ``tokens``, ``labels``, maybe ``judged``, list<int32> each."""
    n_labels = len(model.group_L)
    examples = examples_of(model, documents, config, prediction)
    parts = [solved(examples, range(n_labels), config, torch.get_num_threads(), model.judged_weight)]
    return ranker_of(parts, config).to(model.recall.weight.device)


def examples_of(model: LightXML, documents: pa.Table, config: LinearConfig, prediction: PredictConfig) -> Examples:
    """The examples that ``documents`` are, with the candidates that ``model`` has for them now."""
    assert model.lexical is not None
    tokens, truth = (documents[name].combine_chunks() for name in ("tokens", "labels"))
    weight_F, n_labels = model.lexical.weight_F.cpu().numpy(), len(model.group_L)
    x_DF = tfidf(count_terms(tokens, len(weight_F), model.lexical.field_weights), weight_F)
    x_DF.eliminate_zeros()
    x_DF.sort_indices()
    _, label_DN = predict(model, tokens, min(_DEPTH * config.candidates, n_labels), prediction)
    is_candidate_DN = label_DN >= 0
    starts = np.concatenate([[0], np.cumsum(is_candidate_DN.sum(1))])
    ids = label_DN[is_candidate_DN].astype(np.int32)
    candidate_DL = sparse.csr_array((np.ones(len(ids), np.int8), ids, starts), shape=(len(tokens), n_labels))
    kind_DL = candidate_DL + 2 * label_incidence(truth, n_labels).astype(np.int8)
    if "judged" in documents.column_names:
        kind_DL = kind_DL + 4 * label_incidence(documents["judged"].combine_chunks(), n_labels).astype(np.int8)
    return Examples(x_DF, kind_DL)


def joined(parts: Sequence[Examples]) -> Examples:
    """The examples of documents that were taken apart."""
    x_DF, kind_DL = (sparse.vstack(matrices, format="csr") for matrices in zip(*parts, strict=True))
    return Examples(x_DF, kind_DL)


def solved(
    examples: Examples, labels: range, config: LinearConfig, threads: int, judged_weight: float | None = None
) -> Weights:
    """The classifiers of ``labels``, on so many threads. A label that no document has gets z = 1: it keeps its score.

    ``judged_weight``: how much more a judged pair costs, if there are any.
    """
    kind_LD = examples.kind_DL[:, labels.start : labels.stop].tocsc()
    kind_LD.sort_indices()
    x_DF = examples.x_DF
    square_D = 1 + np.asarray(x_DF.multiply(x_DF).sum(axis=1), np.float64)  # with the bias's 1
    # parts of labels with the same number of examples, so that no thread waits long for another
    cuts = [0, *np.searchsorted(kind_LD.indptr, np.linspace(0, kind_LD.nnz, threads * _PARTS + 1)[1:-1]), len(labels)]
    terms = x_DF.indptr.astype(np.int64), x_DF.indices.astype(np.int32, copy=False), x_DF.data

    def part(first: int, end: int) -> Weights:
        start_L1 = kind_LD.indptr[first : end + 1].astype(np.int64)
        pairs = start_L1, kind_LD.indices.astype(np.int32, copy=False), kind_LD.data
        problem = *terms, square_D, *pairs, labels.start + first, x_DF.shape[1], config.cost, judged_weight or 1.0
        return Weights(*_solve(*problem, config.smallest, _PASSES, _TOLERANCE))

    with ThreadPoolExecutor(threads) as pool:
        return Weights(*map(np.concatenate, zip(*pool.map(part, cuts[:-1], cuts[1:]), strict=True)))


def ranker_of(parts: Sequence[Weights], config: LinearConfig) -> LinearRanker:
    """A ranker of the labels of ``parts``, in their order."""
    size_L, column_W, weight_W, bias_L = (torch.from_numpy(np.concatenate(arrays)) for arrays in zip(*parts, strict=True))
    start_L1 = torch.cat([size_L.new_zeros(1), size_L.cumsum(0)])
    return LinearRanker(start_L1, column_W, weight_W, bias_L, config.candidates, config.weight)


@numba.njit(nogil=True)
def _solve(
    start_D1: Longs,
    column_N: Ints,
    x_N: Floats,
    square_D: npt.NDArray[np.float64],
    start_L1: Longs,
    document_E: Ints,
    kind_E: npt.NDArray[np.int8],
    first_label: int,
    n_columns: int,
    cost: float,
    judged_weight: float,
    smallest: float,
    passes: int,
    tolerance: float,
) -> tuple[Longs, Ints, Floats, Floats]:
    """`Weights` of labels. What a label's examples say is copied first: its passes read little memory, one row after the other.

    Letters here: A terms of a label's examples, G columns among them.
    """
    n_labels = len(start_L1) - 1
    size_L, bias_L = np.zeros(n_labels, np.int64), np.ones(n_labels, np.float32)
    column_W, weight_W, filled = np.empty(1024, np.int32), np.empty(1024, np.float32), 0
    place_F, plain_diagonal, judged_diagonal = np.full(n_columns, -1, np.int32), 0.5 / cost, 0.5 / (cost * judged_weight)
    for label in range(n_labels):
        documents, kinds = document_E[start_L1[label] : start_L1[label + 1]], kind_E[start_L1[label] : start_L1[label + 1]]
        if not np.any(kinds & 2):
            continue
        n = len(documents)
        start_E1 = np.zeros(n + 1, np.int64)
        for example in range(n):
            start_E1[example + 1] = start_E1[example] + start_D1[documents[example] + 1] - start_D1[documents[example]]
        place_A, x_A, square_E = np.empty(start_E1[n], np.int32), np.empty(start_E1[n], np.float32), np.empty(n)
        column_G, n_places, filled_A = np.empty(start_E1[n], np.int32), 0, 0
        for example in range(n):
            document = documents[example]
            square_E[example] = square_D[document]
            for term in range(start_D1[document], start_D1[document + 1]):
                column = column_N[term]
                if place_F[column] < 0:
                    place_F[column], column_G[n_places] = n_places, column
                    n_places += 1
                place_A[filled_A], x_A[filled_A] = place_F[column], x_N[term]
                filled_A += 1
        for place in range(n_places):
            place_F[column_G[place]] = -1
        w_G, alpha, order, bias, active = np.zeros(n_places), np.zeros(n), np.arange(n), 0.0, n
        highest, state = np.inf, np.uint64(first_label + label)
        for _ in range(passes):
            largest, least = -np.inf, np.inf
            for place in range(active):  # shuffle
                state = state * np.uint64(6364136223846793005) + np.uint64(1442695040888963407)
                other = place + np.int64((state >> np.uint64(33)) % np.uint64(active - place))
                order[place], order[other] = order[other], order[place]
            place = 0
            while place < active:
                example = order[place]
                y = 1.0 if kinds[example] & 2 else -1.0
                diagonal = judged_diagonal if kinds[example] & 4 else plain_diagonal
                z = bias
                for term in range(start_E1[example], start_E1[example + 1]):
                    z += w_G[place_A[term]] * x_A[term]
                slope = y * z - 1 + alpha[example] * diagonal
                if alpha[example] == 0 and slope > highest:  # it will hardly count again: leave it out for now
                    active -= 1
                    order[place], order[active] = order[active], order[place]
                    continue
                projected = slope if alpha[example] > 0 else min(slope, 0.0)
                largest, least = max(largest, projected), min(least, projected)
                if abs(projected) > 1e-12:
                    before = alpha[example]
                    alpha[example] = max(before - slope / (square_E[example] + diagonal), 0.0)
                    step = (alpha[example] - before) * y
                    bias += step
                    for term in range(start_E1[example], start_E1[example + 1]):
                        w_G[place_A[term]] += step * x_A[term]
                place += 1
            if largest - least <= tolerance:
                if active == n:
                    break
                active, highest = n, np.inf  # once more with those left out
            else:
                highest = largest if largest > 0 else np.inf
        bias_L[label] = bias
        for example in range(n):
            if alpha[example] == 0:  # rounding leaves crumbs of those that no longer count
                continue
            for term in range(start_E1[example], start_E1[example + 1]):
                place = place_A[term]
                if abs(w_G[place]) >= smallest and w_G[place] != 0:
                    if filled == len(column_W):
                        column_W = np.concatenate((column_W, np.empty_like(column_W)))
                        weight_W = np.concatenate((weight_W, np.empty_like(weight_W)))
                    column_W[filled], weight_W[filled] = column_G[place], w_G[place]
                    filled += 1
                    size_L[label] += 1
                w_G[place] = 0  # it is written once
    return size_L, column_W[:filled].copy(), weight_W[:filled].copy(), bias_L
