"""A night at a glance: one HTML page that needs nothing else, for the folder of the run.

Notable features
- No script, no font, no picture from elsewhere, and a policy in the page that forbids them: it opens from a mail, from
  object storage and offline, and a catalogue's texts can do nothing in it.
- Elements are made by ``_e``, which escapes every string that is not markup itself. There is no other way into the page.
- Charts are inline SVG with a text alternative, in colours that follow the reader's light or dark setting.
"""

import html
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from itertools import accumulate
from math import inf
from typing import Any, NamedTuple

from xmc_ray.drift import DriftConfig
from xmc_ray.errors import DataError

BINS = 20
_BIN_NAMES = [f"{place / BINS:.2f} – {(place + 1) / BINS:.2f}" for place in range(BINS)]
_EXCERPT = 600  # letters of a sample that are shown; more is read by nobody
# Neither HTML nor UTF-8 can hold these.
_UNPRINTABLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")
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


class _Html(str):
    """Markup. Any other string is text."""


def report(night: Night) -> str:
    """The page, complete with its ``<!doctype html>``; to be written in UTF-8."""
    body = _e(
        "main",
        _header(night),
        _warnings(night.warnings),
        _figures(night),
        _section("Scores", "How sure the model was, over all tags of the night.", _scores(night)),
        _section(
            "Label drift",
            "How far the labels’ shares of all tags have moved: the population stability index, rare labels pooled.",
            _drift("Against the night before", "Before", night.drift_previous),
            _drift("Against training", "Training", night.drift_training),
        ),
        _section("Most frequent labels", f"Of {_count(night.distinct_labels, 'label')} in use.", _frequent(night)),
        _section("Rejected", "Documents that could not be tagged, by reason.", _rejects(night)),
        _section("Samples", "Documents of the night with their tags.", *map(_sample, night.samples)),
        _section("Settings", "What the night was run with.", _settings(night)),
    )
    head = _e("title", f"{night.title} · tagging report") + _e("style", _Html(_CSS))
    return f'<!doctype html>\n<html lang="en">\n<head>\n{_HEAD}{head}\n</head>\n<body>\n{body}\n</body>\n</html>\n'


def _e(name: str, *children: object, **attributes: object) -> _Html:
    """An element. Underscores around and inside an attribute's name: ``class_`` is class, ``aria_label`` is aria-label."""
    given = {key.rstrip("_").replace("_", "-"): value for key, value in attributes.items() if value is not None}
    opening = "".join(f' {key}="{_escape(str(value))}"' for key, value in given.items())
    inside = "".join(child if isinstance(child, _Html) else _escape(str(child)) for child in children)
    return _Html(f"<{name}{opening}>{inside}</{name}>")


def _escape(text: str) -> str:
    return html.escape(_UNPRINTABLE.sub("\N{REPLACEMENT CHARACTER}", text))


def _text(text: str, **attributes: object) -> _Html:
    """Words from the catalogue, which may run from right to left or hold marks that turn the rest of a line around."""
    return _e("bdi", text, **attributes)


def _label(label: str, name: str | None) -> _Html:
    if not name or name == label:
        return _text(label, class_="name")
    return _Html(_text(name, class_="name") + " " + _text(label, class_="code"))


def _section(title: str, lead: str, *children: object) -> _Html:
    shown = [child for child in children if child] or [_e("p", "None.", class_="none")]
    return _e("section", _e("h2", title), _e("p", lead, class_="lead"), *shown)


def _header(night: Night) -> _Html:
    same_day = night.started.date() == night.ended.date()
    until = f"{night.ended:%H:%M %Z}" if same_day else f"{night.ended:%Y-%m-%d %H:%M %Z}"
    facts = [f"{night.started:%Y-%m-%d %H:%M} – {until}".strip(), _duration(night.ended - night.started)]
    verdicts = {drift.config.verdict(drift.total) for drift in (night.drift_previous, night.drift_training) if drift}
    verdicts |= {"warn"} if night.warnings else {"steady"}
    gravest = next(verdict for verdict in _VERDICTS if verdict in verdicts)
    return _e(
        "header",
        _e("p", "Tagging report", class_="eyebrow"),
        _e("h1", _text(night.title), " ", _pill(gravest, steady="No warnings")),
        _e("p", " · ".join(facts), " · model ", _text(night.bundle, class_="code"), class_="lead"),
    )


def _pill(verdict: str, **other_words: str) -> _Html:
    return _e("span", (_VERDICTS | other_words)[verdict], class_=f"pill {verdict}")


def _warnings(warnings: Sequence[str]) -> _Html:
    if not warnings:
        return _Html()
    return _e("aside", _e("h2", _count(len(warnings), "warning")), _e("ul", *(_e("li", _text(line)) for line in warnings)))


def _figures(night: Night) -> _Html:
    shares = [_share(count, night.documents) for count in (night.tagged, night.reused, night.rejected)]
    names = ("tagged", "reused", "rejected")
    spoken = ", ".join(f"{name} {_percent(share)}" for name, share in zip(names, shares, strict=True))
    starts = accumulate(shares, initial=0.0)
    bar = [_rect(start, 0, share, 1, name) for name, start, share in zip(names, starts, shares, strict=False)]
    untagged, truncated = _share(night.untagged, night.tagged + night.reused), _share(night.truncated, night.documents)
    figures = [
        ("Documents", night.documents, "came in"),
        ("Tagged", night.tagged, f"{_percent(shares[0])} of all"),
        ("Reused", night.reused, f"{_percent(shares[1])} of all"),
        ("Rejected", night.rejected, f"{night.duplicates:,} of them duplicates"),
        ("Without a tag", night.untagged, f"{_percent(untagged)} have none above the least score"),
        ("Truncated", night.truncated, f"{_percent(truncated)} longer than the model reads"),
        ("Speed", night.documents_per_second, "documents a second"),
        ("Labels in use", night.distinct_labels, "different ones among the tags"),
    ]
    cards = [
        _e("div", _e("dt", name), _e("dd", _number(value), class_="big"), _e("dd", note), class_=f"card {name.lower()}")
        for name, value, note in figures
    ]
    return _e("section", _svg(f"Of {_count(night.documents, 'document')}: {spoken}", *bar, class_="stack"), _e("dl", *cards))


def _scores(night: Night) -> _Html:
    """Bars of this night's shares and a stepped line of those of the night before, then a table of both."""
    now = [_share(count, sum(night.scores)) for count in night.scores]
    before = [_share(count, sum(night.scores_before or ())) for count in night.scores_before or ()]
    if not any(now):
        return _e("p", "No tags.", class_="none")
    top, highest = max(*now, *before), _BIN_NAMES[now.index(max(now))]
    bars = [_bar(place, share / top) for place, share in enumerate(now)]
    steps = "".join(f"L{place} {1 - share / top:.4f}H{place + 1}" for place, share in enumerate(before))
    line = [_e("path", d=f"M{steps[1:]}", class_="before")] if any(before) else []
    keys = {"This night": "now", **({"The night before": "before"} if line else {}), f"Full height {_percent(top)}": "none"}
    spoken = f"Histogram of {_count(sum(night.scores), 'tag')} by score, most of them in {highest}; the table below has it all"
    columns = {"Score": _BIN_NAMES, "Tags": [f"{count:,}" for count in night.scores], "Share": map(_percent, now)}
    columns |= {"Before": map(_percent, before)} if line else {}
    return _e(
        "figure",
        _e("figcaption", *(_e("span", name, class_=f"key {kind}") for name, kind in keys.items())),
        _svg(spoken, *bars, *line, box=f"0 0 {BINS} 1", class_="histogram"),
        _e("div", *(_e("span", f"{tick / 4:g}") for tick in range(5)), class_="axis", aria_hidden="true"),
        _e("details", _e("summary", "All figures"), _table(list(columns), zip(*columns.values(), strict=True))),
    )


def _bar(place: int, height: float) -> _Html:
    # A bin with few tags is to be told from an empty one.
    seen = max(height, 0.006) if height else 0
    return _rect(place + 0.06, 1 - seen, 0.88, seen, "now")


def _drift(title: str, before: str, drift: LabelDrift | None) -> _Html:
    if drift is None:
        return _e("div", _e("h3", title), _e("p", "Nothing to compare with.", class_="none"), class_="card")
    bounds = {"warns": drift.config.warn, "fails": drift.config.fail}
    told = ", ".join(f"{verb} above {bound:g}" for verb, bound in bounds.items() if bound is not None)
    figure = "–" if drift.total is None else f"{drift.total:.3f}"
    verdict = drift.config.verdict(drift.total)
    marks = [bound for bound in bounds.values() if bound is not None and bound < inf]
    end = 1.25 * max(drift.total or 0, *marks, 0.01)
    shapes = [
        _rect(0, 0.25, (drift.total or 0) / end, 0.5, verdict),
        *(_rect(mark / end, 0, 0.004, 1, "mark") for mark in marks),
    ]
    rows = [
        [_shift(row, drift.worst), _percent(row.expected), _percent(row.actual), f"{row.contribution:.3f}"]
        for row in drift.worst
    ]
    return _e(
        "div",
        _e("h3", title),
        _e("p", _e("span", figure, class_="big"), " ", _pill(verdict), class_="psi"),
        _svg(f"PSI {figure}; {told}", *shapes, class_="gauge"),
        _e("p", told, class_="lead"),
        _table(["Label", before, "Now", "PSI"], rows) if rows else _e("p", "No single label to name.", class_="none"),
        class_="card",
    )


def _shift(row: LabelShift, rows: Sequence[LabelShift]) -> _Html:
    """A label over two bars, its share before and now, to the scale of all ``rows``."""
    top = max(max(other.expected, other.actual) for other in rows) or 1
    spoken = f"from {_percent(row.expected)} to {_percent(row.actual)} of all tags"
    shapes = [_rect(0, 0, row.expected / top, 0.4, "before"), _rect(0, 0.6, row.actual / top, 0.4, "now")]
    return _Html(_label(row.label, row.name) + _svg(spoken, *shapes, class_="pair"))


def _frequent(night: Night) -> _Html:
    rows = [(_label(row.label, row.name), row.documents) for row in night.frequent]
    return _ranked("Label", rows, night.tagged + night.reused)


def _rejects(night: Night) -> _Html:
    return _ranked("Reason", [(_text(reason), count) for reason, count in night.rejects.items()], night.documents)


def _ranked(what: str, rows: Sequence[tuple[_Html, int]], whole: int) -> _Html:
    """Counts of documents and their shares of ``whole``, with a bar under each name, to the scale of the largest."""
    top = max((count for _, count in rows), default=0)
    cells = []
    for name, count in rows:
        share = _percent(_share(count, whole))
        bar = _svg(f"{share} of documents", _rect(0, 0, _share(count, top), 1, "now"))
        cells.append([_Html(name + bar), f"{count:,}", share])
    return _table([what, "Documents", "Share"], cells) if cells else _Html()


def _sample(sample: Sample) -> _Html:
    text = sample.text if len(sample.text) <= _EXCERPT else sample.text[:_EXCERPT] + "…"
    tags = [_e("li", _text(name), " ", _e("b", f"{score:.2f}")) for name, score in sample.tags]
    shown = _e("ul", *tags, class_="tags") if tags else _e("p", "No tag above the least score.", class_="none")
    return _e("article", _e("h3", _text(sample.id, class_="code")), _e("p", text, dir="auto"), shown, class_="card")


def _settings(night: Night) -> _Html:
    rows = [[_text(name, class_="code"), _text(_words(value))] for name, value in _flat(night.settings)]
    return _table(["Setting", "Value"], rows, class_="words") if rows else _Html()


def _flat(settings: Mapping[str, Any], above: str = "") -> Iterable[tuple[str, Any]]:
    for name, value in settings.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{above}{name}.")
        else:
            yield f"{above}{name}", value


def _words(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _table(head: Sequence[str], rows: Iterable[Sequence[object]], **attributes: object) -> _Html:
    columns = _e("thead", _e("tr", *(_e("th", name, scope="col") for name in head)))
    return _e("table", columns, _e("tbody", *(_e("tr", *(_e("td", cell) for cell in row)) for row in rows)), **attributes)


def _svg(spoken: str, *shapes: _Html, box: str = "0 0 1 1", class_: str = "line") -> _Html:
    return _e("svg", *shapes, viewBox=box, preserveAspectRatio="none", role="img", aria_label=spoken, class_=class_)


def _rect(x: float, y: float, width: float, height: float, class_: str) -> _Html:
    return _e("rect", x=f"{x:.4f}", y=f"{y:g}", width=f"{max(width, 0):.4f}", height=f"{height:g}", class_=class_)


def _share(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


def _percent(share: float) -> str:
    """Never 0% of something or 100% of not all."""
    if 0 < share < 0.0001:
        return "<0.01%"
    if 0.9995 <= share < 1:
        return ">99.9%"
    return f"{100 * share:.{2 if 0 < share < 0.1 else 1}f}%" if share not in (0, 1) else f"{share:.0%}"


def _number(value: float) -> str:
    return f"{value:,.1f}" if value % 1 else f"{value:,.0f}"


def _count(n: int, what: str) -> str:
    return f"{n:,} {what}{'' if n == 1 else 's'}"


def _duration(time: timedelta) -> str:
    minutes, seconds = divmod(round(time.total_seconds()), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s" if minutes else f"{seconds} s"


_HEAD = """\
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
"""
_CSS = """
:root { color-scheme: light dark; --page: #f6f6f4; --card: #fff; --ink: #1b1c20; --soft: #5f6270; --line: #e3e3df;
  --now: #4253d6; --before: #8b8e9c; --track: #ecece8; --good: #1c7c4a; --warn: #965a00; --bad: #b3261e; --reused: #93a0f0; }
@media (prefers-color-scheme: dark) { :root {
  --page: #131418; --card: #1c1e24; --ink: #eceef3; --soft: #a0a4b3;
  --line: #2d3039; --now: #8b9bff; --before: #6a6e7e; --track: #282b33; --good: #62c992; --warn: #e9b050; --bad: #ff8a80;
  --reused: #4e5aa8; } }
* { box-sizing: border-box; margin: 0; }
body { background: var(--page); color: var(--ink); font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif;
  overflow-wrap: anywhere; -webkit-text-size-adjust: 100%; }
main { max-width: 60rem; margin: 0 auto; padding: clamp(1.5rem, 5vw, 4rem) clamp(1rem, 4vw, 2rem); }
section { margin-top: 3.5rem; }
h1 { font-size: clamp(1.75rem, 5vw, 2.75rem); line-height: 1.15; letter-spacing: -.025em; text-wrap: balance; }
h2 { font-size: 1.3rem; line-height: 1.3; letter-spacing: -.015em; }
h3 { font-size: 1rem; }
.eyebrow { color: var(--now); font-size: .8rem; font-weight: 600; letter-spacing: .08em; text-transform: uppercase; }
.lead, .none, dt, dd, .axis, figcaption, summary { color: var(--soft); font-size: .9rem; }
h2 + .lead { margin-bottom: 1rem; }
.code { color: var(--soft); font: .85em ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
.big { color: var(--ink); font-size: 1.7rem; font-weight: 650; line-height: 1.25; letter-spacing: -.02em; }
.big, td, b { font-variant-numeric: tabular-nums; }
.card, aside { background: var(--card); border: 1px solid var(--line); border-radius: 14px; padding: 1.1rem 1.25rem; }
section > .card + .card { margin-top: 1rem; }
.pill { display: inline-block; padding: .2rem .7rem; border: 1px solid; border-radius: 99px; font-size: .8rem; font-weight: 600;
  line-height: 1.4; letter-spacing: 0; vertical-align: middle; color: var(--soft); }
.pill.steady { color: var(--good); } .pill.warn { color: var(--warn); } .pill.fail { color: var(--bad); }
aside { border-left: 5px solid var(--warn); margin-top: 2rem; } aside h2 { font-size: 1rem; } aside ul { padding-left: 1.1rem; }
dl { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(12.5rem, 44%), 1fr)); gap: .75rem; margin-top: .75rem; }
svg { display: block; width: 100%; height: 6px; margin: .35rem 0 .1rem; border-radius: 3px; background: var(--track); }
svg.stack { height: 14px; border-radius: 7px; } svg.gauge { height: 18px; } svg.pair { height: 9px; background: none; }
svg.histogram { height: clamp(9rem, 28vw, 14rem); border-radius: 0; border-bottom: 1px solid var(--line); background: none; }
svg.histogram .before { fill: none; stroke: var(--ink); stroke-width: 1.5; vector-effect: non-scaling-stroke; opacity: .65; }
.now, .tagged { fill: var(--now); } .before { fill: var(--before); } .reused { fill: var(--reused); }
.rejected, rect.fail { fill: var(--bad); } rect.steady { fill: var(--good); } rect.warn { fill: var(--warn); }
.mark { fill: var(--ink); }
figure, .axis, figcaption { margin: 0; } .axis { display: flex; justify-content: space-between; }
figcaption { display: flex; flex-wrap: wrap; gap: .25rem 1.25rem; }
.key.now::before, .key.before::before { content: ""; display: inline-block; width: .8rem; height: .8rem; margin-right: .4rem;
  border-radius: 3px; background: var(--now); vertical-align: -.06rem; }
.key.before::before { height: 0; border-top: 2px solid var(--ink); border-radius: 0; background: none; vertical-align: .25rem; }
:is(.tagged, .reused, .rejected) dt::before { content: ""; display: inline-block; width: .65rem; height: .65rem;
  margin-right: .4rem; border-radius: 50%; background: var(--now); }
.reused dt::before { background: var(--reused); } .rejected dt::before { background: var(--bad); }
summary { cursor: pointer; margin-top: .75rem; }
table { width: 100%; margin-top: .75rem; border-collapse: collapse; font-size: .95rem; }
th { color: var(--soft); font-size: .8rem; font-weight: 600; text-align: left; }
th, td { padding: .5rem 0 .5rem 1rem; border-bottom: 1px solid var(--line); vertical-align: top; }
th:first-child, td:first-child { padding-left: 0; } tr:last-child td { border-bottom: 0; }
table:not(.words) :is(th, td):not(:first-child) { width: 1%; text-align: right; white-space: nowrap; }
.words td:first-child { width: 40%; } article p { margin: .25rem 0 .6rem; } .psi { margin-top: .25rem; }
.tags { display: flex; flex-wrap: wrap; gap: .4rem; padding: 0; list-style: none; }
.tags li { padding: .15rem .65rem; border-radius: 99px; background: var(--track); font-size: .85rem; }
.tags b { margin-left: .25rem; color: var(--now); font-weight: 600; }
@media (max-width: 30rem) { th, td { padding-left: .6rem; } .big { font-size: 1.4rem; } .card { padding: .9rem 1rem; } }
"""
