"""Output rows: owned by one worker each, started alike, with gradients that exist for a moment and in part."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from toys import batch_of, dense, toy_model

from xmc_ray.data.groups import LabelGroups
from xmc_ray.model.lightxml import LightXML
from xmc_ray.model.ranking import LabelTable
from xmc_ray.model.recall import RecallHead
from xmc_ray.model.sharding import Exchange, OwnedRows, seeded_normal, with_gradient

QUICK = settings(max_examples=40, deadline=None, derandomize=True)
GROUPS = LabelGroups(np.arange(20) % 7)
HEADS: list[Callable[[Exchange], OwnedRows]] = [
    lambda exchange: RecallHead(16, 7, exchange, 3),
    lambda exchange: LabelTable(GROUPS, 8, exchange, 3),
]


@QUICK
@given(st.integers(0, 600), st.integers(0, 600), st.integers(0, 50))
def test_any_slice_of_the_first_weights_is_that_of_the_whole(first: int, n_rows: int, seed: int) -> None:
    whole = seeded_normal(range(1200), (3,), 0.5, seed)
    assert torch.equal(seeded_normal(range(first, first + n_rows), (3,), 0.5, seed), whole[first : first + n_rows])
    assert not torch.equal(seeded_normal(range(1200), (3,), 0.5, seed + 1), whole)
    assert abs(whole.mean()) < 0.05 and abs(whole.std() - 0.5) < 0.05
    assert len(whole.unique()) > 3500  # chunks are not copies of each other


@pytest.mark.parametrize("make", HEADS)
@pytest.mark.parametrize("world", [1, 2, 3, 9])  # 9: more workers than groups
def test_every_row_has_one_owner_and_starts_as_in_one_process(make: Callable[[Exchange], OwnedRows], world: int) -> None:
    heads = [make(Exchange(rank, world)) for rank in range(world)]
    assert torch.equal(torch.cat([head.weight for head in heads]), make(Exchange()).weight)
    assert all(len(head.weight) == len(head.bias) == len(head.own) for head in heads)
    owners = torch.stack([head.owned(torch.arange(7)) for head in heads])
    assert owners.sum(0).tolist() == [1] * 7
    assert [owner.sum().item() for owner in owners] == [len(head.own) for head in heads]


@QUICK
@given(st.integers(0, 10_000), st.integers(1, 5), st.booleans())
def test_gradients_of_micro_batches_add_up_to_those_of_the_batch(seed: int, parts: int, flat: bool) -> None:
    model, rng = toy_model(LabelGroups(np.arange(20)) if flat else GROUPS, seed=seed), np.random.default_rng(seed)
    truth = [rng.choice(20, rng.integers(0, 6), replace=False).tolist() for _ in range(parts + int(rng.integers(0, 6)))]
    batch = batch_of(rng, truth)

    def gradients(micro_batches: int) -> dict[str, tuple[torch.Tensor, ...]]:
        for part in batch.split(micro_batches):
            model(part, len(batch))
        return {name: dense(head) for name, head in model.heads.items()}

    whole, added = gradients(1), gradients(parts)
    for name in model.heads:
        for one, other in zip(whole[name], added[name], strict=True):
            assert one.abs().sum() > 0
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def seen(model: LightXML, truth: list[list[int]]) -> None:
    model(batch_of(np.random.default_rng(0), truth))


def test_gradients_are_forgotten_once_they_are_given() -> None:
    model = toy_model(GROUPS)
    seen(model, [[0, 9], [3]])
    for head in model.heads.values():
        assert list(head.gradients())
        assert not list(head.gradients())


def test_losses_without_a_gradient_to_come_leave_none_behind() -> None:
    model = toy_model(GROUPS)
    with torch.no_grad():
        seen(model, [[0, 9], [3]])
    with torch.inference_mode():
        model.eval().predict(batch_of(np.random.default_rng(0), [[], []]), 3)
    assert not any(list(head.gradients()) for head in model.heads.values())


def test_rows_take_no_part_in_autograd() -> None:
    model = toy_model(GROUPS)
    losses = model(batch_of(np.random.default_rng(0), [[0, 9], [3]]))
    (losses.recall + losses.rank).backward()
    assert [parameter.grad is None for head in model.heads.values() for parameter in head.parameters()] == [True] * 4
    assert all(parameter.grad is not None for parameter in model.bottleneck.parameters())  # type: ignore[union-attr]


def test_a_known_gradient_is_chained_like_any_other() -> None:
    inputs = torch.tensor([1.0, 2.0], requires_grad=True)
    value = with_gradient(inputs * 3, torch.tensor(7.0), torch.tensor([10.0, 100.0]))
    (value * 2).backward()
    assert value.item() == 7
    assert inputs.grad is not None and inputs.grad.tolist() == [60.0, 600.0]
