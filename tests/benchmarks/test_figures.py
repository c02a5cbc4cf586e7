"""The documents' figures are those that the kept results give."""

import re

import pytest

from benchmarks.figures import FIGURES, PICTURES, draw


@pytest.mark.parametrize("name", FIGURES)
def test_a_figure_is_that_of_its_record(name: str) -> None:
    """Texts and shapes; matplotlib's releases differ in the rest."""
    kept = (PICTURES / f"{name}.svg").read_text()
    assert content(kept) == content(draw(name)), "its record has changed since: `make figures`"


def content(svg: str) -> tuple[list[str], list[str]]:
    return re.findall(r"<text.*?</text>", svg, re.DOTALL), re.findall(r' d="(.*?)"', svg, re.DOTALL)
