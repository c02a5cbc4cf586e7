"""The documents' figures are those that the kept results give."""

import re

import pytest

from benchmarks.figures import FIGURES, PICTURES, draw


@pytest.mark.parametrize("name", FIGURES)
def test_a_figure_is_that_of_its_record(name: str) -> None:
    """Texts and shapes; matplotlib's releases differ in the rest."""
    kept, now = (
        (re.findall(r"<text.*?</text>", svg, re.DOTALL), re.findall(r' d="(.*?)"', svg, re.DOTALL)) for svg in drawn(name)
    )
    assert kept == now


def drawn(name: str) -> tuple[str, str]:
    return (PICTURES / f"{name}.svg").read_text(), draw(name)


def content(svg: str) -> tuple[list[str], list[str]]:
    return re.findall(r"<text.*?</text>", svg, re.DOTALL), re.findall(r' d="(.*?)"', svg, re.DOTALL)
