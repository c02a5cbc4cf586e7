"""Candidate pairs against per-document sets, and their products, in every layout, against a loop over the pairs."""

import numpy as np
import pytest
import reference
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from toys import pairs_of

from xmc_ray.model.pairs import Grouped, Padded, Pairs, candidate_pairs

QUICK = settings(max_examples=40, deadline=None, derandomize=True)
CPU = torch.device("cpu")
KINDS = pytest.mark.parametrize("kind", [Grouped, Padded])


def some_pairs(rng: np.random.Generator, documents: int, n_groups: int) -> Pairs:
    """Distinct pairs of up to so many documents and groups, at least one."""
    keys = rng.choice(documents * n_groups, int(rng.integers(1, documents * n_groups + 1)), replace=False)
    key_n = torch.from_numpy(np.sort(keys))
    return Pairs(key_n % documents, key_n // documents, key_n)


def layout_of(pairs: Pairs, kind: type[Grouped]) -> Grouped:
    return kind(*pairs.in_use, CPU)


@QUICK
@given(st.integers(0, 100_000))
def test_candidates_are_the_shortlist_and_every_true_group_once(seed: int) -> None:
    rng = np.random.default_rng(seed)
    rows, n_groups = int(rng.integers(1, 7)), int(rng.integers(1, 31))
    k = int(rng.integers(1, n_groups + 1))
    shortlist_BK = torch.stack([torch.from_numpy(rng.permutation(n_groups)[:k]) for _ in range(rows)])
    truth = [rng.integers(0, n_groups, rng.integers(0, 12)).tolist() for _ in range(rows)]  # of groups, some twice
    chosen = [{*groups, *true} for groups, true in zip(shortlist_BK.tolist(), truth, strict=True)]
    expected = [(group, row) for row, groups in enumerate(chosen) for group in groups]
    for own in (None, range(0, n_groups), range(1, 3), range(2, 2)):
        pairs = candidate_pairs(shortlist_BK, *pairs_of(truth), own)
        wanted = sorted((group, row) for group, row in expected if own is None or group in own)
        assert list(zip(pairs.group_n.tolist(), pairs.row_n.tolist(), strict=True)) == wanted
        assert pairs.key_n.tolist() == [group * rows + row for group, row in wanted]
        group_U, ends_U = pairs.in_use
        assert group_U.tolist() == sorted({group for group, _ in wanted})
        assert ends_U.tolist() == [sum(group <= last for group, _ in wanted) for last in group_U.tolist()]


def test_more_true_groups_than_the_shortlist_lose_no_positive() -> None:
    pairs = candidate_pairs(torch.tensor([[3], [0]]), torch.tensor([0, 0, 0, 1]), torch.tensor([0, 1, 2, 0]))
    assert list(zip(pairs.row_n.tolist(), pairs.group_n.tolist(), strict=True)) == [(0, 0), (1, 0), (0, 1), (0, 2), (0, 3)]


@KINDS
@QUICK
@given(seed=st.integers(0, 100_000))
def test_products_equal_those_of_each_pair(kind: type[Grouped], seed: int) -> None:
    rng, random = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
    documents, n_groups = int(rng.integers(1, 20)), int(rng.integers(1, 9))
    pairs = some_pairs(rng, documents, n_groups)
    layout = layout_of(pairs, kind)
    vectors_BA, block_GAC = torch.randn(documents, 8, generator=random), torch.randn(n_groups, 8, 16, generator=random)
    other_nC = torch.randn(len(pairs.key_n), 16, generator=random)
    product_nC, outer_GAC = reference.products(vectors_BA, block_GAC, other_nC, pairs.row_n.tolist(), pairs.group_n.tolist())

    row_N = layout.spread(pairs.row_n)
    torch.testing.assert_close(layout.collected(row_N), pairs.row_n)
    torch.testing.assert_close(layout.collected(layout.group_N), pairs.group_n)
    assert torch.equal(layout.group_U[layout.block_N], layout.group_N)
    product_NC = layout.product(vectors_BA[row_N], block_GAC[layout.group_U])
    torch.testing.assert_close(layout.collected(product_NC), product_nC, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(product_NC[layout.place_n], product_nC, rtol=1e-5, atol=1e-5)

    source_N = layout.spread(torch.arange(len(pairs.key_n)))
    other_NC = layout.without_padding(other_nC[source_N])
    outer_UAC = layout.outer(vectors_BA[row_N], other_NC)
    torch.testing.assert_close(outer_UAC, outer_GAC[layout.group_U], rtol=1e-5, atol=1e-4)


@QUICK
@given(st.integers(0, 100_000))
def test_padding_takes_less_than_half_in_few_batches(seed: int) -> None:
    pairs = some_pairs(np.random.default_rng(seed), 64, 20)
    layout = Padded(*pairs.in_use, CPU)
    assert len(pairs.key_n) <= len(layout) < 2 * len(pairs.key_n)
    assert len(layout._batches) <= 7


@pytest.mark.parametrize("n_groups", [1, 1023, 1024, 2500])
def test_a_call_of_the_kernel_has_at_most_1023_groups(n_groups: int, monkeypatch: pytest.MonkeyPatch) -> None:
    random = torch.Generator().manual_seed(n_groups)
    rows_U = torch.randint(1, 4, (n_groups,), generator=random)
    group_n = torch.arange(n_groups).repeat_interleave(rows_U)
    left_nA, block_GAC = torch.randn(len(group_n), 8, generator=random), torch.randn(n_groups, 8, 16, generator=random)
    grouped_mm, called = F.grouped_mm, []

    def count(*matrices: Tensor, offs: Tensor) -> Tensor:
        called.append(len(offs))
        return grouped_mm(*matrices, offs=offs)

    monkeypatch.setattr(F, "grouped_mm", count)
    layout = layout_of(Pairs(group_n, group_n, group_n), Grouped)
    product_nC, outer_GAC = layout.product(left_nA, block_GAC), layout.outer(left_nA, left_nA)
    torch.testing.assert_close(product_nC, torch.einsum("na,nac->nc", left_nA, block_GAC[group_n]), rtol=1e-5, atol=1e-5)
    expected_GAA = torch.zeros(n_groups, 8, 8).index_add_(0, group_n, left_nA[:, :, None] * left_nA[:, None])
    torch.testing.assert_close(outer_GAC, expected_GAA, rtol=1e-5, atol=1e-5)
    assert sum(called) == 2 * n_groups and max(called) <= 1023


@pytest.mark.parametrize("at_a_time", [1, 3, 100])
def test_chunks_of_groups_are_laid_out_each_once(at_a_time: int) -> None:
    pairs = some_pairs(np.random.default_rng(0), 10, 7)
    chunks = list(pairs.layouts(CPU, torch.float32, at_a_time))
    assert torch.cat([pairs.group_n[here] for here, _ in chunks]).equal(pairs.group_n)
    assert torch.cat([layout.group_N for _, layout in chunks]).equal(pairs.group_n)
    assert max(len(layout.group_U) for _, layout in chunks) <= at_a_time
