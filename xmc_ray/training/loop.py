"""The training loop, for a single process or each of several; it knows neither Ray nor files, and prints nothing.

`train` is a generator that yields after every step, so that its caller can validate, save or stop.
"""

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Annotated, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from xmc_ray.data.epochs import CHUNK
from xmc_ray.errors import ModelError
from xmc_ray.model.batch import Batch
from xmc_ray.model.lightxml import LightXML, Losses
from xmc_ray.model.precision import Precision
from xmc_ray.model.predict import PredictConfig, computing
from xmc_ray.model.sharding import Exchange
from xmc_ray.settings import Bounds, NonNegativeInt, PositiveFloat, PositiveInt, Settings
from xmc_ray.training.optim import Averager, OptimConfig, Optimizer


@dataclass(frozen=True, kw_only=True)
class LoopConfig(Settings):
    """Length, batches and precision of training."""

    epochs: PositiveInt = 10
    """Passes over the training documents."""
    minutes: PositiveFloat | None = None
    """Stop after this many minutes even if epochs are left; the schedule is shortened to end there."""
    batch_size: Annotated[int, Bounds(ge=1, le=CHUNK)] = 32
    """Documents per step over all workers; a few more or less, so that all steps are of about the same size."""
    accumulate: PositiveInt = 1
    """Number of parts in which a worker processes its share of a step; saves memory, does not change the result."""
    window: PositiveInt = 4096
    """Documents of the shuffled stream that are sorted by length at a time."""
    precision: Precision = "auto"
    """Arithmetic; auto is bfloat16 on a GPU, and for a transformer on a CPU that has it. Weights stay float32."""
    token_budget: NonNegativeInt = 0
    """Maximum number of tokens, padding included, in a batch of prediction; 0 is 8,192 on a GPU and 2,048 on a CPU."""
    seed: NonNegativeInt = 6088
    """Seed of the weights, dropout and the order of documents."""

    @property
    def prediction(self) -> PredictConfig:
        """How validation predicts: in the precision of training."""
        return PredictConfig(token_budget=self.token_budget, precision=self.precision)


class Step(NamedTuple):
    """Results of a step over all workers; counts and seconds are totals since the start of training."""

    number: int
    epoch: int
    progress: float
    recall_loss: float
    rank_loss: float
    documents: int
    tokens: int
    padded_tokens: int
    seconds: float
    waiting: float

    @property
    def loss(self) -> float:
        """The sum that is minimised."""
        return self.recall_loss + self.rank_loss

    @property
    def padding_share(self) -> float:
        """Share of the tokens that went through the encoder and were padding."""
        return 1 - self.tokens / max(self.padded_tokens, 1)

    @property
    def waiting_share(self) -> float:
        """Share of the training time that workers waited for data."""
        return min(1.0, self.waiting / max(self.seconds, 1e-9))

    @property
    def seconds_left(self) -> float:
        """Remaining seconds of training at the average pace so far."""
        return self.seconds * (1 - self.progress) / max(self.progress, 1e-9)


@dataclass
class TrainState:
    """Everything that training changes. Counts are totals over all workers since the start of training.

    ``seconds``: of training, by the first worker's clock; ``waiting``: mean seconds that a worker waited for data;
    ``untrained_loss``: the `fit.sample_loss` before the first step, None where it was not measured.
    """

    model: LightXML
    optimizer: Optimizer
    averager: Averager
    step: int = 0
    seconds: float = 0.0
    waiting: float = 0.0
    documents: int = 0
    tokens: int = 0
    padded_tokens: int = 0
    untrained_loss: float | None = None

    @classmethod
    def start(cls, model: LightXML, config: OptimConfig) -> "TrainState":
        """A fresh state for ``model``, which has to be on its device already."""
        return cls(model, Optimizer(model, config), Averager(config))


def train(
    state: TrainState,
    module: Callable[[Batch, int], Losses],
    batches_from: Callable[[int], Iterable[Batch]],
    steps_per_epoch: int,
    config: LoopConfig,
) -> Iterator[Step]:
    """Train ``state`` to the end of the schedule, yielding after each step.

    ``module`` computes the losses: the model itself, or its data-parallel wrapper. ``batches_from(n)`` are this worker's
    shares of the batches from step n to the end; a state that was trained before continues where it stopped.

    Raises ModelError at the first loss that is not finite.
    """
    model, exchange = state.model, state.model.exchange
    device = next(model.parameters()).device
    n_steps = config.epochs * steps_per_epoch
    batches, started = iter(batches_from(state.step)), None
    while state.step < n_steps:
        asked = time.monotonic()
        batch = next(batches)
        now = time.monotonic()
        if started is None:  # the clock starts with the first batch: waiting for that must not use up the warm-up
            started, asked = now - state.seconds, now
        documents, tokens, padded_tokens, waited, seconds = _totals(exchange, batch, now - asked, now - started, device)
        progress = max(state.step / n_steps, seconds / (60 * config.minutes) if config.minutes else 0.0)
        if progress >= 1:
            return
        # -- one step of training --------------------------------------------------------------------------------------
        model.train()
        torch.manual_seed(_step_seed(config.seed, state.step, exchange.rank))  # dropout, the same in a run that resumes here
        total = torch.zeros(2, dtype=torch.float64, device=device)
        parts = batch.split(config.accumulate)
        for part in parts:
            with _without_sync(module, part is not parts[-1]):
                with computing(model, config.precision):
                    losses = module(part, documents)
                loss = losses.recall + losses.rank
                if loss.requires_grad:  # else only rows are trained: a frozen encoder in flat mode
                    loss.backward()
            total += torch.stack(losses).detach()
        norms = state.optimizer.norms()
        recall_loss, rank_loss, *read = torch.stack([*exchange.sum(total), *norms.values()]).tolist()
        here = f"step {state.step + 1} (epoch {state.step // steps_per_epoch + 1})"
        way_out = "lower optim.rows_lr, optim.head_lr or optim.encoder_lr, or use loop.precision = float32"
        if not np.isfinite(recall_loss + rank_loss):
            found = f"recall {recall_loss}, rank {rank_loss}"
            raise ModelError("the loss is not finite", where=here, found=found, way_out=way_out)
        try:
            state.optimizer.step(progress, dict(zip(norms, read, strict=True)))
        except FloatingPointError as error:
            raise ModelError("a gradient is not finite", where=here, found=error, way_out=way_out) from None
        state.step += 1
        state.documents += documents
        state.tokens += tokens
        state.padded_tokens += padded_tokens
        state.waiting += waited
        state.seconds = seconds
        state.averager.update(model, state.step, progress)
        # --------------------------------------------------------------------------------------------------------------
        paused = time.monotonic()
        epoch = (state.step - 1) // steps_per_epoch
        counts = (state.documents, state.tokens, state.padded_tokens, state.seconds, state.waiting)
        yield Step(state.step, epoch, progress, recall_loss, rank_loss, *counts)
        started += time.monotonic() - paused  # the caller's validation and saving are not training time


def data_parallel(model: LightXML) -> nn.Module:
    """``model`` with its dense gradients summed over the process group; ``model`` itself where there is nothing to sum.

    The losses are parts of one global sum, so gradients are added and not averaged. The rows of recall head and table have no
    gradients to share; those of word vectors are sparse, and the optimiser gathers them. All that is not divided among the
    workers starts as the first of them has it.
    """
    exchange, dense = model.exchange, model.trained_parameters().dense
    if exchange.world == 1:
        return model
    for name, tensor in model.state_dict().items():
        if name not in dense and name.partition(".")[0] not in model.heads:
            dist.broadcast(tensor, 0)  # sparse and frozen ones: the wrapper below sends the dense ones alone
    if not dense:
        return model

    def sum_gradients(_, bucket):  # type: ignore[no-untyped-def]  # DDP only accepts its own private class as annotation
        exchange.count("dense gradients", exchange.bytes_of_sum(bucket.buffer().nbytes))
        future = dist.all_reduce(bucket.buffer(), async_op=True).get_future()
        return future.then(lambda done: done.value()[0])

    ignored = [name for name, _ in (*model.named_parameters(), *model.named_buffers()) if name not in dense]
    parallel = nn.parallel.DistributedDataParallel
    parallel._set_params_and_buffers_to_ignore_for_model(model, ignored)
    module: nn.Module = parallel(model, gradient_as_bucket_view=True)
    module.register_comm_hook(None, sum_gradients)  # type: ignore[operator]
    return module


def _totals(
    exchange: Exchange, batch: Batch, waited: float, elapsed: float, device: torch.device
) -> tuple[int, int, int, float, float]:
    """Over all workers: documents, tokens without and with padding, mean seconds of waiting, the first worker's ``elapsed``."""
    own = [len(batch), int(batch.mask_BT.sum()), batch.mask_BT.numel(), waited / exchange.world, elapsed * (exchange.rank == 0)]
    if exchange.world > 1:
        own = exchange.sum(torch.tensor(own, dtype=torch.float64, device=device)).tolist()
    documents, tokens, padded_tokens, waited, elapsed = own
    return int(documents), int(tokens), int(padded_tokens), waited, elapsed


def _without_sync(module: object, more_to_come: bool) -> AbstractContextManager[None]:
    """Gradients stay on their worker until the last micro-batch of a step."""
    if more_to_come and isinstance(module, nn.parallel.DistributedDataParallel):
        return module.no_sync()
    return nullcontext()


def _step_seed(seed: int, step: int, rank: int) -> int:
    return int(np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0] >> 1)
