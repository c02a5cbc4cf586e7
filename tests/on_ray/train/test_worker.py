"""Batches from the token cache through Ray Data: those of the plan, from any step, for any number of workers."""

from collections import Counter

import numpy as np
import pyarrow as pa
import pytest
import torch

from xmc_ray.data.epochs import EpochPlan
from xmc_ray.data.labels import LabelIndex
from xmc_ray.data.token_cache import TokenCache, write_tokens
from xmc_ray.model.batch import Batch
from xmc_ray.model.sharding import Exchange
from xmc_ray.on_ray.train import worker
from xmc_ray.training.fit import share_of_batches

pytestmark = pytest.mark.usefixtures("ray_session")

N_DOCUMENTS = 9_000  # three chunks
PLAN = EpochPlan(n_documents=N_DOCUMENTS, batch_size=500, window=2048, seed=7)


@pytest.fixture(scope="module")
def documents() -> pa.Table:
    """Each document's label is its number."""
    rng = np.random.default_rng(0)
    rows = [rng.integers(1, 100, size).tolist() for size in rng.integers(1, 12, N_DOCUMENTS)]
    numbers = [[number] for number in range(N_DOCUMENTS)]
    return pa.table({"tokens": pa.array(rows, pa.list_(pa.int32())), "labels": pa.array(numbers, pa.list_(pa.int32()))})


@pytest.fixture(scope="module")
def cache(documents: pa.Table, tmp_path_factory: pytest.TempPathFactory) -> TokenCache:
    place = str(tmp_path_factory.mktemp("tokens"))
    labels = LabelIndex.count([pa.array([["a"]])])
    write_tokens(place, labels, {}, {"train": iter([documents]), "validation": iter([])}, "here")
    return TokenCache.open(place)


def same(one: Batch, other: Batch) -> bool:
    return all(torch.equal(*pair) for pair in zip(vars(one).values(), vars(other).values(), strict=True))


@pytest.mark.parametrize(("first", "rank", "world"), [(0, 0, 1), (25, 1, 3), (36, 0, 1)])
def test_the_stream_equals_the_plan_in_memory(
    first: int, rank: int, world: int, cache: TokenCache, documents: pa.Table
) -> None:
    exchange = Exchange(rank, world)
    streamed = list(worker.batches(cache, PLAN, 2, first, exchange))
    expected = list(share_of_batches(documents, PLAN, 2, first, exchange))
    assert len(streamed) == len(expected) == 2 * PLAN.steps - first
    assert all(same(*pair) for pair in zip(streamed, expected, strict=True))


def test_all_workers_together_see_each_document_once_an_epoch(cache: TokenCache) -> None:
    seen = Counter(
        label
        for rank in range(2)
        for batch in worker.batches(cache, PLAN, 1, 0, Exchange(rank, 2))
        for label in batch.label_P.tolist()
    )
    assert len(seen) == N_DOCUMENTS and set(seen.values()) == {1}
