"""The end of a training run: its model predicts the held-out documents once more, and ``report.html`` tells of the run.

The bundle is there first, and a report that cannot be made is a warning: it never fails a finished training.
"""

import math
import os
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray
import torch

from xmc_ray import storage
from xmc_ray.bundle.folder import load_bundle
from xmc_ray.data.labels import IntArray, LabelIndex
from xmc_ray.data.token_cache import TokenCache
from xmc_ray.metrics.at_k import Metrics
from xmc_ray.metrics.confusion import Confusion, Example, Findings
from xmc_ray.model.predict import predict
from xmc_ray.model.text import Tokenizer
from xmc_ray.on_ray.train.journal import say
from xmc_ray.on_ray.train.prepare import Prepared
from xmc_ray.reports.curves import Curves
from xmc_ray.reports.training import Document, HeldOut, Label, LabelBand, Mistake, TrainingRun, training_report
from xmc_ray.settings import Bounds, NonNegativeInt, Settings
from xmc_ray.training.loop import LoopConfig

_MISTAKES = 20


@dataclass(frozen=True, kw_only=True)
class ReportConfig(Settings):
    """The report of a finished run."""

    documents: NonNegativeInt = 100_000
    """Held-out documents that are predicted for it, at most, rounded up to whole chunks of 4,096; 0 predicts none."""
    price: Annotated[float, Bounds(ge=0, lt=math.inf)] | None = None
    """What an hour of one worker costs; with it, the report estimates the money."""
    currency: str = ""
    """The unit of the price, as it is shown."""


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What the predictions may take: as much as a worker had."""

    cpus: int
    gpu: bool
    threads: int


def write_report(
    output: str, config: ReportConfig, machine: Machine, loop: LoopConfig, prepared: Prepared, settings: dict[str, Any]
) -> bool:
    """Write ``report.html`` beside the bundle of the run folder ``output``; whether that went well. Prints why not."""
    uri = storage.join(output, "report.html")
    try:
        run = _account(output, config, machine, loop, prepared, settings)
        storage.write_bytes(uri, training_report(run).encode())
    except Exception as error:  # whatever it is: the run has its bundle, and its worth does not depend on a page
        reason = (str(error).strip().splitlines() or [""])[-1]  # Ray says first where it came from
        say(f"warning: no {uri}: {type(error).__name__}: {reason}")
        return False
    say(f"report: {uri}")
    return True


def _account(
    output: str, config: ReportConfig, machine: Machine, loop: LoopConfig, prepared: Prepared, settings: dict[str, Any]
) -> TrainingRun:
    bundle, journal = storage.join(output, "bundle"), storage.join(output, "metrics.jsonl")
    lines = storage.read_bytes(journal).splitlines() if storage.exists(journal) else []
    labels = prepared.labels
    return TrainingRun(
        title=output.rstrip("/").rpartition("/")[2],
        bundle=storage.read_json(storage.join(bundle, "config.json"))["fingerprint"],
        step=storage.read_json(storage.join(bundle, "metrics.json"))["step"],
        documents=prepared.counts,
        curves=Curves.read(lines),
        held_out=_held_out(bundle, config, machine, loop, prepared),
        labels=label_bands(labels),
        named=len(labels.names) - labels.names.null_count,
        labelled=labels.n_documents,
        groups=len(prepared.groups),
        price=config.price,
        currency=config.currency,
        settings=settings,
    )


def label_bands(labels: LabelIndex) -> list[LabelBand]:
    """Labels by how many documents have them, in the bands of `metrics`."""
    metrics = Metrics.empty(labels.counts, labels.n_documents)
    n_labels = np.bincount(metrics.row_L, minlength=len(metrics.bands) + 1)[1:]
    occurrences = np.bincount(metrics.row_L, labels.counts, minlength=len(metrics.bands) + 1)[1:]
    rows = zip(metrics.bands, n_labels.tolist(), occurrences.astype(np.int64).tolist(), strict=True)
    return [LabelBand(*row) for row in rows]


# -- predictions ---------------------------------------------------------------------------------------------------------


def _held_out(bundle: str, config: ReportConfig, machine: Machine, loop: LoopConfig, prepared: Prepared) -> HeldOut | None:
    documents = prepared.counts["validation"]
    chunks = prepared.tokens.some("validation", config.documents)
    if not len(chunks):
        return None
    room = {"num_cpus": machine.cpus, "num_gpus": 1 if machine.gpu else 0}
    task = _find.options(**room)
    findings: Findings = ray.get(task.remote(bundle, prepared.tokens, chunks, machine, loop))
    index = prepared.labels
    mistakes = [_mistake(index, row, int(findings.truth_L[row.missed])) for row in findings.confusions(_MISTAKES)]
    shown = {
        right: [_document(example, index, prepared.tokenizer) for example in findings.examples(right=right)]
        for right in (True, False)
    }
    return HeldOut(
        documents=documents,
        predicted=findings.documents,
        metrics=findings.metrics.result(),
        reliability=findings.reliability,
        mistakes=mistakes,
        right=shown[True],
        wrong=shown[False],
    )


@ray.remote
def _find(bundle: str, tokens: TokenCache, chunks: IntArray, machine: Machine, loop: LoopConfig) -> Findings:
    """Predict some chunks of the held-out documents, one after the other, with the model of a bundle."""
    torch.set_num_threads(machine.threads or len(os.sched_getaffinity(0)))
    opened = load_bundle(bundle)
    model = opened.model.to("cuda" if machine.gpu else "cpu")
    findings = Findings(opened.labels, loop.seed)
    for chunk in tokens.chunks("validation", chunks):
        texts, truth = (chunk[name].combine_chunks() for name in ("tokens", "labels"))
        score_Dk, label_Dk = predict(model, texts, max(findings.metrics.ks), loop.prediction)
        scores = {"raw": score_Dk}
        if opened.calibration is not None:
            scores["calibrated"] = opened.calibration.calibrated(score_Dk, label_Dk)
        findings.update(texts, truth, label_Dk, scores)
    return findings


def _labels(index: LabelIndex, ids: list[int]) -> list[Label]:
    """Labels as people read them, in the order of their ``ids``."""
    places = pa.array(ids, pa.int64())
    columns = [pc.take(column, places).to_pylist() for column in (index.labels, index.names)]
    return [Label(*row) for row in zip(*columns, strict=True)]


def _mistake(index: LabelIndex, row: Confusion, of: int) -> Mistake:
    predicted, missed = _labels(index, [row.predicted, row.missed])
    return Mistake(predicted, missed, row.documents, of)


def _document(example: Example, index: LabelIndex, tokenizer: Tokenizer) -> Document:
    true, tags = set(example.truth), _labels(index, [label for label, _ in example.tags])
    shown = [(tag, score, label in true) for tag, (label, score) in zip(tags, example.tags, strict=True)]
    return Document(tokenizer.decode(example.tokens), _labels(index, example.truth), shown)
