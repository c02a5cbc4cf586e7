"""The classifier as an estimator of scikit-learn, the optional dependency ``xmc_ray[sklearn]``.

    make_pipeline(FunctionTransformer(clean), XMCEstimator(config=config))
    cross_val_score(XMCEstimator(config=config), texts, MultiLabelBinarizer().fit_transform(labels), scoring="f1_micro")

Letters: D documents, L classes, k classes of a document that have a score.
"""

from collections.abc import Iterable, Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from scipy import sparse

from xmc_ray.classifier import XMCClassifier
from xmc_ray.data.columns import label_column, text_column
from xmc_ray.errors import ConfigError, DataError
from xmc_ray.training.fit import FitConfig

try:
    from sklearn.base import BaseEstimator, ClassifierMixin
    from sklearn.metrics import accuracy_score
    from sklearn.utils.validation import check_is_fitted
except ImportError:
    raise ConfigError("xmc_ray.sklearn needs scikit-learn", way_out="pip install 'xmc_ray[sklearn]'") from None

Truth: TypeAlias = Iterable[Iterable[str | int] | None] | npt.NDArray[Any] | sparse.sparray | sparse.spmatrix


class XMCEstimator(ClassifierMixin, BaseEstimator):  # type: ignore[misc]  # scikit-learn has no types
    """A multi-label classifier of texts, with the methods and conventions of scikit-learn.

    ``X`` is a list, an array or a column of strings. ``y`` is an indicator matrix [D, L], dense or sparse, as
    `MultiLabelBinarizer` makes it and scikit-learn's splitting and scoring need it, or a list of lists of labels.

    ``config``: the settings of `XMCClassifier.fit`, whose rule decides them by default, as for ``minutes`` and ``device``.
    ``k``: how many classes of a document have a score; ``threshold``: the least score of one that `predict` gives.

    After `fit`: ``classes_`` (the labels, or of a matrix the numbers of its columns) and ``classifier_``, an `XMCClassifier`.
    """

    def __init__(
        self,
        *,
        config: FitConfig | None = None,
        minutes: float | None = None,
        device: str | None = None,
        k: int = 100,
        threshold: float = 0.5,
    ) -> None:
        self.config = config
        self.minutes = minutes
        self.device = device
        self.k = k
        self.threshold = threshold

    def fit(self, X: Sequence[str], y: Truth) -> "XMCEstimator":
        """Train, and return itself; raises what `XMCClassifier.fit` raises."""
        labels: Any = _lists(y)
        width = None
        if _is_matrix(y):
            matrix = _matrix(y)
            labels = np.split(matrix.indices.astype(str), matrix.indptr[1:-1])
            width = matrix.shape[1]
        self.classifier_ = XMCClassifier.fit(X, labels, config=self.config, minutes=self.minutes, device=self.device)
        known = self.classifier_.ensemble.labels.labels.to_pylist()
        self.classes_ = np.array(sorted(known), object) if width is None else np.arange(width)
        places = {str(label): place for place, label in enumerate(self.classes_.tolist())}
        self._column_L = np.array([places[label] for label in known], np.int64)
        return self

    def predict_proba(self, X: Sequence[str]) -> sparse.csr_array:
        """float32[D, L], sparse: the scores of the ``k`` best classes of each text, in 0..1; they need not add up to 1.

        They are probabilities of a calibrated classifier alone (`XMCClassifier.calibrate`, which needs further documents).
        """
        check_is_fitted(self, "classifier_")
        if isinstance(self.k, bool) or not isinstance(self.k, int | np.integer) or self.k < 1:
            raise ConfigError("invalid value of k", found=repr(self.k), expected="an integer, at least 1")
        ensemble = self.classifier_.ensemble
        tokens = ensemble.encode(text_column(X, fields=ensemble.fields))
        scores_Dk, ids_Dk = ensemble.predict(tokens, min(self.k, len(ensemble.labels)), self.classifier_.prediction)
        is_listed_Dk = ids_Dk >= 0
        rows = np.nonzero(is_listed_Dk)[0]
        places = rows, self._column_L[ids_Dk[is_listed_Dk]]
        return sparse.csr_array((scores_Dk[is_listed_Dk], places), shape=(len(ids_Dk), len(self.classes_)))

    def predict(self, X: Sequence[str]) -> sparse.csr_array:
        """int8[D, L], sparse: 1 for each class with a score of at least ``threshold``."""
        scores = self.predict_proba(X).tocoo()
        is_given = scores.data >= self.threshold
        places = scores.row[is_given], scores.col[is_given]
        return sparse.csr_array((np.ones(is_given.sum(), np.int8), places), shape=scores.shape)

    def score(self, X: Sequence[str], y: Truth) -> float:
        """The share of texts whose classes are all as in ``y``, scikit-learn's accuracy, which is strict for many labels."""
        given = self.predict(X)
        if _is_matrix(y):
            return float(accuracy_score(_matrix(y), given))
        places = {str(label): place for place, label in enumerate(self.classes_.tolist())}
        lists = label_column(_lists(y))
        if len(lists) != given.shape[0]:
            raise DataError("X and y differ in length", found=f"{given.shape[0]:,} texts, {len(lists):,} lists of labels")
        unknown = len(places)  # a column of labels that nothing predicts
        columns = [places.get(label, unknown) for label in lists.values.to_pylist()]
        data = np.ones(len(columns), np.int8), columns, lists.offsets.to_numpy()
        true = sparse.csr_array(data, (len(lists), unknown + 1))
        true.sum_duplicates()
        true.data[:] = 1
        given.resize(true.shape)
        return float(accuracy_score(true, given))

    def __sklearn_tags__(self) -> Any:
        """One text a document, several labels."""
        tags = super().__sklearn_tags__()
        tags.input_tags.one_d_array, tags.input_tags.two_d_array, tags.input_tags.string = True, False, True
        tags.classifier_tags.multi_label, tags.classifier_tags.multi_class = True, False
        tags.target_tags.multi_output, tags.target_tags.single_output = True, False
        return tags


def _is_matrix(y: Any) -> bool:
    """Whether it is one of numbers; rows of strings are lists of labels, all of one length."""
    return sparse.issparse(y) or (getattr(y, "ndim", 1) == 2 and np.asarray(y).dtype.kind in "biuf")


def _lists(y: Any) -> Any:
    """The rows of an array of strings as lists."""
    return np.asarray(y).tolist() if getattr(y, "ndim", 1) == 2 and not _is_matrix(y) else y


def _matrix(y: Any) -> sparse.csr_array:
    """DataError unless it holds nothing but 0 and 1."""
    matrix = sparse.csr_array(y, copy=True)
    matrix.eliminate_zeros()
    if (matrix.data != 1).any():
        raise DataError("y is no indicator matrix", found=f"a value {matrix.data[matrix.data != 1][0]}", expected="0 and 1")
    matrix.sort_indices()
    return matrix
