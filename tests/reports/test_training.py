"""A training run told on a page: sums against plain loops, a journal however often resumed, a page whatever is missing."""

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pages import FOREIGN_ATTRIBUTES, FOREIGN_TAGS, NASTY, Page
from toys import toy_model

from xmc_ray.data.epochs import CHUNK
from xmc_ray.data.groups import LabelGroups
from xmc_ray.data.labels import LabelIndex
from xmc_ray.data.token_cache import TokenCache
from xmc_ray.metrics.calibration import Reliability
from xmc_ray.metrics.confusion import EXAMPLES, Findings
from xmc_ray.model.lexical import LexicalBranch
from xmc_ray.model.lightxml import LightXML, ModelConfig
from xmc_ray.on_ray.train import report, worker
from xmc_ray.reports.charts import thinned
from xmc_ray.reports.curves import Curves
from xmc_ray.reports.training import Document, HeldOut, Label, LabelBand, Mistake, TrainingRun, training_report
from xmc_ray.training.fit import FitConfig
from xmc_ray.training.loop import Step, TrainState
from xmc_ray.training.optim import Averager, OptimConfig, Optimizer

N_LABELS = 6
FLAT = LabelGroups(np.arange(3))
labels = st.lists(st.integers(0, N_LABELS - 1), unique=True, max_size=4)
documents = st.lists(st.tuples(labels, labels), min_size=1, max_size=30)
Documents = list[tuple[list[int], list[int]]]


# -- what predictions show -----------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(documents, st.integers(1, 30))
def test_mistaken_labels_are_those_of_a_loop_in_any_chunks(rows: Documents, chunk: int) -> None:
    expected = reference.mistaken([given for given, _ in rows], [true for _, true in rows])
    found = find(rows, chunk).confusions(10**6)
    assert {(row.predicted, row.missed): row.documents for row in found} == expected
    assert [row.documents for row in found] == sorted(expected.values(), reverse=True)
    assert find(rows, chunk).confusions(1) == found[:1]


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
    assert [found.sums[0].sum() for found in findings.reliability.values()] == [2, 2]
    assert findings.reliability["raw"].result() == pytest.approx((0.1 + 0.2) / 2)
    assert findings.reliability["calibrated"].result() == pytest.approx((0.19 + 0.04) / 2)
    assert findings.examples(right=True)[0].tags == [(0, pytest.approx(0.81)), (1, pytest.approx(0.04))]


# -- the journal ---------------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(st.lists(st.integers(0, 25), max_size=20))
def test_what_is_told_again_counts_once_as_it_was_told_last(places: list[int]) -> None:
    names = ["loss", "validation/P@1"]  # of a step, in this order: lines 2 and 3 are those of step 1
    told = read([{"step": place // 2, names[place % 2]: number} for number, place in enumerate(places)])
    counted = [(places[number], float(number)) for number in reference.curve(places)]
    for kind, name in enumerate(names):
        assert told.points.get(name, []) == [(place // 2, value) for place, value in counted if place % 2 == kind]
    assert told.resumed == sum(later <= place for place, later in pairwise(places))


def test_progress_and_validation_of_one_step_stand_side_by_side_until_a_run_goes_back_over_both() -> None:
    entries: list[dict[str, Any]] = [{"step": 4, "loss": 2.0}, {"step": 4, "validation/P@1": 0.5}, {"step": 6, "loss": 1.0}]
    told = Curves.read(json.dumps(entry).encode() for entry in entries)
    assert (told.resumed, told.points["loss"], told.points["validation/P@1"]) == (0, [(4, 2.0), (6, 1.0)], [(4, 0.5)])
    told = Curves.read(json.dumps(entry).encode() for entry in [*entries, {"step": 3, "loss": 2.5}])
    assert (told.resumed, dict(told.points), told.last("loss")) == (1, {"loss": [(3, 2.5)]}, 2.5)
    assert (told.step, Curves().step, told.last("validation/P@1")) == (3, 0, None)


def test_a_worker_that_tells_of_a_step_twice_has_not_gone_back() -> None:
    (loss, validation), (later, _) = told_by_a_worker(4, toy_model()), told_by_a_worker(5, toy_model())
    assert "seconds" in loss.keys() & validation.keys()
    blind = {name: value for name, value in validation.items() if not name.startswith("validation/")}
    for second in (validation, blind):  # no document is held out from a blind run
        told = read([loss, second, later])
        assert told.resumed == 0
        assert {name: steps(told, name) for name in ("loss", "seconds")} == {"loss": [4, 5], "seconds": [4, 5]}
        assert all(told.points[name][0] == (4, value) for name, value in (second | loss).items() if name != "step")
        assert told.last("tokens") == second["tokens"]


def test_a_worker_that_tells_of_a_step_again_has_gone_back_once() -> None:
    (loss, validation), (before, _) = told_by_a_worker(4, toy_model()), told_by_a_worker(3, toy_model())
    for again in ([loss, validation], [before, loss, validation]):
        told = read([loss, validation, *again])
        assert (told.resumed, told.points) == (1, read(again).points)
    lost = [validation, loss, validation]  # the checkpoint of that step was not whole, and the first time it spoke later
    assert (read(lost).resumed, read(lost).points) == (1, read([loss, validation]).points)
    assert read([loss, validation, validation]).resumed == 1


def test_lines_that_are_none_are_counted() -> None:
    lines = [
        b'{"step": 1, "loss": 2.0, "name": "x", "lr": NaN}',
        b'{"step": 2, "lo',
        b"[]",
        b"{}",
        b"",
        b'{"step": "x"}',
        b"\xff",
    ]
    told = Curves.read(lines)
    assert (told.points, told.broken) == ({"loss": [(1, 2.0)]}, 5)


@settings(deadline=None)
@given(st.integers(1, 1000), st.integers(2, 50))
def test_a_thinned_curve_keeps_its_ends(n: int, most: int) -> None:
    points = [(step, 0.0) for step in range(n)]
    kept = thinned(points, most)
    assert len(kept) == min(n, most) == len(set(kept)) and kept[0] == points[0] and kept[-1] == points[-1]


@settings(deadline=None)
@given(st.integers(0, 10**6), st.integers(0, 10**6))
def test_chunks_are_taken_evenly_and_enough_of_them(held_out: int, most: int) -> None:
    chunks = TokenCache("place", "attempt", {"validation": held_out}).some("validation", most).tolist()
    n_chunks = -(-held_out // CHUNK)
    assert chunks == sorted(set(chunks)) and set(chunks) <= set(range(n_chunks))
    assert len(chunks) == min(n_chunks, -(-most // CHUNK))
    assert np.ptp(np.diff(chunks)) <= 1 if len(chunks) > 2 else True


def test_bands_of_labels() -> None:
    counts = np.array([120, 10, 9, 2, 1, 1])
    bands = report.label_bands(replace(index(), counts=counts))
    found = {band.name: (band.labels, band.occurrences) for band in bands}
    assert found == {"0": (0, 0), "1": (2, 2), "2-9": (2, 11), "10-99": (1, 10), "100+": (1, 120)}


# -- the page ------------------------------------------------------------------------------------------------------------


def test_the_page_shows_every_figure() -> None:
    page = Page(training_report(run()))
    said = " ".join(page.texts)
    for words in [
        "2 min 0 s",
        "4,800",
        "96,000",
        "40",
        "1.00 GiB",
        "0.20 EUR",
        "seen once",
        "a red apple!",
        "0123456789abcdef",
    ]:
        assert words in said, words
    assert "2 of 3 held-out documents." in said and "Expected calibration error: raw" in said
    assert "The run went back to an earlier step once" in said
    charts = page.having("svg")
    assert len(charts) == 4 and all(chart["role"] == "img" and chart["aria-label"] for chart in charts)
    assert page.having("li", **{"class": "right"}) and page.having("li", **{"class": "wrong"})


@pytest.mark.parametrize(
    ("made", "rates"),
    [
        (toy_model, ["encoder_lr", "head_lr", "rows_lr"]),
        (lambda: toy_model(lexical=True), ["encoder_lr", "lexical_lr", "head_lr", "rows_lr"]),
        (lambda: toy_model(FLAT), ["encoder_lr", "rows_lr"]),
        (
            lambda: LightXML(None, FLAT, ModelConfig(), lexical=LexicalBranch(torch.ones(8), 4)),
            ["lexical_lr", "head_lr", "rows_lr"],
        ),
    ],
    ids=["encoder", "both", "flat", "words"],
)
def test_rates_are_of_the_parts_that_the_model_has(made: Callable[[], LightXML], rates: list[str]) -> None:
    text = training_report(replace(run(), curves=read(told_by_a_worker(1, made()))))
    config = OptimConfig()
    keys = [f"{name}, at most {getattr(config, name) / 2:.3g}" for name in rates]
    assert re.findall(r'key \w+">(\w+_lr, [^<]*)<', text) == keys


@pytest.mark.parametrize("kinds", [["raw"], ["raw", "calibrated"]])
def test_the_page_says_which_scores_its_examples_have(kinds: list[str]) -> None:
    shown = replace(made_of(run().held_out), reliability={kind: Reliability() for kind in kinds})
    said = " ".join(Page(training_report(replace(run(), held_out=shown))).texts)
    assert re.findall(r"Each tag has its (\w+) score", said) == [kinds[-1]] * 2


def test_documents_that_are_held_out_and_not_predicted_are_held_out_all_the_same() -> None:
    said = " ".join(Page(training_report(replace(run(), held_out=None))).texts)
    assert "None of the held-out documents were predicted." in said and "documents are held out" not in said


def test_nothing_comes_from_elsewhere_and_nothing_runs() -> None:
    text = training_report(run())
    page = Page(text)
    assert not FOREIGN_TAGS & {tag for tag, _ in page.tags}
    assert not FOREIGN_ATTRIBUTES & {name for _, attributes in page.tags for name in attributes}
    assert "url(" not in page.style and "://" not in text


@pytest.mark.parametrize("text", NASTY.values(), ids=NASTY)
def test_text_stays_text_wherever_it_stands(text: str) -> None:
    assert [tag for tag, _ in Page(training_report(run(text))).tags] == [
        tag for tag, _ in Page(training_report(run("plain"))).tags
    ]


def test_a_run_of_which_nothing_is_known_is_told_all_the_same() -> None:
    nothing = {"held_out": None, "curves": Curves(), "price": None, "labelled": 0, "named": 0}
    page = Page(training_report(replace(run(), documents={"train": 2400, "validation": 0}, **nothing)))
    said = " ".join(page.texts)
    assert "None of the training documents are held out." in said and "metrics.jsonl tells of no step" in said
    assert page.texts.count("None.") == 8 and "nan" not in said


def test_no_tag_no_mistake_and_no_example() -> None:
    bare = replace(made_of(run().held_out), reliability={}, mistakes=[], right=[], wrong=[Document("x", [], [])])
    page = Page(training_report(replace(run(), held_out=bare)))
    assert page.texts.count("None.") == 4


# -- the whole -----------------------------------------------------------------------------------------------------------


def test_a_run_folder_has_its_report(trained: Path) -> None:
    text = (trained / "report.html").read_text()
    said = " ".join(Page(text).texts)
    best = json.loads((trained / "bundle" / "metrics.json").read_text())
    row = re.search(r"<td>all</td>(.*?)</tr>", text)
    assert row is not None
    cells = re.findall("<td>(.*?)</td>", row[1])
    shown = [best[name] for name in ("P@1", "P@3", "P@5", "nDCG@5", "R@10", "PSP@5", "coverage@5")]
    assert cells[2:] == [f"{100 * value:.2f}" for value in shown]  # as it was in training
    entries = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    assert f"{int(entries[-1]['documents']):,}" in said and entries[-1]["peak_bytes"] > 2**20
    assert "a green" in said and "FRUIT" in said and "optim.head_lr" in said
    assert "earlier step" not in said and "Each tag has its calibrated score." in said
    assert [name for name in entries[0] if name.endswith("_lr")] == ["encoder_lr", "head_lr", "rows_lr"]


def test_a_report_that_cannot_be_made_is_a_warning(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    machine = report.Machine(cpus=1, gpu=False, threads=1)
    assert not report.write_report(str(tmp_path), report.ReportConfig(), machine, None, None, {})  # type: ignore[arg-type]
    assert f"warning: no {tmp_path}/report.html: " in capfd.readouterr().out
    assert not list(tmp_path.iterdir())


# -- toys ----------------------------------------------------------------------------------------------------------------


def index() -> LabelIndex:
    names = pa.array([f"label-{number}" for number in range(N_LABELS)])
    return LabelIndex(names, np.arange(N_LABELS, 0, -1), pa.nulls(N_LABELS, pa.string()), 10)


def lists(rows: Sequence[Sequence[int]]) -> pa.ListArray:
    return pa.array(rows, pa.list_(pa.int32()))


def find(rows: Documents, chunk: int, seed: int = 0) -> Findings:
    """Of documents with (tags, true labels), so many at a time; a document's only token is its number."""
    findings = Findings(index(), seed)
    for first in range(0, len(rows), chunk):
        part = rows[first : first + chunk]
        label_Dk = np.array([[*tags, -1, -1, -1, -1, -1][:5] for tags, _ in part], np.int64)
        score_Dk = np.where(label_Dk < 0, 0, np.linspace(0.9, 0.1, 5)).astype(np.float32)
        tokens = lists([[first + number] for number in range(len(part))])
        findings.update(tokens, lists([true for _, true in part]), label_Dk, {"raw": score_Dk})
    return findings


def told_by_a_worker(step: int, model: LightXML) -> list[dict[str, Any]]:
    """The two lines of ``metrics.jsonl`` on a step after which a worker speaks and validates; rates are half their peaks."""
    config, counts = FitConfig(), {"documents": 64 * step, "tokens": 640 * step, "padded_tokens": 700 * step}
    state = TrainState(model, Optimizer(model, config.optim), Averager(config.optim), step, 2.5 * step, **counts)
    state.optimizer.factor = 0.5
    progress = worker._progress(Step(step, 0, 0.5, 2.0, 1.0, *counts.values(), state.seconds, 0.1), state, config)
    cost = worker._Worker._cost(SimpleNamespace(state=state, exchange=model.exchange))  # type: ignore[arg-type]
    del progress["line"]
    return [progress, {"validation/P@1": 0.5, **cost, "step": step}]


def read(entries: Sequence[dict[str, Any]]) -> Curves:
    return Curves.read(json.dumps(entry).encode() for entry in entries)


def steps(told: Curves, name: str) -> list[int]:
    return [step for step, _ in told.points[name]]


def made_of(held_out: HeldOut | None) -> HeldOut:
    assert held_out is not None
    return held_out


def run(text: str = "a red apple") -> TrainingRun:
    entries: list[dict[str, Any]] = [
        {"step": 1, "loss": 3.0, "recall_loss": 2.0, "rank_loss": 1.0, "head_lr": 1e-3, "encoder_lr": 0.0},
        {"step": 90, "loss": 9.0},
        {"step": 60, "loss": 2.0, "recall_loss": 1.5, "rank_loss": 0.5, "head_lr": 1e-4, "encoder_lr": 0.0},
        {
            "step": 100,
            "validation/P@1": 0.5,
            "seconds": 120.0,
            "documents": 4800,
            "tokens": 96000,
            "workers": 2,
            "peak_bytes": 2**30,
        },
    ]
    findings = find([([0, 1], [0]), ([2], [1, 3])], 2)
    apple, pear = Label("malus", text + "!"), Label(text, None)
    shown = Document(text, [apple], [(apple, 0.93, True), (pear, 0.4, False)])
    held_out = HeldOut(
        documents=3,
        predicted=2,
        metrics=findings.metrics.result(),
        reliability=findings.reliability,
        mistakes=[Mistake(apple, pear, 3, 7)],
        right=[shown],
        wrong=[shown],
    )
    return TrainingRun(
        title=text,
        bundle="0123456789abcdef",
        step=100,
        documents={"train": 2400, "validation": 3, text: 5},
        curves=Curves.read(json.dumps(entry).encode() for entry in entries),
        held_out=held_out,
        labels=[LabelBand("1", 2, 2), LabelBand("2-9", 4, 20)],
        named=1,
        labelled=10,
        groups=3,
        price=3.0,
        currency="EUR",
        settings={text: text, "optim": {"head_lr": 1e-3}},
        warnings=[text],
    )
