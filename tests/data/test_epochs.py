"""The order of documents: every one once an epoch, in the same batches on any number of workers, from any step on."""

from itertools import chain, islice

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xmc_ray.data import epochs
from xmc_ray.data.epochs import EpochPlan
from xmc_ray.errors import ConfigError
from xmc_ray.model.sharding import Exchange
from xmc_ray.training import fit
from xmc_ray.training.fit import share_of_batches

INTS = pa.list_(pa.int32())
Batches = list[list[int]]


def plan_of(n_documents: int, batch_size: int, window: int = 4096, seed: int = 0) -> EpochPlan:
    return EpochPlan(n_documents=n_documents, batch_size=batch_size, window=window, seed=seed)


def epoch_sizes(plan: EpochPlan, epoch: int) -> list[int]:
    """Documents in each step of an epoch, all of one length; checks that each of a pool's rows comes once."""
    sizes = []
    for pool in plan.pools(epoch):
        n_rows = int(plan.chunk_sizes[pool.chunks].sum())
        batches = pool.batches(np.ones(n_rows, np.int64))
        assert len(batches) == pool.last - pool.first
        assert np.array_equal(np.sort(np.concatenate(batches)), np.arange(n_rows))
        sizes += [len(batch) for batch in batches]
    return sizes


def shares(plan: EpochPlan, n_epochs: int, first_step: int = 0, exchange: Exchange | None = None) -> Batches:
    """The documents, by number, of each step that `share_of_batches` gives."""
    lengths = np.random.default_rng(0).integers(1, 60, plan.n_documents)
    tokens = pa.array([[number] * int(length) for number, length in enumerate(lengths)], INTS)
    table = pa.table({"tokens": tokens, "labels": pa.array([[number] for number in range(plan.n_documents)], INTS)})
    batches = list(share_of_batches(table, plan, n_epochs, first_step, exchange or Exchange()))
    assert all((batch.tokens_BT[:, 0] == batch.label_P).all() for batch in batches), "a document lost its labels"
    return [batch.label_P.tolist() for batch in batches]


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of 8 documents, 3 of them a pool: what large data has, at the size of a test."""
    monkeypatch.setattr(epochs, "CHUNK", 8)
    monkeypatch.setattr(fit, "CHUNK", 8)
    monkeypatch.setattr(epochs, "POOL", 3)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(1, 200_000), st.integers(1, 500), st.integers(1, 20_000), st.integers(0, 5), st.integers(1, 100))
def test_every_document_once_in_batches_of_nearly_one_size(
    n_documents: int, batch_size: int, window: int, epoch: int, parts: int
) -> None:
    plan = plan_of(n_documents, batch_size, window)
    sizes = epoch_sizes(plan, epoch)
    mean = n_documents / plan.steps
    assert sum(sizes) == n_documents
    assert len(sizes) == plan.steps == -(-n_documents // batch_size)
    assert int(mean / 1.1) <= min(sizes) and max(sizes) <= np.ceil(mean * 1.1)
    assert sorted(int(chunk) for pool in plan.pools(epoch) for chunk in pool.chunks) == list(range(len(plan.chunk_sizes)))
    try:
        plan.check(parts)
    except ConfigError:
        assert parts > int(mean / 1.1)
    else:
        assert min(sizes) >= parts


@pytest.mark.parametrize(("n_documents", "batch_size"), [(1, 1), (1, 32), (5, 32), (33, 32), (7, 1)])
def test_tiny_data(n_documents: int, batch_size: int) -> None:
    batches = shares(plan_of(n_documents, batch_size), 2)
    assert len(batches) == 2 * -(-n_documents // batch_size)
    assert sorted(chain(*batches)) == sorted([*range(n_documents)] * 2)
    assert max(map(len, batches)) <= batch_size


@pytest.mark.parametrize("many_pools", [True, False])
def test_an_epoch_is_drawn_from_seed_and_number(many_pools: bool, request: pytest.FixtureRequest) -> None:
    if many_pools:
        request.getfixturevalue("small_chunks")
    one = shares(plan_of(100, 6), 2)
    first, second = one[:17], one[17:]
    assert sorted(chain(*first)) == sorted(chain(*second)) == list(range(100))
    assert shares(plan_of(100, 6), 2) == one
    assert first != second
    assert {frozenset(batch) for batch in first} != {frozenset(batch) for batch in second}, "the same documents met again"
    assert shares(plan_of(100, 6, seed=1), 2)[:17] != first


def test_documents_of_a_pool_are_close_at_hand_and_pools_change(small_chunks: None) -> None:
    plan = plan_of(100, 6)  # 13 chunks in 5 pools
    chunks = [[frozenset(pool.chunks.tolist()) for pool in plan.pools(epoch)] for epoch in (0, 1)]
    assert max(map(len, chunks[0])) <= 3
    assert set(chunks[0]) != set(chunks[1])
    batches = iter(shares(plan, 1))
    for pool in plan.pools(0):
        inside = {document for chunk in pool.chunks.tolist() for document in range(chunk * 8, chunk * 8 + 8)}
        assert set().union(*islice(batches, pool.last - pool.first)) <= inside


@pytest.mark.parametrize("world", [2, 3])
def test_workers_share_the_batches_of_one(world: int, small_chunks: None) -> None:
    whole = shares(plan_of(100, 7), 2)
    by_rank = [shares(plan_of(100, 7), 2, exchange=Exchange(rank, world)) for rank in range(world)]
    for batch, *parts in zip(whole, *by_rank, strict=True):
        assert sorted(chain(*parts)) == sorted(batch)
        assert max(map(len, parts)) - min(map(len, parts)) <= 1
        assert [batch[rank::world] for rank in range(world)] == parts, "not dealt one by one: shares differ in length of text"


def test_a_run_goes_on_at_any_step(small_chunks: None) -> None:
    plan, exchange = plan_of(50, 6), Exchange(1, 2)
    whole = shares(plan, 3, exchange=exchange)
    assert len(whole) == 3 * plan.steps
    for step in range(len(whole) + 1):
        assert shares(plan, 3, first_step=step, exchange=exchange) == whole[step:], step


def test_documents_of_like_length_meet() -> None:
    plan, lengths = plan_of(4000, 16, window=1000), np.random.default_rng(0).integers(1, 60, 4000)
    (pool,) = plan.pools(0)
    tokens = sum(int(lengths[batch].sum()) for batch in pool.batches(lengths))
    padded = sum(len(batch) * int(lengths[batch].max()) for batch in pool.batches(lengths))
    assert 1 - tokens / padded < 0.05


def test_short_documents_do_not_come_before_long_ones() -> None:
    lengths = np.random.default_rng(0).integers(1, 60, 4000)
    (pool,) = plan_of(4000, 16).pools(0)
    means = [lengths[batch].mean() for batch in pool.batches(lengths)]
    assert abs(np.corrcoef(means, np.arange(len(means)))[0, 1]) < 0.2


@pytest.mark.parametrize(("n_documents", "smallest"), [(1000, 15), (100_000, 14), (10, 10), (1, 1)])
def test_parts_that_cannot_share_a_batch(n_documents: int, smallest: int) -> None:
    plan = plan_of(n_documents, 16)
    plan.check(smallest)
    found = rf"found {smallest + 1} parts, batches of {smallest} documents"
    with pytest.raises(ConfigError, match=rf"cannot share a batch; {found}.*loop\.batch_size"):
        plan.check(smallest + 1)
