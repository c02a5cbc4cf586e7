"""The settings of the training job: what does not go together, and what a worker asks of the cluster."""

import pytest

from xmc_ray.errors import ConfigError
from xmc_ray.on_ray.train.config import WorkersConfig


def test_the_least_number_of_workers_is_not_above_their_number() -> None:
    assert WorkersConfig(count=2, least=2).least == 2
    with pytest.raises(ConfigError, match=r"workers\.least is above workers\.count; found 3; expected at most 2"):
        WorkersConfig(count=2, least=3)


def test_what_a_worker_asks_for() -> None:
    assert WorkersConfig(cpus=4).needs == {"CPU": 4.0}
    assert WorkersConfig(gpu=True).needs == {"CPU": 1.0, "GPU": 1.0}
