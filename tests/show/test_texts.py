"""Texts out of a night's catalogue, and why there are none."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from made_nights import write_night

from xmc_ray import storage
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


@pytest.mark.parametrize(
    "manifest", [{}, {"config": {"documents": {"uri": "x", "new": 1}, "bundle": "x"}, "input": []}, {"config": 3}]
)
def test_a_manifest_of_another_version(manifest: dict[str, Any]) -> None:
    assert "another version" in look_up(manifest, ["a"], 1).note
