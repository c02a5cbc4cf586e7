"""Which runs and outputs are found in a folder."""

from pathlib import Path

import pytest
from made_nights import write_night, write_run

from xmc_ray.show import folder
from xmc_ray.show.folder import find


def test_runs_and_outputs_at_any_level(tmp_path: Path) -> None:
    write_run(tmp_path / "one")
    write_run(tmp_path / "tuned" / "run")
    (tmp_path / "settled").mkdir()
    (tmp_path / "settled" / "run.toml").write_text("")
    write_night(tmp_path / "shop" / "tags-of-shop", "2026-11-24", [("a", "b", {})])
    (tmp_path / "old" / "dt=2026-11-20").mkdir(parents=True)
    for name in ("_hidden", ".hidden"):
        write_run(tmp_path / name)
    bundle = tmp_path / "bundle"
    bundle.mkdir()
    for name in ("run.toml", "model.safetensors"):
        (bundle / name).write_text("")
    found = find(str(tmp_path))
    assert [*found.runs] == ["one", "settled", "tuned/run"] and [*found.outputs] == ["old", "shop/tags-of-shop"]
    assert found.runs["one"] == str(tmp_path / "one") and not found.cut


def test_the_folder_itself_may_be_one(tmp_path: Path) -> None:
    assert [*find(str(write_run(tmp_path / "run"))).runs] == ["."]
    write_night(tmp_path / "out", "2026-11-24", [("a", "b", {})])
    assert [*find(str(tmp_path / "out")).outputs] == ["."]


def test_a_folder_that_is_too_large_is_said_to_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(5):
        (tmp_path / str(number)).mkdir()
    monkeypatch.setattr(folder, "_FOLDERS", 3)
    assert find(str(tmp_path)).cut
