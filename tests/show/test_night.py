"""The state of a night, and its figures, whatever its files hold."""

import json
from pathlib import Path

import pytest
from made_nights import write_night

from xmc_ray.show.night import count, drift, read_night, seconds

DAY = "2026-11-24"


def test_a_finished_night(tmp_path: Path) -> None:
    folder = write_night(tmp_path / "out", DAY, [("a", "b", {"c": 0.5})], files=1)
    night = read_night(str(folder))
    assert (night.state, night.note, night.day, night.run) == ("finished", "", DAY, "run20261124")
    assert len(night.files) == 1 and count(night.manifest, "in") == 1
    assert seconds(night.manifest) == 200 and drift(night.manifest, "training") == 0.05
    (folder / "_work").mkdir()
    (folder / "_work" / "run.json").write_text('{"run": "another"}')
    assert read_night(str(folder)).note.startswith("Another run is being made")


@pytest.mark.parametrize(
    ("name", "content", "state", "words"),
    [
        ("_SUCCESS", None, "unfinished", "has been begun and is not finished"),
        ("_SUCCESS", "{", "damaged", "_SUCCESS cannot be read"),
        ("_SUCCESS", '{"run": "run20261124", "files": 5, "rejects": []}', "damaged", "another version"),
        ("_SUCCESS", '{"run": "run20261124", "files": ["x"], "rejects": []}', "damaged", "a finished night is damaged"),
        ("manifest.json", "[]", "damaged", "not the manifest of a night"),
        ("manifest.json", '{"run": "other", "config": 1, "scoring": 1}', "damaged", "replaced by another run"),
    ],
)
def test_what_is_wrong_is_a_sentence(tmp_path: Path, name: str, content: str | None, state: str, words: str) -> None:
    folder = write_night(tmp_path / "out", DAY, [("a", "b", {"c": 0.5})])
    (folder / name).unlink()
    if content is not None:
        (folder / name).write_text(content)
    night = read_night(str(folder))
    assert night.state == state and words in night.note and night.run == ""


def test_who_has_begun_it_and_what_was_removed_in_part(tmp_path: Path) -> None:
    folder = tmp_path / "out" / "_nights" / f"dt={DAY}"
    (folder / "_work").mkdir(parents=True)
    (folder / "_work" / "run.json").write_text(json.dumps({"run": "abc"}))
    assert "by run abc" in read_night(str(folder)).note
    (folder / "_removed.json").write_text("{}")
    assert "removed in part" in read_night(str(folder)).note


@pytest.mark.parametrize("manifest", [{}, {"in": "x", "drift": 3, "started": 5}, {"in": True, "drift": {"training": "y"}}])
def test_figures_that_are_none(manifest: dict[str, object]) -> None:
    assert count(manifest, "in") is None and drift(manifest, "training") is None and seconds(manifest) is None
