"""The makings of a page that needs nothing else: elements, tables, charts, numbers in words.

Notable features
- `element` escapes every string that is not markup itself. There is no other way into the page.
- No script, no font, no picture from elsewhere, and a policy in the page that forbids them.
- Charts are inline SVG with a text alternative, in colours that follow the reader's light or dark setting.
"""

import html
from collections.abc import Iterable, Mapping, Sequence
from datetime import timedelta
from typing import Any

from xmc_ray.errors import printable

_EXCERPT = 600  # letters of a document


class Html(str):
    """Markup. Any other string is text."""


def page(title: str, body: "Html") -> str:
    """All of it, from ``<!doctype html>`` on; to be written in UTF-8."""
    head = element("title", title) + element("style", Html(_CSS))
    return f'<!doctype html>\n<html lang="en">\n<head>\n{_HEAD}{head}\n</head>\n<body>\n{body}\n</body>\n</html>\n'


def element(name: str, *children: object, **attributes: object) -> Html:
    """An element. Underscores around and inside an attribute's name: ``class_`` is class, ``aria_label`` is aria-label."""
    given = {key.rstrip("_").replace("_", "-"): value for key, value in attributes.items() if value is not None}
    opening = "".join(f' {key}="{_escape(str(value))}"' for key, value in given.items())
    inside = "".join(child if isinstance(child, Html) else _escape(str(child)) for child in children)
    return Html(f"<{name}{opening}>{inside}</{name}>")


def _escape(text: str) -> str:
    return html.escape(printable(text))


def isolated(text: str, **attributes: object) -> Html:
    """Words from the catalogue, which may run from right to left or hold marks that turn the rest of a line around."""
    return element("bdi", text, **attributes)


def table(head: Sequence[str], rows: Iterable[Sequence[object]], **attributes: object) -> Html:
    """Rows of cells under the names of their columns."""
    columns = element("thead", element("tr", *(element("th", name, scope="col") for name in head)))
    return element(
        "table",
        columns,
        element("tbody", *(element("tr", *(element("td", cell) for cell in row)) for row in rows)),
        **attributes,
    )


def section(title: str, lead: str, *children: object) -> Html:
    """A part of the page under its heading; says that there is none where no child is anything."""
    shown = [child for child in children if child] or [element("p", "None.", class_="none")]
    return element("section", element("h2", title), element("p", lead, class_="lead"), *shown)


def label(identifier: str, name: str | None) -> Html:
    """What people call a label, and what it is called in the data where that differs."""
    if not name or name == identifier:
        return isolated(identifier, class_="name")
    return Html(isolated(name, class_="name") + " " + isolated(identifier, class_="code"))


def card(name: str, value: float | str, note: str, class_: str = "") -> Html:
    """A figure in large print, for a ``dl``."""
    big = value if isinstance(value, str) else number(value)
    return element(
        "div",
        element("dt", name),
        element("dd", big, class_="big"),
        element("dd", note),
        class_=f"card {class_}".rstrip(),
    )


def warnings(lines: Sequence[str]) -> Html:
    """What the reader has to know first, if anything."""
    if not lines:
        return Html()
    told = element("ul", *(element("li", isolated(line)) for line in lines))
    return element("aside", element("h2", count(len(lines), "warning")), told)


def settings(values: Mapping[str, Any]) -> Html:
    """A table of settings; mappings inside are spelt with dots."""
    rows = [[isolated(name, class_="code"), isolated(_words(value))] for name, value in _flat(values)]
    return table(["Setting", "Value"], rows, class_="words") if rows else Html()


def _flat(values: Mapping[str, Any], above: str = "") -> Iterable[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{above}{name}.")
        else:
            yield f"{above}{name}", value


def _words(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def excerpt(text: str) -> Html:
    """The beginning of a document; more is read by nobody."""
    return element("p", text if len(text) <= _EXCERPT else text[:_EXCERPT] + "…", dir="auto")


def svg(spoken: str, *shapes: Html, box: str = "0 0 1 1", class_: str = "line") -> Html:
    """A chart; ``spoken`` says the same in words."""
    return element("svg", *shapes, viewBox=box, preserveAspectRatio="none", role="img", aria_label=spoken, class_=class_)


def rect(x: float, y: float, width: float, height: float, class_: str) -> Html:
    """A box in a chart."""
    return element("rect", x=f"{x:.4f}", y=f"{y:g}", width=f"{max(width, 0):.4f}", height=f"{height:g}", class_=class_)


def percent(share: float) -> str:
    """Never 0% of something or 100% of not all."""
    if 0 < share < 0.0001:
        return "<0.01%"
    if 0.9995 <= share < 1:
        return ">99.9%"
    return f"{100 * share:.{2 if 0 < share < 0.1 else 1}f}%" if share not in (0, 1) else f"{share:.0%}"


def number(value: float) -> str:
    """With separators of thousands, and one digit behind the point if there is anything."""
    return f"{value:,.1f}" if value % 1 else f"{value:,.0f}"


def count(n: int, what: str) -> str:
    """A number of things."""
    return f"{n:,} {what}{'' if n == 1 else 's'}"


def duration(time: timedelta) -> str:
    """Hours and minutes, or minutes and seconds."""
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
svg.chart { height: clamp(9rem, 26vw, 13rem); border-radius: 0; border-bottom: 1px solid var(--line); background: none; }
svg.chart path { fill: none; stroke-width: 2; stroke-linecap: round; vector-effect: non-scaling-stroke; }
.wide { overflow-x: auto; }
svg.square { height: auto; aspect-ratio: 1; border: 1px solid var(--line); } .square { max-width: 26rem; }
path.first { stroke: var(--now); } path.second { stroke: var(--good); } path.third { stroke: var(--warn); }
path.fourth { stroke: var(--bad); } path.ideal { stroke: var(--soft); stroke-dasharray: 4 4; }
figure, .axis, figcaption { margin: 0; } .axis { display: flex; justify-content: space-between; }
figcaption { display: flex; flex-wrap: wrap; gap: .25rem 1.25rem; }
.key.now::before, .key.before::before { content: ""; display: inline-block; width: .8rem; height: .8rem; margin-right: .4rem;
  border-radius: 3px; background: var(--now); vertical-align: -.06rem; }
.key.before::before { height: 0; border-top: 2px solid var(--ink); border-radius: 0; background: none; vertical-align: .25rem; }
:is(.first, .second, .third, .fourth).key::before { content: ""; display: inline-block; width: .8rem; height: .2rem;
  margin-right: .4rem; vertical-align: .2rem; background: var(--now); }
.second.key::before { background: var(--good); } .third.key::before { background: var(--warn); }
.fourth.key::before { background: var(--bad); }
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
.tags li.right { outline: 1.5px solid var(--good); } .tags li.wrong { outline: 1.5px dashed var(--bad); }
.tags b { margin-left: .25rem; color: var(--now); font-weight: 600; }
@media (max-width: 30rem) { th, td { padding-left: .6rem; } .big { font-size: 1.4rem; } .card { padding: .9rem 1rem; } }
"""
