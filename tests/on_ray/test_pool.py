"""Sizes of the pool of actors."""

import pytest

from xmc_ray.errors import ConfigError
from xmc_ray.on_ray import pool
from xmc_ray.on_ray.pool import PoolConfig


def test_a_pool_takes_what_it_is_given(ray_session: None, monkeypatch: pytest.MonkeyPatch) -> None:
    assert PoolConfig(min=2, max=3).settled() == PoolConfig(min=2, max=3)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(pool, "_cores", lambda: 2)
    assert PoolConfig().settled().max == 2  # an actor a core
    assert PoolConfig(threads=2).settled().max == 1
    assert PoolConfig(cpus=4).settled().max == 1  # six CPUs, two of which are left to other tasks
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    assert PoolConfig(min=3).settled().max == 3
    assert PoolConfig(max=2).threads_each == 1 and PoolConfig(max=2, threads=5).threads_each == 5
    assert PoolConfig(gpu=True, cpus=3).needs == {"CPU": 3.0, "GPU": 1.0}


@pytest.mark.parametrize("settings", [{"min": 0}, {"max": -1}, {"min": 3, "max": 2}, {"cpus": 0}, {"threads": -1}])
def test_settings_that_do_not_fit(settings: dict[str, int]) -> None:
    with pytest.raises(ConfigError):
        PoolConfig(**settings)
