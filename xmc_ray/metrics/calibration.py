"""Calibration: maps scores to probabilities of being correct, and a target precision to a threshold for each label.

    chance     isotonic regression of "correct or not" on the score, over held-out predictions (Zadrozny and Elkan 2002),
               linear between the centres of its steps (Oron and Flournoy 2017) and rising a little beyond the topmost
    threshold  the lowest chance above which held-out predictions reach the precision, with one further prediction counted
               as wrong (as in Barber and Candes 2015), so that a handful of lucky ones proves nothing; they must also reach
               it together with a number of predictions that are as good as the map expects, for the lowest of many
               thresholds that reach a precision is often one that does so by luck
    ECE@k      the mean gap between predicted chance and the share of correct predictions, over 15 bins of equal width
               (Guo et al. 2017, section 2)

One map serves all labels: it is increasing, so the ranking does not change (decision 0013). In float32 close scores may get
equal chances: whoever orders labels by chances breaks ties by the uncalibrated scores. A label has a threshold of its own if it
has enough held-out predictions, else that of its frequency band, else that of all labels.

Letters: D documents, k predictions of each, N held-out predictions, L labels, R rows (none, then each band), Q knots.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from xmc_ray.data.labels import IntArray
from xmc_ray.errors import ConfigError, ModelError
from xmc_ray.metrics.at_k import BANDS, BoolArray, FloatArray, band_names, band_rows

ScoreArray = NDArray[np.float32]
Predictions = tuple[ScoreArray, IntArray, BoolArray]
"""For documents: scores, falling; label ids, -1 where there are no more; hits. [D, k] each."""

DEPTH = 10  # predictions of a document that a calibration is fitted on
PRECISIONS = (0.5, 0.8, 0.9)  # those in metrics.json
DEFAULT_PRECISION = 0.5  # of the thresholds in labels.parquet
ENOUGH_OF_LABEL, ENOUGH_OF_BAND = 50, 500  # held-out predictions for a threshold of its own
EXPECTED = 200  # further predictions, correct as often as the chances say, with which a threshold must hold as well
BINS = 15
SCORE_BINS = 20  # of the histogram of a night's scores, equal bins of [0, 1]
_LABELS, _ARITHMETIC = "labels", "arithmetic"  # in the metadata of a table
_STRETCHES = 32  # or a few more, into which documents are divided for cross-fitting


@dataclass(frozen=True, eq=False)
class Calibration:
    """Held-out predictions, from which calibrated scores and thresholds are computed.

    ``label_N``: int64, label ids; ``score_N``: float32, uncalibrated scores; ``hit_N``: bool, whether the label was correct;
    ``band_L``: int8, the row of each label's band, see `at_k.band_rows`. There may be no predictions at all. ``arithmetic``
    names that of the scores (`model.predict.arithmetic`); chances and thresholds hold for scores of the same. None: not known.
    """

    label_N: IntArray
    score_N: ScoreArray
    hit_N: BoolArray
    band_L: NDArray[np.int8]
    arithmetic: str | None = None

    @classmethod
    def of(
        cls, scores_Dk: ScoreArray, labels_Dk: IntArray, hit_Dk: BoolArray, counts_L: IntArray, arithmetic: str | None = None
    ) -> "Calibration":
        """From predictions padded with label -1; ``counts_L``: training documents of each label.

        Raises ModelError for scores that are not finite.
        """
        if not np.isfinite(scores_Dk).all():
            found = f"{(~np.isfinite(scores_Dk)).any(1).sum():,} of {len(scores_Dk):,} held-out documents with such a score"
            raise ModelError("scores are not finite", found=found, way_out="lower the learning rates and train again")
        real_Dk = labels_Dk >= 0
        return cls(labels_Dk[real_Dk], scores_Dk[real_Dk], hit_Dk[real_Dk], band_rows(counts_L), arithmetic)

    def __len__(self) -> int:
        return len(self.label_N)

    @cached_property
    def knots(self) -> tuple[FloatArray, FloatArray]:
        """Scores float64[Q], rising, and their chances; see `fit_map`."""
        return fit_map(self.score_N, self.hit_N)

    def calibrated(self, scores_Dk: ScoreArray, labels_Dk: IntArray) -> ScoreArray:
        """float32[D, k]: the chances of scores; 0 where there is no label. Without held-out predictions, the scores."""
        chances_Dk = apply_map(self.knots, scores_Dk)
        return np.where(labels_Dk >= 0, chances_Dk, np.float32(0))

    def thresholds(self, precision: float) -> ScoreArray:
        """float32[L]: the lowest calibrated score with which each label may be assigned; inf if it never may.

        Raises ConfigError for a ``precision`` that is not above 0 and below 1.
        """
        if not 0 < precision < 1:  # no number of documents proves that all predictions are correct
            raise ConfigError("invalid value of min_precision", found=precision, expected="above 0, below 1")
        band_N = self.band_L[self.label_N].astype(np.int64)
        all_1 = self._thresholds(np.zeros_like(self.label_N), np.full(1, np.inf, np.float32), 1, precision)
        of_all_R = np.broadcast_to(all_1, len(BANDS) + 1)
        of_band_R = self._thresholds(band_N, of_all_R, ENOUGH_OF_BAND, precision)
        return self._thresholds(self.label_N, of_band_R[self.band_L], ENOUGH_OF_LABEL, precision)

    def _thresholds(self, owner_N: IntArray, others: ScoreArray, enough: int, precision: float) -> ScoreArray:
        """The threshold from each owner's own predictions, where these suffice, else that of ``others``.

        An owner needs ``enough`` predictions. To conclude that no threshold reaches ``precision``, it also needs enough of them
        above the other threshold: n, such that n / (n + 1) reaches ``precision``.
        """
        chance_N, n_owners = apply_map(self.knots, self.score_N), len(others)
        own = lowest(owner_N, chance_N, self.hit_N, n_owners, precision)
        could_N = chance_N >= others[owner_N]
        n, n_above = np.bincount(owner_N, minlength=n_owners), np.bincount(owner_N[could_N], minlength=n_owners)
        return np.where((n >= enough) & (np.isfinite(own) | (n_above >= precision * (n_above + 1))), own, others)

    def sizes(self) -> dict[str, int]:
        """The number of predictions of each band, such as ``{"2-9": 57}``, including 0."""
        n_R = np.bincount(self.band_L[self.label_N], minlength=len(BANDS) + 1)
        return dict(zip(band_names(BANDS), n_R[1:].tolist(), strict=True))

    def to_table(self, labels: str) -> pa.Table:
        """Columns ``label`` (id), ``score``, ``hit``: one row for each held-out prediction.

        ``labels`` is the fingerprint of the label index; the schema's metadata has it, and the arithmetic.
        """
        table = pa.table({"label": pa.array(self.label_N, pa.int32()), "score": self.score_N, "hit": self.hit_N})
        return table.replace_schema_metadata({_LABELS: labels, _ARITHMETIC: self.arithmetic or ""})

    @classmethod
    def of_another(cls, table: pa.Table, labels: str, counts_L: IntArray, where: str) -> "Calibration":
        """From `to_table` of another model of the same labels; ModelError if the fingerprint of its labels is another.

        ``where`` is the address of the table, for the error.
        """
        metadata = {key.decode(): value.decode() for key, value in (table.schema.metadata or {}).items()}
        if metadata.get(_LABELS) != labels:
            raise ModelError(
                "the calibration is of other labels",
                where=where,
                found=metadata.get(_LABELS),
                expected=labels,
                way_out="give that of a model of the same documents, held-out ones included",
            )
        return cls.from_table(table, counts_L, metadata[_ARITHMETIC] or None)

    @classmethod
    def from_table(cls, table: pa.Table, counts_L: IntArray, arithmetic: str | None = None) -> "Calibration":
        """The inverse of `to_table`, with the counts of the label index and the arithmetic, which the table lacks."""
        label, score, hit = (table[name].to_numpy() for name in ("label", "score", "hit"))
        return cls(label.astype(np.int64), score, hit, band_rows(counts_L), arithmetic)


def fit_map(score_N: ScoreArray, hit_N: BoolArray) -> tuple[FloatArray, FloatArray]:
    """Knots of an increasing map: scores float64[Q] and chances float64[Q]; without predictions, the identity.

    A knot is at the mean score of a step of the isotonic regression. The steps' chances are kept 1 / (N + 2) away from 0 and 1,
    by the rule of succession. Beyond the topmost one the map rises by half as much, to a score of 1: if it were constant there,
    many of the best predictions would have one and the same chance, and no threshold could come between them. It is constant
    below the lowest one, so that no threshold comes between the worst.
    """
    if not len(score_N):
        return np.array([0.0, 1.0]), np.array([0.0, 1.0])
    from scipy.optimize import isotonic_regression  # a quarter of a second, in every process that only reads a calibration

    distinct, place_N, count = np.unique(score_N.astype(np.float64), return_inverse=True, return_counts=True)
    right = np.bincount(place_N, hit_N)
    steps = isotonic_regression(right / count, weights=count).blocks[:-1]
    n_Q = np.add.reduceat(count, steps)
    score_Q, right_Q = np.add.reduceat(distinct * count, steps) / n_Q, np.add.reduceat(right, steps)
    least = 1 / (len(score_N) + 2)
    chance_Q = np.clip(right_Q / n_Q, least, 1 - least)
    return np.append(score_Q, 1.0), np.append(chance_Q, chance_Q[-1] + least / 2)


def apply_map(knots: tuple[FloatArray, FloatArray], scores: ScoreArray) -> ScoreArray:
    """The chances of scores of any shape, float32."""
    return np.interp(scores, *knots).astype(np.float32)


def lowest(owner_N: NDArray[Any], chance_N: ScoreArray, hit_N: BoolArray, n_owners: int, precision: float) -> ScoreArray:
    """float32[n_owners]: the lowest chance of each owner above which its predictions reach ``precision``, or inf.

    That is: correct ones / (all + 1) >= precision, by themselves and with `EXPECTED` predictions of their mean chance added.
    Equal chances are counted together.
    """
    order = np.lexsort((-chance_N, owner_N))
    owner_N, chance_N, hit_N = owner_N[order].astype(np.int64), chance_N[order], hit_N[order]
    size = np.bincount(owner_N, minlength=n_owners)
    before = (np.cumsum(size) - size)[owner_N]
    all_N = np.arange(1, len(owner_N) + 1) - before
    right_N, expected_N = _above(hit_N, before), _above(chance_N, before) / all_N
    is_last_N = np.append((np.diff(owner_N) != 0) | (np.diff(chance_N) != 0), True)[: len(owner_N)]  # of equal ones
    reached_N = is_last_N & (right_N >= precision * (all_N + 1))
    reached_N &= right_N + EXPECTED * expected_N >= precision * (all_N + 1 + EXPECTED)
    thresholds = np.full(n_owners, np.inf, np.float32)
    np.minimum.at(thresholds, owner_N[reached_N], chance_N[reached_N])
    return thresholds


def _above(value_N: NDArray[Any], before_N: IntArray) -> FloatArray:
    """float64[N]: the sum of an owner's values up to each of its predictions; ``before_N``: predictions of earlier owners."""
    total: FloatArray = np.concatenate([[0.0], np.cumsum(value_N, dtype=np.float64)])
    above_N: FloatArray = total[1:] - total[before_N]
    return above_N


class Reliability:
    """Sums for ECE@k; ``sums``: float64[3, 15], predictions, sum of their chances, correct ones, by bin of the chance."""

    def __init__(self, k: int = 5) -> None:
        self.k, self.sums = k, np.zeros((3, BINS))

    def update(self, scores_Dk: ScoreArray, labels_Dk: IntArray, hit_Dk: BoolArray) -> None:
        """Count the k best predictions of each document: scores, falling; labels, padded with -1; hits."""
        real_Dk = labels_Dk[:, : self.k] >= 0
        score_N, hit_N = (values[:, : self.k][real_Dk].astype(np.float64) for values in (scores_Dk, hit_Dk))
        bin_N = np.minimum((score_N * BINS).astype(np.int64), BINS - 1)
        self.sums += [np.bincount(bin_N, weights, BINS) for weights in (np.ones_like(score_N), score_N, hit_N)]

    def result(self) -> float | None:
        """ECE@k, 0..1; None where nothing was counted."""
        n, expected, correct = self.sums
        return float(np.abs(expected - correct).sum() / n.sum()) if n.any() else None


@dataclass
class Selection:
    """Counts of the predictions above thresholds: documents, documents with a tag, tags, correct tags."""

    thresholds_L: ScoreArray
    documents: int = 0
    tagged: int = 0
    tags: int = 0
    right: int = 0

    def update(
        self, scores_Dk: ScoreArray, labels_Dk: IntArray, hit_Dk: BoolArray, thresholds_L: ScoreArray | None = None
    ) -> None:
        """Count documents as `Reliability.update` does, by other thresholds if they are given."""
        least_L = self.thresholds_L if thresholds_L is None else thresholds_L
        kept_Dk = (labels_Dk >= 0) & (scores_Dk >= least_L[labels_Dk])
        self.documents += len(kept_Dk)
        self.tagged += int(kept_Dk.any(1).sum())
        self.tags += int(kept_Dk.sum())
        self.right += int((kept_Dk & hit_Dk).sum())

    def result(self) -> dict[str, float | int | None]:
        """``precision`` of the tags, ``coverage`` (share of documents with a tag), ``abstention`` (share without), ``tags``,
        ``never`` (labels that are never assigned); None where there is nothing to divide by.
        """
        coverage = self.tagged / self.documents if self.documents else None
        return {
            "precision": self.right / self.tags if self.tags else None,
            "coverage": coverage,
            "abstention": None if coverage is None else 1 - coverage,
            "tags": self.tags,
            "never": int(np.isinf(self.thresholds_L).sum()),
        }


def cross_fitted(predicted: Predictions, counts_L: IntArray) -> list[tuple[Calibration, Predictions]]:
    """Two calibrations, each fitted on every other stretch of documents, with the predictions of the stretches it has not seen.

    Stretches, because neighbouring documents are often of one series, and a map fitted on a document's series would be measured
    too favourably. Documents of a series that are further apart may still be on both sides.
    """
    scores_Dk, labels_Dk, hit_Dk = predicted
    is_odd_D = np.arange(len(hit_Dk)) // max(1, len(hit_Dk) // _STRETCHES) % 2 == 1
    even, odd = ((scores_Dk[is_in_D], labels_Dk[is_in_D], hit_Dk[is_in_D]) for is_in_D in (~is_odd_D, is_odd_D))
    return [(Calibration.of(*odd, counts_L), even), (Calibration.of(*even, counts_L), odd)]


def calibration_metrics(calibration: Calibration, unseen: Iterable[tuple[Calibration, Predictions]]) -> dict[str, Any]:
    """ECE@5 before and after calibration, and the effect of thresholds for `PRECISIONS`.

    ``unseen``: calibrations, each with uncalibrated predictions that it was not fitted on. ``calibration`` is the one in use;
    the count of never-assigned labels uses its thresholds.
    """
    before, after, documents = Reliability(), Reliability(), 0
    selections = {precision: Selection(calibration.thresholds(precision)) for precision in PRECISIONS}
    for fitted, (scores_Dk, labels_Dk, hit_Dk) in unseen:
        chances_Dk = fitted.calibrated(scores_Dk, labels_Dk)
        documents += len(scores_Dk)
        before.update(scores_Dk, labels_Dk, hit_Dk)
        after.update(chances_Dk, labels_Dk, hit_Dk)
        for precision, selection in selections.items():
            selection.update(chances_Dk, labels_Dk, hit_Dk, fitted.thresholds(precision))
    return {
        "measured_on": documents,
        "ECE@5 before": before.result(),
        "ECE@5": after.result(),
        "thresholds": {str(precision): selection.result() for precision, selection in selections.items()},
    }
