"""What predictions for held-out documents show: metrics, reliability of scores, confused labels, examples.

Documents come in chunks, of which only sums, counts and a few examples are kept: memory grows with the distinct pairs of
confused labels alone, 16 bytes each. Examples are drawn with one stream of random numbers, so the chunks do not matter.

Letters: D documents of a chunk, k tags, L labels, P true (document, label) pairs, W bins of scores.
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from xmc_ray.data.labels import IntArray, LabelIndex
from xmc_ray.metrics.at_k import BoolArray, Metrics, find_hits, true_pairs
from xmc_ray.metrics.calibration import Reliability

Scores = npt.NDArray[np.floating]
TAGS = 5  # of a document, whose scores are compared with the truth
EXAMPLES = 20  # of each kind


class Confusion(NamedTuple):
    """A label that was predicted and wrong and one that was true and missed, by their ids, in the same documents."""

    predicted: int
    missed: int
    documents: int
    """Documents with both."""
    support: int
    """Documents with the missed label."""


class Example(NamedTuple):
    """A document: ``tokens``, ids of its true labels, (label id, score) of its tags, the best first."""

    tokens: list[int]
    truth: list[int]
    tags: list[tuple[int, float]]


class Findings:
    """Running sums; ``truth_L`` counts the documents with each label, ``reliability`` is by the name of a kind of scores."""

    def __init__(self, labels: LabelIndex, seed: int) -> None:
        self.metrics = Metrics(labels.counts, labels.n_documents)
        self.documents = 0
        self.truth_L = np.zeros(len(labels), np.int64)
        self.reliability: dict[str, Reliability] = {}
        self._pairs, self._counts = np.empty(0, np.int64), np.empty(0, np.int64)
        self._random = np.random.default_rng(seed)
        self._drawn: dict[bool, pa.Table] = {}

    def update(self, tokens: pa.ListArray, truth: pa.ListArray, label_Dk: IntArray, scores: Mapping[str, Scores]) -> None:
        """Add the predictions of a chunk.

        ``tokens``, ``truth``: list<int32>[D], the latter distinct label ids. ``label_Dk``: distinct ids, the best first, -1
        where there are no more. ``scores``: [D, k] each, by name: the last is what examples are shown with.
        """
        document_P, label_P = true_pairs(truth)
        hit_Dk = find_hits(label_Dk, truth, len(self.truth_L))

        self.documents += len(label_Dk)
        self.metrics.update(label_Dk, truth)
        self.truth_L += np.bincount(label_P, minlength=len(self.truth_L))
        for name, score_Dk in scores.items():
            self.reliability.setdefault(name, Reliability(TAGS)).update(score_Dk, label_Dk, hit_Dk)
        self._count(mistaken(label_Dk, hit_Dk, document_P, label_P, len(self.truth_L)))
        *_, shown_Dk = scores.values()
        self._draw(tokens, truth, label_Dk, shown_Dk, hit_Dk[:, 0])

    def confusions(self, n: int) -> list[Confusion]:
        """The ``n`` most frequent pairs, the most frequent first, then by ids."""
        best = np.lexsort((self._pairs, -self._counts))[:n]
        predicted, missed = np.divmod(self._pairs[best], len(self.truth_L))
        columns = [predicted, missed, self._counts[best], self.truth_L[missed]]
        return [Confusion(*row) for row in np.stack(columns, axis=1).tolist()]

    def examples(self, *, right: bool) -> list[Example]:
        """At most ``EXAMPLES`` random documents whose best tag is right, or wrong."""
        rows = self._drawn[right].to_pylist() if right in self._drawn else []
        tags = [[(label, score) for label, score in zip(row["label"], row["score"], strict=True) if label >= 0] for row in rows]
        return [Example(row["tokens"], row["truth"], found) for row, found in zip(rows, tags, strict=True)]

    def _count(self, pairs: IntArray) -> None:
        keys, places = np.unique(np.concatenate([self._pairs, pairs]), return_inverse=True)
        counts = np.bincount(places[len(self._pairs) :], minlength=len(keys))
        counts[places[: len(self._pairs)]] += self._counts
        self._pairs, self._counts = keys, counts

    def _draw(
        self, tokens: pa.ListArray, truth: pa.ListArray, label_Dk: IntArray, score_Dk: Scores, right_D: BoolArray
    ) -> None:
        """Every document gets a random number; those with the smallest numbers are kept."""
        drawn_D = self._random.random(len(label_Dk))
        for right in (True, False):
            rows = np.flatnonzero(right_D == right)
            rows = rows[np.argsort(drawn_D[rows])[:EXAMPLES]]
            here = pa.table(
                {
                    "drawn": drawn_D[rows],
                    "tokens": tokens.take(pa.array(rows)),
                    "truth": truth.take(pa.array(rows)),
                    "label": _lists(label_Dk[rows, :TAGS]),
                    "score": _lists(score_Dk[rows, :TAGS].astype(np.float64)),
                }
            )
            both = pa.concat_tables([self._drawn.get(right, here.slice(0, 0)), here])
            self._drawn[right] = both.take(pc.sort_indices(both, [("drawn", "ascending")])[:EXAMPLES])


def _lists(rows: npt.NDArray[np.generic]) -> pa.FixedSizeListArray:
    return pa.FixedSizeListArray.from_arrays(pa.array(rows.ravel()), rows.shape[1])


def mistaken(label_Dk: IntArray, hit_Dk: BoolArray, document_P: IntArray, label_P: IntArray, n_labels: int) -> IntArray:
    """int64: ``predicted * n_labels + missed`` for each pair of confused labels of a document.

    A document gets as many tags as it has true labels (k at most), so that every wrong tag takes the place of a missed one.
    The true pairs, rising by document and each once, are ``document_P``, ``label_P``; ``hit_Dk`` says which tags are true.
    """
    true_D = np.bincount(document_P, minlength=len(label_Dk))
    given_Dk = (label_Dk >= 0) & (np.arange(label_Dk.shape[1]) < true_D[:, None])
    found, places = np.nonzero(given_Dk & hit_Dk)
    missed_P = ~np.isin(document_P * n_labels + label_P, found * n_labels + label_Dk[found, places])
    n_missed_D = np.bincount(document_P[missed_P], minlength=len(label_Dk))
    missed = label_P[missed_P]

    # every wrong tag with each of its document's missed labels, which are consecutive
    wrong, places = np.nonzero(given_Dk & ~hit_Dk)
    repeats, first_D = n_missed_D[wrong], np.cumsum(n_missed_D) - n_missed_D
    within = np.arange(repeats.sum()) - np.repeat(np.cumsum(repeats) - repeats, repeats)
    beside = missed[np.repeat(first_D[wrong], repeats) + within]
    pairs: IntArray = np.repeat(label_Dk[wrong, places], repeats) * n_labels + beside
    return pairs
