"""The lexical branch: the terms of documents, their weights, and vectors that learn."""

import math
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from xmc_ray import ConfigError, EncoderConfig, FitConfig, GroupsConfig, LexicalConfig, LoopConfig, XMCClassifier
from xmc_ray.data import terms
from xmc_ray.data.groups import LabelGroups, tfidf, unit_rows
from xmc_ray.model.batch import make_batch
from xmc_ray.model.lexical import LexicalBranch, count_terms, term_weights
from xmc_ray.model.lightxml import LightXML, ModelConfig
from xmc_ray.model.sharding import Exchange

COLUMNS = 64

documents = st.lists(st.lists(st.integers(0, 30_000), max_size=8), min_size=1, max_size=6)


def tokens_of(rows: list[list[int]]) -> pa.ListArray:
    return pa.array(rows, pa.list_(pa.int32()))


@given(rows=documents)
@settings(max_examples=50, deadline=None)
def test_terms_are_tokens_and_pairs_of_each_document(rows: list[list[int]]) -> None:
    batch = make_batch(tokens_of(rows))
    row_N, column_N, count_N = (part.tolist() for part in count_terms(batch.tokens_BT, batch.mask_BT, COLUMNS))
    found = dict(zip(zip(row_N, column_N, strict=True), count_N, strict=True))
    assert list(found) == sorted(found)
    assert found == reference.terms(rows, COLUMNS)


@given(rows=documents, rarest=st.integers(1, 3))
@settings(max_examples=50, deadline=None)
def test_features_are_weighted_sums_of_vectors_and_a_layer(rows: list[list[int]], rarest: int) -> None:
    config = LexicalConfig(width=4, columns=COLUMNS, rarest=rarest)
    weight_F = term_weights([tokens_of(rows[:2]), tokens_of(rows[2:])], config)
    np.testing.assert_allclose(weight_F, reference.term_weights(rows, COLUMNS, rarest), rtol=1e-6)
    torch.manual_seed(0)
    branch = LexicalBranch(torch.from_numpy(weight_F), config.width)
    batch = make_batch(tokens_of(rows))
    with torch.no_grad():
        kept_F = torch.from_numpy(weight_F > 0)
        vectors_FH = torch.zeros(COLUMNS, 4)
        vectors_FH[kept_F] = branch.vectors.weight[: int(kept_F.sum())]
        expected = reference.lexical_features(rows, weight_F, vectors_FH, branch.mix.weight, branch.mix.bias)
        torch.testing.assert_close(branch(batch.tokens_BT, batch.mask_BT), expected, rtol=1e-4, atol=1e-6)


FIELD_TOKENS = st.lists(st.tuples(st.integers(0, 2), st.integers(0, 9)), max_size=8).map(sorted)


@given(rows=st.lists(FIELD_TOKENS, min_size=1, max_size=5), weights=st.lists(st.floats(0.1, 8), min_size=3, max_size=3))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_terms_of_a_field_have_its_weight(rows: list[list[tuple[int, int]]], weights: list[float]) -> None:
    """Of the branch, and of what trains the linear ranker: both against one term at a time."""
    tokens = tokens_of([[token + (field << 24) for field, token in row] for row in rows])
    idf_F = np.random.default_rng(0).random(COLUMNS).astype(np.float32).clip(0.2)
    expected: dict[tuple[int, int], float] = {}
    for (row, column), count in reference.weighted_terms(rows, weights, COLUMNS).items():
        expected[row, column] = (count if count < 1 else 1 + math.log(count)) * float(idf_F[column])
    length = [math.sqrt(sum(w**2 for (row, _), w in expected.items() if row == n)) for n in range(len(rows))]
    expected = {place: weight / length[place[0]] for place, weight in expected.items()}
    batch = make_batch(tokens)
    row_N, column_N, weight_N = LexicalBranch(torch.from_numpy(idf_F), 4, weights).terms(batch.tokens_BT, batch.mask_BT)
    places = list(zip(row_N.tolist(), column_N.tolist(), strict=True))
    assert places == sorted(expected)
    assert dict(zip(places, weight_N.tolist(), strict=True)) == pytest.approx(expected, rel=1e-4)
    cells = tfidf(terms.count_terms(tokens, COLUMNS, weights), idf_F).tocoo()
    in_training = dict(zip(zip(*(place.tolist() for place in cells.coords), strict=True), cells.data.tolist(), strict=True))
    assert in_training == pytest.approx(expected, rel=1e-4)


@given(rows=documents)
@settings(max_examples=40, deadline=None, derandomize=True)
def test_without_fields_weights_are_those_of_before_to_the_last_bit(rows: list[list[int]]) -> None:
    """And so they are with a single field of weight 1."""
    batch, idf_F = make_batch(tokens_of(rows)), torch.rand(COLUMNS, generator=torch.Generator().manual_seed(0))
    row_N, column_N, count_N = count_terms(batch.tokens_BT, batch.mask_BT, COLUMNS)
    before_N = (1 + count_N.float().log()) * idf_F[column_N]
    before_N = before_N * torch.zeros(len(rows)).index_add_(0, row_N, before_N.square()).clamp(min=1e-12).rsqrt()[row_N]
    for weights in ((), (1.0,)):
        assert torch.equal(LexicalBranch(idf_F, 4, weights).terms(batch.tokens_BT, batch.mask_BT)[2], before_N)
    sparse = tfidf(terms.count_terms(tokens_of(rows), COLUMNS), idf_F.double().numpy())
    counts = terms.count_terms(tokens_of(rows), COLUMNS)
    counts.data = ((1 + np.log(counts.data)) * idf_F.double().numpy()[counts.indices]).astype(np.float32)
    assert (sparse.data == unit_rows(counts).data).all()


def test_columns_spread_over_the_whole_width() -> None:
    batch = make_batch(tokens_of([list(range(30_000))]))
    _, column_N, count_N = count_terms(batch.tokens_BT, batch.mask_BT, 2**18)
    assert len(column_N) > 0.9 * 2**18 * (1 - np.exp(-60_000 / 2**18))  # as many as random ones would hit, and a few less
    assert int(count_N.max()) < 10


def test_a_term_left_out_and_padding_change_nothing() -> None:
    config = LexicalConfig(width=4, columns=2**16, rarest=2)
    weight_F = term_weights([tokens_of([[1, 2, 3], [1, 2, 3]])], config)
    branch = LexicalBranch(torch.from_numpy(weight_F), config.width)
    known, other = make_batch(tokens_of([[1, 2, 3]])), make_batch(tokens_of([[1, 2, 3, 9], [7] * 9]))
    with torch.no_grad():
        features = branch(other.tokens_BT, other.mask_BT)
        torch.testing.assert_close(features[:1], branch(known.tokens_BT, known.mask_BT))
        assert features[1].count_nonzero() == 0  # nothing known in it, and the layer's bias starts at zero


def test_a_model_without_a_transformer_learns_and_survives_a_bundle(tiny_encoder: Path, tmp_path: Path) -> None:
    config = FitConfig(
        encoder=EncoderConfig(name=str(tiny_encoder), layers=0),
        lexical=LexicalConfig(width=16, columns=512),
        groups=GroupsConfig(max_size=1),
        model=ModelConfig(dropout=0.0),
        loop=LoopConfig(epochs=12, batch_size=8),
    )
    colours, kinds = ["red", "green"], ["apple", "pear", "plum"]
    labels = [[colour, kind] for colour in colours for kind in kinds] * 8
    classifier = XMCClassifier.fit([" ".join(row) for row in labels], labels, config=config)
    assert classifier.evaluate([" ".join(row) for row in labels], labels)["total"]["P@1"] == 1.0
    classifier.save(str(tmp_path / "bundle"))
    assert not (tmp_path / "bundle" / "encoder").exists()
    again = XMCClassifier.load(str(tmp_path / "bundle"))
    (before,), (after,) = (each.predict(["a green plum"], k=3) for each in (classifier, again))
    assert [label for label, _ in after] == [label for label, _ in before]
    assert [score for _, score in after] == pytest.approx([score for _, score in before])  # sums vary with memory's alignment
    assert "lexical branch: width 16, 512 columns" in (tmp_path / "bundle" / "README.md").read_text()


def test_a_model_needs_something_to_read_with() -> None:
    with pytest.raises(ConfigError, match=r"encoder\.layers = 0 and lexical\.width = 0"):
        LightXML(None, LabelGroups(np.arange(3)), ModelConfig(), Exchange())
    assert LightXML(None, LabelGroups(np.arange(3)), ModelConfig(), lexical=LexicalBranch(torch.ones(8), 4)).width == 4
