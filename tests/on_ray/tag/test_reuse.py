"""Which night's tags are reused; whole nights that reuse some are in test_job.py."""

from pathlib import Path
from typing import Any

import pytest

from xmc_ray.on_ray.tag import nights
from xmc_ray.on_ray.tag.reuse import Previous

MADE: dict[str, Any] = {
    "config": {"k": 3, "min_score": 0.0, "model": {"scoring": "exact"}},
    "bundle": "abc",
    "release": "0.1",
    "arithmetic": "cpu float32",
}


@pytest.fixture
def finished(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    """A night whose manifest is `MADE`."""
    folder = str(tmp_path / "_nights" / "dt=2026-11-22")
    monkeypatch.setattr(nights, "latest_before", lambda this: folder)
    monkeypatch.setattr(nights, "tag_files", lambda night: [])
    monkeypatch.setattr(nights, "manifest_of", lambda night: MADE | {"filters": None, "in": 5})
    return folder


def test_nothing_is_said_where_nothing_is_asked_for(finished: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert Previous.find(None, "this", MADE) == Previous() and capsys.readouterr().out == ""


def test_a_night_that_was_made_in_the_same_way_is_reused(finished: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Whatever else its manifest tells, and settings that it did not have yet are those that are not set."""
    same = MADE | {"config": MADE["config"] | {"rerank": None, "documents": "elsewhere"}, "table": "any"}
    assert Previous.find("last", "this", same) == Previous(finished) and capsys.readouterr().out == ""


def test_there_may_be_no_night_yet(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(nights, "latest_before", lambda this: None)
    assert Previous.find("last", "this", MADE) == Previous()
    assert capsys.readouterr().out == "nothing is reused: there is no finished night before this\n"


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"config": MADE["config"] | {"k": 4}}, "k"),
        ({"config": MADE["config"] | {"model": {"scoring": "grouped"}}}, "model.scoring"),
        ({"config": MADE["config"] | {"rerank": {"version": "2"}}}, "rerank"),
        ({"bundle": "def", "arithmetic": "cpu bfloat16"}, "bundle, arithmetic"),
        ({"hierarchy": "digest"}, "hierarchy"),
        ({"filters": "digest", "release": "0.2"}, "release, set of filters"),
    ],
)
def test_what_is_different_is_said(finished: str, other: dict[str, Any], said: str) -> None:
    why = f"nothing is reused: the night before had another {said}: {finished}"
    assert Previous.find("last", "this", MADE | other) == Previous(None, why)
