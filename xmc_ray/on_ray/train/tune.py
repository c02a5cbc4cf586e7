"""The tuning job: tries a few recipes on a part of the documents, then trains the best one on all of them.

Each recipe of the ladder (`training.recipe`) gets the same minutes of one core, on a part of the documents that is small enough
for as many passes as it would make over all of them in the time that is kept for the final training. Held-out documents of
the training split decide. Ray Tune runs the trials side by side and stops those that fall behind (ASHA, Li et al. 2020).

    <output>/tune.toml                settings; the same command goes on where it stopped
            documents.json            which documents and feedback the trials read
            trials/<recipe>.json      what a trial reached
            trials/<recipe>.parquet   its held-out predictions
            tune.md, recipe.toml      what was tried; the settings that won, which jobs/train.py takes with --config
            calibration.parquet       the held-out predictions of the trial that won
            run/                      the run folder of the final training, with its bundle
            run-2/ ...                those of further members of an ensemble, as many as ``members`` and the minutes allow
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import ClassVar

from xmc_ray import storage
from xmc_ray.bundle.folder import MARKER
from xmc_ray.callbacks.calls import by_name, check_names
from xmc_ray.command import resumed, to_toml
from xmc_ray.data.documents import DocumentsConfig
from xmc_ray.data.feedback import Feedback, FeedbackConfig
from xmc_ray.data.inputs import list_inputs
from xmc_ray.data.profile import Profile
from xmc_ray.data.rejects import MAX_REJECT_SHARE
from xmc_ray.data.split import ValidationConfig
from xmc_ray.errors import ConfigError, DataError
from xmc_ray.model.encoder import EncoderConfig
from xmc_ray.model.tokenizer import TextConfig, Tokenizer
from xmc_ray.on_ray.session import check_room, connect, own_errors, submission_id
from xmc_ray.on_ray.train import job
from xmc_ray.on_ray.train.config import TrainConfig, WorkersConfig
from xmc_ray.on_ray.train.journal import say
from xmc_ray.on_ray.train.prepare import prepare, profile
from xmc_ray.on_ray.train.report import curves_of
from xmc_ray.on_ray.train.trials import predictions_of, record_of, slots, tried
from xmc_ray.settings import (
    MAY_CHANGE_ON_RESUME,
    NonNegativeInt,
    OpenShare,
    PositiveFloat,
    PositiveInt,
    Settings,
    Share,
    difference_in_words,
    fixed_settings,
)
from xmc_ray.storage.lease import held, is_free
from xmc_ray.storage.places import check_apart, check_writable
from xmc_ray.training.fit import FitConfig, epoch_plan
from xmc_ray.training.loop import LoopConfig
from xmc_ray.training.recipe import LENGTH, Candidate, undecided
from xmc_ray.training.tuning import (
    JUDGED_BY,
    Budget,
    Round,
    Trial,
    held_out_for_trials,
    ladder,
    search_share,
    timed,
    too_few,
)

_CALIBRATION = "calibration.parquet"


@dataclass(frozen=True, kw_only=True)
class TuneConfig(Settings):
    """Choose a recipe by trials and train it: documents and minutes in, a bundle out."""

    essentials: ClassVar = (
        "documents.uri",
        "output",
        "encoder",
        "minutes",
        "documents.text",
        "documents.labels",
        "label_names",
        "validation.series",
        "workers.count",
        "workers.gpu",
    )

    documents: DocumentsConfig
    """The training split."""
    output: storage.Address = field(metadata=MAY_CHANGE_ON_RESUME)
    """Folder of the trials and of the run, local or s3://."""
    encoder: storage.ModelName = "bert-base-uncased"
    """Hub name or folder of a pretrained encoder; if it has no weights, its tokenizer is used."""
    text: TextConfig = field(default_factory=TextConfig)
    """The fields, if there are any; recipes decide how much is read."""
    minutes: PositiveFloat = 20.0
    """Time for trials and training; reading, validation and export come on top."""
    search: OpenShare | None = None
    """Share of the time that is spent on trials; None is 0.4, or 0.2 of more than 300,000 documents."""
    members: PositiveInt = field(default=1, metadata=MAY_CHANGE_ON_RESUME)
    """Models to train of the best recipe, at most, for an ensemble: those after the first in minutes that it has left over."""
    label_names: storage.Source | None = None
    """Table (Parquet, CSV, TSV or JSON lines) with columns label and name, if labels have names."""
    max_reject_share: Share = field(default=MAX_REJECT_SHARE, metadata=MAY_CHANGE_ON_RESUME)
    """Share of rejected documents above which nothing is tried."""
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    feedback: FeedbackConfig = field(default_factory=FeedbackConfig)
    workers: WorkersConfig = field(default_factory=WorkersConfig, metadata=MAY_CHANGE_ON_RESUME)
    seed: NonNegativeInt = 6088
    """Seed of weights, dropout and the order of documents."""
    callbacks: list[str] = field(default_factory=list, metadata=MAY_CHANGE_ON_RESUME)
    """Who follows the final training, not the trials: mlflow, wandb, or callbacks of your own as package.module:name."""

    def check(self) -> None:
        """Raises ConfigError for columns of text that are not the fields, if there are any, for what recipes decide, and for
        what is no name of a callback.
        """
        check_names(self.callbacks)
        self.documents.with_fields([*(self.text.fields or {})])
        undecided(self.basis)

    @property
    def basis(self) -> FitConfig:
        """What all recipes have in common."""
        encoder, loop = EncoderConfig(name=self.encoder), LoopConfig(seed=self.seed)
        return FitConfig(encoder=encoder, text=self.text, loop=loop, feedback=self.feedback)


def run(config: TuneConfig) -> list[str]:
    """Choose a recipe, train it, and return the bundle's URI, or those of all members. What is finished is not done again.

    Raises ConfigError before anything is written if settings do not fit, and a trial's error if all of them fail.
    """
    reads = {"documents.uri": config.documents.uri, "label_names": config.label_names, "feedback.uri": config.feedback.uri}
    if config.encoder.startswith(("/", "s3://")):  # else a name on a hub
        reads["encoder"] = config.encoder
    check_apart({"output": config.output}, reads)
    by_name(config.callbacks)  # what is not installed is told before minutes of trials
    check_writable(config.output)
    Tokenizer.load(config.encoder, LENGTH)  # a name that is wrong must not become one that this folder was begun with
    chosen = storage.join(config.output, "recipe.toml")
    with held(config.output, job=submission_id()) as lease, own_errors():
        _begin(config)
        if not storage.exists(storage.join(config.output, "run", "bundle", MARKER)):
            _check_read(config)
        if not storage.exists(chosen):
            workers = config.workers
            connect()
            check_room("workers", workers.least or workers.count, workers.needs)  # of the training that follows
            recipe = choose(config)
            lease.confirm()
            storage.write_bytes(chosen, to_toml(recipe).encode())
        calibration = storage.join(config.output, _CALIBRATION)
        calibrated = storage.exists(calibration)
        training = _training(
            _on_everything(config) if calibrated else config, resumed(FitConfig(), storage.read_bytes(chosen).decode())
        )
        training = replace(training, calibration=calibration if calibrated else None)
        bundles = [*_members(config, training)]
        if len(bundles) > 1:
            say(f"an ensemble of {len(bundles)}: --bundle '{json.dumps(bundles)}'")
        storage.remove(storage.join(config.output, "tokens"))
    return bundles


def _members(config: TuneConfig, training: TrainConfig) -> Iterator[str]:
    """The bundles of the recipe, trained with seeds of their own as often as its minutes allow, ``config.members`` at most.

    One model that makes all its passes is worth more than two that lack some.
    """
    recipe, seconds = training, 0.0
    for number in range(config.members):
        if number:
            loop = replace(recipe.loop, seed=recipe.loop.seed + number)
            groups = replace(recipe.groups, seed=recipe.groups.seed + number)
            output = storage.join(config.output, f"run-{number + 1}")
            training = replace(recipe, loop=loop, groups=groups, output=output)
            if seconds * (number + 1) / number > 60 * (recipe.loop.minutes or config.minutes):
                say(f"no minutes are left for a member after {number} of {config.members}")
                return
        yield job.run(training)
        seconds += curves_of(training.output).last("seconds") or 0.0


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


def _check_read(config: TuneConfig) -> None:
    """Keep which documents and feedback are read, or raise ConfigError if they are no longer those of trials on record.

    Trials judged by other documents, or by another truth, are not comparable, and calibrate no model of these.
    """
    uri, way_out = storage.join(config.output, "documents.json"), "choose another output, or put back what was there"
    files = [[file.uri, file.size, file.version] for file in list_inputs(config.documents).files]
    feedback = None if config.feedback.uri is None else Feedback.read(config.feedback.uri).fingerprint
    now = {"documents": hashlib.sha256(json.dumps(files).encode()).hexdigest()[:16], "feedback": feedback}
    began = storage.read_json(uri) if storage.exists(uri) else now
    for what, place in (("documents", config.documents.uri), ("feedback", config.feedback.uri)):
        if began.get(what) != now[what]:
            raise ConfigError(f"other {what} than in the trials in {config.output}", where=place, way_out=way_out)
    storage.write_json(uri, now)


def choose(config: TuneConfig) -> FitConfig:
    """The settings of the best recipe, after trials if there are time and held-out documents for them.

    Writes ``tune.md`` and, after trials, ``calibration.parquet``.
    """
    basis = undecided(config.basis)
    say(f"reading {config.documents.uri}")
    prepared = prepare(_training(_on_everything(config), basis))
    data, trials, judges = profile(prepared), [], None
    recipes = ladder(basis, data, prepared.tokenizer, config.workers.device.type, say)
    search = search_share(data.documents) if config.search is None else config.search
    budget = Budget(config.minutes, len(recipes), min(slots(config.workers), len(recipes)), search)
    validation = held_out_for_trials(config.validation, data.documents)
    judged, folder = prepared, storage.join(config.output, "trials")
    note = budget.too_short()
    if note is None:
        try:
            judged = prepared.held_out(validation, config.documents.uri)
            note = too_few(judged.counts["validation"])
        except DataError as error:  # where all documents have the same words, all are held out
            note = f"No trials: {error.what}."
    if note is None:
        counts, workers = judged.counts, config.workers
        note = budget.plan(counts["train"], counts["validation"])
        say(f"trying {len(recipes)} recipes, {budget.slots} at a time. {note}")
        _check_workers(config, recipes, counts["train"], len(prepared.labels))
        trials = tried(judged, workers, Round(recipes, budget.part(counts["train"]), budget.of_trial), folder)
        second = budget.second_round(recipes, trials, counts["train"])
        if second is not None:
            say(str(second))
            note += f" {second}"
            again = tried(judged, workers, second, folder)
            if any(trial.figures for trial in again):
                judges = len(second.recipes)  # the first round had fewer documents
                recipes, trials = [*second.recipes, *recipes], [*again, *trials]
            else:
                recipes, trials = [*recipes, *second.recipes], [*trials, *again]
    best = max(range(len(trials[:judges])), key=lambda number: trials[number].score, default=0)  # the first of equal ones
    chosen = timed(recipes[best].config, budget.of_training if trials else config.minutes)
    if trials:
        chosen = trials[best].settled(chosen)
        predictions = predictions_of(record_of(folder, recipes[best]))
        if storage.exists(predictions):  # else the trial was stopped, and failed or fell behind as all others did
            storage.write_bytes(storage.join(config.output, _CALIBRATION), storage.read_bytes(predictions))
    say(f"recipe: {recipes[best].name}. {'' if trials else note}")
    table = summary(data, recipes, trials, best, note)
    storage.write_bytes(storage.join(config.output, "tune.md"), table.encode())
    return chosen


def _check_workers(config: TuneConfig, recipes: list[Candidate], documents: int, labels: int) -> None:
    """ConfigError for more workers than the final training of a recipe can use, before any minute is spent."""
    for recipe in recipes:
        groups, loop = -(-labels // recipe.config.groups.max_size), recipe.config.loop
        if config.workers.count > groups:
            found = f"{config.workers.count} workers, {groups} groups of the recipe {recipe.name!r}"
            raise ConfigError("more workers than label groups", found=found, way_out="take fewer workers")
        epoch_plan(loop, documents).check(config.workers.count * loop.accumulate)


def summary(data: Profile, recipes: list[Candidate], trials: list[Trial], best: int, note: str) -> str:
    """``tune.md``: the data, the recipes and what they reached, in percent."""
    figures_of_data = [f"| {name.replace('_', ' ')} | {value:,.4g} |" for name, value in asdict(data).items()]
    lines = ["# Recipes tried", "", f"**{recipes[best].name}** is trained. {note}", "", "| data | |", "| --- | --- |"]
    lines += [
        *figures_of_data,
        "",
        f"| recipe | why | {' | '.join(JUDGED_BY)} | lift | weight of words | documents | passes | documents/s | state |",
        "| --- " * (len(JUDGED_BY) + 8) + "|",
    ]
    for number, candidate in enumerate(recipes):
        trial = trials[number] if trials else Trial("not tried")
        figures = [f"{100 * trial.figures[name]:.2f}" if trial.figures else "" for name in JUDGED_BY]
        cost = [f"{trial.lift:g}", f"{trial.weight:g}", f"{trial.documents:,}", f"{trial.passes:.1f}", f"{trial.rate:,.0f}"]
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
        callbacks=config.callbacks,
    )


def _on_everything(config: TuneConfig) -> TuneConfig:
    """Nothing is held out."""
    return replace(config, validation=replace(config.validation, share=0.0))
