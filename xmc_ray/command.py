"""Runs a job from the command line: settings from a TOML file and dotted options.

    python jobs/train.py --config my.toml --optim.head_lr 2e-3
    python jobs/train.py --config small-cpu          a recipe that comes along

The job's frozen dataclass is the whole interface: its fields are the options, the strings under them the help.
"""

import ast
import difflib
import inspect
import json
import os
import re
import sys
from argparse import SUPPRESS, ArgumentError, HelpFormatter
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields
from functools import cache
from pathlib import Path
from types import UnionType
from typing import Annotated, TypeVar, Union, get_args, get_origin

from jsonargparse import ArgumentParser, Namespace, get_loader, set_loader, set_parsing_settings

from xmc_ray.errors import ConfigError
from xmc_ray.exits import exit_code
from xmc_ray.settings import Settings, changeable, check_bounds, nested
from xmc_ray.usage import Option, page

Config = TypeVar("Config", bound=Settings)

_RECIPES = Path(__file__).with_name("recipes")  # settings of training that come along, each by its name
_PARSERS: dict[type[Settings], "_Parser"] = {}  # one takes a tenth of a second


def run(job: Callable[[Config], object], config_type: type[Config], argv: Sequence[str] | None = None) -> int:
    """Parse ``argv``, call ``job`` with its config, and return the exit code (see `exits`)."""
    return exit_code(lambda: job(parse(config_type, argv)))


def parse(config_type: type[Config], argv: Sequence[str] | None = None) -> Config:
    """A config from command-line arguments.

    Raises ConfigError for unknown settings, wrong types, values out of bounds and unreadable files.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    first = {field.name for field in fields(config_type)} & {"action", "folder"}
    if first and arguments and not arguments[0].startswith("-"):
        arguments[0] = f"--{first.pop()}={arguments[0]}"  # as in: nights.py list --output FOLDER
    for argument in arguments:
        if re.search("[\ud800-\udfff]", argument):  # how Python spells other bytes; neither TOML nor Parquet can hold them
            raise ConfigError("an argument is not UTF-8", found=argument, way_out="rename the file or folder that it names")
    parser, known = _parser(config_type), options(config_type)
    lists = {f"--{option.name}" for option in known if _is_a(option.kind, list)}
    files: list[str] = []
    others: list[str] = []
    for argument in _with_values(arguments, {"--config", *lists}):
        name, equals, value = argument.partition("=")
        if equals and name == "--config":
            files.append(f"{name}={_settings_file(value)}")
        else:
            others.append(f"{name}={_as_list(value)}" if equals and name in lists else argument)
    hints = _hints([argument[2:].partition("=")[0] for argument in others if argument.startswith("--")], known)
    # a file first, wherever it stands: what is said beside it counts
    return _config(config_type, parser, lambda: parser.parse_args(files + others), (*hints, "--help lists every setting")[0])


def _is_a(kind: object, origin: type) -> bool:
    """Whether a type is of lists, or of dicts, of None apart."""
    if get_origin(kind) is Annotated:
        kind = get_args(kind)[0]
    inside = [part for part in get_args(kind) if part is not type(None)]
    return get_origin(kind) is origin or (
        get_origin(kind) in (Union, UnionType) and all(_is_a(part, origin) for part in inside)
    )


def _with_values(arguments: Sequence[str], names: set[str]) -> Iterator[str]:
    """The arguments, those of ``names`` joined by "=" with the value that follows, if one does."""
    left = deque(arguments)
    while left:
        argument = left.popleft()
        has_value = argument in names and left and not left[0].startswith("--")
        yield f"{argument}={left.popleft()}" if has_value else argument


def _as_list(value: str) -> str:
    """A list as TOML has it, of a list in JSON or in Python's way of writing one, or of a single string."""
    if not value.lstrip().startswith("["):
        return json.dumps([value], ensure_ascii=False) if value not in ("", "null") else value
    try:
        return json.dumps(ast.literal_eval(value), ensure_ascii=False)
    except (ValueError, SyntaxError, TypeError):
        return value


def _hints(names: Sequence[str], known: Sequence[Option]) -> Iterator[str]:
    """What may have been meant by names that are no options."""
    every = {option.name: option for option in known}
    for name in names:
        inside = [other for other in every if other.startswith(f"{name}.")]
        if name in every or any(name.startswith(f"{other}.") and _is_a(every[other].kind, dict) for other in every):
            continue
        meant = name.replace("-", "_")
        close = difflib.get_close_matches(meant, [*inside, *every], 1, 0.8)
        if inside or meant in every:
            yield f"write --{[*inside, meant][0]}"
        elif name.partition(".")[0] in every:
            yield f"write --{name.partition('.')[0]}"
        elif close:
            yield f"perhaps --{close[0]}"


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


def _settings_file(name: str) -> str:
    """A file as it is, or the package's own recipe of that name. ConfigError for what is neither."""
    path = Path(os.path.expanduser(name))  # one that does not exist the parser would take for TOML
    own = _RECIPES / f"{name}.toml"
    if path.is_dir() or not path.exists():
        if os.path.basename(name) != name or not own.exists():
            names = ", ".join(sorted(file.stem for file in _RECIPES.glob("*.toml")))
            raise ConfigError("not a file of settings", found=name, way_out=f"give --config a TOML file, or one of {names}")
        path = own
    return str(path)


@cache
def _take_marks() -> None:
    """Let files of settings begin with a byte order mark, which some editors put there and no TOML parser takes."""
    read = get_loader("toml")
    set_loader("toml", lambda text: read(text.removeprefix("\ufeff")), exceptions=(ValueError,), json_superset=False)


def _parser(config_type: type[Settings]) -> "_Parser":
    if config_type not in _PARSERS:
        _PARSERS[config_type] = _made(config_type)
    return _PARSERS[config_type]


def _made(config_type: type[Settings]) -> "_Parser":
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    _take_marks()
    parser = _Parser(parser_mode="toml", exit_on_error=False, allow_abbrev=False, description=config_type.__doc__)
    parser.config_type = config_type
    parser.add_argument("--config", action="config", help="TOML file with any of the settings below")
    parser.add_class_arguments(config_type, None)
    for action in parser._actions:
        if getattr(action, "_typehint", None) is bool:
            action.nargs, action.const = "?", "true"  # a switch: --overwrite alone
    return parser


class _Parser(ArgumentParser):
    """With a ``--help`` of our own; parsers of parts, which jsonargparse makes itself, keep theirs."""

    config_type: type[Settings] | None = None

    def format_help(self, formatter: HelpFormatter | None = None) -> str:
        if self.config_type is None:
            return str(super().format_help(formatter))
        about = inspect.cleandoc(self.config_type.__doc__ or "").partition("\n\n")[0]
        return page(self.prog, " ".join(about.split()), options(self.config_type), self.config_type.essentials)


def options(config_type: type[Settings], prefix: str = "") -> list[Option]:
    """All settings of a job as options, in order, those of parts that may be None included."""
    found: list[Option] = []
    parser = _parser(config_type)
    titles = {action.dest: str(group.title) for group in parser._action_groups for action in group._group_actions}
    for action in parser._actions:
        if action.default == SUPPRESS or not hasattr(action, "_typehint"):  # one of jsonargparse's own
            continue
        name, kind = f"{prefix}{action.dest}", action._typehint
        inside = () if get_origin(kind) is dict else get_args(kind)
        part = next((part for part in inside if isinstance(part, type) and issubclass(part, Settings)), None)
        if part is not None:
            found += options(part, f"{name}.")
        else:
            told = name.rpartition(".")[0], titles.get(action.dest, ""), str(action.help or "")
            found.append(Option(name, *told, kind, action.default, action.required and not prefix))
    return found if prefix else sorted(found, key=lambda option: "." in option.name)


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
        value = settings[name]
        if isinstance(value, Namespace):
            _check_bounds(part, value, f"{prefix}{name}.")
        elif value is not None and not isinstance(value, Mapping):
            way_out = f"write settings of its own, such as {prefix}{name}.{fields(part)[0].name}"
            raise ConfigError("a section is no value", where=f"{prefix}{name}", found=value, way_out=way_out)


def _namespace(value: object) -> object:
    """A config as the parser's own nested namespaces."""
    if isinstance(value, dict):
        return {name: part if not isinstance(part, Settings) else vars(_namespace(part)) for name, part in value.items()}
    if not isinstance(value, Settings):
        return value
    parts = {field: _namespace(getattr(value, field.name)) for field in fields(value)}
    return Namespace(
        **{field.name: "null" if part is None and field.default is not None else part for field, part in parts.items()}
    )
