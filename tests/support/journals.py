"""Journals of training runs as tests need them."""

import json
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

from xmc_ray.model.lightxml import LightXML
from xmc_ray.on_ray.train import worker
from xmc_ray.reports.curves import Curves
from xmc_ray.training.fit import FitConfig
from xmc_ray.training.loop import Step, TrainState
from xmc_ray.training.optim import Averager, Optimizer


def read(entries: Sequence[dict[str, Any]]) -> Curves:
    return Curves.read(json.dumps(entry).encode() for entry in entries)


def worker_entries(step: int, model: LightXML) -> list[dict[str, Any]]:
    """The two lines of ``metrics.jsonl`` that a worker writes of a step where it validates; rates are half their peaks."""
    config, counts = FitConfig(), {"documents": 64 * step, "tokens": 640 * step, "padded_tokens": 700 * step}
    state = TrainState(model, Optimizer(model, config.optim), Averager(config.optim), step, 2.5 * step, **counts)
    state.optimizer.factor = 0.5
    progress = worker._progress(
        Step(step, 0, 0.5, 2.0, 1.0, *counts.values(), state.seconds, 0.1), [(2.0, 1.0)], state, config.loop.epochs
    )
    cost = worker._Worker._cost(SimpleNamespace(state=state, exchange=model.exchange))  # type: ignore[arg-type]
    del progress["line"]
    return [progress, {"validation/P@1": 0.5, **cost, "step": step}]
