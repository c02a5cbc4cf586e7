"""Training steps and prediction batches, in one process or in one of several; no Ray, no files, no printing.

`train` is a generator: it yields after every step, and its caller looks at the clock, validates, saves or stops.
"""

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
import torch.distributed as dist
from torch import Tensor, nn

from xmc_ray.checkpoint import TrainState
from xmc_ray.errors import ConfigError, ModelError
from xmc_ray.labels import IntArray, list_lengths
from xmc_ray.model import LightXML, Losses
from xmc_ray.text import Batch, budget_batches, make_batch


@dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """How long, in what portions and how exactly to train."""

    epochs: int = 10
    """Passes over the training documents."""
    minutes: float | None = None
    """Stop after so many minutes of training even when epochs are left; the schedule is squeezed to end there."""
    batch_size: int = 32
    """Documents in a step, all workers together."""
    window: int = 4096
    """Documents of the shuffled stream that are sorted by length together."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Arithmetic of the forward pass; auto is bfloat16 on a GPU and float32 on a CPU. Weights stay float32."""
    token_budget: int = 8192
    """Most tokens, padding included, in a batch of prediction."""
    seed: int = 6088
    """Seed of weights, dropout and the order of documents."""

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "window", "token_budget"):
            if getattr(self, name) < 1:
                raise ConfigError(f"loop.{name} does not fit", found=getattr(self, name), expected="at least 1")
        if self.minutes is not None and self.minutes <= 0:
            raise ConfigError("loop.minutes does not fit", found=self.minutes, expected="more than 0, or nothing at all")


class Step(NamedTuple):
    """What a step did; counts and seconds are totals since the start, of this worker alone."""

    number: int
    epoch: int
    progress: float
    recall_loss: float
    rank_loss: float
    documents: int
    tokens: int
    padded_tokens: int
    seconds: float

    @property
    def loss(self) -> float:
        """The sum that is minimised."""
        return self.recall_loss + self.rank_loss

    @property
    def padding_share(self) -> float:
        """Share of the tokens that went through the encoder and were padding."""
        return 1 - self.tokens / max(self.padded_tokens, 1)

    @property
    def seconds_left(self) -> float:
        """Training time to go, at the pace so far."""
        return self.seconds * (1 - self.progress) / max(self.progress, 1e-9)


def train(
    state: TrainState,
    module: Callable[[Batch], Losses],
    epoch_batches: Callable[[int], Iterable[Batch]],
    steps_per_epoch: int,
    config: LoopConfig,
) -> Iterator[Step]:
    """Train ``state`` to the end of the schedule, yielding after each step.

    ``module`` computes the losses: the model itself, or its data-parallel wrapper. ``epoch_batches(n)`` gives this
    worker's batches of epoch n, the same number on all workers; ``steps_per_epoch`` only has to be about right, as it
    sets the pace of the schedule. A state that has been trained before goes on at the start of the epoch it was in, so up to
    an epoch of batches is seen again.

    Raises ModelError at the first loss that is not finite.
    """
    device = next(state.model.parameters()).device
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=_bfloat16(config, device))
    started = time.monotonic() - state.seconds
    for epoch in range(state.epoch, config.epochs):
        state.epoch = epoch
        for place, batch in enumerate(epoch_batches(epoch)):
            done = (epoch + min(1.0, place / max(steps_per_epoch, 1))) / config.epochs
            progress = _agreed_progress(done, time.monotonic() - started, config, device)
            if progress >= 1:
                return
            # -- one step of training ------------------------------------------------------------------------------
            state.model.train()
            with autocast:
                losses = module(batch.to(device))
            recall_loss, rank_loss = torch.stack([loss.detach() for loss in losses]).tolist()
            if not np.isfinite(recall_loss + rank_loss):
                raise ModelError(
                    "the loss is not finite",
                    where=f"step {state.step + 1} (epoch {epoch + 1})",
                    found=f"recall {recall_loss}, rank {rank_loss}",
                    way_out="lower optim.head_lr or optim.encoder_lr, or use loop.precision = float32",
                )
            (losses.recall + losses.rank).backward()
            state.optimizer.step(progress)
            state.step += 1
            state.averager.update(state.model, state.step, progress)
            # --------------------------------------------------------------------------------------------------------
            state.seconds = time.monotonic() - started
            state.documents += len(batch)
            state.tokens += int(batch.mask_BT.sum())
            state.padded_tokens += batch.mask_BT.numel()
            paused = time.monotonic()
            counts = (state.documents, state.tokens, state.padded_tokens)
            yield Step(state.step, epoch, progress, recall_loss, rank_loss, *counts, state.seconds)
            started += time.monotonic() - paused  # the caller's validation and saving are not training time
    state.epoch = config.epochs


def predict(model: LightXML, tokens: pa.ListArray, k: int, config: LoopConfig) -> tuple[npt.NDArray[np.float32], IntArray]:
    """Scores float32[D, k] and label ids int64[D, k] of documents ``tokens`` (list<int32>[D]), in their order.

    Documents are batched by length under ``config.token_budget``; see `model.Ranked` for short rows.
    """
    device = next(model.parameters()).device
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=_bfloat16(config, device))
    scores, labels = np.zeros((len(tokens), k), np.float32), np.full((len(tokens), k), -1, np.int64)
    training = model.training
    model.eval()
    with torch.inference_mode(), autocast:
        for rows in budget_batches(list_lengths(tokens), config.token_budget):
            ranked = model.predict(make_batch(tokens.take(pa.array(rows))).to(device), k)
            scores[rows], labels[rows] = ranked.score_Bk.float().cpu().numpy(), ranked.label_Bk.cpu().numpy()
    model.train(training)
    return scores, labels


def data_parallel(model: LightXML) -> nn.Module:
    """``model`` with its gradients averaged over the workers of the process group; itself where there is none."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return model
    # Buffers say where each label lies and never change: no need to send them with every step.
    return nn.parallel.DistributedDataParallel(model, broadcast_buffers=False, gradient_as_bucket_view=True)


def _agreed_progress(done: float, seconds: float, config: LoopConfig, device: torch.device) -> float:
    """Progress by epochs or by time, whichever is further; the same on all workers, whose clocks may differ."""
    if config.minutes is None:
        return done
    progress = torch.tensor(max(done, seconds / (60 * config.minutes)), dtype=torch.float64, device=device)
    return float(_maximum(progress))


def _maximum(value: Tensor) -> Tensor:
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(value, dist.ReduceOp.MAX)
    return value


def _bfloat16(config: LoopConfig, device: torch.device) -> bool:
    return config.precision == "bfloat16" or (config.precision == "auto" and device.type == "cuda")
