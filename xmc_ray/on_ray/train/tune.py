"""The tuning job: tries a few recipes on a part of the documents, then trains the best one on all of them.

Each recipe of the ladder (`training.recipe`) gets the same minutes of one core, on a part of the documents that is small enough
for as many passes as it would make over all of them in the time that is kept for the final training. Held-out documents of
the training split decide. Ray Tune runs the trials side by side and stops those that fall behind (ASHA, Li et al. 2020).

    <output>/tune.toml                settings; the same command goes on where it stopped
            trials/<recipe>.json      what a trial reached
            tune.md, recipe.toml      what was tried; the settings that won, which jobs/train.py takes with --config
            run/                      the run folder of the final training, with its bundle
"""

import os
import tempfile
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from io import StringIO
from operator import itemgetter
from typing import Any

import numpy as np
import pyarrow as pa
import ray.tune
import torch
from ray.tune.schedulers import ASHAScheduler

from xmc_ray import storage
from xmc_ray.command import resumed, to_toml
from xmc_ray.data.documents import DocumentsConfig
from xmc_ray.data.labels import LabelIndex
from xmc_ray.data.profile import Profile
from xmc_ray.data.rejects import MAX_REJECT_SHARE
from xmc_ray.data.split import ValidationConfig
from xmc_ray.data.token_cache import Split
from xmc_ray.errors import ConfigError, ModelError
from xmc_ray.exits import keep_signals
from xmc_ray.metrics.at_k import Metrics
from xmc_ray.model.encoder import EncoderConfig
from xmc_ray.model.predict import predict
from xmc_ray.model.text import Tokenizer
from xmc_ray.on_ray.session import check_room, connect, find_own, is_cluster, own_errors
from xmc_ray.on_ray.train import job
from xmc_ray.on_ray.train.config import TrainConfig, WorkersConfig
from xmc_ray.on_ray.train.journal import say
from xmc_ray.on_ray.train.prepare import Prepared, ladder, prepare, profile
from xmc_ray.settings import (
    MAY_CHANGE_ON_RESUME,
    NonNegativeInt,
    OpenShare,
    PositiveFloat,
    Settings,
    Share,
    difference_in_words,
    fixed_settings,
)
from xmc_ray.storage.lease import held, is_free
from xmc_ray.storage.places import check_apart, check_writable
from xmc_ray.training.fit import FitConfig, build_model, epoch_plan, share_of_batches
from xmc_ray.training.loop import LoopConfig, TrainState, train
from xmc_ray.training.recipe import LENGTH, Candidate, undecided

JUDGED_BY = ("P@1", "P@3", "P@5", "PSP@5")  # by their mean
LIFTS = (0.0, 0.5, 1.0)  # they change predictions only, so that all are tried at the end of a trial
_QUARTERS = 4  # of a trial, each with a measurement; after the second one it may be stopped
_HELD_OUT, _ENOUGH = 4_000, 200  # documents: more tell little more, and fewer nothing
_IN_MEMORY = 400_000  # documents of a trial at most
_SHORTEST = 0.25  # minutes of a trial
_REPORTED = ("figures", "lift", "documents", "passes", "rate")


@dataclass(frozen=True, kw_only=True)
class TuneConfig(Settings):
    """Choose a recipe by trials and train it: documents and minutes in, a bundle out."""

    documents: DocumentsConfig
    """The training split."""
    output: storage.Address = field(metadata=MAY_CHANGE_ON_RESUME)
    """Folder of the trials and of the run, local or s3://."""
    encoder: storage.ModelName = "bert-base-uncased"
    """Hub name or folder of a pretrained encoder; if it has no weights, its tokenizer is used."""
    minutes: PositiveFloat = 20.0
    """Time for trials and training; reading, validation and export come on top."""
    search: OpenShare = 0.4
    """Share of the time that is spent on trials."""
    label_names: storage.Source | None = None
    """Parquet file with columns label and name, if labels have names."""
    max_reject_share: Share = field(default=MAX_REJECT_SHARE, metadata=MAY_CHANGE_ON_RESUME)
    """Share of rejected documents above which nothing is tried."""
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    workers: WorkersConfig = field(default_factory=WorkersConfig, metadata=MAY_CHANGE_ON_RESUME)
    seed: NonNegativeInt = 6088
    """Seed of weights, dropout and the order of documents."""


@dataclass(frozen=True)
class Trial:
    """What a recipe reached on held-out documents: ``figures`` are those of `JUDGED_BY`, with ``lift``.

    ``state`` is finished, stopped (it fell behind), or failed with a reason. ``documents`` were trained on in so many
    ``passes``, ``rate`` of them a second.
    """

    state: str
    figures: dict[str, float] = field(default_factory=dict)
    lift: float = 0.0
    documents: int = 0
    passes: float = 0.0
    rate: float = 0.0

    @property
    def score(self) -> float:
        """The mean of the figures; -1 without any."""
        return float(np.mean([*self.figures.values()])) if self.figures else -1.0


def run(config: TuneConfig) -> str:
    """Choose a recipe, train it, and return the bundle's URI. What an earlier call has finished is not done again.

    Raises ConfigError before anything is written if settings do not fit, and a trial's error if all of them fail.
    """
    reads = {"documents.uri": config.documents.uri, "label_names": config.label_names}
    if config.encoder.startswith(("/", "s3://")):  # else a name on a hub
        reads["encoder"] = config.encoder
    check_apart({"output": config.output}, reads)
    check_writable(config.output)
    Tokenizer.load(config.encoder, LENGTH)  # a name that is wrong must not become one that this folder was begun with
    chosen = storage.join(config.output, "recipe.toml")
    with held(config.output) as lease, own_errors():
        _begin(config)
        if not storage.exists(chosen):
            workers = config.workers
            connect()
            check_room("workers", workers.least or workers.count, workers.needs)  # of the training that follows
            recipe = choose(config)
            lease.confirm()
            storage.write_bytes(chosen, to_toml(recipe).encode())
        bundle = job.run(_training(config, resumed(FitConfig(), storage.read_bytes(chosen).decode())))
        storage.remove(storage.join(config.output, "tokens"))
    return bundle


def _begin(config: TuneConfig) -> None:
    """Keep the settings, or raise ConfigError if the folder holds something else, or what was begun with others."""
    written, way_out = storage.join(config.output, "tune.toml"), "choose another output or remove it"
    if not is_free(config.output) and not storage.exists(written):
        raise ConfigError("the folder is not empty", where=config.output, expected="one that this job began", way_out=way_out)
    if storage.exists(written):
        began = resumed(config, storage.read_bytes(written).decode())
        other = difference_in_words(fixed_settings(began), fixed_settings(config))
        if other:
            raise ConfigError("the folder holds trials with other settings", where=config.output, found=other, way_out=way_out)
    storage.write_bytes(written, to_toml(config).encode())


def choose(config: TuneConfig) -> FitConfig:
    """The settings of the best recipe, after trials if there are time and held-out documents for them; writes ``tune.md``."""
    loop = LoopConfig(minutes=config.minutes * (1 - config.search), seed=config.seed)
    basis = undecided(FitConfig(encoder=EncoderConfig(name=config.encoder), loop=loop))
    say(f"reading {config.documents.uri}")
    prepared = prepare(_training(config, basis))
    data, trials = profile(prepared), []
    recipes = ladder(basis, data, prepared.tokenizer)
    slots = min(_slots(config.workers), len(recipes))
    minutes = config.minutes * config.search * slots / len(recipes)
    judged = replace(config, validation=_held_out(config.validation, prepared.counts))
    if minutes < _SHORTEST:
        note = f"No trials: {config.minutes:g} minutes leave {60 * minutes:.0f} seconds for each of {len(recipes)} recipes."
    elif (parted := prepare(_training(judged, basis))).counts["validation"] < _ENOUGH:
        note = f"No trials: {parted.counts['validation']} held-out documents decide nothing."
    else:
        n_train, n_held_out = parted.counts["train"], min(parted.counts["validation"], _HELD_OUT)
        part = min(n_train, _IN_MEMORY, round(n_train * minutes / (config.minutes * (1 - config.search) * slots)))
        note = f"Trials of {minutes:.1f} minutes of one core on {part:,} documents, judged by {n_held_out:,} held-out ones."
        say(f"trying {len(recipes)} recipes, {slots} at a time. {note}")
        trials = _tried(judged, recipes, part, minutes)
    best = max(range(len(trials)), key=lambda number: trials[number].score, default=0)  # the first of equal ones
    chosen = recipes[best].config
    if trials:
        chosen = replace(chosen, model=replace(chosen.model, lift=trials[best].lift))
    say(f"recipe: {recipes[best].name}. {'' if trials else note}")
    table = summary(data, recipes, trials, best, note)
    storage.write_bytes(storage.join(config.output, "tune.md"), table.encode())
    return chosen


def summary(data: Profile, recipes: list[Candidate], trials: list[Trial], best: int, note: str) -> str:
    """``tune.md``: the data, the recipes and what they reached, in percent."""
    figures_of_data = [f"| {name.replace('_', ' ')} | {value:,.4g} |" for name, value in asdict(data).items()]
    lines = ["# Recipes tried", "", f"**{recipes[best].name}** is trained. {note}", "", "| data | |", "| --- | --- |"]
    lines += [
        *figures_of_data,
        "",
        f"| recipe | why | {' | '.join(JUDGED_BY)} | lift | documents | passes | documents/s | state |",
        "| --- " * (len(JUDGED_BY) + 7) + "|",
    ]
    for number, candidate in enumerate(recipes):
        trial = trials[number] if trials else Trial("not tried")
        figures = [f"{100 * trial.figures[name]:.2f}" if trial.figures else "" for name in JUDGED_BY]
        cost = [f"{trial.lift:g}", f"{trial.documents:,}", f"{trial.passes:.1f}", f"{trial.rate:,.0f}"]
        lines.append(f"| {' | '.join([candidate.name, candidate.why, *figures, *cost, trial.state])} |")
    return "\n".join([*lines, ""])


def _training(config: TuneConfig, recipe: FitConfig) -> TrainConfig:
    """The training job that a recipe stands for."""
    return TrainConfig(
        **vars(recipe),
        documents=config.documents,
        output=storage.join(config.output, "run"),
        label_names=config.label_names,
        max_reject_share=config.max_reject_share,
        cache=storage.join(config.output, "tokens"),
        validation=config.validation,
        workers=config.workers,
    )


def _held_out(validation: ValidationConfig, counts: dict[str, int]) -> ValidationConfig:
    """What is held out for the trials: as many documents as it takes to tell recipes apart, a fifth at most."""
    documents = sum(counts[name] for name in ("train", "validation", "calibration"))
    share = min(0.2, _HELD_OUT / documents)
    return validation if counts["validation"] >= _HELD_OUT else replace(validation, share=share, calibrate=False)


def _slots(workers: WorkersConfig) -> int:
    """Trials that fit side by side: a core each, or a worker's resources if those are GPUs."""
    total = ray.cluster_resources()
    if workers.gpu:
        return max(1, int(total.get("GPU", 0)))
    return max(1, int(total.get("CPU", 1)) if is_cluster() else len(os.sched_getaffinity(0)))


def _tried(config: TuneConfig, recipes: list[Candidate], documents: int, minutes: float) -> list[Trial]:
    """The trials of all recipes; those that are on record are not repeated. Raises the first error if all have failed."""
    records = [storage.join(config.output, "trials", f"{candidate.name.replace(' ', '-')}.json") for candidate in recipes]
    missing = [number for number, uri in enumerate(records) if not storage.exists(uri)]
    if missing:
        parts = {number: prepare(_training(config, recipes[number].config)) for number in missing}
        limited = [replace(entry.config, loop=replace(entry.config.loop, minutes=minutes)) for entry in recipes]
        needs = config.workers.needs if config.workers.gpu else {"CPU": 1.0}
        device = config.workers.device.type
        shared = {"configs": limited, "parts": parts, "documents": documents, "records": records, "device": device}
        trainable = ray.tune.with_parameters(_trial, **shared)
        # Ray Tune takes Ctrl-C for the end of all trials, and prints a table and the address of a folder that will not stay.
        with tempfile.TemporaryDirectory() as folder, keep_signals(), redirect_stdout(StringIO()):
            results = ray.tune.Tuner(
                ray.tune.with_resources(trainable, needs),
                param_space={"number": ray.tune.grid_search(missing)},
                tune_config=ray.tune.TuneConfig(
                    metric="score",
                    mode="max",
                    scheduler=ASHAScheduler(max_t=_QUARTERS, grace_period=_QUARTERS // 2, reduction_factor=2),
                    max_concurrent_trials=_slots(config.workers),
                ),
                run_config=ray.tune.RunConfig(name="trials", storage_path=folder, verbose=0),
            ).fit()
        ended = {(result.config or {})["number"]: result for result in map(results.__getitem__, range(len(results)))}
        unfinished = {number: _unfinished(result) for number, result in ended.items() if not storage.exists(records[number])}
        recorded = [Trial(**storage.read_json(uri)) for uri in records if storage.exists(uri)]
        if results.errors and not any(trial.figures for trial in [*recorded, *unfinished.values()]):
            raise results.errors[0]  # and nothing is recorded: another attempt may have more memory
        for number, trial in unfinished.items():
            storage.write_json(records[number], asdict(trial))
    return [Trial(**storage.read_json(uri)) for uri in records]


def _unfinished(result: ray.tune.Result) -> Trial:
    """A trial that Ray Tune stopped, by its last report, or one that failed."""
    last = result.metrics or {}
    if result.error is None and "figures" in last:
        return Trial("stopped, behind the others", **{name: last[name] for name in _REPORTED})
    error = result.error or ModelError("the trial reported nothing")
    return Trial(f"failed: {find_own(error) or str(error).strip().splitlines()[-1]}")


def _trial(
    space: dict[str, Any],
    *,
    configs: list[FitConfig],
    parts: dict[int, Prepared],
    documents: int,
    records: list[str],
    device: str,
) -> None:
    """Train recipe ``space["number"]`` on ``documents`` random documents, reporting to Ray Tune after each quarter.

    A trial that finishes leaves its record itself, for a job that is killed before the others have finished.
    """
    recipe, prepared = configs[space["number"]], parts[space["number"]]
    torch.set_num_threads(1)
    train_documents, held_out = _some(prepared, "train", documents), _some(prepared, "validation", _HELD_OUT)
    shape = prepared.tokenizer, prepared.labels, prepared.groups
    model = build_model(recipe, *shape, device=device, weight_F=prepared.term_weights)
    state, plan = TrainState.start(model, recipe.optim), epoch_plan(recipe.loop, len(train_documents))
    batches_from = partial(share_of_batches, train_documents, plan, recipe.loop.epochs, exchange=model.exchange)
    measure = partial(_measured, state, recipe, prepared.labels, len(train_documents), held_out)
    quarter = 1
    for step in train(state, model, batches_from, plan.steps, recipe.loop):
        if quarter < _QUARTERS and step.progress >= quarter / _QUARTERS:
            quarter += 1
            ray.tune.report(measure([recipe.model.lift]))
    reached = measure(LIFTS)
    trial = Trial("finished", **{name: reached[name] for name in _REPORTED})
    storage.patiently(storage.write_json, records[space["number"]], asdict(trial))
    ray.tune.report(reached)


def _some(prepared: Prepared, split: Split, documents: int) -> pa.Table:
    """Random documents of a split: ``tokens`` and ``labels``, list<int32> each."""
    tokens = prepared.tokens
    return pa.concat_tables(tokens.chunks(split, tokens.some(split, documents))).slice(0, documents).combine_chunks()


def _measured(
    state: TrainState, recipe: FitConfig, labels: LabelIndex, documents: int, held_out: pa.Table, lifts: Sequence[float]
) -> dict[str, Any]:
    """What a trial reports: ``score`` and figures of the best of some lifts, and what it took."""
    tokens, truth = (held_out[name].combine_chunks() for name in ("tokens", "labels"))
    lift_G = state.model.recall.lift
    assert lift_G is not None
    whole_G = lift_G.clone()  # of the recipe's own lift
    best: dict[str, Any] = {"score": -1.0}
    with state.averager.in_use(state.model):
        for lift in lifts:
            lift_G.copy_(whole_G * (lift / recipe.model.lift))
            metrics = Metrics(labels.counts, labels.n_documents)
            metrics.update(predict(state.model, tokens, max(metrics.ks), recipe.loop.prediction)[1], truth)
            total = metrics.result()["total"]
            figures = {name: float(total[name]) for name in JUDGED_BY}
            best = max(
                best, {"score": float(np.mean([*figures.values()])), "lift": lift, "figures": figures}, key=itemgetter("score")
            )
    lift_G.copy_(whole_G)
    passes, rate = state.documents / documents, state.documents / max(state.seconds, 1e-9)
    return best | {"documents": documents, "passes": passes, "rate": rate}
