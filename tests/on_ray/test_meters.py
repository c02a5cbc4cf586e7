"""Metrics that a night reports to Prometheus."""

from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest
from ray.util import metrics

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

    for module in (metrics, meters):
        monkeypatch.setattr(module, "Counter", Recorder)
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


def test_a_piece_is_counted_by_outcome_reason_and_score(values: Values) -> None:
    scores = [0] * 20
    scores[0], scores[19] = 2, 5
    outcomes = {"tagged": 4, "reused": 0, "rejected": 3}
    meters.count_piece(outcomes | {"reasons": {"id is null": 1, "invalid JSON": 2}, "scores": scores})
    assert values == {
        ("xmc_ray_documents", "tagged"): 4,
        ("xmc_ray_documents", "rejected"): 3,
        ("xmc_ray_rejects", "id is null"): 1,
        ("xmc_ray_rejects", "invalid JSON"): 2,
        ("xmc_ray_tags", "0.00"): 2,
        ("xmc_ray_tags", "0.95"): 5,
    }


def test_a_finished_night_announces_its_drift(values: Values) -> None:
    meters.announce({"training": 0.0, "previous": None})
    assert 0 < values["xmc_ray_drift", "training"] < 1e-6, "no drift is reported, too"
    assert ("xmc_ray_drift", "previous") not in values and values["xmc_ray_finished_seconds", ""] > 1e9
