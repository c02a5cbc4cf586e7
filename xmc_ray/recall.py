"""Recall: which groups of labels a document may belong to.

One logit a group, against the groups that hold a true label. The target matrix is never built: all of it is zero but for
the true pairs, so the gradient sigmoid(x) - y overwrites the logits and is lowered by one at those pairs.

Letters: B documents, F features, G groups in all, g own groups, K shortlisted groups, P true (document, group) pairs.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from xmc_ray.exchange import Exchange
from xmc_ray.rows import OwnedRows, RowGradients, with_gradient

_ROWS = 64  # documents whose loss is summed at a time: the sum's temporaries stay small beside the logits
_GROUPS = 1024  # groups whose gradient is multiplied out at a time


class RecallHead(OwnedRows):
    """A linear layer from features to the logits of this worker's groups; ``weight``: [g, F], ``bias``: [g]."""

    def __init__(self, width: int, n_groups: int, exchange: Exchange, seed: int) -> None:
        super().__init__(n_groups, exchange)
        self.start((width,), 0.02, seed)
        self._pending: list[tuple[Tensor, Tensor]] = []

    def logits(self, features_BF: Tensor) -> Tensor:
        """[B, g]: of the own groups."""
        weight, bias = self.weight.to(features_BF.dtype), self.bias.to(features_BF.dtype)
        return F.linear(features_BF, weight, bias)

    def best(self, logits_Bg: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """The ``k`` best of all workers' groups: logits float32[B, k], falling, and groups int64[B, k]."""
        logit_BK, group_BK = logits_Bg.topk(min(k, logits_Bg.shape[1]))
        logit_BK, group_BK = logit_BK.float(), group_BK + self.own.start
        logit_BK = F.pad(logit_BK, (0, k - logit_BK.shape[1]), value=-torch.inf)
        group_BK = F.pad(group_BK, (0, k - group_BK.shape[1]))
        return self.exchange.best_of_all(logit_BK, group_BK, k)

    def loss(
        self, features_BF: Tensor, row_P: Tensor, group_P: Tensor, shortlist: int, documents: int
    ) -> tuple[Tensor, Tensor]:
        """Binary cross-entropy over the own groups, and every document's ``shortlist`` (int64[B, K]) out of all groups.

        The sum over groups and documents is divided by ``documents``. A (row, group) pair may come more than once.
        """
        training = torch.is_grad_enabled()
        with torch.no_grad():
            logits_Bg = self.logits(features_BF)
            shortlist_BK = self.best(logits_Bg, shortlist)[1]
            true_P = torch.unique(row_P * self.n_groups + group_P)
            true_P = true_P[self.owned(true_P % self.n_groups)]
            true = true_P // self.n_groups, true_P % self.n_groups - self.own.start
            loss = sum((F.softplus(part.float()).sum() for part in logits_Bg.split(_ROWS)), logits_Bg.new_zeros(()).float())
            loss = (loss - logits_Bg[true].float().sum()) / documents
            gradient_Bg = logits_Bg.sigmoid_()
            gradient_Bg[true] -= 1
            gradient_Bg /= documents
            if training:
                self._pending.append((gradient_Bg, features_BF.detach()))
            gradient_BF = gradient_Bg @ self.weight.to(gradient_Bg.dtype)
        return with_gradient(features_BF, loss, gradient_BF), shortlist_BK

    def gradients(self) -> Iterator[RowGradients]:
        """All own groups, a chunk at a time: recall learns from every logit of every document."""
        pending, self._pending = self._pending, []
        for first in range(0, len(self.own) if pending else 0, _GROUPS):
            groups = slice(first, first + _GROUPS)
            weight = sum((part_Bg[:, groups].T @ features_BF).float() for part_Bg, features_BF in pending)
            bias = sum(part_Bg[:, groups].float().sum(0) for part_Bg, _ in pending)
            yield RowGradients(groups, weight, bias)  # type: ignore[arg-type]
