"""The whole model's loss, gradients and predictions against per-document loops."""

from itertools import product
from pathlib import Path
from typing import Any, get_args
from unittest import mock

import numpy as np
import numpy.typing as npt
import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from toys import batch_of, dense, documents, on_workers, pairs_of, toy_model

from xmc_ray.data.groups import LabelGroups
from xmc_ray.metrics.at_k import propensities
from xmc_ray.model.batch import Batch
from xmc_ray.model.lightxml import LightXML, Scoring
from xmc_ray.model.predict import PredictConfig, predict
from xmc_ray.model.sharding import Exchange

QUICK = settings(max_examples=40, deadline=None, derandomize=True)
Problem = tuple[LightXML, Batch, list[list[int]]]


@st.composite
def problems(draw: Any) -> Problem:
    """A model over random groups (one group, flat, few, many) and a batch with any number of true labels, some twice."""
    seed = draw(st.integers(0, 10_000))
    rng = np.random.default_rng(seed)
    n_labels = draw(st.integers(2, 30))
    n_groups = min(draw(st.sampled_from([1, 2, 3, 7, n_labels])), n_labels)
    groups = LabelGroups(rng.permutation(np.arange(n_labels) % n_groups))
    model = toy_model(groups, seed=seed, shortlist=draw(st.integers(1, 5)), lift=draw(st.sampled_from([0.0, 1.0])))
    model.start_from_counts(rng.integers(0, 50, n_labels), 100)
    truth = [rng.integers(0, n_labels, rng.integers(0, 10)).tolist() for _ in range(draw(st.integers(1, 6)))]
    return model, batch_of(rng, truth), truth


@QUICK
@given(problems(), st.sampled_from([None, 0.5, 1.0, 7.0]), st.integers(0, 99))
def test_loss_and_gradients_equal_the_slow_twin(problem: Problem, judged_weight: float | None, seed: int) -> None:
    """With and without labels that an editor has judged."""
    model, batch, truth = problem
    judged: list[list[int]] = [[] for _ in truth]
    if judged_weight is not None:
        model.judged_weight, rng = judged_weight, np.random.default_rng(seed)
        judged = [rng.permutation(len(model.group_L))[: rng.integers(0, 5)].tolist() for _ in truth]
        judged = [sorted({*said, *labels[: rng.integers(0, 3)]}) for said, labels in zip(judged, truth, strict=True)]
        batch = Batch(batch.tokens_BT, batch.mask_BT, batch.row_P, batch.label_P, *pairs_of(judged))
    rows, losses = reference.rows_of(model), model(batch)
    expected = reference.losses(model, rows, batch, truth, judged)
    for fast, slow in zip(losses, expected, strict=True):
        torch.testing.assert_close(fast.double(), slow, rtol=1e-4, atol=1e-4)

    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    of_dense = torch.autograd.grad(losses.recall + losses.rank, list(trained.values()))
    slow_gradients = torch.autograd.grad(sum(expected), [*trained.values(), *rows.values()])
    of_rows = [gradient for head in model.heads.values() for gradient in dense(head)]
    for name, fast, slow in zip([*trained, *rows], [*of_dense, *of_rows], slow_gradients, strict=True):
        fast, slow = (gradient.to_dense() if gradient.is_sparse else gradient for gradient in (fast, slow))
        torch.testing.assert_close(fast, slow, rtol=1e-3, atol=1e-4, msg=lambda message, name=name: f"{name}: {message}")


PATHS = [(1 << 20, 8), (1, 0), (64, 1 << 30), (1, 1 << 30)]  # as it is, in pairs, all labels in some chunks, in many


@settings(QUICK, max_examples=150)
@given(
    problems(),
    st.sampled_from([1, 3, 5, 100]),
    st.sampled_from(get_args(Scoring)),
    st.sampled_from([1, 30]),
    st.sampled_from(PATHS),
)
def test_predictions_equal_the_slow_twin(problem: Problem, k: int, scoring: Scoring, sure: int, path: tuple[int, int]) -> None:
    model, batch, _ = problem
    with torch.no_grad(), mock.patch.multiple("xmc_ray.model.ranking", _SCORES=path[0], _DENSE=path[1]):
        model.recall.weight *= sure  # a recall that is sure of itself leaves few groups to look at
        ranked = model.eval().predict(batch, k, scoring)
        expected = reference.predictions(model, batch, k, scoring)
    for scores, labels, (slow_scores, slow_labels) in zip(*map(Tensor.tolist, ranked), expected, strict=True):
        assert len(labels) == k
        real = [label for label in labels if label >= 0]
        assert len(set(real)) == len(real), "a label stands twice"
        assert labels[len(real) :] == [-1] * (k - len(real)), "a pad before a label"
        assert scores[len(real) :] == [0.0] * (k - len(real))
        assert scores == pytest.approx(slow_scores, abs=1e-5)
        for place, label in enumerate(labels):
            if label != slow_labels[place]:  # equal scores may come in any order
                assert scores[place] == pytest.approx(slow_scores[slow_labels.index(label)], abs=1e-5)


@QUICK
@given(problems(), st.sampled_from([1, 5]))
def test_exact_is_grouped_over_all_groups(problem: Problem, k: int) -> None:
    model, batch, _ = problem
    with torch.no_grad():
        exact = model.eval().predict(batch, k, "exact")
        model.shortlist = model.recall.n_groups
        torch.testing.assert_close(exact.score_Bk, model.predict(batch, k).score_Bk, rtol=1e-5, atol=1e-7)


def predicted(exchange: Exchange) -> list[list[npt.NDArray[Any]]]:
    """Exact predictions over many groups, over two and in flat mode, without a lift and with one of every other label."""
    tokens, config, found = documents(9)["tokens"].combine_chunks(), PredictConfig(token_budget=12), []
    for lift, n_groups in product((0.0, 1.0), (13, 2, 40)):
        model = toy_model(LabelGroups(np.arange(40) % n_groups), exchange=exchange, shortlist=1, lift=lift)
        model.start_from_counts(np.arange(40) % 2 * 500, 1000)
        found.append(list(predict(model, tokens, 4, config, "exact")))
    return found


def test_exact_predictions_of_several_workers_are_those_of_one(tmp_path: Path) -> None:
    for worker in on_workers([3], predicted, tmp_path)[3]:
        for together, alone in zip(worker, predicted(Exchange()), strict=True):
            np.testing.assert_allclose(together[0], alone[0], rtol=1e-5)
            np.testing.assert_array_equal(together[1], alone[1])


def test_the_loss_is_a_sum_over_documents_divided_as_told() -> None:
    model, batch = toy_model(), batch_of(np.random.default_rng(0), [[0, 3], [5], []])
    for one, other in zip(model(batch), model(batch, documents=12), strict=True):
        torch.testing.assert_close(one, 4 * other)


def test_bfloat16_stays_close_to_float32() -> None:
    model = toy_model(LabelGroups(np.arange(40) % 8), shortlist=3)
    batch = batch_of(np.random.default_rng(0), [[0, 5], [7], [3, 11, 12], []])
    exact = model(batch)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = model(batch)
    (rounded.recall + rounded.rank).backward()
    for one, other in zip(exact, rounded, strict=True):
        torch.testing.assert_close(one, other, rtol=0.02, atol=0.02)


def test_flat_mode_has_no_ranking_stage() -> None:
    model = toy_model(LabelGroups(np.arange(12)))
    assert model.table is None and model.bottleneck is None
    assert list(model.heads) == ["recall"]
    assert model(batch_of(np.random.default_rng(0), [[1], [2]])).rank.item() == 0


@pytest.mark.parametrize("table", ["float32", "bfloat16"])
def test_biases_start_at_the_log_odds_of_training(table: str) -> None:
    model = toy_model(LabelGroups(np.array([0, 0, 1])), table=table)
    model.start_from_counts(np.array([30, 10, 20]), 1000)
    assert model.recall.bias.sigmoid().tolist() == pytest.approx([0.04, 0.02], rel=0.05)
    assert model.table is not None and str(model.table.weight.dtype) == f"torch.{table}"
    assert model.table.bias.sigmoid()[0, :2].tolist() == pytest.approx([30 / 40, 10 / 40], rel=0.05)


@pytest.mark.parametrize("strength", [0.5, 1.0])
@pytest.mark.parametrize("groups", [[0, 0, 1, 1, 2], [0, 1, 2, 3, 4]])
def test_the_lift_makes_up_for_what_annotators_leave_out(strength: float, groups: list[int]) -> None:
    counts, labels = np.array([300, 40, 7, 1, 0]), LabelGroups(np.array(groups))
    model, plain = (toy_model(labels, shortlist=5, lift=lift) for lift in (strength, 0.0))
    for one in (model, plain):
        one.start_from_counts(counts, 1000)
    assert plain.recall.lift is None and model.recall.lift is not None
    expected = reference.lifts(groups, counts.tolist(), propensities(counts, 1000).tolist(), strength)
    assert model.recall.lift.tolist() == pytest.approx(expected, rel=1e-5)
    torch.testing.assert_close(model.recall.bias, plain.recall.bias)  # it is no part of the loss: the slow twins

    if labels.flat:  # so the odds of every label are divided by its propensity
        batch = batch_of(np.random.default_rng(0), [[0], [3]])
        score, lifted = (one.eval().predict(batch, 5) for one in (plain, model))
        by_label, lifted_by_label = (
            torch.zeros(2, 5).scatter(1, one.label_Bk, torch.logit(one.score_Bk)) for one in (score, lifted)
        )
        worth = -strength * np.log(propensities(counts, 1000))
        np.testing.assert_allclose((lifted_by_label - by_label).detach(), [worth, worth], rtol=1e-3, atol=1e-5)


@QUICK
@given(problems())
def test_log_odds_are_those_of_the_predicted_scores(problem: Problem) -> None:
    model, batch, _ = problem
    n_labels = len(model.group_L)
    with torch.no_grad():
        features_BF = model.eval().features(batch)
        scores, labels = model.predict(batch, n_labels, "exact")
        score_BL = torch.zeros(len(batch), n_labels).scatter_(1, labels, scores)
        recall_BG, rank_BGM = model.probabilities(features_BF)
        for label in range(n_labels):
            group = int(model.group_L[label])
            odds_B = model.log_odds(features_BF, label)
            assert odds_B.dtype == torch.float64
            torch.testing.assert_close(odds_B.sigmoid().float(), score_BL[:, label], rtol=1e-3, atol=1e-6)
            rank_B = 1 if rank_BGM is None or model.table is None else rank_BGM[:, group, int(model.table.slot_L[label])]
            torch.testing.assert_close(recall_BG[:, group] * rank_B, score_BL[:, label], rtol=1e-3, atol=1e-6)


def test_log_odds_do_not_saturate() -> None:
    model = toy_model()
    assert model.table is not None
    model.recall.bias.data.fill_(60.0)
    model.table.bias.data.fill_(60.0)
    (odds,) = model.log_odds(torch.zeros(1, model.width), 3).tolist()
    assert 50 < odds < 60, "in float32 the score is 1 and its log-odds are infinite"


@pytest.mark.parametrize("groups", [LabelGroups(np.arange(12) % 7), LabelGroups(np.arange(12))])
def test_a_disabled_label_is_never_predicted_and_others_keep_their_scores(groups: LabelGroups) -> None:
    model, batch = toy_model(groups).eval(), batch_of(np.random.default_rng(0), [[], []])
    with torch.no_grad():
        before = [dict(zip(*row, strict=True)) for row in listed(model, batch)]
        model.disable(np.array([3, 8]))
        after = [dict(zip(*row, strict=True)) for row in listed(model, batch)]
        assert model.log_odds(model.features(batch), 3).isneginf().all()
    for old, new in zip(before, after, strict=True):
        assert set(new) == set(old) - {3, 8}
        assert all(new[label] == pytest.approx(old[label]) for label in new)
    model.disable(np.array([], np.int64))


def listed(model: LightXML, batch: Batch) -> list[tuple[list[int], list[float]]]:
    """Labels and scores of each document, without padding."""
    scores, labels = model.predict(batch, 12, "exact")
    return [(row[row >= 0].tolist(), score[row >= 0].tolist()) for row, score in zip(labels, scores, strict=True)]


def test_the_model_says_which_of_its_parameters_are_what() -> None:
    model = toy_model(lexical=True)
    trained = model.trained_parameters()
    assert set(trained.encoder) == {"encoder.vectors.weight", "encoder.mix.weight", "encoder.mix.bias"}
    assert set(trained.words) == {"encoder.vectors.weight"}
    assert set(trained.terms) == {"lexical.vectors.weight"}
    assert set(trained.head) == {"lexical.mix.weight", "lexical.mix.bias", "bottleneck.weight", "bottleneck.bias"}
    assert set(trained.dense) == {*trained.encoder, *trained.head} - {*trained.words}
    rows = {f"{name}.{kind}" for name in model.heads for kind in ("weight", "bias")}
    assert {*trained.encoder, *trained.terms, *trained.head} | rows == {name for name, _ in model.named_parameters()}
    parameters = dict(model.named_parameters())
    assert all(parameters[name] is parameter for part in trained for name, parameter in part.items())
    assert model.encoder is not None
    model.encoder.requires_grad_(False)
    assert model.trained_parameters().encoder == model.trained_parameters().words == {}
    assert set(toy_model(LabelGroups(np.arange(12))).trained_parameters().head) == set(), "flat: rows alone"
