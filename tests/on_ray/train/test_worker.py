"""Batches from the token cache through Ray Data: those of the plan, from any step, for any number of workers."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from xmc_ray import command
from xmc_ray.data.epochs import EpochPlan
from xmc_ray.data.labels import LabelIndex
from xmc_ray.data.token_cache import Split, TokenCache, write_tokens
from xmc_ray.model.sharding import Exchange
from xmc_ray.model.text import Batch
from xmc_ray.on_ray.train import job, prepare, worker
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


def prepared(fruit: Path, encoder: Path, cache: Path, *further: str) -> prepare.Prepared:
    settings = [f"--encoder.name={encoder}", f"--documents.uri={fruit}/train.parquet", "--output=unused", *further]
    config = command.parse(job.TrainConfig, settings)
    return prepare.prepare(config.documents, None, config, config.validation, str(cache))


def test_tokens_are_made_once_and_never_taken_for_others(
    fruit: Path, tiny_encoder: Path, other_encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    def never(*arguments: Any) -> None:
        pytest.fail("tokenised again")

    shutil.copytree(fruit, tmp_path / "fruit")
    fruit, cache = tmp_path / "fruit", tmp_path / "cache"
    first = prepared(fruit, tiny_encoder, cache, "--groups.max_size=3")
    with monkeypatch.context() as patch:
        patch.setattr(prepare, "_tokenise_all", never)
        patch.setattr(prepare, "group_labels", never)
        again = prepared(fruit, tiny_encoder, cache, "--groups.max_size=3", "--loop.epochs=3")
    assert again.tokens == first.tokens and (again.groups.group_L == first.groups.group_L).all()
    assert pa.concat_tables(again.tokens.chunks("train")).num_rows == first.counts["train"] > 200

    held_out = [row for split in ("validation", "calibration") for part in first.tokens.chunks(split) for row in part["tokens"]]
    trained = {str(row) for part in first.tokens.chunks("train") for row in part["tokens"]}
    assert held_out and not trained & {str(row) for row in held_out}

    others = [
        prepared(fruit, tiny_encoder, cache, "--validation.series=id"),
        prepared(fruit, tiny_encoder, cache, "--text.max_tokens=4"),
        prepared(fruit, other_encoder, cache),
        prepared(fruit, tiny_encoder, cache, "--validation.share=0.5"),
    ]
    (fruit / "train.parquet").write_bytes((fruit / "test.parquet").read_bytes())
    others.append(prepared(fruit, tiny_encoder, cache))
    places = {entry.tokens.place for entry in [first, *others]}
    assert len(places) == 6
    assert others[-1].counts["train"] < 50
    assert max(map(len, (tokens for chunk in others[1].tokens.chunks("train") for tokens in chunk["tokens"].to_pylist()))) == 4


def test_a_series_is_held_out_as_a_whole(tiny_encoder: Path, tmp_path: Path) -> None:
    """Each document has words of its own; its label is its series, and every tenth has none."""
    numbers = range(600)
    series = [None if number % 10 == 0 else number // 20 for number in numbers]
    texts = [f"red apple {number // 25} and {number % 25} plum" for number in numbers]
    table = pa.table(
        {"id": numbers, "text": texts, "series": series, "labels": [[f"s{number // 20:02}"] for number in numbers]}
    )
    pq.write_table(table, tmp_path / "train.parquet")

    def splits(*further: str) -> dict[str, Counter[int]]:
        tokens = prepared(tmp_path, tiny_encoder, tmp_path / "cache", "--validation.share=0.5", *further).tokens
        names: tuple[Split, ...] = ("train", "validation", "calibration")
        return {name: Counter(row[0] for part in tokens.chunks(name) for row in part["labels"].to_pylist()) for name in names}

    together = splits("--validation.series=series")
    for label in range(30):
        n_of_splits = [split[label] for split in together.values()]
        assert sum(n_of_splits) == 20 and max(n_of_splits) >= 18  # two are without a series
    assert all(len([n for n in split.values() if n >= 18]) > 2 for split in together.values())
    assert max(max(split[label] for split in splits().values()) for label in range(30)) < 18
