"""Output rows: what the recall head and the label table have in common.

Each worker owns the rows of a contiguous slice of the groups, and nothing of the others': not their weights, not their
gradients, not their optimiser state.

The gradient of the rows is never built as a whole. Binary cross-entropy has the gradient sigmoid(x) - y with respect to a
logit x (Renée, Jain et al. 2023, skip the loss and write that down at once); the gradient of a row is the sum of these
numbers times document vectors. These *factors* are kept until the optimiser's step, which multiplies them out a few groups
at a time.

Letters: B documents, G groups in all, g own groups, U groups of a chunk, H width.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from xmc_ray.exchange import Exchange

_SEEDED_TOGETHER = 256  # rows that share a random generator: few enough to start a slice anywhere, enough to be quick


class RowGradients(NamedTuple):
    """Gradients of a chunk of groups: ``weight`` float32[U, ..., H], ``bias`` float32[U, ...]; ``groups`` indexes own ones."""

    groups: slice | Tensor
    weight: Tensor
    bias: Tensor


class OwnedRows(nn.Module):
    """A weight row and a bias for every output of this worker's slice of the groups.

    ``weight``: [g, ..., H], ``bias``: [g, ...]. They take no part in autograd: `gradients` is what is due to them.
    """

    weight: nn.Parameter
    bias: nn.Parameter

    def __init__(self, n_groups: int, exchange: Exchange) -> None:
        super().__init__()
        self.exchange = exchange
        self.n_groups = n_groups
        self.own = exchange.share(n_groups)

    def start(self, shape: tuple[int, ...], std: float, seed: int, dtype: torch.dtype = torch.float32) -> None:
        """Normal weights of ``shape`` (without the groups) and zero biases: the same on any number of workers.

        ``dtype`` is that of the weights; biases, one number in a row of many, are always float32.
        """
        self.weight = nn.Parameter(seeded_normal(self.own, shape, std, seed, dtype), requires_grad=False)
        self.bias = nn.Parameter(torch.zeros(len(self.own), *shape[:-1]), requires_grad=False)

    def owned(self, group: Tensor) -> Tensor:
        """bool: which of the groups are this worker's."""
        return (group >= self.own.start) & (group < self.own.stop)

    def gradients(self) -> Iterator[RowGradients]:
        """The gradients of all micro-batches since the last call, each group at most once; they are forgotten then."""
        raise NotImplementedError


def seeded_normal(rows: range, shape: tuple[int, ...], std: float, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """[len(rows), *shape]: rows of an endless table of normal numbers, the same in whatever slices."""
    table, generator = torch.empty(len(rows), *shape, dtype=dtype), torch.Generator()
    for chunk in range(rows.start // _SEEDED_TOGETHER, -(-rows.stop // _SEEDED_TOGETHER)):
        first = chunk * _SEEDED_TOGETHER
        values = torch.randn(_SEEDED_TOGETHER, *shape, generator=generator.manual_seed(seed * 1_000_003 + chunk)).mul_(std)
        wanted = range(max(first, rows.start), min(first + _SEEDED_TOGETHER, rows.stop))
        table[wanted.start - rows.start : wanted.stop - rows.start] = values[wanted.start - first : wanted.stop - first]
    return table


def with_gradient(inputs: Tensor, value: Tensor, gradient: Tensor) -> Tensor:
    """``value`` as a function of ``inputs`` whose gradient is already known to be ``gradient``."""
    result: Tensor = _Known.apply(inputs, value, gradient)  # type: ignore[no-untyped-call]
    return result


class _Known(torch.autograd.Function):
    @staticmethod
    def forward(ctx, inputs, value, gradient):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(gradient.to(inputs.dtype))
        return value.clone()

    @staticmethod
    def backward(ctx, outer):  # type: ignore[no-untyped-def]
        (gradient,) = ctx.saved_tensors
        return gradient * outer, None, None
