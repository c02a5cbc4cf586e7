"""The report of a night: well-formed, self-contained, complete, and safe from whatever texts a catalogue holds."""

from dataclasses import replace
from datetime import datetime, timedelta, timezone
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pages import FOREIGN_ATTRIBUTES, FOREIGN_TAGS, NASTY, Page

from xmc_ray.metrics.calibration import SCORE_BINS
from xmc_ray.metrics.drift import Drift, DriftConfig
from xmc_ray.reports.tagging import Night, tagging_report

NO_SCORES = [0] * SCORE_BINS
START = datetime(2026, 11, 23, 2, 0, tzinfo=timezone.utc)


def drift(total: float | None, *contributions: float) -> Drift:
    """Of two labels, whose shares went from 4 to 12% and from 3 to 0%."""
    contribution_L = np.array(contributions or (0.0, 0.0))
    return Drift(total, contribution_L, np.array([0.04, 0.03]), np.array([0.12, 0.0]), contribution_L == 0)


def test_the_page_shows_every_figure() -> None:
    page = Page(tagging_report(night()))
    for text in ["1,250,000", "1,200,000", "38,000", "12,000", "3,210", "4,321", "312.5", "14,998", "dt=2026-11-23"]:
        assert text in page.texts, text
    said = " ".join(page.texts)
    assert "96.0% of all" in said and "700 of them duplicates" in said
    assert "2026-11-23 02:00 – 03:11 UTC · 1 h 11 min" in said
    assert "0123456789abcdef" in page.texts
    assert "duplicate id" in page.texts and "700" in page.texts
    assert {"documents.text", "title", "documents.paths", "a, b", "pool.max", "min_score"} <= set(page.texts)
    assert "Crab apple" in page.texts and "malus" in page.texts and "90,000" in page.texts
    assert "the third text" in page.texts and "0.93" in page.texts
    assert page.texts.count("Scores") == 1


def test_drift_shows_total_bounds_verdict_and_the_labels_that_moved() -> None:
    page = Page(tagging_report(night()))
    assert "0.143" in page.texts and "0.310" in page.texts
    assert page.texts.count("warns above 0.1, fails above 0.25") == 2
    assert page.having("span", **{"class": "pill warn"}) and page.having("span", **{"class": "pill fail"})
    assert "4.00%" in page.texts and "12.0%" in page.texts and "0.088" in page.texts
    spoken = [found["aria-label"] for found in page.having("svg", **{"class": "pair"})]
    assert "from 4.00% to 12.0% of all tags" in spoken


@pytest.mark.parametrize(
    ("changes", "pill"),
    [
        ({"drift_previous": None, "drift_training": None, "warnings": ()}, "No warnings"),
        ({"drift_previous": drift(0.01), "drift_training": None, "warnings": ()}, "No warnings"),
        ({"drift_previous": drift(None), "drift_training": None, "warnings": ()}, "Too few tags to tell"),
        ({"drift_previous": drift(0.01), "drift_training": None}, "Worth a look"),
        ({"drift_training": None}, "Worth a look"),
        ({}, "Failed"),
    ],
)
def test_the_headline_tells_the_gravest(changes: dict[str, Any], pill: str) -> None:
    texts = Page(tagging_report(replace(night(), **changes))).texts
    assert next(text for text in texts if text in {"No warnings", "Too few tags to tell", "Worth a look", "Failed"}) == pill


def test_nothing_comes_from_elsewhere_and_nothing_runs() -> None:
    text = tagging_report(night())
    page = Page(text)
    assert not FOREIGN_TAGS & {tag for tag, _ in page.tags}
    for tag, attributes in page.tags:
        assert not FOREIGN_ATTRIBUTES & set(attributes), (tag, attributes)
        assert not [name for name in attributes if name.startswith("on")], (tag, attributes)
    assert "url(" not in page.style and "@import" not in page.style
    assert "://" not in text and "src=" not in text
    policy = page.having("meta", **{"http-equiv": "Content-Security-Policy"})[0]["content"] or ""
    assert "default-src 'none'" in policy and "script" not in policy


def test_it_follows_the_reader_s_light_and_dark_and_fits_a_phone() -> None:
    page = Page(tagging_report(night()))
    assert "prefers-color-scheme: dark" in page.style
    assert page.having("meta", name="viewport", content="width=device-width, initial-scale=1")
    assert "overflow-wrap: anywhere" in page.style
    assert page.style.count("{") == page.style.count("}")


def test_every_chart_has_its_words() -> None:
    page = Page(tagging_report(night()))
    charts = page.having("svg")
    assert len(charts) > 8
    assert all(chart.get("role") == "img" and chart.get("aria-label") for chart in charts)
    assert "1,000,000 tags" in (page.having("svg", **{"class": "chart broad"})[0]["aria-label"] or "")
    assert page.having("svg", **{"class": "stack"})[0]["aria-label"] == (
        "Of 1,250,000 documents: tagged 96.0%, reused 3.04%, rejected 0.96%"
    )


def test_the_histogram_is_one_bar_a_bin_with_the_night_before_as_a_line() -> None:
    with_both = Page(tagging_report(night()))
    alone = Page(tagging_report(replace(night(), scores_before=None)))
    n_charts = len(alone.having("svg", **{"class": "chart broad"}) + alone.having("svg", **{"class": "chart narrow"}))
    assert len(with_both.having("path", **{"class": "now"})) == SCORE_BINS * n_charts
    assert len(with_both.having("path", **{"class": "before"})) == n_charts
    assert not alone.having("path", **{"class": "before"})
    assert "The night before" in with_both.texts and "The night before" not in alone.texts
    assert "0.95 – 1.00" in alone.texts and "81.0%" in alone.texts


@pytest.mark.parametrize("scores", [(), (1, 2, 3)])
def test_scores_of_a_night_before_that_had_other_bins_are_left_out(scores: tuple[int, ...]) -> None:
    assert "The night before" not in Page(tagging_report(replace(night(), scores_before=scores))).texts


@pytest.mark.parametrize("text", NASTY.values(), ids=NASTY)
def test_text_stays_text_wherever_it_stands(text: str) -> None:
    page, plain = Page(tagging_report(night_of(text))), Page(tagging_report(night_of("harmless")))
    assert [tag for tag, _ in page.tags] == [tag for tag, _ in plain.tags]
    assert [set(attributes) for _, attributes in page.tags] == [set(attributes) for _, attributes in plain.tags]


def test_a_browser_shows_the_text_as_it_was() -> None:
    for name in ("script", "closing tag", "quotes", "entity", "right to left", "emoji", "address"):
        assert Page(tagging_report(night_of(NASTY[name]))).texts.count(NASTY[name]) >= 10, name


def test_what_a_page_cannot_hold_is_replaced() -> None:
    for name in ("null byte", "half a letter"):
        page = tagging_report(night_of(NASTY[name]))
        assert "\N{REPLACEMENT CHARACTER}" in page
        assert not set("\0\x0b\x1b\x7f\ud83d") & set(page)
        assert page.encode()


def test_text_that_runs_from_right_to_left_is_kept_apart() -> None:
    page = Page(tagging_report(night_of(NASTY["right to left"])))
    around = {tag for tag, text in page.inside if NASTY["right to left"] in text}
    assert around == {"bdi", "p", "title"}
    assert len(page.having("p", dir="auto")) == 1


def test_a_long_text_is_cut_and_a_short_one_is_not() -> None:
    samples = [sample("1", "y" * 601, []), sample("2", "z" * 600, [])]
    texts = Page(tagging_report(replace(night(), samples=samples))).texts
    assert "y" * 600 + "…" in texts and "z" * 600 in texts
    assert "No score above the minimum." in texts


@settings(deadline=None)
@given(text=st.text(max_size=30))
def test_any_text_leaves_the_page_whole(text: str) -> None:
    pages = [Page(tagging_report(changed(night_of(text), scores=NO_SCORES))) for text in (text, "harmless")]  # draws no chart
    assert len(pages[0].tags) == len(pages[1].tags)


def test_an_empty_night() -> None:
    manifest = {**night().manifest, **dict.fromkeys(COUNTS, 0), "reasons": {}, "scores": NO_SCORES, "config": {}}
    labels = pa.table({"label": pa.array([], pa.string()), "name": pa.array([], pa.string())})
    empty = Night(title="dt=2026-11-24", manifest=manifest, labels=labels, label_counts=np.zeros(0, np.int64))
    page = Page(tagging_report(empty))
    assert "No tags." in page.texts and "0" in page.texts
    assert page.texts.count("Nothing to compare with.") == 2
    assert page.texts.count("None.") == 4
    assert "nan" not in " ".join(page.texts)


def test_an_empty_night_after_full_ones() -> None:
    nothing = changed(night(), **dict.fromkeys(COUNTS, 0), scores=NO_SCORES)
    page = Page(tagging_report(replace(nothing, drift_previous=drift(None))))
    assert "No tags." in page.texts and "Too few tags to tell" in page.texts and "–" in page.texts


def test_a_night_that_ends_on_another_day() -> None:
    said = " ".join(Page(tagging_report(changed(night(), ended=(START + timedelta(hours=23, seconds=12)).isoformat()))).texts)
    assert "2026-11-23 02:00 – 2026-11-24 01:00 UTC · 23 h 0 min" in said
    assert "9 s" in " ".join(Page(tagging_report(changed(night(), ended=(START + timedelta(seconds=9)).isoformat()))).texts)


def test_shares_are_never_rounded_to_none_or_all() -> None:
    page = Page(tagging_report(changed(night(), **{"in": 10**6, "tagged": 10**6 - 1, "reused": 0, "rejected": 1})))
    assert page.having("svg", **{"class": "stack"})[0]["aria-label"] == (
        "Of 1,000,000 documents: tagged >99.9%, reused 0%, rejected <0.01%"
    )


def test_no_bound_to_fail_and_a_bound_never_reached() -> None:
    page = Page(tagging_report(replace(night(), drift_previous=drift(0.0), bounds=DriftConfig(warn=float("inf")))))
    assert "0.000" in page.texts and page.texts.count("warns above inf") == 2
    assert "No single label stands out." in page.texts


def test_labels_that_no_document_got_are_not_among_the_frequent() -> None:
    texts = Page(
        tagging_report(replace(night(), label_counts=np.array([90_000, 0]), drift_previous=None, drift_training=None))
    ).texts
    assert "malus" in texts and "pyrus" not in texts


COUNTS = ("in", "tagged", "reused", "rejected", "truncated", "untagged", "distinct_labels", "documents_per_second")


def sample(id: str, text: str, tags: list[tuple[str, float]]) -> dict[str, Any]:
    labels, scores = [label for label, _ in tags], [score for _, score in tags]
    return {"id": id, "text": text, "labels": labels, "names": None, "scores": scores}


def night() -> Night:
    manifest = {
        "started": START.isoformat(),
        "ended": (START + timedelta(hours=1, minutes=11)).isoformat(),
        "in": 1_250_000,
        "tagged": 1_200_000,
        "reused": 38_000,
        "rejected": 12_000,
        "truncated": 4321,
        "untagged": 3210,
        "documents_per_second": 312.5,
        "bundle": "0123456789abcdef",
        "config": {"k": 10, "min_score": 0.2, "documents": {"text": "title", "paths": ["a", "b"]}, "pool": {"max": 2}},
        "reasons": {"no text": 11_300, "duplicate id": 700},
        "scores": [10_000] * (SCORE_BINS - 1) + [810_000],
        "distinct_labels": 14_998,
    }
    return Night(
        title="dt=2026-11-23",
        manifest=manifest,
        labels=pa.table({"label": ["malus", "pyrus"], "name": ["Crab apple", None]}),
        label_counts=np.array([90_000, 45_000]),
        scores_before=[20_000] * (SCORE_BINS - 1) + [620_000],
        drift_previous=drift(0.143, 0.088, 0.021),
        drift_training=drift(0.31, 0.088, 0.021),
        bounds=DriftConfig(fail=0.25),
        samples=[sample(row, f"the {row} text", [("Crab apple", 0.93), ("Pear", 0.4)]) for row in ("first", "second", "third")],
        warnings=["the labels have drifted"],
    )


def changed(night: Night, **values: Any) -> Night:
    """The same with other values in its manifest."""
    return replace(night, manifest={**night.manifest, **values})


def night_of(text: str) -> Night:
    """The same with ``text`` wherever a catalogue, a setting or a path could put it."""
    settings = {text: text, 4 * "documents": {"text": [text]}}  # longer than any text: two settings, always
    return replace(
        changed(night(), bundle=text, config=settings, reasons={text: 5}),
        title=text,
        labels=pa.table({"label": [printable(text)] * 2, "name": [printable(text) + "!", None]}),
        samples=[sample(text, text, [(text, 0.5)])],
        warnings=[text],
    )


def printable(text: str) -> str:
    """As Arrow can hold it: what is half a letter never gets into a column of strings."""
    return text.encode("utf-8", "replace").decode()
