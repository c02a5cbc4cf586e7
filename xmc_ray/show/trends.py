"""Nights over time: the figures of each, as charts."""

import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import date
from functools import lru_cache
from typing import NamedTuple, TypeVar

from xmc_ray.reports.charts import Chart, curves, percent_tick
from xmc_ray.reports.curves import Points
from xmc_ray.reports.render import share
from xmc_ray.show.night import Night, count, drift, seconds

_DRAWING = threading.Lock()  # matplotlib's settings are those of the process
_CHARTS = 256  # drawings that are kept

T = TypeVar("T")
Series = tuple[tuple[str, tuple[tuple[int, float], ...]], ...]


class Trend(NamedTuple):
    """A chart of some figures over the days, and what it shows."""

    title: str
    lead: str
    chart: Chart | None


def trends(nights: Sequence[Night], precision: Mapping[str, float]) -> list[Trend]:
    """The charts of finished nights; ``precision``: live precision by day, where editors have judged tags."""
    shown = [night for night in nights if night.state == "finished"]

    def figures(name: str) -> Points:
        return points((night.day, count(night.manifest, name)) for night in shown)

    def shares(name: str) -> Points:
        return points((night.day, _share(night, name)) for night in shown)

    volume = {"read": figures("in"), "tagged": figures("tagged"), "reused": figures("reused")}
    failed = {"rejected": shares("rejected"), "without a tag": shares("untagged")}
    drifts = {
        f"against {name}": points((night.day, drift(night.manifest, since)) for night in shown)
        for name, since in (("training", "training"), ("the night before", "previous"))
    }
    minutes = {"minutes": points((night.day, (seconds(night.manifest) or 0.0) / 60) for night in shown)}
    live = {"accepted": points(precision.items())}
    return [
        Trend("Volume", "Documents of each night.", over_days(volume, "documents")),
        Trend("Rejected, or without a tag", "Shares of all documents.", over_days(failed, "share", in_percent=True)),
        Trend("Label drift", "Population stability index; 0.1 is worth a look.", over_days(drifts, "PSI")),
        Trend("Time", "From the start of a night to its end.", over_days(minutes, "minutes")),
        Trend(
            "Live precision",
            "Tags that editors have accepted, of those they have judged.",
            over_days(live, "share", in_percent=True),
        ),
    ]


def over_days(series: Mapping[str, Points], y_label: str, in_percent: bool = False) -> Chart | None:
    """Curves over days, whose points are (ordinal of a date, value); drawn once for the same figures."""
    return _drawn(tuple((name, tuple(points)) for name, points in series.items() if points), y_label, in_percent)


def alone(draw: Callable[[], T]) -> T:
    """What ``draw`` returns, one drawing at a time."""
    with _DRAWING:
        return draw()


@lru_cache(_CHARTS)
def _drawn(series: Series, y_label: str, in_percent: bool) -> Chart | None:
    shown = {name: list(values) for name, values in series}
    tick = percent_tick if in_percent else "{:,.4g}".format
    with _DRAWING:
        return curves(shown, y_label, tick, "day", _day, from_zero=True)


def _day(ordinal: int) -> str:
    return date.fromordinal(max(1, ordinal)).strftime("%d %b").lstrip("0")


def _share(night: Night, name: str) -> float | None:
    part, whole = count(night.manifest, name), count(night.manifest, "in")
    return None if part is None or whole is None else share(part, whole)


def points(values: Iterable[tuple[str, float | None]]) -> Points:
    """From values by day, YYYY-MM-DD; days without one are left out."""
    return [(date.fromisoformat(day).toordinal(), value) for day, value in values if value is not None]
