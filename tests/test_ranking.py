"""Candidates and grouped scores against per-document loops; the model's loss and predictions against the same."""

from typing import Any

import numpy as np
import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from xmc_ray.errors import ConfigError
from xmc_ray.groups import LabelGroups
from xmc_ray.model import LightXML, ModelConfig
from xmc_ray.ranking import LabelTable, candidate_pairs, grouped_scores
from xmc_ray.text import Batch

QUICK = settings(max_examples=40, deadline=None, derandomize=True)


class BagOfTokens(nn.Module):
    """An encoder without a transformer: the mean of token vectors, so that properties can be checked a hundred times."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.vectors, self.width = nn.Embedding(20, width), width

    def forward(self, tokens_BT: Tensor, mask_BT: Tensor) -> Tensor:
        kept = self.vectors(tokens_BT) * mask_BT[..., None]
        return kept.sum(1) / mask_BT.sum(1, keepdim=True)  # type: ignore[no-any-return]


@st.composite
def problems(draw: Any) -> tuple[LightXML, Batch, list[list[int]]]:
    """A model over random groups (one group, flat, few, many) and a batch with any number of true labels."""
    seed = draw(st.integers(0, 10_000))
    rng = np.random.default_rng(seed)
    n_labels = draw(st.integers(2, 30))
    n_groups = draw(st.sampled_from([1, 2, 3, 7, n_labels]))
    n_groups = min(n_groups, n_labels)
    groups = LabelGroups(rng.permutation(np.arange(n_labels) % n_groups))
    torch.manual_seed(seed)
    config = ModelConfig(shortlist=draw(st.integers(1, 5)), bottleneck=8, dropout=0.0)
    model = LightXML(BagOfTokens(), groups, config)  # type: ignore[arg-type]
    model.start_from_counts(rng.integers(0, 50, n_labels), 100)
    n_rows = draw(st.integers(1, 6))
    truth = [sorted(rng.choice(n_labels, rng.integers(0, min(n_labels, 9)), replace=False).tolist()) for _ in range(n_rows)]
    return model, batch_of(rng, truth), truth


def batch_of(rng: np.random.Generator, truth: list[list[int]]) -> Batch:
    tokens_BT = torch.from_numpy(rng.integers(0, 20, (len(truth), 5)))
    mask_BT = torch.arange(5) < torch.from_numpy(rng.integers(1, 6, (len(truth), 1)))
    pairs = [(row, label) for row, labels in enumerate(truth) for label in labels]
    row_P, label_P = (torch.tensor([pair[side] for pair in pairs], dtype=torch.long) for side in (0, 1))
    return Batch(tokens_BT, mask_BT, row_P, label_P)


@QUICK
@given(problems())
def test_candidates_are_the_shortlist_and_every_true_group_once(problem: tuple[LightXML, Batch, list[list[int]]]) -> None:
    model, batch, truth = problem
    recall_BG = model.recall(model.encoder(batch.tokens_BT, batch.mask_BT))
    shortlist_BK = recall_BG.topk(model.shortlist).indices
    pairs = candidate_pairs(shortlist_BK, batch.row_P, model.group_L[batch.label_P])
    expected = reference.candidate_groups(recall_BG.tolist(), model.shortlist, model.group_L.tolist(), truth)
    found = list(zip(pairs.row_N.tolist(), pairs.group_N.tolist(), strict=True))
    assert sorted(found) == sorted((row, group) for row, groups in enumerate(expected) for group in groups)
    assert pairs.key_N.tolist() == sorted(set(pairs.key_N.tolist()))


@QUICK
@given(problems())
def test_loss_and_gradients_equal_the_slow_twin(problem: tuple[LightXML, Batch, list[list[int]]]) -> None:
    model, batch, truth = problem
    losses = model(batch)
    expected = reference.losses(model, batch, truth)
    for fast, slow in zip(losses, expected, strict=True):
        torch.testing.assert_close(fast, slow, rtol=1e-4, atol=1e-4)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    gradients = [torch.autograd.grad(sum(pair), parameters, allow_unused=True) for pair in (losses, expected)]
    for fast, slow in zip(*gradients, strict=True):
        fast, slow = (torch.zeros(()) if gradient is None else gradient for gradient in (fast, slow))
        torch.testing.assert_close(fast, slow.expand_as(fast), rtol=1e-3, atol=1e-4)


@QUICK
@given(problems(), st.sampled_from([1, 3, 5, 100]))
def test_predictions_equal_the_slow_twin(problem: tuple[LightXML, Batch, list[list[int]]], k: int) -> None:
    model, batch, _ = problem
    with torch.no_grad():
        ranked = model.eval().predict(batch, k)
        expected = reference.predictions(model, batch, k)
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


def test_more_true_groups_than_the_shortlist_lose_no_positive() -> None:
    pairs = candidate_pairs(torch.tensor([[3], [0]]), torch.tensor([0, 0, 0, 1]), torch.tensor([0, 1, 2, 0]))
    assert list(zip(pairs.row_N.tolist(), pairs.group_N.tolist(), strict=True)) == [(0, 0), (1, 0), (0, 1), (0, 2), (0, 3)]


def test_grouped_scores_are_dot_products() -> None:
    torch.manual_seed(0)
    vectors_BH, weight_GMH = torch.randn(4, 8), torch.randn(5, 16, 8)
    pairs = candidate_pairs(torch.tensor([[0, 4], [4, 2], [1, 0], [4, 3]]), torch.tensor([0]), torch.tensor([1]))
    expected = torch.stack([weight_GMH[g] @ vectors_BH[b] for b, g in zip(pairs.row_N, pairs.group_N, strict=True)])
    torch.testing.assert_close(grouped_scores(vectors_BH, weight_GMH, pairs), expected, rtol=1e-5, atol=1e-5)


def test_the_choice_of_candidates_has_no_gradient_and_pads_have_none() -> None:
    groups = LabelGroups(np.array([0, 0, 0, 1, 1]))
    table = LabelTable(groups, width=8)
    table.loss(torch.randn(2, 8), torch.tensor([[0], [1]]), torch.tensor([0]), torch.tensor([1])).backward()
    used = table.valid(torch.arange(2))
    assert table.weight_GMH.grad is not None
    assert table.weight_GMH.grad[~used].abs().sum() == 0
    assert (table.weight_GMH.grad[used].abs().sum(-1) > 0).all()


def test_bfloat16_stays_close_to_float32() -> None:
    rng = np.random.default_rng(0)
    truth = [[0, 5], [7], [3, 11, 12], []]
    torch.manual_seed(0)
    groups = LabelGroups(np.arange(40) % 8)
    model = LightXML(BagOfTokens(), groups, ModelConfig(shortlist=3, bottleneck=16, dropout=0.0))  # type: ignore[arg-type]
    batch = batch_of(rng, truth)
    exact = model(batch)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = model(batch)
    (rounded.recall + rounded.rank).backward()
    for one, other in zip(exact, rounded, strict=True):
        torch.testing.assert_close(one, other, rtol=0.02, atol=0.02)


def test_biases_start_at_the_log_odds_of_training() -> None:
    groups = LabelGroups(np.array([0, 0, 1]))
    model = LightXML(BagOfTokens(), groups, ModelConfig(shortlist=1, bottleneck=8))  # type: ignore[arg-type]
    model.start_from_counts(np.array([30, 10, 20]), 1000)
    assert model.recall.bias.sigmoid().tolist() == pytest.approx([0.04, 0.02], rel=0.05)
    assert model.table is not None
    shares = model.table.bias_GM.sigmoid()
    assert [shares[0, 0].item(), shares[0, 1].item()] == pytest.approx([30 / 40, 10 / 40], rel=0.05)


@pytest.mark.parametrize("settings_", [{"bottleneck": 12}, {"bottleneck": 0}, {"shortlist": 0}])
def test_settings_that_do_not_fit(settings_: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match=next(iter(settings_))):
        ModelConfig(**settings_)
