"""Live precision against loops over documents and tags, and Wilson's interval against scipy's."""

from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest

from xmc_ray.data.feedback import Feedback
from xmc_ray.metrics.live import LivePrecision, Share, wilson

LABELS = "abcd"
Tags = dict[str, dict[str, float]]
TAGS = st.dictionaries(
    st.sampled_from(["d1", "d2", "d3", "d4"]), st.dictionaries(st.sampled_from(LABELS), st.sampled_from([0.05, 0.1, 0.95, 1.0]))
)
VERDICTS = st.dictionaries(st.tuples(st.sampled_from(["d1", "d2", "d5"]), st.sampled_from("abxy")), st.booleans(), min_size=1)


def feedback_of(verdicts: dict[tuple[str, str], bool]) -> Feedback:
    rows = [{"id": id, "label": label, "verdict": "accepted" if yes else "rejected"} for (id, label), yes in verdicts.items()]
    return Feedback.of(pa.Table.from_pylist(rows))


def table_of(tags: Tags) -> pa.Table:
    rows = [{"id": id, "labels": [*scores], "scores": [*scores.values()]} for id, scores in tags.items()]
    schema = {"id": pa.string(), "labels": pa.list_(pa.string()), "scores": pa.list_(pa.float32())}
    return pa.Table.from_pylist(rows, pa.schema(schema))


def counted(live: LivePrecision) -> Any:
    bands = [(low, part.accepted, part.judged, round(mean, 6)) for low, _, part, mean in live.by_score()]
    nights = {day: (part.accepted, part.judged) for day, part in live.nights.items()}
    return nights, live.total[:2], bands, live.missed


@settings(max_examples=60, deadline=None)
@given(st.lists(TAGS, min_size=1, max_size=3), VERDICTS)
def test_counts_equal_those_of_loops(nights: list[Tags], verdicts: dict[tuple[str, str], bool]) -> None:
    live = LivePrecision(feedback_of(verdicts))
    for number, tags in enumerate(nights):
        for part in (table_of(tags).slice(0, 1), table_of(tags).slice(1)):
            live.update(part)
        live.end_night(str(number))
    latest = {(id, label): score for tags in reversed(nights) for id, part in tags.items() for label, score in part.items()}
    judged = {pair: score for pair, score in latest.items() if pair in verdicts}
    by_night = {}
    for number, tags in enumerate(nights):
        said = [verdicts[id, label] for id, part in tags.items() for label in part if (id, label) in verdicts]
        by_night[str(number)] = (sum(said), len(said))
    bands = []
    for band in reversed(range(10)):
        inside = [pair for pair, score in judged.items() if min(9, int(np.float32(score) * 10)) == band]
        if inside:
            mean = float(np.mean([np.float32(judged[pair]) for pair in inside]))
            bands.append((band / 10, sum(verdicts[pair] for pair in inside), len(inside), round(mean, 6)))
    documents = {id for tags in nights for id in tags}
    missed = sum(yes for (id, label), yes in verdicts.items() if id in documents and (id, label) not in latest)
    assert counted(live) == (by_night, (sum(verdicts[pair] for pair in judged), len(judged)), bands, missed)


def test_the_worst_labels_are_those_whose_upper_bound_is_lowest() -> None:
    """A label with few verdicts is not listed, however wrong."""
    shares = {"a": (30, 40), "b": (150, 200), "c": (5, 25), "d": (0, 19)}
    verdicts = {(f"d{n}", label): n < right for label, (right, n_judged) in shares.items() for n in range(n_judged)}
    live = LivePrecision(feedback_of(verdicts))
    tags: Tags = {}
    for id, label in verdicts:
        tags.setdefault(id, {})[label] = 0.5
    live.update(table_of(tags))
    live.end_night("2026-11-23")
    assert [(label, part.accepted, part.judged) for label, part in live.worst()] == [
        ("c", 5, 25),
        ("b", 150, 200),
        ("a", 30, 40),
    ]
    assert live.total == Share.of(185, 284) and [label for label, _ in live.worst(1)] == ["c"]


@pytest.mark.parametrize(("accepted", "judged"), [(0, 1), (1, 1), (0, 50), (50, 50), (7, 20), (999, 1000)])
def test_intervals_are_those_of_scipy(accepted: int, judged: int) -> None:
    expected = binomtest(accepted, judged).proportion_ci(0.95, method="wilson")
    low, high = wilson(np.array([accepted]), np.array([judged]))
    assert (low[0], high[0]) == pytest.approx((expected.low, expected.high), abs=1e-6)


def test_of_nothing_nothing_is_known() -> None:
    assert Share.of(0, 0) == Share(0, 0, 0.0, 1.0)
