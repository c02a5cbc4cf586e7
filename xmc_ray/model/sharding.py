"""How training is divided among workers: what they exchange, and the output rows that each of them owns.

A step's documents are divided among W workers, and so are the label groups. Every worker owns the rows (weights, biases,
gradients, optimiser state) of a contiguous range of groups and holds none of the others. Features are gathered from all
workers, each scores them against the groups it owns, and the gradients of the features are summed back to where they came
from. Traffic depends on the documents of a step and never on the number of labels.

Bytes are counted as in ring algorithms: to gather n bytes from each of W workers, every worker sends (W - 1) n, as it does to
reduce-scatter a sum; an all-reduce of n bytes sends 2 n (W - 1) / W. A single worker sends nothing.

The gradient of the rows never exists as a whole. Binary cross-entropy has the gradient sigmoid(x) - y with respect to a logit
x (Renee, Jain et al. 2023, compute it directly and skip the loss), and the gradient of a row is the sum of these numbers times
document vectors. These *factors* are kept until the optimiser's step, which multiplies them a few groups at a time.

Letters: B documents, K candidates of each, G groups in all, g own groups, U groups of a chunk, H width.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

_SEEDED_TOGETHER = 256  # rows that share a random generator: few, so that a slice may start anywhere; enough to be fast


class Exchange:
    """The process group that training runs in, or a single process. ``sent``: bytes this worker has sent, by purpose."""

    def __init__(self, rank: int = 0, world: int = 1) -> None:
        self.rank = rank
        self.world = world
        self.sent: dict[str, int] = {}

    @classmethod
    def of_process_group(cls) -> "Exchange":
        """The default process group if `torch.distributed` is initialised, else a single worker."""
        return cls(dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else cls()

    def share(self, n: int) -> range:
        """This worker's contiguous share of ``n`` items; shares differ by at most one."""
        return part_of(n, self.rank, self.world)

    def counts(self, *numbers: int, device: torch.device) -> list[list[int]]:
        """For each of ``numbers``, the values of all workers, by rank."""
        if self.world == 1:
            return [[number] for number in numbers]
        own = torch.tensor(numbers, dtype=torch.int64, device=device)
        table = self._gather_equal(own, "counts").view(self.world, len(numbers))
        return [list(column) for column in zip(*table.tolist(), strict=True)]

    def gather(self, tensor: Tensor, counts: Sequence[int], what: str) -> Tensor:
        """The workers' tensors concatenated in order of rank; they have ``counts`` rows. No gradient flows back."""
        if self.world == 1:
            return tensor
        longest = max(counts)
        if longest == 0:
            return tensor
        padded = F.pad(tensor, [0, 0] * (tensor.ndim - 1) + [0, longest - len(tensor)]).contiguous()
        parts = self._gather_equal(padded, what).split(longest)
        return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])

    def gather_features(self, tensor: Tensor, counts: Sequence[int]) -> Tensor:
        """Like `gather`, as float32, with the gradients of all workers' copies summed on the worker that a row came from.

        Features travel in their own type, and their gradients, which are sums, in float32.
        """
        if self.world == 1:
            return tensor.float()
        gathered: Tensor = _GatherFeatures.apply(tensor, self, counts)  # type: ignore[no-untyped-call]
        return gathered

    def scatter_sum(self, tensor: Tensor, counts: Sequence[int], what: str) -> Tensor:
        """This worker's rows of the sum of all workers' ``tensor`` (reduce-scatter): the reverse of `gather`."""
        longest = max(counts)
        padded = torch.cat([F.pad(part, [0, 0, 0, longest - len(part)]) for part in tensor.split(list(counts))])
        total = padded.new_empty(longest, *padded.shape[1:])
        dist.reduce_scatter_single(total, padded)
        self.count(what, (self.world - 1) * total.nbytes)
        return total[: counts[self.rank]]

    def best_of_all(self, score_BK: Tensor, id_BK: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """The ``k`` best candidates of each document among those of all workers, [B, K] each: scores, falling, and ids."""
        if self.world == 1:
            return score_BK[:, :k], id_BK[:, :k]
        lists = [
            self.gather(part, [len(part)] * self.world, "shortlists").unflatten(0, (self.world, -1)).transpose(0, 1).flatten(1)
            for part in (score_BK, id_BK)
        ]
        best = lists[0].topk(k)
        return best.values, lists[1].gather(1, best.indices)

    def sum(self, tensor: Tensor, what: str = "counts") -> Tensor:
        """The sum over all workers, in place."""
        if self.world > 1:
            dist.all_reduce(tensor)
            self.count(what, self.bytes_of_sum(tensor.nbytes))
        return tensor

    def bytes_of_sum(self, n_bytes: int) -> int:
        """Bytes that a worker sends to sum a tensor of ``n_bytes``."""
        return 2 * n_bytes * (self.world - 1) // self.world

    def count(self, what: str, n_bytes: int) -> None:
        """Add to the bytes sent."""
        self.sent[what] = self.sent.get(what, 0) + n_bytes

    def _gather_equal(self, tensor: Tensor, what: str) -> Tensor:
        gathered = tensor.new_empty(self.world * len(tensor), *tensor.shape[1:])
        dist.all_gather_single(gathered, tensor)
        self.count(what, (self.world - 1) * tensor.nbytes)
        return gathered


class _GatherFeatures(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor, exchange, counts):  # type: ignore[no-untyped-def]
        ctx.exchange, ctx.counts, ctx.dtype = exchange, counts, tensor.dtype
        return exchange.gather(tensor, counts, "features").float()

    @staticmethod
    def backward(ctx, gradient):  # type: ignore[no-untyped-def]
        return ctx.exchange.scatter_sum(gradient, ctx.counts, "feature gradients").to(ctx.dtype), None, None


def part_of(n: int, rank: int, world: int) -> range:
    """The contiguous share of ``n`` items that belongs to ``rank``; shares differ by at most one."""
    return range(n * rank // world, n * (rank + 1) // world)


class RowGradients(NamedTuple):
    """Gradients of a chunk of own groups, by their indices: ``weight`` float32[U, ..., H], ``bias`` float32[U, ...]."""

    groups: slice | Tensor
    weight: Tensor
    bias: Tensor

    def square(self) -> Tensor:
        """float32[U, ...]: the squared norm of each row's gradient, without its bias."""
        return self.weight.square().sum(-1)

    def scaled(self, by_H: Tensor) -> "RowGradients":
        """Those of inputs that are ``by_H`` times as long."""
        return self._replace(weight=self.weight * by_H)

    def descend(self, rows: Tensor, kept: float, rate: Tensor) -> None:
        """Set ``rows`` of the groups to kept * rows - rate * gradient; ``rate`` is float32[U, ...]."""
        left = rows[self.groups].float().mul_(kept)
        rows[self.groups] = rounded(left.addcmul_(self.weight, rate[..., None], value=-1), rows.dtype)


class FactoredGradients(NamedTuple):
    """Gradients of contiguous own groups as a product, factor_UB @ inputs_BH, that is never stored: for fewer inputs than H."""

    groups: slice
    factor_UB: Tensor
    inputs_BH: Tensor

    @property
    def weight(self) -> Tensor:
        """float32[U, H]: the product."""
        return self.factor_UB @ self.inputs_BH

    @property
    def bias(self) -> Tensor:
        """float32[U]."""
        return self.factor_UB.sum(1)

    def square(self) -> Tensor:
        """float32[U]: |g X|^2 = g (X X') g'."""
        return (self.factor_UB @ (self.inputs_BH @ self.inputs_BH.T)).mul_(self.factor_UB).sum(1).clamp_(min=0)

    def scaled(self, by_H: Tensor) -> "FactoredGradients":
        """See `RowGradients.scaled`."""
        return self._replace(inputs_BH=self.inputs_BH * by_H)

    def descend(self, rows: Tensor, kept: float, rate: Tensor) -> None:
        """See `RowGradients.descend`; ``rows``, which are float32, are read and written once."""
        rows[self.groups].addmm_(self.factor_UB * rate[:, None], self.inputs_BH, beta=kept, alpha=-1)


class OwnedRows(nn.Module):
    """A weight row and a bias for every output of this worker's groups.

    ``weight``: [g, ..., H], ``bias``: [g, ...]. They take no part in autograd; the optimiser asks for their `gradients`.
    ``steady``: so many of the inputs, the first ones, keep their scale in training, as a transformer's normalised features do.
    """

    weight: nn.Parameter
    bias: nn.Parameter
    steady = 0

    def __init__(self, n_groups: int, exchange: Exchange) -> None:
        super().__init__()
        self.exchange = exchange
        self.n_groups = n_groups
        self.own = exchange.share(n_groups)

    def start(self, shape: tuple[int, ...], std: float, seed: int, dtype: torch.dtype = torch.float32) -> None:
        """Normal weights of ``shape`` (without the groups) and zero biases, the same for any number of workers.

        ``dtype`` is that of the weights; biases take little memory and are always float32.
        """
        self.weight = nn.Parameter(seeded_normal(self.own, shape, std, seed, dtype), requires_grad=False)
        self.bias = nn.Parameter(torch.zeros(len(self.own), *shape[:-1]), requires_grad=False)

    def owned(self, group: Tensor) -> Tensor:
        """bool: which of the groups this worker owns."""
        return (group >= self.own.start) & (group < self.own.stop)

    def input_squares(self) -> tuple[Tensor, int]:
        """The mean square of each input, float32[H], over the documents of all workers since the last call of `gradients` that
        have any that is not 0; and the number of all of them.
        """
        raise NotImplementedError

    def gradients(self) -> "Iterator[RowGradients | FactoredGradients]":
        """The gradients of all micro-batches since the last call, each group at most once; then they are dropped."""
        raise NotImplementedError


def mean_squares(parts_BH: Sequence[Tensor], width: int) -> tuple[Tensor, int]:
    """The mean square of each column, float32[H], over the rows of all parts that are not zero; and the number of all rows.

    An empty document has no features, and says nothing of their length.
    """
    if not parts_BH:
        return torch.zeros(width), 0
    squares_BH = [part_BH.float().square() for part_BH in parts_BH]
    filled = torch.stack([(part_BH > 0).any(1).sum() for part_BH in squares_BH]).sum()
    return torch.stack([part_BH.sum(0) for part_BH in squares_BH]).sum(0) / filled.clamp(min=1), sum(map(len, parts_BH))


def seeded_normal(rows: range, shape: tuple[int, ...], std: float, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """[len(rows), *shape]: rows of an endless table of normal numbers, the same however it is sliced."""
    table, generator = torch.empty(len(rows), *shape, dtype=dtype), torch.Generator()
    for chunk in range(rows.start // _SEEDED_TOGETHER, -(-rows.stop // _SEEDED_TOGETHER)):
        first = chunk * _SEEDED_TOGETHER
        values = torch.randn(_SEEDED_TOGETHER, *shape, generator=generator.manual_seed(seed * 1_000_003 + chunk)).mul_(std)
        wanted = range(max(first, rows.start), min(first + _SEEDED_TOGETHER, rows.stop))
        table[wanted.start - rows.start : wanted.stop - rows.start] = values[wanted.start - first : wanted.stop - first]
    return table


def rounded(values: Tensor, dtype: torch.dtype) -> Tensor:
    """``values`` (float32) as ``dtype``; stochastic rounding to bfloat16.

    Rounding to nearest would lose every update smaller than 1/512 of a weight. bfloat16 is the upper half of float32: adding
    a random lower half carries into it with exactly the right probability.
    """
    if dtype != torch.bfloat16:
        return values.to(dtype)
    bits = values.view(torch.int32)
    return ((bits + torch.randint_like(bits, 1 << 16)) & ~0xFFFF).view(torch.float32).to(dtype)


def with_gradient(inputs: Tensor, value: Tensor, gradient: Tensor) -> Tensor:
    """``value`` as a function of ``inputs`` whose gradient is known to be ``gradient``."""
    return value + ((inputs - inputs.detach()) * gradient.to(inputs.dtype)).sum()  # of zeros
