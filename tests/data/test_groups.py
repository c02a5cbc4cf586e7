"""Label groups: balanced, seeded, and made of labels that belong together."""

from unittest import mock

import numpy as np
import pyarrow as pa
import pytest
import reference
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse

from xmc_ray.data.groups import (
    GroupsConfig,
    LabelGroups,
    balanced_groups,
    group_labels,
    heaviest,
    label_incidence,
    label_vectors,
    tfidf,
    unit_rows,
)
from xmc_ray.data.terms import count_terms, document_frequency, inverse_document_frequency

QUICK = settings(max_examples=40, deadline=None, derandomize=True)
ROWS = st.lists(st.lists(st.integers(0, 50), max_size=6), min_size=1, max_size=8)


def lists(rows: list[list[int]]) -> pa.ListArray:
    return pa.array(rows, pa.list_(pa.int32()))


def random_vectors(n_labels: int, seed: int = 0) -> sparse.csr_array:
    return unit_rows(sparse.random_array((n_labels, 64), density=0.1, format="csr", rng=seed, dtype=np.float32))


@pytest.mark.parametrize("max_size", [2, 3, 7, 100])
@pytest.mark.parametrize("n_labels", [2, 3, 5, 99, 100, 101, 199, 200, 201, 403, 807])
def test_sizes_differ_by_at_most_one(n_labels: int, max_size: int) -> None:
    group_L = balanced_groups(random_vectors(n_labels), max_size, seed=0)
    sizes = np.bincount(group_L)
    assert sizes.sum() == n_labels
    assert sizes.max() - sizes.min() <= 1
    assert 1 <= sizes.min() <= sizes.max() <= max_size


def test_the_seed_decides() -> None:
    vectors = random_vectors(300)
    one, again, other = (balanced_groups(vectors, 20, seed) for seed in (0, 0, 1))
    assert (one == again).all()
    assert (one != other).any()
    for threads in (2, 3, 40):
        assert (balanced_groups(vectors, 20, 0, threads) == one).all()


@QUICK
@given(seed=st.integers(0, 1000), most=st.integers(1, 30), block=st.integers(1, 200))
def test_the_heaviest_entries_of_each_row_stay(seed: int, most: int, block: int) -> None:
    rng = np.random.default_rng(seed)
    dense = np.round(rng.random((23, 25)) * (rng.random((23, 25)) < rng.random((23, 1))), 1).astype(np.float32)  # with ties
    with mock.patch("xmc_ray.data.groups._BLOCK", block):
        found = heaviest(sparse.csr_array(dense), most).toarray()
    for row, kept in zip(dense, found, strict=True):
        least = max(np.sort(row)[::-1][most - 1], 0.05) if most <= len(row) else 0.05
        np.testing.assert_array_equal(kept, np.where(row >= least, row, 0))


def test_labels_of_one_topic_meet() -> None:
    rng = np.random.default_rng(0)
    topic = rng.permutation(np.repeat(np.arange(8), 16))
    labels = np.repeat(np.arange(len(topic)), 6)  # six documents each
    tokens = lists([[int(topic[label]) * 20 + int(word) for word in rng.integers(0, 20, 12)] for label in labels])
    groups = group_labels(GroupsConfig(max_size=16), [tokens], [lists([[label] for label in labels.tolist()])], len(topic))
    purity = np.mean([np.bincount(topic[groups.group_L == group]).max() / 16 for group in range(len(groups))])
    assert len(groups) == 8
    assert purity > 0.7  # by chance: about 0.3


def test_chunks_do_not_matter_and_labels_without_documents_have_a_place() -> None:
    rng = np.random.default_rng(0)
    tokens = [rng.integers(0, 100, 8).tolist() for _ in range(40)]
    labels = [[int(rng.integers(0, 30))] for _ in range(40)]
    config = GroupsConfig(max_size=8)
    whole = group_labels(config, [lists(tokens)], [lists(labels)], 35)
    parts = group_labels(config, [lists(tokens[:7]), lists(tokens[7:])], [lists(labels[:7]), lists(labels[7:])], 35)
    assert (whole.group_L == parts.group_L).all()
    assert sorted(whole.label_GM[whole.label_GM >= 0].tolist()) == list(range(35))


@pytest.mark.parametrize(("n_labels", "max_size", "n_groups"), [(5, 100, 1), (100, 100, 1), (7, 1, 7), (1, 100, 1)])
def test_one_group_and_flat(n_labels: int, max_size: int, n_groups: int) -> None:
    groups = group_labels(GroupsConfig(max_size=max_size), [lists([[1]])], [lists([[0]])], n_labels)
    assert len(groups) == n_groups
    assert groups.flat is (n_labels == n_groups)


@QUICK
@given(st.lists(st.integers(0, 5), min_size=1, max_size=30))
def test_every_label_is_in_one_place(group_of: list[int]) -> None:
    _, group_L = np.unique(group_of, return_inverse=True)
    groups = LabelGroups(group_L)
    for label, (group, slot) in enumerate(zip(groups.group_L, groups.slot_L, strict=True)):
        assert groups.label_GM[group, slot] == label
    assert (groups.label_GM >= 0).sum() == len(group_L)
    assert ((groups.label_GM >= 0).sum(1) == groups.sizes_G).all()
    for row in groups.label_GM:
        kept = row[row >= 0]
        assert (np.diff(kept) > 0).all()


@QUICK
@given(ROWS, st.integers(0, 1000))
def test_label_vectors_equal_the_slow_twin(rows: list[list[int]], seed: int) -> None:
    rng = np.random.default_rng(seed)
    labels = [sorted(set(rng.integers(0, 4, 2).tolist())) for _ in rows]
    half = len(rows) // 2
    chunks = [(rows[part], labels[part]) for part in (slice(0, half), slice(half, None)) if rows[part]]
    idf = inverse_document_frequency(*document_frequency(count_terms(lists(some), 97) for some, _ in chunks))
    features = [tfidf(count_terms(lists(some), 97), idf) for some, _ in chunks]
    fast = label_vectors(
        label_incidence(lists(own), 4).T.tocsr() @ part for part, (_, own) in zip(features, chunks, strict=True)
    )
    dense = np.concatenate([part.toarray() for part in features])
    np.testing.assert_allclose(fast.toarray(), reference.label_vectors(dense.tolist(), labels, 4), atol=1e-5)
    lengths = np.linalg.norm(dense, axis=1)
    np.testing.assert_allclose(lengths, [1.0 if row else 0.0 for row in rows], atol=1e-5)
