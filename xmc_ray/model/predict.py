"""Prediction: the best labels of tokenised documents, with their scores; or their features.

Letters: D documents, k labels of each, F features.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

from xmc_ray.data.labels import IntArray, list_lengths
from xmc_ray.model.lightxml import LightXML, Scoring
from xmc_ray.model.text import budget_batches, make_batch
from xmc_ray.settings import NonNegativeInt, Settings

Precision = Literal["auto", "float32", "bfloat16"]


@dataclass(frozen=True, kw_only=True)
class PredictConfig(Settings):
    """How documents are predicted, independent of how the model was trained."""

    token_budget: NonNegativeInt = 0
    """Maximum number of tokens, padding included, in a batch of the encoder; 0 is 8,192 on a GPU and 2,048 on a CPU."""
    precision: Precision = "auto"
    """Arithmetic; auto is bfloat16 on a GPU and float32 on a CPU. It changes scores a little."""

    def tokens_at_once(self, device: torch.device) -> int:
        """The token budget on ``device``. A large one is slower on CPUs, because of caches and padding."""
        return self.token_budget or (8192 if device.type == "cuda" else 2048)


def predict(
    model: LightXML, tokens: pa.ListArray, k: int, config: PredictConfig, scoring: Scoring = "grouped"
) -> tuple[npt.NDArray[np.float32], IntArray]:
    """Scores float32[D, k] and label ids int64[D, k] of documents ``tokens`` (list<int32>[D]), in their order.

    Documents are batched by length under the config's token budget; `lightxml.Ranked` says how short rows are padded. Several
    workers call it together, with the same documents: each encodes its share, and each gets all results.
    """
    exchange = model.exchange
    scores, labels = np.zeros((len(tokens), k), np.float32), np.full((len(tokens), k), -1, np.int64)
    with _predicting(model, config) as device:
        for rows in budget_batches(list_lengths(tokens), config.tokens_at_once(device)):
            shares = [rows[rank :: exchange.world] for rank in range(exchange.world)]
            ranked = model.predict(make_batch(tokens.take(pa.array(shares[exchange.rank]))).to(device), k, scoring)
            rows = np.concatenate(shares)
            scores[rows], labels[rows] = ranked.score_Bk.float().cpu().numpy(), ranked.label_Bk.cpu().numpy()
    return scores, labels


def mean_loss(model: LightXML, tokens: pa.ListArray, truth: pa.ListArray, config: PredictConfig) -> float:
    """The loss that training minimises, without dropout, of documents ``tokens`` with labels ``truth`` (list<int32>[D] each).

    It is a mean over documents. Several workers call it together, with the same documents.
    """
    exchange, total = model.exchange, 0.0
    with _predicting(model, config) as device:
        for rows in budget_batches(list_lengths(tokens), config.tokens_at_once(device)):
            batch = make_batch(tokens.take(pa.array(rows)), truth.take(pa.array(rows))).to(device)
            losses = torch.stack(model(batch, len(rows) * exchange.world)).double().sum()  # all workers have the same rows
            total += exchange.sum(losses).item() * len(rows)
    return total / max(1, len(tokens))


def features(model: LightXML, tokens: pa.ListArray, config: PredictConfig) -> torch.Tensor:
    """float32[D, F], on the CPU: features of documents ``tokens`` (list<int32>[D]), in their order; for a single process."""
    features_DF = torch.zeros(len(tokens), model.width)
    with _predicting(model, config) as device:
        for rows in budget_batches(list_lengths(tokens), config.tokens_at_once(device)):
            features_DF[rows] = model.features(make_batch(tokens.take(pa.array(rows))).to(device)).float().cpu()
    return features_DF


def margins(model: LightXML, tokens: pa.ListArray, label_DC: IntArray) -> torch.Tensor:
    """float32[D, C], on the CPU: the linear ranker's z of labels (int64[D, C]) of documents ``tokens``; see `model.linear`."""
    z_DC = torch.zeros(label_DC.shape)
    assert model.linear is not None and model.lexical is not None
    with _predicting(model, PredictConfig()) as device:
        for rows in budget_batches(list_lengths(tokens), PredictConfig().tokens_at_once(device)):
            batch = make_batch(tokens.take(pa.array(rows))).to(device)
            terms, columns = model.lexical.terms(batch.tokens_BT, batch.mask_BT), len(model.lexical.weight_F)
            z_DC[rows] = model.linear.margins(terms, columns, torch.from_numpy(label_DC[rows]).to(device)).cpu()
    return z_DC


def uses_bfloat16(precision: Precision, device: torch.device) -> bool:
    """Whether the arithmetic on ``device`` is bfloat16."""
    return precision == "bfloat16" or (precision == "auto" and device.type == "cuda")


def arithmetic(precision: Precision, device: torch.device) -> str:
    """The name of the arithmetic on ``device``, such as ``cpu float32`` or ``cuda bfloat16``; it needs no device to be there.

    Scores of one name differ by rounding alone, those of two names by more: calibrations and tags hold for one name.
    """
    return f"{device.type} {'bfloat16' if uses_bfloat16(precision, device) else 'float32'}"


def cpu_has_bfloat16() -> bool:
    """Whether this CPU has instructions for bfloat16, such as AVX-512 BF16 and AMX; one without emulates it, slowly."""
    return any(available for name, available in torch.cpu.get_capabilities().items() if name.endswith("bf16"))


@contextmanager
def _predicting(model: LightXML, config: PredictConfig) -> Iterator[torch.device]:
    """``model`` in eval mode, without gradients, in the config's precision; yields its device."""
    device, training = next(model.parameters()).device, model.training
    model.eval()
    with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=uses_bfloat16(config.precision, device)):
        yield device
    model.train(training)
