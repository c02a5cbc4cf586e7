"""Trials of recipes without Ray: what they get, what they are judged by, and what calibrates the model that is trained then."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from fruit import COLOURS, KINDS
from toys import documents, toy_model

from xmc_ray.data.groups import LabelGroups
from xmc_ray.data.labels import LabelIndex
from xmc_ray.data.split import ValidationConfig
from xmc_ray.metrics.calibration import DEPTH
from xmc_ray.model.encoder import EncoderConfig
from xmc_ray.model.lexical import LexicalConfig
from xmc_ray.model.lightxml import ModelConfig
from xmc_ray.model.linear import LinearConfig
from xmc_ray.model.predict import PredictConfig, predict
from xmc_ray.model.svm import train_linear
from xmc_ray.model.tokenizer import Tokenizer
from xmc_ray.training import tuning
from xmc_ray.training.fit import FitConfig
from xmc_ray.training.loop import LoopConfig, Step
from xmc_ray.training.recipe import Candidate
from xmc_ray.training.tuning import (
    FINISHED,
    JUDGED_BY,
    LIFTS,
    SEARCH,
    WEIGHTS,
    Budget,
    Trial,
    held_out_for_trials,
    run_trial,
    search_share,
    timed,
    too_few,
)


def tried(tiny_encoder: Path, lift: float, candidates: int = 0) -> list[Trial]:
    """The trials of words alone on documents of fruit, the calibration's hits checked on the way."""
    rows = [["fruit", colour, kind] for colour in COLOURS for kind in KINDS] * 8
    tokenizer, lists = Tokenizer.load(tiny_encoder, 16), pa.array(rows)
    index = LabelIndex.count([lists])
    tokens = tokenizer.encode(pa.array([f"a {colour} {kind}" for _, colour, kind in rows]))[0]
    table = pa.table({"tokens": tokens, "labels": index.encode(lists)})
    config = FitConfig(
        encoder=EncoderConfig(name=str(tiny_encoder), layers=0),
        lexical=LexicalConfig(width=8, columns=64, rarest=1),
        model=ModelConfig(lift=lift, dropout=0.1),
        linear=LinearConfig(candidates=candidates),
        loop=LoopConfig(epochs=4, batch_size=8),
    )
    groups = LabelGroups(np.arange(len(index)))
    trials = []
    for trial, calibration in run_trial(
        config, tokenizer, index, groups, table.slice(24).combine_chunks(), table.slice(0, 24).combine_chunks(), "cpu"
    ):
        trials.append(trial)
        first = calibration.hit_N.reshape(24, -1)[:, 0]  # all labels of each held-out document, best first
        assert first.mean() == trial.figures["P@1"] and calibration.arithmetic == "cpu float32"
    return trials


@pytest.mark.parametrize(("lift", "candidates"), [(0.0, 0), (1.0, 0), (1.0, 5)])
def test_a_trial_reports_its_quarters_and_ends_with_the_best_lift(lift: float, candidates: int, tiny_encoder: Path) -> None:
    trials = tried(tiny_encoder, lift, candidates)
    assert [trial.state for trial in trials] == ["unfinished"] * 3 + [FINISHED]
    assert all(set(trial.figures) == set(JUDGED_BY) for trial in trials)
    assert {trial.lift for trial in trials[:-1]} == {lift}
    assert trials[-1].lift in (LIFTS if lift else [0.0]) and trials[-1].weight in (WEIGHTS if candidates else [0.0])
    assert all(one.passes < other.passes for one, other in pairwise(trials)) and trials[-1].passes == 4.0
    assert trials[-1].documents == 72 and trials[-1].figures["P@1"] > 0.9
    assert all(0 < trial.rate < 1e6 for trial in trials)


def test_the_rate_of_a_trial_counts_no_document_of_a_step_whose_end_it_has_not_seen(
    tiny_encoder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The clock is read when a step begins: one of a few large steps would be too fast by one of them."""

    def four_steps(*_: Any) -> Iterator[Step]:
        for number in range(1, 5):
            yield Step(number, 0, number / 5, 0.0, 0.0, 8 * number, 0, 0, number - 1.0, 0.0)

    monkeypatch.setattr(tuning, "train", four_steps)
    *_, last = tried(tiny_encoder, 0.0, 0)
    assert last.rate == 8.0


def test_scores_of_each_weight_are_those_of_a_model_with_it() -> None:
    model, table, recipe = (
        toy_model(lexical=True).eval(),
        documents(),
        FitConfig(lexical=LexicalConfig(width=8), linear=LinearConfig(candidates=4)),
    )
    tokens = table["tokens"].combine_chunks()
    model.linear = train_linear(model, table, recipe.linear, PredictConfig())
    for weight, scores, ids in tuning._by_weight(model, tokens, recipe):
        assert model.linear is not None
        model.linear.weight = weight
        expected, expected_ids = predict(model, tokens, DEPTH, PredictConfig())
        np.testing.assert_array_equal(ids, expected_ids)
        np.testing.assert_allclose(scores, expected, rtol=1e-5)


def test_a_recipe_is_settled_by_its_trial() -> None:
    linear = LinearConfig(candidates=25)
    recipe = FitConfig(lexical=LexicalConfig(width=8), model=ModelConfig(lift=1.0), linear=linear)
    assert Trial(FINISHED, lift=0.5, weight=2.0).settled(recipe).linear == LinearConfig(candidates=25, weight=2.0)
    without = Trial(FINISHED, lift=0.5).settled(recipe)
    assert without.linear.candidates == 0 and without.model.lift == 0.5
    assert Trial("stopped, behind the others", {"P@1": 0.5}).settled(recipe) == recipe, "it has chosen nothing"


def test_a_trial_makes_as_many_passes_over_its_part_as_the_training_over_everything() -> None:
    budget = Budget(minutes=20, recipes=4, slots=2)
    assert budget.of_training == 12 and budget.of_trial == pytest.approx(4)
    passes = budget.of_trial / budget.part(60_000)  # of one core
    assert budget.of_training * budget.slots / 60_000 == pytest.approx(passes)
    assert Budget(minutes=20, recipes=1, search=0.9).part(100) == 100 and Budget(minutes=1, recipes=4).part(3) == 1


def test_many_documents_leave_trials_less_time() -> None:
    """The minutes are too few for all passes over them, and each that a trial takes is missing there."""
    assert search_share(300_000) == SEARCH == 2 * search_share(300_001)


def test_what_the_first_round_has_left_is_a_second_one() -> None:
    recipes = [
        Candidate(name, "", FitConfig(loop=LoopConfig(epochs=epochs))) for name, epochs in [("a", 4), ("b", 8), ("c", 4)]
    ]
    trials = [
        Trial(FINISHED, {"P@1": score}, documents=1_000, passes=float(recipe.config.loop.epochs), rate=rate)
        for recipe, score, rate in zip(recipes, [0.5, 0.6, 0.4], [100.0, 200.0, 100.0], strict=True)
    ]
    budget = Budget(minutes=20, recipes=3, slots=2)
    assert budget.of_trial == 4  # two of them one after the other
    second = budget.second_round(recipes, trials, 13_000)
    assert second is not None and [recipe.name for recipe in second.recipes] == ["b, again", "a, again"]
    assert [recipe.config.loop.epochs for recipe in second.recipes] == [8, 4]
    assert second.minutes == pytest.approx(8 - 1)  # three trials took 40 seconds each, two at a time
    assert second.documents == 60 * 7 * 200 / 8
    three = budget.second_round(recipes, trials, 2_000)  # and there is time for more passes over all of them
    assert three is not None and three.recipes[2].name == "b, twice the passes" and three.documents == 2_000
    assert three.recipes[2].config.loop.epochs == 16 and three.minutes == pytest.approx(7 / 2)
    assert budget.second_round(recipes, trials, 1_000) is None, "it would be the first round again"
    assert Budget(2, 3, 2).second_round(recipes, trials, 13_000) is None, "no time is left"
    assert budget.second_round(recipes, [Trial("failed: memory")] * 3, 13_000) is None


def test_why_nothing_is_tried() -> None:
    assert Budget(20, 4).too_short() is None
    assert Budget(0.1, 4).too_short() == "No trials: 0.1 minutes leave 1 seconds for each of 4 recipes."
    assert too_few(200) is None and too_few(6) == "No trials: 6 held-out documents decide nothing."


def test_what_is_held_out_for_trials() -> None:
    validation = ValidationConfig(series="seller")
    assert held_out_for_trials(validation, 1_000) == replace(validation, share=0.2, calibrate=False)
    assert held_out_for_trials(validation, 1_000_000).share == 0.02
    assert held_out_for_trials(validation, 100_000).share == 0.04


def test_a_trial_without_any_figures_loses() -> None:
    assert Trial("failed: out of memory").score < Trial("finished", dict.fromkeys(JUDGED_BY, 0.0)).score
    assert timed(FitConfig(), 3.0) == FitConfig(loop=LoopConfig(minutes=3.0))
