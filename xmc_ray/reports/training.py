"""The report of a training run: one self-contained HTML page about how the model learnt, how good it is, and what it cost.

Metrics, calibration, confused labels and examples are of held-out documents, by the model in the bundle.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import numpy as np

from xmc_ray.data.labels import LabelIndex
from xmc_ray.metrics.at_k import Metrics
from xmc_ray.metrics.confusion import Findings
from xmc_ray.reports.charts import Chart, curves, percent_tick, reliability
from xmc_ray.reports.curves import Curves, Points
from xmc_ray.reports.render import Label, count, number, percent, render

_METRICS = ("P@1", "P@3", "P@5", "nDCG@5", "R@10", "PSP@5", "coverage@5")  # of each band
_CURVES = ("P@1", "P@5", "nDCG@5", "PSP@5")


@dataclass(frozen=True, kw_only=True)
class TrainingRun:
    """What the report of a finished run shows."""

    title: str
    """Name of the run."""
    bundle: str
    """Fingerprint of the model."""
    step: int
    """The step whose weights it has."""
    documents: Mapping[str, int]
    """Documents of the training split by what became of them: ``train`` are trained on, ``validation`` held out."""
    labels: LabelIndex
    groups: int
    """Label groups of the model."""
    curves: Curves = field(default_factory=Curves)
    findings: Findings | None = None
    """Of predictions for held-out documents; None if none were predicted."""
    text: Callable[[list[int]], str]
    """Decodes the tokens of a document."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    warnings: Sequence[str] = ()


def training_report(run: TrainingRun) -> str:
    """The page, from ``<!doctype html>`` on; to be written in UTF-8."""
    labels, names = run.labels.labels, run.labels.names
    content = vars(run) | {
        "warnings": [*run.warnings, *journal_warnings(run.curves)],
        **training_charts(run.curves),
        "reliability": reliability(run.findings.reliability) if run.findings else None,
        "measured": _measured(run),
        "metrics": _METRICS,
        "metric_rows": _metric_rows(run.findings.metrics.result()) if run.findings else [],
        **_label_statistics(run),
        "document_rows": [(name.capitalize(), number(n)) for name, n in run.documents.items() if n],
        "label": lambda label: Label(labels[label].as_py(), names[label].as_py()),
        "timedelta": timedelta,
    }
    return render("training.html.j2", **content)


def training_charts(journal: Curves) -> dict[str, Chart | None]:
    """Of a journal: ``loss``, learning ``rates`` and ``validation`` over steps; None for what it does not hold."""
    validation = {name: journal.points.get(f"validation/{name}", []) for name in _CURVES}
    return {
        "loss": curves(_loss(journal), "loss"),
        "rates": curves(_learning_rates(journal), "share of the peak", percent_tick),
        "validation": curves(validation, "metric", percent_tick),
    }


def label_bands(labels: LabelIndex) -> dict[str, tuple[int, int]]:
    """For each band of `Metrics`: the number of its labels, and how often documents have one of them."""
    metrics = Metrics(labels.counts, labels.n_documents)
    sums = (np.bincount(metrics.row_L, weights, len(metrics.bands) + 1)[1:] for weights in (None, labels.counts))
    return {name: (int(n), int(times)) for name, n, times in zip(metrics.bands, *sums, strict=True)}


def journal_warnings(journal: Curves) -> list[str]:
    """What to say of a run that went back, of lines that could not be read, and of a journal without steps."""
    warnings = []
    if journal.resumed:
        times = "once" if journal.resumed == 1 else f"{journal.resumed} times"
        warnings.append(f"The run went back to an earlier step {times}; the curves show the last attempt at each step.")
    if journal.broken:
        warnings.append(f"{count(journal.broken, 'line')} of metrics.jsonl could not be read.")
    if not journal.points:
        warnings.append("There are no curves: metrics.jsonl holds no step.")
    return warnings


def _measured(run: TrainingRun) -> str:
    held_out = run.documents.get("validation", 0)
    if run.findings is None:
        return "None of the held-out documents were predicted." if held_out else "None of the training documents are held out."
    if run.findings.documents < held_out:
        return f"{run.findings.documents:,} of {count(held_out, 'held-out document')}."
    return f"{count(run.findings.documents, 'held-out document')}."


def _loss(journal: Curves) -> dict[str, Points]:
    # A flat model does not rank: its recall loss is its loss.
    stages = ("recall_loss", "rank_loss") if any(value for _, value in journal.points.get("rank_loss", [])) else ()
    return {name.replace("_", " "): journal.points.get(name, []) for name in ("loss", *stages)}


def _learning_rates(journal: Curves) -> dict[str, Points]:
    shares: dict[str, Points] = {}
    for name in ("encoder_lr", "lexical_lr", "head_lr", "rows_lr"):
        peak = max((value for _, value in journal.points.get(name, [])), default=0.0)
        if peak:
            shares[f"{name}, at most {peak:.3g}"] = [(step, value / peak) for step, value in journal.points[name]]
    return shares


def _metric_rows(metrics: Mapping[str, Any]) -> list[list[str]]:
    """A row for all labels and one for each band: documents, true labels, metrics in percent."""
    rows = {"all": metrics["total"]} | {_band_name(name): band for name, band in metrics["bands"].items()}
    return [
        [
            name,
            f"{row['documents']:,}",
            f"{row['true_labels']:,}",
            *("–" if row[metric] is None else f"{100 * row[metric]:.2f}" for metric in _METRICS),
        ]
        for name, row in rows.items()
    ]


def _label_statistics(run: TrainingRun) -> dict[str, Any]:
    bands = label_bands(run.labels)
    labels, occurrences = len(run.labels), sum(times for _, times in bands.values())
    named = labels - run.labels.names.null_count
    facts = [
        count(labels, "label"),
        f"{named:,} with a name" if named else "none with a name",
        "in no groups" if run.groups == labels else f"in {count(run.groups, 'group')}",
    ]
    each = number(occurrences / run.labels.n_documents if run.labels.n_documents else None)
    rows = [
        [_band_name(name), number(n), percent(n / labels), percent(times / occurrences)]
        for name, (n, times) in bands.items()
        if n
    ]
    return {"label_facts": f"{', '.join(facts)}; {each} per document.", "band_rows": rows}


def _band_name(name: str) -> str:
    return {"0": "never seen", "1": "seen once"}.get(name, name)
