"""The linear ranker's scores and order against loops over documents, labels and weights."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from toys import batch_of, toy_model

from xmc_ray.data.groups import LabelGroups
from xmc_ray.model.lightxml import LightXML
from xmc_ray.model.linear import LinearRanker

QUICK = settings(max_examples=40, deadline=None, derandomize=True)


def ranker(rng: np.random.Generator, n_labels: int = 12, n_columns: int = 32, candidates: int = 4) -> LinearRanker:
    """Random weights, of some labels none."""
    rows = [np.sort(rng.permutation(n_columns)[: rng.integers(0, 9)]) for _ in range(n_labels)]
    start_L1 = torch.from_numpy(np.concatenate([[0], np.cumsum([*map(len, rows)])]))
    column_W = torch.from_numpy(np.concatenate(rows).astype(np.int32))
    weight_W, bias_L = (torch.from_numpy(rng.normal(size=n).astype(np.float32)) for n in (len(column_W), n_labels))
    return LinearRanker(start_L1, column_W, weight_W, bias_L, candidates, weight=0.5)


def z_of(part: LinearRanker, x_F: np.ndarray, label: int) -> float:
    entries = range(int(part.start_L1[label]), int(part.start_L1[label + 1]))
    return float(part.bias_L[label]) + sum(float(part.weight_W[entry]) * x_F[part.column_W[entry]] for entry in entries)


def with_ranker(seed: int, candidates: int, **options: Any) -> tuple[LightXML, np.random.Generator]:
    rng = np.random.default_rng(seed)
    model = toy_model(lexical=True, seed=seed, **options).eval()
    model.linear = ranker(rng, candidates=candidates)
    return model, rng


@QUICK
@given(seed=st.integers(0, 10_000), documents=st.integers(1, 5))
def test_margins_equal_the_slow_twin(seed: int, documents: int) -> None:
    """On a CPU, and by the tensor operations that a GPU takes."""
    model, rng = with_ranker(seed, 4)
    assert model.linear is not None and model.lexical is not None
    batch = batch_of(rng, [[0]] * documents)
    terms = model.lexical.terms(batch.tokens_BT, batch.mask_BT)
    label_BC = torch.from_numpy(rng.integers(-1, 12, (documents, 6)))
    x_BF = np.zeros((documents, 32))
    x_BF[terms[0], terms[1]] = terms[2]
    rows = zip(x_BF, label_BC.clamp(min=0).tolist(), strict=True)
    expected = torch.tensor([[z_of(model.linear, x_F, label) for label in labels] for x_F, labels in rows])
    for z_BC in (model.linear.margins(terms, 32, label_BC), model.linear._on_gpu(terms, 32, label_BC.clamp(min=0))):
        torch.testing.assert_close(z_BC.double(), expected, rtol=1e-4, atol=1e-5)


def test_documents_without_terms_have_the_labels_biases() -> None:
    part, nothing = ranker(np.random.default_rng(0)), torch.zeros(0, dtype=torch.long)
    label_BC = torch.tensor([[0, 3], [11, 5]])
    terms = nothing, nothing, torch.zeros(0)
    for score in (part.margins, part._on_gpu):
        assert torch.equal(score(terms, 32, label_BC), part.bias_L[label_BC])


@QUICK
@given(seed=st.integers(0, 10_000), candidates=st.integers(1, 12), k=st.integers(1, 14), flat=st.booleans())
def test_candidates_are_reordered_and_the_others_stay_behind(seed: int, candidates: int, k: int, flat: bool) -> None:
    model, rng = with_ranker(seed, candidates, groups=LabelGroups(np.arange(12)) if flat else None)
    batch, part = batch_of(rng, [[0]] * 3), model.linear
    assert part is not None and model.lexical is not None
    with torch.no_grad():
        found = model.predict(batch, k)
        model.linear = None
        first = model.predict(batch, max(k, candidates))
    z = part.margins(model.lexical.terms(batch.tokens_BT, batch.mask_BT), 32, first.label_Bk)
    for row in range(3):
        scored = [
            (float(score) * float(part.likelihood(margin if place < candidates else torch.tensor(-9.0))), int(label))
            for place, (score, margin, label) in enumerate(zip(first.score_Bk[row], z[row], first.label_Bk[row], strict=True))
        ]
        expected = sorted(scored, key=lambda pair: -pair[0])[:k]
        assert found.label_Bk[row].tolist() == [label for _, label in expected]
        assert found.score_Bk[row].tolist() == pytest.approx([score for score, _ in expected], rel=1e-4)


def test_more_labels_do_not_change_the_first_ones() -> None:
    model, rng = with_ranker(1, 6)
    batch = batch_of(rng, [[0]] * 4)
    with torch.no_grad():
        few, many = model.predict(batch, 3), model.predict(batch, 5)
    assert torch.equal(few.label_Bk, many.label_Bk[:, :3]) and torch.equal(few.score_Bk, many.score_Bk[:, :3])


def test_a_label_is_listed_however_much_the_words_speak_against_it_unless_it_is_disabled() -> None:
    """Kind: a score that is rounded to 0 means a label that is disabled."""
    model, rng = with_ranker(2, 12, shortlist=7)
    assert model.linear is not None
    model.linear.bias_L.fill_(-1e6)
    model.recall.bias.data.fill_(-80)  # scores near the smallest float32
    model.disable(np.array([5]))
    batch = batch_of(rng, [[0]] * 2)
    with torch.no_grad():
        found = model.predict(batch, 12)
    for row in found.label_Bk.tolist():
        assert sorted(row) == [-1, *(label for label in range(12) if label != 5)]
