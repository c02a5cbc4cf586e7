"""Renders the Jinja2 templates of this package into self-contained pages, and formats their numbers.

Notable features
- Autoescaping is always on, an undefined name is an error, and `printable` replaces what HTML cannot hold.
- Pages have no script, font or picture from elsewhere, and a content security policy that forbids them.
- Text from a catalogue is put in ``<bdi>`` or under ``dir="auto"``: right-to-left text cannot reorder its surroundings.
"""

from collections.abc import Iterator, Mapping
from datetime import timedelta
from functools import cache
from math import inf
from typing import Any, NamedTuple

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from xmc_ray.errors import printable

_EXCERPT = 600  # characters of a document


class Label(NamedTuple):
    """A label and its human-readable name, if it has one."""

    label: str
    name: str | None


def render(template: str, **content: Any) -> str:
    """The page that ``template`` makes of ``content``, from ``<!doctype html>`` on; to be written in UTF-8."""
    return environment().get_template(template).render(content)


def percent(share: float) -> str:
    """A share of 1 in percent; only 0 is shown as 0%, and only 1 as 100%."""
    if 0 < share < 0.0001:
        return "<0.01%"
    if 0.9995 <= share < 1:
        return ">99.9%"
    return f"{100 * share:.{2 if 0 < share < 0.1 else 1}f}%" if share not in (0, 1) else f"{share:.0%}"


def number(value: float | None) -> str:
    """With thousands separators, and one decimal unless the value is whole; a dash for None."""
    if value is None:
        return "–"
    return f"{value:,.1f}" if value % 1 else f"{value:,.0f}"


def count(n: int, noun: str) -> str:
    """A number of things, such as "1 label" and "2,000 labels"."""
    return f"{n:,} {noun}{'' if n == 1 else 's'}"


def duration(time: timedelta) -> str:
    """Hours and minutes, or minutes and seconds."""
    minutes, seconds = divmod(round(time.total_seconds()), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s" if minutes else f"{seconds} s"


def excerpt(text: str) -> str:
    """The beginning of a document."""
    return text if len(text) <= _EXCERPT else text[:_EXCERPT] + "…"


def share(part: float, whole: float) -> float:
    """``part / whole``; 0 of nothing."""
    return part / whole if whole else 0.0


def flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Names and values of settings as text; names of nested ones are joined by dots."""
    for name, value in settings.items():
        if isinstance(value, Mapping) and value:
            yield from flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


@cache
def environment(*packages: str) -> Environment:
    """The templates of further ``packages``, which may use those of this one, by the same rules."""
    made = Environment(
        loader=ChoiceLoader([PackageLoader(package) for package in (*packages, "xmc_ray.reports")]),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=lambda value: value if isinstance(value, Markup) else printable(str(value)),
        trim_blocks=True,
        lstrip_blocks=True,
    )
    filters = (percent, number, count, duration, excerpt, flat)
    made.filters.update({function.__name__: function for function in filters})
    made.globals.update(share=share, zip=zip, infinity=inf)
    return made
