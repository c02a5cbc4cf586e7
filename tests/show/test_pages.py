"""What pages take from an address."""

from pathlib import Path

import pytest
from made_nights import write_night

from xmc_ray.show.pages import Missing, Site, _position, _share
from xmc_ray.show.tags import Position


def test_an_address_that_makes_no_sense_is_the_beginning() -> None:
    assert [_position(text) for text in (None, "", "x", "1", "1.2.3", "3.14", "-1.-2")] == [
        *[Position()] * 5,
        Position(3, 14),
        Position(),
    ]
    assert [_share(text) for text in (None, "", "x", "nan?", "0.5", "7", "-1")] == [0, 0, 0, 0, 0.5, 1, 0]


def test_what_a_document_page_shows(tmp_path: Path) -> None:
    write_night(tmp_path / "out", "2026-11-24", [("a", "one text", {"x": 0.5})])
    site, here = Site(str(tmp_path)), {"at": "out", "day": "2026-11-24"}
    shown = site.document(here | {"id": "a"}).content
    assert shown["text"] == "one text" and shown["tags"][0][1] == 0.5 and not shown["stale"]
    with pytest.raises(Missing, match="no tags of such a document"):
        site.document(here | {"id": "b"})
    with pytest.raises(Missing, match="no such night"):
        site.night({"at": "out", "day": "2026-11-25"})
    assert site.report(here).startswith(b"<!doctype html>")


def test_a_manifest_with_other_types_has_no_such_figures(tmp_path: Path) -> None:
    odd = {
        "tagged": "many",
        "reasons": [1],
        "changes_since": {"added": 3, "run": "x"},
        "drift": 5,
        "scores": ["x"],
        "started": 1,
    }
    write_night(tmp_path / "out", "2026-11-24", [("a", "one text", {"x": 0.5})], **odd)
    shown = Site(str(tmp_path)).night({"at": "out", "day": "2026-11-24"}).content
    assert shown["n"]["tagged"] is None and shown["n"]["in"] == 1 and shown["changes"] == [("added", 3)]
    assert shown["reasons"] == [] and shown["scores"] is None and shown["seconds"] is None


def test_a_text_that_has_changed_since_is_said_to_have(tmp_path: Path) -> None:
    folder = write_night(tmp_path / "out", "2026-11-24", [("a", "one text", {"x": 0.5})])
    other = write_night(tmp_path / "other" / "out", "2026-11-24", [("a", "another text", {"x": 0.5})])
    (folder / "manifest.json").write_text((other / "manifest.json").read_text())  # of a catalogue elsewhere
    assert Site(str(tmp_path)).document({"at": "out", "day": "2026-11-24", "id": "a"}).content["stale"]
