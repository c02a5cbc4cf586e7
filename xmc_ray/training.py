"""The training job: prepare, train data-parallel on Ray Train, keep the best model as a bundle.

A run folder: ``run.toml`` (settings as resolved), ``metrics.jsonl``, ``tensorboard/``, ``checkpoints/`` (best and last),
``bundle/`` when it is finished.
"""

import os
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import ray.data
import ray.train
import torch
import torch.distributed as dist
from ray.train import CheckpointConfig, DataConfig, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer, get_device
from ray.util.queue import Queue

from xmc_ray import storage
from xmc_ray.checkpoint import Bundle, TrainState, load_state, load_weights, save_bundle, save_state
from xmc_ray.classifier import FitConfig, build_model, update_metrics
from xmc_ray.command import to_toml
from xmc_ray.corpus import DocumentsConfig
from xmc_ray.encoder import check_encoder
from xmc_ray.errors import ConfigError
from xmc_ray.journal import journal, say
from xmc_ray.loop import Step, data_parallel, train
from xmc_ray.metrics import Metrics
from xmc_ray.preparation import Prepared, ValidationConfig, prepare
from xmc_ray.session import arrow_batches, connect, own_errors
from xmc_ray.text import Batch, training_batches


@dataclass(frozen=True, kw_only=True)
class WorkersConfig:
    """The training workers on the cluster."""

    count: int = 1
    """Data-parallel workers; each takes its share of every batch."""
    gpu: bool = False
    """Give each worker a GPU."""
    cpus: int = 1
    """CPUs that a worker asks the cluster for."""
    threads: int = 0
    """Threads of a worker on a CPU; 0 shares the machine's cores among the workers on it."""
    max_failures: int = 0
    """How often the group of workers is started again, from its last checkpoint, after a worker has died."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig(FitConfig):
    """Train a LightXML model and save it as a bundle."""

    documents: DocumentsConfig
    """The training split."""
    output: str
    """Run folder, local or s3://; must be empty or not there yet."""
    label_names: str | None = None
    """Parquet file with columns label and name, if labels have names."""
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    workers: WorkersConfig = field(default_factory=WorkersConfig)
    report_seconds: float = 10.0
    """Seconds from one line of progress to the next."""


def run(config: TrainConfig) -> str:
    """Train and return the bundle's URI. Raises ConfigError before anything is written where settings do not fit."""
    _check(config)
    config = _absolute(config)
    connect()
    _check_resources(config.workers)
    with own_errors():
        say(f"reading {config.documents.uri}")
        prepared = prepare(config.documents, config.label_names, config, config.validation)
        if prepared.counts["train"] < config.workers.count:
            raise ConfigError(
                "more workers than documents", found=config.workers.count, expected=f"at most {prepared.counts['train']}"
            )
        say("prepared: " + ", ".join(f"{count:,} {name}" for name, count in prepared.counts.items() if count))
        kind = "flat, one label a group" if prepared.groups.flat else f"{len(prepared.groups):,} groups"
        say(f"labels: {len(prepared.labels):,} ({kind})")
        storage.write_bytes(storage.join(config.output, "run.toml"), to_toml(config).encode())
        with journal(config.output) as mailbox:
            result = _trainer(config, prepared, mailbox).fit()
        return _keep_best(config, prepared, result)


# -- on the driver -------------------------------------------------------------------------------------------------------


def _check(config: TrainConfig) -> None:
    check_encoder(config.encoder, config.text.max_tokens)
    if not storage.is_empty(config.output):
        raise ConfigError("the run folder is not empty", where=config.output, way_out="choose another output or remove it")
    if config.workers.count < 1 or config.loop.batch_size % config.workers.count:
        raise ConfigError(
            "workers cannot share a batch equally",
            found=f"loop.batch_size {config.loop.batch_size}, workers.count {config.workers.count}",
            expected="a batch size that is a multiple of the workers",
        )


def _absolute(config: TrainConfig) -> TrainConfig:
    """The same config with the address of an encoder's local folder in full: Ray Train's workers run in another folder."""
    if not os.path.isdir(config.encoder.name):
        return config
    return replace(config, encoder=replace(config.encoder, name=os.path.abspath(config.encoder.name)))


def _check_resources(workers: WorkersConfig) -> None:
    gpus = ray.cluster_resources().get("GPU", 0)
    if workers.gpu and not gpus and "RAY_ADDRESS" not in os.environ:
        raise ConfigError("no GPU here", found="workers.gpu = true", way_out="set workers.gpu = false or submit to a cluster")


def _trainer(config: TrainConfig, prepared: Prepared, mailbox: Queue) -> TorchTrainer:
    filesystem, path = storage.arrow_filesystem(config.output)
    return TorchTrainer(
        _work,
        train_loop_config={
            "config": config,
            "tokenizer": ray.put(prepared.tokenizer),
            "labels": ray.put(prepared.labels),
            "groups": ray.put(prepared.groups),
            "n_train": prepared.counts["train"],
            "n_validation": prepared.counts["validation"],
            "mailbox": mailbox,
        },
        scaling_config=ScalingConfig(
            num_workers=config.workers.count, use_gpu=config.workers.gpu, resources_per_worker={"CPU": config.workers.cpus}
        ),
        run_config=RunConfig(
            name="checkpoints",
            storage_path=path,
            storage_filesystem=filesystem,
            failure_config=FailureConfig(max_failures=config.workers.max_failures),
            checkpoint_config=CheckpointConfig(num_to_keep=1, checkpoint_score_attribute="score"),  # and the last one
        ),
        datasets={"train": prepared.train, "validation": prepared.validation},
        dataset_config=DataConfig(datasets_to_split=["train"]),
    )


def _keep_best(config: TrainConfig, prepared: Prepared, result: ray.train.Result) -> str:
    checkpoint, metrics = max(result.best_checkpoints or [], key=lambda entry: entry[1]["score"])
    model = build_model(config, prepared.tokenizer, prepared.labels, prepared.groups)
    with checkpoint.as_directory() as folder:
        load_weights(model, Path(folder))
    figures = {name: value for name, value in metrics.items() if isinstance(value, int | float)}
    bundle = Bundle(
        model.eval(), prepared.tokenizer, prepared.labels, prepared.groups, metrics=figures, run_toml=to_toml(config)
    )
    uri = storage.join(config.output, "bundle")
    fingerprint = save_bundle(bundle, uri)
    say(f"bundle {fingerprint}: {uri}")
    return uri


# -- on every worker -----------------------------------------------------------------------------------------------------


def _work(job: dict[str, Any]) -> None:
    """Train on this worker's share of every batch; all workers validate and report together."""
    config: TrainConfig = job["config"]
    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    torch.set_num_threads(config.workers.threads or max(1, (os.cpu_count() or 1) // context.get_local_world_size()))
    labels, groups = ray.get(job["labels"]), ray.get(job["groups"])
    torch.manual_seed(config.loop.seed)  # the same first weights everywhere
    model = build_model(config, ray.get(job["tokenizer"]), labels, groups).to(get_device())
    state = TrainState.start(model, config.optim)
    if (checkpoint := ray.train.get_checkpoint()) is not None:
        with checkpoint.as_directory() as folder:
            load_state(state, Path(folder))
    torch.manual_seed(config.loop.seed + 1 + rank)  # dropout of its own on each worker

    steps_per_epoch = -(-job["n_train"] // config.loop.batch_size)
    checks = max(1, round(config.validation.every * steps_per_epoch))
    mailbox, spoke, last = job["mailbox"] if rank == 0 else None, time.monotonic(), None
    for step in train(state, data_parallel(model), lambda epoch: _batches(config, epoch, world), steps_per_epoch, config.loop):
        last = step
        # once in a while: say how it goes
        if mailbox is not None and (time.monotonic() - spoke > config.report_seconds or step.number == 1):
            spoke = time.monotonic()
            mailbox.put_nowait(_progress(step, state, config, world))
        # once in a while: validate and save
        if step.number % checks == 0:
            _validate_and_save(state, step, job)
            last = None
    if last is not None:
        _validate_and_save(state, last, job)


def _batches(config: TrainConfig, epoch: int, world: int) -> Iterator[Batch]:
    """This worker's batches of an epoch: its stream, shuffled within a buffer, sorted by length within windows."""
    window = max(1, config.loop.window // world)
    stream = ray.train.get_dataset_shard("train").iter_batches(
        batch_size=window,
        batch_format="pyarrow",
        local_shuffle_buffer_size=4 * window,
        local_shuffle_seed=config.loop.seed + epoch,
    )
    return training_batches(stream, config.loop.batch_size // world, np.random.default_rng([config.loop.seed, epoch]))


def _validate_and_save(state: TrainState, step: Step, job: dict[str, Any]) -> None:
    """Validation on all workers' shares, one exact result; a checkpoint from the first worker."""
    config: TrainConfig = job["config"]
    rank = ray.train.get_context().get_world_rank()
    figures = _validate(state, job) if job["n_validation"] else {}
    score = figures.get(config.validation.metric, float(step.number))
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = None
        if rank == 0:
            save_state(state, Path(folder), figures)
            checkpoint = ray.train.Checkpoint.from_directory(folder)
        ray.train.report(
            figures | {"score": score, "step": step.number, "epoch": step.progress * config.loop.epochs}, checkpoint
        )
    if rank == 0:
        shown = ", ".join(f"{name} {100 * figures[name]:.2f}" for name in ("P@1", "P@3", "P@5", "nDCG@5") if name in figures)
        line = f"step {step.number:,}: validation {shown or 'skipped, no documents are held out'}"
        entry = {f"validation/{name}": value for name, value in figures.items()}
        job["mailbox"].put_nowait(entry | {"line": line, "step": step.number, "score": score})


def _validate(state: TrainState, job: dict[str, Any]) -> dict[str, float]:
    """Metrics over the whole held-out split; every worker predicts its share of each batch."""
    config: TrainConfig = job["config"]
    context, labels = ray.train.get_context(), ray.get(job["labels"])
    rank, world = context.get_world_rank(), context.get_world_size()
    metrics = Metrics.empty(labels.counts, labels.n_documents)
    model = state.averager.best_of(state.model)
    for table in arrow_batches(ray.train.get_dataset_shard("validation"), rows=4096):
        share = table.take(pa.array(range(rank, len(table), world)))
        tokens, truth = (share[name].combine_chunks() for name in ("tokens", "labels"))
        update_metrics(metrics, model, tokens, truth, config.loop)
    if world > 1:
        parts: list[Any] = [None] * world
        dist.all_gather_object(parts, metrics.to_arrays())
        for part in parts[:rank] + parts[rank + 1 :]:
            metrics.merge(metrics.from_arrays(part))
    return {name: value for name, value in metrics.result()["total"].items() if isinstance(value, float)}


def _progress(step: Step, state: TrainState, config: TrainConfig, world: int) -> dict[str, Any]:
    rate = world * step.documents / max(step.seconds, 1e-9)
    encoder_lr, head_lr = state.optimizer.learning_rates
    left = time.strftime("%H:%M:%S", time.gmtime(step.seconds_left)) if step.progress > 0 else "?"
    line = (
        f"step {step.number:,}  epoch {step.epoch + 1}/{config.loop.epochs}  {100 * step.progress:.0f} %  "
        f"loss {step.loss:.3f} (recall {step.recall_loss:.3f}, rank {step.rank_loss:.3f})  "
        f"{rate:.0f} documents/s  padding {100 * step.padding_share:.1f} %  {left} left"
    )
    return {
        "line": line,
        "step": step.number,
        "epoch": step.epoch,
        "progress": step.progress,
        "loss": step.loss,
        "recall_loss": step.recall_loss,
        "rank_loss": step.rank_loss,
        "encoder_lr": encoder_lr,
        "head_lr": head_lr,
        "documents_per_second": rate,
        "padding_share": step.padding_share,
        "seconds": step.seconds,
    }
