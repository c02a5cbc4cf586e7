"""How good ranked labels are: P@k, R@k, nDCG@k, their propensity-scored kin and coverage@k, in total and by label frequency.

Notable features
- Sums and counts until one final division in ``result``, so that evaluation can be split over workers.
- A sum is an integer number of units of 2**-30. Integers add up the same in any order, floats do not: however the documents
  are dealt out, not even the last digit changes. Rounding moves no metric by more than 1e-9.
- Everything is vectorised over documents and labels; the only loop is over the total and the bands.

Shapes: B documents, K ranks (the largest k), P true (document, label) pairs, L labels, R rows (the total, then each band),
S kinds of sums, N values of k.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from xmc_ray.errors import DataError

IntArray = NDArray[np.int64]
FloatArray = NDArray[np.float64]
BoolArray = NDArray[np.bool_]

# Jain et al. 2016 fitted these on several data sets. Their own: 0.6 and 2.6 for Amazon, 0.5 and 0.4 for Wikipedia.
A, B = 0.55, 1.5
KS = (1, 3, 5, 10)
BANDS = (0, 1, 2, 10, 100)
METRICS = ("P", "R", "nDCG", "PSP", "PSnDCG", "coverage")

_UNITS = 2.0**30
_SUMS = ("hits", "recall", "ndcg", "ps_hits", "ps_best_hits", "ps_ndcg", "ps_best_ndcg")
