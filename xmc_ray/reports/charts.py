"""Charts as inline SVG: curves over steps, the reliability of scores, and their histogram.

matplotlib draws, and of its drawing only shapes and texts are kept, each shape with a class: report.css colours them, light or
dark, and nothing in a page has an id or refers to anything. Every chart has a text alternative and a table of its figures.
"""

import io
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING
from xml.etree import ElementTree

from markupsafe import Markup

from xmc_ray.metrics.calibration import BINS, SCORE_BINS, Reliability
from xmc_ray.reports.curves import Points
from xmc_ray.reports.render import count, percent, share

if TYPE_CHECKING:  # matplotlib takes most of a second to import: only charts that are drawn pay for it
    from matplotlib.axes import Axes

_SERIES = ("first", "second", "third", "fourth")  # classes in report.css
_CLASSES = {*_SERIES, "ideal", "now", "before", "axis"}
_SIZES = {"chart broad": (880, 280), "chart narrow": (400, 260)}  # report.css shows the one that fits the screen
_SQUARE = {"chart square": (400, 400)}
_DRAWN_POINTS = 300  # of a curve
_TABLE_ROWS = 40
_NAMESPACE = "{http://www.w3.org/2000/svg}"


@dataclass(frozen=True, kw_only=True)
class Chart:
    """A drawing with its legend, ``keys``: (name, class), and its figures as a table."""

    keys: Sequence[tuple[str, str]]
    note: str = ""
    drawing: Markup
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


def curves(
    series: Mapping[str, Points],
    y_label: str,
    tick: Callable[[float], str] = "{:.4g}".format,
    x_label: str = "step",
    x_tick: Callable[[int], str] = "{:,}".format,
    from_zero: bool = False,
) -> Chart | None:
    """Up to four curves over steps, on one scale whose ticks are written by ``tick``; None if there are no points.

    With another ``x_label``, such as day, steps are whatever ``x_tick`` writes of them.
    """
    shown = {name: points for name, points in series.items() if points}
    if not shown:
        return None
    steps = [step for points in shown.values() for step, _ in points]
    changes = "; ".join(f"{name} from {points[0][1]:.4g} to {points[-1][1]:.4g}" for name, points in shown.items())

    def plot(axes: "Axes") -> None:
        for points, kind in zip(shown.values(), _SERIES, strict=False):
            x, y = zip(*thinned(points, _DRAWN_POINTS), strict=True)
            axes.plot(*((x * 2, y * 2) if len(x) == 1 else (x, y)), gid=kind)  # a line of no length is drawn as a dot
        axes.margins(x=0.01)
        axes.xaxis.set_major_formatter(lambda step, _: x_tick(round(step)))
        axes.yaxis.set_major_formatter(lambda value, _: tick(value))
        axes.set(xlabel=x_label, ylabel=y_label)
        if from_zero:  # so that a small change does not look like a large one
            axes.set_ylim(bottom=0)

    return Chart(
        keys=list(zip(shown, _SERIES, strict=False)),
        drawing=_draw(plot, f"{changes}, over {x_label}s {x_tick(min(steps))} to {x_tick(max(steps))}", _SIZES, whole_x=True),
        columns=[x_label.capitalize(), *shown],
        rows=_rows(shown, x_tick),
    )


def reliability(kinds: Mapping[str, Reliability]) -> Chart | None:
    """Share of right tags over mean score, bin by bin, for each kind of scores; None if nothing was counted."""
    shown = {name: sums for name, sums in kinds.items() if sums.result() is not None}
    if not shown:
        return None
    lines, rows = [], []
    for name, kind in shown.items():
        bins = [(number, *sums) for number, sums in enumerate(kind.sums.T.tolist()) if sums[0]]
        lines.append([(scores / tags, right / tags) for _, tags, scores, right in bins])
        rows += [
            [f"{name}, {number / BINS:.2f} – {(number + 1) / BINS:.2f}", f"{tags:,.0f}", f"{mean:.3f}", percent(right)]
            for (number, tags, *_), (mean, right) in zip(bins, lines[-1], strict=True)
        ]
    errors = ", ".join(f"{name} {kind.result():.4f}" for name, kind in shown.items())

    def plot(axes: "Axes") -> None:
        axes.plot([0, 1], [0, 1], gid="ideal")
        for line, kind in zip(lines, _SERIES, strict=False):
            axes.plot(*zip(*(line * 2 if len(line) == 1 else line), strict=True), gid=kind)
        axes.set(xlabel="mean score", ylabel="share of tags that are right", xlim=(0, 1), ylim=(0, 1))

    spoken = f"Share of right tags by score; expected calibration error {errors}; the table below has all figures"
    return Chart(
        keys=list(zip(shown, _SERIES, strict=False)),
        note=f"Expected calibration error: {errors}",
        drawing=_draw(plot, spoken, _SQUARE),
        columns=["Scores", "Tags", "Mean score", "Right"],
        rows=rows,
    )


def histogram(scores: Sequence[int], scores_before: Sequence[int] | None) -> Chart | None:
    """Shares of tags in equal bins of [0, 1] as bars, those of the night before as a stepped line; None without tags."""
    shares = [share(n, sum(scores)) for n in scores]
    before = [share(n, sum(scores_before)) for n in scores_before] if scores_before and any(scores_before) else None
    if not any(shares):
        return None
    edges = [number / SCORE_BINS for number in range(SCORE_BINS + 1)]
    names = [f"{low:.2f} – {high:.2f}" for low, high in pairwise(edges)]
    top = max(*shares, *(before or ()))

    def plot(axes: "Axes") -> None:
        seen = [max(part, 0.006 * top) if part else 0.0 for part in shares]  # a bin with few tags does not look empty
        axes.bar([low + 0.5 / SCORE_BINS for low in edges[:-1]], seen, 0.88 / SCORE_BINS, gid="now")
        if before:
            axes.stairs(before, edges, gid="before")
        axes.yaxis.set_major_formatter(lambda part, _: f"{100 * part:.4g}%")
        axes.set(xlabel="score", ylabel="share of all tags", xlim=(0, 1))

    columns = {"Score": names, "Tags": [f"{n:,}" for n in scores], "Share": [percent(part) for part in shares]}
    columns |= {"Before": [percent(part) for part in before]} if before else {}
    most = names[shares.index(max(shares))]
    spoken = f"Histogram of {count(sum(scores), 'tag')} by score, most of them in {most}; the table below has all figures"
    return Chart(
        keys=[("This night", "now"), *([("The night before", "before")] if before else [])],
        drawing=_draw(plot, spoken, _SIZES),
        columns=list(columns),
        rows=list(zip(*columns.values(), strict=True)),
    )


def percent_tick(share: float) -> str:
    """A share of 1 as a tick in percent."""
    return f"{100 * share:.4g}%"


def thinned(points: Points, n: int) -> Points:
    """At most ``n`` of the points, evenly spaced, including the first and the last."""
    if len(points) <= n:
        return points
    return [points[round(number * (len(points) - 1) / (n - 1))] for number in range(n)]


def _rows(series: Mapping[str, Points], x_tick: Callable[[int], str]) -> list[list[str]]:
    values = [dict(points) for points in series.values()]
    steps = sorted({step for points in series.values() for step, _ in thinned(points, _TABLE_ROWS)})
    return [[x_tick(step), *(f"{at[step]:.4g}" if step in at else "–" for at in values)] for step in steps]


def _draw(plot: Callable[["Axes"], None], spoken: str, sizes: Mapping[str, tuple[int, int]], whole_x: bool = False) -> Markup:
    """The chart at each size, one after the other, by the classes of their elements."""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    drawings = []
    for class_, (width, height) in sizes.items():
        with matplotlib.rc_context():  # neither obeys a matplotlibrc nor changes the process' settings
            matplotlib.rcdefaults()
            matplotlib.rcParams.update({"svg.fonttype": "none", "font.size": 12})
            figure = Figure(figsize=(width / 72, height / 72), layout="constrained")  # SVG has 72 units per inch
            axes = figure.add_subplot()
            axes.grid(axis="y")
            axes.set_axisbelow(True)
            axes.tick_params(length=0, pad=6)
            axes.spines["bottom"].set_gid("axis")
            axes.xaxis.set_major_locator(MaxNLocator(width // 80, integer=whole_x))
            axes.yaxis.set_major_locator(MaxNLocator(5))
            plot(axes)
            buffer = io.BytesIO()
            figure.savefig(buffer, format="svg")
        attributes = {"class": class_, "viewBox": f"0 0 {width} {height}", "role": "img", "aria-label": spoken}
        drawing = ElementTree.Element("svg", attributes)
        drawing.extend(_shapes(ElementTree.fromstring(buffer.getvalue())))
        drawings.append(ElementTree.tostring(drawing, encoding="unicode"))
    return Markup("\n".join(drawings))


def _shapes(drawing: ElementTree.Element, class_: str = "") -> Iterator[ElementTree.Element]:
    """The texts, and the paths of artists and grid lines that have a class, without matplotlib's own style."""
    for child in drawing:
        kind, name = child.tag.removeprefix(_NAMESPACE), child.get("id", "")
        if kind == "g":
            yield from _shapes(child, name if name in _CLASSES else "grid" if name.startswith("ytick") else class_)
        elif kind == "path" and class_:
            path = re.sub(r"(\.\d)\d+", r"\1", " ".join(child.get("d", "").split()))
            yield ElementTree.Element("path", {"class": class_, "d": path})
        elif kind == "text":
            anchor = re.search(r"text-anchor: (\w+)", child.get("style", ""))
            attributes = {name: child.get(name, "") for name in ("x", "y", "transform")}
            text = ElementTree.Element("text", attributes | {"text-anchor": anchor[1] if anchor else "start"})
            text.text = child.text
            yield text
