"""Jobs as commands: settings from files and options, errors as one line."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from xmc_ray import cli, command
from xmc_ray.cli import JOBS
from xmc_ray.data.split import ValidationConfig
from xmc_ray.errors import ConfigError, DataError
from xmc_ray.model.encoder import EncoderConfig
from xmc_ray.on_ray.tag.config import TagConfig
from xmc_ray.on_ray.train.config import TrainConfig
from xmc_ray.on_ray.train.tune import TuneConfig
from xmc_ray.settings import Settings, Share
from xmc_ray.training.fit import FitConfig
from xmc_ray.training.loop import LoopConfig


@dataclass(frozen=True, kw_only=True)
class Part(Settings):
    """A part."""

    rate: float = 0.1
    """The rate."""
    names: list[str] = field(default_factory=lambda: ["one"])
    again: bool = False


@dataclass(frozen=True, kw_only=True)
class Config(Settings):
    """A job."""

    output: str
    """Where it goes."""
    min_score: Share = 0.0
    part: Part = field(default_factory=Part)

    def check(self) -> None:
        if self.output == "nowhere":
            raise ConfigError("output is nowhere")


@pytest.fixture
def toml(tmp_path: Path) -> Path:
    (tmp_path / "a.toml").write_text('output = "here"\n[part]\nrate = 0.5\n')
    return tmp_path / "a.toml"


def test_an_option_wins_over_the_file(toml: Path) -> None:
    config = command.parse(Config, ["--config", str(toml), "--part.rate=0.7", "--min_score", "0.25"])
    assert config == Config(output="here", min_score=0.25, part=Part(rate=0.7))
    assert command.parse(Config, [f"--config={toml}"]).part == Part(rate=0.5)


def test_a_file_comes_first_wherever_it_stands(toml: Path) -> None:
    for file in (["--config", str(toml)], [f"--config={toml}"]):
        assert command.parse(Config, ["--part.rate=0.7", *file]).part == Part(rate=0.7)


def test_a_list_without_a_value_takes_no_option_for_one() -> None:
    with pytest.raises(ConfigError, match=r"invalid settings.*documents\.text"):
        command.parse(TagConfig, ["--documents.text", "--output=y", "--documents.uri=x", "--bundle=z"])
    with pytest.raises(ConfigError, match=r"invalid settings.*config"):
        command.parse(TagConfig, ["--documents.uri=x", "--output=y", "--bundle=z", "--config"])
    given = ["--documents.uri=x", "--output=y", "--bundle=z", "--documents.text", "😀"]
    assert command.parse(TagConfig, given).documents.text == ["😀"]


@pytest.mark.parametrize("value", ['["title", "body"]', "['title', 'body']", "title"])
def test_a_list_may_be_written_in_json_in_python_or_as_its_only_member(value: str) -> None:
    expected = ["title", "body"] if "body" in value else ["title"]
    for given in ([f"--documents.text={value}"], ["--documents.text", value]):
        assert command.parse(TagConfig, ["--documents.uri=x", "--output=y", "--bundle=z", *given]).documents.text == expected


@pytest.mark.parametrize(
    ("job", "argument", "hint"),
    [
        (TagConfig, "--documents=a.parquet", "write --documents.uri"),
        (TuneConfig, "--encoder.name=e", "write --encoder"),
        (TuneConfig, "--minuts=3", "perhaps --minutes"),
        (TagConfig, "--documents.txt=a", "perhaps --documents.text"),
        (TagConfig, "--overwr", "perhaps --overwrite"),  # no part of a name is taken for it
    ],
)
def test_what_may_have_been_meant_is_said(job: Any, argument: str, hint: str) -> None:
    with pytest.raises(ConfigError, match=f"invalid settings.*; {hint}$"):
        command.parse(job, ["--documents.uri=x", "--output=y", *(["--bundle=z"] * (job is TagConfig)), argument])


def test_values_with_hyphens_stay_as_they_are(toml: Path) -> None:
    assert command.parse(Config, ["--output", "/a-b/c-d"]).output == "/a-b/c-d"
    assert command.parse(Config, ["--output=/a-b/c-d"]).output == "/a-b/c-d"


def test_a_switch_needs_no_value(toml: Path) -> None:
    base = [f"--config={toml}"]
    assert command.parse(Config, [*base, "--part.again"]).part.again
    assert command.parse(Config, [*base, "--part.again", "--min_score=0.5"]).part.again
    assert command.parse(Config, [*base, "--part.again", "true"]).part.again
    assert not command.parse(Config, [*base, "--part.again=false"]).part.again


def test_a_setting_may_be_one_place_or_several(tmp_path: Path) -> None:
    base = ["--documents.uri=x", "--output=y"]
    (tmp_path / "several.toml").write_text('bundle = ["/a", "s3://b/c-d"]\n')
    for arguments in (['--bundle=["/a", "s3://b/c-d"]'], ["--config", str(tmp_path / "several.toml")]):
        assert command.parse(TagConfig, [*base, *arguments]).bundle == ["/a", "s3://b/c-d"]
    assert command.parse(TagConfig, [*base, "--bundle", "s3://b/c-d"]).bundle == "s3://b/c-d"


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--config", "{toml}", "--part.speed=1"], "part.speed"),
        (["--config", "{flat}"], "a section is no value: part; found 0.5; write settings of its own, such as part."),
        (["--config", "{toml}", "--part.rate=fast"], "part.rate"),
        (["--part.rate=1"], "output"),
        (["--config", "/nowhere/a.toml"], "config"),
        (["--config", "{bad}"], "rates"),
        (["--config", "{broken}"], "config"),
        (["--config", "{deep}"], "recursion"),
        (["--config", "{toml}", "--min_score=2"], "invalid value of min_score; found 2.0; expected at least 0, at most 1"),
        (["--config", "{toml}", "--output=nowhere"], "output is nowhere"),
        (["--config", "{toml}", "--output", "/caf\udce9"], r"an argument is not UTF-8; found /caf\xe9; rename the file"),
        (["--config", "{toml}", "--min-score=0.5"], "unrecognized arguments: --min-score=0.5; write --min_score"),
        (["--config", "{toml}", "--min-score", "0.5"], "write --min_score"),
    ],
)
def test_bad_settings_are_one_line_and_exit_code_2(
    arguments: list[str], told: str, toml: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad, broken, ran = tmp_path / "bad.toml", tmp_path / "broken.toml", []
    bad.write_text('output = "x"\n[part]\nrates = 1\n')
    broken.write_text("output = \n")
    deep = tmp_path / "deep.toml"
    deep.write_text("output = " + 100_000 * "[" + 100_000 * "]")
    flat = tmp_path / "flat.toml"
    flat.write_text('output = "x"\npart = 0.5\n')
    arguments = [argument.format(toml=toml, bad=bad, broken=broken, deep=deep, flat=flat) for argument in arguments]
    assert command.run(ran.append, Config, arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert told in error
    assert not ran


def test_a_job_s_own_errors(toml: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def fail(error: Exception) -> object:
        raise error

    arguments = ["--config", str(toml)]
    assert command.run(lambda _: fail(DataError("no input", where="x\ny")), Config, arguments) == 2
    assert capsys.readouterr().err == "error: no input: x y\n"
    with pytest.raises(ZeroDivisionError):
        command.run(lambda _: fail(ZeroDivisionError()), Config, arguments)
    assert command.run(lambda _: None, Config, arguments) == 0


@pytest.mark.parametrize(
    "config",
    [
        FitConfig(),
        FitConfig(encoder=EncoderConfig(name="x", layers=2, dropout=0.0), loop=LoopConfig(minutes=1.5)),
        Config(output="a b", part=Part(names=["x", "y"])),
    ],
)
def test_toml_and_back(config: object, tmp_path: Path) -> None:
    (tmp_path / "c.toml").write_text(command.to_toml(config))
    assert command.parse(type(config), ["--config", str(tmp_path / "c.toml")]) == config


@pytest.mark.parametrize("job", [TrainConfig, TagConfig])
def test_every_setting_has_its_help(job: type, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command.parse(job, ["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "Maximum length of a text in bytes of UTF-8" in text and "[at least 1; default 1048576]" in text
    assert "Column of the ids" in text
    assert "--output" in text


@pytest.mark.parametrize("job", [name for name, job in JOBS.items() if cli.named(job.config).essentials])
def test_what_matters_first_is_of_the_job_s_settings(job: str) -> None:
    """Ten of them, and each that is required is among them."""
    config = cli.named(JOBS[job].config)
    names = {option.name: option.is_required for option in command.options(config)}
    assert len(config.essentials) == 10 and set(config.essentials) <= set(names)
    assert {name for name, is_required in names.items() if is_required} <= set(config.essentials)


def test_options_are_those_that_the_parser_takes() -> None:
    """Of parts that may be None as well, which the parser keeps as one."""
    names = {option.name: option for option in command.options(TagConfig)}
    assert {"k", "documents.uri", "hierarchy.table", "rerank.function", "gate.documents.uri"} <= set(names)
    assert not names["hierarchy.table"].is_required and names["documents.uri"].is_required
    arguments = ["--documents.uri=x", "--bundle=b", "--output=y", "--hierarchy.table=h.parquet", "--hierarchy.close=true"]
    assert command.parse(TagConfig, arguments).hierarchy.table.endswith("h.parquet")


def test_an_unknown_metric() -> None:
    with pytest.raises(ConfigError, match=r"validation\.metric is unknown; found accuracy; expected P@1, .*, coverage@10"):
        ValidationConfig(metric="accuracy")


def test_a_byte_order_mark_is_no_setting(toml: Path) -> None:
    """Kind of fault: several readers of text, each with an opinion of its own."""
    toml.write_text("\ufeff" + toml.read_text().replace("\n", "\r\n"), newline="")
    assert command.parse(Config, ["--config", str(toml)]).part == Part(rate=0.5)
    toml.write_text(toml.read_text(), encoding="utf-16")
    with pytest.raises(ConfigError, match=r"invalid settings; found .*utf-8"):
        command.parse(Config, ["--config", str(toml)])


@pytest.mark.parametrize("spelling", [["--config", "small-cpu"], ["--config=small-cpu"]])
def test_a_recipe_that_comes_along_is_found_by_its_name(
    spelling: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And a file of that name here goes first."""
    monkeypatch.chdir(tmp_path)
    options = ["--documents.uri=x", "--output=y", *spelling]
    assert command.parse(TrainConfig, options).lexical.width == 512
    (tmp_path / "small-cpu").write_text("[lexical]\nwidth = 8\n")
    assert command.parse(TrainConfig, options).lexical.width == 8


@pytest.mark.parametrize("spelling", [["--config", "{file}"], ["--config={file}"]])
def test_a_file_of_settings_that_is_not_there_is_named(spelling: list[str], tmp_path: Path) -> None:
    for file in (tmp_path, tmp_path / "nowhere.toml"):
        with pytest.raises(
            ConfigError, match=f"not a file of settings; found {file}; give --config a TOML file, or one of .*small-cpu"
        ):
            command.parse(TrainConfig, [part.format(file=file) for part in spelling])
