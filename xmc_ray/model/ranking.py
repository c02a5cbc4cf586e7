"""Ranking: the candidate labels of a document, and their scores from the label table.

The table is stored group by group, ``weight_GMH``, so that a shortlisted group is one contiguous block. A step scores *pairs*
of (document, group): all documents of a group are multiplied with its block in one product (`model.pairs`), and rows of single
labels are never gathered. Every worker scores the pairs of the groups it owns, whichever worker the document came from.

Letters: B documents, K shortlisted groups, G groups (the own ones, in a table), M places in a group (a multiple of 8, unused
ones masked), n pairs, N rows of their layout, U groups in use, P true and J judged (document, label) pairs, H width of the
bottleneck.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from xmc_ray.data.groups import LabelGroups
from xmc_ray.model.device import upload
from xmc_ray.model.filtering import BatchFilter
from xmc_ray.model.judged import Judged
from xmc_ray.model.pairs import MOST_GROUPS, Grouped, Pairs, candidate_pairs
from xmc_ray.model.sharding import Exchange, OwnedRows, RowGradients, mean_squares, with_gradient

ALIGNMENT = 8  # grouped_mm needs rows of a multiple of 16 bytes: 8 numbers of two bytes
_GROUPS = 64  # groups that are multiplied at a time on a CPU: few enough for their blocks to stay in the cache
_SCORES = 1 << 20  # scores of all labels that are in memory at a time; in prediction, a GPU takes 32 times as many
_DENSE = 8  # if more than one in so many (document, group) pairs is wanted, all are computed by one product


class _Pending(NamedTuple):
    """Of a micro-batch: its pairs and their rows in the gradients of its logits."""

    pairs: Pairs
    place_n: Tensor
    gradient_NM: Tensor
    vectors_BH: Tensor


class LabelTable(OwnedRows):
    """A vector and a bias for every label of this worker's groups, in one block per group.

    ``weight``: [G, M, H], ``bias``: [G, M]. ``group_L``, ``slot_L``: int64, each label's group and place in it, on the host.
    """

    size_G: Tensor

    def __init__(
        self, groups: LabelGroups, width: int, exchange: Exchange, seed: int, dtype: torch.dtype = torch.float32
    ) -> None:
        super().__init__(len(groups), exchange)
        self.places = -(-int(groups.sizes_G.max()) // ALIGNMENT) * ALIGNMENT
        self.start((self.places, width), width**-0.5, seed, dtype)
        self.group_L, self.slot_L = torch.from_numpy(groups.group_L), torch.from_numpy(groups.slot_L)
        self.register_buffer("size_G", torch.from_numpy(groups.sizes_G), persistent=False)
        self._pending: list[_Pending] = []

    def valid(self, group: Tensor) -> Tensor:
        """bool[..., M]: which places of the groups ``group`` (int64[...]) have a label."""
        places = torch.arange(self.weight.shape[1], device=group.device)
        return places < self.size_G[group][..., None]

    def loss(
        self,
        vectors_BH: Tensor,
        shortlist_BK: Tensor,
        row_P: Tensor,
        label_P: Tensor,
        documents: int,
        judged: Judged | None = None,
    ) -> Tensor:
        """Binary cross-entropy over all candidates in own groups, summed over labels and divided by ``documents``.

        A (row, label) pair, on the host, may occur more than once. ``judged``: labels, whose groups are candidates as well.
        """
        is_training = torch.is_grad_enabled()
        with torch.no_grad():
            loss, gradient_BH, pending = self._loss(vectors_BH, shortlist_BK.cpu(), row_P, label_P, documents, judged)
        if is_training:
            self._pending.append(pending)
        return with_gradient(vectors_BH, loss, gradient_BH)

    def _loss(
        self,
        vectors_BH: Tensor,
        shortlist_BK: Tensor,
        row_P: Tensor,
        label_P: Tensor,
        documents: int,
        judged: Judged | None,
    ) -> tuple[Tensor, Tensor, _Pending]:
        """The loss, its gradient by the vectors, float32[B, H], and what that of the rows is made of.

        All but the vectors are on the host.
        """
        vectors_BH, gradient_BH = vectors_BH.detach(), torch.zeros_like(vectors_BH, dtype=torch.float32)
        group_P = self.group_L[label_P]
        own_P = self.owned(group_P)
        row_P, label_P, group_P = row_P[own_P], label_P[own_P], group_P[own_P]
        needed = row_P, group_P
        if judged is not None:
            judged = judged.where(self.owned(self.group_L[judged.output_J]))
            group_J = self.group_L[judged.output_J]
            needed = torch.cat([row_P, judged.row_J]), torch.cat([group_P, group_J])
        pairs = candidate_pairs(shortlist_BK, *needed, self.own)
        if not len(pairs.key_n):
            nothing = _Pending(pairs, pairs.row_n, vectors_BH.new_zeros(0, self.places), vectors_BH)
            return gradient_BH.sum(), gradient_BH, nothing
        layout = pairs.layout(vectors_BH.device, vectors_BH.dtype)
        row_N = layout.spread(pairs.row_n)
        weight_UMH = self.weight.index_select(0, layout.group_U - self.own.start).to(vectors_BH.dtype)
        logits_NM = self._scores(vectors_BH, weight_UMH, row_N, layout)

        place_P = layout.place_n[pairs.numbers(row_P, group_P, len(vectors_BH))]
        true_P = torch.unique(place_P * self.places + self.slot_L[label_P])
        true = upload(torch.stack([true_P // self.places, true_P % self.places]), vectors_BH.device).unbind()
        valid_NM = layout.without_padding(self.valid(layout.group_N))
        loss = (F.softplus(logits_NM).mul_(valid_NM).sum() - logits_NM[true].sum()) / documents
        if judged is not None:
            place_J = layout.place_n[pairs.numbers(judged.row_J, group_J, len(vectors_BH))]
            at_J = upload(torch.stack([place_J, self.slot_L[judged.output_J]]), vectors_BH.device).unbind()
            loss += judged.excess(logits_NM[at_J])[0] / documents
        gradient_NM = logits_NM.sigmoid_().mul_(valid_NM)
        gradient_NM[true] -= 1
        if judged is not None:
            gradient_NM[at_J] *= judged.weight
        gradient_NM = (gradient_NM / documents).to(vectors_BH.dtype)
        gradient_BH.index_add_(0, row_N, layout.product(gradient_NM, weight_UMH).float())
        return loss, gradient_BH, _Pending(pairs, layout.place_n, gradient_NM, vectors_BH)

    def predict(self, vectors_BH: Tensor, shortlist_BK: Tensor) -> Tensor:
        """float[B, K, M]: probabilities of the labels of the shortlisted groups; -1 where this worker has no such label."""
        shortlist_BK, nothing = shortlist_BK.cpu(), torch.empty(0, dtype=torch.int64)
        pairs = candidate_pairs(shortlist_BK, nothing, nothing, self.own)
        n_pairs = len(pairs.key_n)
        probability_nM = vectors_BH.new_full((n_pairs + 1, self.places), -1, dtype=torch.float32)  # last: not here
        for here, layout, logits_NM in self._logits(vectors_BH, pairs):
            probability_nM[here] = layout.collected(logits_NM.sigmoid_())
        probability_nM[:-1].masked_fill_(~self.valid(upload(pairs.group_n, vectors_BH.device)), -1)
        row_BK = torch.arange(len(shortlist_BK))[:, None].expand_as(shortlist_BK)
        place_BK = pairs.numbers(row_BK, shortlist_BK, len(shortlist_BK))
        place_BK = torch.where(self.owned(shortlist_BK), place_BK, n_pairs)
        return probability_nM[upload(place_BK, vectors_BH.device)]

    def peaks(self, vectors_BH: Tensor, wanted_Bg: Tensor, filters: BatchFilter | None = None) -> Tensor:
        """float32[B, g]: the highest logit in each own group that is wanted for a document (``wanted_Bg``: bool), of the labels
        that its filter allows.

        For other groups it is the highest logit or -inf, whichever is less work. Only a few groups' scores are in memory at a
        time.
        """
        peak_Bg = vectors_BH.new_full(wanted_Bg.shape, -torch.inf, dtype=torch.float32)
        if int(wanted_Bg.sum()) * _DENSE <= wanted_Bg.numel():
            own_n, row_n = wanted_Bg.T.nonzero().cpu().unbind(1)
            pairs = Pairs(row_n, own_n + self.own.start, own_n)
            for here, layout, logits_NM in self._logits(vectors_BH, pairs):
                logits_nM = layout.collected(logits_NM)
                row_N, group_N = upload(torch.stack([row_n[here], pairs.group_n[here]]), vectors_BH.device).unbind()
                logits_nM.masked_fill_(~self.valid(group_N), -torch.inf)
                if filters is not None:
                    filters.bar_pairs(logits_nM, row_N, group_N)
                peak_Bg[row_N, group_N - self.own.start] = logits_nM.amax(1)
            return peak_Bg
        step = max(1, self._on_device(_SCORES, 32 * _SCORES) // (len(vectors_BH) * self.places))
        for first in range(0, len(self.own), step):
            peak_Bg[:, first : first + step] = self._peaks_of_all(vectors_BH, slice(first, first + step), filters)
        return peak_Bg

    def input_squares(self) -> tuple[Tensor, int]:
        """See `OwnedRows.input_squares`: of the document vectors, whichever groups they are scored against."""
        return mean_squares([part.vectors_BH for part in self._pending], self.weight.shape[-1])

    def gradients(self) -> Iterator[RowGradients]:
        """Those of the groups that were used since the last call, a chunk of groups at a time."""
        if not self._pending:
            return
        pending, self._pending = self._pending, []
        group_n, order_n = torch.cat([part.pairs.group_n for part in pending]).sort(stable=True)
        gradient_NM = torch.cat([part.gradient_NM for part in pending])
        vectors_BH = torch.cat([part.vectors_BH for part in pending])
        source_n = _numbered([part.place_n for part in pending], [len(part.gradient_NM) for part in pending])[order_n]
        row_n = _numbered([part.pairs.row_n for part in pending], [len(part.vectors_BH) for part in pending])[order_n]
        pairs = Pairs(row_n, group_n, group_n)
        for here, layout in pairs.layouts(vectors_BH.device, vectors_BH.dtype, self._on_device(_GROUPS, MOST_GROUPS)):
            part_NM = layout.without_padding(gradient_NM.index_select(0, layout.spread(source_n[here])))
            weight_UMH = layout.outer(part_NM, vectors_BH.index_select(0, layout.spread(row_n[here])))
            bias_UM = part_NM.new_zeros(len(layout.group_U), part_NM.shape[1], dtype=torch.float32)
            bias_UM.index_add_(0, layout.block_N, part_NM.float())
            yield RowGradients(layout.group_U - self.own.start, weight_UMH.float(), bias_UM)

    def _on_device(self, on_cpu: int, elsewhere: int) -> int:
        return on_cpu if self.weight.device.type == "cpu" else elsewhere

    def _logits(self, vectors_BH: Tensor, pairs: Pairs) -> Iterator[tuple[slice, Grouped, Tensor]]:
        """Slices of ``pairs``, which are of own groups, a few groups at a time; float32[N, M]: the logits in each's layout."""
        at_a_time = self._on_device(_GROUPS, MOST_GROUPS)
        for here, layout in pairs.layouts(vectors_BH.device, vectors_BH.dtype, at_a_time):
            weight_UMH = self.weight.index_select(0, layout.group_U - self.own.start)  # twice as fast as [...]
            row_N = layout.spread(pairs.row_n[here])
            yield here, layout, self._scores(vectors_BH, weight_UMH.to(vectors_BH.dtype), row_N, layout)

    def _peaks_of_all(self, vectors_BH: Tensor, here: slice, filters: BatchFilter | None) -> Tensor:
        """[B, U]: the highest logit in each own group in ``here``, by one product."""
        weight_UMH, bias_UM = self.weight[here].to(vectors_BH.dtype), self.bias[here].float()
        groups = torch.arange(here.start, here.start + len(bias_UM), device=bias_UM.device)
        bias_UM = bias_UM.masked_fill(~self.valid(groups + self.own.start), -torch.inf).to(vectors_BH.dtype)
        logits_BUM = F.linear(vectors_BH, weight_UMH.flatten(0, 1), bias_UM.flatten()).view(-1, *bias_UM.shape)
        if filters is not None:
            filters.bar_places(logits_BUM, groups + self.own.start)
        return logits_BUM.amax(2).float()

    def _scores(self, vectors_BH: Tensor, weight_UMH: Tensor, row_N: Tensor, layout: Grouped) -> Tensor:
        """float32[N, M]: the product of each row's document vector with the block of its group, plus the biases."""
        product_NM = layout.product(vectors_BH.index_select(0, row_N), weight_UMH.transpose(1, 2))
        return product_NM.float() + self.bias.index_select(0, layout.group_N - self.own.start).float()


def _numbered(parts: list[Tensor], sizes: list[int]) -> Tensor:
    """Row numbers of several tensors of these ``sizes``, numbered through."""
    return torch.cat([part + sum(sizes[:place]) for place, part in enumerate(parts)])
