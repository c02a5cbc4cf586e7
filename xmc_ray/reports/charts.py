"""Charts of a training run as figures of a page: curves over steps, and scores against the share of them that are right.

Each has its words for those who do not see it, and a table of its figures.
"""

from collections.abc import Mapping, Sequence

from xmc_ray.metrics.calibration import BINS, Reliability
from xmc_ray.reports.curves import Points
from xmc_ray.reports.page import Html, percent, svg, table
from xmc_ray.reports.page import element as e

_KINDS = ("first", "second", "third", "fourth")  # as the page's styles colour them


_POINTS = 300  # of a curve that are drawn


_ROWS = 40  # of a curve that are written down


def curves(series: Mapping[str, Points]) -> Html:
    """Up to four figures over steps, to one scale; nothing where there are no points."""
    told = {name: points for name, points in series.items() if points}
    if not told:
        return Html()
    values = [value for points in told.values() for _, value in points]
    steps = [step for points in told.values() for step, _ in points]
    low, high, first, last = min(values), max(values), min(steps), max(steps)

    def place(point: tuple[int, float]) -> tuple[float, float]:
        return (point[0] - first) / max(last - first, 1), 1 - (point[1] - low) / ((high - low) or 1)

    spoken = "; ".join(f"{name} from {points[0][1]:.4g} to {points[-1][1]:.4g}" for name, points in told.items())
    paths = [
        _path([place(point) for point in thinned(points, _POINTS)], kind)
        for points, kind in zip(told.values(), _KINDS, strict=False)
    ]
    return e(
        "figure",
        _keys(list(told), f"Height {low:.4g} to {high:.4g}"),
        svg(f"{spoken}, over steps {first:,} to {last:,}", *paths, class_="chart"),
        _axis([f"step {first:,}", f"{last:,}"]),
        e("details", e("summary", "Figures"), _figures(told)),
    )


def reliability(kinds: Mapping[str, Reliability]) -> Html:
    """The mean score of a bin across, the share of its tags that are right upwards; the dashed line is where both agree."""
    told = {name: found for name, found in kinds.items() if found.result() is not None}
    if not told:
        return Html()
    paths, rows = [], []
    for (name, found), kind in zip(told.items(), _KINDS, strict=False):
        tags, told_by, right = found.sums.tolist()
        bins = [place for place in range(BINS) if tags[place]]
        means = [told_by[place] / tags[place] for place in bins]
        shares = [right[place] / tags[place] for place in bins]
        paths.append(_path([(mean, 1 - share) for mean, share in zip(means, shares, strict=True)], kind))
        rows += [
            [
                f"{name}, {place / BINS:.2f} – {(place + 1) / BINS:.2f}",
                f"{tags[place]:,.0f}",
                f"{mean:.3f}",
                percent(share),
            ]
            for place, mean, share in zip(bins, means, shares, strict=True)
        ]
    errors = ", ".join(f"{name} {found.result():.4f}" for name, found in told.items())
    return e(
        "figure",
        _keys(list(told), f"Expected calibration error: {errors}"),
        svg(
            f"Share of right tags by score; expected calibration error {errors}; the table below has it all",
            e("path", d="M0 1L1 0", class_="ideal"),
            *paths,
            class_="chart square",
        ),
        _axis([f"{tick / 4:g}" for tick in range(5)], class_="axis square"),
        e("details", e("summary", "Figures"), table(["Scores", "Tags", "Mean score", "Right"], rows)),
    )


def thinned(points: Points, n: int) -> Points:
    """At most ``n`` of the points, evenly, the first and the last among them."""
    if len(points) <= n:
        return points
    return [points[round(place * (len(points) - 1) / (n - 1))] for place in range(n)]


def _path(places: Sequence[tuple[float, float]], kind: str) -> Html:
    # The stroke of no length makes a dot of a single point.
    return e("path", d="M" + "L".join(f"{x:.4f} {y:.4f}" for x, y in places) + "h0", class_=kind)


def _keys(names: list[str], note: str) -> Html:
    keys = [e("span", name, class_=f"key {kind}") for name, kind in zip(names, _KINDS, strict=False)]
    return e("figcaption", *keys, e("span", note))


def _axis(ticks: list[str], class_: str = "axis") -> Html:
    return e("div", *(e("span", tick) for tick in ticks), class_=class_, aria_hidden="true")


def _figures(told: Mapping[str, Points]) -> Html:
    values = {name: dict(points) for name, points in told.items()}
    steps = sorted({step for points in told.values() for step, _ in thinned(points, _ROWS)})
    rows = [[f"{step:,}", *(f"{at[step]:.4g}" if step in at else "–" for at in values.values())] for step in steps]
    return table(["Step", *values], rows)
