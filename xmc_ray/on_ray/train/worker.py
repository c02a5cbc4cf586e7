"""A training worker: reads its share of every batch, trains, validates, saves checkpoints and reports progress."""

import resource
import time
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import ray.data
import ray.train
import torch
from ray.exceptions import RayError
from ray.train.torch import get_device
from ray.util.queue import Queue

from xmc_ray import storage
from xmc_ray.data.epochs import EpochPlan
from xmc_ray.data.token_cache import TokenCache
from xmc_ray.metrics.at_k import Metrics
from xmc_ray.model.batch import Batch
from xmc_ray.model.predict import predict
from xmc_ray.model.sharding import Exchange
from xmc_ray.on_ray.train.config import TrainConfig
from xmc_ray.on_ray.train.prepare import Prepared
from xmc_ray.on_ray.train.reading import share_of_steps
from xmc_ray.training.advice import LateLoss
from xmc_ray.training.checkpoint import Checkpoints, Identity, find, restore
from xmc_ray.training.fit import RECENT, batch_of, build_model, check_encoders, epoch_plan, progress_figures, sample_loss
from xmc_ray.training.loop import Step, TrainState, data_parallel, train

_ASK_SECONDS = 5.0  # of training, from one look for a notice to the next; Ray Train looks as often


@dataclass(frozen=True, kw_only=True)
class Job:
    """All that a worker needs; ``start`` is the address of another run's checkpoint to begin from, if any."""

    config: TrainConfig
    prepared: ray.ObjectRef[Prepared]
    identity: Identity
    start: str | None
    mailbox: Queue


def work(settings: dict[str, Any]) -> None:
    """Train to the end of the schedule, from the newest checkpoint if there is one. ``settings["job"]`` refers to a `Job`."""
    _Worker(ray.get(settings["job"])).train()


class _Worker:
    def __init__(self, job: Job) -> None:
        self.job, self.config = job, job.config
        self.config.use_threads(ray.train.get_context().get_local_world_size())
        self.exchange = Exchange.of_process_group()
        prepared = ray.get(job.prepared)
        self.tokens, self.labels = prepared.tokens, prepared.labels
        parts = prepared.tokenizer, prepared.labels, prepared.groups, self.exchange, get_device(), prepared.term_weights
        model = build_model(self.config, *parts)
        encoder = None if model.encoder is None else model.encoder.digest(weights=not self.config.encoder.random)
        check_encoders(encoder, job.identity["encoder"], self.exchange, get_device())
        self.state = TrainState.start(model, self.config.optim)
        folder = storage.join(self.config.output, "checkpoints")
        self.checkpoints = Checkpoints(folder, self.config.checkpoints, job.identity, self._saved)
        self.validated_step = 0
        self.late = LateLoss(self._averaged_sample_loss)
        self.leaving, self.asked = False, 0.0
        self._resume()

    def train(self) -> None:
        config, state = self.config, self.state
        plan = epoch_plan(config.loop, self.tokens.counts["train"])
        every = config.validation.every if self.tokens.counts["validation"] else config.loop.epochs
        checks = max(1, round(every * plan.steps))

        def batches_from(step: int) -> Any:
            return batches(self.tokens, plan, config.loop.epochs, step, self.exchange)

        if state.step == 0:
            state.untrained_loss = self._sample_loss()
            self._report({"line": f"untrained: loss {state.untrained_loss:.3f} of some training documents"})
        reported, recent = -config.report_seconds, deque[tuple[float, float]](maxlen=RECENT)
        for step in train(state, data_parallel(state.model), batches_from, plan.steps, config.loop):
            recent.append((step.recall_loss, step.rank_loss))
            self.late.update(step.progress)
            # once in a while: report progress
            if time.monotonic() - reported > config.report_seconds:
                reported = time.monotonic()
                self._report(_progress(step, recent, state, config.loop.epochs))
            # once in a while: validate, save
            if state.seconds - self.asked >= _ASK_SECONDS:
                self._look_for_notice()
            if step.number % checks == 0:
                self._validate_and_save(plan.steps)
            elif self.checkpoints.due(state, hurry=self.leaving):
                self.checkpoints.save(state)
        if self.validated_step != state.step:
            self._validate_and_save(plan.steps)
        self.checkpoints.wait()

    def _resume(self) -> None:
        start = self.job.start
        saved = self.checkpoints.resume(self.state, lambda line: self._report({"line": line}))
        if saved is None and start is not None:
            (saved,) = find(start)
            restore(self.state, saved)
        if saved is not None:
            self.late = LateLoss(self._averaged_sample_loss, resumed=True)
            self.validated_step = saved.step if saved.metrics else 0
        origin = "from the start" if saved is None else f"after step {saved.step:,}, saved by {saved.workers}: {saved.uri}"
        self._report({"line": f"training with {self.exchange.world} workers {origin}"})

    def _look_for_notice(self) -> None:
        """Learn whether a machine is to be taken away from a worker, which makes checkpoints frequent (`Checkpoints.due`).

        Ray Train tells all workers the same, and waits for all, so they ask at the same steps: by the clock that they share.
        """
        self.asked = self.state.seconds
        if self.leaving or (notice := ray.train.get_preemption_info()) is None:
            return
        self.leaving = True
        left = "" if notice.deadline_ms is None else f" in {max(0.0, notice.deadline_ms / 1000 - time.time()):.0f} s"
        ranks = ", ".join(str(rank + 1) for rank in notice.preempted_ranks)
        self._report(
            {"line": f"a machine is about to be taken away{left}, with worker {ranks}: saving now and every few seconds"}
        )

    def _validate_and_save(self, steps_per_epoch: int) -> None:
        """Validate on all workers together, which gives one exact result, and save a checkpoint that carries it."""
        step = self.state.step
        figures = self._validate() if self.tokens.counts["validation"] else {}
        self.checkpoints.save(self.state, figures.get(self.config.validation.metric), figures)
        self.validated_step = step
        ray.train.report(figures | {"step": step, "epoch": step / steps_per_epoch})
        shown = ", ".join(f"{name} {100 * figures[name]:.2f}" for name in ("P@1", "P@3", "P@5", "nDCG@5") if name in figures)
        line = f"step {step:,}: validation {shown or 'skipped, no documents are held out'}"
        losses: dict[str, Any] = {"untrained_loss": self.state.untrained_loss, "sample_loss": self._averaged_sample_loss()}
        if self.late.value is not None:
            losses["late_loss"] = self.late.value
        line += f"; loss of some training documents {losses['sample_loss']:.3f}, untrained {losses['untrained_loss']:.3f}"
        validation = {f"validation/{name}": value for name, value in figures.items()}
        self._report(validation | losses | self._cost() | {"line": line, "step": step})

    def _sample_loss(self) -> float:
        (documents,) = self.tokens.chunks("train", self.tokens.some("train", 1))
        return sample_loss(self.state.model, documents, self.config.loop.prediction)

    def _averaged_sample_loss(self) -> float:
        with self.state.averager.in_use(self.state.model):
            return self._sample_loss()

    def _cost(self) -> dict[str, float]:
        """What training has taken so far on all workers, and this worker's peak memory (its GPU's, if it has one)."""
        state, device = self.state, next(self.state.model.parameters()).device
        peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        if device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(device)
        counts = {"documents": state.documents, "tokens": state.tokens, "seconds": state.seconds}
        return counts | {"workers": self.exchange.world, "peak_bytes": peak}

    def _validate(self) -> dict[str, float]:
        """Metrics over the whole validation split, with the averaged weights once there are some.

        Validation may take longer than a machine that is taken away has left, so what is trained is saved before it; a notice
        in the middle makes it start over.
        """
        metrics = None
        while metrics is None:
            if self.leaving:
                self.checkpoints.save(self.state)
            metrics = self._metrics()
        return {name: value for name, value in metrics.result()["total"].items() if isinstance(value, float)}

    def _metrics(self) -> Metrics | None:
        """Counts over the whole validation split; None if a notice has come in the middle."""
        metrics = Metrics(self.labels.counts, self.labels.n_documents)
        model, leaving = self.state.model, self.leaving
        with self.state.averager.in_use(model):
            for chunk in self.tokens.chunks("validation"):
                self._look_for_notice()
                if self.leaving != leaving:
                    return None
                tokens, truth = (chunk[name].combine_chunks() for name in ("tokens", "labels"))
                metrics.update(predict(model, tokens, max(metrics.ks), self.config.loop.prediction)[1], truth)
        return metrics

    def _saved(self, step: int, uri: str) -> None:
        self._report({"step": step, "checkpoint": uri})

    def _report(self, entry: dict[str, Any]) -> None:
        if self.exchange.rank == 0:
            with suppress(RayError):  # training outlives its journal
                self.job.mailbox.put_nowait(entry)


def _progress(step: Step, recent: Iterable[tuple[float, float]], state: TrainState, epochs: int) -> dict[str, Any]:
    """A line and the `fit.progress_figures`."""
    entry = progress_figures(step, recent, state)
    left = time.strftime("%H:%M:%S", time.gmtime(step.seconds_left)) if step.progress > 0 else "?"
    line = (
        f"step {step.number:,}  epoch {step.epoch + 1}/{epochs}  {100 * step.progress:.0f} %  "
        f"loss {entry['loss']:.3f} (recall {entry['recall_loss']:.3f}, rank {entry['rank_loss']:.3f})  "
        f"{entry['documents_per_second']:.0f} documents/s  "
        f"padding {100 * step.padding_share:.1f} %  waiting {100 * step.waiting_share:.1f} %  {left} left"
    )
    return {"line": line, "step": step.number, **entry}


def batches(tokens: TokenCache, plan: EpochPlan, epochs: int, first_step: int, exchange: Exchange) -> Iterator[Batch]:
    """This worker's share of the batches from ``first_step`` to the end of the last epoch."""
    return map(batch_of, share_of_steps(tokens, plan, epochs, first_step, exchange.rank, exchange.world))
