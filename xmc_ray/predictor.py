"""Actors that hold the model, or all models of an ensemble, and predict what tokenising tasks hand them."""

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import ray
import ray.data
import torch
from ray.data import ActorPoolStrategy, TaskPoolStrategy
from ray.util.metrics import Counter, Histogram

from xmc_ray.ensemble import Ensemble, agreement
from xmc_ray.errors import ConfigError
from xmc_ray.labels import IntArray, list_lengths
from xmc_ray.loop import LoopConfig
from xmc_ray.model import Scoring
from xmc_ray.preparation import token_columns
from xmc_ray.session import is_cluster
from xmc_ray.text import budget_batches

_BESIDE = 2  # CPUs of a Ray on this machine that are left to the tasks beside the actors
_SECONDS = [0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100]  # bounds of the histograms


@dataclass(frozen=True, kw_only=True)
class PoolConfig:
    """The actors that hold the model, or all models of an ensemble."""

    min: int = 1
    """Actors to start with."""
    max: int = 0
    """Actors at most; the pool grows towards it while documents wait. 0 is ``min`` on a cluster and in evaluation; a night on
    a machine by itself has as many as GPUs, or cores, keep busy."""
    gpu: bool = False
    """Give each actor a GPU."""
    cpus: int = 2
    """CPUs that an actor asks the cluster for; with 1 and no GPU, Ray would tokenise inside the actor, one after the other."""
    threads: int = 0
    """Threads of an actor on a CPU; 0 shares the machine's cores among ``max`` actors."""
    batch_rows: int = 2048
    """Documents that an actor takes at a time and sorts by length; in tagging it takes a whole piece."""
    token_budget: int = 0
    """Most tokens, padding included, that go through the encoder at once; 0 is 8,192 on a GPU and 2,048 on a CPU."""
    patience: float = 30.0
    """Minutes to wait for a cluster that has no room for ``min`` actors yet."""

    def __post_init__(self) -> None:
        if self.min < 1 or self.max < 0 or 0 < self.max < self.min:
            found = f"min {self.min}, max {self.max}"
            raise ConfigError("pool sizes do not fit", found=found, expected="1 <= min <= max, or max 0")
        if self.cpus < 1 or self.threads < 0:
            found = f"cpus {self.cpus}, threads {self.threads}"
            raise ConfigError("an actor's share does not fit", found=found, expected="at least 1 CPU, 0 or more threads")

    def settled(self) -> "PoolConfig":
        """With the number of actors in the place of ``max`` = 0; Ray has to run.

        Two actors with a thread each do more than one with two, whose threads wait for each other.
        """
        if self.max:
            return self
        if is_cluster():
            return replace(self, max=self.min)
        there = ray.cluster_resources()
        kept_busy = int(there.get("GPU", 0)) if self.gpu else _cores() // max(1, self.threads)
        return replace(self, max=max(self.min, min(kept_busy, int(there["CPU"] - _BESIDE) // self.cpus)))

    @property
    def threads_each(self) -> int:
        """Threads of an actor; ``max`` is settled."""
        return self.threads or max(1, _cores() // self.max)

    @property
    def tokens_at_once(self) -> int:
        """The token budget. On CPUs a large one is slower, by caches and by padding: there are few batches in a piece."""
        return self.token_budget or (8192 if self.gpu else 2048)

    @property
    def needs(self) -> dict[str, float]:
        """What an actor takes of the cluster."""
        return {"CPU": float(self.cpus)} | ({"GPU": 1.0} if self.gpu else {})

    @property
    def resources(self) -> dict[str, Any]:
        """What Ray is asked for: actors, and CPUs and GPUs of each."""
        strategy = ActorPoolStrategy(min_size=self.min, max_size=self.max)
        return {"compute": strategy, "num_cpus": self.cpus, "num_gpus": 1 if self.gpu else 0}

    def beside(self, cpus: float) -> dict[str, Any]:
        """What Ray is asked for by tasks that take ``cpus`` and feed the actors, or take away what they have done.

        Ray Data gives each stage an equal share of a cluster's CPUs, whatever it needs, and a pool on CPUs does not grow beyond
        its own. So there its neighbours have at most a task for each actor, and the rest is for the actors.
        """
        return {} if self.gpu else {"compute": TaskPoolStrategy(size=max(2, self.max)), "num_cpus": cpus}


@dataclass(frozen=True, kw_only=True)
class ScoringConfig:
    """How an actor computes; it changes the scores."""

    scoring: Literal["grouped", "exact", "auto"] = "grouped"
    """grouped ranks the labels of the best groups, exact ranks all labels; auto takes exact where it is as fast."""
    int8: bool = False
    """Quantise the encoder to 8 bits, on CPUs; its cost in accuracy is printed."""


class Predictor:
    """An actor with the model or models, loaded once."""

    def __init__(self, bundles: list[str], k: int, pool: PoolConfig, scoring: ScoringConfig) -> None:
        torch.set_num_threads(pool.threads_each)
        self.k = k
        self.loop = LoopConfig(token_budget=pool.tokens_at_once)
        self.scoring: Scoring = "grouped" if scoring.scoring == "auto" else scoring.scoring
        self.ensemble = Ensemble.load(bundles).to("cuda" if pool.gpu else "cpu")
        if scoring.int8:
            self.ensemble = self.ensemble.quantised()
        self.meters = _Meters()

    def __call__(self, table: pa.Table) -> pa.Table:
        """Predict every row that has tokens of every tokenizer; the others get pads."""
        columns = token_columns(len(self.ensemble.tokenizers))
        tokens = [table[name].combine_chunks() for name in columns]
        scores, ids = np.zeros((len(table), self.k), np.float32), np.full((len(table), self.k), -1, np.int64)
        rows = np.flatnonzero(np.all([list_lengths(lists) > 0 for lists in tokens], axis=0))
        taken = [lists.take(pa.array(rows)) for lists in tokens]
        with self.meters.measured([list_lengths(lists) for lists in taken], self.loop.token_budget):
            scores[rows], ids[rows] = self.ensemble.predict(taken, self.k, self.loop, self.scoring)
        table = table.drop_columns(columns)
        table = table.append_column("ids", pa.FixedSizeListArray.from_arrays(pa.array(ids.ravel()), self.k))
        return table.append_column("probabilities", pa.FixedSizeListArray.from_arrays(pa.array(scores.ravel()), self.k))


class _Meters:
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


def predictions(
    tokenised: ray.data.Dataset, bundles: list[str], k: int, pool: PoolConfig, model: ScoringConfig | None = None
) -> ray.data.Dataset:
    """``ids`` (fixed list<int64>[k], -1 pads) and ``probabilities`` (list<float32>[k]) in the place of a stream's tokens."""
    return tokenised.map_batches(
        Predictor,
        fn_constructor_args=(bundles, k, pool, model or ScoringConfig()),
        batch_format="pyarrow",
        batch_size=pool.batch_rows,
        **pool.resources,
    )


def matrix(table: pa.Table, name: str) -> npt.NDArray[Any]:
    """A column of lists of one fixed size as an array, rows by values; also of a table without rows."""
    column = table[name]
    return np.asarray(column.combine_chunks().flatten()).reshape(len(table), column.type.list_size)


def settle_scoring(config: ScoringConfig, bundles: list[str], texts: list[str], k: int, pool: PoolConfig) -> ScoringConfig:
    """The scoring of a whole night, settled by an actor's measurement on some ``texts`` where the config asks for one.

    Prints what was chosen, and what int8 costs.
    """
    if not texts or (config.scoring != "auto" and not config.int8):
        return config
    resources = {"num_cpus": pool.cpus, "num_gpus": 1 if pool.gpu else 0}
    scoring, told = ray.get(_measure.options(**resources).remote(config, bundles, texts, k, pool))
    for line in told:
        print(line, flush=True)
    return replace(config, scoring=scoring)


@ray.remote
def _measure(
    config: ScoringConfig, bundles: list[str], texts: list[str], k: int, pool: PoolConfig
) -> tuple[Literal["grouped", "exact"], list[str]]:
    torch.set_num_threads(pool.threads_each)
    loop, told = LoopConfig(token_budget=pool.tokens_at_once), []
    ensemble = Ensemble.load(bundles).to("cuda" if pool.gpu else "cpu")
    tokens = ensemble.encode(pa.array(texts, pa.string()))
    scoring = config.scoring
    if scoring == "auto":
        scoring = ensemble.fastest_scoring(tokens, k, loop)
        told.append(f"scoring: {scoring}, measured on {len(texts):,} documents")
    if config.int8 and texts:
        found = agreement(ensemble.predict(tokens, k, loop, scoring), ensemble.quantised().predict(tokens, k, loop, scoring))
        told.append(
            f"int8: the best label stays the same for {found.best:.1%} of {len(texts):,} documents, "
            f"{found.overlap:.1%} of the {k} best"
        )
    return scoring, told


def _cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
