"""The end of a training run: the model predicts the held-out documents once more, for ``report.html``.

The bundle is written first, and a report that cannot be made is only a warning: it never fails a finished training.
"""

import os
from dataclasses import dataclass
from typing import Any

import ray
import torch

from xmc_ray import storage
from xmc_ray.bundle.folder import load_bundle
from xmc_ray.data.labels import IntArray
from xmc_ray.data.token_cache import TokenCache
from xmc_ray.metrics.confusion import Findings
from xmc_ray.model.predict import predict
from xmc_ray.on_ray.train.journal import say
from xmc_ray.on_ray.train.prepare import Prepared
from xmc_ray.reports.curves import Curves
from xmc_ray.reports.training import TrainingRun, training_report
from xmc_ray.settings import NonNegativeInt, Settings
from xmc_ray.training.loop import LoopConfig


@dataclass(frozen=True, kw_only=True)
class ReportConfig(Settings):
    """The report of a finished run."""

    documents: NonNegativeInt = 100_000
    """Maximum number of held-out documents to predict for it, rounded up to chunks of 4,096; 0 predicts none."""


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
        run = _collect(output, config, machine, loop, prepared, settings)
        storage.write_bytes(uri, training_report(run).encode())
    except Exception as error:  # any error: the run has its bundle, which does not depend on a page
        reason = (str(error).strip().splitlines() or [""])[-1]  # Ray says first where it came from
        say(f"warning: no {uri}: {type(error).__name__}: {reason}")
        return False
    say(f"report: {uri}")
    return True


def _collect(
    output: str, config: ReportConfig, machine: Machine, loop: LoopConfig, prepared: Prepared, settings: dict[str, Any]
) -> TrainingRun:
    bundle, journal = storage.join(output, "bundle"), storage.join(output, "metrics.jsonl")
    lines = storage.read_bytes(journal).splitlines() if storage.exists(journal) else []
    return TrainingRun(
        title=output.rstrip("/").rpartition("/")[2],
        bundle=storage.read_json(storage.join(bundle, "config.json"))["fingerprint"],
        step=storage.read_json(storage.join(bundle, "metrics.json"))["step"],
        documents=prepared.counts,
        curves=Curves.read(lines),
        findings=_held_out(bundle, config, machine, loop, prepared),
        labels=prepared.labels,
        groups=len(prepared.groups),
        text=prepared.tokenizer.decode,
        settings=settings,
    )


# -- predictions ---------------------------------------------------------------------------------------------------------


def _held_out(bundle: str, config: ReportConfig, machine: Machine, loop: LoopConfig, prepared: Prepared) -> Findings | None:
    chunks = prepared.tokens.some("validation", config.documents)
    if not len(chunks):
        return None
    task = _predict.options(num_cpus=machine.cpus, num_gpus=1 if machine.gpu else 0)
    findings: Findings = ray.get(task.remote(bundle, prepared.tokens, chunks, machine, loop))
    return findings


@ray.remote
def _predict(bundle: str, tokens: TokenCache, chunks: IntArray, machine: Machine, loop: LoopConfig) -> Findings:
    """Predict some chunks of the held-out documents, one at a time, with the model of a bundle."""
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
