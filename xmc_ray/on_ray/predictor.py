"""Actors that hold the model, or all models of an ensemble, and predict what tokenising tasks hand them."""

import os
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import ray.data
import torch
from ray.data import ActorPoolStrategy, TaskPoolStrategy

from xmc_ray.bundle.ensemble import Ensemble, agreement
from xmc_ray.data.labels import list_lengths
from xmc_ray.errors import ConfigError
from xmc_ray.model.lightxml import Scoring
from xmc_ray.model.predict import Precision, PredictConfig
from xmc_ray.on_ray.meters import PredictorMeters
from xmc_ray.on_ray.session import is_cluster
from xmc_ray.on_ray.stream import token_columns

_BESIDE = 2  # CPUs of a Ray on this machine that are left to the tasks beside the actors


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
    precision: Precision = "auto"
    """Arithmetic; auto is bfloat16 on a GPU and float32 on a CPU, bfloat16 is for CPUs that multiply in it."""
    int8: bool = False
    """Quantise the encoder to 8 bits, on CPUs; its cost in accuracy is printed."""


class Predictor:
    """An actor with the model or models, loaded once."""

    def __init__(self, bundles: list[str], k: int, pool: PoolConfig, scoring: ScoringConfig) -> None:
        torch.set_num_threads(pool.threads_each)
        self.k = k
        self.config = PredictConfig(token_budget=pool.token_budget, precision=scoring.precision)
        self.scoring: Scoring = "grouped" if scoring.scoring == "auto" else scoring.scoring
        self.device = torch.device("cuda" if pool.gpu else "cpu")
        self.ensemble = Ensemble.load(bundles).to(self.device)
        if scoring.int8:
            self.ensemble = self.ensemble.quantised()
        self.meters = PredictorMeters()

    def __call__(self, table: pa.Table) -> pa.Table:
        """Predict every row that has tokens of every tokenizer; the others get pads."""
        columns = token_columns(len(self.ensemble.tokenizers))
        tokens = [table[name].combine_chunks() for name in columns]
        scores, ids = np.zeros((len(table), self.k), np.float32), np.full((len(table), self.k), -1, np.int64)
        rows = np.flatnonzero(np.all([list_lengths(lists) > 0 for lists in tokens], axis=0))
        taken = [lists.take(pa.array(rows)) for lists in tokens]
        with self.meters.measured([list_lengths(lists) for lists in taken], self.config.tokens_at_once(self.device)):
            scores[rows], ids[rows] = self.ensemble.predict(taken, self.k, self.config, self.scoring)
        table = table.drop_columns(columns)
        table = table.append_column("ids", pa.FixedSizeListArray.from_arrays(pa.array(ids.ravel()), self.k))
        return table.append_column("probabilities", pa.FixedSizeListArray.from_arrays(pa.array(scores.ravel()), self.k))


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
    predicting, told = PredictConfig(token_budget=pool.token_budget, precision=config.precision), []
    ensemble = Ensemble.load(bundles).to("cuda" if pool.gpu else "cpu")
    tokens = ensemble.encode(pa.array(texts, pa.string()))
    scoring = config.scoring
    if scoring == "auto":
        scoring = ensemble.fastest_scoring(tokens, k, predicting)
        told.append(f"scoring: {scoring}, measured on {len(texts):,} documents")
    if config.int8 and texts:
        found = agreement(
            ensemble.predict(tokens, k, predicting, scoring), ensemble.quantised().predict(tokens, k, predicting, scoring)
        )
        told.append(
            f"int8: the best label stays the same for {found.best:.1%} of {len(texts):,} documents, "
            f"{found.overlap:.1%} of the {k} best"
        )
    return scoring, told


def _cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
