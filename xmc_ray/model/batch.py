"""Tokens to batches.

Documents of similar length share a batch, which is padded to its longest document and not to the maximum.

Letters: B documents, T tokens, P true and J judged (document, label) pairs.
"""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from xmc_ray.data.labels import IntArray, list_lengths


def _no_pairs() -> Tensor:
    return torch.empty(0, dtype=torch.int64)


@dataclass(frozen=True)
class Batch:
    """Padded documents and their labels, on the host, ready for the model.

    ``tokens_BT``: int64, 0 where padded; ``mask_BT``: bool, True at real tokens; ``row_P``, ``label_P``: int64, the true
    (document, label) pairs, in rising order of rows; empty in prediction. ``row_J``, ``label_J``: likewise the pairs that an
    editor has judged, each once, right if they are among the true ones (`data.feedback`); empty without feedback.
    """

    tokens_BT: Tensor
    mask_BT: Tensor
    row_P: Tensor
    label_P: Tensor
    row_J: Tensor = dataclasses.field(default_factory=_no_pairs)
    label_J: Tensor = dataclasses.field(default_factory=_no_pairs)

    def split(self, parts: int) -> "list[Batch]":
        """``parts`` micro-batches of nearly equal size, in order, each padded to its longest document."""
        ends = [len(self) * part // parts for part in range(parts + 1)]
        return [self._rows(first, last) for first, last in pairwise(ends)] if parts > 1 else [self]

    def _rows(self, first: int, last: int) -> "Batch":
        mask_BT = self.mask_BT[first:last]
        width = max(1, int(mask_BT.sum(1).max()))  # of empty documents, as in `make_batch`
        inside_P, inside_J = ((row >= first) & (row < last) for row in (self.row_P, self.row_J))
        truth = self.row_P[inside_P] - first, self.label_P[inside_P]
        judged = self.row_J[inside_J] - first, self.label_J[inside_J]
        return Batch(self.tokens_BT[first:last, :width], mask_BT[:, :width], *truth, *judged)

    def __len__(self) -> int:
        return len(self.tokens_BT)


def make_batch(tokens: pa.ListArray, labels: pa.ListArray | None = None, judged: pa.ListArray | None = None) -> Batch:
    """Pad ``tokens`` (list<int32>[B]) to the longest; ``labels``, and those ``judged``, are list<int32>[B] of label ids."""
    lengths = list_lengths(tokens)
    mask_BT = np.arange(max(int(lengths.max(initial=0)), 1)) < lengths[:, None]
    tokens_BT = np.zeros(mask_BT.shape, np.int64)
    tokens_BT[mask_BT] = pc.list_flatten(tokens).to_numpy()
    return Batch(torch.from_numpy(tokens_BT), torch.from_numpy(mask_BT), *_pairs(labels), *_pairs(judged))


def _pairs(lists: pa.ListArray | None) -> tuple[Tensor, Tensor]:
    """Rows and values of lists, int64 each; empty for None."""
    if lists is None:
        return _no_pairs(), _no_pairs()
    row_P, value_P = np.repeat(np.arange(len(lists)), list_lengths(lists)), pc.list_flatten(lists).to_numpy()
    return torch.from_numpy(row_P), torch.from_numpy(value_P.astype(np.int64))


def budget_batches(lengths: IntArray, token_budget: int) -> Iterator[IntArray]:
    """Row numbers of batches for prediction: longest documents first, at most ``token_budget`` tokens with padding each."""
    by_length = np.argsort(-lengths, kind="stable")
    start = 0
    while start < len(by_length):
        rows = max(1, token_budget // max(1, int(lengths[by_length[start]])))
        yield by_length[start : start + rows]
        start += rows
