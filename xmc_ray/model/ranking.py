"""Ranking: the candidate labels of a document, and their scores from the label table.

The table is stored group by group, ``weight_GMH``, so that a shortlisted group is one contiguous block. A step scores *pairs*
of (document, group), sorted by group: all documents of a group are multiplied with its block in one grouped matrix product
(`torch.nn.functional.grouped_mm`), and rows of single labels are never gathered. Every worker scores the pairs of the groups it
owns, whichever worker the document came from.

Letters: B documents, K shortlisted groups, G groups (the own ones, in a table), M places in a group (a multiple of 8, unused
ones masked), N pairs, U groups in use, P true (document, label) pairs, H width of the bottleneck.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from xmc_ray.data.groups import LabelGroups
from xmc_ray.model.sharding import Exchange, OwnedRows, RowGradients, mean_squares, with_gradient

ALIGNMENT = 8  # grouped_mm needs rows of a multiple of 16 bytes: 8 numbers of two bytes
MOST_GROUPS = 1023  # of a call: the bfloat16 kernels of GPUs of compute capability 9 and 10 refuse more
_GROUPS = 64  # groups that are multiplied at a time: few enough for their blocks to stay in the cache
_SCORES = 1 << 20  # scores of all labels that are in memory at a time; in prediction, a GPU takes 32 times as many of either
_DENSE = 8  # if more than one in so many (document, group) pairs is wanted, all are computed by one product


@dataclass(frozen=True)
class Pairs:
    """Distinct (document, group) pairs, sorted by group, then document.

    ``row_N``, ``group_N``: int64; ``key_N`` = group * B + row, rising.
    """

    row_N: Tensor
    group_N: Tensor
    key_N: Tensor

    @property
    def in_use(self) -> tuple[Tensor, Tensor]:
        """The groups, int64[U], and where the pairs of each end, int32[U]."""
        group_U, count_U = torch.unique_consecutive(self.group_N, return_counts=True)
        return group_U, count_U.cumsum(0).to(torch.int32)

    def chunks(self, groups: int) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """For ``groups`` groups at a time: their slice of pairs, the groups int64[U], and where the pairs of each end in it."""
        group_U, ends_U = self.in_use
        ends = [0, *ends_U[groups - 1 :: groups].tolist()]
        ends += [len(self.group_N)] if ends[-1] < len(self.group_N) else []
        for chunk, (first, last) in enumerate(pairwise(ends)):
            here = slice(chunk * groups, (chunk + 1) * groups)
            yield slice(first, last), group_U[here], ends_U[here] - first


def candidate_pairs(shortlist_BK: Tensor, row_P: Tensor, group_P: Tensor, own: range | None = None) -> Pairs:
    """The shortlisted groups of each document plus *all* groups of its true labels, each pair once.

    ``group_P`` are the groups of the true labels of documents ``row_P``; only groups in ``own`` are kept, if it is given.
    There is neither truncation nor padding: no positive is lost, no candidate occurs twice (LightXML, section 3.3, but not the
    fixed-size list of its code).
    """
    n_rows = len(shortlist_BK)
    row_BK = torch.arange(n_rows, device=shortlist_BK.device)[:, None].expand_as(shortlist_BK)
    key_N = torch.cat([(shortlist_BK * n_rows + row_BK).flatten(), group_P * n_rows + row_P])
    if own is not None:
        key_N = key_N[(key_N >= own.start * n_rows) & (key_N < own.stop * n_rows)]
    key_N = torch.unique(key_N)
    return Pairs(key_N % max(n_rows, 1), key_N // max(n_rows, 1), key_N)


def grouped_product(left: Tensor, right: Tensor, ends_U: Tensor) -> Tensor:
    """[N, b]: rows of ``left`` [N, a] times their group's matrix in ``right`` [U, a, b]; a group's rows end at ``ends_U``."""
    if len(ends_U) == 0:
        return left.new_zeros(len(left), right.shape[-1])
    if len(ends_U) <= MOST_GROUPS:
        return F.grouped_mm(left, right, offs=ends_U)
    starts = [0, *ends_U[MOST_GROUPS - 1 : -1 : MOST_GROUPS].tolist()]
    parts = [
        F.grouped_mm(left[start:end], right[first : first + MOST_GROUPS], offs=ends_U[first : first + MOST_GROUPS] - start)
        for first, start, end in zip(range(0, len(ends_U), MOST_GROUPS), starts, [*starts[1:], len(left)], strict=True)
    ]
    return torch.cat(parts)


class _Pending(NamedTuple):
    group_N: Tensor
    row_N: Tensor
    gradient_NM: Tensor
    vectors_BH: Tensor


class LabelTable(OwnedRows):
    """A vector and a bias for every label of this worker's groups, in one block per group.

    ``weight``: [G, M, H], ``bias``: [G, M].
    """

    group_L: Tensor
    slot_L: Tensor
    size_G: Tensor

    def __init__(
        self, groups: LabelGroups, width: int, exchange: Exchange, seed: int, dtype: torch.dtype = torch.float32
    ) -> None:
        super().__init__(len(groups), exchange)
        self.places = -(-int(groups.sizes_G.max()) // ALIGNMENT) * ALIGNMENT
        self.start((self.places, width), width**-0.5, seed, dtype)
        self.register_buffer("group_L", torch.from_numpy(groups.group_L), persistent=False)
        self.register_buffer("slot_L", torch.from_numpy(groups.slot_L), persistent=False)
        self.register_buffer("size_G", torch.from_numpy(groups.sizes_G), persistent=False)
        self._pending: list[_Pending] = []

    def valid(self, group: Tensor) -> Tensor:
        """bool[..., M]: which places of the groups ``group`` (int64[...]) have a label."""
        places = torch.arange(self.weight.shape[1], device=group.device)
        return places < self.size_G[group][..., None]

    def loss(self, vectors_BH: Tensor, shortlist_BK: Tensor, row_P: Tensor, label_P: Tensor, documents: int) -> Tensor:
        """Binary cross-entropy over all candidates in own groups, summed over labels and divided by ``documents``.

        A (row, label) pair may occur more than once.
        """
        training = torch.is_grad_enabled()
        with torch.no_grad():
            group_P = self.group_L[label_P]
            own_P = self.owned(group_P)
            row_P, label_P, group_P = row_P[own_P], label_P[own_P], group_P[own_P]
            pairs = candidate_pairs(shortlist_BK, row_P, group_P, self.own)
            group_U, ends_U = pairs.in_use
            weight_UMH = self.weight[group_U - self.own.start].to(vectors_BH.dtype)
            logits_NM = self._scores(vectors_BH, weight_UMH, pairs, ends_U)

            place_P = torch.searchsorted(pairs.key_N, group_P * len(vectors_BH) + row_P)
            true_P = torch.unique(place_P * logits_NM.shape[1] + self.slot_L[label_P])
            true = true_P // logits_NM.shape[1], true_P % logits_NM.shape[1]
            valid_NM = self.valid(pairs.group_N)
            loss = (F.softplus(logits_NM).mul_(valid_NM).sum() - logits_NM[true].sum()) / documents
            gradient_NM = logits_NM.sigmoid_().mul_(valid_NM)
            gradient_NM[true] -= 1
            gradient_NM = (gradient_NM / documents).to(vectors_BH.dtype)
            if training:
                self._pending.append(_Pending(pairs.group_N, pairs.row_N, gradient_NM, vectors_BH.detach()))
            gradient_NH = grouped_product(gradient_NM, weight_UMH, ends_U)
            gradient_BH = torch.zeros_like(vectors_BH).index_add_(0, pairs.row_N, gradient_NH)
        return with_gradient(vectors_BH, loss, gradient_BH)

    def predict(self, vectors_BH: Tensor, shortlist_BK: Tensor) -> Tensor:
        """float[B, K, M]: probabilities of the labels of the shortlisted groups; -1 where this worker has no such label."""
        nothing = shortlist_BK.new_empty(0)
        pairs = candidate_pairs(shortlist_BK, nothing, nothing, self.own)
        n_pairs = len(pairs.key_N)
        probability_NM = vectors_BH.new_full((n_pairs + 1, self.places), -1, dtype=torch.float32)  # last: not here
        for here, logits_NM in self._logits(vectors_BH, pairs):
            probability_NM[here] = logits_NM.sigmoid_()
        probability_NM[:-1].masked_fill_(~self.valid(pairs.group_N), -1)
        row_BK = torch.arange(len(shortlist_BK), device=shortlist_BK.device)[:, None].expand_as(shortlist_BK)
        place_BK = torch.searchsorted(pairs.key_N, shortlist_BK * len(shortlist_BK) + row_BK)
        place_BK = torch.where(self.owned(shortlist_BK), place_BK, n_pairs)
        return probability_NM[place_BK]

    def peaks(self, vectors_BH: Tensor, wanted_Bg: Tensor) -> Tensor:
        """float32[B, g]: the highest logit in each own group that is wanted for a document (``wanted_Bg``: bool).

        For other groups it is the highest logit or -inf, whichever is less work. Only a few groups' scores are in memory at a
        time.
        """
        peak_Bg = vectors_BH.new_full(wanted_Bg.shape, -torch.inf, dtype=torch.float32)
        if int(wanted_Bg.sum()) * _DENSE <= wanted_Bg.numel():
            group_N, row_N = wanted_Bg.T.nonzero(as_tuple=True)
            pairs = Pairs(row_N, group_N + self.own.start, group_N)
            for here, logits_NM in self._logits(vectors_BH, pairs):
                logits_NM.masked_fill_(~self.valid(pairs.group_N[here]), -torch.inf)
                peak_Bg[row_N[here], group_N[here]] = logits_NM.amax(1)
            return peak_Bg
        step = max(1, self._at_a_time(_SCORES) // (len(vectors_BH) * self.places))
        for first in range(0, len(self.own), step):
            peak_Bg[:, first : first + step] = self._peaks_of_all(vectors_BH, slice(first, first + step))
        return peak_Bg

    def input_squares(self) -> tuple[Tensor, int]:
        """See `OwnedRows.input_squares`: of the document vectors, whichever groups they are scored against."""
        return mean_squares([part.vectors_BH for part in self._pending], self.weight.shape[-1])

    def gradients(self) -> Iterator[RowGradients]:
        """Those of the groups that were used since the last call, a chunk of groups at a time."""
        if not self._pending:
            return
        pending, self._pending = self._pending, []
        group_N, order = torch.cat([part.group_N for part in pending]).sort(stable=True)
        gradient_NM = torch.cat([part.gradient_NM for part in pending])[order]
        starts = torch.tensor([0] + [len(part.vectors_BH) for part in pending[:-1]]).cumsum(0).tolist()
        row_N = torch.cat([part.row_N + start for part, start in zip(pending, starts, strict=True)])[order]
        vectors_BH = torch.cat([part.vectors_BH for part in pending])
        for here, group_U, ends_U in Pairs(row_N, group_N, group_N).chunks(_GROUPS):
            part_NM, vectors_NH = gradient_NM[here], vectors_BH[row_N[here]]
            weight_UMH = F.grouped_mm(part_NM.T, vectors_NH, offs=ends_U)
            bias_UM = part_NM.new_zeros(len(group_U), part_NM.shape[1], dtype=torch.float32)
            bias_UM.index_add_(0, torch.searchsorted(group_U, group_N[here]), part_NM.float())
            yield RowGradients(group_U - self.own.start, weight_UMH.float(), bias_UM)

    def _at_a_time(self, on_cpu: int) -> int:
        return on_cpu if self.weight.device.type == "cpu" else 32 * on_cpu

    def _logits(self, vectors_BH: Tensor, pairs: Pairs) -> Iterator[tuple[slice, Tensor]]:
        """Slices of ``pairs``, which are of own groups, a few groups at a time, and float32[n, M]: the logits of each slice."""
        for here, group_U, ends_U in pairs.chunks(self._at_a_time(_GROUPS)):
            part = Pairs(pairs.row_N[here], pairs.group_N[here], pairs.key_N[here])
            weight_UMH = self.weight.index_select(0, group_U - self.own.start)  # twice as fast as [...]
            yield here, self._scores(vectors_BH, weight_UMH.to(vectors_BH.dtype), part, ends_U)

    def _peaks_of_all(self, vectors_BH: Tensor, here: slice) -> Tensor:
        """[B, U]: the highest logit in each own group in ``here``, by one product."""
        weight_UMH, bias_UM = self.weight[here].to(vectors_BH.dtype), self.bias[here].float()
        groups = torch.arange(here.start, here.start + len(bias_UM), device=bias_UM.device)
        bias_UM = bias_UM.masked_fill(~self.valid(groups + self.own.start), -torch.inf).to(vectors_BH.dtype)
        logits_BC = F.linear(vectors_BH, weight_UMH.flatten(0, 1), bias_UM.flatten())
        return logits_BC.view(-1, *bias_UM.shape).amax(2).float()

    def _scores(self, vectors_BH: Tensor, weight_UMH: Tensor, pairs: Pairs, ends_U: Tensor) -> Tensor:
        """float32[N, M]: the product of each pair's document vector with the block of its group, plus the biases."""
        product_NM = grouped_product(vectors_BH[pairs.row_N], weight_UMH.transpose(1, 2), ends_U)
        return product_NM.float() + self.bias[pairs.group_N - self.own.start].float()
