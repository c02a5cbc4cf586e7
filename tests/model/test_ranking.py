"""Candidates, the label table's loss, gradients and probabilities against dense autograd and per-document loops."""

import numpy as np
import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from toys import dense, pairs_of

from xmc_ray.data.groups import LabelGroups
from xmc_ray.model.ranking import LabelTable
from xmc_ray.model.sharding import Exchange

QUICK = settings(max_examples=40, deadline=None, derandomize=True)
WIDTH = 8


class Problem:
    """A table over up to 30 labels in any number of groups, documents with any number of true labels, some twice."""

    def __init__(self, seed: int, exchange: Exchange | None = None) -> None:
        rng = np.random.default_rng(seed)
        n_labels = int(rng.integers(1, 31))
        n_groups = int(rng.integers(1, n_labels + 1))
        self.groups = LabelGroups(rng.permutation(np.arange(n_labels) % n_groups))
        self.table = LabelTable(self.groups, WIDTH, exchange or Exchange(), seed)
        torch.manual_seed(seed)
        self.table.bias.normal_()
        self.rows, k = int(rng.integers(1, 7)), int(rng.integers(1, n_groups + 1))
        self.vectors_BH = torch.randn(self.rows, WIDTH, requires_grad=True)
        self.shortlist_BK = torch.stack([torch.from_numpy(rng.permutation(n_groups)[:k]) for _ in range(self.rows)])
        self.truth = [rng.integers(0, n_labels, rng.integers(0, 12)).tolist() for _ in range(self.rows)]

    @property
    def places(self) -> list[tuple[int, int]]:
        return list(zip(self.groups.group_L.tolist(), self.groups.slot_L.tolist(), strict=True))

    @property
    def chosen(self) -> list[set[int]]:
        """The groups that each document's candidates come from."""
        of_truth = ({int(self.groups.group_L[label]) for label in labels} for labels in self.truth)
        return [set(groups) | true for groups, true in zip(self.shortlist_BK.tolist(), of_truth, strict=True)]


problems = st.integers(0, 100_000).map(Problem)


@QUICK
@given(problems, st.integers(1, 9))
def test_loss_and_gradients_equal_dense_autograd(problem: Problem, documents: int) -> None:
    table, vectors_BH = problem.table, problem.vectors_BH
    weight, bias = (parameter.detach().clone().requires_grad_() for parameter in (table.weight, table.bias))
    loss = table.loss(vectors_BH, problem.shortlist_BK, *pairs_of(problem.truth), documents)
    expected = reference.rank_loss(vectors_BH, weight, bias, problem.places, problem.chosen, problem.truth, documents)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-5)
    (of_vectors,) = torch.autograd.grad(loss, vectors_BH)
    slow_of_vectors, *slow_of_rows = torch.autograd.grad(expected, [vectors_BH, weight, bias])
    torch.testing.assert_close(of_vectors, slow_of_vectors, rtol=1e-4, atol=1e-5)
    for fast, slow in zip(dense(table), slow_of_rows, strict=True):
        torch.testing.assert_close(fast, slow, rtol=1e-4, atol=1e-5)


@QUICK
@given(problems)
def test_only_candidates_have_gradients_and_only_candidates_have_probabilities(problem: Problem) -> None:
    table = problem.table
    table.loss(problem.vectors_BH, problem.shortlist_BK, *pairs_of(problem.truth), problem.rows)
    chunks = list(table.gradients())
    touched = [group for chunk in chunks for group in chunk.groups.tolist()]  # type: ignore[union-attr]
    assert touched == sorted(set.union(*problem.chosen))
    of_weight, of_bias = dense(table, chunks)
    valid_GM = table.valid(torch.arange(len(problem.groups)))
    assert of_weight[~valid_GM].abs().sum() == of_bias[~valid_GM].abs().sum() == 0

    probability_BKM = table.predict(problem.vectors_BH.detach(), problem.shortlist_BK)
    for row, groups in enumerate(problem.shortlist_BK.tolist()):
        for place, group in enumerate(groups):
            expected = (table.weight[group] @ problem.vectors_BH[row] + table.bias[group]).sigmoid()
            expected = torch.where(valid_GM[group], expected, -1)
            torch.testing.assert_close(probability_BKM[row, place], expected, rtol=1e-5, atol=1e-6)


@QUICK
@given(st.integers(0, 100_000), st.integers(2, 4))
def test_the_owners_parts_make_up_the_whole(seed: int, world: int) -> None:
    """Loss, gradient of the vectors and rows: sums over the owners, each of which saw all documents."""
    whole = Problem(seed)
    parts = [Problem(seed, Exchange(rank, world)).table for rank in range(world)]
    for rank, part in enumerate(parts):
        own = part.own
        assert part.weight.shape[0] == len(own), rank
        part.weight.copy_(whole.table.weight[own.start : own.stop])
        part.bias.copy_(whole.table.bias[own.start : own.stop])

    def results(table: LabelTable) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor], Tensor]:
        loss = table.loss(whole.vectors_BH, whole.shortlist_BK, *pairs_of(whole.truth), whole.rows)
        (of_vectors,) = torch.autograd.grad(loss, whole.vectors_BH)
        return loss.detach(), of_vectors, dense(table), table.predict(whole.vectors_BH.detach(), whole.shortlist_BK)

    loss, of_vectors, of_rows, probabilities = results(whole.table)
    losses, of_vectors_by, of_rows_by, probabilities_by = zip(*map(results, parts), strict=True)
    torch.testing.assert_close(sum(losses), loss, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(sum(of_vectors_by), of_vectors, rtol=1e-4, atol=1e-5)
    for place in (0, 1):
        torch.testing.assert_close(torch.cat([part[place] for part in of_rows_by]), of_rows[place], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(torch.stack(probabilities_by).amax(0), probabilities, rtol=1e-5, atol=1e-6)


def test_many_groups_come_in_chunks_each_once() -> None:
    """Groups of both micro-batches, more than fit a chunk, as one dense product has them."""
    n_groups, rng = 200, np.random.default_rng(0)
    table = LabelTable(LabelGroups(np.arange(2 * n_groups) % n_groups), WIDTH, Exchange(), 0)
    vectors_BH, truth = torch.randn(6, WIDTH), [rng.choice(2 * n_groups, 60, replace=False).tolist() for _ in range(6)]
    weight, bias = (parameter.detach().clone().requires_grad_() for parameter in (table.weight, table.bias))
    shortlist_BK = torch.arange(6)[:, None]
    for rows in (slice(0, 4), slice(4, 6)):
        table.loss(vectors_BH[rows], shortlist_BK[rows], *pairs_of(truth[rows]), 6)
    chunks = list(table.gradients())
    groups = torch.cat([chunk.groups for chunk in chunks]).tolist()  # type: ignore[misc]
    assert len(groups) == len(set(groups)) > 128
    assert max(len(chunk.bias) for chunk in chunks) <= 64

    chosen_BG, target_BGM = torch.zeros(6, n_groups, 1), torch.zeros(6, *table.bias.shape)
    for row, labels in enumerate(truth):
        chosen_BG[row, [row, *(label % n_groups for label in labels)]] = 1
        target_BGM[row, [label % n_groups for label in labels], [label // n_groups for label in labels]] = 1
    logits_BGM = torch.einsum("bh,gmh->bgm", vectors_BH, weight) + bias
    counted = chosen_BG * table.valid(torch.arange(n_groups))
    cross_entropy = torch.nn.functional.binary_cross_entropy_with_logits
    (cross_entropy(logits_BGM, target_BGM, counted, reduction="sum") / 6).backward()
    for fast, slow in zip(dense(table, chunks), (weight.grad, bias.grad), strict=True):
        torch.testing.assert_close(fast, slow, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_vectors_in_bfloat16_stay_close_to_float32(dtype: torch.dtype) -> None:
    groups = LabelGroups(np.arange(40) % 8)
    table, half = (LabelTable(groups, WIDTH, Exchange(), 0, kind) for kind in (torch.float32, dtype))
    vectors_BH, shortlist_BK = torch.randn(4, WIDTH), torch.arange(8).view(4, 2)
    exact, near = (
        (part.loss(vectors_BH.to(kind), shortlist_BK, *pairs_of([[0, 5], [7], [3, 11, 12], []]), 4), *dense(part))
        for part, kind in ((table, torch.float32), (half, torch.bfloat16))
    )
    for one, other in zip(exact, near, strict=True):
        torch.testing.assert_close(one, other.float(), rtol=0.03, atol=0.01)
