"""What runs on every training worker: its share of every step, validation, checkpoints, a line of progress now and then.

----
From the token cache to the workers: each gets its share of every batch, read ahead by Ray Data.

A task reads the chunks of one pool, cuts the pool into batches as `epochs` says, and keeps what falls to the one worker
that asked. Tasks and workers run side by side; the order is that of the plan, from any step on, for any number of workers.
"""

import os
import resource
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import ray.data
import ray.train
import torch
from ray.exceptions import RayError
from ray.train.torch import get_device
from ray.util.queue import Queue

from xmc_ray.data.epochs import EpochPlan
from xmc_ray.data.groups import LabelGroups
from xmc_ray.data.labels import LabelIndex, list_lengths
from xmc_ray.data.split import ValidationConfig
from xmc_ray.data.token_cache import TokenCache
from xmc_ray.errors import DataError, ModelError
from xmc_ray.metrics.at_k import Metrics
from xmc_ray.model.sharding import Exchange
from xmc_ray.model.text import Batch, Tokenizer, make_batch
from xmc_ray.on_ray.session import arrow_batches
from xmc_ray.training.checkpoint import Checkpoints, CheckpointsConfig, Identity, find, restore
from xmc_ray.training.fit import FitConfig, build_model, epoch_plan, update_metrics
from xmc_ray.training.loop import Step, TrainState, data_parallel, train


@dataclass(frozen=True, kw_only=True)
class Job:
    """All that a worker is told. ``place`` is the folder of checkpoints, ``start`` a foreign one to begin from."""

    fit: FitConfig
    validation: ValidationConfig
    checkpoints: CheckpointsConfig
    place: str
    start: str | None
    identity: Identity
    threads: int
    report_seconds: float
    tokens: TokenCache
    tokenizer: ray.ObjectRef[Tokenizer]
    labels: ray.ObjectRef[LabelIndex]
    groups: ray.ObjectRef[LabelGroups]
    term_weights: ray.ObjectRef[npt.NDArray[np.float32] | None]
    mailbox: Queue


def work(settings: dict[str, Any]) -> ModelError | None:
    """Train to the end of the schedule, from the newest checkpoint if there is one.

    What goes wrong on one worker is raised, and Ray Train starts the group again. A loss that is not finite is so on all, and
    would be again: that error is returned.
    """
    worker = _Worker(cast(Job, settings["job"]))
    try:
        worker.train()
    except ModelError as error:
        return error
    return None


class _Worker:
    def __init__(self, job: Job) -> None:
        self.job = job
        context = ray.train.get_context()
        torch.set_num_threads(job.threads or max(1, len(os.sched_getaffinity(0)) // context.get_local_world_size()))
        self.exchange = Exchange.of_process_group()
        self.labels = ray.get(job.labels)
        tokenizer, groups, weight_F = ray.get(job.tokenizer), ray.get(job.groups), ray.get(job.term_weights)
        model = build_model(job.fit, tokenizer, self.labels, groups, self.exchange, get_device(), weight_F)
        self.state = TrainState.start(model, job.fit.optim)
        self.checkpoints = Checkpoints(job.place, job.checkpoints, job.identity)
        self.validated = 0  # step of the last validation
        self._resume()

    def train(self) -> None:
        job, state = self.job, self.state
        plan = epoch_plan(job.fit.loop, job.tokens.counts["train"])
        checks = max(1, round(job.validation.every * plan.steps))

        def batches_from(step: int) -> Any:
            return batches(job.tokens, plan, job.fit.loop.epochs, step, self.exchange)

        spoke = -job.report_seconds
        for step in train(state, data_parallel(state.model), batches_from, plan.steps, job.fit.loop):
            # once in a while: say how it goes
            if time.monotonic() - spoke > job.report_seconds:
                spoke = time.monotonic()
                self._say(_progress(step, state, job.fit))
            # once in a while: validate, save
            if step.number % checks == 0:
                self._validate_and_save(plan.steps)
            elif self.checkpoints.due(state):
                self.checkpoints.save(state)
        if self.validated != state.step:
            self._validate_and_save(plan.steps)
        self.checkpoints.wait()

    def _resume(self) -> None:
        job = self.job
        saved = self.checkpoints.resume(self.state, lambda line: self._say({"line": line}))
        if saved is None and job.start is not None:
            (saved,) = find(job.start)
            restore(self.state, saved)
        if saved is not None and saved.metrics:
            self.validated = saved.step
        origin = "from the start" if saved is None else f"after step {saved.step:,}, saved by {saved.workers}: {saved.uri}"
        self._say({"line": f"training with {self.exchange.world} workers {origin}"})

    def _validate_and_save(self, steps_per_epoch: int) -> None:
        """Validation on all workers together, one exact result, and a checkpoint that carries it."""
        job, step = self.job, self.state.step
        figures = self._validate() if job.tokens.counts["validation"] else {}
        self.checkpoints.save(self.state, figures.get(job.validation.metric), figures)
        self.validated = step
        ray.train.report(figures | {"step": step, "epoch": step / steps_per_epoch})
        shown = ", ".join(f"{name} {100 * figures[name]:.2f}" for name in ("P@1", "P@3", "P@5", "nDCG@5") if name in figures)
        line = f"step {step:,}: validation {shown or 'skipped, no documents are held out'}"
        told = {f"validation/{name}": value for name, value in figures.items()} | self._cost()
        self._say(told | {"line": line, "step": step})

    def _cost(self) -> dict[str, float]:
        """What training has taken so far, all workers together; the memory is this worker's, the GPU's where it has one."""
        state, device = self.state, next(self.state.model.parameters()).device
        peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        if device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(device)
        counts = {"documents": state.documents, "tokens": state.tokens, "seconds": state.seconds}
        return counts | {"workers": self.exchange.world, "peak_bytes": peak}

    def _validate(self) -> dict[str, float]:
        """Metrics over the whole held-out split, by the averaged weights once there are some."""
        metrics = Metrics.empty(self.labels.counts, self.labels.n_documents)
        model = self.state.model
        with self.state.averager.in_use(model):
            for chunk in self.job.tokens.chunks("validation"):
                tokens, truth = (chunk[name].combine_chunks() for name in ("tokens", "labels"))
                update_metrics(metrics, model, tokens, truth, self.job.fit.loop.prediction)
        return {name: value for name, value in metrics.result()["total"].items() if isinstance(value, float)}

    def _say(self, entry: dict[str, Any]) -> None:
        if self.exchange.rank == 0:
            with suppress(RayError):  # a journal that is gone is no reason to stop training
                self.job.mailbox.put_nowait(entry)


def _progress(step: Step, state: TrainState, fit: FitConfig) -> dict[str, Any]:
    rate = step.documents / step.seconds if step.seconds else 0.0  # nothing is known of the first step
    left = time.strftime("%H:%M:%S", time.gmtime(step.seconds_left)) if step.progress > 0 else "?"
    line = (
        f"step {step.number:,}  epoch {step.epoch + 1}/{fit.loop.epochs}  {100 * step.progress:.0f} %  "
        f"loss {step.loss:.3f} (recall {step.recall_loss:.3f}, rank {step.rank_loss:.3f})  {rate:.0f} documents/s  "
        f"padding {100 * step.padding_share:.1f} %  waiting {100 * step.waiting_share:.1f} %  {left} left"
    )
    return {
        "line": line,
        "step": step.number,
        "epoch": step.epoch,
        "progress": step.progress,
        "loss": step.loss,
        "recall_loss": step.recall_loss,
        "rank_loss": step.rank_loss,
        **state.optimizer.learning_rates(),
        "documents_per_second": rate,
        "padding_share": step.padding_share,
        "waiting_share": step.waiting_share,
        "seconds": step.seconds,
        "bytes_sent": sum(state.model.exchange.sent.values()),
    }


def batches(tokens: TokenCache, plan: EpochPlan, epochs: int, first_step: int, exchange: Exchange) -> Iterator[Batch]:
    """This worker's share of the batches from ``first_step`` to the end of the last epoch."""
    places = [
        {"epoch": epoch, "pool": number}
        for epoch in range(first_step // plan.steps, epochs)
        for number, pool in enumerate(plan.pools(epoch))
        if epoch * plan.steps + pool.last > first_step
    ]
    if not places:
        return
    share = _Share(tokens, plan, exchange.rank, exchange.world, first_step)
    ray.data.DataContext.get_current().execution_options.preserve_order = True
    # Reading waits more than it computes, and must never wait for a CPU that the workers have taken: it asks for none.
    stream = ray.data.from_items(places, override_num_blocks=len(places)).map_batches(
        share, batch_size=1, batch_format="pyarrow", num_cpus=0, compute=ray.data.TaskPoolStrategy(min(2, len(places)))
    )
    for step, table in enumerate(_by_step(arrow_batches(stream)), first_step):
        if table["step"][0].as_py() != step:
            raise DataError("batches are out of order", found=f"step {table['step'][0]}", expected=f"step {step}")
        yield make_batch(table["tokens"].combine_chunks(), table["labels"].combine_chunks())


class _Share:
    """What falls to one worker in the pool that a row names: ``step`` int64 (rising), ``tokens``, ``labels``."""

    def __init__(self, tokens: TokenCache, plan: EpochPlan, rank: int, world: int, first_step: int) -> None:
        self.tokens, self.plan, self.rank, self.world, self.first_step = tokens, plan, rank, world, first_step

    def __call__(self, places: pa.Table) -> pa.Table:
        (place,) = places.to_pylist()
        pool = self.plan.pools(place["epoch"])[place["pool"]]
        table = pa.concat_tables(self.tokens.chunks("train", pool.chunks))
        step_N, row_N = pool.share(list_lengths(table["tokens"].combine_chunks()), self.rank, self.world)
        wanted = step_N >= self.first_step
        return table.take(row_N[wanted]).append_column("step", pa.array(step_N[wanted])).combine_chunks()


def _by_step(tables: Iterator[pa.Table]) -> Iterator[pa.Table]:
    """The rows of each step, one table each, however Ray Data has cut the stream."""
    rest: list[pa.Table] = []
    for table in tables:
        table = pa.concat_tables([*rest, table])
        step = table["step"].to_numpy()
        ends = [0, *(np.flatnonzero(np.diff(step)) + 1).tolist()]
        yield from (table.slice(first, last - first) for first, last in pairwise(ends))
        rest = [table.slice(ends[-1])]
    yield from (table for table in rest if len(table))
