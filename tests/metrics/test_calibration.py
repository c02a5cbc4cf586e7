"""Calibration against slow twins: maps, thresholds and their back-off, reliability; nothing held out, or next to nothing."""

from typing import Any

import numpy as np
import pytest
import reference
from hypothesis import given, settings
from hypothesis import strategies as st

from xmc_ray.errors import ConfigError, ModelError
from xmc_ray.metrics import calibration
from xmc_ray.metrics.calibration import (
    Calibration,
    Reliability,
    Selection,
    apply_map,
    calibration_metrics,
    cross_fitted,
    fit_map,
    lowest,
)

QUICK = settings(max_examples=100, deadline=None, derandomize=True)
COUNTS = np.array([500, 50, 50, 5, 1, 0])  # a label of each band, and two of one


@st.composite
def predictions(draw: Any, least: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Scores [D, k], falling, with ties; labels, some missing; hits, likelier with high scores."""
    rng = np.random.default_rng(draw(st.integers(0, 10_000)))
    n_rows, k, values = draw(st.integers(least, 30)), draw(st.integers(1, 5)), draw(st.sampled_from([3, 8, 1000]))
    scores = -np.sort(-rng.integers(0, values + 1, (n_rows, k)) / values, axis=1)
    labels = np.array([rng.permutation(len(COUNTS))[:k] for _ in range(n_rows)], np.int64).reshape(n_rows, k)
    labels[rng.random(labels.shape) < 0.1] = -1
    scores[labels < 0] = 0
    return scores.astype(np.float32), labels, (rng.random(scores.shape) < scores) & (labels >= 0)


@QUICK
@given(predictions(least=1))
def test_the_map_is_the_isotonic_regression_and_rises(problem: Any) -> None:
    scores, hits = (part.ravel() for part in (problem[0], problem[2]))
    expected = reference.rising_steps(scores.tolist(), hits.tolist())
    found = list(zip(*fit_map(scores, hits), strict=True))
    least = 1 / (len(scores) + 2)
    kept_off = [(score, min(max(share, least), 1 - least)) for score, share in expected]
    np.testing.assert_allclose(found, [*kept_off, (1, kept_off[-1][1] + least / 2)], atol=1e-9)
    chances = apply_map(fit_map(scores, hits), np.linspace(0, 1, 101, dtype=np.float32))
    assert (np.diff(chances) >= 0).all() and chances[0] > 0 and chances[-1] < 1


@QUICK
@given(predictions(least=1))
def test_scores_that_differ_stay_different(problem: Any) -> None:
    """Kind: calibration makes scores equal and loses their order. Only the worst ones, below all steps' centres, may be."""
    knots = fit_map(*(part.ravel() for part in (problem[0], problem[2])))
    scores = np.linspace(0, 1, 101, dtype=np.float32)
    chances = apply_map(knots, scores[scores >= knots[0][0]])
    assert (np.diff(chances) > 0).all()


def test_thresholds_come_between_predictions_on_the_topmost_step() -> None:
    """Kind: calibration makes scores equal. One label is right where the other is wrong, so the regression sees one step."""
    scores = np.tile(np.linspace(0.99, 1, 4_000, dtype=np.float32), 2)[:, None]
    labels, best = np.repeat([0, 1], 4_000)[:, None], np.arange(4_000) >= 3_000
    one = Calibration.of(scores, labels, np.concatenate([best, ~best])[:, None], np.array([500, 500]))
    chances, threshold = one.calibrated(scores, labels)[:4_000, 0], one.thresholds(0.9)[0]
    assert chances[0] == pytest.approx(chances[-1], abs=0.01)
    assert chances[2_880] < threshold <= chances[3_000]


@QUICK
@given(predictions(), st.sampled_from([0.1, 0.5, 0.9, 0.99]), st.integers(1, 30), st.integers(1, 60), st.integers(0, 30))
def test_thresholds_equal_the_slow_twin(problem: Any, precision: float, of_label: int, of_band: int, expected: int) -> None:
    one = Calibration.of(*problem, COUNTS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calibration, "ENOUGH_OF_LABEL", of_label)
        patch.setattr(calibration, "ENOUGH_OF_BAND", of_band)
        patch.setattr(calibration, "EXPECTED", expected)
        found = one.thresholds(precision)
    chances = apply_map(one.knots, one.score_N)

    def backed_off(pool: np.ndarray, enough: int, other: float) -> float:
        own = reference.lowest_threshold(chances[pool].tolist(), one.hit_N[pool].tolist(), precision, expected)
        could = int((chances[pool] >= other).sum())
        decides = pool.sum() >= enough and (own < np.inf or could / (could + 1) >= precision)
        return own if decides else other

    for label, band in enumerate(one.band_L):
        of_all = backed_off(np.ones(len(one), bool), 1, np.inf)
        of_alike = backed_off(one.band_L[one.label_N] == band, of_band, of_all)
        assert found[label] == backed_off(one.label_N == label, of_label, of_alike)


def test_a_label_that_cannot_show_it_takes_the_threshold_of_its_band() -> None:
    """Eight sure ones prove nothing of nine in ten, however many unsure ones come with them; sixty wrong ones do."""
    rng = np.random.default_rng(0)
    scores_N, counts = rng.random(40_000).astype(np.float32), np.array([500, 500, 500])
    others = scores_N, np.ones(40_000, np.int64), rng.random(40_000) < scores_N

    def of(n_sure: int, right: bool, n_unsure: int) -> np.ndarray:
        """Thresholds of the label, of that of all others, and of one without any prediction: its band's."""
        scores = np.repeat(np.array([0.97, 0.01], np.float32), [n_sure, n_unsure])
        own = scores, np.zeros(len(scores), np.int64), np.repeat([right, False], [n_sure, n_unsure])
        parts = [np.concatenate(pair)[:, None] for pair in zip(own, others, strict=True)]
        return Calibration.of(parts[0], parts[1], parts[2], counts).thresholds(0.9)

    for n_sure, right, n_unsure in ((8, True, 41), (8, True, 42), (8, True, 400), (8, False, 42)):
        label, _, band = of(n_sure, right, n_unsure)
        assert label == band < 1
    assert np.isinf(of(60, False, 0)[0]) and of(60, True, 0)[0] > of(60, True, 0)[2]


def test_labels_that_are_lucky_on_held_out_documents_do_not_lower_the_precision() -> None:
    """Kind: a figure that was optimised is taken for one that was measured. Each label's best threshold is partly luck."""
    rng, counts = np.random.default_rng(0), np.full(300, 500)

    def draw(of_each: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        labels, scores = np.repeat(np.arange(300), of_each), rng.random(300 * of_each).astype(np.float32)
        return scores[:, None], labels[:, None], (rng.random(len(scores)) < scores)[:, None]

    one, (scores, labels, hits) = Calibration.of(*draw(60), counts), draw(1_000)
    selection = Selection(one.thresholds(0.9))
    selection.update(one.calibrated(scores, labels), labels, hits)
    assert selection.result()["precision"] == pytest.approx(0.9, abs=0.01)


@QUICK
@given(predictions(least=1), st.integers(1, 5))
def test_reliability_equals_the_slow_twin_in_any_portions(problem: Any, k: int) -> None:
    scores, labels, hits = problem
    whole, parts = Reliability(k), Reliability(k)
    whole.update(scores, labels, hits)
    for row in range(len(scores)):
        parts.update(scores[row : row + 1], labels[row : row + 1], hits[row : row + 1])
    known = labels[:, :k] >= 0
    if not known.any():
        assert whole.result() is parts.result() is None
        return
    expected = reference.expected_calibration_error(scores[:, :k][known].tolist(), hits[:, :k][known].tolist(), 15)
    assert whole.result() == pytest.approx(expected, abs=1e-6) and parts.result() == pytest.approx(expected, abs=1e-6)


def test_chances_are_chances_and_thresholds_hold_on_documents_unseen() -> None:
    rng = np.random.default_rng(0)

    def draw() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        scores = -np.sort(-rng.random((4000, 5)).astype(np.float32), axis=1)
        labels = np.argsort(rng.random((4000, len(COUNTS))), axis=1)[:, :5]
        return scores, labels, rng.random(scores.shape) < scores**3  # the model is much too sure

    one, (scores, labels, hits) = Calibration.of(*draw(), COUNTS), draw()
    chances, before, after = one.calibrated(scores, labels), Reliability(), Reliability()
    before.update(scores, labels, hits)
    after.update(chances, labels, hits)
    assert before.result() > 0.2 and after.result() < 0.02
    for precision in (0.5, 0.8, 0.9):
        selection = Selection(one.thresholds(precision))
        selection.update(chances, labels, hits)
        told = selection.result()
        assert told["precision"] == pytest.approx(precision, abs=0.03) and told["never"] == 0
        assert told["coverage"] + told["abstention"] == 1


@QUICK
@given(predictions(least=2))
def test_cross_fitted_figures_are_of_documents_that_the_map_has_not_seen(problem: Any) -> None:
    """Each half measured by the other's map; never-assigned labels are those of the calibration in use."""
    scores, labels, hits = problem
    one = Calibration.of(*problem, COUNTS)
    told = calibration_metrics(one, cross_fitted(problem, COUNTS))
    assert told["measured_on"] == len(scores)
    reliability, tags = Reliability(), 0
    for start in (0, 1):  # so few documents are dealt one by one
        other = Calibration.of(*(part[1 - start :: 2] for part in problem), COUNTS)
        rows = scores[start::2], labels[start::2], hits[start::2]
        reliability.update(other.calibrated(*rows[:2]), *rows[1:])
        selection = Selection(other.thresholds(0.5))
        selection.update(other.calibrated(*rows[:2]), *rows[1:])
        tags += selection.tags
    assert told["ECE@5"] == pytest.approx(reliability.result())
    assert told["thresholds"]["0.5"]["tags"] == tags
    assert told["thresholds"]["0.5"]["never"] == np.isinf(one.thresholds(0.5)).sum()


def test_neighbours_are_on_the_same_side_of_cross_fitting() -> None:
    numbers = np.arange(320, dtype=np.float32)[:, None]
    (_, (first, *_)), (_, (second, *_)) = cross_fitted((numbers, np.zeros((320, 1), np.int64), numbers > 9), COUNTS)
    assert first[:30, 0].tolist() == [*range(10), *range(20, 30), *range(40, 50)]
    assert second[:20, 0].tolist() == [*range(10, 20), *range(30, 40)] and len(first) == len(second) == 160


def test_a_precision_that_nobody_reaches_never_tags() -> None:
    scores, labels = np.full((100, 1), 0.9, np.float32), np.zeros((100, 1), np.int64)
    one = Calibration.of(scores, labels, np.zeros((100, 1), bool), COUNTS)
    assert (one.thresholds(0.5) > 1).all()
    selection = Selection(one.thresholds(0.5))
    selection.update(one.calibrated(scores, labels), labels, np.zeros((100, 1), bool))
    assert selection.result() == {"precision": None, "coverage": 0.0, "abstention": 1.0, "tags": 0, "never": len(COUNTS)}
    for wrong in (0, -0.1, 1, 1.1, float("nan")):
        with pytest.raises(ConfigError, match="invalid value of min_precision"):
            one.thresholds(wrong)


def test_scores_that_are_not_finite_are_an_error() -> None:
    """Kind: a number that is no number goes on. Sorted and averaged, it would give every label some chance."""
    scores, labels = np.array([[0.5, 0.25], [np.nan, 0.1]], np.float32), np.zeros((2, 2), np.int64)
    with pytest.raises(ModelError, match=r"scores are not finite; found 1 of 2 held-out documents with such a score"):
        Calibration.of(scores, labels, labels == 0, COUNTS)


def test_fitted_on_nothing() -> None:
    none = np.zeros((0, 5), np.float32), np.zeros((0, 5), np.int64), np.zeros((0, 5), bool)
    one = Calibration.of(*none, COUNTS)
    assert len(one) == 0 and np.isinf(one.thresholds(0.5)).all() and sum(one.sizes().values()) == 0
    scores = np.array([[0.75, 0.5]], np.float32)
    np.testing.assert_array_equal(one.calibrated(scores, np.array([[1, 0]])), scores)
    assert one.calibrated(*none[:2]).shape == (0, 5)
    assert Reliability().result() is None and Selection(one.thresholds(0.5)).result()["coverage"] is None
    assert np.isinf(lowest(none[1].ravel(), none[0].ravel(), none[2].ravel(), 3, 0.5)).all()


@QUICK
@given(predictions())
def test_round_trip(problem: Any) -> None:
    one = Calibration.of(*problem, COUNTS)
    again = Calibration.from_table(one.to_table("0123"), COUNTS)
    np.testing.assert_array_equal(again.thresholds(0.5), one.thresholds(0.5))
    np.testing.assert_array_equal(again.calibrated(*problem[:2]), one.calibrated(*problem[:2]))
    assert sum(one.sizes().values()) == len(again) == (problem[1] >= 0).sum()
