"""What predictions for held-out documents show: metrics, reliability of scores, confused labels, examples.

Documents come in chunks, of which only sums, counts and a few examples are kept: memory grows with the distinct pairs of
confused labels alone, 24 bytes each. Examples are drawn with one stream of random numbers, so the chunks do not matter.

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
    """A label that was predicted and wrong and one that was true and missed, by their ids.

    ``documents``: how many have both; ``support``: how many have the missed label.
    """

    predicted: int
    missed: int
    documents: int
    support: int


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
        self._pairs = pa.table({name: pa.array([], pa.int64()) for name in ("predicted", "missed", "documents")})
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
        pairs = confused(label_Dk, hit_Dk, document_P, label_P)
        pairs = pa.concat_tables([self._pairs, pairs.append_column("documents", pa.array(np.ones(len(pairs), np.int64)))])
        pairs = pairs.group_by(["predicted", "missed"]).aggregate([("documents", "sum")])
        self._pairs = pairs.rename_columns(self._pairs.column_names)
        *_, shown_Dk = scores.values()
        self._draw(tokens, truth, label_Dk, shown_Dk, hit_Dk[:, 0])

    def confusions(self, n: int) -> list[Confusion]:
        """The ``n`` most frequent pairs, the most frequent first, then by ids."""
        best = self._pairs.sort_by([("documents", "descending"), ("predicted", "ascending"), ("missed", "ascending")])[:n]
        return [Confusion(**row, support=int(self.truth_L[row["missed"]])) for row in best.to_pylist()]

    def examples(self, *, right: bool) -> list[Example]:
        """At most ``EXAMPLES`` random documents whose best tag is right, or wrong."""
        rows = self._drawn[right].to_pylist() if right in self._drawn else []
        tags = [[(label, score) for label, score in zip(row["label"], row["score"], strict=True) if label >= 0] for row in rows]
        return [Example(row["tokens"], row["truth"], found) for row, found in zip(rows, tags, strict=True)]

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


def confused(label_Dk: IntArray, hit_Dk: BoolArray, document_P: IntArray, label_P: IntArray) -> pa.Table:
    """Columns ``predicted`` and ``missed``: each wrong tag of a document beside each of the true labels that it lacks.

    A document gets as many tags as it has true labels (k at most), so that every wrong tag takes the place of a missed one.
    The true pairs, each once, are ``document_P``, ``label_P``; ``hit_Dk`` says which tags are true.
    """
    true_D = np.bincount(document_P, minlength=len(label_Dk))
    given_Dk = (label_Dk >= 0) & (np.arange(label_Dk.shape[1]) < true_D[:, None])
    right_Dk, wrong_Dk = given_Dk & hit_Dk, given_Dk & ~hit_Dk
    right = pa.table({"document": np.nonzero(right_Dk)[0], "missed": label_Dk[right_Dk]})
    wrong = pa.table({"document": np.nonzero(wrong_Dk)[0], "predicted": label_Dk[wrong_Dk]})
    missed = pa.table({"document": document_P, "missed": label_P}).join(right, ["document", "missed"], join_type="left anti")
    return wrong.join(missed, "document", join_type="inner").select(["predicted", "missed"])
