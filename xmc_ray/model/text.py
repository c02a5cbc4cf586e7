"""Text to tokens, tokens to batches.

Tokens are passed on as Arrow lists of int32, so padding is neither stored nor sent. Documents of similar length share a batch,
which is padded to its longest document and not to the maximum.

Letters: B documents, T tokens.
"""

import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor
from transformers import AutoTokenizer

from xmc_ray import storage
from xmc_ray.data.labels import IntArray, list_lengths
from xmc_ray.errors import ConfigError, ModelError, XmcError
from xmc_ray.settings import PositiveInt, Settings
from xmc_ray.storage import folders

_LFS_POINTER = b"version https://git-lfs"
_TEXTS = ("red apples", "7 green pears: 42!", "учебник", "深度学习", "كتاب")  # to try a tokenizer and an encoder with
_UNSPACED = r"[\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}]"
_PART = 1 << 18  # bytes of text encoded at a time: the tokenizer keeps dozens for each of them, even of what it truncates


@dataclass(frozen=True, kw_only=True)
class TextConfig(Settings):
    """How text becomes tokens."""

    max_tokens: PositiveInt = 128
    """Maximum length of a document in tokens, special tokens included; longer ones are truncated and counted."""


class Tokenizer:
    """A pretrained (fast) tokenizer that turns batches of strings into lists of token ids."""

    def __init__(self, pretrained: Any, max_tokens: int) -> None:
        if not getattr(pretrained, "is_fast", False):
            raise ModelError("the encoder has no fast tokenizer", found=type(pretrained).__name__, expected="tokenizer.json")
        self.pretrained = pretrained
        self.max_tokens = max_tokens
        self._backend = pretrained.backend_tokenizer
        self._backend.no_padding()
        self._backend.no_truncation()
        least = max(3, len(self._backend.encode("").ids) + 1)  # how many a transformer can read, `encoder` finds out
        if max_tokens < least:
            raise ConfigError("text.max_tokens is out of range", found=max_tokens, expected=f"at least {least}")
        self._backend.enable_truncation(max_tokens)

    @classmethod
    def load(cls, name: str | Path, max_tokens: int) -> "Tokenizer":
        """From a hub name, or a folder, local or s3://; raises ModelError when it does not exist or cannot be loaded."""
        try:
            return cls(AutoTokenizer.from_pretrained(folders.loadable(str(name)), trust_remote_code=False), max_tokens)
        except Exception as error:  # what a broken file raises depends on the file
            raise load_error("tokenizer", str(name), error) from error

    def save(self, folder: Path) -> None:
        """Write ``tokenizer.json`` and its accompanying files."""
        self.pretrained.save_pretrained(str(folder))

    def encode(self, texts: pa.Array) -> tuple[pa.ListArray, pa.BooleanArray]:
        """Tokens (list<int32>[n]) of ``texts`` (string[n]), and which texts were truncated (bool[n])."""
        tokens, truncated = [], []
        for part in _parts(texts):
            encodings = self._backend.encode_batch_fast(part.to_pylist())
            tokens.append(pa.array([encoding.ids for encoding in encodings], pa.list_(pa.int32())))
            truncated.append(pa.array([bool(encoding.overflowing) for encoding in encodings], pa.bool_()))
        return pa.concat_arrays(tokens), pa.concat_arrays(truncated)

    def offsets(self, text: str) -> IntArray:
        """int64[T, 2]: start and end (exclusive), in characters, of each token that `encode` returns; 0, 0 for special ones."""
        return np.array(self._backend.encode(text).offsets, np.int64).reshape(-1, 2)

    def decode(self, tokens: Sequence[int]) -> str:
        """A text with these tokens: the encoded one, but for normalisation such as that of case and white space."""
        return str(self._backend.decode(list(tokens), skip_special_tokens=True))

    def foreign(self, tokens: pa.ListArray) -> float:
        """The share of some documents (list<int32>[n], as `encode` returns them) whose language the vocabulary hardly has.

        More than a tenth of their tokens are unknown, or their words break into more than two pieces on average; of scripts
        without spaces, each letter counts as a word. 0 without documents.
        """
        special = {*self.pretrained.all_special_ids} - {self.pretrained.unk_token_id}
        rows = [[token for token in row if token not in special] for row in tokens.to_pylist()]
        unknown_D = np.array([row.count(self.pretrained.unk_token_id) for row in rows])
        decoded = pa.array(self._backend.decode_batch(rows, skip_special_tokens=True), pa.string())
        letters = pc.replace_substring_regex(decoded, r"[^\pL\pM]+", " ")
        spaced = pc.replace_substring_regex(letters, _UNSPACED, "")
        words_D = pc.add(
            pc.count_substring_regex(letters, _UNSPACED), pc.count_substring_regex(spaced, r"[\pL\pM]+")
        ).to_numpy()
        encodings = self._backend.encode_batch_fast(letters.to_pylist(), add_special_tokens=False)
        pieces_D = np.array([len(encoding.ids) for encoding in encodings])
        length_D = np.array([len(row) for row in rows])
        return float(((unknown_D > 0.1 * length_D) | (pieces_D > 2 * words_D)).mean()) if len(rows) else 0.0

    def samples(self, read: int | None = None) -> pa.ListArray:
        """Tokens (list<int32>) to try an encoder with: those of two to four short texts, and last of one of ``max_tokens``.

        Any two of the short texts differ in the set of their first ``read`` tokens; the last one begins like the first. Raises
        ModelError if all texts have the same tokens, ConfigError if only their first ``read`` are the same.
        """
        ids = sorted(set(self.pretrained.get_vocab().values()))
        own = [self.decode([token]) for token in ids[:: len(ids) // 8 + 1]]
        texts = self._distinct([*_TEXTS, *own])
        if len(texts) < 2:
            raise ModelError(
                "the tokenizer does not tell texts apart",
                where=self.pretrained.name_or_path or None,
                found=f"the same tokens for all of {len(_TEXTS) + len(own)} texts, of a vocabulary of {len(ids):,}",
                expected="a tokenizer.json with the encoder's vocabulary",
                way_out="set encoder.name",
            )
        texts = self._distinct(texts, read)
        if len(texts) < 2:
            raise ConfigError("encoder.max_tokens is too low", found=read, expected="enough to read more than special tokens")
        texts = self._distinct([*texts[:3], f"{texts[0]} {texts[1]}"], read)
        return self.encode(pa.array([*texts, f"{texts[0]} " * self.max_tokens]))[0]

    def _distinct(self, texts: list[str], read: int | None = None) -> list[str]:
        """One of ``texts`` for each set of first ``read`` tokens, in order, without those that have special tokens alone."""
        special, distinct = set(self._backend.encode("").ids), dict[frozenset[int], str]()
        for text, tokens in zip(texts, self.encode(pa.array(texts))[0].to_pylist(), strict=True):
            if not special.issuperset(tokens):
                distinct.setdefault(frozenset(tokens[:read]), text)
        return list(distinct.values())

    @cached_property
    def fingerprint(self) -> str:
        """16 hex digits that change with the output of `encode`: with vocabulary, rules and length."""
        return hashlib.sha256(self._backend.to_str().encode()).hexdigest()[:16]

    @property
    def summary_position(self) -> str | None:
        """The position of the tokenizer's summary token: ``first`` (BERT), ``last`` (XLNet), or None if it has none."""
        ids = self._backend.encode("").ids
        summary = self.pretrained.cls_token_id
        if summary is None or summary not in ids:
            # RoBERTa uses its first token so, but does not call it the summary token
            return "first" if ids and ids[0] == self.pretrained.bos_token_id else None
        return "first" if ids[0] == summary else "last"


def _parts(texts: pa.Array) -> Iterator[pa.Array]:
    """``texts`` (string[n]) in order, in one or more slices of about `_PART` bytes, or of one text that has more."""
    part_N = np.cumsum(pc.binary_length(texts)) // _PART
    bounds = [0, *(np.flatnonzero(np.diff(part_N)) + 1).tolist(), len(texts)]
    yield from (texts.slice(first, last - first) for first, last in pairwise(bounds))


def load_error(what: str, name: str, error: Exception) -> XmcError:
    """The error for an encoder or tokenizer ``name`` that transformers cannot load; an `XmcError` stays as it is."""
    if isinstance(error, XmcError):
        return error
    found, way_out = in_one_line(error), "set encoder.name"
    expected = "a hub name, or a folder, local or s3://, with config.json, tokenizer.json and model.safetensors"
    if not storage.is_empty(name):
        files = [path for path in sorted(Path(folders.loadable(name)).glob("*")) if path.is_file()]
        pointers = [path.name for path in files if path.stat().st_size < 1000 and path.read_bytes().startswith(_LFS_POINTER)]
        if pointers:
            found, way_out = f"a pointer of git-lfs in place of {pointers[0]}", "fetch the files by git lfs pull"
        elif what == "encoder" and not any(".safetensors" in path.name for path in files):
            pickles = [path.name for path in files if path.name.startswith("pytorch_model")]
            found = f"{pickles[0]}, a pickle, which may run code" if pickles else "no weights"
            way_out = "load it by transformers where you trust it, and write it by save_pretrained" if pickles else way_out
    elif isinstance(error, (OSError, ValueError)):
        asks_the_hub = "://" not in name and not os.path.exists(name)
        offline = " (offline: HF_HUB_OFFLINE is set)" if asks_the_hub and os.environ.get("HF_HUB_OFFLINE") == "1" else ""
        return ModelError(f"{what} not found", where=name + offline, found=found, expected=expected, way_out=way_out)
    return ModelError(f"the {what} cannot be loaded", where=name, found=found, expected=expected, way_out=way_out)


def in_one_line(error: Exception) -> str:
    """The beginning of another library's error, with its kind where that says something."""
    text = " ".join(str(error).split())[:300]
    return text if isinstance(error, (OSError, ValueError)) else f"{type(error).__name__}: {text}"


@dataclass(frozen=True)
class Batch:
    """Padded documents and their labels, ready for the model.

    ``tokens_BT``: int64, 0 where padded; ``mask_BT``: bool, True at real tokens; ``row_P``, ``label_P``: int64, the true
    (document, label) pairs, in rising order of rows; empty in prediction.
    """

    tokens_BT: Tensor
    mask_BT: Tensor
    row_P: Tensor
    label_P: Tensor

    def to(self, device: torch.device) -> "Batch":
        """The same batch on ``device``."""
        return Batch(*(tensor.to(device, non_blocking=True) for tensor in vars(self).values()))

    def split(self, parts: int) -> "list[Batch]":
        """``parts`` micro-batches of nearly equal size, in order, each padded to its longest document."""
        ends = [len(self) * part // parts for part in range(parts + 1)]
        return [self._rows(first, last) for first, last in pairwise(ends)] if parts > 1 else [self]

    def _rows(self, first: int, last: int) -> "Batch":
        mask_BT = self.mask_BT[first:last]
        width = int(mask_BT.sum(1).max())
        inside_P = (self.row_P >= first) & (self.row_P < last)
        tokens_BT = self.tokens_BT[first:last, :width]
        return Batch(tokens_BT, mask_BT[:, :width], self.row_P[inside_P] - first, self.label_P[inside_P])

    def __len__(self) -> int:
        return len(self.tokens_BT)


def make_batch(tokens: pa.ListArray, labels: pa.ListArray | None = None) -> Batch:
    """Pad ``tokens`` (list<int32>[B]) to the longest; ``labels`` are list<int32>[B] of label ids."""
    lengths = list_lengths(tokens)
    mask_BT = np.arange(max(int(lengths.max(initial=0)), 1)) < lengths[:, None]
    tokens_BT = np.zeros(mask_BT.shape, np.int64)
    tokens_BT[mask_BT] = pc.list_flatten(tokens).to_numpy()
    row_P, label_P = np.empty(0, np.int64), np.empty(0, np.int64)
    if labels is not None:
        row_P = np.repeat(np.arange(len(labels)), list_lengths(labels))
        label_P = pc.list_flatten(labels).to_numpy().astype(np.int64)
    return Batch(*map(torch.from_numpy, (tokens_BT, mask_BT, row_P, label_P)))


def budget_batches(lengths: IntArray, token_budget: int) -> Iterator[IntArray]:
    """Row numbers of batches for prediction: longest documents first, at most ``token_budget`` tokens with padding each."""
    by_length = np.argsort(-lengths, kind="stable")
    start = 0
    while start < len(by_length):
        rows = max(1, token_budget // max(1, int(lengths[by_length[start]])))
        yield by_length[start : start + rows]
        start += rows
