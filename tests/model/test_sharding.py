"""What workers exchange arrives in order of rank and is counted; output rows have one owner, and gradients only briefly."""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from toys import batch_of, dense, on_workers, toy_model

from xmc_ray.data.groups import LabelGroups
from xmc_ray.model.lightxml import LightXML
from xmc_ray.model.ranking import LabelTable
from xmc_ray.model.recall import RecallHead
from xmc_ray.model.sharding import Exchange, OwnedRows, mean_squares, part_of, seeded_normal, with_gradient

QUICK = settings(max_examples=40, deadline=None, derandomize=True)
GROUPS = LabelGroups(np.arange(20) % 7)
HEADS: list[Callable[[Exchange], OwnedRows]] = [
    lambda exchange: RecallHead(16, 7, exchange, 3),
    lambda exchange: LabelTable(GROUPS, 8, exchange, 3),
]
WORLD = 3
COUNTS = [2, 0, 3]  # rows of each worker: unequal, and one has nothing
PARTS = [torch.arange(2.0 * count).view(count, 2) + 10 * rank for rank, count in enumerate(COUNTS)]
WHOLE = torch.cat(PARTS)
FACTORS = torch.arange(1.0, 1 + len(WHOLE))[:, None]
SCORES = torch.tensor([[[5.0, 2.0], [1.0, 0.0]], [[4.0, 3.0], [9.0, 8.0]], [[6.0, -torch.inf], [7.0, 2.0]]])


# -- the exchange --------------------------------------------------------------------------------------------------------


@given(st.integers(0, 50), st.integers(1, 12))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_parts_cover_everything_once_and_differ_by_one(n: int, world: int) -> None:
    parts = [part_of(n, rank, world) for rank in range(world)]
    assert [place for part in parts for place in part] == list(range(n))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    assert all(one.stop == other.start for one, other in pairwise(parts))
    assert parts == [Exchange(rank, world).share(n) for rank in range(world)]


def test_a_worker_on_its_own_sends_nothing() -> None:
    exchange, tensor = Exchange.of_process_group(), torch.ones(2, 3, requires_grad=True)
    assert (exchange.rank, exchange.world) == (0, 1)
    assert exchange.counts(4, 5, device=torch.device("cpu")) == [[4], [5]]
    assert exchange.gather(tensor, [2], "") is exchange.gather_features(tensor, [2]) is exchange.sum(tensor) is tensor
    assert [part.tolist() for part in exchange.best_of_all(SCORES[0], SCORES[1].long(), 1)] == [[[5.0], [1.0]], [[4], [9]]]
    assert exchange.sent == {}


def talk(exchange: Exchange) -> dict[str, Any]:
    """All that can be said, once."""
    rank, cpu = exchange.rank, torch.device("cpu")
    features = PARTS[rank].clone().requires_grad_()
    gathered = exchange.gather_features(features, COUNTS)
    # every worker makes something else of all features; what is due to a row is the sum over the workers
    ((rank + 1) * FACTORS * gathered).sum().backward()
    return {
        "counts": exchange.counts(rank, 10 * rank, device=cpu),
        "one dimension": exchange.gather(PARTS[rank][:, 0].long(), COUNTS, "ids"),
        "nothing": exchange.gather(torch.empty(0, 2), [0] * WORLD, "nothing"),
        "features": gathered.detach(),
        "gradient": features.grad,
        "scattered": exchange.scatter_sum((rank + 1) * WHOLE, COUNTS, "sums"),
        "best": exchange.best_of_all(SCORES[rank], torch.arange(4).view(2, 2) + 100 * rank, 3),
        "sum": exchange.sum(torch.tensor([1.0, rank])),
        "sent": exchange.sent,
    }


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of three workers heard."""
    return on_workers([WORLD], talk, tmp_path_factory.mktemp("exchange"))[WORLD]


def test_rows_of_all_arrive_in_order_of_rank(said: list[dict[str, Any]]) -> None:
    for heard in said:
        assert heard["counts"] == [[0, 1, 2], [0, 10, 20]]
        assert torch.equal(heard["features"], WHOLE)
        assert heard["one dimension"].tolist() == WHOLE[:, 0].tolist()
        assert heard["nothing"].shape == (0, 2)
        assert heard["sum"].tolist() == [3.0, 3.0]


def test_gradients_return_to_where_the_features_came_from(said: list[dict[str, Any]]) -> None:
    for rank, (factors, whole) in enumerate(zip(FACTORS.split(COUNTS), WHOLE.split(COUNTS), strict=True)):
        assert torch.equal(said[rank]["gradient"], 6 * factors.expand_as(whole))
        assert torch.equal(said[rank]["scattered"], 6 * whole)


def test_the_best_of_all_lists(said: list[dict[str, Any]]) -> None:
    for heard in said:
        scores, ids = heard["best"]
        assert scores.tolist() == [[6.0, 5.0, 4.0], [9.0, 8.0, 7.0]]
        assert ids.tolist() == [[200, 0, 100], [102, 103, 202]]


def test_bytes_sent_are_those_of_a_ring(said: list[dict[str, Any]]) -> None:
    longest, row, others = max(COUNTS), 2 * 4, WORLD - 1
    expected = {
        "features": others * longest * row,
        "feature gradients": others * longest * row,
        "sums": others * longest * row,
        "ids": others * longest * 8,
        "shortlists": others * 4 * (4 + 8),
        "counts": others * 2 * 8 + 2 * 8 * others // WORLD,
    }
    assert [heard["sent"] for heard in said] == [expected] * WORLD


def test_a_sum_that_no_one_shares_is_free() -> None:
    assert [Exchange(0, world).bytes_of_sum(1200) for world in (1, 2, 4)] == [0, 1200, 1800]


# -- rows ----------------------------------------------------------------------------------------------------------------


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


def test_documents_without_features_say_nothing_of_their_length() -> None:
    parts = [torch.tensor([[3.0, 0.0], [0.0, 0.0]]), torch.tensor([[0.0, 0.0], [1.0, 2.0]])]
    mean_H, documents = mean_squares(parts, 2)
    assert mean_H.tolist() == [5.0, 2.0] and documents == 4
    assert mean_squares([torch.zeros(3, 2)], 2)[0].tolist() == [0.0, 0.0]
    assert mean_squares([], 2)[0].tolist() == [0.0, 0.0]
