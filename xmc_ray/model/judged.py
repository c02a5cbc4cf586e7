"""Judged pairs: what an editor has said of documents and labels, in the losses.

The binary cross-entropy of a judged pair counts ``weight`` times that of any other. An accepted label is a true one. A rejected
label is a false one that is ranked in every step, whether its group is shortlisted or not: a hard negative. A group is judged
as its labels are: accepted if one of them is, rejected if one is and none of its labels is true.

Letters: B documents, G groups, J judged pairs, P true pairs.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Judged(NamedTuple):
    """Judged pairs of a document and a label, or a group: each once.

    ``row_J``, ``output_J``: int64; ``true_J``: bool, accepted or rejected; ``weight``: how much each counts.
    """

    row_J: Tensor
    output_J: Tensor
    true_J: Tensor
    weight: float

    @classmethod
    def of_labels(
        cls, row_J: Tensor, label_J: Tensor, row_P: Tensor, label_P: Tensor, n_labels: int, weight: float
    ) -> "Judged":
        """Judged labels; those among the true pairs are accepted."""
        return cls(row_J, label_J, torch.isin(row_J * n_labels + label_J, row_P * n_labels + label_P), weight)

    def of_groups(self, group_L: Tensor, row_P: Tensor, group_P: Tensor, n_groups: int) -> "Judged":
        """The judged groups; ``group_P``: those of the true labels."""
        key_J = self.row_J * n_groups + group_L[self.output_J]
        accepted, rejected = torch.unique(key_J[self.true_J]), torch.unique(key_J[~self.true_J])
        rejected = rejected[~torch.isin(rejected, row_P * n_groups + group_P)]
        key = torch.cat([accepted, rejected])
        true = torch.arange(len(key), device=key.device) < len(accepted)
        return Judged(key // n_groups, key % n_groups, true, self.weight)

    def where(self, wanted_J: Tensor) -> "Judged":
        """Those of the pairs that are wanted (bool[J])."""
        return Judged(self.row_J[wanted_J], self.output_J[wanted_J], self.true_J[wanted_J], self.weight)

    def excess(self, logit_J: Tensor) -> tuple[Tensor, Tensor]:
        """What the pairs add to the loss, a sum, beyond what they count anyway; and its gradient by the logits (float32[J])."""
        true_J = self.true_J.float()
        loss = (self.weight - 1) * (F.softplus(logit_J) - true_J * logit_J).sum()
        return loss, (self.weight - 1) * (logit_J.sigmoid() - true_J)
