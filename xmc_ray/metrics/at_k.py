"""Metrics of ranked labels: P@k, R@k, nDCG@k, propensity-scored PSP@k and PSnDCG@k, coverage@k; in total and by frequency.

Sums and counts are divided once, in ``Metrics.result``, so neither the order of the documents nor their batches matter. Sums
are integers in units of 2**-30: integer addition is associative and that of floats is not, so not even the last digit depends
on the order. Rounding moves a metric by 1e-9 at most; 64 bits hold the sums of some 50 million documents even if all their
labels are of the rarest.

Shapes: B documents, K ranks (the largest k), P true (document, label) pairs, L labels, R rows (the total, then each band),
S kinds of sums, N values of k.
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from xmc_ray.data.labels import IntArray, list_lengths
from xmc_ray.errors import ConfigError, DataError

SmallArray = NDArray[np.int8]
FloatArray = NDArray[np.float64]
BoolArray = NDArray[np.bool_]
PROPENSITY_A, PROPENSITY_B = 0.55, 1.5
KS = (1, 3, 5, 10)
BANDS = (0, 1, 2, 10, 100)
_UNIT = 2.0**-30
_SUMS = ("hits", "recall", "ndcg", "weighted_hits", "best_weighted_hits", "weighted_ndcg", "best_weighted_ndcg")


def propensities(counts_L: IntArray, n_documents: int, a: float = PROPENSITY_A, b: float = PROPENSITY_B) -> FloatArray:
    """float64[L]: the chance that a true label is also marked as one, by the number of its training documents.

    Jain et al. 2016: p = 1 / (1 + C exp(-a log(count + b))) with C = (log N - 1)(b + 1)^a. They use 0.6 and 2.6 for Amazon,
    0.5 and 0.4 for Wikipedia. With fewer than three documents, where C would be negative, every chance is 1.
    """
    c = max(np.log(max(n_documents, 1)) - 1, 0) * (b + 1) ** a
    return np.asarray(1 / (1 + c * np.exp(-a * np.log(counts_L + b))), np.float64)


def band_rows(counts_L: IntArray, bands: Sequence[int] = BANDS) -> SmallArray:
    """int8[L]: the number of each label's band, from 1 on in rising order of ``bands`` (the smallest count of each)."""
    return np.searchsorted(sorted(set(bands)), counts_L, side="right").astype(np.int8)


def find_hits(predicted_BK: IntArray, truth: pa.ListArray, n_labels: int) -> BoolArray:
    """bool[B, K]: which predictions are right; arguments as in `Metrics.update`."""
    documents_P, labels_P = true_pairs(truth)
    first_key_B1 = np.arange(len(predicted_BK))[:, None] * n_labels
    return (predicted_BK >= 0) & np.isin(first_key_B1 + predicted_BK, documents_P * n_labels + labels_P)


def true_pairs(truth: pa.ListArray) -> tuple[IntArray, IntArray]:
    """int64[P] each: documents, in rising order, and labels of the pairs in ``truth`` (list<int>[B], label ids)."""
    return np.repeat(np.arange(len(truth)), list_lengths(truth)), pc.list_flatten(truth).to_numpy().astype(np.int64)


class Metrics:
    """Running sums of all metrics.

    A band's metrics have the truth restricted to the band's labels, over the documents with at least one of them, and the
    predictions left as they are. Documents without any true label are counted, and left out of every division.
    """

    def __init__(self, counts_L: IntArray, n_documents: int, ks: Sequence[int] = KS, bands: Sequence[int] = BANDS) -> None:
        """``counts_L``: training documents of each label, ``n_documents``: all of them, ``bands``: the smallest count of each.

        Raises ConfigError if there is no label, or a k below 1.
        """
        if not len(counts_L) or not ks or min(ks) < 1:
            raise ConfigError("nothing to measure", found=f"{len(counts_L)} labels and k = {ks}", expected="labels and k >= 1")
        self.ks = tuple(sorted(set(ks)))
        self.bands = band_names(sorted(set(bands)))
        self.row_L = band_rows(counts_L, bands)  # 1 and up, 0 for none
        self.weight_L = 1 / propensities(counts_L, n_documents)
        self.unlabelled = 0
        self.documents_R = np.zeros(1 + len(self.bands), np.int64)
        self.sums_SRN = np.zeros((len(_SUMS), 1 + len(self.bands), len(self.ks)), np.int64)
        # index in `ks` of the smallest k at which a label was a hit; N if it was true but never hit, N + 1 if never true
        self.reach_L = np.full(len(counts_L), len(self.ks) + 1, np.int8)

    def update(self, predicted_BK: IntArray, truth: pa.ListArray) -> None:
        """Count B documents.

        ``predicted_BK`` holds distinct label ids in falling order of score, any number of columns, -1 where there are no
        more. ``truth`` (list<int>[B]) are the ids of the true labels in any order; a repeated one counts once. Raises DataError
        for ids that are no labels, or if the two differ in length.
        """
        _check(predicted_BK, truth, len(self.weight_L))
        documents_P, labels_P = self._ordered_truth(truth)
        ranked_BK = _with_columns(predicted_BK, self.ks[-1])
        hit_BK = find_hits(ranked_BK, truth, len(self.weight_L))
        self.unlabelled += len(ranked_BK) - len(np.unique(documents_P))
        self._update_reach(ranked_BK, hit_BK, labels_P)
        for row in range(len(self.documents_R)):
            inside_P, inside_BK = self._in_row(row, labels_P), self._in_row(row, ranked_BK)
            self._update_row(row, ranked_BK, hit_BK & inside_BK, documents_P[inside_P], labels_P[inside_P])

    def result(self) -> dict[str, Any]:
        """All metrics as fractions, ready for JSON.

        ``documents`` and ``unlabelled`` count documents; ``total`` and each of ``bands`` (those that hold a label) map
        ``documents`` and ``true_labels`` to the counts that they rest on, and ``P@1`` etc. to values: None where there is
        nothing to divide by. PSP and PSnDCG are divided by the best possible value, as usual in the literature.
        """
        rows = [self._row(row) for row in range(len(self.documents_R))]
        held = {int(row) for row in np.unique(self.row_L)}
        return {
            "documents": int(self.documents_R[0]) + self.unlabelled,
            "unlabelled": self.unlabelled,
            "total": rows[0],
            "bands": {name: rows[row] for row, name in enumerate(self.bands, 1) if row in held},
        }

    def _ordered_truth(self, truth: pa.ListArray) -> tuple[IntArray, IntArray]:
        """The true pairs as documents int64[P] and labels int64[P]: each once, by document, the heaviest label first."""
        documents, labels = true_pairs(truth)
        documents_P, labels_P = np.divmod(np.unique(documents * len(self.weight_L) + labels), len(self.weight_L))
        order = np.lexsort((-self.weight_L[labels_P], documents_P))
        return documents_P[order], labels_P[order]

    def _in_row(self, row: int, labels: IntArray) -> BoolArray:
        inside: BoolArray = (self.row_L[labels] == row) | (row == 0)
        return inside

    def _update_reach(self, ranked_BK: IntArray, hit_BK: BoolArray, labels_P: IntArray) -> None:
        place_K = np.searchsorted(self.ks, np.arange(1, self.ks[-1] + 1)).astype(np.int8)
        place_BK = np.broadcast_to(place_K, hit_BK.shape)
        self.reach_L[labels_P] = np.minimum(self.reach_L[labels_P], len(self.ks))
        np.minimum.at(self.reach_L, ranked_BK[hit_BK], place_BK[hit_BK])

    def _update_row(self, row: int, ranked_BK: IntArray, hit_BK: BoolArray, documents_P: IntArray, labels_P: IntArray) -> None:
        true_B = np.bincount(documents_P, minlength=len(hit_BK))
        best_BK = _best_weights(documents_P, self.weight_L[labels_P], true_B, self.ks[-1])
        weight_BK = np.where(hit_BK, self.weight_L[ranked_BK], 0.0)
        has = true_B > 0
        scores_SBN = _score(hit_BK[has], weight_BK[has], best_BK[has], true_B[has], self.ks)
        self.documents_R[row] += has.sum()
        self.sums_SRN[:, row] += np.rint(scores_SBN / _UNIT).astype(np.int64).sum(axis=1)

    def _row(self, row: int) -> dict[str, Any]:
        documents = int(self.documents_R[row])
        reach = self.reach_L if row == 0 else self.reach_L[self.row_L == row]
        true_labels = int((reach <= len(self.ks)).sum())
        sums = dict(zip(_SUMS, self.sums_SRN[:, row] * _UNIT, strict=True))
        covered_N = (reach[:, None] <= np.arange(len(self.ks))).sum(axis=0)
        fractions = {
            "P": (sums["hits"], documents * np.array(self.ks)),
            "R": (sums["recall"], documents),
            "nDCG": (sums["ndcg"], documents),
            "PSP": (sums["weighted_hits"], sums["best_weighted_hits"]),
            "PSnDCG": (sums["weighted_ndcg"], sums["best_weighted_ndcg"]),
            "coverage": (covered_N, true_labels),
        }
        values = {
            f"{name}@{k}": float(over / under) if under else None
            for name, (overs, unders) in fractions.items()
            for k, over, under in zip(self.ks, overs, np.broadcast_to(unders, len(self.ks)), strict=True)
        }
        return {"documents": documents, "true_labels": true_labels, **values}


def table(result: Mapping[str, Any]) -> str:
    """The ``result`` of ``Metrics`` for a terminal: metrics in percent, one a line; a column for the total and each band."""
    columns = {"total": result["total"], **{f"seen {name}": band for name, band in result["bands"].items()}}
    head = " " * 12 + "".join(f"{name:>11}" for name in columns)
    lines = [
        f"{name.replace('_', ' '):<12}" + "".join(f"{_cell(column[name]):>11}" for column in columns.values())
        for name in result["total"]
    ]
    note = "Percent, in total and by the number of training documents that have a label."
    if result["unlabelled"]:
        note += f" {result['unlabelled']} documents without a true label are left out."
    return "\n".join([head, *lines, note])


def summary(result: Mapping[str, Any]) -> str:
    """The chief part of `table` on half a screen: every metric of the total at each k, then the bands at one k."""
    total, bands = result["total"], result["bands"]
    ks = sorted({int(name.partition("@")[2]) for name in total if "@" in name})
    kinds = list(dict.fromkeys(name.partition("@")[0] for name in total if "@" in name))
    at = 5 if 5 in ks else ks[-1]
    rows = [["percent", *(f"@{k}" for k in ks)]]
    rows += [[kind, *(_cell(total[f"{kind}@{k}"]) for k in ks)] for kind in kinds]
    columns = ["true_labels", *(f"{kind}@{at}" for kind in kinds)]
    banded = [["documents that have it", "true labels", *columns[1:]]]
    banded += [[name, *(_cell(band[column]) for column in columns)] for name, band in bands.items()]
    note = f"{total['documents']:,} documents, {total['true_labels']:,} labels; --full has all metrics of all bands"
    if result["unlabelled"]:
        note += f"; {result['unlabelled']} documents without a true label are left out"
    return "\n".join([*_aligned(rows), "", *_aligned(banded), note])


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows]


def _cell(value: float | None) -> str:
    if value is None:
        return "–"
    return str(value) if isinstance(value, int) else f"{100 * value:.2f}"


def band_names(edges: Sequence[int]) -> tuple[str, ...]:
    """Names of bands with these smallest counts, in rising order: ``2-9``, ``10+``."""
    closed = [str(low) if low + 1 == high else f"{low}-{high - 1}" for low, high in pairwise(edges)]
    return (*closed, *(f"{edge}+" for edge in edges[-1:]))


def _check(predicted_BK: IntArray, truth: pa.ListArray, n_labels: int) -> None:
    if len(truth) != len(predicted_BK):
        found = f"{len(predicted_BK)} and {len(truth)} documents"
        raise DataError("predictions and true labels are not of the same documents", found=found)
    for ids, lowest in ((predicted_BK, -1), (true_pairs(truth)[1], 0)):
        if ids.size and not (lowest <= ids.min() and ids.max() < n_labels):
            raise DataError("not a label id", found=f"{ids.min()} to {ids.max()}", expected=f"{lowest} to {n_labels - 1}")


def _with_columns(predicted_BK: IntArray, n_columns: int) -> IntArray:
    """The first ``n_columns``, padded with -1: a prediction of 5 labels has at most 5 hits at k = 10."""
    first = predicted_BK[:, :n_columns]
    return np.pad(first, ((0, 0), (0, n_columns - first.shape[1])), constant_values=-1)


def _best_weights(documents_P: IntArray, weights_P: FloatArray, true_B: IntArray, n_ranks: int) -> FloatArray:
    """float64[B, K]: the weights of the best possible prediction, the true labels by falling weight, then zeros."""
    first_B = np.cumsum(true_B) - true_B
    rank_P = np.arange(len(documents_P)) - first_B[documents_P]
    top_P = rank_P < n_ranks
    best_BK = np.zeros((len(true_B), n_ranks))
    best_BK[documents_P[top_P], rank_P[top_P]] = weights_P[top_P]
    return best_BK


def _score(hit_BK: BoolArray, weight_BK: FloatArray, best_BK: FloatArray, true_B: IntArray, ks: tuple[int, ...]) -> FloatArray:
    """float64[S, B, N]: what each document adds to each of ``_SUMS``. ``weight_BK`` is zero where there is no hit."""
    gain_K = 1 / np.log2(np.arange(2, ks[-1] + 2))
    best_gain_BN = np.cumsum(gain_K)[np.minimum(true_B[:, None], ks) - 1]

    def up_to_k(values_BK: NDArray[Any]) -> NDArray[Any]:
        return np.cumsum(values_BK, axis=1)[:, np.array(ks) - 1]

    hits_BN = up_to_k(hit_BK)
    return np.stack(
        [
            hits_BN,
            hits_BN / true_B[:, None],
            up_to_k(hit_BK * gain_K) / best_gain_BN,
            up_to_k(weight_BK),
            up_to_k(best_BK),
            up_to_k(weight_BK * gain_K) / best_gain_BN,
            up_to_k(best_BK * gain_K) / best_gain_BN,
        ]
    )
