"""A night at a glance: one HTML page that needs nothing else, for the folder of the run.

It opens from a mail, from object storage and offline, and a catalogue's texts can do nothing in it: see `page`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from itertools import accumulate
from math import inf
from typing import Any, NamedTuple

from xmc_ray.errors import DataError
from xmc_ray.metrics.calibration import SCORE_BINS as BINS
from xmc_ray.metrics.drift import DriftConfig
from xmc_ray.reports.page import (
    Html,
    card,
    count,
    duration,
    excerpt,
    isolated,
    label,
    page,
    percent,
    rect,
    section,
    settings,
    svg,
    table,
    warnings,
)
from xmc_ray.reports.page import element as e

_BIN_NAMES = [f"{place / BINS:.2f} – {(place + 1) / BINS:.2f}" for place in range(BINS)]


_VERDICTS = {"fail": "Failed", "warn": "Worth a look", "unknown": "Too few tags to tell", "steady": "Steady"}


class LabelCount(NamedTuple):
    """A label and how many documents have it."""

    label: str
    name: str | None
    documents: int


class LabelShift(NamedTuple):
    """A label whose share of all tags has moved, and what that adds to the PSI."""

    label: str
    name: str | None
    expected: float
    actual: float
    contribution: float


class Sample(NamedTuple):
    """A document and its tags, (name, score), the best first."""

    id: str
    text: str
    tags: Sequence[tuple[str, float]]


@dataclass(frozen=True, kw_only=True)
class LabelDrift:
    """The labels of the night against others; as ``drift.psi`` and ``drift.worst`` find it."""

    total: float | None
    """PSI; None if there were too few tags to tell."""
    config: DriftConfig = field(default_factory=DriftConfig)
    """The bounds it is held to."""
    worst: Sequence[LabelShift] = ()
    """The labels that add most to it."""


@dataclass(frozen=True, kw_only=True)
class Night:
    """What is told of a tagging run. Counts are documents if nothing else is said."""

    title: str
    """Name of the run."""
    started: datetime
    ended: datetime
    documents: int
    """All that came in: tagged + reused + rejected."""
    tagged: int
    reused: int = 0
    """Whose tags were taken over from the night before."""
    rejected: int
    duplicates: int = 0
    """Of the rejected, those whose id had occurred before."""
    truncated: int = 0
    """Whose text was longer than the model reads."""
    untagged: int = 0
    """Of the tagged and reused, those without a tag above the least score."""
    documents_per_second: float
    bundle: str
    """Fingerprint of the model."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Shown in a table; mappings inside are spelt with dots."""
    rejects: Mapping[str, int] = field(default_factory=dict)
    """Documents by reason."""
    scores: Sequence[int] = (0,) * BINS
    """Tags by score, in 20 equal bins of [0, 1]."""
    scores_before: Sequence[int] | None = None
    """The same of the night before."""
    distinct_labels: int = 0
    frequent: Sequence[LabelCount] = ()
    """The most frequent labels, the most frequent first."""
    drift_previous: LabelDrift | None = None
    """Against the night before."""
    drift_training: LabelDrift | None = None
    """Against the labels of the training documents."""
    samples: Sequence[Sample] = ()
    warnings: Sequence[str] = ()

    def __post_init__(self) -> None:
        for scores in (self.scores, self.scores_before):
            if scores is not None and len(scores) != BINS:
                raise DataError("score histogram does not fit", found=f"{len(scores)} bins", expected=BINS)


def report(night: Night) -> str:
    """The page, complete with its ``<!doctype html>``; to be written in UTF-8."""
    body = e(
        "main",
        _header(night),
        warnings(night.warnings),
        _figures(night),
        section("Scores", "How sure the model was, over all tags of the night.", _scores(night)),
        section(
            "Label drift",
            "How far the labels’ shares of all tags have moved: the population stability index, rare labels pooled.",
            _drift("Against the night before", "Before", night.drift_previous),
            _drift("Against training", "Training", night.drift_training),
        ),
        section("Most frequent labels", f"Of {count(night.distinct_labels, 'label')} in use.", _frequent(night)),
        section("Rejected", "Documents that could not be tagged, by reason.", _rejects(night)),
        section("Samples", "Documents of the night with their tags.", *map(_sample, night.samples)),
        section("Settings", "What the night was run with.", settings(night.settings)),
    )
    return page(f"{night.title} · tagging report", body)


def _header(night: Night) -> Html:
    same_day = night.started.date() == night.ended.date()
    until = f"{night.ended:%H:%M %Z}" if same_day else f"{night.ended:%Y-%m-%d %H:%M %Z}"
    facts = [f"{night.started:%Y-%m-%d %H:%M} – {until}".strip(), duration(night.ended - night.started)]
    verdicts = {drift.config.verdict(drift.total) for drift in (night.drift_previous, night.drift_training) if drift}
    verdicts |= {"warn"} if night.warnings else {"steady"}
    gravest = next(verdict for verdict in _VERDICTS if verdict in verdicts)
    return e(
        "header",
        e("p", "Tagging report", class_="eyebrow"),
        e("h1", isolated(night.title), " ", _pill(gravest, steady="No warnings")),
        e("p", " · ".join(facts), " · model ", isolated(night.bundle, class_="code"), class_="lead"),
    )


def _pill(verdict: str, **other_words: str) -> Html:
    return e("span", (_VERDICTS | other_words)[verdict], class_=f"pill {verdict}")


def _figures(night: Night) -> Html:
    shares = [_share(count, night.documents) for count in (night.tagged, night.reused, night.rejected)]
    names = ("tagged", "reused", "rejected")
    spoken = ", ".join(f"{name} {percent(share)}" for name, share in zip(names, shares, strict=True))
    starts = accumulate(shares, initial=0.0)
    bar = [rect(start, 0, share, 1, name) for name, start, share in zip(names, starts, shares, strict=False)]
    untagged, truncated = _share(night.untagged, night.tagged + night.reused), _share(night.truncated, night.documents)
    figures = [
        ("Documents", night.documents, "came in"),
        ("Tagged", night.tagged, f"{percent(shares[0])} of all"),
        ("Reused", night.reused, f"{percent(shares[1])} of all"),
        ("Rejected", night.rejected, f"{night.duplicates:,} of them duplicates"),
        ("Without a tag", night.untagged, f"{percent(untagged)} have none above the least score"),
        ("Truncated", night.truncated, f"{percent(truncated)} longer than the model reads"),
        ("Speed", night.documents_per_second, "documents a second"),
        ("Labels in use", night.distinct_labels, "different ones among the tags"),
    ]
    cards = [card(name, value, note, name.lower()) for name, value, note in figures]
    return e(
        "section",
        svg(f"Of {count(night.documents, 'document')}: {spoken}", *bar, class_="stack"),
        e("dl", *cards),
    )


def _scores(night: Night) -> Html:
    """Bars of this night's shares and a stepped line of those of the night before, then a table of both."""
    now = [_share(count, sum(night.scores)) for count in night.scores]
    before = [_share(count, sum(night.scores_before or ())) for count in night.scores_before or ()]
    if not any(now):
        return e("p", "No tags.", class_="none")
    top, highest = max(*now, *before), _BIN_NAMES[now.index(max(now))]
    bars = [_bar(place, share / top) for place, share in enumerate(now)]
    steps = "".join(f"L{place} {1 - share / top:.4f}H{place + 1}" for place, share in enumerate(before))
    line = [e("path", d=f"M{steps[1:]}", class_="before")] if any(before) else []
    keys = {"This night": "now", **({"The night before": "before"} if line else {}), f"Full height {percent(top)}": "none"}
    spoken = f"Histogram of {count(sum(night.scores), 'tag')} by score, most of them in {highest}; the table below has it all"
    columns = {"Score": _BIN_NAMES, "Tags": [f"{count:,}" for count in night.scores], "Share": map(percent, now)}
    columns |= {"Before": map(percent, before)} if line else {}
    return e(
        "figure",
        e("figcaption", *(e("span", name, class_=f"key {kind}") for name, kind in keys.items())),
        svg(spoken, *bars, *line, box=f"0 0 {BINS} 1", class_="histogram"),
        e("div", *(e("span", f"{tick / 4:g}") for tick in range(5)), class_="axis", aria_hidden="true"),
        e("details", e("summary", "All figures"), table(list(columns), zip(*columns.values(), strict=True))),
    )


def _bar(place: int, height: float) -> Html:
    # A bin with few tags is to be told from an empty one.
    seen = max(height, 0.006) if height else 0
    return rect(place + 0.06, 1 - seen, 0.88, seen, "now")


def _drift(title: str, before: str, drift: LabelDrift | None) -> Html:
    if drift is None:
        return e("div", e("h3", title), e("p", "Nothing to compare with.", class_="none"), class_="card")
    bounds = {"warns": drift.config.warn, "fails": drift.config.fail}
    told = ", ".join(f"{verb} above {bound:g}" for verb, bound in bounds.items() if bound is not None)
    figure = "–" if drift.total is None else f"{drift.total:.3f}"
    verdict = drift.config.verdict(drift.total)
    marks = [bound for bound in bounds.values() if bound is not None and bound < inf]
    end = 1.25 * max(drift.total or 0, *marks, 0.01)
    shapes = [
        rect(0, 0.25, (drift.total or 0) / end, 0.5, verdict),
        *(rect(mark / end, 0, 0.004, 1, "mark") for mark in marks),
    ]
    rows = [
        [_shift(row, drift.worst), percent(row.expected), percent(row.actual), f"{row.contribution:.3f}"] for row in drift.worst
    ]
    return e(
        "div",
        e("h3", title),
        e("p", e("span", figure, class_="big"), " ", _pill(verdict), class_="psi"),
        svg(f"PSI {figure}; {told}", *shapes, class_="gauge"),
        e("p", told, class_="lead"),
        table(["Label", before, "Now", "PSI"], rows) if rows else e("p", "No single label to name.", class_="none"),
        class_="card",
    )


def _shift(row: LabelShift, rows: Sequence[LabelShift]) -> Html:
    """A label over two bars, its share before and now, to the scale of all ``rows``."""
    top = max(max(other.expected, other.actual) for other in rows) or 1
    spoken = f"from {percent(row.expected)} to {percent(row.actual)} of all tags"
    shapes = [rect(0, 0, row.expected / top, 0.4, "before"), rect(0, 0.6, row.actual / top, 0.4, "now")]
    return Html(label(row.label, row.name) + svg(spoken, *shapes, class_="pair"))


def _frequent(night: Night) -> Html:
    rows = [(label(row.label, row.name), row.documents) for row in night.frequent]
    return _ranked("Label", rows, night.tagged + night.reused)


def _rejects(night: Night) -> Html:
    return _ranked("Reason", [(isolated(reason), count) for reason, count in night.rejects.items()], night.documents)


def _ranked(what: str, rows: Sequence[tuple[Html, int]], whole: int) -> Html:
    """Counts of documents and their shares of ``whole``, with a bar under each name, to the scale of the largest."""
    top = max((n for _, n in rows), default=0)
    cells = []
    for name, n in rows:
        share = percent(_share(n, whole))
        bar = svg(f"{share} of documents", rect(0, 0, _share(n, top), 1, "now"))
        cells.append([Html(name + bar), f"{n:,}", share])
    return table([what, "Documents", "Share"], cells) if cells else Html()


def _sample(sample: Sample) -> Html:
    tags = [e("li", isolated(name), " ", e("b", f"{score:.2f}")) for name, score in sample.tags]
    shown = e("ul", *tags, class_="tags") if tags else e("p", "No tag above the least score.", class_="none")
    return e(
        "article",
        e("h3", isolated(sample.id, class_="code")),
        excerpt(sample.text),
        shown,
        class_="card",
    )


def _share(part: float, whole: float) -> float:
    return part / whole if whole else 0.0
