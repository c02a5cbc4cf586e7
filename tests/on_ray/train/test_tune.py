"""The tuning job: trials on held-out training documents, the best recipe trained on all, nothing done twice."""

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pytest
from followers import Recorder

from xmc_ray import command
from xmc_ray.bundle.content import load_bundle
from xmc_ray.classifier import XMCClassifier
from xmc_ray.data.documents import DocumentsConfig
from xmc_ray.data.labels import LabelIndex
from xmc_ray.data.profile import Profile
from xmc_ray.errors import ConfigError, DataError, ModelError
from xmc_ray.on_ray.train import job, trials, tune
from xmc_ray.on_ray.train.config import TrainConfig
from xmc_ray.on_ray.train.tune import JUDGED_BY, TuneConfig
from xmc_ray.training import tuning
from xmc_ray.training.fit import FitConfig
from xmc_ray.training.loop import LoopConfig
from xmc_ray.training.tuning import FINISHED, Trial


def tuned(fruit: Path, encoder: Path, output: Path, *further: str) -> list[str]:
    settings = [f"--documents.uri={fruit}/train.parquet", f"--encoder={encoder}", f"--output={output}", *further]
    return tune.run(command.parse(TuneConfig, settings))


@pytest.fixture(scope="module")
def finished(ray_session: None, fruit: Path, tiny_encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("tuned")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tuning, "ENOUGH", 20)  # of the few documents there are
        own = '--callbacks=["followers:Recorder"]'
        tuned(fruit, tiny_encoder, output, "--minutes=2", "--search=0.5", "--validation.share=0.2", own)
    return output


def test_every_recipe_is_tried_on_held_out_documents_and_the_best_is_trained(finished: Path) -> None:
    trials = {path.stem: json.loads(path.read_text()) for path in (finished / "trials").glob("*.json")}
    table = (finished / "tune.md").read_text()
    assert {"transformer", "words"} <= set(trials)
    assert all(f"| {name.replace('-', ' ')} |" in table for name in trials)
    measured = [trial for trial in trials.values() if trial["figures"]]
    assert measured and all(0 <= trial["figures"][name] <= 1 for trial in measured for name in JUDGED_BY)
    best = next(trial for name, trial in trials.items() if f"**{name.replace('-', ' ')}** is trained" in table)
    most = max(trial["documents"] for trial in measured)  # a second round decides, if there has been time for one
    assert sum(best["figures"].values()) == max(
        sum(trial["figures"].values()) for trial in measured if trial["documents"] == most
    )

    recipe = command.parse(FitConfig, [f"--config={finished}/recipe.toml"])
    began = command.parse(TrainConfig, [f"--config={finished}/run/run.toml"])
    assert {name: getattr(began, name) for name in vars(recipe)} == vars(recipe)
    assert recipe.model.lift == best["lift"]
    assert began.validation.share == 0 and began.calibration == f"{finished}/calibration.parquet"
    bundle = load_bundle(f"{finished}/run/bundle")
    assert bundle.metrics["documents"] == {"train": 240}
    assert bundle.metrics["calibration"]["taken_from"] == began.calibration
    assert bundle.calibration is not None and len(bundle.calibration) == bundle.metrics["calibration"]["predictions"] > 100
    assert str(bundle.calibration.arithmetic).startswith("cpu ")
    assert not (finished / "tokens").exists()


def test_callbacks_follow_the_training_of_the_best_recipe_alone(finished: Path) -> None:
    """In the driver, and only there: what follows a trial would be told of other settings."""
    own = [run for (run,) in Recorder.of("on_train_start") if run.output == f"{finished}/run"]
    assert len(own) == 1 and own[0].name == f"{finished.name}/run" and own[0].settings["callbacks"] == ["followers:Recorder"]
    assert json.loads((finished / "run" / "callbacks.json").read_text()) == {"run": own[0].id}
    assert [trained.bundle for (trained,) in Recorder.of("on_train_end")].count(f"{finished}/run/bundle") == 1
    assert not [*finished.glob("trials/**/callbacks.json")]


def test_a_tracker_that_is_not_installed_is_told_before_any_trial(
    fruit: Path, tiny_encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match="wandb is missing"):
        tuned(fruit, tiny_encoder, tmp_path / "out", '--callbacks=["wandb"]')
    assert not (tmp_path / "out").exists()


def test_what_is_finished_is_not_done_again(
    finished: Path, fruit: Path, tiny_encoder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*arguments: Any) -> None:
        pytest.fail("tried again")

    monkeypatch.setattr(tune, "choose", never)
    monkeypatch.setattr(job, "_make", never)
    same = "--minutes=2", "--search=0.5", "--validation.share=0.2"
    assert tuned(fruit, tiny_encoder, finished, *same) == [f"{finished}/run/bundle"]
    with pytest.raises(ConfigError, match=r"trials with other settings.*search = 0\.5 instead of None"):
        tuned(fruit, tiny_encoder, finished, "--minutes=2", "--validation.share=0.2")


def test_a_member_of_an_ensemble_is_trained_in_minutes_that_are_left(
    finished: Path, fruit: Path, tiny_encoder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundles = tuned(fruit, tiny_encoder, finished, "--minutes=2", "--search=0.5", "--validation.share=0.2", "--members=2")
    assert bundles == [f"{finished}/run/bundle", f"{finished}/run-2/bundle"]
    assert f"an ensemble of 2: --bundle '{json.dumps(bundles)}'" in capsys.readouterr().out
    first, second = map(load_bundle, bundles)
    assert first.labels.fingerprint == second.labels.fingerprint and second.metrics["documents"] == {"train": 240}
    rows = [bundle.model.state_dict() for bundle in (first, second)]
    assert any(not rows[0][name].equal(rows[1][name]) for name in rows[0])
    tags = XMCClassifier.load(bundles, device="cpu").predict(["a red plum number 7"], k=3)
    assert {label for label, _ in tags[0]} == {"fruit", "red", "plum"}


@pytest.mark.parametrize(("seconds", "trained"), [(20.0, 3), (25.0, 2), (31.0, 1), (90.0, 1)])
def test_no_member_is_begun_that_the_minutes_would_cut_short(
    seconds: float, trained: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of one minute; a model takes so many seconds for all its passes."""
    began: list[TrainConfig] = []

    def run(config: TrainConfig) -> str:
        began.append(config)
        Path(config.output).mkdir()
        (Path(config.output) / "metrics.jsonl").write_text(json.dumps({"step": 9, "loss": 1.0, "seconds": seconds}))
        return f"{config.output}/bundle"

    monkeypatch.setattr(tune.job, "run", run)
    documents = DocumentsConfig(uri="x")
    training = TrainConfig(documents=documents, output=f"{tmp_path}/run", loop=LoopConfig(minutes=1.0, seed=5))
    bundles = [*tune._members(TuneConfig(documents=documents, output=str(tmp_path), members=3), training)]
    names = ["run", "run-2", "run-3"][:trained]
    assert bundles == [f"{tmp_path}/{name}/bundle" for name in names]
    assert [(config.loop.seed, config.groups.seed) for config in began] == [(5, 0), (6, 1), (7, 2)][:trained]
    assert ("no minutes are left for a member" in capsys.readouterr().out) == (trained < 3)


def test_trials_of_other_documents_or_verdicts_are_not_gone_on_with(
    fruit: Path, tiny_encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a training is not: they were judged by another truth."""
    shutil.copy(fruit / "train.parquet", tmp_path / "train.parquet")
    (tmp_path / "verdicts.csv").write_text("id,label,verdict\ntrain-0,fruit,accepted\n")
    monkeypatch.setattr(tune, "choose", lambda config: config.basis)
    monkeypatch.setattr(tune.job, "run", lambda config: "a bundle")
    monkeypatch.setattr(tune, "connect", lambda: None)
    monkeypatch.setattr(tune, "check_room", lambda *_: None)
    settings = "--minutes=2", f"--feedback.uri={tmp_path}/verdicts.csv"
    tuned(tmp_path, tiny_encoder, tmp_path / "out", *settings)
    tuned(tmp_path, tiny_encoder, tmp_path / "out", *settings)
    (tmp_path / "verdicts.csv").write_text("id,label,verdict\ntrain-0,fruit,rejected\n")
    with pytest.raises(ConfigError, match=f"other feedback than in the trials in {tmp_path}/out: {tmp_path}/verdicts"):
        tuned(tmp_path, tiny_encoder, tmp_path / "out", *settings)
    (tmp_path / "verdicts.csv").write_text("id,label,verdict\ntrain-0,fruit,accepted\n")
    tuned(tmp_path, tiny_encoder, tmp_path / "out", *settings)
    (tmp_path / "train.parquet").write_bytes((fruit / "test.parquet").read_bytes())
    with pytest.raises(ConfigError, match="other documents than in the trials"):
        tuned(tmp_path, tiny_encoder, tmp_path / "out", *settings)


def test_a_second_round_that_fails_leaves_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = Profile.of([pa.array([[1, 2]])], [pa.array([[0]])], LabelIndex.count([pa.array([["a"]])]))
    recipes = [tune.Candidate(name, "", FitConfig(loop=LoopConfig(epochs=n))) for n, name in enumerate(("words", "others"), 1)]
    reached = [Trial(FINISHED, dict.fromkeys(JUDGED_BY, score), documents=100, passes=1.0, rate=100.0) for score in (0.5, 0.6)]
    judged = SimpleNamespace(counts={"train": 5_000, "validation": 500})
    rounds = iter([reached, [Trial("failed: out of luck")] * 3])
    for name, value in {
        "prepare": lambda _: SimpleNamespace(tokenizer=None, labels=["a"], held_out=lambda *_: judged),
        "profile": lambda _: data,
        "ladder": lambda *_: recipes,
        "slots": lambda _: 2,
        "tried": lambda prepared, workers, round_, folder: next(rounds)[: len(round_.recipes)],
    }.items():
        monkeypatch.setattr(tune, name, value)
    config = TuneConfig(documents=DocumentsConfig(uri="x"), output=str(tmp_path), minutes=20.0)
    assert tune.choose(config).loop.epochs == 2
    table = (tmp_path / "tune.md").read_text()
    assert "**others** is trained" in table and table.count("out of luck") >= 2 and next(rounds, None) is None
    workers = replace(config, workers=replace(config.workers, count=2))
    with pytest.raises(ConfigError, match="more workers than label groups; found 2 workers, 1 groups of the recipe 'words'"):
        tune.choose(workers)


def test_trials_on_record_are_not_repeated(
    finished: Path, fruit: Path, tiny_encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A job that was killed after its trials, or during them, goes on with those that are missing."""
    (tmp_path / "trials").mkdir()
    (tmp_path / "tune.toml").write_text((finished / "tune.toml").read_text())
    records = sorted((finished / "trials").glob("*.json"))
    for record in records:
        trial = json.loads(record.read_text()) | {"figures": dict.fromkeys(JUDGED_BY, 0.1), "lift": 0.5}
        (tmp_path / "trials" / record.name).write_text(json.dumps(trial))
    words = tmp_path / "trials" / "words.json"
    words.write_text(json.dumps(json.loads(words.read_text()) | {"figures": dict.fromkeys(JUDGED_BY, 0.9)}))
    monkeypatch.setattr(tune.job, "run", lambda config: config)
    monkeypatch.setattr(tuning, "ENOUGH", 20)
    monkeypatch.setattr(tune.Budget, "second_round", lambda *_: None)  # other figures would want other trials
    monkeypatch.setattr(trials.ray.tune, "Tuner", lambda *_, **__: pytest.fail("tried again"))
    trained: Any = tuned(fruit, tiny_encoder, tmp_path, "--minutes=2", "--search=0.5", "--validation.share=0.2")
    (config,) = trained
    assert config.encoder.layers == 0 and config.model.lift == 0.5


@pytest.mark.usefixtures("ray_session")
def test_without_time_or_held_out_documents_the_rule_decides_and_says_so(
    fruit: Path, tiny_encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tune.job, "run", lambda config: config)
    tuned(fruit, tiny_encoder, tmp_path / "short", "--minutes=0.1")
    assert "no trials: 0.1 minutes leave" in capsys.readouterr().out.lower()
    tuned(fruit, tiny_encoder, tmp_path / "few", "--minutes=9", "--validation.share=0.01")
    assert "held-out documents decide nothing" in capsys.readouterr().out
    assert "not tried" in (tmp_path / "few" / "tune.md").read_text()


def test_where_all_documents_would_be_held_out_nothing_is_tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where all have the same words."""

    def held_out(*_: Any) -> Any:
        raise DataError("no document is left to train on")

    data = Profile.of([pa.array([[1, 2]])], [pa.array([[0]])], LabelIndex.count([pa.array([["a"]])]))
    recipes = [tune.Candidate("words", "", FitConfig()), tune.Candidate("others", "", FitConfig())]
    for name, value in {
        "prepare": lambda _: SimpleNamespace(tokenizer=None, held_out=held_out),
        "profile": lambda _: data,
        "ladder": lambda *_: recipes,
        "slots": lambda _: 2,
    }.items():
        monkeypatch.setattr(tune, name, value)
    monkeypatch.setattr(tune, "tried", lambda *_: pytest.fail("tried"))
    config = TuneConfig(documents=DocumentsConfig(uri="x"), output=str(tmp_path), minutes=20.0)
    assert tune.choose(config) == FitConfig(loop=LoopConfig(minutes=20.0))
    assert "No trials: no document is left to train on." in (tmp_path / "tune.md").read_text()


def test_a_second_round_on_record_is_not_repeated(
    finished: Path, fruit: Path, tiny_encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(finished / "trials", tmp_path / "trials")
    shutil.copy(finished / "tune.toml", tmp_path)
    monkeypatch.setattr(tune.job, "run", lambda config: config)
    monkeypatch.setattr(tuning, "ENOUGH", 20)
    monkeypatch.setattr(trials.ray.tune, "Tuner", lambda *_, **__: pytest.fail("tried again"))
    tuned(fruit, tiny_encoder, tmp_path, "--minutes=2", "--search=0.5", "--validation.share=0.2")
    assert (tmp_path / "tune.md").read_text() == (finished / "tune.md").read_text()


@pytest.mark.usefixtures("ray_session")
def test_trials_that_all_fail_end_the_job_and_leave_no_record(
    fruit: Path, tiny_encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether all fail at once, or the last ones after a job that was killed."""
    monkeypatch.setattr(tuning, "ENOUGH", 20)
    monkeypatch.setattr(tuning, "_SHORTEST", 0)
    made: list[Any] = []
    monkeypatch.setattr(trials.ray.tune, "Tuner", lambda *_, **given: made.append(given) or Failing(given))
    settings = "--minutes=2", "--validation.share=0.2"
    with pytest.raises(ModelError, match="out of luck"):
        tuned(fruit, tiny_encoder, tmp_path, *settings)
    assert not (tmp_path / "trials").exists() and not (tmp_path / "recipe.toml").exists()
    (tmp_path / "trials").mkdir()
    (tmp_path / "trials" / "words.json").write_text(json.dumps({"state": "failed: out of luck"}))
    with pytest.raises(ModelError, match="out of luck"):
        tuned(fruit, tiny_encoder, tmp_path, *settings)
    numbers = [given["param_space"]["number"]["grid_search"] for given in made]
    assert len(numbers[1]) == len(numbers[0]) - 1
    assert [path.name for path in (tmp_path / "trials").iterdir()] == ["words.json"]


class Failing:
    """A tuner whose trials fail."""

    def __init__(self, given: Any) -> None:
        self.numbers = given["param_space"]["number"]["grid_search"]

    def fit(self) -> Any:
        error = ModelError("out of luck")
        results = [SimpleNamespace(config={"number": number}, metrics={}, error=error) for number in self.numbers]
        return Results(results)


class Results(list[Any]):
    """As Ray Tune returns them."""

    @property
    def errors(self) -> list[Exception]:
        return [result.error for result in self]


def test_what_does_not_fit_is_told_before_documents_are_read(
    fruit: Path, tiny_encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tune, "choose", lambda config: pytest.fail("chosen"))
    with pytest.raises(ConfigError, match=r"encoder"):
        tuned(fruit, tiny_encoder, tiny_encoder / "output")
    with pytest.raises(ModelError, match="tokenizer not found"):
        tuned(fruit, tmp_path / "nowhere", tmp_path / "output")
    assert not (tmp_path / "output").exists()


def test_a_folder_of_others_is_refused(fruit: Path, tiny_encoder: Path, tmp_path: Path) -> None:
    (tmp_path / "theirs.txt").write_text("")
    with pytest.raises(ConfigError, match="the folder is not empty"):
        tuned(fruit, tiny_encoder, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["theirs.txt"]


@pytest.mark.usefixtures("ray_session")
def test_train_takes_the_recipe_of_the_rule_and_resumes_with_it(
    fruit: Path, tiny_encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = [f"--documents.uri={fruit}/train.parquet", f"--encoder.name={tiny_encoder}", f"--output={tmp_path}/run"]
    config = command.parse(TrainConfig, [*settings, "--recipe=auto"])

    def stop(*arguments: Any) -> None:
        raise ModelError("stopped")

    monkeypatch.setattr(job, "_train", stop)
    with pytest.raises(ModelError, match="stopped"):
        job.run(config)
    assert "recipe: " in capsys.readouterr().out
    begun = (tmp_path / "run" / "run.toml").read_text()
    assert "width = 512" in begun and 'recipe = "auto"' in begun
    monkeypatch.setattr(job, "ladder", stop)
    monkeypatch.setattr(job, "_train", lambda *_: None)
    with pytest.raises(ModelError, match="no checkpoint"):
        job.run(config)
    assert (tmp_path / "run" / "run.toml").read_text() == begun
    with pytest.raises(ConfigError, match=r"an automatic recipe decides loop\.epochs"):
        job.run(command.parse(TrainConfig, [*settings, "--recipe=auto", "--loop.epochs=3"]))
