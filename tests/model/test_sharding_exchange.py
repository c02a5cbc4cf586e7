"""What workers tell each other: everything arrives, in order of rank, and is counted."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from toys import on_workers

from xmc_ray.model.sharding import Exchange, part_of

WORLD = 3
COUNTS = [2, 0, 3]  # rows of each worker: unequal, and one has nothing
PARTS = [torch.arange(2.0 * count).view(count, 2) + 10 * rank for rank, count in enumerate(COUNTS)]
WHOLE = torch.cat(PARTS)
FACTORS = torch.arange(1.0, 1 + len(WHOLE))[:, None]
SCORES = torch.tensor([[[5.0, 2.0], [1.0, 0.0]], [[4.0, 3.0], [9.0, 8.0]], [[6.0, -torch.inf], [7.0, 2.0]]])


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
