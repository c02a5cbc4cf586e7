"""Encoders of several kinds: cut, pooled, frozen; and what is told when one does not fit."""

import tempfile
from pathlib import Path

import pyarrow as pa
import pytest
import torch
from seaweed import S3
from torch import Tensor
from transformers import AutoModel, RobertaConfig, RobertaModel, XLNetConfig, XLNetModel

from xmc_ray import storage
from xmc_ray.errors import ConfigError, ModelError, XmcError
from xmc_ray.model.encoder import (
    EncoderConfig,
    TextEncoder,
    build_encoder,
    check_encoder,
    load_empty_encoder,
)
from xmc_ray.model.text import Tokenizer
from xmc_ray.storage import folders

TOKENS = torch.tensor([[5, 6, 7, 8], [9, 10, 0, 0]])
MASK = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]], dtype=torch.bool)


@pytest.fixture(params=["bert", "roberta", "xlnet"])
def folder(request: pytest.FixtureRequest, tiny_encoder: Path, tmp_path: Path) -> Path:
    torch.manual_seed(0)
    shape = {"num_attention_heads": 2, "num_hidden_layers": 3}
    if request.param == "bert":
        return tiny_encoder
    if request.param == "roberta":
        config = RobertaConfig(vocab_size=50, hidden_size=32, intermediate_size=64, max_position_embeddings=40, **shape)
        RobertaModel(config).save_pretrained(tmp_path)
    else:
        XLNetModel(XLNetConfig(vocab_size=50, d_model=32, d_inner=64, n_head=2, n_layer=3)).save_pretrained(tmp_path)
    return tmp_path


def build(folder: Path, summary: str | None = "first", **settings: object) -> TextEncoder:
    return build_encoder(EncoderConfig(name=str(folder), **{"feature_layers": 2, **settings}), summary).eval()  # type: ignore[arg-type]


def test_an_encoder_on_object_storage(s3: S3, tiny_encoder: Path) -> None:
    """Downloaded once, and again when something else lies there."""
    folders.upload(tiny_encoder, s3.uri("encoders/tiny"))
    name = s3.uri("encoders/tiny")
    there, here = (build_encoder(EncoderConfig(name=each, feature_layers=2), "first") for each in (name, str(tiny_encoder)))
    for key, tensor in here.state_dict().items():
        assert torch.equal(there.state_dict()[key], tensor)
    tokenizers = [Tokenizer.load(each, 8).encode(pa.array(["a red apple"])) for each in (name, str(tiny_encoder))]
    assert tokenizers[0] == tokenizers[1]
    copy = folders.loadable(name)
    assert folders.loadable(name) == copy and Path(copy).is_relative_to(tempfile.gettempdir())
    storage.write_bytes(s3.uri("encoders/tiny/notes.txt"), b"changed")
    assert folders.loadable(name) != copy
    with pytest.raises(ModelError, match=r"tokenizer not found: \S+/nowhere; found nothing there"):
        Tokenizer.load(s3.uri("encoders/nowhere"), 8)
    with pytest.raises(ModelError, match=r"encoder not found: \S+/nowhere.*; found nothing there"):
        build_encoder(EncoderConfig(name=s3.uri("encoders/nowhere"), feature_layers=2), "first")
    assert folders.loadable("microsoft/MiniLM") == "microsoft/MiniLM"
    assert folders.loadable(f"file://{tiny_encoder}") == str(tiny_encoder)


def hidden_states(folder: Path) -> tuple[Tensor, ...]:
    model = AutoModel.from_pretrained(folder).eval()
    with torch.no_grad():
        states: tuple[Tensor, ...] = model(TOKENS, attention_mask=MASK.long(), output_hidden_states=True).hidden_states
    return states


def test_a_cut_encoder_computes_what_the_whole_one_computes_up_to_there(folder: Path) -> None:
    encoder = build(folder, layers=1)
    assert encoder.transformer.config.num_hidden_layers == 1
    assert encoder.width == 64
    with torch.no_grad():
        features = encoder(TOKENS, MASK)
    expected = torch.cat([state[:, 0] for state in hidden_states(folder)[:2]], -1)
    if "xlnet" not in encoder.transformer.config.model_type:  # whose hidden states have the tokens in another order
        torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-5)
    assert features.shape == (2, 64)


@pytest.mark.parametrize("pooling", ["first", "last", "mean"])
def test_pooling(tiny_encoder: Path, pooling: str) -> None:
    with torch.no_grad():
        features = build(tiny_encoder, pooling=pooling)(TOKENS, MASK)
    for row, length in enumerate((4, 2)):
        tokens = [state[row, :length] for state in hidden_states(tiny_encoder)[-2:]]
        summary = {"first": lambda x: x[0], "last": lambda x: x[-1], "mean": lambda x: x.mean(0)}[pooling]
        torch.testing.assert_close(features[row], torch.cat([summary(part) for part in tokens]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("summary", "pooling"), [("first", "first"), ("last", "last"), (None, "mean")])
def test_auto_asks_the_tokenizer(tiny_encoder: Path, summary: str | None, pooling: str) -> None:
    assert build(tiny_encoder, summary).pooling == pooling


@pytest.mark.parametrize("pooling", ["first", "last", "mean"])
def test_more_padding_changes_nothing(folder: Path, pooling: str) -> None:
    encoder = build(folder, pooling=pooling)
    wider = torch.nn.functional.pad(TOKENS, (0, 3)), torch.nn.functional.pad(MASK, (0, 3))
    with torch.no_grad():
        torch.testing.assert_close(encoder(TOKENS, MASK), encoder(*wider), rtol=1e-4, atol=1e-5)


def test_the_rest_of_a_document_is_not_read(tiny_encoder: Path) -> None:
    encoder = build(tiny_encoder, max_tokens=2, pooling="mean")
    with torch.no_grad():
        torch.testing.assert_close(encoder(TOKENS, MASK), build(tiny_encoder, pooling="mean")(TOKENS[:, :2], MASK[:, :2]))


def test_what_never_reaches_the_features_is_not_trained(folder: Path) -> None:
    encoder = build(folder)
    encoder.train()(TOKENS, MASK).sum().backward()
    for name, parameter in encoder.named_parameters():
        assert (parameter.grad is not None) is parameter.requires_grad, name
    still = {name for name, parameter in encoder.named_parameters() if not parameter.requires_grad}
    assert all("pooler" in name or "mask_emb" in name or "seg_embed" in name or "r_s_bias" in name for name in still), still


def test_word_vectors_have_gradients_of_the_words_seen_alone(folder: Path) -> None:
    encoder = build(folder)
    encoder(TOKENS, MASK).sum().backward()
    words = encoder.transformer.get_input_embeddings().weight
    assert [
        name for name, parameter in encoder.named_parameters() if parameter.grad is not None and parameter.grad.is_sparse
    ] == [name for name, parameter in encoder.named_parameters() if parameter is words]
    assert words.grad is not None
    assert set(words.grad.coalesce().indices()[0].tolist()) <= set(TOKENS.flatten().tolist())
    assert not build(folder, freeze=1).transformer.get_input_embeddings().weight.requires_grad


def test_freezing_the_lowest_layers(tiny_encoder: Path) -> None:
    trained = {name for name, parameter in build(tiny_encoder, freeze=1).named_parameters() if parameter.requires_grad}
    assert trained
    assert all("encoder.layer.1." in name for name in trained)


def test_dropout_and_random_weights(tiny_encoder: Path) -> None:
    rates = {module.p for module in build(tiny_encoder, dropout=0.3).modules() if isinstance(module, torch.nn.Dropout)}
    assert rates == {0.3}
    pretrained, again, fresh = (build(tiny_encoder, random=random) for random in (False, False, True))
    words = [encoder.transformer.get_input_embeddings().weight for encoder in (pretrained, again, fresh)]
    assert torch.equal(words[0], words[1])
    assert not torch.equal(words[0], words[2])


def test_an_empty_encoder_has_the_same_shape(tiny_encoder: Path, tmp_path: Path) -> None:
    encoder = build(tiny_encoder, layers=1, pooling="mean")
    encoder.transformer.config.save_pretrained(tmp_path)
    empty = load_empty_encoder(tmp_path, encoder.feature_layers, encoder.pooling).eval()
    empty.load_state_dict(encoder.state_dict())
    torch.testing.assert_close(empty(TOKENS, MASK), encoder(TOKENS, MASK))


@pytest.mark.parametrize(
    ("settings", "max_tokens", "kind", "told"),
    [
        ({"name": "/nowhere/at-all"}, 8, ModelError, "encoder not found: /nowhere/at-all"),
        ({"layers": -1}, 8, ConfigError, "invalid value of EncoderConfig.layers; found -1; expected at least 0"),
        (
            {"max_tokens": 0, "feature_layers": 1},
            8,
            ConfigError,
            "EncoderConfig.max_tokens; found 0; expected at least 1",
        ),
        ({"max_tokens": 200, "feature_layers": 1}, 300, ConfigError, "encoder.max_tokens is out of range; found 200"),
        ({"layers": 3}, 8, ConfigError, "encoder.layers is out of range; found 3; expected 0 to 2"),
        ({"layers": 1, "feature_layers": 3}, 8, ConfigError, "expected 1 to 2"),
        ({"feature_layers": 0}, 8, ConfigError, "EncoderConfig.feature_layers"),
        ({"feature_layers": 1, "freeze": 9}, 8, ConfigError, "encoder.freeze"),
        ({"feature_layers": 1}, 1000, ConfigError, "text.max_tokens"),
    ],
)
def test_what_does_not_fit_is_told_in_one_line(
    settings: dict[str, object], max_tokens: int, kind: type[XmcError], told: str, tiny_encoder: Path
) -> None:
    with pytest.raises(kind) as caught:
        check_encoder(EncoderConfig(**{"name": str(tiny_encoder), **settings}), max_tokens)  # type: ignore[arg-type]
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)


def test_weights_that_are_missing(tiny_encoder: Path, tmp_path: Path) -> None:
    import shutil

    from safetensors.torch import load_file, save_file

    shutil.copytree(tiny_encoder, tmp_path / "encoder")
    weights = load_file(tmp_path / "encoder" / "model.safetensors")
    lost = next(name for name in weights if "layer.1" in name)
    save_file({name: tensor for name, tensor in weights.items() if name != lost}, tmp_path / "encoder" / "model.safetensors")
    with pytest.raises(ModelError, match="lacks weights"):
        build(tmp_path / "encoder")
