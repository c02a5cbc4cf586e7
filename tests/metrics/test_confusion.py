"""What predictions for held-out documents show: against plain loops, and the same whatever the chunks."""

import numpy as np
import pytest
import reference
from confusions import N_LABELS, Documents, find, index, lists
from hypothesis import given, settings
from hypothesis import strategies as st

from xmc_ray.metrics.confusion import EXAMPLES, Findings

labels = st.lists(st.integers(0, N_LABELS - 1), unique=True, max_size=4)
documents = st.lists(st.tuples(labels, labels), min_size=1, max_size=30)


@settings(deadline=None)
@given(documents, st.integers(1, 30))
def test_confused_labels_are_those_of_a_loop_in_any_chunks(rows: Documents, chunk: int) -> None:
    expected = reference.mistaken([tags for tags, _ in rows], [true for _, true in rows])
    confusions = find(rows, chunk).confusions(10**6)
    assert {(row.predicted, row.missed): row.documents for row in confusions} == expected
    assert [row.documents for row in confusions] == sorted(expected.values(), reverse=True)
    assert [row.support for row in confusions] == [sum(row.missed in true for _, true in rows) for row in confusions]
    assert find(rows, chunk).confusions(1) == confusions[:1]


@settings(deadline=None)
@given(documents, st.integers(1, 30))
def test_examples_are_drawn_alike_in_any_chunks_and_are_what_they_say(rows: Documents, chunk: int) -> None:
    findings, whole = find(rows, chunk), find(rows, len(rows))
    for right in (True, False):
        drawn = findings.examples(right=right)
        numbers = [example.tokens[0] for example in drawn]
        of_the_kind = {n for n, (tags, true) in enumerate(rows) if (tags[:1] != [] and tags[0] in true) == right}
        assert drawn == whole.examples(right=right)
        assert len(set(numbers)) == len(numbers) == min(len(of_the_kind), EXAMPLES) and set(numbers) <= of_the_kind
        for example in drawn:
            assert ([label for label, _ in example.tags], example.truth) == rows[example.tokens[0]]
    assert findings.truth_L.tolist() == [sum(label in true for _, true in rows) for label in range(N_LABELS)]
    assert findings.metrics.result() == whole.metrics.result()


def test_another_seed_draws_other_examples() -> None:
    rows: Documents = [([0], [0])] * 200
    assert find(rows, 50, seed=1).examples(right=True) != find(rows, 50, seed=2).examples(right=True)


def test_scores_of_two_kinds_are_held_against_the_same_truth() -> None:
    findings = Findings(index(), seed=0)
    label_Dk, score_Dk = np.array([[0, 1, -1]]), np.array([[0.9, 0.2, 0.0]], np.float32)
    findings.update(lists([[7]]), lists([[0]]), label_Dk, {"raw": score_Dk, "calibrated": score_Dk**2})
    assert [kind.sums[0].sum() for kind in findings.reliability.values()] == [2, 2]
    assert findings.reliability["raw"].result() == pytest.approx((0.1 + 0.2) / 2)
    assert findings.reliability["calibrated"].result() == pytest.approx((0.19 + 0.04) / 2)
    assert findings.examples(right=True)[0].tags == [(0, pytest.approx(0.81)), (1, pytest.approx(0.04))]
