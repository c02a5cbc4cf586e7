"""Prometheus metrics of a night, exported by Ray on every node; Ray prefixes each name with ``ray_``."""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from ray.util import metrics
from ray.util.metrics import Counter, Histogram

from xmc_ray.data.labels import IntArray
from xmc_ray.metrics.calibration import SCORE_BINS
from xmc_ray.model.text import budget_batches

_SECONDS = [0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100]  # bounds of the histograms
_NO_DRIFT = 1e-9  # counters reject an increment of 0


class PredictorMeters:
    """Metrics of an actor."""

    def __init__(self) -> None:
        self._tokens = Counter("xmc_ray_tokens", "Tokens encoded, without padding")
        self._padding = Counter("xmc_ray_padding_tokens", "Padding tokens encoded")
        self._busy = Histogram("xmc_ray_batch_seconds", "Time an actor takes for a piece", boundaries=_SECONDS)
        self._idle = Histogram("xmc_ray_queue_wait_seconds", "Time an actor waits for a piece", boundaries=_SECONDS)
        self._since = time.monotonic()

    @contextmanager
    def measured(self, lengths: Sequence[IntArray], token_budget: int) -> Iterator[None]:
        """Context around a prediction; ``lengths``: tokens of each document, by each tokenizer."""
        started = time.monotonic()
        self._idle.observe(started - self._since)
        yield
        self._since = time.monotonic()
        self._busy.observe(self._since - started)
        tokens = int(sum(part.sum() for part in lengths))
        padded = sum(len(rows) * int(part[rows[0]]) for part in lengths for rows in budget_batches(part, token_budget))
        if tokens:
            self._tokens.inc(tokens)
        if padded > tokens:
            self._padding.inc(padded - tokens)


def count_piece(summary: Mapping[str, Any]) -> None:
    """Metrics of a finished piece, reported by the task that wrote it."""
    documents = metrics.Counter("xmc_ray_documents", "Documents done", tag_keys=("outcome",))
    for outcome in ("tagged", "reused", "rejected"):
        if summary[outcome]:
            documents.inc(summary[outcome], {"outcome": outcome})
    rejects = metrics.Counter("xmc_ray_rejects", "Documents rejected", tag_keys=("reason",))
    for reason, rows in summary["reasons"].items():
        rejects.inc(rows, {"reason": reason})
    tags = metrics.Counter("xmc_ray_tags", "Tags by the lower bound of their score", tag_keys=("score",))
    for place, rows in enumerate(summary["scores"]):
        if rows:
            tags.inc(rows, {"score": f"{place / SCORE_BINS:.2f}"})


def announce(drift: Mapping[str, float | None]) -> None:
    """Metrics of a finished night: when it finished, and the drift of its labels.

    They are counters, though each gets a single value: a node keeps exporting the counters of a process that has ended, but
    drops its gauges within seconds.
    """
    moved = metrics.Counter("xmc_ray_drift", "Drift (PSI) of a finished night's labels", tag_keys=("against",))
    for name, value in drift.items():
        if value is not None:
            moved.inc(max(value, _NO_DRIFT), {"against": name})
    metrics.Counter("xmc_ray_finished_seconds", "Unix time at which a night was finished").inc(time.time())
