"""The training job: prepare, train data-parallel on Ray Train, keep the best model as a bundle.

A run folder: ``run.toml`` (settings as resolved), ``metrics.jsonl``, ``tensorboard/``; ``tokens/`` (unless there is a cache
elsewhere) and ``checkpoints/`` (best and last) until the run is finished, ``bundle/`` and ``report.html`` from then on;
``callbacks.json`` if the run has callbacks. Run again, the same command resumes it.
"""

import hashlib
import os
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace

import ray
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer

from xmc_ray import storage
from xmc_ray.bundle.folder import MARKER, read_settings
from xmc_ray.callbacks.callback import Callback
from xmc_ray.callbacks.calls import by_name
from xmc_ray.command import resumed, to_toml
from xmc_ray.errors import ConfigError, ModelError
from xmc_ray.exits import keep_signals
from xmc_ray.model.encoder import check_encoder, try_encoder
from xmc_ray.model.precision import arithmetic
from xmc_ray.model.tokenizer import Tokenizer
from xmc_ray.on_ray.session import check_room, connect, environment, is_cluster, make_room, own_errors, submission_id
from xmc_ray.on_ray.train.config import TrainConfig
from xmc_ray.on_ray.train.controlled import EndAtOnce, work
from xmc_ray.on_ray.train.export import calibration_of_another, keep_best
from xmc_ray.on_ray.train.follow import Follower, followed
from xmc_ray.on_ray.train.journal import journal, say
from xmc_ray.on_ray.train.prepare import Prepared, prepare, profile
from xmc_ray.on_ray.train.report import advice_on_documents, advice_on_training, curves_of, write_report
from xmc_ray.on_ray.train.worker import Job
from xmc_ray.settings import difference_in_words, fixed_settings
from xmc_ray.storage.lease import DRIVER, Lease, held, is_free
from xmc_ray.storage.places import check_apart, check_writable
from xmc_ray.training.checkpoint import Identity, Saved, find
from xmc_ray.training.fit import epoch_plan
from xmc_ray.training.recipe import free_settings, undecided
from xmc_ray.training.tuning import ladder

_OTHER_PLACE = "choose another output or remove it"


def run(config: TrainConfig) -> str:
    """Train and return the bundle's URI. Raises ConfigError before anything is written if settings do not fit."""
    if config.recipe == "auto":
        config = _as_begun(config)
    else:
        check_encoder(config.encoder, config.text.max_tokens)
    reads = {"documents.uri": config.documents.uri, "label_names": config.label_names, "calibration": config.calibration}
    reads["feedback.uri"] = config.feedback.uri
    if config.encoder.name.startswith(("/", "s3://")):  # else a name on a hub
        reads["encoder.name"] = config.encoder.name
    check_apart({"output": config.output, "cache": config.cache}, reads)
    bundle = storage.join(config.output, "bundle")
    if not _is_finished(config, bundle):
        callbacks = by_name(config.callbacks)
        for folder in filter(None, (config.output, config.cache)):
            check_writable(folder)
        with held(config.output, job=submission_id()) as lease, own_errors():
            if not _is_finished(config, bundle):  # once more: another job may just have finished here
                fingerprint, advice = _make(config, lease, callbacks)
                say("; WARNING: ".join([f"bundle {fingerprint}: {bundle}", *advice]))
                return bundle
    say(f"this run is finished: {bundle}")
    return bundle


def _make(config: TrainConfig, lease: Lease, callbacks: list[Callback]) -> tuple[str, list[str]]:
    """Prepare, train, keep the best; the bundle's fingerprint, and what to say of what it has learnt."""
    workers, least = config.workers, config.workers.least or config.workers.count
    _checkpoints(config)  # what is not there, or does not work, is told before the documents are read
    if config.calibration is not None:
        storage.read_parquet(config.calibration)
    if config.recipe == "auto" and not storage.exists(storage.join(config.output, "run.toml")):
        config = _by_rule(config)
    tokenizer = Tokenizer.load(config.encoder.name, config.text.max_tokens)
    with ThreadPoolExecutor(1) as beside:  # both take seconds, and neither of them both cores
        trial = beside.submit(try_encoder, config.encoder, tokenizer, config.settled().loop.precision)
        if is_cluster():
            trial.result()  # what is wrong is told before a cluster is waited for
        connect()
        encoder = trial.result()
    check_room("workers", least, workers.needs)
    say(f"reading {config.documents.uri}")
    prepared = prepare(config)
    say("prepared: " + ", ".join(f"{count:,} {name}" for name, count in prepared.counts.items() if count))
    kind = "flat, one label a group" if prepared.groups.flat else f"{len(prepared.groups):,} groups"
    say(f"labels: {len(prepared.labels):,} ({kind})")
    say(f"arithmetic: {arithmetic(config.loop.precision, workers.device.type, encoder is not None)}")
    for line in advice_on_documents(config, prepared):
        say(f"WARNING: {line}")
    _check_workers(config, prepared)
    if config.calibration is not None:
        calibration_of_another(config.calibration, prepared.labels)
    identity = _identity(config, prepared, encoder)
    start = _check_start(config, identity)
    storage.write_bytes(storage.join(config.output, "run.toml"), to_toml(config).encode())
    make_room("workers", least, workers.needs, workers.patience)  # only now: machines that wait for documents cost money
    with followed(config, callbacks) as follower:
        _train(config, prepared, identity, start, follower)
        lease.confirm()
        for line in (advice := advice_on_training(curves_of(config.output))):
            say(f"WARNING: {line}")
        fingerprint = keep_best(config, prepared, lease.confirm)
        write_report(config, prepared)
        if config.cache is None:
            storage.remove(storage.join(config.output, "tokens"))
        if not config.checkpoints.keep:
            storage.remove(storage.join(config.output, "checkpoints"))
        if callbacks:  # at the end: trackers may take their time
            follower.end(config, fingerprint)
    return fingerprint, advice


def _as_begun(config: TrainConfig) -> TrainConfig:
    """With the recipe of a run that has begun, if there is one.

    Raises ConfigError for settings that a recipe decides, and for others than those that the run began with.
    """
    free, written = undecided(config), storage.join(config.output, "run.toml")
    if storage.exists(written):
        began = resumed(config, storage.read_bytes(written).decode())
        if began.recipe == "auto":
            _refuse(config, difference_in_words(*(fixed_settings(free_settings(one)) for one in (began, config))))
            return replace(config, **{name: getattr(began, name) for name in vars(free)})
    return config


def _by_rule(config: TrainConfig) -> TrainConfig:
    """With the recipe for these documents, which are read for it."""
    connect()
    check_room("workers", config.workers.least or config.workers.count, config.workers.needs)
    config = replace(config, **vars(undecided(config)))
    say(f"reading {config.documents.uri}")
    prepared = prepare(config)
    chosen = ladder(config, profile(prepared), prepared.tokenizer, config.workers.device.type, say)[0]
    say(f"recipe: {chosen.name}, since {chosen.why}")
    return replace(config, **vars(chosen.config))


def _is_finished(config: TrainConfig, bundle: str) -> bool:
    """Whether the run folder holds this run with its bundle.

    Raises ConfigError if it holds something else or a run with other settings, and for ``never`` if it holds anything.
    """
    if is_free(config.output):
        return False
    if config.resume == "never":
        raise ConfigError("the run folder is not empty", where=config.output, way_out=f"{_OTHER_PLACE}, or --resume auto")
    if storage.exists(storage.join(config.output, MARKER)):
        raise ConfigError("the output is a bundle, or another model", where=config.output, way_out=_OTHER_PLACE)
    written = storage.join(config.output, "run.toml")
    if not storage.exists(written):
        ours = storage.join(config.output, "tokens") + "/", storage.join(config.output, DRIVER)
        foreign = [file.uri for file in storage.all_files(config.output) if not file.uri.startswith(ours)]
        if foreign:
            raise ConfigError("the run folder is not empty", where=config.output, found=foreign[0], way_out=_OTHER_PLACE)
        return False
    began = resumed(config, storage.read_bytes(written).decode())
    _refuse(config, difference_in_words(fixed_settings(began), fixed_settings(config)))
    if not storage.exists(storage.join(bundle, MARKER)):
        return False
    read_settings(bundle)
    return True


def _refuse(config: TrainConfig, other: str | None) -> None:
    """ConfigError if there is another setting than the run began with."""
    if other:
        what = "the run folder holds a run with other settings"
        raise ConfigError(what, where=config.output, found=other, way_out=_OTHER_PLACE)


def _check_workers(config: TrainConfig, prepared: Prepared) -> None:
    if config.workers.count > len(prepared.groups):
        raise ConfigError(
            "more workers than label groups",
            found=f"{config.workers.count} workers, {len(prepared.groups)} groups",
            expected="a group or more for each worker",
            way_out="take fewer workers, or lower groups.max_size",
        )
    epoch_plan(config.loop, prepared.counts["train"]).check(config.workers.count * config.loop.accumulate)


def _identity(config: TrainConfig, prepared: Prepared, encoder: str | None) -> Identity:
    plan = epoch_plan(config.loop, prepared.counts["train"])
    return {
        "feedback": prepared.feedback,
        "labels": prepared.labels.fingerprint,
        "groups": hashlib.sha256(prepared.groups.group_L.tobytes()).hexdigest()[:16],
        "encoder": encoder,
        "model": asdict(config.model)
        | {"freeze": config.encoder.freeze}
        | {"lexical": [config.lexical.width, config.lexical.columns, config.lexical.rarest]}
        | ({"fields": config.text.fields} if config.text.fields else {}),
        "documents": asdict(plan) | {"tokens": prepared.tokens.folder.rpartition("/")[2]},
        "order of documents": prepared.tokens.attempt,
    }


def _check_start(config: TrainConfig, identity: Identity) -> str | None:
    """The address of another run's checkpoint to start from, if any; raises ModelError if it does not fit.

    The documents of another run may have been shuffled differently; this run's own may not.
    """
    own, foreign = _checkpoints(config)
    for saved in own[:1]:
        saved.check(identity)
    if own or not foreign:
        return None
    foreign[0].check({name: value for name, value in identity.items() if name != "order of documents"})
    return foreign[0].uri


def _checkpoints(config: TrainConfig) -> tuple[list[Saved], list[Saved]]:
    """The complete checkpoints of this run and, where it has none and begins from another's, of that one, newest first.

    Raises ModelError if there is none where ``resume`` points to.
    """
    own = find(storage.join(config.output, "checkpoints"), say)
    if own or config.resume in ("auto", "never"):
        return own, []
    foreign = find(config.resume, say)
    if not foreign:
        found, way_out = None, "give auto, never or an address"
        if storage.exists(storage.join(re.sub(r"(/checkpoints)?(/step-\d+)?$", "", config.resume), "bundle", MARKER)):
            found = "a finished run, which has removed its checkpoints"
            way_out = "train that run in another output with --checkpoints.keep true"
        raise ModelError("no complete checkpoint to resume from", where=config.resume, found=found, way_out=way_out)
    return own, foreign


def _train(config: TrainConfig, prepared: Prepared, identity: Identity, start: str | None, follower: Follower) -> None:
    filesystem, path = storage.arrow_filesystem(config.output)
    workers = config.workers
    with journal(config.output, follower.tell) as mailbox:
        job = Job(config=config.settled(), prepared=ray.put(prepared), identity=identity, start=start, mailbox=mailbox)
        trainer = TorchTrainer(
            work,
            train_loop_config={"job": ray.put(job)},  # unread by the controller
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
                callbacks=[EndAtOnce()],  # type: ignore[list-item]
            ),
        )
        with keep_signals(), environment(_of_ray_train()):
            trainer.fit()


def _of_ray_train() -> dict[str, str]:
    """Variables of Ray Train: how often it looks at the workers, since each validation and the end wait for it (2 s if unset).

    Nobody takes away the machine of a local Ray, so a process that waits for notice of it is spared.
    """
    seconds = "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"
    variables = {seconds: os.environ.get(seconds, "0.5")}
    return variables if is_cluster() else variables | {"RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0"}
