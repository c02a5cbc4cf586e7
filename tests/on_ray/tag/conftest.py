"""Nights with the trained model, in process or on Ray."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from in_process import InProcess

from xmc_ray import command
from xmc_ray.on_ray.tag import job
from xmc_ray.on_ray.tag.config import TagConfig
from xmc_ray.on_ray.tag.runner import Runner


@pytest.fixture
def tag_with(trained: Path, tmp_path: Path) -> Callable[..., str]:
    """Tags a catalogue, by the runner that is given, into ``<tmp_path>/out`` on 2026-11-23, unless settings say otherwise."""

    def tag(runner: Runner | None, documents: object, *further: str, **settings: Any) -> str:
        given = {"documents.uri": documents, "bundle": trained / "bundle", "output": tmp_path / "out", "date": "2026-11-23"}
        given |= {"k": 3, "pool.max": 1, "pool.threads": 1}
        given |= {name.replace("__", "."): value for name, value in settings.items()}
        arguments = [f"--{name}={value}" for name, value in given.items()] + list(further)
        return job.tag(command.parse(TagConfig, arguments), runner)

    return tag


@pytest.fixture
def tag(tag_with: Callable[..., str]) -> Callable[..., str]:
    """`tag_with` in this process."""
    return lambda *arguments, **settings: tag_with(InProcess(), *arguments, **settings)
