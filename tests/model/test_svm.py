"""Training the linear ranker: each label's problem against a general solver, and labels that are solved together or apart."""

from typing import Any
from unittest import mock

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize, sparse
from toys import documents, toy_model

from xmc_ray.data.labels import list_lengths
from xmc_ray.model import kernels, svm
from xmc_ray.model.batch import make_batch
from xmc_ray.model.linear import LinearConfig
from xmc_ray.model.predict import PredictConfig, predict
from xmc_ray.model.svm import Examples, examples_of, joined, ranker_of, solved, train_linear

QUICK = settings(max_examples=15, deadline=None, derandomize=True)
CONFIG = LinearConfig(candidates=3)


def random_examples(seed: int, n_documents: int = 30, n_labels: int = 9, n_columns: int = 40) -> Examples:
    rng = np.random.default_rng(seed)
    x_DF = sparse.random_array((n_documents, n_columns), density=0.2, rng=rng, dtype=np.float32, format="csr")
    kind_DL = rng.choice(np.array([0, 0, 1, 1, 2, 3], np.int8), (n_documents, n_labels))
    kind_DL += 4 * (rng.random(kind_DL.shape) < 0.1).astype(np.int8)  # judged pairs
    kind_DL[:, -1] &= 1  # a label that no document has
    return Examples(x_DF, sparse.csr_array(kind_DL))


def weights_of(part: svm.Weights, label: int, n_columns: int = 40) -> np.ndarray:
    """float64[F + 1]: a label's weights and its bias."""
    ends = np.cumsum(part.size_L)
    entries = slice(ends[label] - part.size_L[label], ends[label])
    dense = np.zeros(n_columns + 1)
    dense[part.column_W[entries]] = part.weight_W[entries]
    dense[-1] = part.bias_L[label]
    return dense


@QUICK
@given(seed=st.integers(0, 10_000), cost=st.sampled_from([0.1, 1.0, 10.0]), to_the_end=st.booleans())
def test_a_solution_is_as_good_as_that_of_a_general_solver(seed: int, cost: float, to_the_end: bool) -> None:
    """Nearly so after a few passes, and to the last digits after many."""
    examples = random_examples(seed)
    limits = {"_PASSES": 10_000, "_TOLERANCE": 1e-6} if to_the_end else {"_PASSES": svm._PASSES}
    with mock.patch.multiple(svm, **limits):
        found = solved(examples, range(9), LinearConfig(candidates=3, cost=cost, smallest=0), 1, judged_weight=5)
    x_DI = np.hstack([examples.x_DF.toarray(), np.ones((30, 1))])
    kind_DL = examples.kind_DL.toarray()
    for label in range(8):
        rows = kind_DL[:, label] > 0
        x_EI, y_E = x_DI[rows].astype(float), np.where(kind_DL[rows, label] & 2, 1.0, -1.0)
        cost_E = np.where(kind_DL[rows, label] & 4, 5 * cost, cost)
        if not (y_E > 0).any():
            continue

        def loss(w_I: np.ndarray, x_EI: np.ndarray = x_EI, y_E: np.ndarray = y_E, cost_E: np.ndarray = cost_E) -> float:
            return float(w_I @ w_I / 2 + cost_E @ np.square(np.maximum(0, 1 - y_E * (x_EI @ w_I))))

        best = optimize.minimize(loss, np.zeros(x_EI.shape[1]), method="BFGS").fun
        assert best - 1e-6 <= loss(weights_of(found, label)) <= (1.0001 if to_the_end else 1.1) * best


@QUICK
@given(seed=st.integers(0, 10_000), cut=st.integers(0, 9), threads=st.integers(1, 3))
def test_labels_may_be_solved_anywhere_and_documents_be_taken_apart(seed: int, cut: int, threads: int) -> None:
    examples = random_examples(seed)
    whole = solved(examples, range(9), CONFIG, threads=1)
    again = joined([Examples(*(part[:11] for part in examples)), Examples(*(part[11:] for part in examples))])
    parts = [solved(again, labels, CONFIG, threads) for labels in (range(cut), range(cut, 9))]
    for one, other in zip(whole, map(np.concatenate, zip(*parts, strict=True)), strict=True):
        np.testing.assert_array_equal(one, other)
    assert (np.abs(whole.weight_W) >= CONFIG.smallest).all()


def test_a_label_without_documents_keeps_its_score() -> None:
    ranker = ranker_of([solved(random_examples(0), range(9), CONFIG, threads=1)], CONFIG)
    assert ranker.start_L1[-1] == ranker.start_L1[-2] and ranker.bias_L[-1] == 1


def test_examples_are_a_documents_labels_and_the_models_candidates() -> None:
    model, table = toy_model(lexical=True), documents()
    examples = examples_of(model, table, CONFIG, PredictConfig())
    tokens, truth = (table[name].combine_chunks() for name in ("tokens", "labels"))
    candidates = predict(model, tokens, CONFIG.depth * CONFIG.candidates, PredictConfig())[1]
    for row, kinds in enumerate(examples.kind_DL.toarray()):
        assert set(np.flatnonzero(kinds % 2)) == set(candidates[row][candidates[row] >= 0])
        assert set(np.flatnonzero(kinds >= 2)) == set(truth[row].as_py())
    assert model.lexical is not None
    batch = make_batch(tokens)
    row_N, column_N, weight_N = model.lexical.terms(batch.tokens_BT, batch.mask_BT)
    expected = sparse.csr_array((weight_N, (row_N, column_N)), shape=examples.x_DF.shape)
    np.testing.assert_allclose(examples.x_DF.toarray(), expected.toarray(), atol=1e-6)


def test_documents_without_terms_or_labels_are_no_harm() -> None:
    """Kind: an empty document has no length to divide by."""
    table = pa.table({name: pa.array([[], [1], []], pa.list_(pa.int32())) for name in ("tokens", "labels")})
    ranker = train_linear(toy_model(lexical=True), table, CONFIG, PredictConfig())
    assert all(bool(values.isfinite().all()) for values in (ranker.weight_W, ranker.bias_L))


def test_it_learns_what_words_say() -> None:
    """Documents whose labels are their words, and a model that has learnt nothing."""
    model, table = toy_model(lexical=True, shortlist=7).eval(), documents(200)
    tokens, truth = (table[name].combine_chunks() for name in ("tokens", "labels"))
    config = LinearConfig(candidates=12)

    def share_of_hits() -> float:
        best = predict(model, tokens, 1, PredictConfig())[1][:, 0]
        return float(np.mean([label in true for label, true in zip(best, truth.to_pylist(), strict=True)]))

    assert share_of_hits() < 0.6 and list_lengths(truth).min() > 0
    model.linear = train_linear(model, table, config, PredictConfig())
    assert share_of_hits() > 0.9


def test_threads_share_the_labels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each label is solved once, in one of several parts."""
    parts: list[tuple[int, int]] = []
    solve = kernels.solve

    def counted(*arguments: Any) -> Any:
        parts.append((arguments[7], len(arguments[4]) - 1))
        return solve(*arguments)

    monkeypatch.setattr(kernels, "solve", counted)
    solved(random_examples(0), range(2, 9), CONFIG, threads=2)
    assert len(parts) > 2
    assert sorted(label for first, size in parts for label in range(first, first + size)) == [*range(2, 9)]
