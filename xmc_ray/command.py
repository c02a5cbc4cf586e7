"""A job as a command: its config from a TOML file and dotted options, its errors as one line.

    python jobs/train.py --config my.toml --optim.head_lr 2e-3

The job's frozen dataclass is the whole interface: its fields are the options, the strings under them the help.
"""

import sys
from argparse import ArgumentError
from collections.abc import Callable, Sequence
from itertools import zip_longest
from typing import TypeVar, get_type_hints

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
        arguments = _spelled_out(sys.argv[1:] if argv is None else argv, _switches(config_type))
        settings = parser.parse_args(arguments)
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


def _spelled_out(argv: Sequence[str], switches: set[str]) -> list[str]:
    """``--min-score=0.5`` as ``--min_score=0.5`` and a lone ``--overwrite`` as ``--overwrite=true``; values are left alone."""
    spelled = []
    for argument, following in zip_longest(argv, argv[1:], fillvalue="--"):
        option, equals, value = argument.partition("=")
        if option.startswith("--"):
            option = "--" + option[2:].replace("-", "_")
            if option in switches and not equals and following.startswith("--"):
                equals, value = "=", "true"
        spelled.append(option + equals + value)
    return spelled


def _switches(config_type: type, prefix: str = "--") -> set[str]:
    """The options of all settings that are true or false."""
    found: set[str] = set()
    for name, kind in get_type_hints(config_type).items():
        found |= {prefix + name} if kind is bool else set()
        found |= _switches(kind, f"{prefix}{name}.") if hasattr(kind, "__dataclass_fields__") else set()
    return found


def _namespace(value: object) -> object:
    """Dataclasses as the parser's own nested namespaces."""
    if not hasattr(value, "__dataclass_fields__"):
        return value
    return Namespace(**{name: _namespace(getattr(value, name)) for name in value.__dataclass_fields__})
