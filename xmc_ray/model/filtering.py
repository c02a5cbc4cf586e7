"""Filters in prediction: labels that a document must not get are left out before its best ones are chosen.

A mask of every document would have to be gathered for every batch. Documents of one filter are neighbours in a batch instead,
and each such *run* is masked in place, where a filter makes exceptions: most allow few labels, or all but a few. Where all of
them do, a table says of each filter which groups to look at, or not to look at.

Letters: B documents, b of a run, g own groups, U some of them, W places for such a number, M places in a group, L labels,
N (document, group) pairs; R runs; C cells of [B, g].
"""

import math
from collections.abc import Sequence
from functools import cached_property, lru_cache, partial
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from xmc_ray.data.filters import LabelFilters
from xmc_ray.data.labels import IntArray

BARRED = -1e30  # in place of a logit: its sigmoid is 0, and yet it is more than the -inf of what is no group at all

_FEW = 4  # times as many groups as filters name, there are at least, where these are gathered for each document
_TABLE = 1 << 20  # numbers in the table of the groups that all filters name, if there are so few
_EACH = 16  # of these, a filter counts for so many beside its own: each takes some microseconds to look at
_MASK_BYTES = 256 << 20  # of the masks that are kept
_NONE = np.zeros(0, np.int64)


class FilterMasks:
    """The masks of filters for a model; those that were used last are kept.

    ``group_L``: int64, the group of each label; ``label_GM``: int64, the labels of all groups in the label table's places, -1
    where there is none; ``own``: this worker's groups.
    """

    def __init__(self, filters: LabelFilters, group_L: Tensor, label_GM: Tensor, own: range) -> None:
        self.filters, self.label_GM, self.n_own = filters, label_GM, len(own)
        kept = max(1, _MASK_BYTES // (filters.n_labels + 4 * len(own)))  # ids of half of the groups at most
        groups = group_L.cpu().numpy(), (label_GM >= 0).sum(1).cpu().numpy(), slice(own.start, own.stop)
        # not of methods: a cache that knows this object keeps it, and itself, until Python looks for cycles
        self.allowed_L1 = lru_cache(kept)(partial(_allowed_L1, filters, label_GM.device))
        self.exceptions_g = lru_cache(kept)(partial(_exceptions_g, filters, groups))

    def of_batch(self, number_B: IntArray) -> "BatchFilter":
        """The filters of a batch, by their numbers; quick if equal ones are neighbours."""
        return BatchFilter(self, number_B)

    @cached_property
    def table(self) -> "Named | None":
        """What all filters name, for a batch to take its rows of; None if that is too much, or as `named` says."""
        exceptions_F = np.diff(self.filters.start_F1)
        if not exceptions_F.all() or _EACH * len(exceptions_F) + exceptions_F.sum() > _TABLE:  # told before any is looked at
            return None
        return self.named(range(len(self.filters)), _TABLE)

    def named(self, numbers: Sequence[int], most: float = math.inf) -> "Named | None":
        """The groups that some filters name; None unless each names some, few of all, all alike, in at most so many places."""
        named = [self.exceptions_g(number) for number in numbers]
        size_R, kinds = np.array([len(group_U) for group_U, _ in named]), {are_open for _, are_open in named}
        are_many = _FEW * size_R.max() > self.n_own or len(numbers) * size_R.max() > most
        if are_many or len(kinds) > 1 or not size_R.all():
            return None
        named_RW = np.empty((len(named), size_R.max()), np.int64)
        for row_W, (group_U, _) in zip(named_RW, named, strict=True):
            row_W[: len(group_U)], row_W[len(group_U) :] = group_U, group_U[0]
        group_RW, is_padding_RW = torch.from_numpy(named_RW), torch.from_numpy(np.arange(named_RW.shape[1]) >= size_R[:, None])
        device = self.label_GM.device
        return Named(group_RW.to(device), is_padding_RW.to(device), kinds == {True})


def _allowed_L1(filters: LabelFilters, device: torch.device, number: int) -> Tensor:
    """bool[L + 1]: the labels that a filter allows; False in the last place, which is that of label -1."""
    return F.pad(torch.from_numpy(filters.allowed(number)), (0, 1)).to(device)


def _exceptions_g(filters: LabelFilters, groups: tuple[IntArray, IntArray, slice], number: int) -> tuple[IntArray, bool]:
    """The own groups with a label that a filter allows, or those without any, whichever are fewer: their numbers among the own
    ones, int64, and whether they are the former.
    """
    group_L, size_G, own = groups
    exceptions_G = np.bincount(group_L[filters.exceptions(number)], minlength=len(size_G))
    is_open_g = (exceptions_G < size_G if filters.denies_F[number] else exceptions_G > 0)[own]
    are_open = 2 * int(is_open_g.sum()) < len(is_open_g)
    return np.flatnonzero(is_open_g == are_open), are_open


class Named(NamedTuple):
    """Own groups that filters name (int64[R, W]), which places repeat the first one (bool[R, W]), and whether they are the open
    ones.
    """

    group_RW: Tensor
    is_padding_RW: Tensor
    are_open: bool


class Run(NamedTuple):
    """Neighbouring documents of a batch, and the number of their filter."""

    rows: slice
    number: int


class BatchFilter:
    """The filters of a batch: their numbers, int64[B]."""

    def __init__(self, masks: FilterMasks, number_B: IntArray) -> None:
        self.masks, self.number_B = masks, number_B

    @cached_property
    def runs(self) -> list[Run]:
        """Neighbours of one filter."""
        starts = np.flatnonzero(np.diff(self.number_B, prepend=-1)).tolist()
        return [Run(slice(*ends), int(self.number_B[ends[0]])) for ends in pairwise([*starts, len(self.number_B)])]

    def bar_groups(self, logit_Bg: Tensor) -> None:
        """Set the logits of own groups without an allowed label to `BARRED`: all at once, since most runs are short."""
        logit_C, (open_C, closed_C, open_B) = logit_Bg.view(-1), self._cells(logit_Bg.shape[1], logit_Bg.device)
        kept_C = logit_C.index_select(0, open_C)
        if len(open_B) == len(logit_Bg):
            logit_Bg.fill_(BARRED)
        else:
            logit_Bg.index_fill_(0, open_B, BARRED)
        logit_C.index_copy_(0, open_C, kept_C)
        logit_C.index_fill_(0, closed_C, BARRED)

    def choices(self, logit_Bg: Tensor) -> tuple[Tensor, Tensor | None]:
        """Logits of own groups to choose from, those without an allowed label `BARRED`; may change ``logit_Bg``.

        Those of all groups and None; or [B, W], where filters open few groups, and which these are, int64[B, W]: the others
        need not be looked at.
        """
        table = self.masks.table
        named = table or self.masks.named([number for _, number in self.runs])
        if named is None:
            self.bar_groups(logit_Bg)
            return logit_Bg, None
        row_B = self._run_B if table is None else torch.from_numpy(self.number_B).to(logit_Bg.device)
        group_BW = named.group_RW[row_B]
        if not named.are_open:
            return logit_Bg.scatter_(1, group_BW, BARRED), None
        return logit_Bg.gather(1, group_BW).masked_fill_(named.is_padding_RW[row_B], BARRED), group_BW

    def _cells(self, n_groups: int, device: torch.device) -> list[Tensor]:
        """Documents whose filters name the groups that are open, int64, and places in their logits, int64[C]: of the groups
        that these name, and of the closed ones that the others' filters name.
        """
        cells: dict[bool, list[IntArray]] = {True: [_NONE], False: [_NONE]}
        open_B = [_NONE]
        for rows, number in self.runs:
            group_U, are_open = self.masks.exceptions_g(number)
            row_b = np.arange(rows.start, rows.stop)
            cells[are_open].append(np.add.outer(row_b * n_groups, group_U).ravel())
            if are_open:
                open_B.append(row_b)
        return [torch.from_numpy(np.concatenate(part)).to(device) for part in (cells[True], cells[False], open_B)]

    def bar_labels(self, score: Tensor, label: Tensor, barred: float) -> None:
        """Set the scores ([B, ...]) of labels (int64[B, ...]) that are not allowed to ``barred``."""
        for rows, number in self.runs:
            score[rows].masked_fill_(~self.masks.allowed_L1(number)[label[rows]], barred)

    def bar_places(self, logit_BUM: Tensor, group_U: Tensor) -> None:
        """Set the logits of all labels of some groups to -inf where they are not allowed."""
        label_UM = self.masks.label_GM[group_U]
        for rows, number in self.runs:
            logit_BUM[rows].masked_fill_(~self.masks.allowed_L1(number)[label_UM], -torch.inf)

    def bar_pairs(self, logit_NM: Tensor, row_N: Tensor, group_N: Tensor) -> None:
        """Set the logits of labels in pairs, which may be in any order, to -inf where they are not allowed."""
        allowed_NM = self._allowed_RL1[self._run_B[row_N][:, None], self.masks.label_GM[group_N]]
        logit_NM.masked_fill_(~allowed_NM, -torch.inf)

    @cached_property
    def _allowed_RL1(self) -> Tensor:
        return torch.stack([self.masks.allowed_L1(number) for _, number in self.runs])

    @cached_property
    def _run_B(self) -> Tensor:
        sizes_R = torch.tensor([rows.stop - rows.start for rows, _ in self.runs], device=self.masks.label_GM.device)
        return torch.repeat_interleave(torch.arange(len(sizes_R), device=sizes_R.device), sizes_R)
