"""What tests of training share: a small model, its documents, and real worker processes."""

from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
import torch.distributed as dist
from torch import Tensor, multiprocessing, nn

from xmc_ray.data.groups import LabelGroups
from xmc_ray.model import precision
from xmc_ray.model.batch import Batch
from xmc_ray.model.lexical import LexicalBranch
from xmc_ray.model.lightxml import LightXML, ModelConfig
from xmc_ray.model.sharding import Exchange, OwnedRows, RowGradients
from xmc_ray.training.optim import OptimConfig

TOKENS = 20  # words of the toy vocabulary
OPTIM = OptimConfig(encoder_lr=0.05, head_lr=0.05, rows_lr=0.04)


class BagOfTokens(nn.Module):
    """An encoder without a transformer: the mean of word vectors, so that properties can be checked a hundred times."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.vectors, self.width = nn.Embedding(TOKENS, width, sparse=True), width
        self.mix = nn.Linear(width, width)

    def forward(self, tokens_BT: Tensor, mask_BT: Tensor) -> Tensor:
        kept = self.vectors(tokens_BT) * mask_BT[..., None]
        mixed: Tensor = self.mix(kept.sum(1) / mask_BT.sum(1, keepdim=True))
        return mixed


def toy_model(
    groups: LabelGroups | None = None,
    *,
    exchange: Exchange | None = None,
    seed: int = 0,
    lexical: bool = False,
    **settings: Any,
) -> LightXML:
    """A model over ``groups``, or over 12 labels in 7 groups, maybe with a lexical branch; ``settings`` of `ModelConfig`."""
    torch.manual_seed(seed)
    groups = groups or LabelGroups(np.arange(12) % 7)
    config = ModelConfig(**{"shortlist": 2, "bottleneck": 8, "dropout": 0.0, **settings})
    branch = LexicalBranch(torch.ones(32), width=8) if lexical else None
    return LightXML(BagOfTokens(), groups, config, exchange, seed, branch)  # type: ignore[arg-type]


def documents(n_rows: int = 64, n_labels: int = 12) -> pa.Table:
    """Documents of one to five tokens; a document's labels are its tokens."""
    rng = np.random.default_rng(0)
    rows = [sorted({int(token) for token in rng.integers(0, n_labels, rng.integers(1, 6))}) for _ in range(n_rows)]
    return pa.table({name: pa.array(rows, pa.list_(pa.int32())) for name in ("tokens", "labels")})


def batch_of(rng: np.random.Generator, truth: list[list[int]], judged: Sequence[list[int]] = ()) -> Batch:
    """Random documents of up to five tokens with the true labels ``truth``, in that order, repeated ones included.

    ``judged``: labels that an editor has judged.
    """
    tokens_BT = torch.from_numpy(rng.integers(0, TOKENS, (len(truth), 5)))
    mask_BT = torch.arange(5) < torch.from_numpy(rng.integers(1, 6, (len(truth), 1)))
    return Batch(tokens_BT, mask_BT, *pairs_of(truth), *pairs_of(judged))


def pairs_of(truth: Sequence[list[int]]) -> tuple[Tensor, Tensor]:
    """The (document, label) pairs of ``truth``, int64[P] each."""
    pairs = [(row, label) for row, labels in enumerate(truth) for label in labels]
    row_P, label_P = (torch.tensor([pair[side] for pair in pairs], dtype=torch.long) for side in (0, 1))
    return row_P, label_P


def dense(head: OwnedRows, gradients: list[RowGradients] | None = None) -> tuple[Tensor, Tensor]:
    """The gradients that are due to all of a head's own rows (weight, bias), zero where there are none."""
    weight, bias = torch.zeros_like(head.weight), torch.zeros_like(head.bias)
    for part in head.gradients() if gradients is None else gradients:
        weight[part.groups] += part.weight
        bias[part.groups] += part.bias
    return weight, bias


def whole_parameters(by_rank: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """A model's parameters from those of all its workers: slices of rows one after the other, the rest of the first."""
    sliced = ("recall.", "table.")
    return {
        name: torch.cat([part[name] for part in by_rank]) if name.startswith(sliced) else tensor
        for name, tensor in by_rank[0].items()
    }


def on_workers(worlds: Sequence[int], job: Callable[..., Any], folder: Path, *args: Any) -> dict[int, list[Any]]:
    """What ``job(exchange, *args)`` returns in process groups of so many workers, by the number of workers and by rank."""
    # Workers are forks of a server that has imported torch: importing it takes each of them longer than most jobs do.
    multiprocessing.get_context("forkserver").set_forkserver_preload(["torch", "xmc_ray.training.checkpoint"])
    work = {"args": (worlds, job, str(folder), args), "nprocs": max(worlds)}
    multiprocessing.start_processes(_one_worker, start_method="forkserver", **work)
    return {world: [torch.load(folder / f"{world}-{rank}.pt", weights_only=False) for rank in range(world)] for world in worlds}


def _one_worker(rank: int, worlds: Sequence[int], job: Callable[..., Any], folder: str, args: tuple[Any, ...]) -> None:
    """Takes part in every process group that is larger than ``rank``."""
    torch.set_num_threads(1)
    precision.cpu_has_bfloat16 = lambda: False  # as in the process of the tests: the same on all CPUs
    for world in (world for world in worlds if rank < world):
        meeting, timeout = f"file://{folder}/meeting-{world}", timedelta(seconds=120)
        dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=world, timeout=timeout)
        torch.save(job(Exchange.of_process_group(), *args), f"{folder}/{world}-{rank}.pt")
        dist.destroy_process_group()
