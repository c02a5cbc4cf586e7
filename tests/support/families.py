"""Tiny transformers of many families with random weights, each with a tokenizer as that family has it."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModel

LAYERS, WIDTH, VOCABULARY = 3, 32, 154  # of the tokenizer of `conftest.tiny_encoder`
LIMIT = 64  # tokens of a text, where a family has a limit
SHAPE = {"hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": 2, "intermediate_size": 64}
GPT = {"n_embd": WIDTH, "n_layer": LAYERS, "n_head": 2}
XLM = {"emb_dim": WIDTH, "n_layers": LAYERS, "n_heads": 2}
T5 = {"d_model": WIDTH, "d_kv": 16, "d_ff": 64, "num_layers": LAYERS, "num_heads": 2}
HALVES = (("layers", LAYERS), ("attention_heads", 2), ("ffn_dim", 64))
BART = {f"{half}_{name}": size for half in ("encoder", "decoder") for name, size in HALVES} | {"d_model": WIDTH}
FEW = {"num_key_value_heads": 2, "head_dim": 16, "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}

AROUND = {  # how a tokenizer puts special tokens around a text, and the summary position that follows
    "first": ("[CLS] $A [SEP]", {"cls": "[CLS]", "sep": "[SEP]"}),
    "begin": ("[CLS] $A", {"bos": "[CLS]", "eos": "[SEP]"}),
    "end": ("$A [SEP]", {"eos": "[SEP]"}),
    "last": ("$A [SEP] [CLS]", {"cls": "[CLS]", "sep": "[SEP]"}),
    "bare": ("$A", {"eos": "[SEP]"}),
}

# Settings, how the tokenizer puts special tokens around a text, and the pooling that `auto` means.
FAMILIES: dict[str, tuple[dict[str, Any], str, str]] = {
    **{kind: (SHAPE | {"max_position_embeddings": LIMIT}, "first", "first") for kind in ("bert", "ernie", "megatron-bert")},
    # positions are counted from behind the padding token's
    **{
        kind: (SHAPE | {"max_position_embeddings": LIMIT + 2, "pad_token_id": 1}, "begin", "first")
        for kind in ("roberta", "xlm-roberta", "camembert", "mpnet")
    },
    **{kind: (SHAPE | {"embedding_size": 16}, "first", "first") for kind in ("electra", "albert")},
    "distilbert": ({"dim": WIDTH, "n_layers": LAYERS, "n_heads": 2, "hidden_dim": 64}, "first", "first"),
    "deberta": (SHAPE, "first", "first"),
    "deberta-v2": (
        SHAPE | {"relative_attention": True, "position_buckets": 16, "pos_att_type": ["p2c", "c2p"]},
        "first",
        "first",
    ),
    "mobilebert": (SHAPE | {"embedding_size": 32, "intra_bottleneck_size": 16, "true_hidden_size": 16}, "first", "first"),
    "longformer": (SHAPE | {"attention_window": [8] * LAYERS, "max_position_embeddings": 514}, "begin", "first"),
    "big_bird": (SHAPE | {"block_size": 8, "num_random_blocks": 1}, "first", "first"),
    "convbert": (SHAPE | {"embedding_size": WIDTH}, "first", "first"),
    "rembert": (SHAPE | {"input_embedding_size": 16}, "first", "first"),
    "roformer": (SHAPE, "first", "first"),
    "modernbert": (SHAPE | {"pad_token_id": 0}, "first", "first"),
    "nomic_bert": (SHAPE, "first", "first"),
    "esm": (SHAPE | {"position_embedding_type": "rotary", "pad_token_id": 1, "mask_token_id": 4}, "first", "first"),
    "luke": (SHAPE | {"entity_emb_size": 8}, "begin", "first"),
    "xlnet": ({"d_model": WIDTH, "n_layer": LAYERS, "n_head": 2, "d_inner": 64}, "last", "last"),
    **dict.fromkeys(("xlm", "flaubert"), (XLM, "begin", "first")),
    **dict.fromkeys(("t5", "mt5", "umt5"), (T5, "end", "mean")),
    "longt5": (T5 | {"local_radius": 4}, "end", "mean"),
    "bart": (BART | {"max_position_embeddings": LIMIT}, "begin", "first"),
    "mbart": (BART | {"max_position_embeddings": LIMIT}, "end", "mean"),
    "pegasus": (BART | {"max_position_embeddings": LIMIT}, "end", "mean"),
    "marian": (BART | {"max_position_embeddings": LIMIT, "pad_token_id": 0}, "end", "mean"),
    "led": (BART | {"attention_window": [8] * LAYERS, "max_encoder_position_embeddings": LIMIT}, "begin", "first"),
    "bigbird_pegasus": (BART | {"block_size": 8}, "end", "mean"),
    # whose first token sees itself alone
    "gpt2": (GPT | {"n_positions": LIMIT}, "bare", "mean"),
    "llama": (SHAPE | FEW, "begin", "mean"),
    "gemma": (SHAPE | FEW, "begin", "mean"),
    "mixtral": (SHAPE | FEW, "begin", "mean"),
    "gpt_neox": (SHAPE, "begin", "mean"),
    "opt": (
        {
            "hidden_size": WIDTH,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": 2,
            "ffn_dim": 64,
            "word_embed_proj_dim": WIDTH,
        },
        "begin",
        "mean",
    ),
    "bloom": ({"hidden_size": WIDTH, "n_layer": LAYERS, "n_head": 2}, "bare", "mean"),
    "mamba": ({"hidden_size": WIDTH, "num_hidden_layers": LAYERS, "state_size": 8}, "bare", "mean"),
}
PAPER = ("bert", "roberta", "xlnet")
UNCUT = ("prophetnet", "albert")


def save_family(folder: Path, kind: str, tokenizer: Path) -> Path:
    """A model of the family ``kind`` in ``folder``, with the vocabulary of ``tokenizer``'s folder."""
    settings, around, _ = FAMILIES[kind]
    return save_model(folder, kind, settings, tokenizer, around)


def save_model(folder: Path, kind: str, settings: dict[str, Any], tokenizer: Path, around: str = "first") -> Path:
    """A model with random weights, and a tokenizer."""
    torch.manual_seed(0)
    words = {} if kind in ("clip", "vit") else {"vocab_size": VOCABULARY}
    AutoModel.from_config(AutoConfig.for_model(kind, **words, **settings)).save_pretrained(folder)
    save_tokenizer(folder, tokenizer, around)
    return folder


def save_tokenizer(folder: Path, tokenizer: Path, around: str) -> None:
    """The tokenizer of another folder with other special tokens around a text, and no limit."""
    from tokenizers.processors import TemplateProcessing
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    template, named = AROUND[around]
    backend = AutoTokenizer.from_pretrained(tokenizer).backend_tokenizer
    ids = [(name, backend.token_to_id(name)) for name in ("[CLS]", "[SEP]")]
    backend.post_processor = TemplateProcessing(single=template, special_tokens=ids)
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]"} | {f"{name}_token": token for name, token in named.items()}
    PreTrainedTokenizerFast(tokenizer_object=backend, **names).save_pretrained(folder)


def changed(source: Path, folder: Path, change: Callable[[Path], object]) -> Path:
    """A copy of an encoder's folder, to which something has happened."""
    shutil.copytree(source, folder)
    change(folder)
    return folder


def edit_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors")
