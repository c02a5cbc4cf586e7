"""An explanation as text for a terminal."""

import re
from dataclasses import replace
from typing import Any

from xmc_ray.bundle.explanation import Explanation, Neighbour, Path, Word, bare

FLAT = Path("b" * 16, score=0.42, rank=2, recall=0.42, group=7, group_rank=2, shortlist=10)
GROUPED = replace(FLAT, recall=0.6, rank_score=0.7, rank_in_group=1, others=(("pear", 0.25), ("fig", 0.125)))


def explanation(**changes: Any) -> Explanation:
    numbers = {"score": 0.42, "chance": None, "n_labels": 1234, "log_odds": -0.25, "without_words": -3.5}
    words = {"text": "A red plum, red", "words": (Word("A", 1, -0.5), Word("red", 2, 4.0), Word("plum", 1, None))}
    return Explanation(**{"label": "x", "name": None, **numbers, **words, "paths": (FLAT,), "notes": (), **changes})


def test_the_words_that_count_most_are_shown_with_the_sum_of_the_others() -> None:
    """Bars are as long as the contributions, and the text is marked by their signs."""
    assert str(explanation()).endswith(f"""
   +4.00 {"█" * 24} red ×2
   -0.50 {"░" * 3:24} A

[-A] [+red] plum, [+red]""")
    many = tuple(Word(f"w{n}", 1, n / 10) for n in range(1, 15))
    shown = str(explanation(text=" ".join(word.word for word in many), words=many))
    assert "+0.30 sum of 2 further words\n" in shown and " w1 w2 [+w3]" in f" {shown.splitlines()[-1]}"
    assert "left out" not in str(explanation(words=()))


def test_words_of_fields_are_marked_in_their_field() -> None:
    words = (Word("red", 1, 1.0, "title"), Word("Red", 1, -2.0, "body"))
    shown = str(explanation(fields={"title": "red", "body": "(Red) plum"}, words=words))
    assert " title: red\n" in shown and " body: Red\n" in shown
    assert shown.endswith("\ntitle: [+red]\nbody: [-(Red)] plum")


def test_a_path_is_told_by_its_factors() -> None:
    assert "bundle bbbbbbbbbbbbbbbb: score 0.4200, rank 2 of 1,234 labels; flat: the label has no group\n" in str(explanation())
    shown = str(explanation(paths=(replace(FLAT, recall=0.84, linear=0.5), replace(GROUPED, bundle=""))))
    assert ": score 0.4200 = recall 0.8400 x linear 0.5000, rank 2 of 1,234 labels; flat: the label has no group\n" in shown
    assert "bundle (not saved): score 0.4200 = recall 0.6000 x rank 0.7000, rank 2 of 1,234 labels\n" in shown
    assert "recall: group 7 has rank 2; the first 10 groups are shortlisted\n" in shown
    assert "rank: 1 in the group; others in it: pear 0.250, fig 0.125\n" in shown


def test_a_terminal_obeys_nothing_in_texts_and_labels() -> None:
    code, told = "\x1b[2J\x9b2J\x07\x7f", "\ufffd[2J\ufffd2J\ufffd\ufffd"
    found = explanation(
        label=f"red\r{code}",
        name=f"Red{code}\nness",
        text=f"a red{code} plum",
        words=(Word("a", 1, 0.5), Word(f"red{code}", 1, 4.0), Word("plum", 1, -0.5)),
        paths=(replace(GROUPED, bundle=code, others=((f"plum\n{code}", 0.5),)),),
        neighbours=(Neighbour(f"a red{code}\n plum", 0.9),),
    )
    shown = str(found)
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f]", shown)
    assert shown.count("\n") == str(replace(found, label="red", name=None, paths=(GROUPED,))).count("\n")  # the page's own
    assert shown.startswith(f"red {told} (Red{told} ness): score ") and f"bundle {told}: score " in shown
    assert f"others in it: plum {told} 0.500\n" in shown
    assert f" red{told}\n" in shown and f"red{told}]" in shown and re.search(rf"\d a red{re.escape(told)} \w+$", shown)


def test_a_word_is_bare_unless_it_is_all_punctuation() -> None:
    assert [bare(form) for form in ("(plum),", "it's", "...", "«rouge»")] == ["plum", "it's", "...", "rouge"]
