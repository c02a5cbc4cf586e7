"""Texts out of a night's catalogue, and why there are none."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from made_nights import write_night

from xmc_ray import storage
from xmc_ray.bundle import folder
from xmc_ray.data.documents import text_digest
from xmc_ray.data.fields import MARK
from xmc_ray.show.texts import look_up

DOCUMENTS = [(f"d{n}", f"text {n}", {"a": 0.5}) for n in range(20)]


@pytest.fixture
def manifest(tmp_path: Path) -> dict[str, Any]:
    return dict(storage.read_json(str(write_night(tmp_path / "out", "2026-11-24", DOCUMENTS) / "manifest.json")))


def test_texts_by_id(manifest: dict[str, Any]) -> None:
    texts = look_up(manifest, ["d3", "d17"], np.inf)
    assert {id: text.readable for id, text in texts.found.items()} == {"d3": "text 3", "d17": "text 17"} and texts.note == ""
    assert "does not have all" in look_up(manifest, ["d3", "x"], np.inf).note
    assert "within -1 seconds" in look_up(manifest, ["x"], -1).note


def test_a_catalogue_that_has_changed_or_is_gone(manifest: dict[str, Any], tmp_path: Path) -> None:
    (catalogue,) = tmp_path.glob("in-*.parquet")
    write_night(tmp_path / "other" / "out", "2026-11-24", DOCUMENTS[:3])
    (tmp_path / "other" / catalogue.name).rename(catalogue)
    assert "the file has changed" in look_up(manifest, ["d3"], np.inf).note
    catalogue.unlink()
    assert look_up(manifest, ["d3"], np.inf).note.startswith("The catalogue ")


def test_a_file_that_cannot_be_read_hides_no_other(manifest: dict[str, Any], tmp_path: Path) -> None:
    damaged = tmp_path / "a.parquet"
    damaged.write_bytes(b"PAR1 and no more")
    manifest["input"].insert(0, vars(storage.stat(str(damaged))))
    texts = look_up(manifest, ["d3", "d17"], np.inf)
    assert {*texts.found} == {"d3", "d17"} and texts.note == ""
    texts = look_up(manifest, ["d3", "x"], np.inf)
    assert {*texts.found} == {"d3"} and texts.note.startswith("The catalogue is not as the night has read it: ")


def test_how_fields_are_joined_says_their_bundle(manifest: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    manifest["config"]["documents"]["text"] = ["id", "text"]
    unknown = look_up(manifest, ["d3"], np.inf).found["d3"]
    assert (unknown.readable, unknown.digest) == ("d3\ntext 3", None)
    settings = {"fields": [{"name": "id", "weight": 1.0}, {"name": "text", "weight": 1.0}]}
    monkeypatch.setattr(folder, "read_settings", lambda uri: {manifest["config"]["bundle"]: settings}[uri])
    known = look_up(manifest, ["d3"], np.inf).found["d3"]
    assert known.text == f"d3{MARK}text 3" and known.digest == text_digest(pa.array([known.text]))[0].as_py()


@pytest.mark.parametrize(
    "manifest", [{}, {"config": {"documents": {"uri": "x", "new": 1}, "bundle": "x"}, "input": []}, {"config": 3}]
)
def test_a_manifest_of_another_version(manifest: dict[str, Any]) -> None:
    assert "another version" in look_up(manifest, ["a"], 1).note
