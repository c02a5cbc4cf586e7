"""A training run as one HTML page that needs nothing else, for its run folder: how it learnt, what came of it, what it cost.

Metrics, calibration, confusions and examples are of the documents that were held out, by the model that the bundle holds. A
page can do nothing with their texts but show them: see `page`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, NamedTuple

from xmc_ray.metrics.calibration import Reliability
from xmc_ray.reports.charts import curves, reliability
from xmc_ray.reports.curves import Curves, Points
from xmc_ray.reports.page import (
    Html,
    card,
    count,
    duration,
    excerpt,
    isolated,
    label,
    number,
    page,
    percent,
    section,
    settings,
    table,
)
from xmc_ray.reports.page import element as e
from xmc_ray.reports.page import warnings as shown_warnings

_SHOWN = ("P@1", "P@3", "P@5", "nDCG@5", "R@10", "PSP@5", "coverage@5")  # of each band


_CURVES = ("P@1", "P@5", "nDCG@5", "PSP@5")


class Label(NamedTuple):
    """A label and what people call it."""

    label: str
    name: str | None


class Mistake(NamedTuple):
    """A label given where another was true: in how many documents, and how many have the missed one at all."""

    predicted: Label
    missed: Label
    documents: int
    of: int


class Document(NamedTuple):
    """A held-out document with its true labels and its tags, (label, score, whether it is right), the best first."""

    text: str
    truth: Sequence[Label]
    tags: Sequence[tuple[Label, float, bool]]


class LabelBand(NamedTuple):
    """Labels of like frequency: their number, and how often documents have them."""

    name: str
    labels: int
    occurrences: int


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """What the model does with ``predicted`` of the ``documents`` that were held out; fields as in `findings`."""

    documents: int
    predicted: int
    metrics: Mapping[str, Any]
    """As `metrics.Metrics.result` gives them."""
    reliability: Mapping[str, Reliability]
    """By the kind of scores; the last kind is what the tags of documents are shown with."""
    mistakes: Sequence[Mistake]
    right: Sequence[Document]
    """Some whose best tag is right."""
    wrong: Sequence[Document]
    """Some whose best tag is not."""


@dataclass(frozen=True, kw_only=True)
class TrainingRun:
    """What is told of a finished run."""

    title: str
    """Name of the run."""
    bundle: str
    """Fingerprint of the model."""
    step: int
    """The step whose weights it has."""
    documents: Mapping[str, int]
    """Documents of the training split by what became of them; ``train`` are those trained on."""
    curves: Curves = field(default_factory=Curves)
    held_out: HeldOut | None = None
    labels: Sequence[LabelBand]
    named: int = 0
    """Labels with a name."""
    labelled: int
    """Documents that the labels were counted in."""
    groups: int
    price: float | None = None
    """Of an hour of one worker; None where none is configured."""
    currency: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)
    warnings: Sequence[str] = ()


def training_report(run: TrainingRun) -> str:
    """The page, complete with its ``<!doctype html>``; to be written in UTF-8."""
    held_out = run.held_out
    body = e(
        "main",
        _header(run),
        shown_warnings([*run.warnings, *_journal_warnings(run.curves)]),
        section(
            "Cost",
            "All workers together, since the start; training alone, without preparation, validation, saving.",
            _cost(run),
        ),
        section("Loss", "Sum over the labels, mean over the documents of a step.", _loss(run.curves)),
        section("Learning rates", "Each as a share of its own highest.", _rates(run.curves)),
        section("Validation", "Metrics of the held-out documents, each time they were measured.", _validation(run.curves)),
        section("By frequency", f"{_measured(run)} {_FREQUENCY}", _bands(held_out)),
        section("Calibration", _CALIBRATION, reliability(held_out.reliability) if held_out else None),
        section("Labels mistaken", _MISTAKEN, _mistakes(held_out)),
        section("Right", _example_words(held_out, "right"), *map(_document, held_out.right if held_out else ())),
        section("Wrong", _example_words(held_out, "wrong"), *map(_document, held_out.wrong if held_out else ())),
        section("Labels", _label_words(run), _labels(run)),
        section("Settings", "Every setting as it was used; run.toml has them for --config.", settings(run.settings)),
    )
    return page(f"{run.title} · training report", body)


_FREQUENCY = (
    "Percent, in total and for labels that so many documents have, those held out among them: what few documents have may "
    "hardly have been trained on."
)


_CALIBRATION = "How many of the five best tags are right, by their score. On the dashed line a score is the chance to be right."


_MISTAKEN = "A wrong tag and a true label that was missed, in one document: the pairs that meet most often."


_EXAMPLES = "Documents drawn by chance whose best tag is {}. The text is what the model read, put together from its tokens."


def _header(run: TrainingRun) -> Html:
    return e(
        "header",
        e("p", "Training report", class_="eyebrow"),
        e("h1", isolated(run.title)),
        e("p", f"weights of step {run.step:,} · model ", isolated(run.bundle, class_="code"), class_="lead"),
    )


def _journal_warnings(told: Curves) -> list[str]:
    lines = [f"The run went back to an earlier step {told.resumed} times; the curves show what was told last."] * (
        told.resumed > 1
    )
    lines += ["The run went back to an earlier step once; the curves show what was told last."] * (told.resumed == 1)
    lines += [f"{count(told.broken, 'line')} of metrics.jsonl could not be read."] * (told.broken > 0)
    return lines + ["There are no curves: metrics.jsonl tells of no step."] * (not told.points)


def _measured(run: TrainingRun) -> str:
    held_out = run.held_out
    if held_out is None:
        there = run.documents.get("validation")
        return "None of the held-out documents were predicted." if there else "None of the training documents are held out."
    if held_out.predicted < held_out.documents:
        return f"{held_out.predicted:,} of {count(held_out.documents, 'held-out document')}."
    return f"{count(held_out.predicted, 'held-out document')}."


def _cost(run: TrainingRun) -> Html:
    """What the last lines of the journal say; a dash where they say nothing."""
    last = run.curves.last
    seconds, documents, workers, peak = (last(name) for name in ("seconds", "documents", "workers", "peak_bytes"))
    rate = documents / seconds if documents and seconds else None
    cards = [
        card("Training", "–" if seconds is None else duration(timedelta(seconds=seconds)), f"{run.curves.step:,} steps"),
        card("Documents", _or_dash(documents), f"of {run.documents['train']:,} that are trained on"),
        card("Tokens", _or_dash(last("tokens")), "without padding"),
        card("Speed", _or_dash(rate), "documents a second"),
        card("Workers", _or_dash(workers), "at the end"),
        card("Memory", "–" if peak is None else f"{peak / 2**30:.2f} GiB", "at most, of the first worker"),
    ]
    if run.price is not None and seconds is not None and workers is not None:
        money = f"{run.price * workers * seconds / 3600:,.2f} {run.currency}".strip()
        cards.append(card("Money", money, f"estimated, at {run.price:g} {run.currency} a worker's hour".replace("  ", " ")))
    return e("dl", *cards)


def _or_dash(value: float | None) -> float | str:
    return "–" if value is None else value


def _loss(told: Curves) -> Html:
    # A flat model ranks nothing: its recall loss is the loss.
    stages = ("recall_loss", "rank_loss") if any(value for _, value in told.points.get("rank_loss", [])) else ()
    return curves({name.replace("_", " "): told.points.get(name, []) for name in ("loss", *stages)})


def _rates(told: Curves) -> Html:
    shares: dict[str, Points] = {}
    for name in ("encoder_lr", "lexical_lr", "head_lr", "rows_lr"):
        highest = max((value for _, value in told.points.get(name, [])), default=0.0)
        if highest:
            shares[f"{name}, at most {highest:.3g}"] = [(step, value / highest) for step, value in told.points[name]]
    return curves(shares)


def _validation(told: Curves) -> Html:
    return curves({name: told.points.get(f"validation/{name}", []) for name in _CURVES})


def _bands(held_out: HeldOut | None) -> Html:
    """A row a band; the documents and labels that it rests on, then metrics."""
    if held_out is None:
        return Html()
    rows = {"all": held_out.metrics["total"]} | {band_name(name): band for name, band in held_out.metrics["bands"].items()}
    cells = [
        [name, f"{row['documents']:,}", f"{row['true_labels']:,}", *(_percents(row[metric]) for metric in _SHOWN)]
        for name, row in rows.items()
    ]
    return e("div", table(["Labels", "Documents", "True labels", *_SHOWN], cells), class_="wide")


def band_name(name: str) -> str:
    """A band of `metrics` in words."""
    return {"0": "never seen", "1": "seen once"}.get(name, name)


def _percents(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.2f}"


def _mistakes(held_out: HeldOut | None) -> Html:
    if held_out is None or not held_out.mistakes:
        return Html()
    rows = [
        [
            Html(label(*row.predicted) + e("span", " for ", class_="lead") + label(*row.missed)),
            f"{row.documents:,}",
            f"{row.of:,}",
        ]
        for row in held_out.mistakes
    ]
    return table(["Given for missed", "Documents", "That have the missed one"], rows)


def _example_words(held_out: HeldOut | None, best: str) -> str:
    kinds = [*held_out.reliability] if held_out is not None else []
    return " ".join([_EXAMPLES.format(best), *(f"Each tag has its {kind} score." for kind in kinds[-1:])])


def _document(shown: Document) -> Html:
    tags = [
        e("li", label(*tag), " ", e("b", f"{score:.2f}"), class_="right" if right else "wrong")
        for tag, score, right in shown.tags
    ]
    truth = [e("li", label(*true)) for true in shown.truth]
    return e(
        "article",
        excerpt(shown.text),
        e("h3", "Tags"),
        e("ul", *tags, class_="tags") if tags else e("p", "None.", class_="none"),
        e("h3", "True labels"),
        e("ul", *truth, class_="tags"),
        class_="card",
    )


def _label_words(run: TrainingRun) -> str:
    labels, occurrences = sum(band.labels for band in run.labels), sum(band.occurrences for band in run.labels)
    each = number(round(occurrences / run.labelled, 2)) if run.labelled else "–"
    grouped = "no groups" if run.groups == labels else count(run.groups, "group")
    named = f"{run.named:,} with a name" if run.named else "none with a name"
    return f"{count(labels, 'label')}, {named}, in {grouped}; {each} a document."


def _labels(run: TrainingRun) -> Html:
    labels, occurrences = sum(band.labels for band in run.labels), sum(band.occurrences for band in run.labels)
    rows = [
        [band_name(band.name), f"{band.labels:,}", percent(band.labels / labels), percent(band.occurrences / occurrences)]
        for band in run.labels
        if band.labels
    ]
    what = [[name.capitalize(), f"{n:,}"] for name, n in run.documents.items() if n]
    return Html(
        table(["Documents that have it", "Labels", "Share of labels", "Share of all labels given"], rows)
        + e("h3", "Training documents by what became of them")
        + table(["Documents", "Count"], what)
    )
