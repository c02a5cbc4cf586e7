"""Base class of all settings: fields declare their own bounds, and whether they may change when a job is resumed.

    @dataclass(frozen=True, kw_only=True)
    class LoopConfig(Settings):
        epochs: PositiveInt = 10
        workers: PositiveInt = field(default=1, metadata=MAY_CHANGE_ON_RESUME)

The bounds hold for settings made in Python and for those from the command line, and appear in its ``--help``. A type may also
bring its values into one form (`Normalised`), as that of addresses does.
"""

import importlib
import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass
from functools import cache, reduce
from typing import Annotated, Any, ClassVar, Literal, get_args, get_origin, get_type_hints

from annotated_types import GroupedMetadata, Interval, MinLen, MultipleOf, Not, Predicate
from pydantic import ConfigDict, GetCoreSchemaHandler, TypeAdapter, ValidationError
from pydantic_core import CoreSchema, core_schema

from xmc_ray.errors import ConfigError, scrubbed

MAY_CHANGE_ON_RESUME = {"may_change_on_resume": True}  # metadata of a field that does not decide what a job produces

_OFF: tuple[object, ...] = (None, False, 0, "", "auto", [])
_KINDS = {"int_type": "an integer, ", "float_type": "a number, ", "dict_type": "a mapping, "}  # by pydantic's kinds of errors
_WORDS = {
    "ge": "at least {}",
    "gt": "above {}",
    "le": "at most {}",
    "lt": "below {}",
    "multiple_of": "a multiple of {}",
    "min_length": "{} or more items",
}


@dataclass(frozen=True, kw_only=True, repr=False)
class Bounds(GroupedMetadata):
    """The values that a setting may have; NaN is never one of them."""

    ge: float | None = None
    gt: float | None = None
    le: float | None = None
    lt: float | None = None
    multiple_of: int | None = None
    min_length: int | None = None

    def __iter__(self) -> Iterator[object]:
        """The constraints as pydantic understands them."""
        if self.min_length is not None:
            yield MinLen(self.min_length)
            return
        yield Interval(ge=self.ge, gt=self.gt, le=self.le, lt=self.lt)
        yield Predicate(Not(math.isnan))
        if self.multiple_of is not None:
            yield MultipleOf(self.multiple_of)

    def __repr__(self) -> str:
        return ", ".join(
            words.format(f"{getattr(self, name):g}") for name, words in _WORDS.items() if getattr(self, name) is not None
        )


@dataclass(frozen=True, repr=False)
class Normalised:
    """Metadata of a type of strings: ``form`` turns each spelling into the one that is kept, or raises ConfigError.

    ``what`` says what the strings are.
    """

    form: Callable[[str | os.PathLike[str]], str]
    what: str

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        """Strings and paths are normalised; what is neither is left to pydantic."""
        return core_schema.no_info_before_validator_function(
            lambda value: self.form(value) if isinstance(value, str | os.PathLike) else value, handler(source)
        )

    def __repr__(self) -> str:
        return self.what


PositiveInt = Annotated[int, Bounds(ge=1)]
NonNegativeInt = Annotated[int, Bounds(ge=0)]
PositiveFloat = Annotated[float, Bounds(gt=0)]
NonNegativeFloat = Annotated[float, Bounds(ge=0)]
Share = Annotated[float, Bounds(ge=0, le=1)]
OpenShare = Annotated[float, Bounds(gt=0, lt=1)]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Normalises its values, where their types say so (`Normalised`); raises ConfigError for one that is out of bounds."""

    essentials: ClassVar[tuple[str, ...]] = ()
    """The dotted names of a job's settings that matter first, which its ``--help`` lists before all others."""

    def __post_init__(self) -> None:
        prefix = f"{type(self).__name__}."
        kind: type = type(self)
        for name, part in _sections(kind).items():
            if not isinstance(getattr(self, name), part):
                found, expected = repr(getattr(self, name)), part.__name__
                raise ConfigError(f"invalid value of {prefix}{name}", found=found, expected=expected)
        for name, value in check_bounds(kind, vars(self), prefix).items():
            object.__setattr__(self, name, value)
        self.check()

    def check(self) -> None:
        """Raises ConfigError for values that do not go together; each is within its bounds."""


def check_bounds(kind: type, values: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """The values that have another form, by name; raises ConfigError for the first that is out of its field's bounds."""
    changed = {}
    for name, (adapter, words) in _bounded(kind).items():
        try:
            value = adapter.validate_python(values[name])
        except ValidationError as error:
            first = error.errors()[0]
            what = _KINDS.get(first["type"], "")
            raise ConfigError(f"invalid value of {prefix}{name}", found=repr(first["input"]), expected=what + words) from None
        except ConfigError as error:
            what = f"invalid value of {prefix}{name}: {error.what}"
            hints: dict[str, Any] = {"where": error.where, "found": error.found, "expected": error.expected}
            raise ConfigError(what, **hints, way_out=error.way_out) from None
        if value != values[name]:
            changed[name] = value
    return changed


def nested(kind: type[Settings]) -> dict[str, type[Settings]]:
    """The fields that are configs themselves, optional ones included."""
    hints = get_type_hints(kind)
    parts = {name: [part for part in (hint, *get_args(hint)) if is_dataclass(part)] for name, hint in hints.items()}
    return {name: found[0] for name, found in parts.items() if found}  # type: ignore[misc]


@cache
def _sections(kind: type) -> dict[str, type[Settings]]:
    """The fields that are a config, and never None."""
    return {name: hint for name, hint in get_type_hints(kind).items() if is_dataclass(hint)}  # type: ignore[misc]


def changeable(config: Settings) -> set[str]:
    """The names of a config's own fields that may change on resume."""
    return {field.name for field in fields(config) if field.metadata.get("may_change_on_resume")}


def fixed_settings(config: Settings) -> dict[str, Any]:
    """The settings that decide what a job produces, as JSON holds them: without those that may change on resume."""
    names = [field.name for field in fields(config) if field.name not in changeable(config)]
    values = {name: getattr(config, name) for name in names}
    return {name: _as_json(value) for name, value in values.items()}


def _as_json(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _as_json(part) for name, part in value.items()}
    return fixed_settings(value) if isinstance(value, Settings) else value


def difference(before: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> tuple[str, object, object] | None:
    """(dotted name, old value, new value) of the first setting that differs, or None; a missing one has the value None.

    A setting that only one release has differs unless it is off or "auto", which is what the other release does; a section
    unless all of it is.
    """
    for name in {**now, **before}:
        old, value = before.get(name), now.get(name)
        if (name not in now and _is_off(old)) or (name not in before and _is_off(value)):
            continue
        if isinstance(value, Mapping) and isinstance(old, Mapping):
            inner = difference(old, value, f"{prefix}{name}.")
            if inner is not None:
                return inner
        elif old != value:
            return f"{prefix}{name}", old, value
    return None


def _is_off(value: object) -> bool:
    return all(map(_is_off, value.values())) if isinstance(value, Mapping) else value in _OFF


def difference_in_words(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """The first `difference` between an earlier run and this one, named with both values; empty if there is none."""
    other = difference(before, now)
    return "" if other is None else f"{other[0]} = {other[1]!r} instead of {other[2]!r}"


@cache
def _bounded(kind: type) -> dict[str, tuple[TypeAdapter[Any], str]]:
    """For each field with bounds, choices or one form of its values: what checks them, and the words for it."""
    bounded = {}
    for name, hint in get_type_hints(kind, include_extras=True).items():
        words = "True or False" if hint is bool else expected(hint)
        if words:
            optional = " or None" if type(None) in get_args(hint) else ""
            bounded[name] = TypeAdapter[Any](hint, config=ConfigDict(strict=True)), words + optional
    return bounded


def imported(name: str, what: str) -> Any:
    """What ``package.module:name`` names. Raises ConfigError, about ``what``, where it cannot be imported."""
    module, _, member = name.partition(":")
    try:
        return reduce(getattr, member.split("."), importlib.import_module(module))
    except Exception as error:  # an import may raise anything
        found = scrubbed(f"{type(error).__name__}: {error}")
        raise ConfigError(f"{what} cannot be imported", where=name, found=found) from error


def expected(hint: Any) -> str:
    """The bounds or choices of a type in words; empty if it has none."""
    if get_origin(hint) is Literal:
        return " or ".join(map(repr, get_args(hint)))
    if get_origin(hint) is Annotated:
        own = [repr(part) for part in hint.__metadata__ if isinstance(part, Bounds | Normalised)]
        inner = [expected(hint.__origin__)]
        return ", ".join(filter(None, own + inner))
    inside = " or ".join(filter(None, map(expected, get_args(hint))))
    return f"each {inside}" if inside and get_origin(hint) in (list, dict) else inside
