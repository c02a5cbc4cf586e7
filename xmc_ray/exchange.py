"""What training workers say to each other, counted in bytes; with one worker, nothing.

A step's documents are shared out among W workers, and so are the groups. Features are gathered from all workers, every
worker scores them against the groups it owns, and the gradient of the features is summed back to where they came from.
What is sent depends on the documents of the step, never on the number of labels.

Bytes are those of the ring algorithms: gathering n bytes from each of W workers sends (W - 1) n, and so does scattering a
sum; summing n bytes everywhere sends 2 n (W - 1) / W.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

IntList = list[int]


class Exchange:
    """The process group that training runs in, or none. ``sent``: bytes this worker has sent, by what was sent."""

    def __init__(self, rank: int = 0, world: int = 1) -> None:
        self.rank = rank
        self.world = world
        self.sent: dict[str, int] = {}

    @classmethod
    def of_process_group(cls) -> "Exchange":
        """The default process group, if `torch.distributed` has been initialised; else a worker on its own."""
        return cls(dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else cls()

    def share(self, n: int) -> range:
        """This worker's contiguous part of ``n`` things; parts differ by at most one."""
        return part_of(n, self.rank, self.world)

    def counts(self, *numbers: int, device: torch.device) -> list[IntList]:
        """For each of ``numbers``, what all workers gave, by rank."""
        if self.world == 1:
            return [[number] for number in numbers]
        own = torch.tensor(numbers, dtype=torch.int64, device=device)
        table = self._gather_equal(own, "counts").view(self.world, len(numbers))
        return [list(column) for column in zip(*table.tolist(), strict=True)]

    def gather(self, tensor: Tensor, counts: Sequence[int], what: str) -> Tensor:
        """The workers' tensors, one after the other; theirs have ``counts`` rows. No gradient flows back."""
        if self.world == 1:
            return tensor
        longest = max(counts)
        if longest == 0:
            return tensor
        padded = F.pad(tensor, [0, 0] * (tensor.ndim - 1) + [0, longest - len(tensor)]).contiguous()
        parts = self._gather_equal(padded, what).split(longest)
        return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])

    def gather_features(self, tensor: Tensor, counts: Sequence[int]) -> Tensor:
        """Like `gather`, and the gradients of all workers' copies are summed back to the worker a row came from."""
        if self.world == 1:
            return tensor
        gathered: Tensor = _GatherFeatures.apply(tensor, self, counts)  # type: ignore[no-untyped-call]
        return gathered

    def scatter_sum(self, tensor: Tensor, counts: Sequence[int], what: str) -> Tensor:
        """The sum of all workers' ``tensor`` over this worker's rows: the inverse way of `gather`."""
        longest = max(counts)
        padded = torch.cat([F.pad(part, [0, 0, 0, longest - len(part)]) for part in tensor.split(list(counts))])
        total = padded.new_empty(longest, *padded.shape[1:])
        dist.reduce_scatter_single(total, padded)
        self.count(what, (self.world - 1) * total.nbytes)
        return total[: counts[self.rank]]

    def best_of_all(self, score_BK: Tensor, id_BK: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """The ``k`` best of all workers' lists, scores falling: every worker has K candidates for each of B documents."""
        if self.world == 1:
            return score_BK[:, :k], id_BK[:, :k]
        lists = [
            self.gather(part, [len(part)] * self.world, "shortlists").unflatten(0, (self.world, -1)).transpose(0, 1).flatten(1)
            for part in (score_BK, id_BK)
        ]
        best = lists[0].topk(k)
        return best.values, lists[1].gather(1, best.indices)

    def sum(self, tensor: Tensor, what: str = "counts") -> Tensor:
        """The sum over the workers, in place."""
        if self.world > 1:
            dist.all_reduce(tensor)
            self.count(what, self.bytes_of_sum(tensor.nbytes))
        return tensor

    def bytes_of_sum(self, n_bytes: int) -> int:
        """Bytes a worker sends for the sum of a tensor of ``n_bytes``."""
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
        ctx.exchange, ctx.counts = exchange, counts
        return exchange.gather(tensor, counts, "features")

    @staticmethod
    def backward(ctx, gradient):  # type: ignore[no-untyped-def]
        return ctx.exchange.scatter_sum(gradient, ctx.counts, "feature gradients"), None, None


def part_of(n: int, rank: int, world: int) -> range:
    """The contiguous part of ``n`` things that falls to ``rank``; parts differ by at most one."""
    return range(n * rank // world, n * (rank + 1) // world)
