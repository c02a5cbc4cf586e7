"""Prediction: documents as tokens in, their best labels with scores out, or their features."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

from xmc_ray.data.labels import IntArray, list_lengths
from xmc_ray.model.lightxml import LightXML, Scoring
from xmc_ray.model.text import budget_batches, make_batch

Precision = Literal["auto", "float32", "bfloat16"]


@dataclass(frozen=True, kw_only=True)
class PredictConfig:
    """How documents are predicted, whatever the model was trained with."""

    token_budget: int = 0
    """Most tokens, padding included, that go through the encoder at once; 0 is 8,192 on a GPU and 2,048 on a CPU."""
    precision: Precision = "auto"
    """Arithmetic; auto is bfloat16 on a GPU and float32 on a CPU. It changes scores a little."""

    def tokens_at_once(self, device: torch.device) -> int:
        """The token budget on ``device``. On CPUs a large one is slower, by caches and by padding."""
        return self.token_budget or (8192 if device.type == "cuda" else 2048)


def predict(
    model: LightXML, tokens: pa.ListArray, k: int, config: PredictConfig, scoring: Scoring = "grouped"
) -> tuple[npt.NDArray[np.float32], IntArray]:
    """Scores float32[D, k] and label ids int64[D, k] of documents ``tokens`` (list<int32>[D]), in their order.

    Documents are batched by length under the config's token budget; see `model.Ranked` for short rows. Several workers call it
    together, with the same documents: each encodes its share, and each gets all results.
    """
    exchange, device = model.exchange, next(model.parameters()).device
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=uses_bfloat16(config.precision, device))
    scores, labels = np.zeros((len(tokens), k), np.float32), np.full((len(tokens), k), -1, np.int64)
    training = model.training
    model.eval()
    with torch.inference_mode(), autocast:
        for rows in budget_batches(list_lengths(tokens), config.tokens_at_once(device)):
            dealt = [rows[rank :: exchange.world] for rank in range(exchange.world)]
            ranked = model.predict(make_batch(tokens.take(pa.array(dealt[exchange.rank]))).to(device), k, scoring)
            rows = np.concatenate(dealt)
            scores[rows], labels[rows] = ranked.score_Bk.float().cpu().numpy(), ranked.label_Bk.cpu().numpy()
    model.train(training)
    return scores, labels


def features(model: LightXML, tokens: pa.ListArray, config: PredictConfig) -> torch.Tensor:
    """float32[D, F], on the CPU: what the model reads in documents ``tokens`` (list<int32>[D]), in their order; one process."""
    device, training = next(model.parameters()).device, model.training
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=uses_bfloat16(config.precision, device))
    features_DF = torch.zeros(len(tokens), model.width)
    model.eval()
    with torch.inference_mode(), autocast:
        for rows in budget_batches(list_lengths(tokens), config.tokens_at_once(device)):
            features_DF[rows] = model.features(make_batch(tokens.take(pa.array(rows))).to(device)).float().cpu()
    model.train(training)
    return features_DF


def uses_bfloat16(precision: Precision, device: torch.device) -> bool:
    """Whether the arithmetic on ``device`` is bfloat16."""
    return precision == "bfloat16" or (precision == "auto" and device.type == "cuda")
