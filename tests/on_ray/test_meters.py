"""Metrics that an actor reports to Prometheus."""

from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest

from xmc_ray.on_ray import meters

Values = dict[tuple[str, str], float]  # (name of a metric, value of its tag) -> what was counted or observed


@pytest.fixture
def values(monkeypatch: pytest.MonkeyPatch) -> Values:
    found: Values = Counter()

    class Recorder:
        def __init__(self, name: str, description: str, tag_keys: Sequence[str] = (), boundaries: Sequence[float] = ()) -> None:
            self.name, self.tag_keys = name, tag_keys

        def inc(self, value: float, tags: dict[str, str] | None = None) -> None:
            assert value > 0 and tuple(tags or ()) == tuple(self.tag_keys)
            [tag] = (tags or {"": ""}).values()
            found[self.name, tag] += value

        observe = inc

    monkeypatch.setattr(meters, "Counter", Recorder)
    monkeypatch.setattr(meters, "Histogram", Recorder)
    return found


def test_an_actor_counts_tokens_and_padding(values: Values) -> None:
    predictor = meters.PredictorMeters()
    with predictor.measured([np.array([4, 2, 3])], token_budget=100):
        pass
    assert values["xmc_ray_tokens", ""] == 9 and values["xmc_ray_padding_tokens", ""] == 3, "three texts of four tokens"
    assert values["xmc_ray_batch_seconds", ""] > 0 and values["xmc_ray_queue_wait_seconds", ""] > 0
    with predictor.measured([np.array([], np.int64)], token_budget=100):
        pass
    assert values["xmc_ray_tokens", ""] == 9
