"""Words that speak for a tag, of the bundle that made the night."""

import pytest

from xmc_ray.bundle.explanation import Explanation, Word
from xmc_ray.errors import ModelError
from xmc_ray.show.why import Bar, bars, marked, why

WORDS = (Word("red", 2, 4.0), Word("plum", 1, -2.0), Word("the", 1, 0.1), Word("late", 1, None))
ONE = {"label": "x", "name": None, "score": 0.5, "chance": None, "n_labels": 3, "log_odds": 0.0, "without_words": -1.0}


def explanation(**changes: object) -> Explanation:
    given = ONE | {"text": "Red, plum the red late", "words": WORDS, "paths": (), "notes": ()} | changes
    return Explanation(**given)  # type: ignore[arg-type]


def test_the_words_that_count_most() -> None:
    assert bars(explanation(), 2) == [Bar("red", None, 2, 4.0, 1.0), Bar("plum", None, 1, -2.0, -0.5)]
    assert [bar.word for bar in bars(explanation())] == ["red", "the", "plum"]
    assert bars(explanation(words=())) == []


def test_the_text_is_marked_as_it_stands() -> None:
    (words,) = marked(explanation()).values()
    assert [(it.form, it.mark) for it in words] == [
        ("Red,", "for-3"),
        ("plum", "against-2"),
        ("the", ""),
        ("red", "for-3"),
        ("late", ""),
    ]
    assert len(marked(explanation(), 2)[""]) == 2
    fields = marked(explanation(fields={"title": "red", "body": "red"}, words=(Word("red", 1, 1.0, "title"),)))
    assert fields["title"][0].mark == "for-3" and fields["body"][0].mark == ""


def test_another_bundle_does_not_explain(bundles: list[str]) -> None:
    manifest = {"config": {"bundle": bundles[1]}, "bundle": "0" * 16}
    with pytest.raises(ModelError, match="not the one of this night"):
        why(manifest, "a red plum", "red")


def test_the_night_s_own_does(bundles: list[str]) -> None:
    from xmc_ray.bundle.folder import read_settings

    manifest = {"config": {"bundle": bundles[1]}, "bundle": read_settings(bundles[1])["fingerprint"]}
    found = why(manifest, "a red plum", "red")
    assert found.label == "red" and {bar.word for bar in bars(found)} <= {"a", "red", "plum"}
