"""The token cache: exact chunks, a fingerprint of all that it is made of, never half of one taken for a whole."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xmc_ray import storage
from xmc_ray.data import token_cache
from xmc_ray.data.epochs import CHUNK
from xmc_ray.data.labels import LabelIndex
from xmc_ray.data.token_cache import MARKER, TokenCache, write_tokens
from xmc_ray.errors import DataError

LABELS = LabelIndex.count([pa.array([["a", "b"], ["a"]])])


def tables(*sizes: int) -> Iterator[pa.Table]:
    """Documents in portions of these sizes; the first token of a document is its number, its label the number's last bit."""
    first = 0
    for size in sizes:
        rows = [[number] * (1 + number % 3) for number in range(first, first + size)]
        first += size
        yield pa.table(
            {"tokens": pa.array(rows, pa.list_(pa.int32())), "labels": pa.array([[row[0] % 2] for row in rows], rows_type())}
        )


def rows_type() -> pa.DataType:
    return pa.list_(pa.int32())


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_cache, "CHUNK", 4)
    monkeypatch.setattr(token_cache, "POOL", 2)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("sizes", [(21,), (0, 1, 0, 20), (8, 8, 5), (3,) * 7, (1,) * 21])
def test_chunks_are_of_one_size_whatever_the_portions(sizes: tuple[int, ...], tmp_path: Path) -> None:
    write_tokens(str(tmp_path), LABELS, {"truncated": 3}, {"train": tables(*sizes), "validation": tables(2)}, "here")
    cache = TokenCache.open(str(tmp_path))
    assert cache.counts == {"truncated": 3, "train": 21, "validation": 2}
    assert [len(chunk) for chunk in cache.chunks("train")] == [4, 4, 4, 4, 4, 1]
    assert pa.concat_tables(cache.chunks("train")).combine_chunks() == next(tables(21))
    wanted = list(cache.chunks("train", np.array([5, 0, 3])))
    assert [chunk["tokens"].to_pylist()[0][0] for chunk in wanted] == [20, 0, 12]
    column = cache.column("train", "labels")
    assert [sum(map(len, column)) for _ in range(2)] == [21, 21], "it can be gone through twice"
    assert cache.labels.labels == LABELS.labels and cache.labels.n_documents == 2
    assert len(list(cache.chunks("validation"))) == 1


def test_an_attempt_that_breaks_off_is_no_cache_and_mixes_with_none(tmp_path: Path) -> None:
    def breaking() -> Iterator[pa.Table]:
        yield from tables(70_000)
        raise OSError("disk full")

    place = str(tmp_path)
    with pytest.raises(OSError, match="disk full"):
        write_tokens(place, LABELS, {}, {"train": breaking(), "validation": tables()}, "here")
    assert list(tmp_path.rglob("part-*")) and not storage.exists(storage.join(place, MARKER))
    with pytest.raises(DataError, match="no such file"):
        TokenCache.open(place)
    write_tokens(place, LABELS, {}, {"train": tables(5), "validation": tables()}, "here")
    assert [len(chunk) for chunk in TokenCache.open(place).chunks("train")] == [5]


def test_nothing_to_train_on(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no document is left to train on: here; found .*'train': 0"):
        write_tokens(str(tmp_path), LABELS, {}, {"train": tables(), "validation": tables(1)}, "here")
    assert not storage.exists(tmp_path / MARKER)


@settings(deadline=None)
@given(st.integers(0, 10**6), st.integers(0, 10**6))
def test_chunks_are_taken_evenly_and_enough_of_them(held_out: int, most: int) -> None:
    chunks = TokenCache("folder", "attempt", {"validation": held_out}).some("validation", most).tolist()
    n_chunks = -(-held_out // CHUNK)
    assert chunks == sorted(set(chunks)) and set(chunks) <= set(range(n_chunks))
    assert len(chunks) == min(n_chunks, -(-most // CHUNK))
    assert np.ptp(np.diff(chunks)) <= 1 if len(chunks) > 2 else True


def test_the_marker_of_the_first_preparation_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kind of fault: check, then write. Two preparations end at once; the first may train on its tokens already."""
    monkeypatch.setattr(storage, "exists", lambda uri: False)  # what both have seen
    write_tokens(str(tmp_path), LABELS, {}, {"train": tables(3)}, "here")
    first = TokenCache.open(str(tmp_path))
    write_tokens(str(tmp_path), LABELS, {}, {"train": tables(3)}, "here")
    assert TokenCache.open(str(tmp_path)) == first


def test_a_marker_where_nothing_is_created_atomically(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def create(uri: str, data: bytes) -> bool:
        raise NotImplementedError

    monkeypatch.setattr(storage, "create", create)
    write_tokens(str(tmp_path), LABELS, {}, {"train": tables(3)}, "here")
    first = TokenCache.open(str(tmp_path))
    write_tokens(str(tmp_path), LABELS, {}, {"train": tables(3)}, "here")
    assert TokenCache.open(str(tmp_path)) == first
