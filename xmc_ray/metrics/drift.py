"""How far the labels of a night have moved from those of another, or of training: the population stability index.

With e and a the shares of a label among all tags of the two sides, PSI = sum of (a - e) ln(a / e), the symmetric divergence of
Kullback and Leibler 1951 under the name that Siddiqi, Credit Risk Scorecards, 2006, gave it. Below 0.1 is usually called
stable, above 0.25 a shift.

Labels too rare to tell a shift from chance are pooled into one bin. Two samples of N and M tags from one distribution over B
bins have a PSI of about (B - 1)(1/N + 1/M) by chance alone (Yurdakul and Naranjo, Statistical properties of the population
stability index, 2020): with 15,000 labels and 100,000 tags a side that is 0.3, an alarm every night. A label is pooled when
both of its shares are below 100 / min(N, M). That leaves some min(N, M) / 100 bins, so chance adds about 0.02 at most. Of the
pool only its growth shows: a shift among rare labels needs more tags to be seen.

Letter: L labels.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from xmc_ray.data.labels import IntArray
from xmc_ray.errors import ConfigError, DataError
from xmc_ray.settings import NonNegativeFloat, Settings

FloatArray = npt.NDArray[np.float64]
Verdict = Literal["steady", "warn", "fail", "unknown"]
_BIN_TAGS = 100  # of the smaller side, that a label with a bin of its own would have
_PRIOR_TAGS = 0.5  # of the smaller side, added to both shares, as Jeffreys' prior does: a share of 0 has no logarithm


@dataclass(frozen=True, kw_only=True)
class DriftConfig(Settings):
    """When to report drift of the label distribution, by its population stability index (PSI)."""

    warn: NonNegativeFloat = 0.1
    """PSI above which the night warns; 0.1 is the usual limit for a stable population."""
    fail: NonNegativeFloat | None = None
    """PSI above which the night fails; 0.25 is the usual limit for a shift. None never fails."""

    def check(self) -> None:
        """Raises ConfigError if ``fail`` is below ``warn``."""
        if self.fail is not None and self.fail < self.warn:
            raise ConfigError("drift.fail is below drift.warn", found=self.fail, expected=f"at least {self.warn}")

    def verdict(self, total: float | None) -> Verdict:
        """What a PSI means; "unknown" if it is None."""
        if total is None:
            return "unknown"
        if self.fail is not None and total > self.fail:
            return "fail"
        return "warn" if total > self.warn else "steady"


@dataclass(frozen=True, eq=False)
class Drift:
    """A shift, and the labels that cause it.

    ``total``: the PSI; None if there were too few tags, on either side, for even one label to have a bin of its own.
    ``contribution_L``: what each label adds to it, 0 or more; 0 for a pooled label. ``expected_L``, ``actual_L``: the share of
    each label among the tags to compare with and those in question. ``pooled_L``: which labels are pooled.
    """

    total: float | None
    contribution_L: FloatArray
    expected_L: FloatArray
    actual_L: FloatArray
    pooled_L: npt.NDArray[np.bool_]


class Shift(NamedTuple):
    """A label (its id) that has moved: its share of the tags before and now, and what that adds to the PSI."""

    label: int
    expected: float
    actual: float
    contribution: float


def psi(expected_counts: IntArray, actual_counts: IntArray) -> Drift:
    """The population stability index of two nights' tags, or of training's labels and a night's tags.

    Both are int64[L], tags of each label. Both shares are smoothed by half a tag of the smaller side inside the logarithm.
    DataError if they are not of the same labels, or negative.
    """
    if expected_counts.shape != actual_counts.shape or min(expected_counts.min(initial=0), actual_counts.min(initial=0)) < 0:
        found = f"{expected_counts.shape} and {actual_counts.shape}"
        raise DataError("label counts cannot be compared", found=found, expected="counts of the same labels, 0 or more")
    n_expected, n_actual = int(expected_counts.sum()), int(actual_counts.sum())
    smaller = max(min(n_expected, n_actual), 1)
    expected_L, actual_L = expected_counts / max(n_expected, 1), actual_counts / max(n_actual, 1)
    pooled_L = np.maximum(expected_L, actual_L) < _BIN_TAGS / smaller
    if pooled_L.all() or not (n_expected and n_actual):
        return Drift(None, np.zeros(len(pooled_L)), expected_L, actual_L, np.ones(len(pooled_L), np.bool_))
    prior = _PRIOR_TAGS / smaller
    contribution_L = np.where(pooled_L, 0.0, _contributions(expected_L, actual_L, prior))
    # Whole numbers are added up before the division, so that proportional counts stay so to the last digit.
    pool = [np.array([counts[pooled_L].sum() / counts.sum()]) for counts in (expected_counts, actual_counts)]
    total = float(contribution_L.sum() + _contributions(pool[0], pool[1], prior)[0])
    return Drift(total, contribution_L, expected_L, actual_L, pooled_L)


def worst(drift: Drift, n: int = 20) -> list[Shift]:
    """The ``n`` labels that add most to the total, the first the most; fewer if no more have moved."""
    moved = np.flatnonzero(drift.contribution_L)
    order = moved[np.argsort(-drift.contribution_L[moved], kind="stable")[:n]]
    columns = (order, drift.expected_L[order], drift.actual_L[order], drift.contribution_L[order])
    return [Shift(*row) for row in zip(*(column.tolist() for column in columns), strict=True)]


def _contributions(expected: FloatArray, actual: FloatArray, prior: float) -> FloatArray:
    """Each (a - e) ln(a / e): never negative, since a larger share has the larger logarithm."""
    return np.asarray((actual - expected) * (np.log(actual + prior) - np.log(expected + prior)))
