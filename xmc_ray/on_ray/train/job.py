"""The training job: prepare, train data-parallel on Ray Train, keep the best model as a bundle.

A run folder: ``run.toml`` (settings as resolved), ``metrics.jsonl``, ``tensorboard/``, ``tokens/`` (unless there is a
cache elsewhere), ``checkpoints/`` (best and last), ``bundle/`` and ``report.html`` when it is finished. Run again, the same
command resumes it.
"""

import hashlib
import os
from dataclasses import asdict, dataclass, field, replace
from typing import Annotated, Any

import ray
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer
from ray.util.queue import Queue

from xmc_ray import storage
from xmc_ray.bundle.folder import MARKER, read_settings
from xmc_ray.command import resumed, to_toml
from xmc_ray.data.documents import DocumentsConfig
from xmc_ray.data.split import ValidationConfig
from xmc_ray.errors import ConfigError, ModelError
from xmc_ray.model.encoder import check_encoder
from xmc_ray.on_ray.session import check_room, connect, make_room, own_errors
from xmc_ray.on_ray.train.export import keep_best
from xmc_ray.on_ray.train.journal import journal, say
from xmc_ray.on_ray.train.prepare import Prepared, prepare
from xmc_ray.on_ray.train.report import Machine, ReportConfig, write_report
from xmc_ray.on_ray.train.worker import Job, work
from xmc_ray.settings import (
    MAY_CHANGE_ON_RESUME,
    Bounds,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveInt,
    Settings,
    difference,
    fixed_settings,
)
from xmc_ray.storage.lease import DRIVER, Lease, held, is_free
from xmc_ray.training.checkpoint import CheckpointsConfig, Identity, find
from xmc_ray.training.fit import FitConfig, epoch_plan


@dataclass(frozen=True, kw_only=True)
class WorkersConfig(Settings):
    """The training workers on the cluster."""

    count: PositiveInt = 1
    """Workers; each takes its share of every batch and owns its share of the label groups."""
    least: PositiveInt | None = None
    """Start, or continue after a loss, with as few as this while the cluster has no room for all; None waits for all."""
    gpu: bool = False
    """Give each worker a GPU."""
    cpus: PositiveInt = 1
    """CPUs that a worker requests."""
    threads: NonNegativeInt = 0
    """Threads of a worker on a CPU; 0 shares the machine's cores among the workers on it."""
    max_failures: Annotated[int, Bounds(ge=-1)] = 3
    """How often the workers are restarted from their last checkpoint after one has died; -1 is unlimited."""
    patience: NonNegativeFloat = 30.0
    """Minutes to wait for a cluster that has no room for the workers yet."""

    def check(self) -> None:
        """Raises ConfigError if ``least`` is more than ``count``."""
        if self.least is not None and self.least > self.count:
            raise ConfigError("workers.least is above workers.count", found=self.least, expected=f"at most {self.count}")

    @property
    def needs(self) -> dict[str, float]:
        """What a worker takes of the cluster."""
        return {"CPU": float(self.cpus)} | ({"GPU": 1.0} if self.gpu else {})


@dataclass(frozen=True, kw_only=True)
class TrainConfig(FitConfig):
    """Train a LightXML model and save it as a bundle."""

    documents: DocumentsConfig
    """The training split."""
    output: str = field(metadata=MAY_CHANGE_ON_RESUME)
    """Run folder, local or s3://."""
    label_names: str | None = None
    """Parquet file with columns label and name, if labels have names."""
    resume: str = field(default="auto", metadata=MAY_CHANGE_ON_RESUME)
    """auto resumes an unfinished run in the run folder; never requires an empty one; else the address of a checkpoint."""
    cache: str | None = field(default=None, metadata=MAY_CHANGE_ON_RESUME)
    """Folder for the documents' tokens, shared by several runs; None keeps them in the run folder until the run is finished."""
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    checkpoints: CheckpointsConfig = field(default_factory=CheckpointsConfig, metadata=MAY_CHANGE_ON_RESUME)
    workers: WorkersConfig = field(default_factory=WorkersConfig, metadata=MAY_CHANGE_ON_RESUME)
    report: ReportConfig = field(default_factory=ReportConfig, metadata=MAY_CHANGE_ON_RESUME)
    report_seconds: NonNegativeFloat = field(default=10.0, metadata=MAY_CHANGE_ON_RESUME)
    """Seconds from one line of progress to the next."""


def run(config: TrainConfig) -> str:
    """Train and return the bundle's URI. Raises ConfigError before anything is written if settings do not fit."""
    check_encoder(config.encoder, config.text.max_tokens)
    config = _absolute(config)
    bundle = storage.join(config.output, "bundle")
    if not _is_finished(config, bundle):
        with held(config.output) as lease, own_errors():
            if not _is_finished(config, bundle):  # once more: another job may just have finished here
                say(f"bundle {_make(config, bundle, lease)}: {bundle}")
                return bundle
    say(f"this run is finished: {bundle}")
    return bundle


def _make(config: TrainConfig, bundle: str, lease: Lease) -> str:
    """Prepare, train, keep the best; the bundle's fingerprint."""
    workers, own_tokens = config.workers, storage.join(config.output, "tokens")
    least = workers.least or workers.count
    connect()
    check_room("workers", least, workers.needs)
    say(f"reading {config.documents.uri}")
    prepared = prepare(config.documents, config.label_names, config, config.validation, config.cache or own_tokens)
    say("prepared: " + ", ".join(f"{count:,} {name}" for name, count in prepared.counts.items() if count))
    kind = "flat, one label a group" if prepared.groups.flat else f"{len(prepared.groups):,} groups"
    say(f"labels: {len(prepared.labels):,} ({kind})")
    _check_workers(config, prepared)
    identity = _identity(config, prepared)
    start = _check_start(config, identity)
    storage.write_bytes(storage.join(config.output, "run.toml"), to_toml(config).encode())
    make_room("workers", least, workers.needs, workers.patience)  # only now: machines that wait for documents cost money
    _train(config, prepared, identity, start)
    lease.check()
    saved = storage.join(config.output, "checkpoints")
    fingerprint = keep_best(config, workers.gpu, prepared, saved, bundle, to_toml(config))
    machine = Machine(cpus=workers.cpus, gpu=workers.gpu, threads=workers.threads)
    write_report(config.output, config.report, machine, config.loop, prepared, asdict(config))
    if config.cache is None:
        storage.remove(own_tokens)
    return fingerprint


# -- before training -----------------------------------------------------------------------------------------------------


def _absolute(config: TrainConfig) -> TrainConfig:
    """The same config with local addresses in full: Ray Train's workers run in another folder."""
    encoder = config.encoder
    if os.path.isdir(encoder.name):
        encoder = replace(encoder, name=os.path.abspath(encoder.name))
    return replace(
        config,
        encoder=encoder,
        output=storage.absolute(config.output),
        resume=config.resume if config.resume in ("auto", "never") else storage.absolute(config.resume),
        cache=None if config.cache is None else storage.absolute(config.cache),
    )


def _is_finished(config: TrainConfig, bundle: str) -> bool:
    """Whether the run folder holds this run with its bundle.

    Raises ConfigError if it holds something else or a run with other settings, and for ``never`` if it holds anything.
    """
    other_place = "choose another output or remove it"
    if is_free(config.output):
        return False
    if config.resume == "never":
        raise ConfigError("the run folder is not empty", where=config.output, way_out=f"{other_place}, or --resume auto")
    written = storage.join(config.output, "run.toml")
    if not storage.exists(written):
        ours = storage.join(config.output, "tokens") + "/", storage.join(config.output, DRIVER)
        foreign = [file.uri for file in storage.all_files(config.output) if not file.uri.startswith(ours)]
        if foreign:
            raise ConfigError("the run folder is not empty", where=config.output, found=foreign[0], way_out=other_place)
        return False
    began = resumed(config, storage.read_bytes(written).decode())
    other = difference(fixed_settings(began), fixed_settings(config))
    if other is not None:
        name, found, expected = other
        raise ConfigError(
            "the run folder holds a run with other settings",
            where=config.output,
            found=f"{name} = {found!r}",
            expected=f"{name} = {expected!r}",
            way_out=other_place,
        )
    if storage.exists(storage.join(bundle, MARKER)):
        read_settings(bundle)
        return True
    return False


def _check_workers(config: TrainConfig, prepared: Prepared) -> None:
    if config.workers.count > len(prepared.groups):
        raise ConfigError(
            "more workers than label groups",
            found=f"{config.workers.count} workers, {len(prepared.groups)} groups",
            expected="a group or more for each worker",
            way_out="take fewer workers, or lower groups.max_size",
        )
    epoch_plan(config.loop, prepared.counts["train"]).check(config.workers.count * config.loop.accumulate)


def _identity(config: TrainConfig, prepared: Prepared) -> Identity:
    encoder, shape = check_encoder(config.encoder), None
    if encoder is not None:
        shape = [encoder.model_type, encoder.num_hidden_layers, encoder.hidden_size, config.encoder.feature_layers]
        shape += [config.encoder.max_tokens]
    plan = epoch_plan(config.loop, prepared.counts["train"])
    return {
        "labels": prepared.labels.fingerprint,
        "groups": hashlib.sha256(prepared.groups.group_L.tobytes()).hexdigest()[:16],
        "model": asdict(config.model)
        | {"encoder": shape, "pooling": config.encoder.pooling, "freeze": config.encoder.freeze}
        | {"lexical": [config.lexical.width, config.lexical.columns, config.lexical.rarest]},
        "documents": asdict(plan) | {"tokens": prepared.tokens.folder.rpartition("/")[2]},
        "order of documents": prepared.tokens.attempt,
    }


def _check_start(config: TrainConfig, identity: Identity) -> str | None:
    """The address of another run's checkpoint to start from, if any; raises ModelError if it does not fit.

    The documents of another run may have been shuffled differently; this run's own may not.
    """
    own = find(storage.join(config.output, "checkpoints"), say)
    for saved in own[:1]:
        saved.check(identity)
    if own or config.resume in ("auto", "never"):
        return None
    foreign = find(config.resume, say)
    if not foreign:
        raise ModelError("no complete checkpoint to resume from", where=config.resume, way_out="give auto, never or an address")
    foreign[0].check({name: value for name, value in identity.items() if name != "order of documents"})
    return foreign[0].uri


# -- training ------------------------------------------------------------------------------------------------------------


def _train(config: TrainConfig, prepared: Prepared, identity: Identity, start: str | None) -> None:
    with journal(config.output) as mailbox:
        result: Any = _trainer(
            config, prepared, identity, start, mailbox
        ).fit()  # typed as the old API's result, which has no value
    if isinstance(result.return_value, ModelError):
        raise result.return_value


def _trainer(config: TrainConfig, prepared: Prepared, identity: Identity, start: str | None, mailbox: Queue) -> TorchTrainer:
    filesystem, path = storage.arrow_filesystem(config.output)
    workers = config.workers
    job = Job(
        fit=config,
        validation=config.validation,
        checkpoints=config.checkpoints,
        place=storage.join(config.output, "checkpoints"),
        start=start,
        identity=identity,
        threads=workers.threads,
        report_seconds=config.report_seconds,
        tokens=prepared.tokens,
        tokenizer=ray.put(prepared.tokenizer),
        labels=ray.put(prepared.labels),
        groups=ray.put(prepared.groups),
        term_weights=ray.put(prepared.term_weights),
        mailbox=mailbox,
    )
    return TorchTrainer(
        work,  # type: ignore[arg-type]
        train_loop_config={"job": job},
        scaling_config=ScalingConfig(
            num_workers=workers.count if workers.least is None else (workers.least, workers.count),  # type: ignore[arg-type]
            use_gpu=workers.gpu,
            resources_per_worker=workers.needs,
        ),
        # Ray Train keeps only a marker of its own there: the checkpoints are ours (decision 0008).
        run_config=RunConfig(
            name="checkpoints",
            storage_path=path,
            storage_filesystem=filesystem,
            failure_config=FailureConfig(max_failures=workers.max_failures),
        ),
    )
