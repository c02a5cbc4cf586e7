"""A profile against a slow twin that counts in Python."""

import statistics
from collections import Counter

import numpy as np
import pyarrow as pa
import pytest

from xmc_ray.data.labels import LabelIndex
from xmc_ray.data.profile import RARE, Profile


def slow(tokens: list[list[int]], labels: list[list[int]], n_labels: int) -> dict[str, float]:
    counts = Counter(label for row in labels for label in row)
    pairs = sorted(counts[label] for row in labels for label in row)
    texts = Counter(map(tuple, tokens))
    return {
        "documents": len(tokens),
        "labels": n_labels,
        "tokens": sum(map(len, tokens)) / len(tokens),
        "longest": int(np.quantile([len(row) for row in tokens], 0.95)),
        "labels_per_document": len(pairs) / len(tokens),
        "rare": sum(count < RARE for count in pairs) / len(pairs),
        "single": sum(count == 1 for count in counts.values()) / n_labels,
        "everywhere": sum(count == len(tokens) for count in counts.values()),
        "repeated": sum(texts[tuple(row)] > 1 for row in tokens) / len(tokens),
        "typical": statistics.median(counts[label] for label in range(n_labels)),
    }


@pytest.mark.parametrize("seed", range(5))
def test_a_profile_counts_what_a_slow_twin_counts(seed: int) -> None:
    rng = np.random.default_rng(seed)
    n_labels = 12
    tokens = [rng.integers(0, 4, rng.integers(1, 6)).tolist() for _ in range(200)]
    labels = [
        sorted({0, *rng.choice(n_labels, rng.integers(1, 4), p=np.arange(n_labels, 0, -1) / 78).tolist()}) for _ in tokens
    ]
    columns = pa.array(tokens, pa.list_(pa.int32())), pa.array(labels, pa.list_(pa.int32()))
    chunks = [[column.slice(start, 70) for start in range(0, 200, 70)] for column in columns]
    names = pa.array(sorted(map(str, range(n_labels))))
    index = LabelIndex(names, np.ones(n_labels, np.int64), pa.nulls(n_labels, pa.string()), len(tokens))
    expected = slow(tokens, labels, n_labels)
    found = vars(Profile.of(*chunks, index))
    assert found == pytest.approx(expected) and found["everywhere"] == 1


def test_the_same_words_in_another_order_are_no_repetition() -> None:
    tokens = pa.array([[1, 2, 3], [3, 2, 1], [1, 2], [1, 2, 3]], pa.list_(pa.int32()))
    labels = pa.array([[0]] * 4, pa.list_(pa.int32()))
    index = LabelIndex(pa.array(["a"]), np.array([4]), pa.nulls(1, pa.string()), 4)
    assert Profile.of([tokens], [labels], index).repeated == 0.5
