"""A job as a command: its config from a TOML file and dotted options, its errors as one line.

    python jobs/train.py --config my.toml --optim.head_lr 2e-3

The job's frozen dataclass is the whole interface: its fields are the options, the strings under them the help.
"""

import sys
from argparse import ArgumentError
from collections.abc import Callable, Sequence
from typing import TypeVar

from jsonargparse import ArgumentParser, Namespace, set_parsing_settings

from xmc_ray.errors import ConfigError, XmcError

Config = TypeVar("Config")


def run(job: Callable[[Config], object], config_type: type[Config], argv: Sequence[str] | None = None) -> int:
    """Parse ``argv``, call ``job`` with its config, and return the exit code: 0, or 2 after an `XmcError`."""
    try:
        job(parse(config_type, argv))
    except XmcError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 2
    return 0


def parse(config_type: type[Config], argv: Sequence[str] | None = None) -> Config:
    """A config from command-line arguments. Raises ConfigError for unknown keys, wrong types and unreadable files."""
    parser = _parser(config_type)
    try:
        settings = parser.parse_args([_underscored(argument) for argument in (sys.argv[1:] if argv is None else argv)])
        parts = vars(parser.instantiate(settings))
    except (ArgumentError, ValueError, OSError) as error:
        raise ConfigError("cannot use these settings", found=error, way_out="--help lists every setting") from error
    return config_type(**{name: value for name, value in parts.items() if name != "config"})


def to_toml(config: object) -> str:
    """A config with all its defaults resolved, as TOML that `parse` reads back; settings that are None are left out."""
    parser = _parser(type(config))
    return str(parser.dump(_namespace(config), skip_unset=True, format="toml"))


def _parser(config_type: type) -> ArgumentParser:
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(parser_mode="toml", exit_on_error=False, description=config_type.__doc__)
    parser.add_argument("--config", action="config", help="TOML file with any of the settings below")
    parser.add_class_arguments(config_type, None)
    return parser


def _underscored(argument: str) -> str:
    """``--min-score=0.5`` as ``--min_score=0.5``: both spellings of an option are understood; values are left alone."""
    name, equals, value = argument.partition("=")
    return "--" + name[2:].replace("-", "_") + equals + value if argument.startswith("--") else argument


def _namespace(value: object) -> object:
    """Dataclasses as the parser's own nested namespaces."""
    if not hasattr(value, "__dataclass_fields__"):
        return value
    return Namespace(**{name: _namespace(getattr(value, name)) for name in value.__dataclass_fields__})
