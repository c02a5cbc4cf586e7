"""Which recipe suits documents: short trials on a part of them, judged on documents held out from training; without Ray.

Trials get equal time, and a part of the documents on which they make as many passes in it as the final training will make over
all of them. A trial ends with its recipe's last pass; on small sets that leaves time for a second round, on more documents. The
held-out predictions of the best one also calibrate the model that is then trained on everything (decision 0023).
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

from xmc_ray.data.groups import LabelGroups, group_labels
from xmc_ray.data.labels import IntArray, LabelIndex, list_lengths
from xmc_ray.data.profile import Profile
from xmc_ray.data.split import ValidationConfig, held_out_use
from xmc_ray.errors import ConfigError, ModelError
from xmc_ray.metrics.at_k import Metrics, find_hits
from xmc_ray.metrics.calibration import DEPTH, Calibration
from xmc_ray.model.lexical import term_weights
from xmc_ray.model.lightxml import LightXML
from xmc_ray.model.linear import LinearConfig
from xmc_ray.model.precision import settled
from xmc_ray.model.predict import computed_by, margins, predict
from xmc_ray.model.svm import train_linear
from xmc_ray.model.tokenizer import Tokenizer
from xmc_ray.training.fit import FitConfig, build_model, epoch_plan, in_chunks, share_of_batches
from xmc_ray.training.loop import TrainState, train
from xmc_ray.training.recipe import MANY, Candidate, candidates, pretrained_layers

JUDGED_BY = ("P@1", "P@3", "P@5", "PSP@5")  # by their mean
SEARCH, _OF_MANY = 0.4, 0.2  # share of the minutes that trials get, unless told; of many documents
LIFTS = (0.0, 0.5, 1.0)  # they change predictions only, so that all are tried at the end of a trial
WEIGHTS = (0.0, 0.25, 0.5, 1.0, 2.0)  # of the linear ranker; the same holds for them
QUARTERS = 4  # of a trial, each with a measurement
FINISHED = "finished"
HELD_OUT, ENOUGH = 4_000, 200  # documents: more tell little more, and fewer nothing
_IN_MEMORY = 400_000  # documents of a trial at most
_SHORTEST = 0.25  # minutes of a trial


@dataclass(frozen=True)
class Trial:
    """What a recipe reached on held-out documents: ``figures`` are those of `JUDGED_BY`.

    ``lift`` and ``weight``, that of the linear ranker, are those with which it reached them.

    ``state`` is finished, unfinished, stopped (it fell behind), or failed with a reason. ``documents`` were trained on in so
    many ``passes``, ``rate`` of them a second.
    """

    state: str
    figures: dict[str, float] = field(default_factory=dict)
    lift: float = 0.0
    weight: float = 0.0
    documents: int = 0
    passes: float = 0.0
    rate: float = 0.0

    @property
    def score(self) -> float:
        """The mean of the figures; -1 without any."""
        return float(np.mean([*self.figures.values()])) if self.figures else -1.0

    def settled(self, recipe: FitConfig) -> FitConfig:
        """The recipe with what was chosen when it was tried to its end."""
        if self.state != FINISHED:  # no linear ranker has been there to choose a weight for
            return recipe
        linear = replace(recipe.linear, weight=self.weight) if self.weight else LinearConfig()
        return replace(recipe, model=replace(recipe.model, lift=self.lift), linear=linear)


@dataclass(frozen=True)
class Budget:
    """How ``minutes`` are divided among the trials of so many ``recipes``, ``slots`` of them side by side, and the training."""

    minutes: float
    recipes: int
    slots: int = 1
    search: float = SEARCH

    @property
    def of_training(self) -> float:
        """Minutes of the final training."""
        return self.minutes * (1 - self.search)

    @property
    def of_trial(self) -> float:
        """Minutes of each trial."""
        return self.minutes * self.search / math.ceil(self.recipes / self.slots)

    def part(self, documents: int) -> int:
        """Of so many training documents, those of a trial: it makes the passes that the final training makes over all."""
        return max(1, min(documents, _IN_MEMORY, round(documents * self.of_trial / (self.of_training * self.slots))))

    def second_round(self, recipes: list[Candidate], trials: list[Trial], documents: int) -> "Round | None":
        """The best two again, and the best with twice the passes, on as many of the documents as there is time left for.

        The rates of the first round's ``trials`` say how many; None if they are no more than it had. Twice the passes are left
        out if they would cost two thirds of these documents.
        """
        ranked = sorted((number for number, trial in enumerate(trials) if trial.rate), key=lambda number: -trials[number].score)
        if not ranked:
            return None
        spent = sum(trial.documents * trial.passes / trial.rate for trial in trials if trial.rate) / 60 / self.slots
        again = [(number, 1, "again", "among the best of the first round") for number in ranked[:2]]
        twice = (ranked[0], 2, "twice the passes", "the best of the first round may want more than the rule gives")

        def round_of(entries: list[tuple[int, int, str, str]]) -> Round:
            minutes = (self.minutes * self.search - spent) / math.ceil(len(entries) / self.slots)
            chosen, most = [], min(documents, _IN_MEMORY)
            for number, times, how, why in entries:
                recipe = recipes[number]
                loop = replace(recipe.config.loop, epochs=times * recipe.config.loop.epochs)
                chosen.append(Candidate(f"{recipe.name}, {how}", why, replace(recipe.config, loop=loop)))
                most = min(most, int(60 * minutes * trials[number].rate / loop.epochs))
            return Round(chosen, most, minutes, stops=False)

        two, three = round_of(again), round_of([*again, twice])
        second = three if 3 * three.documents >= two.documents else two
        return second if second.minutes >= _SHORTEST and second.documents > trials[ranked[0]].documents else None

    def too_short(self) -> str | None:
        """Why there is no time for trials; None if there is."""
        if self.of_trial >= _SHORTEST:
            return None
        return f"No trials: {self.minutes:g} minutes leave {60 * self.of_trial:.0f} seconds for each of {self.recipes} recipes."

    def plan(self, train: int, held_out: int) -> str:
        """The trials, in words."""
        part, judges = self.part(train), min(held_out, HELD_OUT)
        return f"Trials of {self.of_trial:.1f} minutes on {part:,} documents, judged by {judges:,} held-out ones."


def search_share(documents: int) -> float:
    """The share of the minutes that trials get: less where training has too few for all passes over so many documents."""
    return _OF_MANY if documents > MANY else SEARCH


@dataclass(frozen=True)
class Round:
    """Trials of ``recipes`` on so many ``documents``, each for at most so many ``minutes``.

    ``stops``: those that are behind half-way may be stopped. A linear ranker is there at the end only, so the best go on to it.
    """

    recipes: list[Candidate]
    documents: int
    minutes: float
    stops: bool = True

    def __str__(self) -> str:
        return f"A second round of {self.minutes:.1f} minutes on {self.documents:,} documents."


def too_few(held_out: int) -> str | None:
    """Why so few held-out documents decide nothing; None if they are enough."""
    return None if held_out >= ENOUGH else f"No trials: {held_out:,} held-out documents decide nothing."


def held_out_for_trials(validation: ValidationConfig, documents: int) -> ValidationConfig:
    """What of so many documents is held out for trials: as many as it takes to tell recipes apart, a fifth at most."""
    return replace(validation, share=max(validation.share, min(0.2, HELD_OUT / max(1, documents))), calibrate=False)


def timed(config: FitConfig, minutes: float) -> FitConfig:
    """The same settings for so many minutes of training."""
    return replace(config, loop=replace(config.loop, minutes=minutes))


def ladder(config: FitConfig, data: Profile, tokenizer: Tokenizer, device: str, say: Callable[[str], None]) -> list[Candidate]:
    """Recipes for such ``data`` on a ``device``, the best by rule first; ``config`` as `recipe.undecided` returns it."""
    depth = 0
    try:
        depth = pretrained_layers(config.encoder.name, tokenizer, settled(config.loop.precision, device))
    except (ConfigError, ModelError) as error:
        say(f"words alone, because the encoder is of no use: {error}")
    return candidates(data, config, depth, device)


@dataclass(frozen=True)
class Choice:
    """The settings that were chosen, the recipe's name, what its trial calibrates and what each trial reached, if any."""

    config: FitConfig
    name: str
    calibration: Calibration | None = None
    trials: dict[str, Trial] = field(default_factory=dict)


def choose(
    config: FitConfig,
    minutes: float | None,
    texts: pa.StringArray,
    documents: pa.Table,
    labels: LabelIndex,
    tokenizer: Tokenizer,
    device: str,
    say: Callable[[str], None],
) -> Choice:
    """The recipe for documents in memory: the best of trials one after the other, or the best by rule without ``minutes``.

    ``config`` as `recipe.undecided` returns it; ``documents`` has ``tokens`` and ``labels``, list<int32> each. The settings
    have the minutes that trials leave. Raises the first trial's error if all fail.
    """
    tokens, truth = (documents[name].combine_chunks() for name in ("tokens", "labels"))
    data = Profile.of([tokens], [truth], labels)
    recipes = ladder(config, data, tokenizer, device, say)
    if minutes is None:
        return Choice(recipes[0].config, recipes[0].name)
    budget = Budget(minutes, len(recipes), search=search_share(data.documents))
    use_D = held_out_use(texts, pa.nulls(len(texts), pa.string()), held_out_for_trials(ValidationConfig(), len(texts)))
    has_truth_D = list_lengths(truth) > 0  # feedback may leave only labels that are wrong
    held_out = _some(documents, (use_D > 0) & has_truth_D, HELD_OUT, config.loop.seed)
    n_train = int((use_D == 0).sum())
    note = budget.too_short() or too_few(min(len(held_out), n_train))  # all are held out where all have the same words
    if note is not None:
        say(note)
        return Choice(timed(recipes[0].config, minutes), recipes[0].name)

    def tried(round_: Round) -> list[tuple[Trial, Calibration | None]]:
        part = _some(documents, use_D == 0, round_.documents, config.loop.seed)
        columns = [[part[name].combine_chunks()] for name in ("tokens", "labels")]
        reached: list[tuple[Trial, Calibration | None]] = []
        errors: list[Exception] = []
        for recipe in round_.recipes:
            limited = timed(recipe.config, round_.minutes)
            groups = group_labels(limited.groups, columns[0], columns[1], len(labels))
            try:
                *_, last = run_trial(limited, tokenizer, labels, groups, part, held_out, device)
                reached.append(last)
            except (ModelError, MemoryError, torch.OutOfMemoryError) as error:
                errors.append(error)
                reached.append((Trial(f"failed: {error}"), None))
        if len(errors) == len(reached) and round_.stops:  # the first round: after it there is something to fall back to
            raise errors[0]
        return reached

    first = Round(recipes, budget.part(n_train), budget.of_trial)
    reached = tried(first)
    trials = {recipe.name: trial for recipe, (trial, _) in zip(recipes, reached, strict=True)}
    second = budget.second_round(recipes, [trial for trial, _ in reached], n_train)
    if second is not None:
        again = tried(second)
        trials |= {recipe.name: trial for recipe, (trial, _) in zip(second.recipes, again, strict=True)}
        if any(trial.figures for trial, _ in again):
            recipes, reached = second.recipes, again
    best = max(range(len(recipes)), key=lambda number: reached[number][0].score)  # the first of equal ones
    trial, calibration = reached[best]
    chosen = trial.settled(timed(recipes[best].config, budget.of_training))
    return Choice(chosen, recipes[best].name, calibration, trials)


def _some(documents: pa.Table, wanted_D: npt.NDArray[np.bool_], most: int, seed: int) -> pa.Table:
    """At most so many random ones of the wanted documents."""
    rows = np.random.default_rng(seed).permutation(np.flatnonzero(wanted_D))[:most]
    return documents.take(pa.array(rows)).combine_chunks()


def run_trial(
    recipe: FitConfig,
    tokenizer: Tokenizer,
    labels: LabelIndex,
    groups: LabelGroups,
    documents: pa.Table,
    held_out: pa.Table,
    device: str,
) -> Iterator[tuple[Trial, Calibration]]:
    """Train on ``documents`` for ``recipe.loop.minutes``; after each quarter: what it reached on ``held_out`` documents.

    Tables have columns ``tokens``, ``labels`` and perhaps ``judged``, list<int32> each. The last trial is finished: it has the
    linear ranker, if the recipe has one, and the best of `LIFTS` and `WEIGHTS`. The calibration is of its held-out predictions.
    """
    weight_F = term_weights(in_chunks(documents["tokens"].combine_chunks()), recipe.lexical) if recipe.lexical.width else None
    model = build_model(recipe, tokenizer, labels, groups, device=device, weight_F=weight_F)
    state, plan = TrainState.start(model, recipe.optim), epoch_plan(recipe.loop, len(documents))
    plan.check(recipe.loop.accumulate)
    batches_from = partial(share_of_batches, documents, plan, recipe.loop.epochs, exchange=model.exchange)
    measure, rate = partial(_measured, state, recipe, labels, len(documents), held_out), 0.0
    quarter, before = 1, 0
    for step in train(state, model, batches_from, plan.steps, recipe.loop):
        if step.seconds > 0:
            rate = before / step.seconds  # the clock has been read at the beginning of the step
        before = step.documents
        if quarter < QUARTERS and step.progress >= quarter / QUARTERS:
            quarter += 1
            yield measure("unfinished", [recipe.model.lift], rate)
    if recipe.linear.candidates:
        with state.averager.in_use(model):
            model.linear = train_linear(model, documents, recipe.linear, recipe.loop.prediction)
    yield measure(FINISHED, LIFTS, rate)


def _measured(
    state: TrainState,
    recipe: FitConfig,
    labels: LabelIndex,
    documents: int,
    held_out: pa.Table,
    how: str,
    lifts: Sequence[float],
    rate: float,
) -> tuple[Trial, Calibration]:
    """With the best of some lifts and, if the model has a linear ranker, of `WEIGHTS`."""
    model, prediction, n_labels = state.model, recipe.loop.prediction, len(labels)
    tokens, truth = (held_out[name].combine_chunks() for name in ("tokens", "labels"))
    by = computed_by(model, prediction.precision)
    cost: dict[str, Any] = {"documents": documents, "passes": state.documents / documents}
    cost["rate"] = rate
    lift_G = model.recall.lift
    whole_G = None if lift_G is None else lift_G.clone()  # of the recipe's own lift
    reached = []
    with state.averager.in_use(model):
        for lift in lifts if whole_G is not None else [0.0]:
            if lift_G is not None and whole_G is not None:
                lift_G.copy_(whole_G * (lift / recipe.model.lift))
            for weight, scores, ids in _by_weight(model, tokens, recipe):
                metrics = Metrics(labels.counts, labels.n_documents)
                metrics.update(ids, truth)
                total = metrics.result()["total"]
                trial = Trial(how, {name: float(total[name]) for name in JUDGED_BY}, lift, weight, **cost)
                reached.append((trial, (scores, ids)))
    if lift_G is not None and whole_G is not None:
        lift_G.copy_(whole_G)
    best, (scores, ids) = max(reached, key=lambda each: each[0].score)
    return best, Calibration.of(scores, ids, find_hits(ids, truth, n_labels), labels.counts, by)


def _by_weight(
    model: LightXML, tokens: pa.ListArray, recipe: FitConfig
) -> Iterator[tuple[float, npt.NDArray[np.float32], IntArray]]:
    """Scores and label ids (float32 and int64 [D, DEPTH]) with each of `WEIGHTS`; with 0 where there is no linear ranker.

    A transformer reads the documents once for all weights.
    """
    ranker, model.linear = model.linear, None
    scores, ids = predict(model, tokens, max(DEPTH, recipe.linear.candidates), recipe.loop.prediction)
    model.linear = ranker
    if ranker is None:
        yield 0.0, scores[:, :DEPTH], ids[:, :DEPTH]
        return
    z_DC = margins(model, tokens, ids[:, : ranker.candidates])
    for weight in WEIGHTS:
        ranker.weight = weight
        with_words, in_order = ranker.reordered(torch.from_numpy(scores), torch.from_numpy(ids), z_DC)
        yield weight, with_words[:, :DEPTH].numpy(), in_order[:, :DEPTH].numpy()
