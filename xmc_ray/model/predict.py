"""Prediction: the best labels of tokenised documents, with their scores; or their features.

Letters: D documents, k labels of each, F features.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from xmc_ray.data.filters import DocumentFilters
from xmc_ray.data.labels import IntArray, list_lengths
from xmc_ray.errors import warn_caller
from xmc_ray.model.batch import budget_batches, make_batch
from xmc_ray.model.casting import cast_together, used_alone
from xmc_ray.model.device import download, has_bfloat16, upload
from xmc_ray.model.lightxml import LightXML, Scoring
from xmc_ray.model.precision import Precision, arithmetic
from xmc_ray.settings import NonNegativeInt, Settings


@dataclass(frozen=True, kw_only=True)
class PredictConfig(Settings):
    """How documents are predicted, independent of how the model was trained."""

    token_budget: NonNegativeInt = 0
    """Maximum number of tokens, padding included, in a batch of the encoder; 0 is 8,192 on a GPU and 2,048 on a CPU."""
    precision: Precision = "auto"
    """Arithmetic; auto is bfloat16 on a GPU, and for a transformer on a CPU that has it. It changes scores a little."""

    def tokens_at_once(self, device: torch.device) -> int:
        """The token budget on ``device``. A large one is slower on CPUs, because of caches and padding."""
        return self.token_budget or (2048 if device.type == "cpu" else 8192)


def predict(
    model: LightXML,
    tokens: pa.ListArray,
    k: int,
    config: PredictConfig,
    scoring: Scoring = "grouped",
    filters: DocumentFilters | None = None,
) -> tuple[npt.NDArray[np.float32], IntArray]:
    """Scores float32[D, k] and label ids int64[D, k] of documents ``tokens`` (list<int32>[D]), in their order.

    Documents are batched by length under the config's token budget; `lightxml.Ranked` says how short rows are padded. With
    ``filters`` each gets the best of the labels that its own allows. Several workers call it together, with the same documents:
    each encodes its share, and each gets all results.
    """
    exchange = model.exchange
    masks = None if filters is None else model.filter_masks(filters.filters)
    scores, labels = np.zeros((len(tokens), k), np.float32), np.full((len(tokens), k), -1, np.int64)
    with _predicting(model, config) as device:
        for rows in budget_batches(_read_lengths(model, tokens), config.tokens_at_once(device)):
            if filters is not None:
                rows = rows[filters.number_D[rows].argsort(kind="stable")]
            shares = [rows[rank :: exchange.world] for rank in range(exchange.world)]
            rows = np.concatenate(shares)
            of_batch = None if masks is None or filters is None else masks.of_batch(filters.number_D[rows])
            batch = make_batch(tokens.take(pa.array(shares[exchange.rank])))
            ranked = model.predict(batch, k, scoring, of_batch)
            scores[rows], labels[rows] = (part.numpy() for part in download(*ranked))
    return scores, labels


def mean_loss(model: LightXML, tokens: pa.ListArray, truth: pa.ListArray, config: PredictConfig) -> float:
    """The loss that training minimises, without dropout, of documents ``tokens`` with labels ``truth`` (list<int32>[D] each).

    It is a mean over documents. Several workers call it together, with the same documents.
    """
    exchange, total = model.exchange, 0.0
    with _predicting(model, config) as device:
        for rows in budget_batches(_read_lengths(model, tokens), config.tokens_at_once(device)):
            batch = make_batch(tokens.take(pa.array(rows)), truth.take(pa.array(rows)))
            losses = torch.stack(model(batch, len(rows) * exchange.world)).double().sum()  # all workers have the same rows
            total += exchange.sum(losses).item() * len(rows)
    return total / max(1, len(tokens))


def features(model: LightXML, tokens: pa.ListArray, config: PredictConfig) -> torch.Tensor:
    """float32[D, F], on the CPU: features of documents ``tokens`` (list<int32>[D]), in their order; for a single process."""
    features_DF = torch.zeros(len(tokens), model.width)
    with _predicting(model, config) as device:
        for rows in budget_batches(_read_lengths(model, tokens), config.tokens_at_once(device)):
            features_DF[rows] = model.features(make_batch(tokens.take(pa.array(rows)))).float().cpu()
    return features_DF


def margins(model: LightXML, tokens: pa.ListArray, label_DC: IntArray) -> torch.Tensor:
    """float32[D, C], on the CPU: the linear ranker's z of labels (int64[D, C]) of documents ``tokens``; see `model.linear`."""
    z_DC = torch.zeros(label_DC.shape)
    assert model.linear is not None and model.lexical is not None
    with _predicting(model, PredictConfig()) as device:
        for rows in budget_batches(list_lengths(tokens), PredictConfig().tokens_at_once(device)):
            batch = make_batch(tokens.take(pa.array(rows)))
            terms, columns = model.lexical.terms(batch.tokens_BT, batch.mask_BT), len(model.lexical.weight_F)
            z_DC[rows] = model.linear.margins(terms, columns, upload(torch.from_numpy(label_DC[rows]), device)).cpu()
    return z_DC


def _read_lengths(model: LightXML, tokens: pa.ListArray) -> IntArray:
    """int64[D]: the tokens that the costly part of the model reads, which is the encoder if there is one."""
    lengths = list_lengths(tokens)
    most = getattr(model.encoder, "max_tokens", None)
    return lengths if most is None else np.minimum(lengths, most)


def computed_by(model: LightXML, precision: Precision) -> str:
    """The name of the arithmetic of a ``model`` where it is now, see `arithmetic`; a GPU without bfloat16 has float32."""
    device = next(model.parameters()).device
    return arithmetic(precision if _can(device) else "float32", device.type, model.encoder is not None)


def _can(device: torch.device) -> bool:
    """Whether all formats are there; a CPU without instructions for one computes in it all the same."""
    return device.type == "cpu" or has_bfloat16(device)


@contextmanager
def computing(model: LightXML, precision: Precision) -> Iterator[torch.device]:
    """Computes ``model`` forward in its arithmetic (see `arithmetic`); yields its device.

    A GPU without bfloat16 computes in float32, with a warning: whoever chose the arithmetic may not have seen that GPU. On a
    GPU one thread at a time computes with a model, whose weights are cast meanwhile.
    """
    device = next(model.parameters()).device
    in_bfloat16 = computed_by(model, precision).endswith("bfloat16")
    if not _can(device) and arithmetic(precision, device.type, model.encoder is not None).endswith("bfloat16"):
        warn_caller("this GPU has no bfloat16: it computes in float32")
    mode: AbstractContextManager[object] = nullcontext()
    if in_bfloat16:
        mode = _AttentionInFloat32() if device.type == "cpu" else cast_together(model, torch.bfloat16)
    alone = nullcontext() if device.type == "cpu" else used_alone(model)
    with alone, torch.autocast(device.type, torch.bfloat16, enabled=in_bfloat16), mode:
        yield device


class _AttentionInFloat32(TorchFunctionMode):
    """Attention in float32 within autocast on a CPU.

    torch's kernel for bfloat16 is no faster forward, and backward it takes two to six times as long for up to 128 tokens.
    """

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if function is not F.scaled_dot_product_attention:
            return function(*args, **kwargs)
        with torch.autocast("cpu", enabled=False):
            wide = {name: _wide(value) for name, value in kwargs.items()}
            return function(*map(_wide, args), **wide).to(args[0].dtype)


def _wide(value: Any) -> Any:
    return value.float() if isinstance(value, torch.Tensor) and value.is_floating_point() else value


@contextmanager
def _predicting(model: LightXML, config: PredictConfig) -> Iterator[torch.device]:
    """``model`` in eval mode, without gradients, in the config's precision; yields its device."""
    training = model.training
    model.eval()
    with torch.inference_mode(), computing(model, config.precision) as device:
        yield device
    model.train(training)
