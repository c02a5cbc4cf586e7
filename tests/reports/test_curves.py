"""The journal of a run as curves, however often the run was killed and resumed."""

from itertools import pairwise
from typing import Any

import reference
from hypothesis import given, settings
from hypothesis import strategies as st
from journals import read, worker_entries
from toys import toy_model

from xmc_ray.reports.curves import Curves


@settings(deadline=None)
@given(st.lists(st.integers(0, 25), max_size=20))
def test_what_is_written_again_counts_once_as_it_was_written_last(positions: list[int]) -> None:
    names = ["loss", "validation/P@1"]  # of a step, in this order: positions 2 and 3 are those of step 1
    journal = read([{"step": position // 2, names[position % 2]: number} for number, position in enumerate(positions)])
    counted = [(positions[number], float(number)) for number in reference.curve(positions)]
    for kind, name in enumerate(names):
        expected = [(position // 2, value) for position, value in counted if position % 2 == kind]
        assert journal.points.get(name, []) == expected
    assert journal.resumed == sum(later <= position for position, later in pairwise(positions))


def test_progress_and_validation_of_one_step_stand_side_by_side_until_a_run_goes_back_over_both() -> None:
    entries: list[dict[str, Any]] = [{"step": 4, "loss": 2.0}, {"step": 4, "validation/P@1": 0.5}, {"step": 6, "loss": 1.0}]
    journal = read(entries)
    assert (journal.resumed, journal.points["loss"]) == (0, [(4, 2.0), (6, 1.0)])
    assert journal.points["validation/P@1"] == [(4, 0.5)]
    journal = read([*entries, {"step": 3, "loss": 2.5}])
    assert (journal.resumed, dict(journal.points), journal.last("loss")) == (1, {"loss": [(3, 2.5)]}, 2.5)
    assert (journal.step, Curves().step, journal.last("validation/P@1")) == (3, 0, None)


def test_a_worker_that_writes_twice_of_a_step_has_not_gone_back() -> None:
    (loss, validation), (later, _) = worker_entries(4, toy_model()), worker_entries(5, toy_model())
    assert "seconds" in loss.keys() & validation.keys()
    blind = {name: value for name, value in validation.items() if not name.startswith("validation/")}
    for second in (validation, blind):  # no document is held out from a blind run
        journal = read([loss, second, later])
        assert journal.resumed == 0
        assert {name: steps(journal, name) for name in ("loss", "seconds")} == {"loss": [4, 5], "seconds": [4, 5]}
        assert all(journal.points[name][0] == (4, value) for name, value in (second | loss).items() if name != "step")
        assert journal.last("tokens") == second["tokens"]


def test_a_worker_that_writes_a_step_again_has_gone_back_once() -> None:
    (loss, validation), (before, _) = worker_entries(4, toy_model()), worker_entries(3, toy_model())
    for again in ([loss, validation], [before, loss, validation]):
        journal = read([loss, validation, *again])
        assert (journal.resumed, journal.points) == (1, read(again).points)
    lost = [validation, loss, validation]  # the checkpoint of that step was incomplete, and its first lines came later
    assert (read(lost).resumed, read(lost).points) == (1, read([loss, validation]).points)
    assert read([loss, validation, validation]).resumed == 1


def test_broken_lines_are_counted() -> None:
    lines = [
        b'{"step": 1, "loss": 2.0, "name": "x", "lr": NaN}',
        b'{"step": 2, "lo',
        b"[]",
        b"{}",
        b"",
        b'{"step": "x"}',
        b'{"step": 3, "loss": 1%s}' % (b"0" * 400),
        b"\xff",
    ]
    journal = Curves.read(lines)
    assert (journal.points, journal.broken) == ({"loss": [(1, 2.0)]}, 6)


def steps(journal: Curves, name: str) -> list[int]:
    return [step for step, _ in journal.points[name]]
