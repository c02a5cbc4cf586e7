"""The report of a night: one self-contained HTML page that opens from a mail, from object storage and offline."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

import numpy as np
import pyarrow as pa

from xmc_ray.data.labels import IntArray
from xmc_ray.metrics.calibration import SCORE_BINS
from xmc_ray.metrics.drift import Drift, DriftConfig, worst
from xmc_ray.reports.charts import histogram
from xmc_ray.reports.render import Label, percent, render, share

_FREQUENT = 20
_VERDICTS = ("fail", "warn", "unknown", "steady")  # the gravest first


@dataclass(frozen=True, kw_only=True)
class Night:
    """What the report of a tagging run shows."""

    title: str
    """Name of the run."""
    manifest: Mapping[str, Any]
    """As ``manifest.json`` holds it: counts, times, reasons of rejects, the histogram of scores, settings."""
    labels: pa.Table
    """Columns ``label`` and ``name``, a row for each of the bundle's labels."""
    label_counts: IntArray
    """int64[L]: documents tagged with each label."""
    scores_before: Sequence[int] | None = None
    """The histogram of scores of the night before; left out if its bins differ from this night's."""
    drift_previous: Drift | None = None
    """Against the night before."""
    drift_training: Drift | None = None
    """Against the labels of the training documents."""
    bounds: DriftConfig = field(default_factory=DriftConfig)
    """Of both drifts."""
    samples: Sequence[Mapping[str, Any]] = ()
    """Documents with ``id``, ``text``, and ``labels``, ``names`` (or None) and ``scores`` of their tags, the best first."""
    warnings: Sequence[str] = ()


def tagging_report(night: Night) -> str:
    """The page, from ``<!doctype html>`` on; to be written in UTF-8."""
    manifest, drifts = night.manifest, (night.drift_previous, night.drift_training)
    verdicts = {night.bounds.verdict(drift.total) for drift in drifts if drift} | {"warn" if night.warnings else "steady"}
    before = night.scores_before if night.scores_before and len(night.scores_before) == SCORE_BINS else None
    frequent = np.argsort(-night.label_counts, kind="stable")[:_FREQUENT].tolist()
    shares = {name: share(manifest[name], manifest["in"]) for name in ("tagged", "reused", "rejected")}
    return render(
        "tagging.html.j2",
        **vars(night),
        started=datetime.fromisoformat(manifest["started"]),
        ended=datetime.fromisoformat(manifest["ended"]),
        verdict=next(verdict for verdict in _VERDICTS if verdict in verdicts),
        shares=shares,
        spoken_shares=", ".join(f"{name} {percent(part)}" for name, part in shares.items()),
        scores=histogram(manifest["scores"], before),
        frequent=[(label, int(night.label_counts[label])) for label in frequent if night.label_counts[label]],
        label=lambda label: Label(night.labels["label"][label].as_py(), night.labels["name"][label].as_py()),
        worst=worst,
    )
