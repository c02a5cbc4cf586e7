"""The configs that come along: valid, and their headers say what they promise and whence."""

import re
import shlex
from pathlib import Path

import pytest
from checkout import ROOT

from xmc_ray import command
from xmc_ray.data.convert import ConvertConfig
from xmc_ray.on_ray.train.config import TrainConfig
from xmc_ray.training.optim import OptimConfig

CONFIGS = sorted([*(ROOT / "xmc_ray" / "recipes").glob("*.toml"), *(ROOT / "jobs" / "configs").glob("*.toml")])
PAPER = [path for path in CONFIGS if "LightXML paper" in path.read_text()]


def header(path: Path) -> dict[str, str]:
    """The text of each entry in the comment at the top; a deeper line goes on with the one before."""
    comment = path.read_text().partition("\n[")[0]
    joined = re.sub(r"\n#  +", " ", comment)
    return dict(re.findall(r"^# (\w+) +(.*)$", joined, flags=re.MULTILINE))


def as_by_a_shell(line: str) -> str:
    """Each variable replaced by a folder of its name."""
    return line.replace("$", "/")


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_it_is_valid(path: Path) -> None:
    command.parse(TrainConfig, [f"--config={path}", "--documents.uri=x", "--output=y"])


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_its_header_has_data_command_metric_and_source(path: Path) -> None:
    entries = header(path)
    assert re.search(r"[\d,]+ .*documents, [\d,]+ labels", entries["data"])
    assert re.search(r"P@1 / P@3 / P@5 [\d.]+ / [\d.]+ / [\d.]+ ", entries["metric"])
    assert len(entries["source"]) > 10
    program, script, *arguments = shlex.split(as_by_a_shell(entries["command"]))
    if program == "make":
        assert f"\n{script}:" in (ROOT / "Makefile").read_text()
    else:
        assert (program, script, arguments[1]) == ("python", "jobs/train.py", str(path.relative_to(ROOT)))
        command.parse(TrainConfig, ["--config", str(path), *arguments[2:]])


@pytest.mark.parametrize("path", PAPER, ids=lambda path: path.stem)
def test_the_paper_s_settings(path: Path) -> None:
    config = command.parse(TrainConfig, [f"--config={path}", "--documents.uri=x", "--output=y"])
    averaging = {"swa_start": config.optim.swa_start, "swa_every": config.optim.swa_every}
    published = OptimConfig(encoder_lr=1e-4, head_lr=1e-4, weight_decay=0.01, warmup=0, decay=False, clip_norm=0, **averaging)
    assert config.optim == published and 0.2 < config.optim.swa_start <= 0.5
    assert (config.encoder.feature_layers, config.model.dropout, config.loop.seed) == (5, 0.5, 6088)
    assert config.encoder.pooling == "auto"  # first for BERT and RoBERTa, last for XLNet: see tests/model/test_encoder.py
    assert (config.groups.max_size, config.text.max_tokens) in {(1, 512), (100, 128)}
    program, script, *arguments = shlex.split(as_by_a_shell(header(path)["convert"].partition(" (")[0]))
    assert (program, script) == ("python", "jobs/convert.py")
    assert command.parse(ConvertConfig, arguments).output == "/DATA/train.parquet"


def test_no_code_knows_a_data_set() -> None:
    assert len(PAPER) == 5
    code = "".join(path.read_text() for folder in ("xmc_ray", "jobs") for path in (ROOT / folder).rglob("*.py")).lower()
    for name in {path.stem for path in PAPER} | {path.stem.partition("-")[0] for path in PAPER} - {"wiki", "amazon"}:
        assert name not in code
