"""A hook of the user's that scores the best labels of each document again: a cross-encoder, rules of a business, another model.

    [rerank]
    function = "my_package.rerank:Scorer"     # a class, made once in each actor, or a function
    candidates = 50
    version = "2026-11"

The hook gets a batch of documents as `Candidates` and returns one score a candidate, in 0..1. These replace the model's: tags
are the best ``k`` by them, and ``min_score`` is compared with them.

Letters: D documents, C candidates of each at most, P candidates of all documents together, k tags.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from xmc_ray.data.labels import IntArray
from xmc_ray.errors import ConfigError, ModelError
from xmc_ray.on_ray.predicted import matrix, with_predictions
from xmc_ray.settings import Bounds, PositiveInt, Settings, imported

if TYPE_CHECKING:  # a driver has no use for torch
    from xmc_ray.on_ray.predictor import Predictor


@dataclass(frozen=True, kw_only=True)
class RerankConfig(Settings):
    """A hook that scores the best labels of each document again."""

    function: Annotated[str, Bounds(min_length=1)]
    """The hook, ``package.module:name``: a function, or a class without arguments that is made once in each actor. Every node
    has to be able to import the module."""
    version: Annotated[str, Bounds(min_length=1)]
    """What tells this hook from an earlier one of its name: change it whenever scores may change."""
    candidates: PositiveInt = 50
    """Labels of each document that the hook scores, at most all."""

    def check(self) -> None:
        """Raises ConfigError unless ``function`` names a module and something in it."""
        module, _, name = self.function.partition(":")
        if not (module and name):
            raise ConfigError("rerank.function names no function", found=self.function, expected="package.module:name")

    def check_use(self, k: int, min_precision: float | None) -> None:
        """Raises ConfigError for settings that do not go together with a hook."""
        if k > self.candidates:
            raise ConfigError("rerank.candidates is below k", found=self.candidates, expected=f"at least {k}")
        if min_precision is not None:
            found = "thresholds for min_precision are those of the model's scores"
            raise ConfigError("min_precision and rerank exclude each other", found=found, way_out="give min_score")

    def resolve(self) -> Callable[..., Any]:
        """What ``function`` names. Raises ConfigError where there is no such thing, or its module cannot be imported."""
        hook: Callable[..., Any] = imported(self.function, "the hook")
        if not callable(hook):
            raise ConfigError("the hook cannot be called", where=self.function, found=type(hook).__name__)
        return hook


@dataclass(frozen=True)
class Candidates:
    """What a hook scores: P pairs of a document and a label.

    ``texts``: string[D]; ``documents``: int64[P], rising, the row in ``texts`` of each pair; ``labels``: string[P]; ``names``:
    string[P], the label itself where it has no name; ``scores``: float32[P], the model's, falling within a document.
    """

    texts: pa.StringArray
    documents: IntArray
    labels: pa.StringArray
    names: pa.StringArray
    scores: npt.NDArray[np.float32]


class Reranked:
    """A `Predictor` of candidates with a hook behind it: tokens and ``text`` in, predictions out."""

    def __init__(self, predictor: "Callable[[], Predictor]", config: RerankConfig, k: int) -> None:
        """``predictor`` loads the model, which lists ``config.candidates`` labels. Raises what `RerankConfig.resolve` raises,
        and ModelError where a class raises when it is made."""
        self.config, hook = config, config.resolve()
        self.hook = self._call(hook) if isinstance(hook, type) else hook
        self.predict = predictor()
        index = self.predict.ensemble.labels
        self.labels, self.names = index.labels, pc.coalesce(index.names, index.labels)
        self.k = min(k, len(index))

    def __call__(self, table: pa.Table) -> pa.Table:
        """The table as the predictor returns it, without ``text``. ModelError, with the hook's name, for what it does wrong."""
        predicted = self.predict(table)
        ids_DC, scores_DC = matrix(predicted, "ids"), matrix(predicted, "probabilities")
        documents_P, places_P = np.nonzero(ids_DC >= 0)
        ids_P = pa.array(ids_DC[documents_P, places_P])
        score_DC = np.full(ids_DC.shape, -1, np.float32)  # pads come last
        if len(ids_P):
            texts, scores_P = predicted["text"].combine_chunks(), scores_DC[documents_P, places_P]
            candidates = Candidates(texts, documents_P, self.labels.take(ids_P), self.names.take(ids_P), scores_P)
            score_DC[documents_P, places_P] = self._checked(self._call(self.hook, candidates), len(ids_P))
        best_Dk = (-score_DC).argsort(axis=1, kind="stable")[:, : self.k]  # equal ones stay in the order of the model
        ids_Dk, scores_Dk = (np.take_along_axis(values, best_Dk, 1) for values in (ids_DC, score_DC))
        kept = predicted.drop_columns(["text", "ids", "probabilities"])
        return with_predictions(kept, ids_Dk, scores_Dk.clip(min=0), self.predict.made_by)

    def _call(self, hook: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return hook(*arguments)
        except Exception as error:
            raise ModelError("the hook fails", where=self.config.function, found=f"{type(error).__name__}: {error}") from error

    def _checked(self, scores: Any, pairs: int) -> npt.NDArray[np.float32]:
        try:
            scores_P = np.asarray(scores, np.float32)
        except Exception as error:  # what the hook returns may have a conversion of its own
            raise self._error(f"{type(scores).__name__}: {error}", pairs) from error
        if scores_P.shape != (pairs,):
            raise self._error(f"shape {scores_P.shape}", pairs)
        is_wrong = ~((scores_P >= 0) & (scores_P <= 1))  # NaN as well
        if is_wrong.any():
            raise self._error(f"{is_wrong.sum():,} others, such as {scores_P[is_wrong.argmax()]}", pairs)
        return scores_P

    def _error(self, found: str, pairs: int) -> ModelError:
        expected = f"{pairs:,} numbers in 0..1, one a candidate"
        return ModelError("the hook returns no scores", where=self.config.function, found=found, expected=expected)
