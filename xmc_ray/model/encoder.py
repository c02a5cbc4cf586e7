"""The text encoder: any pretrained transformer, its last hidden states as features.

Features = a summary of each of the last n hidden states, concatenated (LightXML, section 3.1: n = 5 and the first token).
Hidden state 0 is the output of the embedding layer, so an encoder cut to one layer still has two hidden states.

transformers is imported where it is needed: it takes a second, also in processes whose model reads words alone.

Letters: B documents, T tokens, F features = n x hidden width.
"""

import hashlib
import json
import tempfile
from bisect import bisect_left
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from xmc_ray.data.fields import ids_of
from xmc_ray.errors import ConfigError, ModelError
from xmc_ray.model.batch import Batch, make_batch
from xmc_ray.model.precision import Precision
from xmc_ray.model.tokenizer import Tokenizer, in_one_line, load_error
from xmc_ray.settings import NonNegativeInt, PositiveInt, Settings, Share
from xmc_ray.storage import ModelName, folders

# By these, a hidden state would depend on earlier batches, or on which layers chance leaves out.
_WITHOUT_MEMORY = {"use_cache": False, "rescale_every": 1_000_000, "layerdrop": 0.0, "encoder_layerdrop": 0.0}
_NOT_OF_THE_MODEL = ("_name_or_path", "architectures", "dtype", "transformers_version")


@dataclass(frozen=True, kw_only=True)
class EncoderConfig(Settings):
    """The transformer, and how its hidden states become features."""

    name: ModelName = "bert-base-uncased"
    """Hub name or folder, local or s3://, of an encoder that AutoModel can load from safetensors."""
    layers: NonNegativeInt | None = None
    """Keep only the first n layers of the pretrained encoder; None keeps all, 0 uses the lexical branch alone."""
    max_tokens: PositiveInt | None = None
    """Read only the first n tokens of a document; None reads all that the tokenizer keeps."""
    feature_layers: PositiveInt = 5
    """Number of last hidden states that form the features; the embeddings count as one, before the layers that are kept."""
    pooling: Literal["auto", "first", "last", "mean"] = "auto"
    """Summary of a hidden state: its first or last token, or the mean; auto: the tokenizer's summary token, else the mean."""
    freeze: NonNegativeInt = 0
    """Freeze the embeddings and the lowest n layers; 0 trains everything."""
    dropout: Share | None = None
    """Dropout inside the encoder; None keeps the pretrained setting."""
    random: bool = False
    """Start from random weights instead of the pretrained ones."""


class TextEncoder(nn.Module):
    """A transformer whose last hidden states become features. ``pooling`` is first, last or mean.

    ``transformer`` is the given model, or its encoder if it has a decoder as well; ``settings`` are those of the whole.
    """

    def __init__(self, model: Any, feature_layers: int, pooling: str, max_tokens: int | None = None) -> None:
        super().__init__()
        self.settings = model.config
        self.transformer = model.get_encoder() if model.config.is_encoder_decoder else model
        self.feature_layers = feature_layers
        self.pooling = pooling
        self.max_tokens = max_tokens

    @property
    def width(self) -> int:
        """F, the number of features of a document."""
        return int(self.settings.hidden_size) * self.feature_layers

    def forward(self, tokens_BT: Tensor, mask_BT: Tensor) -> Tensor:
        """float[B, F]: the features of padded documents."""
        return self.summaries(self.states(tokens_BT, mask_BT), mask_BT)

    def states(self, tokens_BT: Tensor, mask_BT: Tensor) -> tuple[Tensor, ...]:
        """float[B, T, H] each: all hidden states of padded documents, of their first ``max_tokens`` tokens."""
        tokens_BT, mask_BT = tokens_BT[:, : self.max_tokens], mask_BT[:, : self.max_tokens]
        output = self.transformer(input_ids=ids_of(tokens_BT), attention_mask=mask_BT.long(), output_hidden_states=True)
        states: tuple[Tensor, ...] = output.hidden_states
        return states

    def summaries(self, states: tuple[Tensor, ...], mask_BT: Tensor) -> Tensor:
        """float[B, F]: the features, from all hidden states."""
        mask_BT = mask_BT[:, : self.max_tokens]
        return torch.cat([self._summary(state_BTH, mask_BT) for state_BTH in states[-self.feature_layers :]], dim=-1)

    def _summary(self, state_BTH: Tensor, mask_BT: Tensor) -> Tensor:
        if self.pooling == "first":
            return state_BTH[:, 0]
        length_B = mask_BT.sum(1)
        if self.pooling == "last":
            return state_BTH[torch.arange(len(state_BTH), device=state_BTH.device), length_B - 1]
        with torch.autocast(state_BTH.device.type, enabled=False):  # in bfloat16, features would differ by length
            return torch.einsum("bth,bt->bh", state_BTH.float(), mask_BT.float() / length_B.clamp(min=1)[:, None])

    def digest(self, weights: bool = True) -> str:
        """16 hex digits that change with its settings, with how features are made, and with its ``weights``."""
        settings = {key: value for key, value in self.settings.to_diff_dict().items() if key not in _NOT_OF_THE_MODEL}
        made = [settings, self.feature_layers, self.pooling, self.max_tokens]
        sha = hashlib.sha256(json.dumps(made, sort_keys=True, default=str).encode())
        for name, tensor in sorted(self.state_dict().items()) if weights else ():
            sha.update(name.encode())
            sha.update(tensor.cpu().contiguous().numpy())
        return sha.hexdigest()[:16]


def check_encoder(config: EncoderConfig, max_tokens: int | None = None) -> Any:
    """The transformer's own config, cut to ``config.layers``, without loading weights; None if that is 0.

    Raises ModelError when the encoder does not exist or is none of text, ConfigError when ``config`` or ``max_tokens`` do not
    fit it. `try_encoder` finds out more.
    """
    if config.layers == 0:
        return None
    settings = _load_settings(config.name)
    if config.layers is not None:
        _check_range("encoder.layers", config.layers, 0, settings.num_hidden_layers)
        _cut(settings, config.layers)
    depth = settings.num_hidden_layers
    _check_range("encoder.feature_layers (layers and embeddings)", config.feature_layers, 1, depth + 1)
    _check_range("encoder.freeze", config.freeze, 0, depth)
    limit, read = getattr(settings, "max_position_embeddings", None) or 0, config.max_tokens or max_tokens
    if read is not None and limit > 0:  # XLNet, which has none, says -1
        setting, least = _length_setting(config)
        _check_range(setting, min(read, max_tokens or read), least, limit)
    return settings


def try_encoder(config: EncoderConfig, tokenizer: Tokenizer, precision: Precision = "float32") -> str | None:
    """Build the encoder, run it on a few texts, the longest of ``tokenizer.max_tokens`` tokens, and return its digest.

    The digest, 16 hex digits, is that of the same encoder in every process; None without a transformer. Raises ModelError if
    there is no such encoder, its tokenizer is that of another, its weights are not finite, or its features depend on padding or
    do not depend on the text; ConfigError if a setting, or the ``precision`` in which it is to compute, does not fit it.
    """
    if config.layers == 0:
        tokenizer.samples()
        return None
    encoder = build_encoder(config, tokenizer)
    _try_longest(encoder, config, tokenizer)
    _try_copy(encoder, config.name)
    if precision == "bfloat16":
        _try_in_bfloat16(encoder, config.name, make_batch(tokenizer.samples(config.max_tokens)[:-1]))
    return encoder.digest(weights=not config.random)


def build_encoder(config: EncoderConfig, tokenizer: Tokenizer) -> TextEncoder:
    """A pretrained encoder with at least one layer, cut and frozen as ``config`` says.

    The pooling ``auto`` is the tokenizer's summary position if all documents have it and its state depends on the text, else
    the mean. Raises ModelError when the encoder does not exist, lacks weights or cannot be run, ConfigError when the config
    does not fit it.
    """
    settings = check_encoder(config)
    assert settings is not None
    model, lacks = (_from_settings(settings), {}) if config.random else _load_pretrained(config.name, settings)
    if config.dropout is not None:
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = config.dropout
    encoder = TextEncoder(model.eval(), config.feature_layers, config.pooling, config.max_tokens)
    broken = [name for name, weight in encoder.named_parameters() if not weight.isfinite().all()]
    if broken:
        raise ModelError("the encoder's weights are not finite", where=config.name, found=broken[0], way_out="set encoder.name")
    texts = make_batch(tokenizer.samples(config.max_tokens)[:-1])
    _try_short(encoder, config, tokenizer, texts)
    encoder.transformer.get_input_embeddings().sparse = True  # a step touches few words: see optim.Optimizer
    used = _freeze_unused(encoder, texts)
    lost = [name for name, weight in model.named_parameters(remove_duplicate=False) if weight in used and name in lacks]
    if lost:
        found = f"{len(lost)} missing, such as {lost[0]}{lacks[lost[0]]}"
        raise ModelError("the encoder lacks weights", where=config.name, found=found, way_out="set encoder.name")
    _freeze_lowest(encoder, config, texts)
    return encoder


def load_empty_encoder(folder: Path, feature_layers: int, pooling: str, max_tokens: int | None = None) -> TextEncoder:
    """An encoder of the shape in ``folder``'s ``config.json``; the caller loads its weights."""
    return TextEncoder(_from_settings(_load_settings(str(folder))), feature_layers, pooling, max_tokens)


def _load_settings(name: str) -> Any:
    import transformers

    try:
        settings = transformers.AutoConfig.from_pretrained(folders.loadable(name), trust_remote_code=False)
    except Exception as error:  # what a broken file raises depends on the file
        raise load_error("encoder", name, error) from error
    if not all(isinstance(getattr(settings, key, None), int) for key in ("num_hidden_layers", "hidden_size")):
        raise ModelError("not an encoder of text", where=name, found=settings.model_type, way_out="set encoder.name")
    for key, value in _WITHOUT_MEMORY.items():
        if hasattr(settings, key):
            setattr(settings, key, value)
    if getattr(settings, "attention_type", None) == "block_sparse":  # given up for good at the first short batch
        settings.attention_type = "original_full"
    return settings


def _check_range(setting: str, value: int, least: int, most: int) -> None:
    if not least <= value <= most:
        raise ConfigError(f"{setting} is out of range", found=value, expected=f"{least} to {most}")


def _length_setting(config: EncoderConfig) -> tuple[str, int]:
    """The setting that says how many tokens are read, and its lowest value."""
    return ("encoder.max_tokens", 1) if config.max_tokens else ("text.max_tokens", 3)


def _cut(settings: Any, layers: int) -> None:
    """Keep the first ``layers`` layers in ``settings``, and of its lists with an entry for each layer as many."""
    depth, kind = settings.num_hidden_layers, settings.model_type
    if layers == depth:
        return
    try:
        settings.num_hidden_layers = layers
        for key, value in settings.to_dict().items():
            if isinstance(value, list) and len(value) == depth and key != "architectures":
                setattr(settings, key, value[:layers])
        can_be_cut = type(settings).from_dict(settings.to_dict()).num_hidden_layers == layers  # a bundle is opened by these
    except Exception:  # some configs compute their number of layers
        can_be_cut = False
    if not can_be_cut or getattr(settings, "num_hidden_groups", 1) > 1:  # ALBERT deals out its groups by the number of layers
        raise ConfigError(
            "encoder.layers cannot cut this encoder", found=kind, expected=depth, way_out="leave encoder.layers out"
        )


def _load_pretrained(name: str, settings: Any) -> tuple[Any, dict[str, str]]:
    """The pretrained model, and parameters for which there are no weights, or some of another shape: which, by name."""
    import transformers

    logging = transformers.utils.logging
    verbosity, has_bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()  # layers are cut on purpose: no table of "unexpected" weights
    logging.disable_progress_bar()
    try:
        model, report = transformers.AutoModel.from_pretrained(
            folders.loadable(name),
            config=settings,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # an error only where they are used, and one that says which
        )
    except Exception as error:  # what a broken file raises depends on the file
        raise load_error("encoder", name, error) from error
    finally:
        logging.set_verbosity(verbosity)
        if has_bar:
            logging.enable_progress_bar()
    lacks = dict.fromkeys(report["missing_keys"], "")
    lacks |= {key: f" (of shape {list(shape)})" for key, shape, _ in report["mismatched_keys"]}
    return model.float(), lacks


def _from_settings(settings: Any) -> Any:
    import transformers

    return transformers.AutoModel.from_config(settings, trust_remote_code=False).float()


@torch.no_grad()
def _try_in_bfloat16(encoder: TextEncoder, name: str, texts: Batch) -> None:
    """As autocast has it compute, on whatever device: some encoders fill masks with numbers that bfloat16 lacks."""
    found = "its features are not finite"
    try:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            if encoder(texts.tokens_BT, texts.mask_BT).isfinite().all():
                return
    except Exception as error:  # each fails in its own way
        found = in_one_line(error)
    way_out = "set loop.precision to float32"
    raise ConfigError("the encoder cannot compute in bfloat16", where=name, found=found, way_out=way_out)


def _try_short(encoder: TextEncoder, config: EncoderConfig, tokenizer: Tokenizer, texts: Batch) -> None:
    """Run the encoder on short ``texts``, and choose a pooling by which the features depend on the text."""
    settings, depth = encoder.settings, encoder.settings.num_hidden_layers
    highest = max(tokenizer.pretrained.get_vocab().values())
    try:
        words = encoder.transformer.get_input_embeddings().num_embeddings
        states = encoder.states(texts.tokens_BT, texts.mask_BT) if highest < words else ()
    except Exception as error:  # models of images or sound, and those that need more than tokens: each fails in its own way
        found = f"{settings.model_type}, {in_one_line(error)}"
        raise ModelError(
            "the encoder cannot be run on text", where=config.name, found=found, way_out="set encoder.name"
        ) from error
    if highest >= words:
        found, expected = f"token {highest}, {words} embeddings", "config.json, tokenizer.json and weights of one model"
        raise ModelError("the tokenizer is not the encoder's", where=config.name, found=found, expected=expected)
    if len(states) != depth + 1 and (config.layers is not None or config.freeze):
        found, way_out = f"{settings.model_type}, {depth} layers, {len(states)} hidden states", "leave both out"
        raise ConfigError("encoder.layers and encoder.freeze do not fit this encoder", found=found, way_out=way_out)
    shapes = [tuple(state.shape) for state in states[-config.feature_layers :]]
    shape = (*texts.mask_BT[:, : config.max_tokens].shape, settings.hidden_size)
    if shapes != [shape] * config.feature_layers:
        found = f"hidden states {shapes} (documents, tokens, width)"
        raise ConfigError("encoder.feature_layers does not fit this encoder", found=found, expected=f"all {shape}")
    summary = tokenizer.summary_position or "mean"
    if summary == "last" and config.max_tokens is not None and config.max_tokens < tokenizer.max_tokens:
        summary = "mean"  # longer documents lose their last token
    for pooling in (summary, "mean") if config.pooling == "auto" else (config.pooling,):
        encoder.pooling = pooling
        if _tells_apart(encoder.summaries(states, texts.mask_BT)):
            return
    what, where = "the features do not depend on the text", f"{config.name}, encoder.pooling = {config.pooling}"
    raise ModelError(what, where=where, found=settings.model_type, way_out="set encoder.pooling = auto, or encoder.name")


def _tells_apart(features_BF: Tensor) -> bool:
    """Whether all documents differ in their features, by more than rounding."""
    apart_BB = (features_BF[:, None] - features_BF).abs().amax(-1).fill_diagonal_(torch.inf)
    return bool(apart_BB.min() > 1e-5 * features_BF.abs().max())


@torch.no_grad()
def _try_longest(encoder: TextEncoder, config: EncoderConfig, tokenizer: Tokenizer) -> None:
    """Run the encoder on the longest text, and on a short one beside it."""
    rows = tokenizer.samples(config.max_tokens)
    texts, longest = make_batch(rows.take([0, len(rows) - 1])), make_batch(rows[-1:]).tokens_BT[:, : config.max_tokens]

    def fails(length: int) -> bool:
        tokens_BT = longest[:, :length]
        try:
            encoder(tokens_BT, torch.ones_like(tokens_BT, dtype=torch.bool))
        except Exception:
            return True
        return False

    try:
        padded_BF = encoder(texts.tokens_BT, texts.mask_BT)
    except Exception as error:
        length, (setting, least) = longest.shape[1], _length_setting(config)
        _check_range(setting, length, least, bisect_left(range(1, length + 1), True, key=fails))
        raise ModelError("the encoder cannot be run on a batch", where=config.name, found=in_one_line(error)) from error
    alone = make_batch(rows[:1])
    change_BF = padded_BF[:1] - encoder(alone.tokens_BT, alone.mask_BT)
    if not change_BF.abs().max() <= 1e-3 * padded_BF.abs().max():
        what, way_out = "the encoder's features of a text depend on the padding of its batch", "set encoder.name"
        raise ModelError(what, where=config.name, found=encoder.settings.model_type, way_out=way_out)


def _try_copy(encoder: TextEncoder, name: str) -> None:
    """Make an encoder from the settings alone, as opening a bundle does: it must have the same weights by name and shape."""
    with tempfile.TemporaryDirectory() as folder, torch.device("meta"):
        encoder.settings.save_pretrained(folder)
        copy = load_empty_encoder(Path(folder), encoder.feature_layers, encoder.pooling, encoder.max_tokens)
    here, there = ({key: tuple(part.shape) for key, part in each.state_dict().items()} for each in (encoder, copy))
    if here != there:
        found = ", ".join(sorted(key for key in here | there if here.get(key) != there.get(key))[:3])
        raise ModelError("the encoder's config.json makes another encoder", where=name, found=found, way_out="set encoder.name")


@torch.enable_grad()
def _freeze_unused(encoder: TextEncoder, texts: Batch) -> set[nn.Parameter]:
    """Freeze parameters that do not contribute to the features, such as BERT's pooler, and return the others.

    They are found by a backward pass. Data-parallel training would wait forever for their gradients.
    """
    used = _behind(encoder(texts.tokens_BT, texts.mask_BT), encoder)
    for parameter in encoder.parameters():
        parameter.requires_grad_(parameter in used)
    return used


@torch.enable_grad()
def _freeze_lowest(encoder: TextEncoder, config: EncoderConfig, texts: Batch) -> None:
    """Freeze all that contributes to the hidden state after the lowest ``config.freeze`` layers; 0 freezes nothing."""
    if config.freeze == 0:
        return
    for parameter in _behind(encoder.states(texts.tokens_BT, texts.mask_BT)[config.freeze], encoder):
        parameter.requires_grad_(False)
    depth = encoder.settings.num_hidden_layers
    if config.freeze < depth and not any(parameter.requires_grad for parameter in encoder.parameters()):
        found, way_out = f"{encoder.settings.model_type}, whose layers share their weights", f"give 0, or {depth} for all"
        raise ConfigError("encoder.freeze cannot freeze some layers of this encoder", found=found, way_out=way_out)


def _behind(output: Tensor, encoder: TextEncoder) -> set[nn.Parameter]:
    """The parameters that are not frozen and contribute to ``output``."""
    trained = [parameter for parameter in encoder.parameters() if parameter.requires_grad]
    if not output.requires_grad:  # nor would they in training: a reversible model, one that is detached
        raise ModelError("the encoder cannot be trained", found=encoder.settings.model_type, way_out="set encoder.name")
    gradients = torch.autograd.grad(output.sum(), trained, allow_unused=True) if trained else ()
    return {parameter for parameter, gradient in zip(trained, gradients, strict=True) if gradient is not None}
