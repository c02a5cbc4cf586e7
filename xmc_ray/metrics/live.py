"""Live precision: the share of judged tags that editors have accepted, in total, by night, by label and by score.

Which tags are judged is the editors' choice, so this is the precision of what they looked at. Intervals are Wilson's (1927,
score intervals; see Brown, Cai and DasGupta 2001), of 95 %.

Letters: V verdicts, J judged tags, M labels of verdicts, S bands of scores.
"""

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from xmc_ray.data.feedback import Feedback, Mask, Tally
from xmc_ray.data.labels import IntArray, list_lengths
from xmc_ray.metrics.at_k import FloatArray

BANDS = 10  # of scores, equal ones of [0, 1]
ENOUGH = 20  # judged tags of a label that is listed by itself
_Z = 1.959964  # of a normal distribution, 95 % within


class Share(NamedTuple):
    """How many of the ``judged`` tags were ``accepted``, and between what the share is in truth, ``low`` and ``high``."""

    accepted: int
    judged: int
    low: float
    high: float

    @classmethod
    def of(cls, accepted: int, judged: int) -> "Share":
        """With its interval; 0 to 1 where nothing is judged."""
        low, high = wilson(np.array([accepted]), np.array([judged]))
        return cls(accepted, judged, float(low[0]), float(high[0]))


def wilson(accepted: IntArray, judged: IntArray) -> tuple[FloatArray, FloatArray]:
    """The bounds of each share, float64 of the inputs' shape; 0 and 1 where nothing is judged."""
    n = np.maximum(judged, 1)
    share, square = accepted / n, _Z**2 / n
    middle, half = share + square / 2, np.sqrt(square * (share * (1 - share) + square / 4))
    low, high = (middle - half) / (1 + square), (middle + half) / (1 + square)
    nothing = judged == 0
    return np.where(nothing, 0.0, np.clip(low, 0, share)), np.where(nothing, 1.0, np.clip(high, share, 1))


@dataclass(eq=False)
class LivePrecision:
    """Sums over the tags of some nights, the latest first; a tag that several nights have counts in total once, as the latest.

    ``nights``: accepted and judged tags of each by its day. ``labels``: int64[2, M], and ``bands``: float64[3, S], both
    accepted and judged tags, the latter also the sum of their scores. ``found_V``: verdicts on documents of these nights;
    ``tagged_V``: verdicts on tags.
    """

    feedback: Feedback
    nights: dict[str, Share] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """With nothing counted."""
        self.labels = np.zeros((2, len(self.feedback.labels)), np.int64)
        self.bands = np.zeros((3, BANDS))
        self.found_V, self.tagged_V = np.zeros((2, len(self.feedback)), bool)
        self._night = np.zeros(2, np.int64)

    def update(self, tags: pa.Table) -> None:
        """Count tags of the night at hand: ``id``, ``labels`` (list<string>), ``scores`` (list<float>)."""
        verdicts = self.feedback.of_documents(tags["id"])
        has_verdict = pa.array(list_lengths(verdicts) > 0)
        tags, verdicts = tags.select(["id", "labels", "scores"]).filter(has_verdict), verdicts.filter(has_verdict)
        self.found_V[verdicts.flatten().to_numpy()] = True
        number_J, score_J = judged_tags(tags, verdicts, self.feedback)
        accepted_J = self.feedback.accepted_V[number_J]
        self._night += [accepted_J.sum(), len(number_J)]
        new_J = ~self.tagged_V[number_J]
        number_J, accepted_J, score_J = number_J[new_J], accepted_J[new_J], score_J[new_J]
        self.tagged_V[number_J] = True
        label_J, band_J = self.feedback.label_V[number_J], np.minimum((score_J * BANDS).astype(np.int64), BANDS - 1)
        ones_J = np.ones(len(number_J))
        self.labels += [np.bincount(label_J, part, self.labels.shape[1]).astype(np.int64) for part in (accepted_J, ones_J)]
        self.bands += [np.bincount(band_J, part, BANDS) for part in (accepted_J, ones_J, score_J)]

    def end_night(self, day: str) -> None:
        """What was counted since the last call was that of ``day``."""
        self.nights[day] = Share.of(*self._night.tolist())
        self._night[:] = 0

    @property
    def total(self) -> Share:
        """Of all tags."""
        return Share.of(*self.labels.sum(1).tolist())

    @property
    def missed(self) -> int:
        """Accepted labels of documents of these nights that are not among their tags."""
        return int((self.found_V & ~self.tagged_V & self.feedback.accepted_V).sum())

    def worst(self, most: int = 20) -> list[tuple[str, Share]]:
        """Labels with `ENOUGH` judged tags, those that are worst for sure first: by the upper bound of their share."""
        accepted, judged = self.labels
        ids = np.flatnonzero(judged >= ENOUGH)
        low, high = wilson(accepted[ids], judged[ids])
        order = np.lexsort((-judged[ids], high))[:most]
        names = self.feedback.labels.take(pa.array(ids[order])).to_pylist()
        figures = (part[order].tolist() for part in (accepted[ids], judged[ids], low, high))
        return [(name, Share(*row)) for name, *row in zip(names, *figures, strict=True)]

    def by_score(self) -> list[tuple[float, float, Share, float]]:
        """Bands of scores with judged tags, the highest first: bounds, the share that was right, and the mean score."""
        rows = []
        for band in np.flatnonzero(self.bands[1])[::-1].tolist():
            accepted, judged, scores = self.bands[:, band].tolist()
            rows.append((band / BANDS, (band + 1) / BANDS, Share.of(round(accepted), round(judged)), scores / judged))
        return rows

    def tally(self, labels: pa.StringArray) -> Tally:
        """What of the feedback counts; DataError if it is of other ``labels``."""
        return self.feedback.tally(self.found_V, labels)


def judged_tags(tags: pa.Table, verdicts: pa.ListArray, feedback: Feedback) -> tuple[IntArray, FloatArray]:
    """int64[J] and float64[J]: the verdicts on tags, and these tags' scores.

    ``tags``: see `LivePrecision.update`; ``verdicts``: `Feedback.of_documents` of their ids.
    """
    n_labels, labels, scores = max(1, len(feedback.labels)), tags["labels"].combine_chunks(), tags["scores"].combine_chunks()
    number_V = np.asarray(verdicts.flatten(), np.int64)
    key_V = np.repeat(np.arange(len(tags)), list_lengths(verdicts)) * n_labels + feedback.label_V[number_V]  # they rise
    id_T = feedback.ids_of(labels.flatten())
    key_T = np.repeat(np.arange(len(tags)), list_lengths(labels)) * n_labels + id_T
    place_T = np.searchsorted(key_V, key_T)
    is_judged_T: Mask = (id_T >= 0) & (np.append(key_V, -1)[place_T] == key_T)
    return number_V[place_T[is_judged_T]], np.asarray(scores.flatten(), np.float64)[is_judged_T]
