"""The text encoder: any pretrained transformer, its last hidden states as features.

Features = a summary of each of the last n hidden states, concatenated (LightXML, section 3.1: n = 5 and the first token).
Hidden state 0 is the output of the embedding layer, so an encoder cut to one layer still has two hidden states.

Letters: B documents, T tokens, F features = n x hidden width.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel
from transformers.utils import logging as transformers_logging

from xmc_ray.errors import ConfigError, ModelError
from xmc_ray.model.text import not_found
from xmc_ray.settings import NonNegativeInt, PositiveInt, Settings, Share
from xmc_ray.storage import folders


@dataclass(frozen=True, kw_only=True)
class EncoderConfig(Settings):
    """The transformer, and how its hidden states become features."""

    name: str = "bert-base-uncased"
    """Hub name or folder, local or s3://, of an encoder that AutoModel can load from safetensors."""
    layers: NonNegativeInt | None = None
    """Keep only the first n layers of the pretrained encoder; None keeps all, 0 uses the lexical branch alone."""
    max_tokens: PositiveInt | None = None
    """Read only the first n tokens of a document; None reads all that the tokenizer keeps."""
    feature_layers: PositiveInt = 5
    """Number of last hidden states that form the features; the embeddings count as one, before the layers that are kept."""
    pooling: Literal["auto", "first", "last", "mean"] = "auto"
    """Summary of a hidden state: its first or last token, or the mean of all; auto follows the tokenizer."""
    freeze: NonNegativeInt = 0
    """Freeze the embeddings and the lowest n layers; 0 trains everything."""
    dropout: Share | None = None
    """Dropout inside the encoder; None keeps the pretrained setting."""
    random: bool = False
    """Start from random weights instead of the pretrained ones."""


class TextEncoder(nn.Module):
    """A transformer whose last hidden states become features. ``pooling`` is first, last or mean."""

    def __init__(self, transformer: Any, feature_layers: int, pooling: str, max_tokens: int | None = None) -> None:
        super().__init__()
        self.transformer = transformer
        self.feature_layers = feature_layers
        self.pooling = pooling
        self.max_tokens = max_tokens

    @property
    def width(self) -> int:
        """F, the number of features of a document."""
        return int(self.transformer.config.hidden_size) * self.feature_layers

    def forward(self, tokens_BT: Tensor, mask_BT: Tensor) -> Tensor:
        """float[B, F]: the features of padded documents."""
        tokens_BT, mask_BT = tokens_BT[:, : self.max_tokens], mask_BT[:, : self.max_tokens]
        output = self.transformer(input_ids=tokens_BT, attention_mask=mask_BT.long(), output_hidden_states=True)
        states = output.hidden_states[-self.feature_layers :]
        return torch.cat([self._summary(state_BTH, mask_BT) for state_BTH in states], dim=-1)

    def _summary(self, state_BTH: Tensor, mask_BT: Tensor) -> Tensor:
        if self.pooling == "first":
            return state_BTH[:, 0]
        length_B = mask_BT.sum(1)
        if self.pooling == "last":
            return state_BTH[torch.arange(len(state_BTH), device=state_BTH.device), length_B - 1]
        weight_BT = mask_BT.to(state_BTH.dtype) / length_B.clamp(min=1)[:, None]
        return torch.einsum("bth,bt->bh", state_BTH, weight_BT)

    def freeze_lowest(self, layers: int) -> None:
        """Freeze the embeddings and the lowest ``layers`` layers; 0 freezes nothing."""
        if layers == 0:
            return
        highest = set(_layer_stack(self.transformer)[layers:].parameters())
        for parameter in self.transformer.parameters():
            if parameter not in highest:
                parameter.requires_grad_(False)

    @torch.enable_grad()
    def freeze_unused(self) -> None:
        """Freeze parameters that do not contribute to the features, such as BERT's pooler.

        They are found by a backward pass over two tokens. Data-parallel training would wait forever for their gradients.
        """
        tokens_BT = torch.zeros(1, 2, dtype=torch.long)
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        if not trained:
            return
        features_BF = self(tokens_BT, torch.ones_like(tokens_BT, dtype=torch.bool))
        gradients = torch.autograd.grad(features_BF.sum(), trained, allow_unused=True)
        for parameter, gradient in zip(trained, gradients, strict=True):
            parameter.requires_grad_(gradient is not None)


def check_encoder(config: EncoderConfig, max_tokens: int | None = None) -> Any:
    """The transformer's own config, cut to ``config.layers``, without loading weights; None if that is 0.

    Raises ModelError when the encoder does not exist, ConfigError when ``config`` or ``max_tokens`` do not fit it.
    """
    if config.layers == 0:
        return None
    settings = _load_settings(config.name)
    if config.layers is not None:
        _check_range("encoder.layers", config.layers, 0, settings.num_hidden_layers)
        settings.num_hidden_layers = config.layers
        if getattr(settings, "layer_types", None):
            settings.layer_types = settings.layer_types[: config.layers]
    depth = settings.num_hidden_layers
    _check_range("encoder.feature_layers (layers and embeddings)", config.feature_layers, 1, depth + 1)
    _check_range("encoder.freeze", config.freeze, 0, depth)
    limit, read = getattr(settings, "max_position_embeddings", None), config.max_tokens or max_tokens
    if read is not None and limit is not None:
        setting, least = ("encoder.max_tokens", 1) if config.max_tokens else ("text.max_tokens", 3)
        _check_range(setting, min(read, max_tokens or read), least, limit)
    return settings


def build_encoder(config: EncoderConfig, summary_position: str | None) -> TextEncoder:
    """A pretrained encoder with at least one layer, cut and frozen as ``config`` says.

    ``summary_position`` is the tokenizer's (`Tokenizer.summary_position`); without one, ``auto`` is the mean.
    Raises ModelError when the encoder does not exist or lacks weights, ConfigError when the config does not fit it.
    """
    settings = check_encoder(config)
    assert settings is not None
    transformer = _from_settings(settings) if config.random else _load_pretrained(config.name, settings)
    if config.dropout is not None:
        for module in transformer.modules():
            if isinstance(module, nn.Dropout):
                module.p = config.dropout
    pooling = (summary_position or "mean") if config.pooling == "auto" else config.pooling
    transformer.get_input_embeddings().sparse = True  # a step touches few words: see optim.Optimizer
    encoder = TextEncoder(transformer, config.feature_layers, pooling, config.max_tokens)
    encoder.freeze_unused()
    encoder.freeze_lowest(config.freeze)
    return encoder


def load_empty_encoder(folder: Path, feature_layers: int, pooling: str, max_tokens: int | None = None) -> TextEncoder:
    """An encoder of the shape in ``folder``'s ``config.json``; the caller loads its weights."""
    return TextEncoder(_from_settings(_load_settings(str(folder))), feature_layers, pooling, max_tokens)


def _load_settings(name: str) -> Any:
    try:
        return AutoConfig.from_pretrained(folders.loadable(name), trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise not_found("encoder", name, error) from error


def _check_range(setting: str, value: int, least: int, most: int) -> None:
    if not least <= value <= most:
        raise ConfigError(f"{setting} is out of range", found=value, expected=f"{least} to {most}")


def _load_pretrained(name: str, settings: Any) -> Any:
    verbosity, has_bar = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()  # layers are cut on purpose: no table of "unexpected" weights
    transformers_logging.disable_progress_bar()
    try:
        transformer, report = AutoModel.from_pretrained(
            folders.loadable(name), config=settings, use_safetensors=True, trust_remote_code=False, output_loading_info=True
        )
    except (OSError, ValueError) as error:
        raise not_found("encoder", name, error) from error
    finally:
        transformers_logging.set_verbosity(verbosity)
        if has_bar:
            transformers_logging.enable_progress_bar()
    missing = sorted(key for key in report["missing_keys"] if "pooler" not in key)
    if missing:
        raise ModelError("the encoder lacks weights", where=name, found=f"{len(missing)} missing, such as {missing[0]}")
    return transformer.float()


def _from_settings(settings: Any) -> Any:
    return AutoModel.from_config(settings, trust_remote_code=False).float()


def _layer_stack(transformer: nn.Module) -> nn.ModuleList:
    depth = transformer.config.num_hidden_layers  # type: ignore[union-attr]
    for module in transformer.modules():
        if isinstance(module, nn.ModuleList) and len(module) == depth:
            return module
    raise ModelError("cannot find the encoder's layers", found=type(transformer).__name__, way_out="set encoder.freeze = 0")
