"""The report of a training run: well-formed, self-contained and complete, whatever of the run is missing or hostile."""

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from confusions import N_LABELS, Documents, find, index
from journals import read, worker_entries
from pages import FOREIGN_ATTRIBUTES, FOREIGN_TAGS, NASTY, Page
from toys import toy_model

from xmc_ray.data.groups import LabelGroups
from xmc_ray.model.lexical import LexicalBranch
from xmc_ray.model.lightxml import LightXML, ModelConfig
from xmc_ray.reports.curves import Curves
from xmc_ray.reports.training import TrainingRun, label_bands, training_report
from xmc_ray.training.optim import OptimConfig

FLAT = LabelGroups(np.arange(3))
PREDICTED: Documents = [([0, 1], [0]), ([2], [1, 3])]


def test_bands_of_labels() -> None:
    bands = label_bands(replace(index(), counts=np.array([120, 10, 9, 2, 1, 1])))
    assert bands == {"0": (0, 0), "1": (2, 2), "2-9": (2, 11), "10-99": (1, 10), "100+": (1, 120)}


def test_the_page_shows_every_figure() -> None:
    page = Page(training_report(run()))
    said = " ".join(page.texts)
    for words in [
        "2 min 0 s",
        "4,800",
        "96,000",
        "40",
        "1.00 GiB",
        "seen once",
        "a red apple!",
        "0123456789abcdef",
    ]:
        assert words in said, words
    assert "2 of 3 held-out documents." in said and "Expected calibration error: raw" in said
    assert "The run went back to an earlier step once" in said
    charts = page.having("svg")
    assert [chart["class"] for chart in charts] == ["chart broad", "chart narrow"] * 3 + ["chart square"]
    assert all(chart["role"] == "img" and chart["aria-label"] for chart in charts)
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
    text = training_report(replace(run(), curves=read(worker_entries(1, made()))))
    config = OptimConfig()
    keys = [f"{name}, at most {getattr(config, name) / 2:.3g}" for name in rates]
    assert re.findall(r'key \w+">(\w+_lr, [^<]*)<', text) == keys


@pytest.mark.parametrize("kinds", [["raw"], ["raw", "calibrated"]])
def test_the_page_says_which_scores_its_examples_have(kinds: list[str]) -> None:
    said = " ".join(Page(training_report(replace(run(), findings=find(PREDICTED, 2, kinds=kinds)))).texts)
    assert re.findall(r"Each tag has its (\w+) score", said) == [kinds[-1]] * 2


def test_documents_that_are_held_out_and_not_predicted_are_held_out_all_the_same() -> None:
    said = " ".join(Page(training_report(replace(run(), findings=None))).texts)
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
    unlabelled = replace(index(), n_documents=0)
    documents = {"train": 2400, "validation": 0}
    page = Page(training_report(replace(run(), documents=documents, findings=None, curves=Curves(), labels=unlabelled)))
    said = " ".join(page.texts)
    assert "None of the training documents are held out." in said and "metrics.jsonl holds no step" in said
    assert page.texts.count("None.") == 8 and "nan" not in said


def test_no_tag_no_confusion_and_no_example() -> None:
    page = Page(training_report(replace(run(), findings=find([([], [1])], 1))))
    assert page.texts.count("None.") == 4  # no calibration, confused labels, right example, tag of the wrong one


def test_confused_labels_name_both() -> None:
    text = training_report(run())
    assert "Predicted / missed" in Page(text).texts
    assert re.search(r"a red apple2</bdi>.*/.*a red apple1</bdi></td><td>1</td><td>1</td>", text)


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
    name = text.encode("utf-8", "replace").decode()  # as Arrow can hold it
    return TrainingRun(
        title=text,
        bundle="0123456789abcdef",
        step=100,
        documents={"train": 2400, "validation": 3, text: 5},
        curves=read(entries),
        findings=find(PREDICTED, 2),
        labels=replace(index([name + "!", *[None] * (N_LABELS - 1)]), labels=pa.array([f"{name}{n}" for n in range(N_LABELS)])),
        groups=3,
        text=lambda tokens: text,
        settings={text: text, "optim": {"head_lr": 1e-3}},
        warnings=[text],
    )
