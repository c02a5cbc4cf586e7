"""Runs a job from the command line: settings from a TOML file and dotted options.

    python jobs/train.py --config my.toml --optim.head_lr 2e-3

The job's frozen dataclass is the whole interface: its fields are the options, the strings under them the help.
"""

import os
import re
import sys
from argparse import ArgumentError
from collections.abc import Callable, Sequence
from dataclasses import fields
from functools import cache
from typing import TypeVar

from jsonargparse import ArgumentParser, Namespace, get_loader, set_loader, set_parsing_settings

from xmc_ray.errors import ConfigError
from xmc_ray.exits import exit_code
from xmc_ray.settings import Settings, changeable, check_bounds, nested

Config = TypeVar("Config", bound=Settings)


def run(job: Callable[[Config], object], config_type: type[Config], argv: Sequence[str] | None = None) -> int:
    """Parse ``argv``, call ``job`` with its config, and return the exit code (see `exits`)."""
    return exit_code(lambda: job(parse(config_type, argv)))


def parse(config_type: type[Config], argv: Sequence[str] | None = None) -> Config:
    """A config from command-line arguments.

    Raises ConfigError for unknown settings, wrong types, values out of bounds and unreadable files.
    """
    arguments = sys.argv[1:] if argv is None else argv
    for argument in arguments:
        if re.search("[\ud800-\udfff]", argument):  # how Python spells other bytes; neither TOML nor Parquet can hold them
            raise ConfigError("an argument is not UTF-8", found=argument, way_out="rename the file or folder that it names")
    for option, argument in zip(["", *arguments], [*arguments, ""], strict=True):
        file = argument.removeprefix("--config=") if argument.startswith("--config=") else argument * (option == "--config")
        path = os.path.expanduser(file)
        if file and (not os.path.exists(path) or os.path.isdir(path)):  # else the parser takes its name for TOML
            raise ConfigError("not a file of settings", found=file, way_out="give --config an existing TOML file")
    parser = _parser(config_type)
    options = [argument[2:].partition("=")[0] for argument in arguments if argument.startswith("--")]
    dashed = [f"write --{name.replace('-', '_')}" for name in options if "-" in name]
    return _config(config_type, parser, lambda: parser.parse_args(arguments), (*dashed, "--help lists every setting")[0])


def to_toml(config: Settings) -> str:
    """A config with all its defaults resolved, as TOML that `parse` reads back.

    A setting that is None, which TOML lacks, is left out or, where the default is another value, written as "null".
    """
    return str(_parser(type(config)).dump(_namespace(config), skip_unset=True, format="toml"))


def resumed(config: Config, toml: str) -> Config:
    """The config that `to_toml` wrote when a run began, with what may change on resume as it is in ``config``.

    Raises ConfigError for TOML that does not parse, or that holds settings which no longer exist.
    """
    parser, free = _parser(type(config)), changeable(config)
    now = Namespace(**{name: _namespace(getattr(config, name)) for name in free})

    def read() -> Namespace:
        began = {name: value for name, value in get_loader("toml")(toml).items() if name not in free}
        settings: Namespace = parser.parse_object(began, namespace=now)
        return settings

    return _config(type(config), parser, read, "perhaps another version wrote them")


@cache
def _take_marks() -> None:
    """Let files of settings begin with a byte order mark, which some editors put there and no TOML parser takes."""
    read = get_loader("toml")
    set_loader("toml", lambda text: read(text.removeprefix("\ufeff")), exceptions=(ValueError,), json_superset=False)


def _parser(config_type: type[Settings]) -> ArgumentParser:
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    _take_marks()
    parser = ArgumentParser(parser_mode="toml", exit_on_error=False, description=config_type.__doc__)
    parser.add_argument("--config", action="config", help="TOML file with any of the settings below")
    parser.add_class_arguments(config_type, None)
    for action in parser._actions:
        if getattr(action, "_typehint", None) is bool:
            action.nargs, action.const = "?", "true"  # a switch: --overwrite alone
    return parser


def _config(kind: type[Config], parser: ArgumentParser, read: Callable[[], Namespace], way_out: str) -> Config:
    try:
        settings = read()
        _check_bounds(kind, settings)
        parts = vars(parser.instantiate(settings))
    except (ArgumentError, ValueError, OSError, RecursionError) as error:
        raise ConfigError("invalid settings", found=error, way_out=way_out) from error
    return kind(**{name: value for name, value in parts.items() if name != "config"})


def _check_bounds(kind: type[Settings], settings: Namespace, prefix: str = "") -> None:
    """Raises ConfigError before anything is instantiated, while the dotted names of the settings are known."""
    check_bounds(kind, vars(settings), prefix)
    for name, part in nested(kind).items():
        if isinstance(settings[name], Namespace):
            _check_bounds(part, settings[name], f"{prefix}{name}.")


def _namespace(value: object) -> object:
    """A config as the parser's own nested namespaces."""
    if not isinstance(value, Settings):
        return value
    parts = {field: _namespace(getattr(value, field.name)) for field in fields(value)}
    return Namespace(
        **{field.name: "null" if part is None and field.default is not None else part for field, part in parts.items()}
    )
