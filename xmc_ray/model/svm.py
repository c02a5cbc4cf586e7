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

import numpy as np
import pyarrow as pa
import torch
from scipy import sparse

from xmc_ray.data.groups import label_incidence, tfidf
from xmc_ray.data.terms import count_terms
from xmc_ray.model.lightxml import LightXML
from xmc_ray.model.linear import Floats, Ints, LinearConfig, LinearRanker, Longs
from xmc_ray.model.predict import PredictConfig, predict

_PASSES, _TOLERANCE = 20, 0.1  # as in linear trees: more of either changes next to no prediction
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
    _, label_DN = predict(model, tokens, min(config.depth * config.candidates, n_labels), prediction)
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
    from xmc_ray.model import kernels  # and numba with it, which processes that train no ranker need not wait for

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
        return Weights(*kernels.solve(*problem, config.smallest, _PASSES, _TOLERANCE))

    with ThreadPoolExecutor(threads) as pool:
        return Weights(*map(np.concatenate, zip(*pool.map(part, cuts[:-1], cuts[1:]), strict=True)))


def ranker_of(parts: Sequence[Weights], config: LinearConfig) -> LinearRanker:
    """A ranker of the labels of ``parts``, in their order."""
    size_L, column_W, weight_W, bias_L = (torch.from_numpy(np.concatenate(arrays)) for arrays in zip(*parts, strict=True))
    start_L1 = torch.cat([size_L.new_zeros(1), size_L.cumsum(0)])
    return LinearRanker(start_L1, column_W, weight_W, bias_L, config.candidates, config.weight)
