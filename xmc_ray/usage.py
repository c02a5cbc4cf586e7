"""What a command says of its options: ``--help`` as a page to read, and the completion of shells."""

import argparse
import shutil
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from typing import Any, Literal, NamedTuple, get_args, get_origin

import shtab

from xmc_ray.settings import Normalised, expected

_LEAST_WIDTH, _MOST_WIDTH = 60, 110  # of a page, in characters
_NAMES = 30  # of them for an option and its value, before what is said of it
_VALUES = {int: "N", float: "X", str: "TEXT", bool: "", dict: "NAME=VALUE"}
_NO_DEFAULT: tuple[object, ...] = (None, False, "", [], {})  # not worth a word


class Option(NamedTuple):
    """A setting as an option: ``name`` is dotted, ``section`` and ``title`` are of the settings that it belongs to."""

    name: str
    section: str
    title: str
    about: str
    kind: Any
    default: object
    is_required: bool


def page(program: str, about: str, options: Sequence[Option], essentials: Sequence[str]) -> str:
    """The ``--help`` of a command: the ``essentials`` first, in their order, then all others by section."""
    width = max(_LEAST_WIDTH, min(_MOST_WIDTH, shutil.get_terminal_size().columns))
    by_name = {option.name: option for option in options}
    rest = [option for option in options if option.name not in essentials]
    sections = [(title, [*part]) for title, part in groupby(rest, lambda option: _heading(option))]
    if essentials:
        sections.insert(0, ("What matters first", [by_name[name] for name in essentials]))
    parts = [f"usage: {program} [--config FILE] [--setting value ...]", textwrap.fill(about, width)]
    parts.append(_line("--config FILE", "TOML file with any of the settings below, or the name of a recipe.", width))
    for title, part in sections:
        lines = [_line(f"--{option.name} {value(option.kind)}".rstrip(), _said(option), width) for option in part]
        parts.append("\n".join([*textwrap.wrap(title, width), *lines]))
    return "\n\n".join(parts) + "\n"


def value(kind: Any) -> str:
    """What stands for a value of this type: ``N``, ``PLACE``, ``first|last``; "" for a switch."""
    origin = get_origin(kind)
    if origin is Literal:
        return "|".join(map(str, get_args(kind)))
    if hasattr(kind, "__metadata__"):
        is_place = any(isinstance(part, Normalised) and "address" in part.what for part in kind.__metadata__)
        return "PLACE" if is_place else value(kind.__origin__)
    if origin in (list, dict):
        return "LIST" if origin is list else _VALUES[dict]
    inner = [value(part) for part in get_args(kind) if part is not type(None)]
    return inner[0] if inner else _VALUES.get(kind, "VALUE")


def choices(kind: Any) -> list[str]:
    """The values of a type that has a few; "" stands for none of them."""
    if get_origin(kind) is Literal:
        return list(map(str, get_args(kind)))
    if kind is bool:
        return ["true", "false"]
    return next(filter(None, map(choices, get_args(kind))), []) if get_origin(kind) not in (list, dict) else []


def completion(program: str, commands: Mapping[str, tuple[str, Iterable[Option]]], shell: str) -> str:
    """A script that makes ``shell`` (bash, zsh) complete the commands, their options, and values that are places or few."""
    parser = argparse.ArgumentParser(program, add_help=False)
    parts = parser.add_subparsers()
    for name, (about, options) in commands.items():
        part = parts.add_parser(name, help=about, description=about, add_help=False)
        part.add_argument("--help", action="store_true", help="list all settings")
        _add(part, "--config", "TOML file with any of the settings, or the name of a recipe", shtab.FILE)
        for option in options:
            files = shtab.FILE if value(option.kind) == "PLACE" else None
            _add(part, f"--{option.name}", option.about, files, choices(option.kind))
    return str(shtab.complete(parser, shell=shell))


def _add(
    parser: argparse.ArgumentParser, name: str, about: str, files: Mapping[str, Any] | None, values: Sequence[str] = ()
) -> None:
    about = " ".join(about.split()).partition(". ")[0].replace("%", "%%")
    action = parser.add_argument(name, help=about, choices=list(values) or None)
    if files:
        action.complete = files  # type: ignore[attr-defined]


def _heading(option: Option) -> str:
    return f"{option.section}: {option.title}" if option.section else "The job itself"


def _said(option: Option) -> str:
    words, default = expected(option.kind), option.default
    if isinstance(default, str) and not default.isprintable():
        default = repr(default)
    limits = [
        "required" if option.is_required else "",
        "" if choices(option.kind) or "address" in words else words,  # its value says so
        "" if default in _NO_DEFAULT else f"default {default}",
    ]
    told = "; ".join(filter(None, limits))
    return " ".join(option.about.split()) + (f" [{told}]" if told else "")


def _line(option: str, about: str, width: int) -> str:
    first = f"  {option}"
    indent = " " * _NAMES
    lines = textwrap.wrap(about, width, initial_indent=indent, subsequent_indent=indent) or [""]
    if len(first) + 2 > _NAMES:
        return "\n".join([first, *lines]).rstrip()
    return "\n".join([first.ljust(_NAMES) + lines[0].lstrip(), *lines[1:]]).rstrip()
