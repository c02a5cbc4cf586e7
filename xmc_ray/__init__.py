"""Extreme multi-label text tagging: LightXML on Ray.

Names are resolved when they are asked for: ``import xmc_ray`` loads neither torch nor ray.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from xmc_ray.classifier import FitConfig as FitConfig
    from xmc_ray.classifier import XMCClassifier as XMCClassifier
    from xmc_ray.encoder import EncoderConfig as EncoderConfig
    from xmc_ray.errors import ConfigError as ConfigError
    from xmc_ray.errors import DataError as DataError
    from xmc_ray.errors import ModelError as ModelError
    from xmc_ray.errors import XmcError as XmcError
    from xmc_ray.groups import GroupsConfig as GroupsConfig
    from xmc_ray.lexical import LexicalConfig as LexicalConfig
    from xmc_ray.loop import LoopConfig as LoopConfig
    from xmc_ray.model import ModelConfig as ModelConfig
    from xmc_ray.optim import OptimConfig as OptimConfig
    from xmc_ray.text import TextConfig as TextConfig

_HOMES = {
    "ConfigError": "errors",
    "DataError": "errors",
    "EncoderConfig": "encoder",
    "FitConfig": "classifier",
    "GroupsConfig": "groups",
    "LexicalConfig": "lexical",
    "LoopConfig": "loop",
    "ModelConfig": "model",
    "ModelError": "errors",
    "OptimConfig": "optim",
    "TextConfig": "text",
    "XMCClassifier": "classifier",
    "XmcError": "errors",
}

__all__ = [*sorted(_HOMES)]
__version__ = "0.1.0"


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"xmc_ray.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
