"""Prediction: batches change nothing, precision is the config's, and the model is left as it was."""

from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from toys import documents, toy_model

from xmc_ray.model.lightxml import LightXML
from xmc_ray.model.predict import PredictConfig, arithmetic, cpu_has_bfloat16, features, predict, uses_bfloat16


@pytest.fixture
def model() -> LightXML:
    return toy_model(lexical=True, dropout=0.3)


@pytest.fixture
def tokens() -> pa.ListArray:
    return documents(20)["tokens"].combine_chunks()


@pytest.mark.parametrize("budget", [1, 7, 64, 10_000])
def test_prediction_is_that_of_one_document_at_a_time(budget: int, model: LightXML, tokens: pa.ListArray) -> None:
    scores, labels = predict(model, tokens, 4, PredictConfig(token_budget=budget))
    assert scores.dtype == np.float32
    for row in range(len(tokens)):
        alone = predict(model, tokens.slice(row, 1), 4, PredictConfig())
        np.testing.assert_allclose(scores[row], alone[0][0], rtol=1e-4)
        assert labels[row].tolist() == alone[1][0].tolist()
    assert model.training  # as before


@pytest.mark.parametrize("budget", [1, 10_000])
def test_features_are_in_the_order_of_the_documents(budget: int, model: LightXML, tokens: pa.ListArray) -> None:
    found = features(model, tokens, PredictConfig(token_budget=budget))
    assert found.shape == (20, model.width) and found.dtype == torch.float32
    for row in range(len(tokens)):
        torch.testing.assert_close(found[row], features(model, tokens.slice(row, 1), PredictConfig())[0], rtol=1e-4, atol=1e-5)
    assert model.training


def test_prediction_of_nothing(model: LightXML) -> None:
    nothing = pa.array([], pa.list_(pa.int32()))
    scores, labels = predict(model, nothing, 3, PredictConfig())
    assert scores.shape == labels.shape == (0, 3)
    assert features(model, nothing, PredictConfig()).shape == (0, model.width)


def test_bfloat16_is_nearly_float32(model: LightXML, tokens: pa.ListArray) -> None:
    exact, rounded = (features(model, tokens, PredictConfig(precision=kind)) for kind in ("float32", "bfloat16"))
    assert not torch.equal(exact, rounded)
    torch.testing.assert_close(rounded, exact, rtol=0.05, atol=0.02)
    (exact_scores, _), (scores, _) = (
        predict(model, tokens, 12, PredictConfig(precision=kind)) for kind in ("float32", "bfloat16")
    )
    assert scores.dtype == np.float32
    np.testing.assert_allclose(scores, exact_scores, atol=0.03)


def test_arithmetic_is_named_without_the_device() -> None:
    """Kind: results of one arithmetic taken for those of another. A driver has no GPU, and names that of its actors."""
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert arithmetic("auto", cpu) == arithmetic("float32", cpu) == "cpu float32"
    assert arithmetic("auto", cuda) == arithmetic("bfloat16", cuda) == "cuda bfloat16"
    assert [arithmetic("bfloat16", cpu), arithmetic("float32", cuda)] == ["cpu bfloat16", "cuda float32"]


def test_defaults_depend_on_the_device() -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert [PredictConfig().tokens_at_once(device) for device in (cpu, gpu)] == [2048, 8192]
    assert PredictConfig(token_budget=5).tokens_at_once(gpu) == 5
    assert [uses_bfloat16("auto", device) for device in (cpu, gpu)] == [False, True]
    assert [uses_bfloat16("bfloat16", cpu), uses_bfloat16("float32", gpu)] == [True, False]


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [
        ({"avx2": True, "avx512_bf16": False, "amx_bf16": False}, False),
        ({"avx512_bf16": True, "amx_bf16": False}, True),
        ({"amx_bf16": True}, True),
        ({"avx512_f": True}, False),
    ],
)
def test_which_cpus_have_bfloat16(capabilities: dict[str, Any], expected: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert cpu_has_bfloat16() is expected
