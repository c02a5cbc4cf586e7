"""Pairs of (document, group), and their products: each pair's document with the block of its group.

Pairs are settled on the host, where all sizes are known: the device never has to be asked for one. How they are multiplied
depends on the device. Where `grouped_mm` is one kernel, and on CPUs, the pairs lie group by group (`Grouped`). On other
accelerators it would be a loop over the groups on the host; there, groups of about as many pairs make one batched product, and
padding takes less than half of the rows (`Padded`).

Letters: B documents, K shortlisted groups, P true pairs, n pairs, N rows of a layout (pairs, and padding if any), U groups in
use, A and C the sides of a product.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from xmc_ray.model.device import has_grouped_kernel, upload
from xmc_ray.model.threads import mapped

MOST_GROUPS = 1023  # of a call: the bfloat16 kernels of GPUs of compute capability 9 and 10 refuse more
_GROUPS = 256  # of a call on a CPU, where calls are made side by side


@dataclass(frozen=True)
class Pairs:
    """Distinct (document, group) pairs on the host, sorted by group, then document.

    ``row_n``, ``group_n``: int64; ``key_n`` = group * B + row, rising.
    """

    row_n: Tensor
    group_n: Tensor
    key_n: Tensor

    @property
    def in_use(self) -> tuple[Tensor, Tensor]:
        """The groups, int64[U], and where the pairs of each end, int32[U]."""
        group_U, count_U = torch.unique_consecutive(self.group_n, return_counts=True)
        return group_U, count_U.cumsum(0).to(torch.int32)

    def numbers(self, row: Tensor, group: Tensor, n_rows: int) -> Tensor:
        """int64, of the arguments' shape: which of these pairs each (document, group) is, of those that are among them.

        ``n_rows`` is B.
        """
        return torch.searchsorted(self.key_n, group * n_rows + row)

    def layouts(self, device: torch.device, dtype: torch.dtype, groups: int) -> "Iterator[tuple[slice, Grouped]]":
        """For ``groups`` groups at a time: their slice of the pairs, and its layout for products of ``dtype`` on ``device``."""
        group_U, ends_U = self.in_use
        ends = [0, *ends_U[groups - 1 :: groups].tolist()]
        ends += [len(self.group_n)] if ends[-1] < len(self.group_n) else []
        kind = Grouped if device.type == "cpu" or has_grouped_kernel(device, dtype) else Padded
        for chunk, (first, last) in enumerate(pairwise(ends)):
            here = slice(chunk * groups, (chunk + 1) * groups)
            yield slice(first, last), kind(group_U[here], ends_U[here] - first, device)

    def layout(self, device: torch.device, dtype: torch.dtype) -> "Grouped":
        """That of all pairs, of which there is at least one."""
        ((_, layout),) = self.layouts(device, dtype, len(self.group_n))
        return layout


def candidate_pairs(shortlist_BK: Tensor, row_P: Tensor, group_P: Tensor, own: range | None = None) -> Pairs:
    """The shortlisted groups of each document plus *all* groups of its true labels, each pair once.

    ``group_P`` are the groups of the true labels of documents ``row_P``; only groups in ``own`` are kept, if it is given.
    There is neither truncation nor padding: no positive is lost, no candidate occurs twice (LightXML, section 3.3, but not the
    fixed-size list of its code).
    """
    n_rows = len(shortlist_BK)
    row_BK = torch.arange(n_rows)[:, None].expand_as(shortlist_BK)
    key_n = torch.cat([(shortlist_BK * n_rows + row_BK).flatten(), group_P * n_rows + row_P])
    if own is not None:
        key_n = key_n[(key_n >= own.start * n_rows) & (key_n < own.stop * n_rows)]
    key_n = torch.unique(key_n)
    return Pairs(key_n % max(n_rows, 1), key_n // max(n_rows, 1), key_n)


class Grouped:
    """Pairs group by group; the layout's rows are the pairs.

    ``group_U``: int64[U], on the device: the groups in the order of `product`'s blocks. ``group_N``: int64, each row's group.
    ``block_N``: int64, the place of each row's group in ``group_U``.
    """

    def __init__(self, groups_U: Tensor, ends_U: Tensor, device: torch.device) -> None:
        """``ends_U``: int32, on the host, where the pairs of each group end."""
        self.device = device
        self._ends = ends_U
        self._ends_U = upload(ends_U, device)
        self._use(groups_U, ends_U.diff(prepend=ends_U.new_zeros(1)))

    def _use(self, groups_U: Tensor, rows_U: Tensor) -> None:
        block_N = torch.repeat_interleave(torch.arange(len(groups_U)), rows_U)
        self.group_U = upload(groups_U, self.device)
        self.block_N, self.group_N = upload(torch.stack([block_N, groups_U[block_N]]), self.device).unbind()

    def __len__(self) -> int:
        return len(self.group_N)

    @property
    def place_n(self) -> Tensor:
        """int64[n], on the host: the row of each pair."""
        return torch.arange(len(self))

    def spread(self, value_n: Tensor) -> Tensor:
        """[N], on the device: numbers of the pairs (on the host) in the order of the rows; 0 in padding."""
        return upload(value_n, self.device)

    def collected(self, value_N: Tensor) -> Tensor:
        """[n, ...]: the rows that are pairs, in order."""
        return value_N

    def without_padding(self, value_N: Tensor) -> Tensor:
        """``value_N`` ([N, ...]), in which padding is set to 0 in place."""
        return value_N

    def product(self, left_NA: Tensor, right_UAC: Tensor) -> Tensor:
        """[N, C]: each row times the matrix of its group."""
        calls = ((left_NA[rows], right_UAC[u], ends_U) for rows, u, ends_U in self._calls())
        return _joined([*mapped(lambda call: F.grouped_mm(*call[:2], offs=call[2]), calls)])

    def outer(self, left_NA: Tensor, right_NC: Tensor) -> Tensor:
        """[U, A, C]: for each group the sum over its rows of the outer products; padding must be 0 on either side."""
        return _joined([F.grouped_mm(left_NA[n].T, right_NC[n], offs=ends_U) for n, _, ends_U in self._calls()])

    def _calls(self) -> Iterator[tuple[slice, slice, Tensor]]:
        most = _GROUPS if self.device.type == "cpu" else MOST_GROUPS
        if len(self._ends) <= most:
            yield slice(None), slice(None), self._ends_U
            return
        starts = [0, *self._ends[most - 1 : -1 : most].tolist(), len(self)]
        for call, (start, end) in enumerate(pairwise(starts)):
            here = slice(call * most, (call + 1) * most)
            yield slice(start, end), here, self._ends_U[here] - start


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


class Padded(Grouped):
    """Groups by their number of pairs, each padded to the next power of two, and one batched product for each such size."""

    def __init__(self, groups_U: Tensor, ends_U: Tensor, device: torch.device) -> None:
        self.device = device
        ends_U = ends_U.long()
        starts_U = torch.cat([ends_U.new_zeros(1), ends_U[:-1]])
        count_U = ends_U - starts_U
        power_U = torch.frexp((count_U - 1).double()).exponent.long()  # of the smallest power of two that is not less
        size_U, order_U = torch.sort(2**power_U, stable=True)
        row_U = torch.empty_like(size_U)
        row_U[order_U] = size_U.cumsum(0) - size_U
        self._place_n = torch.repeat_interleave(row_U - starts_U, count_U) + torch.arange(int(count_U.sum()))
        sizes, counts = torch.unique_consecutive(size_U, return_counts=True)
        self._batches = list(zip(sizes.tolist(), counts.tolist(), strict=True))
        self._use(groups_U[order_U], size_U)
        self._real_N = self.spread(torch.ones(len(self._place_n), dtype=torch.bool))
        self._on_device_n = upload(self._place_n, device)

    @property
    def place_n(self) -> Tensor:
        """See `Grouped.place_n`."""
        return self._place_n

    def spread(self, value_n: Tensor) -> Tensor:
        """See `Grouped.spread`."""
        value_N = value_n.new_zeros(len(self))
        value_N[self._place_n] = value_n
        return upload(value_N, self.device)

    def collected(self, value_N: Tensor) -> Tensor:
        """See `Grouped.collected`."""
        return value_N.index_select(0, self._on_device_n)

    def without_padding(self, value_N: Tensor) -> Tensor:
        """See `Grouped.without_padding`."""
        return value_N.masked_fill_(~self._real_N[:, None], 0)

    def product(self, left_NA: Tensor, right_UAC: Tensor) -> Tensor:
        """See `Grouped.product`."""
        product_NC = left_NA.new_empty(len(self), right_UAC.shape[2])
        for rows, u, shape in self._calls_of_batches():
            torch.bmm(left_NA[rows].view(*shape, -1), right_UAC[u], out=product_NC[rows].view(*shape, -1))
        return product_NC

    def outer(self, left_NA: Tensor, right_NC: Tensor) -> Tensor:
        """See `Grouped.outer`."""
        outer_UAC = left_NA.new_empty(len(self.group_U), left_NA.shape[1], right_NC.shape[1])
        for rows, u, shape in self._calls_of_batches():
            torch.bmm(left_NA[rows].view(*shape, -1).mT, right_NC[rows].view(*shape, -1), out=outer_UAC[u])
        return outer_UAC

    def _calls_of_batches(self) -> Iterator[tuple[slice, slice, tuple[int, int]]]:
        row = group = 0
        for size, count in self._batches:
            yield slice(row, row + size * count), slice(group, group + count), (count, size)
            row, group = row + size * count, group + count
