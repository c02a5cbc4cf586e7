"""Errors are one printable line, and the same one after they have crossed from one process to another."""

import os
import pickle

import pytest

from xmc_ray.errors import (
    ConfigError,
    DataError,
    ModelError,
    UnavailableError,
    XmcError,
    one_line,
    printable,
    scrubbed,
    warn_caller,
)

KINDS = [XmcError, ConfigError, UnavailableError, DataError, ModelError]


@pytest.mark.parametrize("kind", KINDS)
def test_the_line_says_what_where_found_expected_and_the_way_out(kind: type[XmcError]) -> None:
    error = kind("a column is missing", where="a.parquet", found=["id"], expected="text", way_out="name another")
    assert str(error) == "a column is missing: a.parquet; found ['id']; expected text; name another"
    assert str(kind("too few", found=0)) == "too few; found 0"
    assert str(kind("two\nlines", way_out="and \t more")) == "two lines; and more"


@pytest.mark.parametrize("kind", KINDS)
def test_it_survives_pickling(kind: type[XmcError]) -> None:
    error = kind("a column is missing", where="a.parquet", found=["id"], expected="text", way_out="name another")
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is kind and vars(again) == vars(error) and str(again) == str(error)


def test_storage_that_does_not_answer_is_a_config_error() -> None:
    assert issubclass(UnavailableError, ConfigError) and all(issubclass(kind, XmcError) for kind in KINDS)


@pytest.mark.parametrize("raw", ["label \x1b[2J", "column \x9b31m", "title \x1b]0;x\x07", "no \x00", "surrogate \ud83d"])
def test_data_in_an_error_cannot_command_the_terminal(raw: str) -> None:
    for error in (
        DataError(raw),
        DataError("a", where=raw),
        DataError("a", found=raw),
        DataError("a", expected=raw, way_out=raw),
    ):
        assert str(error).isprintable() and "\N{REPLACEMENT CHARACTER}" in str(error)


def test_a_file_name_that_is_not_utf_8_is_shown_by_its_bytes() -> None:
    name = os.fsdecode(b"/data/caf\xe9.jsonl")
    assert str(DataError("no input", where=name)) == r"no input: /data/caf\xe9.jsonl"


def test_only_unprintable_characters_are_replaced() -> None:
    assert printable("a\x1b[2J\x00\x85\ud83d\uffffz") == "a\N{REPLACEMENT CHARACTER}[2J" + 4 * "\N{REPLACEMENT CHARACTER}" + "z"
    assert one_line("two\nlines\u2028 \x1b[2J") == "two lines  \N{REPLACEMENT CHARACTER}[2J"
    assert printable("tab\t line\n größe 👩‍👩‍👧 \xa0") == "tab\t line\n größe 👩‍👩‍👧 \xa0"


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("at https://me:secret@example.org/api", "at https://***@example.org/api"),
        ("postgresql://user:p@ssw0rd@db/x failed", "postgresql://***@db/x failed"),
        ("https://u:pa/ss@h and mail me@example.org", "https://***@h and mail me@example.org"),
        ("https://h/api?run=7&Access_Token=abc&part=2", "https://h/api?run=7&Access_Token=***&part=2"),
        ("https://h/x?X-Amz-Signature=abc", "https://h/x?X-Amz-Signature=***"),
        ("found hunter2hunter2", "found ***"),
        ("key short, https://h/api?page=2", "key short, https://h/api?page=2"),
    ],
)
def test_credentials_in_somebody_else_s_words_are_not_told(text: str, left: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("my_db_passwd", "hunter2hunter2")
    monkeypatch.setenv("SOME_KEY", "short")
    assert scrubbed(text) == left


def test_a_warning_is_of_the_line_that_has_called() -> None:
    with pytest.warns(UserWarning, match="look here") as said:
        warn_caller("look here")
    assert said[0].filename == __file__
