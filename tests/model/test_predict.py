"""Prediction: batches change nothing, precision is the config's, and the model is left as it was."""

import numpy as np
import pyarrow as pa
import pytest
import torch
import torch.nn.functional as F
from toys import documents, toy_model

from xmc_ray.data.groups import LabelGroups
from xmc_ray.model import precision
from xmc_ray.model.lightxml import LightXML, ModelConfig
from xmc_ray.model.predict import PredictConfig, computing, features, predict
from xmc_ray.training.loop import LoopConfig


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


def test_what_the_encoder_does_not_read_takes_none_of_its_budget(model: LightXML, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else long documents, of which it reads the beginnings, would go through it one by one."""
    long = pa.array([[1, 2, 3, 4] * 50] * 8, pa.list_(pa.int32()))
    sizes: list[int] = []
    features_of = model.features
    monkeypatch.setattr(model, "features", lambda batch: sizes.append(len(batch)) or features_of(batch))
    for most, expected in ((4, [8]), (100, [1] * 8), (None, [1] * 8)):
        monkeypatch.setattr(model.encoder, "max_tokens", most, raising=False)
        sizes.clear()
        predict(model, long, 3, PredictConfig(token_budget=32))
        assert sizes == expected


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


def test_auto_computes_as_it_is_named(model: LightXML, tokens: pa.ListArray, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the CPU where there is a transformer; words alone are the same to the last digit."""
    words = LightXML(None, LabelGroups(np.arange(12) % 7), ModelConfig(shortlist=2, bottleneck=8), lexical=model.lexical)
    for has_it, expected in ((False, "float32"), (True, "bfloat16")):
        monkeypatch.setattr(precision, "cpu_has_bfloat16", lambda has_it=has_it: has_it)
        for one, other in ((model, expected), (words, "float32")):
            found = predict(one, tokens, 4, PredictConfig())
            np.testing.assert_array_equal(found[0], predict(one, tokens, 4, PredictConfig(precision=other))[0])
    halves = (predict(words, tokens, 4, PredictConfig(precision=kind))[0] for kind in ("float32", "bfloat16"))
    np.testing.assert_array_equal(*halves)


@pytest.mark.parametrize("masked", [False, True])
def test_attention_within_bfloat16_is_in_float32(masked: bool, model: LightXML) -> None:
    mask = torch.rand(2, 1, 5, 5) > 0.3 if masked else None
    inputs = [torch.randn(2, 3, 5, 8).bfloat16().requires_grad_() for _ in range(3)]
    with computing(model, "bfloat16"):
        found = F.scaled_dot_product_attention(*inputs, attn_mask=mask, scale=0.5)
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16  # all else
    found.float().sum().backward()
    gradients = [tensor.grad for tensor in inputs]
    wide = [tensor.detach().float().requires_grad_() for tensor in inputs]
    expected = F.scaled_dot_product_attention(*wide, attn_mask=mask, scale=0.5)
    expected.sum().backward()
    assert torch.equal(found, expected.bfloat16())
    for gradient, tensor in zip(gradients, wide, strict=True):
        assert gradient is not None and tensor.grad is not None and torch.equal(gradient, tensor.grad.bfloat16())


def test_token_budgets_depend_on_the_device() -> None:
    """Kind: one default, several values. Training and prediction mean the same by 0."""
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert [PredictConfig().tokens_at_once(device) for device in (cpu, gpu)] == [2048, 8192]
    assert PredictConfig(token_budget=5).tokens_at_once(gpu) == 5
    assert LoopConfig().prediction == PredictConfig()
