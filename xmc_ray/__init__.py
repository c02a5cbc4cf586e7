"""Extreme multi-label text tagging: LightXML on Ray.

Names are resolved when they are asked for: ``import xmc_ray`` loads neither torch nor ray.
"""

import importlib
from typing import TYPE_CHECKING

from xmc_ray.errors import ConfigError as ConfigError
from xmc_ray.errors import DataError as DataError
from xmc_ray.errors import ModelError as ModelError
from xmc_ray.errors import XmcError as XmcError

if TYPE_CHECKING:
    from xmc_ray.callbacks.callback import Callback as Callback
    from xmc_ray.callbacks.mlflow import MLflowCallback as MLflowCallback
    from xmc_ray.callbacks.wandb import WandbCallback as WandbCallback
    from xmc_ray.classifier import XMCClassifier as XMCClassifier
    from xmc_ray.data.feedback import FeedbackConfig as FeedbackConfig
    from xmc_ray.data.filters import FilterConfig as FilterConfig
    from xmc_ray.data.filters import FiltersConfig as FiltersConfig
    from xmc_ray.data.groups import GroupsConfig as GroupsConfig
    from xmc_ray.data.tag_hierarchy import HierarchyConfig as HierarchyConfig
    from xmc_ray.model.encoder import EncoderConfig as EncoderConfig
    from xmc_ray.model.lexical import LexicalConfig as LexicalConfig
    from xmc_ray.model.lightxml import ModelConfig as ModelConfig
    from xmc_ray.model.tokenizer import TextConfig as TextConfig
    from xmc_ray.on_ray.pool import PoolConfig as PoolConfig
    from xmc_ray.on_ray.tag.rerank import RerankConfig as RerankConfig
    from xmc_ray.on_ray.tag.stage import StageConfig as StageConfig
    from xmc_ray.on_ray.tag.stage import Tagger as Tagger
    from xmc_ray.on_ray.tag.stage import tag_dataset as tag_dataset
    from xmc_ray.training.fit import FitConfig as FitConfig
    from xmc_ray.training.loop import LoopConfig as LoopConfig
    from xmc_ray.training.optim import OptimConfig as OptimConfig

_HOMES = {
    "Callback": "callbacks.callback",
    "EncoderConfig": "model.encoder",
    "FeedbackConfig": "data.feedback",
    "FilterConfig": "data.filters",
    "FiltersConfig": "data.filters",
    "FitConfig": "training.fit",
    "GroupsConfig": "data.groups",
    "HierarchyConfig": "data.tag_hierarchy",
    "LexicalConfig": "model.lexical",
    "LoopConfig": "training.loop",
    "MLflowCallback": "callbacks.mlflow",
    "ModelConfig": "model.lightxml",
    "OptimConfig": "training.optim",
    "PoolConfig": "on_ray.pool",
    "RerankConfig": "on_ray.tag.rerank",
    "StageConfig": "on_ray.tag.stage",
    "Tagger": "on_ray.tag.stage",
    "TextConfig": "model.tokenizer",
    "WandbCallback": "callbacks.wandb",
    "XMCClassifier": "classifier",
    "tag_dataset": "on_ray.tag.stage",
}

__all__ = sorted([*_HOMES, "ConfigError", "DataError", "ModelError", "XmcError"])
__version__ = "0.2.0"


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"xmc_ray.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
