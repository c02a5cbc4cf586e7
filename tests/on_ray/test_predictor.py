"""Actors that predict: rows without tokens, sizes of the pool, scoring that is settled by measurement."""

import numpy as np
import pyarrow as pa
import pytest

from xmc_ray import __version__
from xmc_ray.bundle.ensemble import Ensemble
from xmc_ray.bundle.members import Members
from xmc_ray.model.predict import PredictConfig
from xmc_ray.on_ray.pool import PoolConfig, ScoringConfig
from xmc_ray.on_ray.predicted import NothingToPredict, made_by_of, matrix
from xmc_ray.on_ray.predictor import Predictor
from xmc_ray.on_ray.stream import token_columns

TEXTS = ["a red apple", "a green pear", "", "a yellow plum and a grape"]
POOL = PoolConfig(max=1, threads=1)


def test_an_actor_predicts_the_rows_that_have_tokens(ray_session: None, bundles: list[str]) -> None:
    ensemble, scoring = Ensemble.load(bundles), ScoringConfig()
    tokens = ensemble.encode(pa.array(TEXTS))
    columns = token_columns(len(tokens))
    assert len(columns) == 2
    empty = pa.array([[]], pa.list_(pa.int32()))
    rejected = [pa.concat_arrays([lists.slice(0, 1), empty, lists.slice(2)]) for lists in tokens]
    table = pa.table({"id": ["a", "b", "c", "d"], **dict(zip(columns, rejected, strict=True))})
    predicted = Predictor(Members.read(bundles), 5, POOL, scoring)(table)
    assert predicted.column_names == ["id", "ids", "probabilities"]
    assert made_by_of(predicted) == {"release": __version__, "arithmetic": "cpu float32"} and made_by_of(table) == {}
    scores, ids = matrix(predicted, "probabilities"), matrix(predicted, "ids")
    assert (ids[1] == -1).all() and (scores[1] == 0).all()
    kept = pa.array([0, 2, 3])
    expected = ensemble.predict([lists.take(kept) for lists in tokens], 5, PredictConfig())
    np.testing.assert_array_equal(ids[[0, 2, 3]], expected[1])
    np.testing.assert_allclose(scores[[0, 2, 3]], expected[0], rtol=1e-5)
    nothing = Predictor(Members.read(bundles), 5, POOL, scoring)(table.slice(0, 0))
    assert matrix(nothing, "ids").shape == (0, 5)
    absurd = Predictor(Members.read(bundles), 10**9, POOL, scoring)(table)
    assert matrix(absurd, "ids").shape == (4, len(ensemble.labels)), "memory goes by the labels, not by k"


def test_rejects_need_no_model() -> None:
    """They come out as a model would hand them on; a document without a model is a bug."""
    tokens = pa.array([[]] * 2, pa.list_(pa.int32()))
    table = pa.table({"id": ["a", None], "reason": ["text is null", "id is null"], "tokens": tokens, "tokens_1": tokens})
    nothing = NothingToPredict(2, 3, {"release": "1", "arithmetic": "cuda bfloat16"})
    predicted = nothing(table)
    assert predicted.column_names == ["id", "reason", "ids", "probabilities"]
    assert made_by_of(predicted) == {"release": "1", "arithmetic": "cuda bfloat16"}
    assert matrix(predicted, "ids").tolist() == [[-1] * 3] * 2 and not matrix(predicted, "probabilities").any()
    with pytest.raises(ValueError, match="a document to tag, and no model"):
        nothing(table.set_column(1, "reason", pa.array(["text is null", None])))
