"""Fits rows of new outputs on frozen features: from documents by logistic regression, from names by a linear map.

From documents, for all outputs together:

    minimise over w, b:  sum over documents of c (log(1 + e^z) - y z)  +  penalty s / 2 |w|^2      with z = w . x + b

s is the mean square of a feature, so that a penalty means the same for every model. c is 1 where y = 1, and else
(N - n + 1) / (D - n + 1): so the n documents of an output among the D given weigh as they would among the N that the model was
trained on (King and Zeng 2001, section 4.2). An empty document, x = 0, is among the negatives. The problem is convex, so the
starting point of L-BFGS does not matter.

From a name with features x, the row is A (x, 1), where A is the ridge regression, with the same penalty, of the rows of known
outputs on the features of their names (a linear map from descriptions to classifiers: Elhoseiny et al. 2013).

Letters: D documents, E known outputs, F features, I features and a one, K shortlisted groups, N new outputs.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from scipy import sparse
from torch import Tensor

from xmc_ray.data.labels import IntArray
from xmc_ray.errors import DataError
from xmc_ray.settings import PositiveFloat, PositiveInt, Settings, Share

_CELLS = 1 << 24  # (document, output) cells that are in memory together


@dataclass(frozen=True, kw_only=True)
class RowsConfig(Settings):
    """How the rows of new labels are fitted; see the module."""

    penalty: PositiveFloat = 1.0
    """L2 penalty on a row, in units of documents with typical features."""
    steps: PositiveInt = 100
    """Maximum number of L-BFGS steps."""
    join: Share = 0.5
    """Minimum mean recall score, lifted as in prediction, that a group gives a label's documents for the label to join it."""


class Known(NamedTuple):
    """Existing outputs of the model: features of their names, and their rows."""

    name_EF: Tensor
    weight_EF: Tensor
    bias_E: Tensor


class Shortlisted(NamedTuple):
    """Which documents shortlist the group of a label."""

    shortlist_DK: Tensor
    group_N: Tensor

    def of(self, here: IntArray) -> Tensor:
        """bool[D, n]: whether each document shortlists the groups of the labels ``here``."""
        return (self.shortlist_DK[:, :, None] == self.group_N[here]).any(1)


def new_rows(
    x_DF: Tensor,
    y_DN: sparse.csc_array,
    pairs: Shortlisted | None,
    name_NF: Tensor,
    known: Known,
    population: int,
    config: RowsConfig,
) -> tuple[Tensor, Tensor]:
    """Rows and biases of new outputs, float32[N, F] and float32[N]: from their documents, or from names if they have none."""
    weight_NF, bias_N = from_names(name_NF, known, config)
    seen_N = np.flatnonzero(np.diff(y_DN.indptr) > 0)
    step = max(1, _CELLS // max(1, len(x_DF) * (1 if pairs is None else pairs.shortlist_DK.shape[1])))
    for first in range(0, len(seen_N), step):
        here = seen_N[first : first + step]
        y_Dn = torch.from_numpy(y_DN[:, here].toarray())
        used_Dn = None if pairs is None else pairs.of(here)
        weight_NF[here], bias_N[here] = from_documents(x_DF, y_Dn, used_Dn, population, config)
    return weight_NF, bias_N


def from_documents(
    x_DF: Tensor, y_DN: Tensor, used_DN: Tensor | None, population: int, config: RowsConfig
) -> tuple[Tensor, Tensor]:
    """float32[N, F] and float32[N]: the module's regressions on documents; negatives only where ``used_DN`` is true.

    ``y_DN``: float32, 0 or 1; ``population``: N of the module, the documents that the model was trained on.
    """
    x_DF, y_DN = F.pad(x_DF, (0, 0, 0, 1)), F.pad(y_DN, (0, 0, 0, 1))  # the empty document
    count_N = y_DN.sum(0)
    rarity_N = ((population - count_N + 1) / (len(x_DF) - count_N)).clamp(min=1)
    used_DN = torch.ones_like(y_DN) if used_DN is None else F.pad(used_DN.float(), (0, 0, 0, 1), value=1.0)
    cost_DN = torch.where(y_DN > 0, 1.0, rarity_N * used_DN)
    penalty = config.penalty * float(x_DF.square().mean())
    weight_NF = x_DF.new_zeros(y_DN.shape[1], x_DF.shape[1], requires_grad=True)
    bias_N = torch.logit(count_N / (cost_DN.sum(0) + 1)).requires_grad_()
    solver = torch.optim.LBFGS([weight_NF, bias_N], max_iter=config.steps, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        solver.zero_grad()
        logits_DN = F.linear(x_DF, weight_NF, bias_N)
        total = (cost_DN * (F.softplus(logits_DN) - y_DN * logits_DN)).sum() + penalty / 2 * weight_NF.square().sum()
        total.backward()
        return total

    with torch.enable_grad():
        solver.step(loss)
    return weight_NF.detach(), bias_N.detach()


def from_names(name_NF: Tensor, known: Known, config: RowsConfig) -> tuple[Tensor, Tensor]:
    """float32[N, F] and float32[N]: the module's A (x, 1) for names with features x; A is not fitted on deprecated labels."""
    in_use_E = known.bias_E.isfinite()
    if not in_use_E.any():
        way_out = "give labelled documents of the new labels"
        raise DataError("no label in use to learn from how a name becomes a label", found="deprecated ones", way_out=way_out)
    x_EI = F.pad(known.name_EF[in_use_E], (0, 1), value=1.0).double()
    rows_EI = torch.cat([known.weight_EF.float(), known.bias_E[:, None]], dim=1)[in_use_E].double()
    square = x_EI.T @ x_EI
    square.diagonal()[:-1] += config.penalty * x_EI[:, :-1].square().mean() + 1e-12
    square[-1, -1] += 1e-12
    rows_NI = F.pad(name_NF, (0, 1), value=1.0).double() @ torch.linalg.solve(square, x_EI.T @ rows_EI)
    return rows_NI[:, :-1].float(), rows_NI[:, -1].float()
