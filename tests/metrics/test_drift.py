"""Drift: what the formula promises, what chance adds, and that a real shift is found."""

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xmc_ray.errors import ConfigError, DataError
from xmc_ray.metrics.drift import Drift, DriftConfig, psi, worst

seeds = st.integers(0, 2**32 - 1)
pairs = st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 10**6)), min_size=1, max_size=40)


@given(pairs=pairs, scale=st.integers(1, 1000))
def test_proportional_counts_are_no_drift(pairs: list[tuple[int, int]], scale: int) -> None:
    counts = np.array([count for count, _ in pairs])
    drift = psi(counts, scale * counts)
    assert drift.total in (0, None)
    assert (drift.total is None) == drift.pooled_L.all()
    assert worst(drift) == []


@given(pairs=pairs)
def test_it_is_symmetric_and_never_negative(pairs: list[tuple[int, int]]) -> None:
    expected, actual = np.array(pairs).T
    there, back = psi(expected, actual), psi(actual, expected)
    assert there.total == back.total
    np.testing.assert_array_equal(there.contribution_L, back.contribution_L)
    np.testing.assert_array_equal(there.expected_L, back.actual_L)
    assert (there.contribution_L >= 0).all()
    assert there.total is None or there.total >= there.contribution_L.sum() >= 0


@given(pairs=pairs)
def test_it_is_the_sum_of_plain_loops(pairs: list[tuple[int, int]]) -> None:
    drift = psi(*np.array(pairs).T)
    assert drift.total == (None if drift.total is None else pytest.approx(psi_of(pairs), rel=1e-9, abs=1e-12))


@settings(deadline=None)
@given(seed=seeds, n_labels=st.integers(1, 20_000), n_before=st.integers(10_000, 300_000), n_now=st.integers(10_000, 300_000))
def test_chance_alone_stays_far_below_the_warning(seed: int, n_labels: int, n_before: int, n_now: int) -> None:
    random, share_L = np.random.default_rng(seed), zipf(n_labels)
    drift = psi(random.multinomial(n_before, share_L), random.multinomial(n_now, share_L))
    assert drift.total is not None and drift.total < 0.05


def test_15000_equally_rare_labels_cannot_be_judged_and_raise_no_alarm() -> None:
    random, share_L = np.random.default_rng(0), np.full(15_000, 1 / 15_000)
    before, now = random.multinomial(100_000, share_L, size=2)
    assert psi_of(list(zip(before.tolist(), now.tolist(), strict=True)), bin_tags=0) > 0.2, "each label its own bin"
    assert psi(before, now).total is None


@settings(deadline=None)
@given(seed=seeds, label=st.integers(0, 14_999))
def test_a_label_that_takes_over_is_found_and_named(seed: int, label: int) -> None:
    random, share_L = np.random.default_rng(seed), zipf(15_000)
    before, now = random.multinomial(100_000, share_L), random.multinomial(80_000, share_L)
    now[label] += 20_000
    drift = psi(before, now)
    first = worst(drift, 3)[0]
    assert drift.total is not None and drift.total > 0.1
    assert first.label == label
    assert first.expected == before[label] / 100_000 and first.actual == now[label] / 100_000
    assert first.contribution == drift.contribution_L[label] > 0.05


def test_a_label_that_vanishes_is_found() -> None:
    drift = psi(np.array([500, 400, 100]), np.array([500, 0, 500]))
    assert {shift.label for shift in worst(drift)} == {1, 2}
    assert min(drift.actual_L) == 0
    assert drift.total is not None and np.isfinite(drift.total) and drift.total > 1


def test_growth_of_the_pool_counts_but_is_no_label_s() -> None:
    rare = np.ones(10_000, np.int64)
    drift = psi(np.append(90_000, rare), np.append(50_000, 5 * rare))
    assert drift.pooled_L.tolist() == [False] + [True] * 10_000
    assert [shift.label for shift in worst(drift)] == [0]
    assert drift.total is not None and drift.total > drift.contribution_L.sum() > 0


def test_worst_come_in_falling_order_and_like_ones_in_that_of_labels() -> None:
    rows = worst(psi(np.array([1000, 1000, 1000, 1000]), np.array([500, 1500, 500, 1500])), 3)
    assert [row.label for row in rows] == [0, 2, 1]
    assert rows[0].contribution == rows[1].contribution >= rows[2].contribution
    assert len(worst(psi(np.array([1000, 1000]), np.array([1000, 2000])), 0)) == 0


@pytest.mark.parametrize(
    ("expected", "actual", "total"),
    [
        ([], [], None),
        ([0, 0], [0, 0], None),
        ([0, 0], [900, 100], None),
        ([900, 100], [0, 0], None),
        ([1], [10**6], None),
        ([5000], [7], None),
        ([100], [10**9], 0.0),
        ([1000], [500], 0.0),
    ],
)
def test_nights_with_little_to_compare(expected: list[int], actual: list[int], total: float | None) -> None:
    drift = psi(np.array(expected, np.int64), np.array(actual, np.int64))
    assert drift.total == total
    assert not drift.contribution_L.any() and worst(drift) == []


def test_three_million_labels_take_no_time() -> None:
    random, share_L = np.random.default_rng(0), zipf(3_000_000)
    before, now = random.multinomial(50_000_000, share_L, size=2)
    best = min(seconds(before, now) for _ in range(3))
    assert best < 1


@pytest.mark.parametrize(("expected", "actual"), [([1, 2], [1]), ([-1, 2], [1, 2]), ([1, 2], [1, -2])])
def test_counts_that_do_not_fit_are_errors(expected: list[int], actual: list[int]) -> None:
    with pytest.raises(DataError, match="expected counts of the same labels, 0 or more"):
        psi(np.array(expected), np.array(actual))


def test_verdicts() -> None:
    gentle, strict = DriftConfig(), DriftConfig(warn=0.1, fail=0.25)
    assert [gentle.verdict(total) for total in (0.0, 0.1, 0.11, 9.0, None)] == ["steady", "steady", "warn", "warn", "unknown"]
    assert [strict.verdict(total) for total in (0.1, 0.25, 0.26, None)] == ["steady", "warn", "fail", "unknown"]


@pytest.mark.parametrize(("warn", "fail"), [(-0.1, None), (0.2, 0.1), (float("nan"), None), (0.1, float("nan"))])
def test_bounds_out_of_order_are_errors(warn: float, fail: float | None) -> None:
    with pytest.raises(ConfigError, match=r"drift\.fail is below drift\.warn; found 0.1|expected at least 0"):
        DriftConfig(warn=warn, fail=fail)


def zipf(n_labels: int) -> np.ndarray:
    """Shares with a long tail, as labels have."""
    weight_L = 1 / np.arange(1, n_labels + 1)
    return weight_L / weight_L.sum()


def seconds(before: np.ndarray, now: np.ndarray) -> float:
    start = time.perf_counter()
    drift: Drift = psi(before, now)
    assert len(worst(drift)) == 20
    return time.perf_counter() - start


def psi_of(pairs: list[tuple[int, int]], bin_tags: float = 100) -> float:
    """The formula, label by label."""
    n_before, n_now = sum(before for before, _ in pairs), sum(now for _, now in pairs)
    n, total, rest = min(n_before, n_now), 0.0, [0.0, 0.0]
    for before, now in pairs:
        e, a = before / n_before, now / n_now
        if max(e, a) < bin_tags / n:
            rest = [rest[0] + e, rest[1] + a]
        else:
            total += (a - e) * np.log((a + 0.5 / n) / (e + 0.5 / n))
    return total + (rest[1] - rest[0]) * np.log((rest[1] + 0.5 / n) / (rest[0] + 0.5 / n))
