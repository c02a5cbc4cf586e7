"""Recall head against dense autograd: every document meets every group."""

import numpy as np
import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from toys import dense, pairs_of

from xmc_ray.model.recall import RecallHead
from xmc_ray.model.sharding import Exchange

WIDTH = 6


def random_truth(rng: np.random.Generator, n_rows: int, n_groups: int) -> list[list[int]]:
    """True groups of each document: none, some, or some of them more than once."""
    return [rng.integers(0, n_groups, rng.integers(0, 2 * n_groups)).tolist() for _ in range(n_rows)]


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.integers(0, 10_000), st.integers(1, 6), st.integers(1, 9), st.integers(1, 9))
def test_loss_gradients_and_shortlist_equal_dense_autograd(seed: int, n_rows: int, n_groups: int, documents: int) -> None:
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    head = RecallHead(WIDTH, n_groups, Exchange(), seed)
    head.weight.mul_(50)
    head.bias.normal_()
    features_BF = torch.randn(n_rows, WIDTH, requires_grad=True)
    truth, k = random_truth(rng, n_rows, n_groups), int(rng.integers(1, n_groups + 1))
    weight, bias = (parameter.detach().clone().requires_grad_() for parameter in (head.weight, head.bias))

    loss, shortlist_BK = head.loss(features_BF, *pairs_of(truth), k, documents)
    expected = reference.recall_loss(features_BF, weight, bias, truth, documents)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-5)
    (of_features,) = torch.autograd.grad(loss, features_BF)
    slow_of_features, *slow_of_rows = torch.autograd.grad(expected, [features_BF, weight, bias])
    torch.testing.assert_close(of_features, slow_of_features, rtol=1e-4, atol=1e-5)
    for fast, slow in zip(dense(head), slow_of_rows, strict=True):
        torch.testing.assert_close(fast, slow, rtol=1e-4, atol=1e-5)
    assert torch.equal(shortlist_BK, (features_BF @ weight.T + bias).topk(k).indices)


def test_the_features_gradient_follows_what_is_done_to_the_loss() -> None:
    features_BF = torch.randn(3, WIDTH, requires_grad=True)
    head = RecallHead(WIDTH, 4, Exchange(), 0)
    losses = [head.loss(features_BF, *pairs_of([[0], [1, 2], []]), 2, 3)[0] for _ in range(2)]
    once, thrice = (torch.autograd.grad(factor * loss, features_BF)[0] for factor, loss in zip((1, 3), losses, strict=True))
    torch.testing.assert_close(3 * once, thrice)


def test_many_groups_come_in_chunks_each_once() -> None:
    n_groups = 2500
    head = RecallHead(WIDTH, n_groups, Exchange(), 0)
    features_BF = torch.randn(4, WIDTH)
    weight, bias = (parameter.detach().clone().requires_grad_() for parameter in (head.weight, head.bias))
    target_BG = torch.zeros(4, n_groups)
    target_BG[1, 2499] = target_BG[2, 0] = 1
    logits_BG = features_BF @ weight.T + bias
    torch.nn.functional.binary_cross_entropy_with_logits(logits_BG, target_BG, reduction="sum").div(4).backward()
    head.loss(features_BF, torch.tensor([1, 2]), torch.tensor([2499, 0]), 1, 4)
    chunks = list(head.gradients())
    assert max(len(chunk.bias) for chunk in chunks) <= 1024
    assert sum(len(chunk.bias) for chunk in chunks) == n_groups
    for fast, slow in zip(dense(head, chunks), (weight.grad, bias.grad), strict=True):
        torch.testing.assert_close(fast, slow, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("k", [1, 3, 5])
def test_the_best_groups_are_in_falling_order(k: int) -> None:
    head = RecallHead(WIDTH, 5, Exchange(), 0)
    logits_BG = torch.tensor([[0.1, 3.0, -2.0, 1.0, 0.5], [5.0, 4.0, 3.0, 2.0, 1.0]])
    logit_BK, group_BK = head.best(logits_BG, k)
    assert group_BK.tolist() == [[1, 3, 4, 0, 2][:k], [0, 1, 2, 3, 4][:k]]
    assert torch.equal(logit_BK, logits_BG.gather(1, group_BK))
