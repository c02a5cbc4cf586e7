"""Fitting in one process: recipes that are chosen, feedback, callbacks, and what is warned of."""

import json
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from followers import Raises, Recorder
from fruit import fit_config, problem

from xmc_ray import (
    ConfigError,
    DataError,
    EncoderConfig,
    FeedbackConfig,
    FitConfig,
    LexicalConfig,
    LoopConfig,
    ModelError,
    OptimConfig,
    TextConfig,
    XMCClassifier,
)
from xmc_ray.data.feedback import Feedback
from xmc_ray.model.linear import LinearConfig
from xmc_ray.training import tuning
from xmc_ray.training.loop import Step


def test_a_loss_that_ends_above_its_start_is_warned_of(tiny_encoder: Path) -> None:
    """Numbers: a run that learns nothing says so loudly; one that learns and settles does not."""
    plain = fit_config(tiny_encoder, 1)
    wild = replace(plain, optim=OptimConfig(rows_lr=120.0, warmup=0, decay=False), loop=replace(plain.loop, epochs=1))
    with pytest.warns(
        UserWarning, match=r"no better than an untrained one: .* went from [\d.]+ to \d+.*; lower optim\.rows_lr"
    ):
        XMCClassifier.fit(*problem(64, seed=0), config=wild)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        texts, labels = problem(64, seed=0)
        own = [row[1:] for row in labels]  # a label that all documents have is warned of as well
        XMCClassifier.fit(texts, own, config=replace(plain, loop=replace(plain.loop, epochs=24)))


# --- automatic recipes


def encoder_alone(tiny_encoder: Path, **loop: int) -> FitConfig:
    """What a recipe leaves to decide."""
    return FitConfig(encoder=EncoderConfig(name=str(tiny_encoder)), loop=LoopConfig(**loop))  # type: ignore[arg-type]


@pytest.fixture
def brief(monkeypatch: pytest.MonkeyPatch) -> None:
    """Recipes of a few steps, in trials of seconds, judged by few documents."""
    monkeypatch.setattr(tuning, "ENOUGH", 20)
    monkeypatch.setattr(tuning, "_SHORTEST", 0.0)
    monkeypatch.setattr("xmc_ray.training.recipe._STEPS", {True: 200, False: 200})
    monkeypatch.setattr("xmc_ray.training.recipe._PASSES", {"words": (4, 8), "transformer": (2, 2)})


@pytest.mark.usefixtures("brief")
@pytest.mark.filterwarnings("ignore:training has not settled")
def test_minutes_try_recipes_train_the_best_on_everything_and_calibrate_it(tiny_encoder: Path) -> None:
    texts, labels = problem(240, seed=0)
    texts = [f"{text} number {number}" for number, text in enumerate(texts)]
    fitted = XMCClassifier.fit([*texts, "?"], [*labels, []], config=encoder_alone(tiny_encoder), minutes=1, device="cpu")
    bundle = fitted.bundle
    trials = bundle.metrics["trials"]
    assert {"transformer", "words", "words, again"} <= set(trials) and {trial["state"] for trial in trials.values()} == {
        "finished"
    }
    second = {name: trial for name, trial in trials.items() if name.endswith(("again", "twice the passes"))}
    best = max(second.values(), key=lambda trial: sum(trial["figures"].values()))
    assert trials[bundle.metrics["recipe"]] == best and (bundle.model.config.lift or 0) == best["lift"]
    held_out = len(bundle.calibration) // 8  # all labels of each  # type: ignore[arg-type]
    assert 20 <= held_out < 80 and best["documents"] <= 240 - held_out
    (tags,) = fitted.predict(["a red plum number 7"], k=3)
    assert {label for label, _ in tags} == {"fruit", "red", "plum"}


@pytest.mark.filterwarnings("ignore:training has not settled")
def test_without_a_config_the_rule_decides(
    tiny_encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, brief: None
) -> None:
    (tmp_path / EncoderConfig().name).symlink_to(tiny_encoder)
    monkeypatch.chdir(tmp_path)
    fitted = XMCClassifier.fit(*problem(64, seed=0), device="cpu")
    assert fitted.bundle.metrics == {"recipe": "transformer", "trials": {}} and fitted.bundle.calibration is None


def test_too_few_minutes_or_documents_are_said_and_the_rule_decides(
    tiny_encoder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tuning, "run_trial", lambda *_: pytest.fail("tried"))
    free, steps = encoder_alone(tiny_encoder), list[Step]()
    with pytest.warns(UserWarning, match=r"No trials: 0\.02 minutes leave 0 seconds for each of \d recipes"):
        XMCClassifier.fit(*problem(64, seed=0), config=free, minutes=0.02, on_step=steps.append, device="cpu")
    assert steps[-1].seconds < 10
    with pytest.warns(UserWarning, match=r"No trials: \d+ held-out documents decide nothing"):
        XMCClassifier.fit(*problem(30, seed=0), config=free, minutes=30, device="cpu")


def test_what_a_recipe_decides_and_minutes_that_are_none(tiny_encoder: Path) -> None:
    documents = problem(8, seed=0)
    with pytest.raises(ConfigError, match=r"an automatic recipe decides loop\.epochs; found 3"):
        XMCClassifier.fit(*documents, config=encoder_alone(tiny_encoder, epochs=3), minutes=1)
    for minutes in (0, -1, float("nan"), float("inf"), True, "5"):
        with pytest.raises(ConfigError, match="invalid value of minutes"):
            XMCClassifier.fit(*documents, config=encoder_alone(tiny_encoder), minutes=minutes)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"the minutes are given twice; found minutes and loop\.minutes = 2"):
        XMCClassifier.fit(*documents, config=encoder_alone(tiny_encoder, minutes=2), minutes=1)


def test_the_error_of_trials_that_all_fail(tiny_encoder: Path, brief: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> Iterator[None]:
        raise ModelError("the loss is not finite")
        yield

    monkeypatch.setattr(tuning, "run_trial", fail)
    texts, labels = problem(240, seed=0)
    with pytest.raises(ModelError, match="the loss is not finite"):
        XMCClassifier.fit(
            [f"{text} {number}" for number, text in enumerate(texts)], labels, config=encoder_alone(tiny_encoder), minutes=1
        )


def test_documents_that_are_cut_off_or_foreign_are_warned_of(tiny_encoder: Path) -> None:
    short = replace(fit_config(tiny_encoder, 1), text=TextConfig(max_tokens=5))
    with pytest.warns(UserWarning, match="are longer than 5 tokens"):
        XMCClassifier.fit(["a red apple and a pear"] * 8, [["pear"]] * 8, config=short, device="cpu")
    with pytest.warns(UserWarning, match="hardly knows the language of 100% of the documents"):
        XMCClassifier.fit(["красное яблоко"] * 8, [["яблоко"]] * 8, config=fit_config(tiny_encoder, 1), device="cpu")
    brief = replace(fit_config(tiny_encoder, 1), loop=LoopConfig(epochs=4, batch_size=8))
    with pytest.warns(UserWarning, match="training has not settled"):
        XMCClassifier.fit(*problem(64, seed=0), config=brief, device="cpu")


@pytest.mark.parametrize(
    ("documents", "told"),
    [
        ((["a red apple", "a pear"] * 20, [["x"]] * 40), "every document has x: nothing"),
        (([f"a pear {n}" for n in range(30)], [["pear", f"{n % 3}"] for n in range(30)]), "every document has pear: nothing"),
        ((["a red apple"], [["fruit"]]), "no better than an untrained one"),
        (
            ([f"a pear {n}" for n in range(30)], [[f"{n % 3}"] for n in range(30)]),
            "No trials: . held-out documents decide nothing",
        ),
        ((["a pear 13"] * 300, [["pear"], ["13"]] * 150), "No trials: 0 held-out documents decide nothing"),  # held out, all
    ],
    ids=["one label", "a label everywhere", "one document", "thirty documents", "one text"],
)
def test_documents_of_which_little_can_be_learnt(
    documents: tuple[list[str], list[list[str]]], told: str, tiny_encoder: Path, brief: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tuning, "ENOUGH", 200)
    with pytest.warns(UserWarning, match=told):
        fitted = XMCClassifier.fit(*documents, config=encoder_alone(tiny_encoder), minutes=1, device="cpu")
    (((label, score),),) = fitted.predict(documents[0][:1], k=1)
    assert label in {label for row in documents[1] for label in row} and 0 < score < 1


def words_alone(tiny_encoder: Path, max_size: int, candidates: int = 0) -> FitConfig:
    """A model of words, so that a training takes a second."""
    plain = fit_config(tiny_encoder, max_size)
    lexical, linear = LexicalConfig(width=16, columns=4096), LinearConfig(candidates=candidates)
    encoder = replace(plain.encoder, layers=0)
    return replace(plain, encoder=encoder, lexical=lexical, linear=linear, loop=LoopConfig(epochs=4, batch_size=8))


def scores_of(classifier: XMCClassifier, text: str) -> dict[str, float]:
    return dict(classifier.predict([text], k=8)[0])


@pytest.mark.parametrize(("max_size", "candidates"), [(1, 0), (3, 0), (1, 4), (3, 4)])
def test_what_editors_reject_falls_and_what_they_accept_rises(
    tiny_encoder: Path, tmp_path: Path, max_size: int, candidates: int
) -> None:
    """Green pears are labelled as red ones; editors know better of a third of them, and count the more, the more they weigh."""
    texts, right = problem(150, seed=0)
    wrong = [["red" if label == "green" else label for label in labels] for labels in right]
    index = [row for row, labels in enumerate(right) if "green" in labels]
    verdicts = [(row, label, word) for row in index[::3] for label, word in (("red", "rejected"), ("green", "accepted"))]
    ids, labels, words = zip(*verdicts, (999, "red", "accepted"), (0, "fruit", None), strict=True)
    pq.write_table(pa.table({"id": ids, "label": labels, "verdict": words}), tmp_path / "feedback.parquet")
    wrong[0] = [*wrong[0], "green"]  # else the label would be unknown
    settings, scores = words_alone(tiny_encoder, max_size, candidates), {}
    for weight in (None, 1.0, 8.0):
        judging = settings
        if weight is not None:
            judging = replace(settings, feedback=FeedbackConfig(uri=str(tmp_path / "feedback.parquet"), weight=weight))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            classifier = XMCClassifier.fit(texts, wrong, config=judging, ids=range(150))
        scores[weight] = scores_of(classifier, "a green pear")
        said = "left out: 1 incomplete rows, 1 of unknown documents"
        assert sum(said in str(warning.message) for warning in caught) == (weight is not None)
    assert scores[None]["red"] > scores[1.0]["red"] > scores[8.0]["red"]
    assert scores[None].get("green", 0) < scores[1.0]["green"] < scores[8.0]["green"]
    classifier.save(str(tmp_path / "bundle"))
    settings_of_bundle = json.loads((tmp_path / "bundle" / "config.json").read_text())
    assert settings_of_bundle["feedback"] == Feedback.read(str(tmp_path / "feedback.parquet")).fingerprint


@pytest.mark.parametrize("max_size", [1, 3])
def test_feedback_on_other_documents_changes_no_bit(tiny_encoder: Path, tmp_path: Path, max_size: int) -> None:
    texts, labels = problem(60, seed=0)
    pq.write_table(pa.table({"id": ["other"], "label": ["red"], "verdict": ["rejected"]}), tmp_path / "feedback.parquet")
    plain = words_alone(tiny_encoder, max_size, candidates=3)
    judging = replace(plain, feedback=FeedbackConfig(uri=str(tmp_path / "feedback.parquet"), weight=9))
    first = XMCClassifier.fit(texts, labels, config=plain).bundle
    with pytest.warns(UserWarning, match="0 accepted and 0 rejected labels of documents; left out: 1 of unknown documents"):
        second = XMCClassifier.fit(texts, labels, config=judging, ids=map(str, range(60))).bundle
    states = [bundle.model.state_dict() for bundle in (first, second)]
    assert states[0].keys() == states[1].keys() and all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_a_document_may_have_nothing_but_wrong_labels(tiny_encoder: Path, tmp_path: Path) -> None:
    texts, labels = problem(60, seed=0)
    labels[0] = ["red"]
    verdicts = {"id": [0, 0], "label": ["red", "red"], "verdict": ["accepted", "rejected"]}
    pq.write_table(pa.table(verdicts), tmp_path / "feedback.parquet")
    judging = replace(words_alone(tiny_encoder, 3), feedback=FeedbackConfig(uri=str(tmp_path / "feedback.parquet")))
    with pytest.warns(UserWarning, match="1 overruled by later ones"):
        bundle = XMCClassifier.fit(texts, labels, config=judging, ids=range(60)).bundle
    before = sum("red" in own for own in labels)
    assert bundle.labels.counts[bundle.labels.find("red")] == before - 1


def test_feedback_needs_an_id_for_each_text(tiny_encoder: Path, tmp_path: Path) -> None:
    texts, labels = problem(10, seed=0)
    pq.write_table(pa.table({"id": [0], "label": ["red"], "verdict": ["accepted"]}), tmp_path / "feedback.parquet")
    judging = replace(words_alone(tiny_encoder, 1), feedback=FeedbackConfig(uri=str(tmp_path / "feedback.parquet")))
    with pytest.raises(ConfigError, match="feedback needs the ids of the documents; give ids, one for each text"):
        XMCClassifier.fit(texts, labels, config=judging)
    for ids, told in ((["1"], "ids are not one for each text; found 1 ids, 10 texts"), ([*"abc", None] * 3, "10 texts")):
        with pytest.raises(DataError, match=told):
            XMCClassifier.fit(texts, labels, config=judging, ids=ids)
    for ids in ([*range(9), None], [*range(9), 0.5], [*range(9), True]):
        with pytest.raises(DataError, match="not a string: id 9; found"):
            XMCClassifier.fit(texts, labels, config=judging, ids=ids)


# -- callbacks -----------------------------------------------------------------------------------------------------------


def test_callbacks_follow_a_fit(tiny_encoder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("xmc_ray.callbacks.fit._SECONDS", 0.0)
    monkeypatch.setattr(Recorder, "calls", [])
    steps: list[Step] = []
    settings = fit_config(tiny_encoder, 3)
    XMCClassifier.fit(*problem(64, seed=0), config=settings, on_step=steps.append, callbacks=[Recorder()])
    (run,), *_ = Recorder.of("on_train_start")
    assert run.settings["loop.epochs"] == 12 and run.settings["encoder.name"] == settings.encoder.name
    logged = Recorder.of("on_log")
    assert [step for step, _ in logged] == [step.number for step in steps]
    assert logged[0][1]["loss"] == pytest.approx(steps[0].loss) and logged[-1][1]["documents_per_second"] > 0
    assert logged[9][1]["loss"] == pytest.approx(np.mean([step.loss for step in steps[:10]]))
    (trained,), *_ = Recorder.of("on_train_end")
    assert trained.bundle is None and trained.metrics["sample_loss"] < trained.metrics["untrained_loss"]
    assert [call[0] for call in Recorder.calls][-1] == "on_train_end"


def test_a_short_fit_logs_its_first_step_and_its_last(tiny_encoder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("xmc_ray.callbacks.fit._SECONDS", 1e9)
    monkeypatch.setattr(Recorder, "calls", [])
    XMCClassifier.fit(*problem(64, seed=0), config=fit_config(tiny_encoder, 3), callbacks=[Recorder()])
    assert [step for step, _ in Recorder.of("on_log")] == [1, 12 * 8]


def test_a_callback_that_raises_is_warned_of_and_the_model_is_the_same(tiny_encoder: Path) -> None:
    texts, labels = problem(64, seed=0)
    plain = XMCClassifier.fit(texts, labels, config=fit_config(tiny_encoder, 3))
    with pytest.warns(UserWarning, match="callback Raises is not called any more: on_log raised RuntimeError: no luck") as said:
        followed = XMCClassifier.fit(texts, labels, config=fit_config(tiny_encoder, 3), callbacks=[Raises()])
    assert [warning.filename for warning in said if "Raises" in str(warning.message)] == [__file__]
    assert followed.predict(texts[:5]) == plain.predict(texts[:5])


def test_callbacks_are_told_of_what_ends_a_fit(tiny_encoder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Recorder, "calls", [])

    def stop(step: Step) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        XMCClassifier.fit(*problem(64, seed=0), config=fit_config(tiny_encoder, 3), on_step=stop, callbacks=[Recorder()])
    assert [call[0] for call in Recorder.calls] == ["on_train_start", "on_exception"]
    with pytest.raises(ConfigError, match="not a callback; found the class Recorder"):
        XMCClassifier.fit(*problem(64, seed=0), config=fit_config(tiny_encoder, 3), callbacks=[Recorder])  # type: ignore[list-item]
