"""Filters in prediction against slow twins: what is left out is as if it were not there."""

from itertools import product
from pathlib import Path
from typing import Any, get_args
from unittest import mock

import numpy as np
import numpy.typing as npt
import pytest
import reference
import torch
from hypothesis import given
from hypothesis import settings as options
from hypothesis import strategies as st
from torch import Tensor
from toys import batch_of, documents, on_workers, toy_model

from xmc_ray.data.filters import DocumentFilters, LabelFilters
from xmc_ray.data.groups import LabelGroups
from xmc_ray.model import filtering
from xmc_ray.model.batch import Batch
from xmc_ray.model.lightxml import LightXML, Scoring
from xmc_ray.model.linear import LinearRanker
from xmc_ray.model.precision import Precision
from xmc_ray.model.predict import PredictConfig, predict
from xmc_ray.model.sharding import Exchange

QUICK = options(max_examples=150, deadline=None, derandomize=True)
PATHS = [(1 << 20, 8), (1, 0), (64, 1 << 30), (1, 1 << 30)]  # of exact scoring: in pairs, or all labels, in chunks

Problem = tuple[LightXML, Batch, DocumentFilters]


@st.composite
def problems(draw: Any) -> Problem:
    """A model over random groups, and a batch of documents with filters that allow from one label to all, in any order."""
    rng = np.random.default_rng(draw(st.integers(0, 10_000)))
    n_labels = draw(st.integers(2, 30))
    n_groups = min(draw(st.sampled_from([1, 2, 3, 7, n_labels])), n_labels)
    groups = LabelGroups(rng.permutation(np.arange(n_labels) % n_groups))
    model = toy_model(groups, seed=1, shortlist=draw(st.integers(1, 5)), lift=draw(st.sampled_from([0.0, 1.0])))
    model.start_from_counts(rng.integers(0, 50, n_labels), 100)
    sizes = draw(st.lists(st.integers(1, n_labels), min_size=1, max_size=4))
    allowed = {str(n): rng.choice(n_labels, size, replace=False) for n, size in enumerate(sizes)}
    batch = batch_of(rng, [[] for _ in range(draw(st.integers(1, 6)))])
    return model, batch, DocumentFilters(LabelFilters.over(allowed, n_labels), rng.integers(0, len(sizes), len(batch)))


def sets(filters: DocumentFilters) -> list[set[int]]:
    return [set(np.flatnonzero(filters.filters.allowed(number)).tolist()) for number in filters.number_D.tolist()]


def check(ranked: Any, expected: list[tuple[list[float], list[int]]]) -> None:
    """The same labels and scores; equal scores may come in any order."""
    for scores, labels, (slow_scores, slow_labels) in zip(*map(Tensor.tolist, ranked), expected, strict=True):
        assert scores == pytest.approx(slow_scores, abs=1e-6) and len(labels) == len(slow_labels)
        for place, label in enumerate(labels):
            if label != slow_labels[place]:
                assert scores[place] == pytest.approx(slow_scores[slow_labels.index(label)], abs=1e-6)


@QUICK
@given(
    problems(),
    st.sampled_from([1, 3, 100]),
    st.sampled_from(get_args(Scoring)),
    st.sampled_from([1, 30]),
    st.sampled_from(PATHS),
    st.sampled_from([1, 1000]),
    st.sampled_from([0, 1 << 20]),
)
def test_filtered_predictions_equal_the_slow_twin(
    problem: Problem, k: int, scoring: Scoring, sure: int, path: tuple[int, int], few: int, table: int
) -> None:
    """Whatever the order of the documents, of which neighbours share a mask, however many groups are few, with a table of what
    all filters name and without.
    """
    model, batch, filters = problem
    paths = mock.patch.multiple("xmc_ray.model.ranking", _SCORES=path[0], _DENSE=path[1])
    with torch.no_grad(), paths, mock.patch.multiple(filtering, _FEW=few, _TABLE=table):
        model.recall.weight *= sure
        of_batch = model.eval().filter_masks(filters.filters).of_batch(filters.number_D)
        check(model.predict(batch, k, scoring, of_batch), reference.predictions(model, batch, k, scoring, sets(filters)))


@QUICK
@given(problems(), st.sampled_from([1, 3, 100]))
def test_filtered_exact_predictions_are_all_scores_filtered(problem: Problem, k: int) -> None:
    """So a document gets k of its labels, where that many score above 0."""
    model, batch, filters = problem
    with torch.no_grad():
        of_batch = model.eval().filter_masks(filters.filters).of_batch(filters.number_D)
        ranked, every = model.predict(batch, k, "exact", of_batch), model.predict(batch, len(model.group_L), "exact")
    expected = []
    for scores, labels, allowed in zip(*map(Tensor.tolist, every), sets(filters), strict=True):
        kept = [(score, label) for score, label in zip(scores, labels, strict=True) if label in allowed][:k]
        kept += [(0.0, -1)] * (k - len(kept))
        expected.append(([score for score, _ in kept], [label for _, label in kept]))
    check(ranked, expected)


def some_filters(rng: np.random.Generator, n_documents: int, n_labels: int = 12) -> DocumentFilters:
    """Of one label, of a few, and all but one."""
    allowed = {"one": np.array([n_labels - 1]), "few": np.arange(0, n_labels, 4), "most": np.arange(1, n_labels)}
    return DocumentFilters(LabelFilters.over(allowed, n_labels), rng.integers(0, 3, n_documents))


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("kept", [256 << 20, 1])
@pytest.mark.parametrize("groups", [7, 12])
def test_documents_keep_their_order_and_their_own_filter(
    precision: Precision, kept: int, groups: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the batches, and however few masks are kept."""
    monkeypatch.setattr(filtering, "_MASK_BYTES", kept)
    model, tokens = toy_model(LabelGroups(np.arange(12) % groups)), documents(20)["tokens"].combine_chunks()
    filters, config = some_filters(np.random.default_rng(0), 20), PredictConfig(token_budget=9, precision=precision)
    scores, labels = predict(model, tokens, 4, config, filters=filters)
    for row, allowed in enumerate(sets(filters)):
        one = filters._replace(number_D=filters.number_D[row : row + 1])
        alone = predict(model, tokens.slice(row, 1), 4, config, filters=one)
        np.testing.assert_allclose(scores[row], alone[0][0], rtol=1e-4 if precision == "float32" else 0.05)
        found = labels[row][labels[row] >= 0].tolist()
        assert ({*found} <= allowed and len(found) == min(4, len(allowed))) or model.table is not None
        assert precision == "bfloat16" or labels[row].tolist() == alone[1][0].tolist()


def test_a_filter_that_allows_all_labels_changes_nothing() -> None:
    tokens = documents(20)["tokens"].combine_chunks()
    filters = LabelFilters.over({"": np.arange(12)}, 12).of_documents(None, 20)
    for n_groups, scoring in product((7, 12), get_args(Scoring)):
        model = toy_model(LabelGroups(np.arange(12) % n_groups))
        plain, filtered = (predict(model, tokens, 4, PredictConfig(), scoring, part) for part in (None, filters))
        for one, other in zip(plain, filtered, strict=True):
            np.testing.assert_array_equal(one, other)


def test_the_linear_ranker_reorders_allowed_labels() -> None:
    """If all labels are candidates, filtering before and after it is the same."""
    rng, model = np.random.default_rng(0), toy_model(lexical=True).eval()
    weights = torch.from_numpy(rng.normal(size=48).astype(np.float32)), torch.from_numpy(rng.normal(size=12).astype(np.float32))
    columns = torch.from_numpy(np.sort(rng.permuted(np.tile(np.arange(32), (12, 1)), axis=1)[:, :4]).astype(np.int32).ravel())
    model.linear = LinearRanker(torch.arange(0, 49, 4), columns, *weights, candidates=12, weight=1.0)
    tokens, filters = documents(20)["tokens"].combine_chunks(), some_filters(rng, 20)
    scores, labels = predict(model, tokens, 12, PredictConfig(), "exact")
    found = predict(model, tokens, 3, PredictConfig(), "exact", filters)
    for row, allowed in enumerate(sets(filters)):
        kept = [place for place, label in enumerate(labels[row].tolist()) if label in allowed][:3]
        assert found[1][row].tolist() == labels[row][kept].tolist() + [-1] * (3 - len(kept))
        np.testing.assert_allclose(found[0][row][: len(kept)], scores[row][kept], rtol=1e-5)


def predicted(exchange: Exchange) -> list[list[npt.NDArray[Any]]]:
    """Over many groups, over two and in flat mode, with longer shortlists than a worker has groups."""
    tokens, found = documents(9)["tokens"].combine_chunks(), []
    filters = some_filters(np.random.default_rng(0), 9, 40)
    for n_groups, scoring in product((13, 2, 40), get_args(Scoring)):
        model = toy_model(LabelGroups(np.arange(40) % n_groups), exchange=exchange, shortlist=8)
        found.append(list(predict(model, tokens, 12, PredictConfig(token_budget=12), scoring, filters)))
    return found


def test_filtered_predictions_of_several_workers_are_those_of_one(tmp_path: Path) -> None:
    """Kind: a worker pads its shortlist with groups that are none, and those of a filter are fewer than it asks for."""
    for worker in on_workers([3], predicted, tmp_path)[3]:
        for together, alone in zip(worker, predicted(Exchange()), strict=True):
            np.testing.assert_allclose(together[0], alone[0], rtol=1e-5)
            np.testing.assert_array_equal(together[1], alone[1])


def test_neighbours_of_one_filter_are_one_run() -> None:
    masks = toy_model().filter_masks(some_filters(np.random.default_rng(0), 1).filters)
    runs = masks.of_batch(np.array([2, 2, 0, 1, 1, 1])).runs
    assert [(run.rows.start, run.rows.stop, run.number) for run in runs] == [(0, 2, 2), (2, 3, 0), (3, 6, 1)]
    assert masks.of_batch(np.array([], np.int64)).runs == []
