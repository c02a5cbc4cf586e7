"""Recall: the groups of labels that a document may belong to.

One logit per group; the positives are the groups with a true label. The target matrix is never built: it is zero but for the
true pairs, so everything is computed for a target of zeros and corrected at these pairs.

All of it is in float32, whatever the precision of the encoder. A group's logit is often below -10, where bfloat16 has steps of
0.06: of the logits of a document many would tie, and shortlists follow. The weights are read once, which is what this head
costs; a copy in bfloat16 would have to be made from them in every batch.

Letters: B documents, F features, G groups in all, g own groups, W some of them, K shortlisted groups, P true and J judged
(document, group) pairs.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from xmc_ray.model.device import upload
from xmc_ray.model.judged import Judged
from xmc_ray.model.sharding import Exchange, FactoredGradients, OwnedRows, RowGradients, mean_squares, with_gradient
from xmc_ray.model.threads import mapped

_GROUPS = 1024  # groups that are computed at a time on a CPU, and eight times as many on a GPU


class RecallHead(OwnedRows):
    """A linear layer from features to the logits of this worker's groups; ``weight``: [g, F], ``bias``: [g].

    ``lift``: float32[g], added to the biases in prediction but not in the loss; or None.
    """

    lift: Tensor | None

    def __init__(self, width: int, n_groups: int, exchange: Exchange, seed: int) -> None:
        super().__init__(n_groups, exchange)
        self.start((width,), 0.02, seed)
        self.register_buffer("lift", None)
        self._pending: list[tuple[Tensor, Tensor]] = []

    @property
    def lifted_bias(self) -> Tensor:
        """float32[g]: the biases of prediction."""
        return self.bias if self.lift is None else self.bias + self.lift

    def logits(self, features_BF: Tensor) -> Tensor:
        """float32[B, g]: the logits of the own groups in prediction, lift included."""
        with _in_float32(features_BF):
            return F.linear(features_BF.float(), self.weight, self.lifted_bias)

    def best(self, logits_BW: Tensor, k: int, own_BW: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The ``k`` best of all workers' groups: logits float32[B, k], falling, and groups int64[B, k].

        ``logits_BW``: those of all own groups, or of these, ``own_BW``.
        """
        logit_BK, group_BK = logits_BW.topk(min(k, logits_BW.shape[1]))
        group_BK = (group_BK if own_BW is None else own_BW.gather(1, group_BK)) + self.own.start
        logit_BK = F.pad(logit_BK, (0, k - logit_BK.shape[1]), value=-torch.inf)
        group_BK = F.pad(group_BK, (0, k - group_BK.shape[1]))
        return self.exchange.best_of_all(logit_BK, group_BK, k)

    def of_groups(self, logits_Bg: Tensor, group_BK: Tensor) -> Tensor:
        """float32[B, K]: the logits of the groups ``group_BK`` (int64), -inf where another worker owns them."""
        if not self.own:
            return logits_Bg.new_full(group_BK.shape, -torch.inf)
        own_BK = (group_BK - self.own.start).clamp(0, len(self.own) - 1)
        return logits_Bg.gather(1, own_BK).masked_fill(~self.owned(group_BK), -torch.inf)

    def loss(
        self,
        features_BF: Tensor,
        row_P: Tensor,
        group_P: Tensor,
        shortlist: int,
        documents: int,
        judged: Judged | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Binary cross-entropy over the own groups, and the ``shortlist`` best of all groups of each document, int64[B, K].

        The sum over groups and documents is divided by ``documents``. A (row, group) pair (on the host) may occur twice.
        ``judged``: groups.
        """
        training = torch.is_grad_enabled()
        with torch.no_grad(), _in_float32(features_BF):
            logits_Bg, loss, gradient_BF, gradient_Bg = self._without_positives(features_BF.float())
            shortlist_BK = self.best(logits_Bg, shortlist)[1]
            true_P = torch.unique(row_P * self.n_groups + group_P)
            true_P = true_P[self.owned(true_P % self.n_groups)]
            true_2P = torch.stack([true_P // self.n_groups, true_P % self.n_groups - self.own.start])
            row_P, own_P = upload(true_2P, features_BF.device).unbind()
            loss = (loss - logits_Bg[row_P, own_P].sum()) / documents
            gradient_BF.index_add_(0, row_P, self.weight[own_P], alpha=-1)
            if judged is not None:
                loss += self._weigh(judged, logits_Bg, gradient_BF, gradient_Bg) / documents
            if training:
                gradient_Bg[row_P, own_P] -= 1
                self._pending.append((gradient_Bg.div_(documents), features_BF.detach().float()))
        return with_gradient(features_BF, loss, gradient_BF.div_(documents)), shortlist_BK

    def _weigh(self, judged: Judged, logits_Bg: Tensor, gradient_BF: Tensor, gradient_Bg: Tensor) -> Tensor:
        """What judged groups add to the loss; adds what they add to its gradients, in place."""
        judged = judged.where(self.owned(judged.output_J))
        at_2J = torch.stack([judged.row_J, judged.output_J - self.own.start])
        row_J, own_J = upload(at_2J, logits_Bg.device).unbind()
        loss, slope_J = judged.excess(logits_Bg[row_J, own_J])
        gradient_BF.index_add_(0, row_J, slope_J[:, None] * self.weight[own_J])
        gradient_Bg[row_J, own_J] += slope_J
        return loss

    def _without_positives(self, features_BF: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """For a target of zeros: logits [B, g], loss, and its gradients by features [B, F] and by logits [B, g], all float32.

        A few groups at a time, so that their weights are still in the cache when the gradient needs them.
        """
        features_BF, gradient_BF = features_BF.detach(), torch.zeros_like(features_BF)
        loss, logits, probabilities = features_BF.new_zeros(()), [], []

        def of_groups(rows: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
            weight, bias = rows
            logits_BU = F.linear(features_BF, weight, bias)
            probability_BU = logits_BU.sigmoid()
            return logits_BU, probability_BU, F.softplus(logits_BU).sum(), probability_BU @ weight

        chunks = zip(self.weight.split(self._chunk), self.bias.split(self._chunk), strict=True)
        for logits_BU, probability_BU, loss_of_groups, gradient in mapped(of_groups, chunks):
            logits.append(logits_BU)
            probabilities.append(probability_BU)
            loss += loss_of_groups
            gradient_BF += gradient
        return torch.cat(logits, dim=1), loss, gradient_BF, torch.cat(probabilities, dim=1)

    @property
    def _chunk(self) -> int:
        return _GROUPS if self.weight.device.type == "cpu" else 8 * _GROUPS

    def input_squares(self) -> tuple[Tensor, int]:
        """See `OwnedRows.input_squares`: of the features."""
        return mean_squares([features_BF for _, features_BF in self._pending], self.weight.shape[-1])

    def gradients(self) -> Iterator[RowGradients | FactoredGradients]:
        """Those of all own groups, a chunk at a time: every document has a gradient for every group."""
        if not self._pending:
            return
        pending, self._pending = self._pending, []
        factor_gB = torch.cat([gradient_Bg for gradient_Bg, _ in pending]).T.contiguous()
        inputs_BF = torch.cat([features_BF for _, features_BF in pending])
        for first in range(0, len(self.own), self._chunk):
            groups = slice(first, first + self._chunk)
            if len(inputs_BF) < inputs_BF.shape[1]:
                yield FactoredGradients(groups, factor_gB[groups], inputs_BF)
            else:
                factor_UB = factor_gB[groups]
                yield RowGradients(groups, factor_UB @ inputs_BF, factor_UB.sum(1))


def _in_float32(tensor: Tensor) -> torch.autocast:
    """Products in this block are of the types that they are given."""
    return torch.autocast(tensor.device.type, enabled=False)
