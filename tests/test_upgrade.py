"""What an earlier version has left is read by this one: a bundle and a night, kept as files (`support/keep_version.py`)."""

import json
import shutil
from pathlib import Path

import pyarrow.dataset as ds
import pytest
from checkout import ROOT
from in_process import InProcess

import xmc_ray
from xmc_ray import XMCClassifier
from xmc_ray.command import parse
from xmc_ray.on_ray.tag import nights
from xmc_ray.on_ray.tag.config import TagConfig
from xmc_ray.on_ray.tag.job import tag

KEPT = sorted((ROOT / "tests" / "kept").iterdir())


@pytest.fixture(params=KEPT, ids=lambda path: path.name)
def kept(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A copy, since a night is written beside the old one."""
    return Path(shutil.copytree(request.param, tmp_path / "kept"))


def test_the_version_before_is_kept() -> None:
    assert KEPT and all(path.name != xmc_ray.__version__ for path in KEPT)


def test_a_bundle(kept: Path) -> None:
    (tags,) = XMCClassifier.load(kept / "bundle").predict(["a red plum"], k=2)
    assert {label for label, _ in tags} == {"red", "plum"}


def test_a_night_is_followed_by_one_of_this_version(kept: Path) -> None:
    """Nothing is reused, since another release may score otherwise, but what has changed is told against the old night."""
    options = [f"--documents.uri={kept}/documents.parquet", f"--bundle={kept}/bundle", f"--output={kept}/nights"]
    before = nights.latest_before(f"{kept}/nights/_nights/dt=2026-11-24")
    folder = tag(parse(TagConfig, [*options, "--date=2026-11-24", "--previous=last", "--k=3", "--pool.threads=1"]), InProcess())
    manifest = json.loads((Path(folder) / "manifest.json").read_text())
    assert (manifest["tagged"], manifest["reused"], manifest["release"]) == (24, 0, xmc_ray.__version__)
    assert "release" in manifest["not_reused"]
    assert manifest["changes_since"]["night"] == before or before.endswith(manifest["changes_since"]["night"])
    both = (
        ds.dataset(str(kept / "nights" / "tags"), partitioning="hive")
        .to_table()
        .sort_by([("dt", "ascending"), ("id", "ascending")])
    )
    assert both["labels"].to_pylist()[:24] == both["labels"].to_pylist()[24:]
