"""Text to tokens: what is encoded, cut and counted, also in processes without torch."""

import copy
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from xmc_ray.data.fields import Field, ids_of, join, numbers_of
from xmc_ray.errors import ConfigError, ModelError
from xmc_ray.model import tokenizer as tokenizer_module
from xmc_ray.model.tokenizer import TextConfig, Tokenizer

QUICK = settings(max_examples=60, deadline=None, derandomize=True)
INTS = pa.list_(pa.int32())


def test_tokens_are_those_of_the_pretrained_tokenizer(tiny_encoder: Path) -> None:
    texts = ["a red apple", "", "the Green pear, and 12 plums!", "grape " * 40]
    tokens, truncated = Tokenizer.load(tiny_encoder, 16).encode(pa.array(texts))
    pretrained = AutoTokenizer.from_pretrained(tiny_encoder)
    assert tokens.to_pylist() == pretrained(texts, truncation=True, max_length=16)["input_ids"]
    assert tokens.type == INTS
    assert truncated.to_pylist()[:2] == [False, False]
    assert truncated.to_pylist()[3] is True


@pytest.mark.parametrize(("words", "is_cut"), [(13, False), (14, False), (15, True)])
def test_truncation_is_counted_exactly(tiny_encoder: Path, words: int, is_cut: bool) -> None:
    tokens, truncated = Tokenizer.load(tiny_encoder, 16).encode(pa.array(["grape " * words]))
    assert truncated.to_pylist() == [is_cut]
    assert len(tokens[0]) == min(words + 2, 16)


@QUICK
@given(st.lists(st.text(alphabet="apple é\n深", max_size=60), max_size=8), st.integers(1, 90))
def test_what_is_encoded_at_a_time_changes_nothing(tiny_encoder: Path, texts: list[str], size: int) -> None:
    """The tokens of each text are those that it has alone, whatever the size of the parts."""
    tokenizer = Tokenizer.load(tiny_encoder, 16)
    alone = [tokenizer.pretrained.backend_tokenizer.encode(text) for text in texts]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizer_module, "_PART", size)
        tokens, truncated = tokenizer.encode(pa.array(texts, pa.string()))
    assert tokens.type == INTS
    assert tokens.to_pylist() == [encoding.ids for encoding in alone]
    assert truncated.to_pylist() == [bool(encoding.overflowing) for encoding in alone]


def test_long_texts_are_encoded_a_few_at_a_time(tiny_encoder: Path) -> None:
    """Memory of tokenising: dozens of bytes for each byte of a batch, and not of the whole column."""
    tokenizer, sizes = Tokenizer.load(tiny_encoder, 16), []
    backend = tokenizer._backend

    class Watched:
        def encode_batch_fast(self, texts: list[str], **options: bool) -> object:
            sizes.append(sum(map(len, texts)))
            return backend.encode_batch_fast(texts, **options)

        encode_batch = encode_batch_fast

    tokenizer._backend = Watched()
    tokens, truncated = tokenizer.encode(pa.array(["apple " * 20_000] * 12 + ["a red plum"] * 40_000))
    assert len(tokens) == len(truncated) == 40_012
    assert sum(sizes) == 12 * 120_000 + 400_000
    assert max(sizes) < 400_000


def test_tokens_become_text_again(tiny_encoder: Path) -> None:
    tokenizer = Tokenizer.load(tiny_encoder, 8)
    tokens, _ = tokenizer.encode(pa.array(["A Red  apple", "", "the pear and the plum and the grape"]))
    assert [tokenizer.decode(row) for row in tokens.to_pylist()] == ["a red apple", "", "the pear an ##d the plum"]


def test_a_tokenizer_travels_to_other_processes(tiny_encoder: Path) -> None:
    tokenizer = Tokenizer.load(tiny_encoder, 8)
    again = copy.deepcopy(tokenizer)  # by the same protocol as pickling
    texts = pa.array(["grape " * 20, "a plum"])
    assert [part.to_pylist() for part in again.encode(texts)] == [part.to_pylist() for part in tokenizer.encode(texts)]
    assert again.summary_position == "first"


def test_the_fingerprint_is_that_of_what_encoding_gives(tiny_encoder: Path, other_encoder: Path) -> None:
    one, same, shorter = (Tokenizer.load(tiny_encoder, length).fingerprint for length in (8, 8, 7))
    assert one == same
    assert len({one, shorter, Tokenizer.load(other_encoder, 8).fingerprint}) == 3


FIELD_TEXTS = st.lists(
    st.lists(st.sampled_from(["red", "Apple,", "xyz", "plums"]), max_size=6).map(" ".join), min_size=3, max_size=3
)


@pytest.mark.parametrize("template", ["[CLS] $A [SEP]", "$A [SEP] [CLS]", "$A"])
@QUICK
@given(rows=st.lists(FIELD_TEXTS, min_size=1, max_size=4), first=st.integers(1, 20), max_tokens=st.integers(4, 16))
def test_fields_are_encoded_one_by_one_and_each_cut_at_its_own_limit(
    template: str, rows: list[list[str]], first: int, max_tokens: int, tiny_encoder: Path
) -> None:
    from tokenizers.processors import TemplateProcessing

    pretrained = AutoTokenizer.from_pretrained(tiny_encoder)
    special = [(name, pretrained.convert_tokens_to_ids(name)) for name in ("[CLS]", "[SEP]")]
    pretrained.backend_tokenizer.post_processor = TemplateProcessing(single=template, special_tokens=special)
    plain = AutoTokenizer.from_pretrained(tiny_encoder)
    tokenizer = Tokenizer(pretrained, max_tokens, (Field("title"), Field("body", 2.0, first), Field("end")))
    before, behind = ([dict(special)[name] for name in part.split()] for part in template.split("$A"))
    texts = join([pa.array([row[number] for row in rows]) for number in range(3)])
    tokens, truncated = tokenizer.encode(texts)
    for text, row, found, cut in zip(texts.to_pylist(), rows, tokens.to_pylist(), truncated.to_pylist(), strict=True):
        parts = [plain(part, add_special_tokens=False)["input_ids"] for part in row]
        body = parts[1][:first] if first <= max_tokens else parts[1]
        content = [(0, token) for token in parts[0]] + [(1, token) for token in body] + [(2, token) for token in parts[2]]
        room = max_tokens - len(before) - len(behind)
        expected = [*((0, token) for token in before), *content[:room], *((2, token) for token in behind)]
        assert [(numbers_of(token), ids_of(token)) for token in found] == expected
        assert cut == (len(content) > room)
        offsets = tokenizer.offsets(text)
        assert len(offsets) == len(found)
        starts = [0, len(row[0]) + 1, len(row[0]) + len(row[1]) + 2]
        for (start, end), (number, token) in zip(offsets.tolist(), expected, strict=True):
            piece = text[start:end].lower()
            assert (
                token in dict(special).values()
                or plain.convert_tokens_to_ids(piece) == token
                or "##" in str(plain.convert_ids_to_tokens(token))
            )
            assert token in dict(special).values() or starts[number] <= start < end <= starts[number] + len(row[number])


def test_a_tokenizer_with_fields(tiny_encoder: Path) -> None:
    """Tokens become text again; a text without marks is the first field; a weight changes no token, a limit does."""
    names = Field("title"), Field("body", 2.0, 3)
    tokenizer = Tokenizer.load(tiny_encoder, 16, names)
    tokens, _ = tokenizer.encode(join([pa.array(["a red apple"]), pa.array(["the pear, the plum"])]))
    assert tokenizer.decode(tokens[0].as_py()) == "a red apple the pear ,"
    assert tokenizer.foreign(tokens) == 0
    plain = Tokenizer.load(tiny_encoder, 16)
    texts = pa.array(["a red apple", "", "grape " * 40])
    (found, cut), (expected, expected_cut) = (each.encode(texts) for each in (tokenizer, plain))
    assert [[ids_of(token) for token in row] for row in found.to_pylist()] == expected.to_pylist() and cut == expected_cut
    assert len(tokenizer.encode(texts.slice(0, 0))[0]) == 0
    heavier = Tokenizer.load(tiny_encoder, 16, (Field("title", 3.0), names[1]))
    longer = Tokenizer.load(tiny_encoder, 16, (names[0], Field("body")))
    assert tokenizer.fingerprint == heavier.fingerprint
    assert len({each.fingerprint for each in (plain, tokenizer, longer)}) == 3


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"fields": {}}, "invalid number of text.fields; found 0; expected 1 to 127, or None"),
        ({"fields": {str(n): 1.0 for n in range(128)}}, "invalid number of text.fields; found 128"),
        ({"fields": {"title": 1.0}, "first": {"body": 3}}, "text.first names an unknown field; found body; expected title"),
        ({"first": {"body": 3}}, "text.first names an unknown field; found body; expected text.fields"),
    ],
)
def test_fields_that_make_no_sense(settings: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        TextConfig(**settings)


@pytest.mark.parametrize("max_tokens", [0, 2])
def test_a_length_without_room_for_a_token(tiny_encoder: Path, max_tokens: int) -> None:
    with pytest.raises(ConfigError, match=r"text\.max_tokens is out of range"):
        Tokenizer.load(tiny_encoder, max_tokens)


def test_special_tokens_leave_room_for_a_text(tiny_encoder: Path) -> None:
    from tokenizers.processors import TemplateProcessing

    pretrained = AutoTokenizer.from_pretrained(tiny_encoder)
    ids = [(name, pretrained.convert_tokens_to_ids(name)) for name in ("[CLS]", "[SEP]", "red", "apple")]
    pretrained.backend_tokenizer.post_processor = TemplateProcessing(single="[CLS] red apple $A [SEP]", special_tokens=ids)
    assert len(Tokenizer(pretrained, 5).encode(pa.array(["a plum"]))[0][0]) == 5
    with pytest.raises(ConfigError, match=r"text\.max_tokens is out of range; found 4; expected at least 5"):
        Tokenizer(pretrained, 4)


def test_no_tokenizer_there(tmp_path: Path) -> None:
    with pytest.raises(ModelError) as caught:
        Tokenizer.load(tmp_path / "nothing", 8)
    assert "\n" not in str(caught.value)


def test_the_summary_token_may_stand_last(tiny_encoder: Path) -> None:
    from tokenizers.processors import TemplateProcessing

    pretrained = AutoTokenizer.from_pretrained(tiny_encoder)
    around = [(name, pretrained.convert_tokens_to_ids(name)) for name in ("[CLS]", "[SEP]")]
    pretrained.backend_tokenizer.post_processor = TemplateProcessing(single="$A [SEP] [CLS]", special_tokens=around)
    assert Tokenizer(pretrained, 8).summary_position == "last"
    pretrained.backend_tokenizer.post_processor = TemplateProcessing(single="$A", special_tokens=[])
    assert Tokenizer(pretrained, 8).summary_position is None


def test_processes_that_only_read_and_write_have_no_torch(tiny_encoder: Path) -> None:
    """They are several a night, and its import takes each of them longer than thousands of documents."""
    frozen = pickle.dumps(Tokenizer.load(tiny_encoder, 8)).hex()
    script = f"""
import pickle, sys
import xmc_ray.on_ray.tag.pieces, xmc_ray.on_ray.tag.runner, xmc_ray.on_ray.tag.output, xmc_ray.on_ray.train.labelled, pyarrow
tokenizer = pickle.loads(bytes.fromhex("{frozen}"))
tokens = tokenizer.encode(pyarrow.array(["a red apple"]))[0].to_pylist()
assert not {{"torch", "transformers"}} & set(sys.modules)
print(tokens, tokenizer.pretrained.cls_token)
"""
    told = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    tokens = Tokenizer.load(tiny_encoder, 8).encode(pa.array(["a red apple"]))[0].to_pylist()
    assert told == f"{tokens} [CLS]\n"
