"""Prometheus metrics of an actor that predicts, exported by Ray on its node; Ray prefixes each name with ``ray_``.

An actor lives as long as a night tags, so its counters grow and have a rate. What a night has done is counted by its driver
(see `tag.gauges`), since tasks come and go, each with series of its own.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from ray.util.metrics import Counter, Histogram

from xmc_ray.data.labels import IntArray
from xmc_ray.model.batch import budget_batches

_SECONDS = [0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100]  # bounds of the histograms


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
