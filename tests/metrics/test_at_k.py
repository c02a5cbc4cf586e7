"""Metrics against napkinxc, against plain loops, and against themselves in pieces."""

import json
from typing import Any

import napkinxc.metrics as oracle
import numpy as np
import pyarrow as pa
import pytest
import reference
from hypothesis import given, settings
from hypothesis import strategies as st

from xmc_ray.errors import ConfigError, DataError
from xmc_ray.metrics.at_k import Metrics, propensities, table

BAND_OF = {"0": range(1), "1": range(1, 2), "2-9": range(2, 10), "10-99": range(10, 100), "100+": range(100, 10**9)}
LISTS = pa.list_(pa.int32())

Case = tuple[list[list[int]], list[list[int]], list[int]]
"""Predicted labels and true labels of each document; training documents of each label."""


@st.composite
def cases(draw: st.DrawFn, least_true: int = 0) -> Case:
    n_labels = draw(st.integers(1, 12))
    some = st.lists(st.integers(0, n_labels - 1), unique=True, max_size=n_labels)
    true = st.lists(st.integers(0, n_labels - 1), unique=True, min_size=least_true, max_size=n_labels)
    documents = draw(st.lists(st.tuples(some, true), min_size=1, max_size=8))
    counts = draw(st.lists(st.sampled_from([0, 1, 2, 9, 10, 99, 100, 5000]), min_size=n_labels, max_size=n_labels))
    return [row for row, _ in documents], [row for _, row in documents], counts


@settings(deadline=None)
@given(case=cases(least_true=1), n_documents=st.integers(3, 10**6))
def test_totals_are_napkinxc_s(case: Case, n_documents: int) -> None:
    predicted, truth, counts = case
    total = measure(case, n_documents)["total"]
    weights = 1 / propensities(np.array(counts), n_documents)
    expected = {
        "P": oracle.precision_at_k(truth, predicted, k=10),
        "R": oracle.recall_at_k(truth, predicted, k=10),
        "nDCG": oracle.ndcg_at_k(truth, predicted, k=10),
        "PSP": oracle.psprecision_at_k(truth, predicted, weights, k=10),
        "PSnDCG": oracle.psndcg_at_k(truth, predicted, weights, k=10),
        "coverage": oracle.coverage_at_k(truth, predicted, k=10),
    }
    for name, values in expected.items():
        for k in (1, 3, 5, 10):
            assert total[f"{name}@{k}"] == pytest.approx(values[k - 1], abs=2e-9), f"{name}@{k}"


@settings(deadline=None)
@given(case=cases(), n_documents=st.integers(1, 10**6))
def test_bands_are_those_of_plain_loops(case: Case, n_documents: int) -> None:
    predicted, truth, counts = case
    result = measure(case, n_documents)
    propensity = propensities(np.array(counts), n_documents).tolist()
    bands = {name: {label for label, count in enumerate(counts) if count in band} for name, band in BAND_OF.items()}
    assert set(result["bands"]) == {name for name, inside in bands.items() if inside}
    for name, row in {"total": result["total"], **result["bands"]}.items():
        inside = bands.get(name, set(range(len(counts))))
        assert row["documents"] == sum(bool(inside & set(true)) for true in truth)
        assert row["true_labels"] == len(inside & {label for true in truth for label in true})
        for k in (1, 3, 5, 10):
            expected = reference.metrics_of(predicted, truth, inside, propensity, k)
            found = {metric: row[f"{metric}@{k}"] for metric in expected}
            assert found == pytest.approx(expected, abs=2e-9), (name, k)


@settings(deadline=None)
@given(case=cases(), data=st.data())
def test_documents_in_any_order_and_in_any_batches_give_the_same_result(case: Case, data: st.DataObject) -> None:
    predicted, truth, counts = case
    whole, parts = empty(counts), empty(counts)
    update(whole, predicted, truth)
    for document in data.draw(st.permutations(range(len(truth)))):
        update(parts, [predicted[document]], [truth[document]])
    assert parts.result() == whole.result()
    assert_same(parts, whole)


def test_batches_add_up_exactly_at_a_size_where_floats_would_not() -> None:
    predicted, truth, counts = random_case(n_documents=3000, n_labels=500)
    whole, parts = empty(counts), empty(counts)
    update(whole, predicted, truth)
    for start in reversed(range(0, 3000, 7)):
        update(parts, predicted[start : start + 7], truth[start : start + 7])
    assert_same(parts, whole)
    assert parts.result() == whole.result()


def test_a_large_case_is_napkinxc_s() -> None:
    predicted, truth, counts = case = random_case(n_documents=2000, n_labels=300)
    weights = 1 / propensities(np.array(counts), 1000)
    total = measure(case, 1000)["total"]
    assert total["PSP@5"] == pytest.approx(oracle.psprecision_at_k(truth, predicted, weights, k=5)[4], abs=1e-9)
    assert total["nDCG@10"] == pytest.approx(oracle.ndcg_at_k(truth, predicted, k=10)[9], abs=1e-9)


@settings(deadline=None)
@given(counts=st.lists(st.integers(0, 200), min_size=1).filter(lambda counts: counts[-1]), more=st.integers(2, 50))
def test_propensities_are_napkinxc_s(counts: list[int], more: int) -> None:
    n_documents = max(counts) + more
    rows = [[label for label, count in enumerate(counts) if count > document] for document in range(n_documents)]
    chances = propensities(np.array(counts), n_documents, a=0.6, b=2.6)
    assert 1 / chances == pytest.approx(oracle.Jain_et_al_inverse_propensity(rows, A=0.6, B=2.6))
    assert ((chances > 0) & (chances <= 1)).all()


def test_few_documents_leave_every_propensity_at_one() -> None:
    for n in (0, 1, 2):
        assert propensities(np.array([0, 1, 2]), n).tolist() == [1, 1, 1]


def test_pads_and_short_predictions_count_as_misses() -> None:
    result = measure(([[0], [], [1, 2]], [[0, 1], [2], [0]], [5, 5, 5]), 20)["total"]
    assert result["documents"] == 3
    assert result["P@1"] == pytest.approx(1 / 3)
    assert result["P@10"] == pytest.approx(1 / 30)
    assert result["R@10"] == pytest.approx(0.5 / 3)
    assert result["coverage@10"] == pytest.approx(1 / 3)


def test_a_pad_is_no_label() -> None:
    metrics = empty([5, 5])
    metrics.update(np.array([[-1, -1], [1, -1]]), pa.array([[1], [0]], LISTS))
    assert metrics.result()["total"]["R@10"] == 0


def test_more_columns_than_the_largest_k_change_nothing() -> None:
    narrow, wide = empty([5] * 20), empty([5] * 20)
    update(narrow, [list(range(10))], [[3, 15]])
    update(wide, [list(range(20))], [[3, 15]])
    assert_same(narrow, wide)


def test_documents_without_true_labels_are_counted_and_left_out() -> None:
    counts = [5, 5, 5]
    with_them = measure(([[0], [0], [1]], [[0], [], [0]], counts), 20)
    without = measure(([[0], [1]], [[0], [0]], counts), 20)
    assert (with_them["documents"], with_them["unlabelled"]) == (3, 1)
    assert with_them["total"] == without["total"]
    assert "1 documents without a true label" in table(with_them)


def test_nothing_but_unlabelled_documents() -> None:
    result = measure(([[0], []], [[], []], [5]), 20)
    assert result["total"] == {"documents": 0, "true_labels": 0} | dict.fromkeys(list(result["total"])[2:])
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    assert "–" in table(result)


def test_no_documents_at_all() -> None:
    metrics = empty([5])
    metrics.update(np.empty((0, 5), np.int64), pa.array([], LISTS))
    assert metrics.result()["documents"] == 0


def test_a_true_label_given_twice_counts_once() -> None:
    once, twice = empty([5, 5]), empty([5, 5])
    update(once, [[0, 1]], [[1]])
    update(twice, [[0, 1]], [[1, 1]])
    assert_same(once, twice)


def test_the_truth_may_be_a_slice() -> None:
    whole, slice_of = empty([5, 5, 5]), empty([5, 5, 5])
    whole.update(np.array([[2]]), pa.array([[1, 2]], LISTS))
    slice_of.update(np.array([[2]]), pa.array([[0], [1, 2], [0]], LISTS).slice(1, 1))
    assert_same(whole, slice_of)


@pytest.mark.parametrize(
    ("predicted", "truth", "message"),
    [
        ([[0]], [[3]], "found 3 to 3; expected 0 to 2"),
        ([[0]], [[-1]], "not a label id"),
        ([[3]], [[0]], "not a label id"),
        ([[-2]], [[0]], "expected -1 to 2"),
        ([[0], [1]], [[0]], "found 2 and 1 documents"),
    ],
)
def test_ids_that_do_not_fit_are_errors(predicted: Any, truth: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        empty([5, 5, 5]).update(np.array(predicted), pa.array(truth, LISTS))


def test_settings_that_do_not_fit_are_errors() -> None:
    with pytest.raises(ConfigError, match="0 labels"):
        empty([])
    with pytest.raises(ConfigError, match=r"k = \(0, 1\)"):
        Metrics(np.array([1]), 5, ks=(0, 1))


def test_own_ks_and_bands() -> None:
    metrics = Metrics(np.array([0, 3, 7]), 20, ks=(2, 1, 2), bands=(1, 5))
    update(metrics, [[2, 1]], [[0, 1, 2]])
    result = metrics.result()
    assert [name for name in result["total"] if "@" in name][:2] == ["P@1", "P@2"]
    assert {name: band["P@2"] for name, band in result["bands"].items()} == {"1-4": 0.5, "5+": 0.5}


def test_table_shows_percent_for_the_total_and_each_band() -> None:
    lines = table(measure(([[0, 1], [1]], [[0], [0]], [1, 200]), 1000)).splitlines()
    assert lines[0].split() == ["total", "seen", "1", "seen", "100+"]
    assert lines[1].split() == ["documents", "2", "2", "0"]
    assert lines[2].split() == ["true", "labels", "1", "1", "0"]
    assert lines[3].split() == ["P@1", "50.00", "50.00", "–"]
    assert len({len(line) for line in lines[:-1]}) == 1


def test_table_of_all_bands_fits_a_terminal() -> None:
    lines = table(measure(([[0]], [[0]], [0, 1, 2, 10, 100]), 1000)).splitlines()
    assert max(map(len, lines)) <= 80


def empty(counts: list[int], n_documents: int = 1000) -> Metrics:
    return Metrics(np.array(counts, np.int64), n_documents)


def update(metrics: Metrics, predicted: list[list[int]], truth: list[list[int]]) -> None:
    width = max(map(len, predicted), default=0)
    padded = np.array([row + [-1] * (width - len(row)) for row in predicted], np.int64).reshape(len(predicted), width)
    metrics.update(padded, pa.array(truth, LISTS))


def measure(case: Case, n_documents: int) -> dict[str, Any]:
    predicted, truth, counts = case
    metrics = empty(counts, n_documents)
    update(metrics, predicted, truth)
    return metrics.result()


def random_case(n_documents: int, n_labels: int) -> Case:
    """Predictions that are often right, label frequencies with a long tail."""
    random = np.random.default_rng(0)
    counts = (1000 / np.arange(1, n_labels + 1)).astype(int)
    truth = [random.choice(n_labels, random.integers(1, 9), replace=False).tolist() for _ in range(n_documents)]
    guesses = [random.choice(n_labels, 8, replace=False).tolist() for _ in range(n_documents)]
    mixed = [list(dict.fromkeys(random.permutation(true + guess).tolist())) for true, guess in zip(truth, guesses, strict=True)]
    return mixed, truth, counts.tolist()


def assert_same(one: Metrics, other: Metrics) -> None:
    """Equal to the last bit."""
    for name, value in vars(one).items():
        np.testing.assert_array_equal(value, getattr(other, name), err_msg=name)
