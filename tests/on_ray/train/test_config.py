"""The settings of the training job: what does not go together, and what a worker asks of the cluster."""

import os
from dataclasses import replace

import pytest
import torch

from xmc_ray.data.documents import DocumentsConfig
from xmc_ray.errors import ConfigError
from xmc_ray.model import threads
from xmc_ray.model.encoder import EncoderConfig
from xmc_ray.model.threads import use_threads
from xmc_ray.on_ray.train.config import TrainConfig, WorkersConfig


def test_the_least_number_of_workers_is_not_above_their_number() -> None:
    assert WorkersConfig(count=2, least=2).least == 2
    with pytest.raises(ConfigError, match=r"workers\.least is above workers\.count; found 3; expected at most 2"):
        WorkersConfig(count=2, least=3)


def test_what_a_worker_asks_for() -> None:
    assert WorkersConfig(cpus=4).needs == {"CPU": 4.0}
    assert WorkersConfig(gpu=True).needs == {"CPU": 1.0, "GPU": 1.0}


@pytest.mark.parametrize("layers", [0, 2])
def test_a_worker_shares_the_cores_of_its_machine(layers: int) -> None:
    """Operations of words alone are too short for torch's own threads, which would wait for each other in each of them."""
    base = TrainConfig(documents=DocumentsConfig(uri="x"), output="y", encoder=EncoderConfig(layers=layers))
    before, cores = torch.get_num_threads(), len(os.sched_getaffinity(0))
    given = replace(base, workers=WorkersConfig(threads=3))
    try:
        for config, workers, expected in ((base, 1, cores), (base, 2 * cores, 1), (given, 2, 3)):
            config.use_threads(workers)
            assert torch.get_num_threads() == (expected if layers else 1)
            assert threads._threads.count == (1 if layers else expected)
    finally:
        use_threads(before, together=True)
