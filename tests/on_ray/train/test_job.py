"""Which run a folder holds: this one, to be resumed with other settings where they may change, or another."""

import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from families import changed

from xmc_ray import command
from xmc_ray.data.documents import DocumentsConfig
from xmc_ray.data.feedback import FeedbackConfig
from xmc_ray.errors import ConfigError, DataError, ModelError, UnavailableError, XmcError
from xmc_ray.exits import exit_code
from xmc_ray.model.encoder import EncoderConfig
from xmc_ray.model.lexical import LexicalConfig
from xmc_ray.on_ray.session import own_errors
from xmc_ray.on_ray.train import job
from xmc_ray.on_ray.train.config import TrainConfig, WorkersConfig
from xmc_ray.on_ray.train.follow import Follower
from xmc_ray.on_ray.train.job import _is_finished, run
from xmc_ray.training.checkpoint import CheckpointsConfig
from xmc_ray.training.loop import LoopConfig


@pytest.fixture
def config(tmp_path: Path) -> TrainConfig:
    return TrainConfig(documents=DocumentsConfig(uri="x"), output=str(tmp_path))


def is_resumed(config: TrainConfig) -> bool:
    """Whether the folder holds this run, unfinished. Raises ConfigError where it holds another."""
    return not _is_finished(config, f"{config.output}/bundle")


@pytest.mark.parametrize("column", ["id", "number", None])
def test_a_run_is_resumed_with_its_own_settings(column: str | None, config: TrainConfig, tmp_path: Path) -> None:
    config = replace(config, documents=DocumentsConfig(uri="x", id=column))
    (tmp_path / "run.toml").write_text(command.to_toml(config))
    assert is_resumed(config)
    changed = replace(
        config, workers=WorkersConfig(count=3), checkpoints=CheckpointsConfig(minutes=1), report_seconds=1, cache=str(tmp_path)
    )
    assert is_resumed(changed)


def test_a_setting_that_may_not_change_is_named(config: TrainConfig, tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text(command.to_toml(config))
    with pytest.raises(ConfigError, match=r"other settings.*found loop\.epochs = 10 instead of 3; choose"):
        is_resumed(replace(config, loop=LoopConfig(epochs=3)))
    with pytest.raises(ConfigError, match=r"found documents\.id = 'id' instead of None"):
        is_resumed(replace(config, documents=DocumentsConfig(uri="x", id=None)))


def test_a_run_is_the_same_however_its_places_are_spelt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """C9: a resumed training run, whose documents and encoder are spelt otherwise."""
    (tmp_path / "in").mkdir()
    (tmp_path / "link").symlink_to("in")
    (tmp_path / "out").mkdir()
    config = TrainConfig(
        documents=DocumentsConfig(uri=f"{tmp_path}/in"),
        output=f"{tmp_path}/out",
        encoder=EncoderConfig(name=f"{tmp_path}/in"),
        label_names=f"{tmp_path}/in/names",
    )
    (tmp_path / "out" / "run.toml").write_text(command.to_toml(config))
    monkeypatch.chdir(tmp_path)
    for folder in ("in/", "./in//", f"file://{tmp_path}/in", "link", f"{tmp_path}/out/../in"):
        other = replace(
            config,
            documents=DocumentsConfig(uri=folder),
            encoder=EncoderConfig(name=folder),
            label_names=f"{folder}/names",
            output="out/",
        )
        assert other == config and is_resumed(other)
    with pytest.raises(ConfigError, match=r"found documents\.uri = '.*/in' instead of '.*/out2'"):
        is_resumed(replace(config, documents=DocumentsConfig(uri="out2")))


def test_a_run_lies_apart_from_what_it_reads(tmp_path: Path) -> None:
    """D, "a run is what its strings are": a run folder or a cache among the documents, an encoder in the run folder."""
    documents, none = DocumentsConfig(uri=f"{tmp_path}/in"), EncoderConfig(layers=0)
    for settings, words in (
        ({"output": f"{tmp_path}/in/run"}, r"output lies in documents\.uri"),
        ({"output": f"{tmp_path}/run", "cache": f"{tmp_path}/in/cache"}, r"cache lies in documents\.uri"),
        ({"output": f"{tmp_path}/run", "encoder": replace(none, name=f"{tmp_path}/run/e")}, r"encoder\.name lies in output"),
        ({"output": f"{tmp_path}/run", "label_names": f"{tmp_path}/run/n.parquet"}, "label_names lies in output"),
    ):
        with pytest.raises(ConfigError, match=words):
            run(TrainConfig(**{"documents": documents, "encoder": none, **settings}))  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


def test_a_run_of_an_older_version_is_resumed_or_refused_in_one_line(config: TrainConfig, tmp_path: Path) -> None:
    written = command.to_toml(config)
    (tmp_path / "run.toml").write_text(written.replace("[checkpoints]", "[checkpoints]\npatience = 300.0"))
    assert "patience = 300.0" in (tmp_path / "run.toml").read_text() and is_resumed(config)
    (tmp_path / "run.toml").write_text(written.replace("[loop]", "[loop]\nspeed = 3"))
    with pytest.raises(ConfigError, match=r"loop.*speed.*another version") as refused:
        is_resumed(config)
    assert "\n" not in str(refused.value)


def test_an_automatic_run_is_not_gone_on_with_by_other_settings(tmp_path: Path) -> None:
    """Those that no recipe decides; the recipe itself is that of the run."""
    documents = DocumentsConfig(uri="x")
    asked = TrainConfig(documents=documents, output=str(tmp_path), recipe="auto", loop=LoopConfig(minutes=10.0))
    began = replace(asked, loop=replace(asked.loop, epochs=3, batch_size=7))
    (tmp_path / "run.toml").write_text(command.to_toml(began))
    assert job._as_begun(asked).loop == began.loop
    for other, found in (
        ({"loop": LoopConfig(minutes=600.0)}, r"loop\.minutes = 10\.0 instead of 600\.0"),
        ({"encoder": EncoderConfig(name="another")}, r"encoder\.name = .* instead of '.*another'"),
        ({"feedback": FeedbackConfig(uri="/verdicts")}, r"feedback\.uri = None instead of '/verdicts'"),
    ):
        with pytest.raises(ConfigError, match=rf"a run with other settings: .*; found {found}"):
            job._as_begun(replace(asked, **other))  # type: ignore[arg-type]


def test_a_checkpoint_that_is_not_there_is_told_before_the_documents_are_read(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor is Ray started."""
    monkeypatch.setattr(job, "connect", pytest.fail)
    monkeypatch.setattr(job, "check_encoder", lambda *_: None)
    config = replace(config, output=str(tmp_path / "run"), resume=str(tmp_path / "nowhere"))
    with pytest.raises(ModelError, match=r"no complete checkpoint to resume from: .*/nowhere; give auto, never or an address"):
        job.run(config)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("place", ["", "/checkpoints", "/checkpoints/step-000000012"])
def test_a_start_from_a_finished_run_that_has_removed_its_checkpoints_is_told_so(
    place: str, config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job, "check_encoder", lambda *_: None)
    (tmp_path / "first" / "bundle").mkdir(parents=True)
    (tmp_path / "first" / "bundle" / "config.json").write_text("{}")
    config = replace(config, output=str(tmp_path / "run"), resume=f"{tmp_path}/first{place}")
    with pytest.raises(
        ModelError, match=r"found a finished run, which has removed its checkpoints; .*--checkpoints\.keep true"
    ):
        job.run(config)


def errors_in(capsys: pytest.CaptureFixture[str]) -> list[str]:
    """What Ray logs besides is no matter here."""
    return [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]


def failing(attempts: Path, error: Exception) -> Callable[[dict[str, Any]], None]:
    """A closure, because Ray sends those by value: its workers cannot import a test."""

    def work(settings: dict[str, Any]) -> None:
        with attempts.open("a") as file:
            file.write(".")
        raise error

    return work


@pytest.mark.parametrize(
    ("error", "attempts"), [(DataError("batches are out of order"), 1), (UnavailableError("storage is away"), 2)]
)
def test_what_would_fail_again_is_not_tried_again(
    error: XmcError,
    attempts: int,
    config: TrainConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    ray_session: None,
) -> None:
    """An error of ours in a worker ends training at once, in one line; one of a storage that may come back does not."""
    monkeypatch.setattr(job, "work", failing(tmp_path / "attempts", error))
    config = replace(config, workers=WorkersConfig(max_failures=1))
    handlers = []

    def train() -> None:
        handlers.append(signal.getsignal(signal.SIGINT))
        try:
            with own_errors():
                job._train(config, None, {}, None, Follower([]))  # type: ignore[arg-type]
        finally:
            handlers.append(signal.getsignal(signal.SIGINT))

    assert exit_code(train) == 2 and errors_in(capsys) == [f"error: {error}"]
    assert len((tmp_path / "attempts").read_text()) == attempts
    assert handlers[0] == handlers[1], "Ray Train's handler would outlive training, and exit with 0"


@pytest.mark.parametrize("layers", [None, 0])
def test_an_encoder_is_tried_before_a_document_is_read(
    layers: int | None, config: TrainConfig, tiny_encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also before a cluster is waited for. A tokenizer without words is as bad for a model without a transformer."""
    broken = changed(tiny_encoder, tmp_path / "encoder", lambda folder: (folder / "tokenizer.json").unlink())
    (broken / "tokenizer_config.json").unlink()
    encoder = EncoderConfig(name=str(broken), layers=layers, feature_layers=1)
    config = replace(config, output=str(tmp_path / "run"), encoder=encoder, lexical=LexicalConfig(width=8))
    for step in ("connect", "prepare"):
        monkeypatch.setattr(job, step, lambda *_: pytest.fail("too late"))
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:9")
    with pytest.raises(ModelError, match="the tokenizer does not tell texts apart"):
        job.run(config)
    monkeypatch.delenv("RAY_ADDRESS")
    monkeypatch.setattr(job, "connect", lambda: None)  # a Ray of this machine starts meanwhile
    with pytest.raises(ModelError, match="the tokenizer does not tell texts apart"):
        job.run(config)


def test_workers_that_die_again_and_again_end_training_with_one_line(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], ray_session: None
) -> None:
    """As those that the kernel kills for their memory."""

    def die(settings: dict[str, Any]) -> None:
        os._exit(1)

    def train() -> None:
        with own_errors():
            job._train(replace(config, workers=WorkersConfig(max_failures=0)), None, {}, None, Follower([]))  # type: ignore[arg-type]

    monkeypatch.setattr(job, "work", die)
    assert exit_code(train) == 2
    (error,) = errors_in(capsys)
    assert error.startswith("error: Ray has lost a process, a machine or an object; found ")
