"""Text to tokens.

Tokens are passed on as Arrow lists of int32, so padding is neither stored nor sent. Of a document with fields (`data.fields`)
each field is encoded by itself, and its tokens say which it is.

Processes that read and tokenise have no use for torch, whose import takes them longer than thousands of documents. So this
module imports neither torch nor transformers: only `Tokenizer.load`, and who asks for the pretrained tokenizer, does.
"""

import hashlib
import json
import math
import os
import pickle
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import tokenizers

from xmc_ray import storage
from xmc_ray.data.fields import MARK, MOST, Field, Fields, concatenated, ids_of, numbered_lists, split
from xmc_ray.data.labels import IntArray
from xmc_ray.errors import ConfigError, ModelError, XmcError
from xmc_ray.settings import Bounds, PositiveInt, Settings
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
    fields: dict[str, Annotated[float, Bounds(gt=0, lt=math.inf)]] | None = None
    """Text columns that are told apart, in the order in which they are read, and how much an occurrence of a word in each
    counts, for the lexical branch; documents.text has to list them. None joins the columns."""
    first: dict[str, PositiveInt] | None = None
    """Of some fields, how many of their first tokens are read."""

    def check(self) -> None:
        """Raises ConfigError for no or too many fields, and for a limit of what is no field."""
        fields = self.fields or {}
        if self.fields == {} or len(fields) > MOST:
            raise ConfigError("invalid number of text.fields", found=len(fields), expected=f"1 to {MOST}, or None")
        for name in self.first or {}:
            if name not in fields:
                raise ConfigError("text.first names an unknown field", found=name, expected=", ".join(fields) or "text.fields")

    def described(self) -> Fields:
        """The fields in order."""
        return tuple(Field(name, float(weight), (self.first or {}).get(name)) for name, weight in (self.fields or {}).items())


class Tokenizer:
    """A pretrained (fast) tokenizer that turns batches of strings into lists of tokens: ids, marked by their fields if any."""

    def __init__(self, pretrained: Any, max_tokens: int, fields: Fields = (), backend: Any = None) -> None:
        """``backend``: of the library tokenizers, if it is not the pretrained one's own."""
        if backend is None and not getattr(pretrained, "is_fast", False):
            raise ModelError("the encoder has no fast tokenizer", found=type(pretrained).__name__, expected="tokenizer.json")
        self._pretrained: Any = pretrained  # or what it is made of, if somebody asks for it: a folder, or a pickle
        self.max_tokens, self.fields = max_tokens, fields
        self._backend = pretrained.backend_tokenizer if backend is None else backend
        self._backend.no_padding()
        self._backend.no_truncation()
        least = max(3, len(self._backend.encode("").ids) + 1)  # how many a transformer can read, `encoder` finds out
        if max_tokens < least:
            raise ConfigError("text.max_tokens is out of range", found=max_tokens, expected=f"at least {least}")
        self._backend.enable_truncation(max_tokens)

    @classmethod
    def load(cls, name: str | Path, max_tokens: int, fields: Fields = ()) -> "Tokenizer":
        """From a hub name, or a folder, local or s3://; raises ModelError when it does not exist or cannot be loaded."""
        try:
            return cls(_pretrained(folders.loadable(str(name))), max_tokens, fields)
        except Exception as error:  # what a broken file raises depends on the file
            raise load_error("tokenizer", str(name), error) from error

    @classmethod
    def of_bundle(cls, folder: Path, max_tokens: int, fields: Fields = (), *, lazily: bool = False) -> "Tokenizer":
        """As `save` has left it in a local ``folder``; ModelError if it cannot be loaded.

        ``lazily``: the pretrained tokenizer is loaded when it is asked for, from the folder, and so is torch.
        """
        try:
            backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
            return cls(folder if lazily else _pretrained(str(folder)), max_tokens, fields, backend)
        except Exception as error:
            raise load_error("tokenizer", str(folder), error) from error

    def __getstate__(self) -> dict[str, Any]:
        """For another process of this job, which thaws the pretrained tokenizer if it asks for it: `encode` does not."""
        frozen = self._pretrained if isinstance(self._pretrained, bytes | Path) else pickle.dumps(self._pretrained)
        return self.__dict__ | {"_pretrained": frozen}

    @property
    def pretrained(self) -> Any:
        """The tokenizer of transformers."""
        if isinstance(self._pretrained, bytes):
            self._pretrained = pickle.loads(self._pretrained)
        elif isinstance(self._pretrained, Path):
            self._pretrained = _pretrained(str(self._pretrained))
        return self._pretrained

    def save(self, folder: Path) -> None:
        """Write ``tokenizer.json`` and its accompanying files."""
        self.pretrained.save_pretrained(str(folder))
        self._backend.save(str(folder / "tokenizer.json"))  # what `encode` uses, whatever transformers has made of its files

    def encode(self, texts: pa.Array) -> tuple[pa.ListArray, pa.BooleanArray]:
        """Tokens (list<int32>[n]) of ``texts`` (string[n]), and which texts were truncated (bool[n])."""
        encode = self._encode_fields if self.fields else self._encode
        tokens, truncated = zip(*map(encode, _parts(texts)), strict=True)
        return pa.concat_arrays(tokens), pa.concat_arrays(truncated)

    def _encode(self, texts: pa.Array, special: bool = True) -> tuple[pa.ListArray, pa.BooleanArray]:
        encodings = self._backend.encode_batch_fast(texts.to_pylist(), add_special_tokens=special)
        tokens = pa.array([encoding.ids for encoding in encodings], pa.list_(pa.int32()))
        return tokens, pa.array([bool(encoding.overflowing) for encoding in encodings], pa.bool_())

    def _encode_fields(self, texts: pa.Array) -> tuple[pa.ListArray, pa.BooleanArray]:
        """Field by field: each cut at its own limit, then the whole at ``max_tokens``, special tokens around it."""
        parts, truncated = [], pa.repeat(False, len(texts))
        for number, (field, part) in enumerate(zip(self.fields, split(texts, len(self.fields)), strict=True)):
            tokens, cut = self._encode(part, special=False)
            if field.first is None or field.first > self.max_tokens:
                truncated = pc.or_(truncated, cut)
            parts.append(numbered_lists(pc.list_slice(tokens, 0, field.first or self.max_tokens), number))
        before, behind = self._frame
        tokens, room = concatenated(parts), self.max_tokens - len(before) - len(behind)
        truncated = pc.or_(truncated, pc.greater(pc.list_value_length(tokens), room))
        # pyarrow repeats a list at least once
        around = [pa.repeat(pa.scalar(ids, tokens.type), len(texts) + 1).slice(1) for ids in (before, behind)]
        framed = around[0], pc.list_slice(tokens, 0, room), numbered_lists(around[1], len(self.fields) - 1)
        return concatenated(framed), truncated

    @cached_property
    def _frame(self) -> tuple[list[int], list[int]]:
        """The special tokens before and behind a text."""
        special, ids = self._backend.encode(_TEXTS[0]).special_tokens_mask, self._backend.encode("").ids
        before = special.index(0) if 0 in special else len(ids)
        return ids[:before], ids[before:]

    def offsets(self, text: str) -> IntArray:
        """int64[T, 2]: start and end (exclusive), in characters, of each token that `encode` returns; 0, 0 for special ones."""
        if not self.fields:
            return np.array(self._backend.encode(text).offsets, np.int64).reshape(-1, 2)
        before, behind = ([(0, 0)] * len(ids) for ids in self._frame)
        offsets, start = list[tuple[int, int]](), 0
        for field, part in zip(self.fields, text.split(MARK, len(self.fields) - 1), strict=False):
            own = self._backend.encode(part, add_special_tokens=False).offsets[: field.first]
            offsets += [(start + first, start + end) for first, end in own]
            start += len(part) + 1
        offsets = offsets[: self.max_tokens - len(before) - len(behind)]
        return np.array([*before, *offsets, *behind], np.int64).reshape(-1, 2)

    def decode(self, tokens: Sequence[int]) -> str:
        """A text with these tokens: the encoded one, but for normalisation such as that of case and white space."""
        return str(self._backend.decode([ids_of(token) for token in tokens], skip_special_tokens=True))

    def foreign(self, tokens: pa.ListArray) -> float:
        """The share of some documents (list<int32>[n], as `encode` returns them) whose language the vocabulary hardly has.

        More than a tenth of their tokens are unknown, or their words break into more than two pieces on average; of scripts
        without spaces, each letter counts as a word. 0 without documents.
        """
        special = {*self.pretrained.all_special_ids} - {self.pretrained.unk_token_id}
        rows = [[ids_of(token) for token in row if ids_of(token) not in special] for row in tokens.to_pylist()]
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
        content = self._backend.to_str()
        if self.fields:
            content += json.dumps([[field.name, field.first] for field in self.fields])
        return hashlib.sha256(content.encode()).hexdigest()[:16]

    @property
    def summary_position(self) -> str | None:
        """The position of the tokenizer's summary token: ``first`` (BERT), ``last`` (XLNet), or None if it has none."""
        ids = self._backend.encode("").ids
        summary = self.pretrained.cls_token_id
        if summary is None or summary not in ids:
            # RoBERTa uses its first token so, but does not call it the summary token
            return "first" if ids and ids[0] == self.pretrained.bos_token_id else None
        return "first" if ids[0] == summary else "last"


def _pretrained(place: str) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(place, trust_remote_code=False)


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
