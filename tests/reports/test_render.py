"""Numbers and settings in words, and templates that fail rather than leave anything out or let anything in."""

from datetime import timedelta

import pytest
from jinja2 import UndefinedError
from pages import NASTY, Page

from xmc_ray.reports import render


@pytest.mark.parametrize(
    ("share", "text"),
    [
        (0, "0%"),
        (1, "100%"),
        (0.00009, "<0.01%"),
        (0.0304, "3.04%"),
        (0.1, "10.0%"),
        (0.9994, "99.9%"),
        (0.9996, ">99.9%"),
    ],
)
def test_percent(share: float, text: str) -> None:
    assert render.percent(share) == text


def test_numbers() -> None:
    numbers = [render.number(value) for value in (None, 0, 12345, 12345.0, 1234.56)]
    assert numbers == ["–", "0", "12,345", "12,345", "1,234.6"]
    assert [render.count(n, "label") for n in (0, 1, 2000)] == ["0 labels", "1 label", "2,000 labels"]
    assert [render.share(1, 4), render.share(1, 0)] == [0.25, 0.0]


def test_durations() -> None:
    durations = [render.duration(timedelta(seconds=seconds)) for seconds in (9.4, 120, 4320)]
    assert durations == ["9 s", "2 min 0 s", "1 h 12 min"]


def test_nested_settings_have_dotted_names() -> None:
    settings = {"k": 10, "documents": {"uri": "x", "fields": ["a", "b"]}, "empty": {}}
    assert list(render.flat(settings)) == [("k", "10"), ("documents.uri", "x"), ("documents.fields", "a, b"), ("empty", "{}")]


def test_an_excerpt_is_cut_after_600_characters() -> None:
    assert render.excerpt("z" * 600) == "z" * 600
    assert render.excerpt("y" * 601) == "y" * 600 + "…"


@pytest.mark.parametrize("text", NASTY.values(), ids=NASTY)
def test_every_expression_is_escaped(text: str) -> None:
    template = render.environment().from_string('<p title="{{ text }}">{{ text }}</p>')
    assert [tag for tag, _ in Page(template.render(text=text)).tags] == ["p"]


def test_a_missing_name_is_an_error() -> None:
    with pytest.raises(UndefinedError):
        render.render("tagging.html.j2", title="x")
