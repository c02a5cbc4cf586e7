"""What a command says of its options."""

from typing import Annotated, Any, Literal

import pytest

from xmc_ray.settings import PositiveInt
from xmc_ray.storage import Address
from xmc_ray.usage import Option, choices, completion, page, value


def option(name: str, kind: Any = int, about: str = "What it is.", default: object = None, is_required: bool = False) -> Option:
    return Option(name, name.rpartition(".")[0], "A part", about, kind, default, is_required)


@pytest.mark.parametrize(
    ("kind", "shown"),
    [
        (PositiveInt, "N"),
        (PositiveInt | None, "N"),
        (float, "X"),
        (bool, ""),
        (Literal["first", "last"], "first|last"),
        (Address | list[Address], "PLACE"),
        (list[str], "LIST"),
        (dict[str, Annotated[float, 0]] | None, "NAME=VALUE"),
        (str | None, "TEXT"),
        (bytes, "VALUE"),
    ],
)
def test_what_stands_for_a_value(kind: Any, shown: str) -> None:
    assert value(kind) == shown


def test_choices() -> None:
    assert choices(Literal["a", "b"]) == ["a", "b"] == choices(Literal["a", "b"] | None)
    assert choices(bool) == ["true", "false"]
    assert choices(int) == choices(list[Literal["a"]]) == []


def test_a_page_has_the_essentials_first_and_each_setting_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "70")
    options = [
        option("output", Address, is_required=True),
        option("k", PositiveInt, default=10),
        option("part.a", about="many words " * 20),
        option("part.separator", str, default="\n"),
        option("part.a_name_that_is_longer_than_its_column"),
    ]
    lines = page("xmc-ray job", "Does it.", options, ["part.a", "output"]).splitlines()
    assert lines[0] == "usage: xmc-ray job [--config FILE] [--setting value ...]"
    names = [line.split()[0] for line in lines if line.startswith("  --")]
    first = ["--config", "--part.a", "--output"]
    assert names == [*first, "--k", "--part.separator", "--part.a_name_that_is_longer_than_its_column"]
    assert "  --output PLACE              What it is. [required]" in lines
    assert "  --k N                       What it is. [at least 1; default 10]" in lines
    assert "  --part.separator TEXT       What it is. [default '\\n']" in lines
    assert "part: A part" in lines and max(map(len, lines)) <= 70


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_a_script_names_commands_and_settings(shell: str) -> None:
    options = [option("part.a", about="100 % of 'it' [really], $HOME. More."), option("kind", Literal["x", "y"])]
    script = completion("xmc-ray", {"job": ("does it", options)}, shell)
    assert "--part.a" in script and "job" in script and "More" not in script
