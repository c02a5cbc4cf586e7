"""Ranking: which labels are worth scoring, and their scores from the label table.

The table lies group by group, ``weight_GMH``: a shortlisted group is one contiguous block. A step scores *pairs* of
(document, group), sorted by group, so that all documents of a group meet its block in one matrix product, whatever
the sizes (`torch.nn.functional.grouped_mm`); rows of single labels are never gathered.

Letters: B documents, K shortlisted groups, G groups, M places in a group (a multiple of 8, unused ones masked), N pairs,
U groups in use, P true (document, label) pairs, H width of the bottleneck.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xmc_ray.groups import LabelGroups

ALIGNMENT = 8  # grouped_mm wants rows of a multiple of 16 bytes: 8 numbers of two bytes


@dataclass(frozen=True)
class Pairs:
    """Distinct (document, group) pairs, sorted by group, then document.

    ``row_N``, ``group_N``: int64; ``key_N`` = group * B + row, rising.
    """

    row_N: Tensor
    group_N: Tensor
    key_N: Tensor


def candidate_pairs(shortlist_BK: Tensor, row_P: Tensor, group_P: Tensor) -> Pairs:
    """The shortlisted groups of each document plus *all* groups of its true labels, each pair once.

    ``group_P`` are the groups of the true labels of documents ``row_P``. Nothing is cut off, nothing is filled up: no
    positive is lost, no candidate stands twice (LightXML, section 3.3, without its code's fixed-size list).
    """
    n_rows = len(shortlist_BK)
    row_BK = torch.arange(n_rows, device=shortlist_BK.device)[:, None].expand_as(shortlist_BK)
    shortlisted = shortlist_BK * n_rows + row_BK
    key_N = torch.unique(torch.cat([shortlisted.flatten(), group_P * n_rows + row_P]))
    return Pairs(key_N % n_rows, key_N // n_rows, key_N)


def grouped_scores(vectors_BH: Tensor, weight_GMH: Tensor, pairs: Pairs) -> Tensor:
    """float[N, M]: dot products of each pair's document vector with the block of its group."""
    group_U, count_U = torch.unique_consecutive(pairs.group_N, return_counts=True)
    blocks_UHM = weight_GMH[group_U].to(vectors_BH.dtype).transpose(1, 2)
    return F.grouped_mm(vectors_BH[pairs.row_N], blocks_UHM, offs=count_U.cumsum(0).to(torch.int32))


class LabelTable(nn.Module):
    """A vector and a bias for every label, in blocks of groups."""

    group_L: Tensor
    slot_L: Tensor
    size_G: Tensor

    def __init__(self, groups: LabelGroups, width: int) -> None:
        super().__init__()
        places = -(-int(groups.sizes_G.max()) // ALIGNMENT) * ALIGNMENT
        self.weight_GMH = nn.Parameter(torch.randn(len(groups), places, width) / width**0.5)
        self.bias_GM = nn.Parameter(torch.zeros(len(groups), places))
        self.register_buffer("group_L", torch.from_numpy(groups.group_L), persistent=False)
        self.register_buffer("slot_L", torch.from_numpy(groups.slot_L), persistent=False)
        self.register_buffer("size_G", torch.from_numpy(groups.sizes_G), persistent=False)

    def logits(self, vectors_BH: Tensor, pairs: Pairs) -> Tensor:
        """float[N, M]; the places past a group's size mean nothing, see `valid`."""
        return grouped_scores(vectors_BH, self.weight_GMH, pairs) + self.bias_GM[pairs.group_N].to(vectors_BH.dtype)

    def valid(self, group: Tensor) -> Tensor:
        """bool[..., M]: which places of the groups ``group`` (int64[...]) hold a label."""
        places = torch.arange(self.weight_GMH.shape[1], device=group.device)
        return places < self.size_G[group][..., None]

    def loss(self, vectors_BH: Tensor, shortlist_BK: Tensor, row_P: Tensor, label_P: Tensor) -> Tensor:
        """Binary cross-entropy over all candidates, summed over labels and documents."""
        group_P = self.group_L[label_P]
        pairs = candidate_pairs(shortlist_BK, row_P, group_P)
        logits_NM = self.logits(vectors_BH, pairs).float()
        target_NM = torch.zeros_like(logits_NM)
        pair_P = torch.searchsorted(pairs.key_N, group_P * len(vectors_BH) + row_P)
        target_NM[pair_P, self.slot_L[label_P]] = 1
        valid_NM = self.valid(pairs.group_N).to(logits_NM.dtype)
        return F.binary_cross_entropy_with_logits(logits_NM, target_NM, weight=valid_NM, reduction="sum")

    def predict(self, vectors_BH: Tensor, shortlist_BK: Tensor) -> Tensor:
        """float[B, K, M]: probabilities of the labels of the shortlisted groups; 0 where a place is empty."""
        nothing = shortlist_BK.new_empty(0)
        pairs = candidate_pairs(shortlist_BK, nothing, nothing)
        probability_NM = self.logits(vectors_BH, pairs).float().sigmoid() * self.valid(pairs.group_N)
        rows = torch.arange(len(shortlist_BK), device=shortlist_BK.device)[:, None]
        return probability_NM[torch.searchsorted(pairs.key_N, shortlist_BK * len(shortlist_BK) + rows)]
