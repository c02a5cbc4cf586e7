"""The estimator keeps scikit-learn's contract, as far as that is about texts."""

import copy
import importlib
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

sklearn = pytest.importorskip("sklearn")
from scipy import sparse  # noqa: E402
from sklearn.base import clone, is_classifier  # noqa: E402
from sklearn.exceptions import NotFittedError  # noqa: E402
from sklearn.model_selection import cross_val_score  # noqa: E402
from sklearn.pipeline import make_pipeline  # noqa: E402
from sklearn.preprocessing import FunctionTransformer, MultiLabelBinarizer  # noqa: E402
from sklearn.utils import estimator_checks  # noqa: E402
from sklearn.utils.estimator_checks import check_estimator  # noqa: E402

from xmc_ray import ConfigError, DataError, EncoderConfig, FitConfig, LexicalConfig, LoopConfig  # noqa: E402
from xmc_ray.sklearn import XMCEstimator  # noqa: E402

COLOURS, KINDS = ["red", "green", "yellow"], ["apple", "pear", "plum"]
TEXTS = [f"a {colour} {kind} {n}" for n in range(6) for colour in COLOURS for kind in KINDS]
LABELS = [[colour, kind] for _ in range(6) for colour in COLOURS for kind in KINDS]


@pytest.fixture(scope="module")
def config(tiny_encoder: Path) -> FitConfig:
    """Words alone."""
    return FitConfig(
        encoder=EncoderConfig(name=str(tiny_encoder), layers=0),
        lexical=LexicalConfig(width=16, columns=1024),
        loop=LoopConfig(epochs=30, batch_size=8),
    )


@pytest.fixture(scope="module")
def fitted(config: FitConfig) -> XMCEstimator:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return XMCEstimator(config=config, k=4).fit(TEXTS, LABELS)


def test_scores_are_sparse_and_predictions_in_the_columns_of_the_classes(fitted: XMCEstimator) -> None:
    assert fitted.classes_.tolist() == sorted([*COLOURS, *KINDS])
    scores, given = fitted.predict_proba(TEXTS[:3]), fitted.predict(TEXTS[:3])
    assert sparse.issparse(scores) and scores.shape == given.shape == (3, 6) and scores.nnz == 12
    tags = fitted.classifier_.predict(TEXTS[:3], k=4)
    for row, listed in enumerate(tags):
        dense = scores.toarray()[row]
        assert {fitted.classes_[place]: dense[place] for place in np.flatnonzero(dense)} == pytest.approx(dict(listed))
    assert np.array_equal(given.toarray(), scores.toarray() >= 0.5)
    assert fitted.score(TEXTS, LABELS) == fitted.score(
        TEXTS, MultiLabelBinarizer(classes=fitted.classes_).fit_transform(LABELS)
    )
    assert fitted.score(TEXTS, LABELS) > 0.9
    assert fitted.score(TEXTS, [[*labels, "never seen"] for labels in LABELS]) == 0


def test_in_a_pipeline_under_cross_validation(config: FitConfig) -> None:
    matrix = MultiLabelBinarizer().fit_transform(LABELS)
    lower = FunctionTransformer(lambda texts: [text.lower() for text in texts])
    pipeline = make_pipeline(lower, XMCEstimator(config=config))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scores = cross_val_score(pipeline, np.array([text.upper() for text in TEXTS]), matrix, cv=2, scoring="f1_micro")
        fitted = pipeline.fit(TEXTS, sparse.csr_array(matrix))
    assert (scores > 0.8).all()
    assert fitted.classes_.tolist() == [0, 1, 2, 3, 4, 5]
    assert np.array_equal(fitted.predict(TEXTS).toarray(), matrix)


def test_parameters_and_clones(config: FitConfig, fitted: XMCEstimator) -> None:
    new = clone(fitted)
    assert new.get_params() == fitted.get_params() and new.config is not None and not hasattr(new, "classifier_")
    assert new.set_params(k=7, threshold=0.2).get_params()["k"] == 7 and is_classifier(new)
    with pytest.raises(NotFittedError):
        new.predict(TEXTS)


def test_the_checks_of_scikit_learn() -> None:
    """The tags say that ``X`` is texts, and `check_estimator`, whose data are numbers, then does little."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        results = check_estimator(XMCEstimator())
    assert {result["status"] for result in results} == {"passed"}


@pytest.mark.parametrize(
    "check",
    [
        "estimator_tags_renamed",
        "valid_tag_types",
        "estimator_repr",
        "no_attributes_set_in_init",
        "do_not_raise_errors_in_init_or_set_params",
        "mixin_order",
        "parameters_default_constructible",
        "get_params_invariance",
        "set_params",
    ],
)
def test_a_check_of_scikit_learn_that_fits_on_no_numbers(check: str) -> None:
    getattr(estimator_checks, f"check_{check}")("XMCEstimator", XMCEstimator())


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (
            lambda known: known.fit(TEXTS[:2], np.array([[0, 2], [1, 0]])),
            DataError,
            "y is no indicator matrix; found a value 2",
        ),
        (lambda known: known.fit([1, 2], [["a"], ["b"]]), DataError, "not a string"),
        (lambda known: known.predict("one text"), DataError, "no list"),
        (lambda known: known.score(TEXTS[:3], LABELS), DataError, "X and y differ in length; found 3 texts"),
        (lambda known: known.score(TEXTS, LABELS[:3]), DataError, "X and y differ in length; found .*, 3 lists of labels"),
    ],
)
def test_what_is_wrong_is_told_in_one_line(fitted: XMCEstimator, call: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        call(clone(fitted) if "fit" in call.__code__.co_names else fitted)


def test_labels_in_an_array_of_strings_are_lists_of_labels(fitted: XMCEstimator) -> None:
    """As NumPy makes of lists that are all of one length."""
    pairs = np.array([["a", "b"], ["b", "c"]] * 8)
    texts = [" ".join(pair) for pair in pairs]
    known = clone(fitted).fit(texts, pairs)
    assert list(known.classes_) == ["a", "b", "c"] and 0 <= known.score(texts, pairs) <= 1


def test_k_is_checked_where_it_is_used(fitted: XMCEstimator) -> None:
    other = copy.copy(fitted).set_params(k=0)
    with pytest.raises(ConfigError, match="invalid value of k; found 0"):
        other.predict(TEXTS)


def test_without_scikit_learn_the_way_out_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.base", None)
    monkeypatch.delitem(sys.modules, "xmc_ray.sklearn")
    with pytest.raises(ConfigError, match=r"needs scikit-learn; .*pip install 'xmc_ray\[sklearn\]'"):
        importlib.import_module("xmc_ray.sklearn")
