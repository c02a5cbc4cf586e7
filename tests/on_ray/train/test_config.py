"""The settings of the training job: what does not go together, and what a worker asks of the cluster."""

import os
from dataclasses import replace

import pytest

from xmc_ray.data.documents import DocumentsConfig
from xmc_ray.errors import ConfigError
from xmc_ray.model.encoder import EncoderConfig
from xmc_ray.on_ray.train.config import TrainConfig, WorkersConfig


def test_the_least_number_of_workers_is_not_above_their_number() -> None:
    assert WorkersConfig(count=2, least=2).least == 2
    with pytest.raises(ConfigError, match=r"workers\.least is above workers\.count; found 3; expected at most 2"):
        WorkersConfig(count=2, least=3)


def test_what_a_worker_asks_for() -> None:
    assert WorkersConfig(cpus=4).needs == {"CPU": 4.0}
    assert WorkersConfig(gpu=True).needs == {"CPU": 1.0, "GPU": 1.0}


def test_words_alone_are_trained_on_one_thread_unless_told_otherwise() -> None:
    """Threads that wait asleep for each other between such short operations take three times as long."""
    base = TrainConfig(documents=DocumentsConfig(uri="x"), output="y")
    words = replace(base, encoder=EncoderConfig(layers=0))
    cores = len(os.sched_getaffinity(0))
    assert base.threads() == cores and base.threads(2 * cores) == 1 and words.threads() == 1
    assert replace(words, workers=WorkersConfig(threads=3)).threads(2) == 3
