"""Workers and actors of the jobs with the device `mimic` in place of a GPU: Ray's processes import this, and so the device."""

from typing import Any

import mimic
import pytest
from mimic import DEVICE

from xmc_ray.on_ray.actors import load_predictor
from xmc_ray.on_ray.pool import PoolConfig
from xmc_ray.on_ray.train import worker
from xmc_ray.on_ray.train.config import WorkersConfig


def name_it(patch: pytest.MonkeyPatch) -> None:
    """What asks for a GPU gets the device."""
    patch.setattr(WorkersConfig, "device", property(lambda config: DEVICE))
    patch.setattr(PoolConfig, "device", property(lambda config: str(DEVICE)))


def work(settings: dict[str, Any]) -> None:
    """`train.worker.work` on the device."""
    with pytest.MonkeyPatch.context() as patch, mimic.listening() as log:
        patch.setattr(worker, "get_device", lambda: DEVICE)
        worker.work(settings)
    assert log.launches.total() > 1000, "it has trained elsewhere"


def load(*arguments: Any) -> Any:
    """`actors.load_predictor` on the device, for as long as the actor lives."""
    name_it(pytest.MonkeyPatch())
    predictor = load_predictor(*arguments)
    assert predictor.device == DEVICE
    return predictor
