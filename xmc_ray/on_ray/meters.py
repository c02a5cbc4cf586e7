"""What Prometheus hears of a night, through Ray's exporter on every node; Ray puts ``ray_`` before each name."""

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
_NO_DRIFT = 1e-9  # counters refuse to count nothing


class PredictorMeters:
    """What an actor tells Prometheus."""

    def __init__(self) -> None:
        self._tokens = Counter("xmc_ray_tokens", "Tokens encoded, without padding")
        self._padding = Counter("xmc_ray_padding_tokens", "Tokens of padding encoded")
        self._busy = Histogram("xmc_ray_batch_seconds", "Time of an actor for one batch", boundaries=_SECONDS)
        self._idle = Histogram("xmc_ray_queue_wait_seconds", "Time of an actor without a batch", boundaries=_SECONDS)
        self._since = time.monotonic()

    @contextmanager
    def measured(self, lengths: Sequence[IntArray], token_budget: int) -> Iterator[None]:
        """Around the prediction of documents of these lengths, by each tokenizer."""
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
    """What a task tells Prometheus of a piece that is done."""
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
    """Tell Prometheus of a night that is finished: when, and how far its labels have moved.

    As counters, though they only ever get one value: a node goes on exporting the counters of a process that has ended, but
    forgets its gauges within seconds.
    """
    moved = metrics.Counter("xmc_ray_drift", "Drift (PSI) of a finished night's labels", tag_keys=("against",))
    for name, value in drift.items():
        if value is not None:
            moved.inc(max(value, _NO_DRIFT), {"against": name})
    metrics.Counter("xmc_ray_finished_seconds", "Unix time at which a night was finished").inc(time.time())
