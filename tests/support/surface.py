"""The public surface of the library, one line a name: what `xmc_ray` exports, and the options of the jobs.

PYTHONPATH=. python tests/support/surface.py > tests/surface.txt      after a change that is meant
"""

import inspect
from collections.abc import Callable, Iterator

from jsonargparse import ArgumentParser

import xmc_ray
from xmc_ray import cli, command


def surface() -> list[str]:
    return [*names(), *options()]


def names() -> Iterator[str]:
    """Each exported name with its signature, the classifier's methods and attributes after it."""
    for name in sorted(xmc_ray.__all__):
        exported = getattr(xmc_ray, name)
        is_error = isinstance(exported, type) and issubclass(exported, Exception)
        yield f"{name}{'' if is_error else _parameters(exported)}"
        if name == "XMCClassifier":
            members = [(member, value) for member, value in inspect.getmembers(exported) if not member.startswith("_")]
            yield from (f"{name}.{member}{_parameters(value) if callable(value) else ''}" for member, value in members)


def options() -> Iterator[str]:
    """Each option of each job, such as ``train --loop.epochs``."""
    for name in sorted(cli.JOBS):
        config = cli.named(cli.JOBS[name].config)
        yield from (f"{name} {option}" for option in sorted(_options(command._parser(config))))


def _parameters(exported: Callable[..., object]) -> inspect.Signature:
    """Names and defaults; the types are mypy's."""
    signature = inspect.signature(exported)
    bare = [parameter.replace(annotation=inspect.Parameter.empty) for parameter in signature.parameters.values()]
    return signature.replace(parameters=bare, return_annotation=inspect.Signature.empty)


def _options(parser: ArgumentParser) -> set[str]:
    """Without what jsonargparse adds to them: ``--name+`` appends to a list, ``--name.help`` explains a class, and shtab."""
    options = {option for action in parser._actions for option in action.option_strings if option.startswith("--")}
    return {option for option in options - {"--print_shtab"} if not option.endswith(("+", ".help"))}


if __name__ == "__main__":
    print(*surface(), sep="\n")
