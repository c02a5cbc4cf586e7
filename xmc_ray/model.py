"""LightXML: one transformer, label-group recall, label ranking with dynamic negatives, trained jointly.

    features = dropout(encoder(text))                 the last n hidden states' summaries
    recall   = linear(features)                       one logit a group (Jiang et al. 2021, section 3.2, "generator")
    ranking  = bottleneck(features) . label vectors   of the labels in the K best groups (section 3.4, "discriminator")
    loss     = BCE(recall) + BCE(ranking)             negatives change as recall learns (section 3.3)
    score    = sigmoid(ranking) * sigmoid(recall of the label's group)

In flat mode every group is one label: recall scores the labels themselves and there is no ranking stage.

Letters: B documents, F features, G groups, K shortlisted groups, M places in a group, H bottleneck, P true pairs.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xmc_ray.encoder import TextEncoder
from xmc_ray.errors import ConfigError
from xmc_ray.groups import LabelGroups
from xmc_ray.labels import IntArray
from xmc_ray.ranking import ALIGNMENT, LabelTable
from xmc_ray.text import Batch


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The heads on top of the encoder."""

    shortlist: int = 10
    """K, the groups with the highest recall score whose labels are ranked."""
    bottleneck: int = 384
    """H, the width of the label vectors; a multiple of 8."""
    dropout: float = 0.5
    """Dropout of the features."""

    def __post_init__(self) -> None:
        if self.bottleneck < ALIGNMENT or self.bottleneck % ALIGNMENT:
            raise ConfigError("model.bottleneck does not fit", found=self.bottleneck, expected=f"a multiple of {ALIGNMENT}")
        if self.shortlist < 1:
            raise ConfigError("model.shortlist does not fit", found=self.shortlist, expected="at least 1")


class Losses(NamedTuple):
    """Two sums over the labels, each a mean over the documents of a batch; scalars."""

    recall: Tensor
    rank: Tensor


class Ranked(NamedTuple):
    """The best labels of each document, scores falling.

    ``score_Bk``: float32 in 0..1; ``label_Bk``: int64, -1 (with score 0) where a document has fewer candidates than k.
    """

    score_Bk: Tensor
    label_Bk: Tensor


class LightXML(nn.Module):
    """Encoder, recall head, bottleneck and label table; ``forward`` is the loss."""

    group_L: Tensor
    label_GM: Tensor

    def __init__(self, encoder: TextEncoder, groups: LabelGroups, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.shortlist = min(config.shortlist, len(groups))
        self.encoder = encoder
        self.dropout = nn.Dropout(config.dropout)
        self.recall = nn.Linear(encoder.width, len(groups))
        nn.init.normal_(self.recall.weight, std=0.02)
        nn.init.zeros_(self.recall.bias)
        self.bottleneck = None if groups.flat else nn.Linear(encoder.width, config.bottleneck)
        self.table = None if groups.flat else LabelTable(groups, config.bottleneck)
        self.register_buffer("group_L", torch.from_numpy(groups.group_L), persistent=False)
        self.register_buffer("label_GM", torch.from_numpy(groups.label_GM), persistent=False)

    @torch.no_grad()
    def start_from_counts(self, counts_L: IntArray, n_documents: int) -> None:
        """Set the biases to the log-odds seen in training: the first steps need not learn that labels are rare.

        A group's odds are bounded by the sum of its labels' counts; a label's are those within its group. (The prior
        initialisation of Lin et al. 2017, section 3.3, for every output of its own.)
        """
        counts = torch.from_numpy(np.maximum(counts_L, 0)).double()
        counts_G = torch.zeros(len(self.label_GM), dtype=torch.double).index_add_(0, self.group_L.cpu(), counts)
        self.recall.bias.copy_(torch.logit((counts_G + 0.5) / (n_documents + 1), eps=1e-6).clamp(max=0))
        if self.table is not None:
            share_L = (counts + 0.5) / (counts_G[self.group_L.cpu()] + 1)
            self.table.bias_GM[self.table.group_L, self.table.slot_L] = torch.logit(share_L, eps=1e-6).float()

    def forward(self, batch: Batch) -> Losses:
        """The training loss of a batch."""
        features_BF = self.dropout(self.encoder(batch.tokens_BT, batch.mask_BT))

        # recall: every group, against the groups that hold a true label
        recall_BG = self.recall(features_BF).float()
        target_BG = torch.zeros_like(recall_BG)
        target_BG[batch.row_P, self.group_L[batch.label_P]] = 1
        recall_loss = F.binary_cross_entropy_with_logits(recall_BG, target_BG, reduction="sum") / len(batch)
        if self.table is None or self.bottleneck is None:
            return Losses(recall_loss, torch.zeros_like(recall_loss))

        # rank: the labels of the groups that recall believes in now, and of all true ones; the choice has no gradient
        shortlist_BK = recall_BG.detach().topk(self.shortlist).indices
        vectors_BH = self.bottleneck(features_BF)
        return Losses(recall_loss, self.table.loss(vectors_BH, shortlist_BK, batch.row_P, batch.label_P) / len(batch))

    def predict(self, batch: Batch, k: int) -> Ranked:
        """The ``k`` best labels of each document; call in eval mode, without gradients."""
        features_BF = self.encoder(batch.tokens_BT, batch.mask_BT)
        recall_BG = self.recall(features_BF).float().sigmoid()
        if self.table is None or self.bottleneck is None:
            return _best(recall_BG, self.label_GM[:, 0].expand_as(recall_BG), k)
        recall_BK, shortlist_BK = recall_BG.topk(self.shortlist)
        label_BKM = F.pad(self.label_GM, (0, self.table.weight_GMH.shape[1] - self.label_GM.shape[1]), value=-1)[shortlist_BK]
        score_BKM = self.table.predict(self.bottleneck(features_BF), shortlist_BK) * recall_BK[..., None]
        score_BKM = score_BKM.masked_fill(label_BKM < 0, -1)
        return _best(score_BKM.flatten(1), label_BKM.flatten(1), k)


def _best(score_BC: Tensor, label_BC: Tensor, k: int) -> Ranked:
    best = score_BC.topk(min(k, score_BC.shape[1]))
    missing = max(0, k - best.values.shape[1])
    label_Bk = F.pad(label_BC.gather(1, best.indices), (0, missing), value=-1)
    return Ranked(F.pad(best.values, (0, missing)).clamp(min=0), label_Bk)
