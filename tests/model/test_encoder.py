"""Encoders of several kinds: cut, pooled, frozen; and what is told when one does not fit."""

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest
import torch
from families import FAMILIES, PAPER, SHAPE, changed, edit_json, edit_weights, save_family, save_model, save_tokenizer
from seaweed import S3
from torch import Tensor
from transformers import AutoModel

from xmc_ray import FitConfig, GroupsConfig, LoopConfig, XMCClassifier, storage
from xmc_ray.errors import ConfigError, ModelError, XmcError
from xmc_ray.model.encoder import (
    EncoderConfig,
    TextEncoder,
    build_encoder,
    check_encoder,
    load_empty_encoder,
    try_encoder,
)
from xmc_ray.model.lightxml import ModelConfig
from xmc_ray.model.tokenizer import TextConfig, Tokenizer
from xmc_ray.storage import folders
from xmc_ray.training.optim import OptimConfig

TOKENS = torch.tensor([[5, 6, 7, 8], [9, 10, 0, 0]])
MASK = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]], dtype=torch.bool)
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 437955512\n"


@pytest.fixture(params=PAPER)
def folder(request: pytest.FixtureRequest, tiny_encoder: Path, make_once: Callable[..., Path]) -> Path:
    """One of the encoders of the LightXML paper."""
    return family(request.param, tiny_encoder, make_once)


def family(kind: str, tiny_encoder: Path, make_once: Callable[..., Path]) -> Path:
    return make_once(f"family-{kind}", lambda folder: save_family(folder, kind, tiny_encoder))


def build(folder: Path, text: int = 24, **settings: object) -> TextEncoder:
    config = EncoderConfig(name=str(folder), **{"feature_layers": 2, **settings})  # type: ignore[arg-type]
    return build_encoder(config, Tokenizer.load(folder, text)).eval()


def tried(folder: Path, text: int = 24, **settings: object) -> str | None:
    """The digest of the encoder in ``folder``, as the driver of a training takes it."""
    config = EncoderConfig(name=str(folder), **{"feature_layers": 2, **settings})  # type: ignore[arg-type]
    check_encoder(config, text)
    return try_encoder(config, Tokenizer.load(folder, text))


def test_an_encoder_that_cannot_compute_in_bfloat16_is_told_apart(tiny_encoder: Path, make_once: Callable[..., Path]) -> None:
    """DeBERTa fills its masks with the lowest float32."""
    for kind in ("bert", "deberta"):
        folder = family(kind, tiny_encoder, make_once)
        config, tokenizer = EncoderConfig(name=str(folder), feature_layers=2), Tokenizer.load(folder, 24)
        assert try_encoder(config, tokenizer) == try_encoder(config, tokenizer, "float32")
        if kind == "bert":
            assert try_encoder(config, tokenizer, "bfloat16") == try_encoder(config, tokenizer)
            continue
        with pytest.raises(ConfigError, match=r"cannot compute in bfloat16: .*; set loop\.precision to float32") as error:
            try_encoder(config, tokenizer, "bfloat16")
        assert "\n" not in str(error.value)


def test_an_encoder_on_object_storage(s3: S3, tiny_encoder: Path) -> None:
    """Downloaded once, and again when something else lies there."""
    folders.upload(tiny_encoder, s3.uri("encoders/tiny"))
    name = s3.uri("encoders/tiny")
    there, here = (
        build_encoder(EncoderConfig(name=each, feature_layers=2), Tokenizer.load(each, 8)) for each in (name, str(tiny_encoder))
    )
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
        check_encoder(EncoderConfig(name=s3.uri("encoders/nowhere"), feature_layers=2))
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
    ends = torch.zeros(2, dtype=torch.long) if encoder.pooling == "first" else MASK.sum(1) - 1
    expected = torch.cat([state[torch.arange(2), ends] for state in hidden_states(folder)[:2]], -1)
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


@pytest.mark.parametrize(
    ("around", "pooling"), [("first", "first"), ("begin", "first"), ("last", "last"), ("end", "mean"), ("bare", "mean")]
)
def test_auto_asks_the_tokenizer(around: str, pooling: str, tiny_encoder: Path, tmp_path: Path) -> None:
    """The summary token of the tokenizer, wherever it stands; without one, the mean."""
    save_tokenizer(changed(tiny_encoder, tmp_path / "encoder", lambda _: None), tiny_encoder, around)
    assert build(tmp_path / "encoder").pooling == pooling


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


# -- whatever AutoModel loads ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", FAMILIES)
def test_an_encoder_of_any_family_is_tried_and_taken(kind: str, tiny_encoder: Path, make_once: Callable[..., Path]) -> None:
    """Encoders are checked by a try: XLNet without a limit of positions, the encoder of an encoder-decoder, causal models."""
    folder = family(kind, tiny_encoder, make_once)
    assert tried(folder, text=64) == tried(folder, text=64)
    encoder = build(folder, text=64)
    assert encoder.pooling == FAMILIES[kind][2]
    texts = Tokenizer.load(folder, 64).encode(pa.array(["a red apple and a pear", "a green apple"]))[0].to_pylist()
    one, other = (features(encoder, row) for row in texts)
    assert (one - other).abs().max() > 1e-5 * one.abs().max()
    encoder.settings.save_pretrained(folder / "copy")
    copy = load_empty_encoder(folder / "copy", encoder.feature_layers, encoder.pooling).eval()
    copy.load_state_dict(encoder.state_dict())
    assert torch.equal(features(copy, texts[0]), one)


@pytest.mark.parametrize("kind", sorted(FAMILIES))
def test_layers_of_any_family_are_cut_or_refused(kind: str, tiny_encoder: Path, make_once: Callable[..., Path]) -> None:
    """What is left computes what the whole encoder computes up to there."""
    folder = family(kind, tiny_encoder, make_once)
    whole, cut = build(folder), build(folder, layers=2)
    with torch.no_grad():
        states = [encoder.states(TOKENS, MASK) for encoder in (whole, cut)]
    assert [len(part) for part in states] == [4, 3]
    for there, here in zip(states[0][:2], states[1][:2], strict=True):  # the last one may have a last norm
        torch.testing.assert_close(here[MASK], there[MASK], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", sorted(FAMILIES))
def test_the_lowest_layers_of_any_family_are_frozen_or_it_is_refused(
    kind: str, tiny_encoder: Path, make_once: Callable[..., Path]
) -> None:
    folder = family(kind, tiny_encoder, make_once)
    if kind == "albert":
        with pytest.raises(ConfigError, match="albert, whose layers share their weights"):
            build(folder, freeze=1)
        return
    encoder = build(folder, freeze=1)
    with torch.no_grad():
        before = encoder.states(TOKENS, MASK)
        for parameter in encoder.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter))
        after = encoder.states(TOKENS, MASK)
    torch.testing.assert_close(after[1], before[1])
    assert (after[2] - before[2]).abs().max() > 1e-3


def features(encoder: TextEncoder, tokens: list[int]) -> Tensor:
    with torch.no_grad():
        return encoder(torch.tensor([tokens]), torch.ones(1, len(tokens), dtype=torch.bool))


@pytest.mark.parametrize(
    ("kind", "settings", "told"),
    [
        ("clip", {"text_config": SHAPE}, "not an encoder of text"),
        ("vit", SHAPE | {"image_size": 32, "patch_size": 8}, "cannot be run on text"),
        ("lxmert", SHAPE, "cannot be run on text"),
        ("fnet", SHAPE, "depend on the padding"),
        ("canine", SHAPE, "cannot be run on text"),
        (
            "reformer",
            {"attn_layers": ["local", "local"], "hidden_size": 32, "axial_pos_embds_dim": [16, 16], "axial_pos_shape": [8, 8]},
            "cannot be trained",
        ),
    ],
)
def test_a_model_that_is_no_encoder_of_text_is_refused(
    kind: str, settings: dict[str, object], told: str, tiny_encoder: Path, tmp_path: Path
) -> None:
    save_model(tmp_path, kind, settings, tiny_encoder)
    with pytest.raises(ModelError, match=told) as caught:
        tried(tmp_path)
    assert kind in str(caught.value) and "\n" not in str(caught.value)


def test_an_encoder_whose_layers_cannot_be_cut(tiny_encoder: Path, tmp_path: Path) -> None:
    dealt = SHAPE | {"embedding_size": 16, "num_hidden_layers": 4, "num_hidden_groups": 2}
    save_model(tmp_path, "albert", dealt, tiny_encoder)
    assert build(tmp_path).settings.num_hidden_layers == 4
    with pytest.raises(ConfigError, match=r"encoder\.layers cannot cut this encoder; found albert"):
        build(tmp_path, layers=2)


@pytest.mark.parametrize("kind", [*PAPER, "t5", "llama", "albert"])
def test_a_classifier_of_any_family_learns_and_survives_a_bundle(
    kind: str, tiny_encoder: Path, tmp_path: Path, make_once: Callable[..., Path]
) -> None:
    """Different documents get different answers: also by a decoder-only encoder, with pooling at its default."""
    labels = [[colour, fruit] for colour in ("red", "green") for fruit in ("apple", "pear", "plum")] * 6
    texts = [f"a {' '.join(row)}" for row in labels]
    config = FitConfig(
        encoder=EncoderConfig(name=str(family(kind, tiny_encoder, make_once)), feature_layers=2),
        text=TextConfig(max_tokens=24),
        groups=GroupsConfig(max_size=1),
        model=ModelConfig(dropout=0.0),
        optim=OptimConfig(encoder_lr=2e-3, rows_lr=0.05),
        loop=LoopConfig(epochs=3, batch_size=6),
    )
    classifier = XMCClassifier.fit(texts, labels, config=config)
    answers = classifier.predict(texts[:6], k=3)
    assert len({str(answer) for answer in answers}) == 6
    classifier.save(str(tmp_path / "bundle"))
    for answer, again in zip(answers, XMCClassifier.load(str(tmp_path / "bundle")).predict(texts[:6], k=3), strict=True):
        assert [label for label, _ in again] == [label for label, _ in answer]
        assert [score for _, score in again] == pytest.approx([score for _, score in answer], rel=1e-5)


# -- features depend on the text ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "opt"])
def test_a_position_that_sees_nothing_is_never_taken(kind: str, tiny_encoder: Path, make_once: Callable[..., Path]) -> None:
    """A decoder-only encoder, whose tokenizer begins every text with the same token: all features would be one and the same."""
    folder = family(kind, tiny_encoder, make_once)
    assert Tokenizer.load(folder, 24).summary_position == "first"
    assert build(folder).pooling == "mean"
    assert tried(folder, pooling="last")
    with pytest.raises(ModelError, match=r"features do not depend on the text: .*encoder\.pooling = first; found " + kind):
        build(folder, pooling="first")


def test_a_summary_token_that_is_cut_off_is_not_taken(tiny_encoder: Path, make_once: Callable[..., Path]) -> None:
    """XLNet has it at the end, which a longer document loses where the transformer reads only the first tokens."""
    folder = family("xlnet", tiny_encoder, make_once)
    assert [build(folder, text=24, max_tokens=read).pooling for read in (None, 24, 8)] == ["last", "last", "mean"]


def test_a_first_token_that_sees_itself_alone_is_refused(tiny_encoder: Path, make_once: Callable[..., Path]) -> None:
    """Without a token at the beginning, texts that begin alike would be the same."""
    with pytest.raises(ModelError, match="features do not depend on the text"):
        build(family("gpt2", tiny_encoder, make_once), pooling="first")


def test_a_tokenizer_that_gives_all_texts_the_same_tokens(tiny_encoder: Path, tmp_path: Path) -> None:
    """Also for a model without a transformer: with an empty vocabulary, and with one that no word is found in."""

    def empty(folder: Path) -> None:
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (folder / name).unlink()

    def upper(folder: Path) -> None:
        backend = Tokenizer.load(folder, 8).pretrained.backend_tokenizer
        words = {word if word[0] == "[" else f"{word.upper()}Q": place for word, place in backend.get_vocab().items()}
        model = {"type": "WordPiece", "vocab": words, "unk_token": "[UNK]", "max_input_chars_per_word": 100}
        edit_json(folder / "tokenizer.json", model=model | {"continuing_subword_prefix": "##"})

    for name, change in (("empty", empty), ("upper", upper)):
        folder = changed(tiny_encoder, tmp_path / name, change)
        for layers in (None, 0):
            with pytest.raises(ModelError, match="the tokenizer does not tell texts apart") as caught:
                tried(folder, layers=layers)
            assert "\n" not in str(caught.value)


def test_tokens_that_are_read_must_tell_texts_apart(tiny_encoder: Path) -> None:
    assert tried(tiny_encoder, max_tokens=2)
    with pytest.raises(ConfigError, match=r"encoder\.max_tokens is too low; found 1"):
        tried(tiny_encoder, max_tokens=1)


def test_features_of_an_encoder_without_content(tiny_encoder: Path, tmp_path: Path) -> None:
    zero = changed(tiny_encoder, tmp_path / "zero", lambda it: edit_weights(it, lambda w: [x.zero_() for x in w.values()]))
    with pytest.raises(ModelError, match="features do not depend on the text"):
        tried(zero)


# -- the longest text --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["roberta", "mpnet", "bert", "gpt2", "bart", "led"])
def test_the_longest_text_is_tried(kind: str, tiny_encoder: Path, make_once: Callable[..., Path]) -> None:
    """RoBERTa counts positions from behind the padding token's: of 66, 64 are for tokens."""
    folder = family(kind, tiny_encoder, make_once)
    assert tried(folder, text=64)
    with pytest.raises(ConfigError, match=r"text\.max_tokens is out of range; found 65; expected 3 to 64"):
        tried(folder, text=65)
    with pytest.raises(ConfigError, match=r"encoder\.max_tokens is out of range; found 65; expected 1 to 64"):
        tried(folder, text=80, max_tokens=65)
    assert tried(folder, text=80, max_tokens=64)


# -- what lies in the folder -------------------------------------------------------------------------------------------------

BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "a pointer of git-lfs": (
        lambda folder: (folder / "model.safetensors").write_bytes(LFS),
        r"cannot be loaded: \S+ found a pointer of git-lfs in place of model\.safetensors; .*git lfs pull",
    ),
    "a tokenizer that is one": (
        lambda folder: (folder / "tokenizer.json").write_bytes(LFS),
        r"tokenizer cannot be loaded: .*a pointer of git-lfs in place of tokenizer\.json",
    ),
    "a download that broke off": (
        lambda folder: (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:20_000]),
        "cannot be loaded: .*SafetensorError",
    ),
    "an empty file": (lambda folder: (folder / "model.safetensors").write_bytes(b""), "cannot be loaded: .*SafetensorError"),
    "a pickle": (
        lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin"),
        r"found pytorch_model\.bin, a pickle.*save_pretrained",
    ),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "cannot be loaded: .*found no weights"),
    "a shard that is missing": (
        lambda folder: (
            (folder / "model.safetensors").unlink(),
            (folder / "model.safetensors.index.json").write_text(
                '{"metadata": {}, "weight_map": {"embeddings.word_embeddings.weight": "model-00001-of-00002.safetensors"}}'
            ),
        ),
        r"cannot be loaded: .*model-00001-of-00002\.safetensors",
    ),
    "weights of a layer that are missing": (
        lambda folder: edit_weights(folder, lambda weights: weights.pop("encoder.layer.1.output.dense.weight")),
        r"lacks weights: .*1 missing, such as encoder\.layer\.1\.output\.dense\.weight",
    ),
    "fewer layers than said": (
        lambda folder: edit_json(folder / "config.json", num_hidden_layers=3),
        r"lacks weights: .*such as encoder\.layer\.2\.",
    ),
    "weights of another shape": (
        lambda folder: edit_json(folder / "config.json", intermediate_size=60),
        r"lacks weights: .*\(of shape \[64, 32\]\)",
    ),
    "weights that are not finite": (
        lambda folder: edit_weights(folder, lambda w: w["embeddings.word_embeddings.weight"][70].fill_(torch.nan)),
        r"weights are not finite: .*found transformer\.embeddings\.word_embeddings\.weight",
    ),
    "fewer embeddings than tokens": (
        lambda folder: edit_json(folder / "config.json", vocab_size=50),
        "the tokenizer is not the encoder's: .*token 153, 50 embeddings",
    ),
    "a config that is no JSON": (
        lambda folder: (folder / "config.json").write_text("{ nope"),
        "encoder cannot be loaded: .*JSON",
    ),
    "a config of nothing known": (
        lambda folder: edit_json(folder / "config.json", model_type="nonsense"),
        "encoder cannot be loaded: .*nonsense",
    ),
    "a config with a wrong type": (
        lambda folder: edit_json(folder / "config.json", num_hidden_layers="two"),
        "encoder cannot be loaded: .*num_hidden_layers.*expected int",
    ),
    "a config that contradicts itself": (
        lambda folder: edit_json(folder / "config.json", num_attention_heads=5),
        "encoder cannot be loaded: .*number of attention heads",
    ),
    "no config": (lambda folder: (folder / "config.json").unlink(), r"encoder cannot be loaded: .*config\.json"),
    "a tokenizer without content": (
        lambda folder: (folder / "tokenizer.json").write_text("{}"),
        "tokenizer cannot be loaded: .*KeyError",
    ),
    "a file": (lambda folder: (shutil.rmtree(folder), folder.write_text("weights")), "encoder cannot be loaded"),
    "nothing": (lambda folder: (shutil.rmtree(folder), folder.mkdir()), "encoder not found"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_folder_without_a_whole_encoder_is_refused_in_one_line(name: str, tiny_encoder: Path, tmp_path: Path) -> None:
    change, told = BROKEN[name]
    with pytest.raises(ModelError, match=told) as caught:
        tried(changed(tiny_encoder, tmp_path / "encoder", change))
    assert "\n" not in str(caught.value)


def test_a_pooler_may_be_missing(tiny_encoder: Path, tmp_path: Path) -> None:
    """What does not contribute to the features need not be there."""

    def without_pooler(weights: dict[str, Tensor]) -> None:
        for name in [name for name in weights if "pooler" in name]:
            del weights[name]

    folder = changed(tiny_encoder, tmp_path / "encoder", lambda it: edit_weights(it, without_pooler))
    assert tried(folder)


# -- one encoder, by its digest ----------------------------------------------------------------------------------------------


def test_the_digest_is_that_of_what_is_loaded(tiny_encoder: Path, tmp_path: Path) -> None:
    """It changes with weights, config, and how features are made; not with the place or the seed."""
    digest = tried(tiny_encoder)
    assert digest == tried(changed(tiny_encoder, tmp_path / "copy", lambda _: None))
    nudged = changed(tiny_encoder, tmp_path / "nudged", lambda it: edit_weights(it, nudge))
    exact = changed(tiny_encoder, tmp_path / "exact", lambda it: edit_json(it / "config.json", layer_norm_eps=1e-6))
    others = [tried(nudged), tried(exact), tried(tiny_encoder, layers=1), tried(tiny_encoder, pooling="mean")]
    assert len({digest, *others, tried(tiny_encoder, feature_layers=1), tried(tiny_encoder, max_tokens=9)}) == 7
    torch.manual_seed(1)
    random = tried(tiny_encoder, random=True)
    torch.manual_seed(2)
    assert random == tried(tiny_encoder, random=True) != digest
    assert tried(tiny_encoder, layers=0) is None


def nudge(weights: dict[str, Tensor]) -> None:
    weights["embeddings.word_embeddings.weight"][7, 0] += 1e-3
