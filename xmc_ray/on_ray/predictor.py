"""Actors that hold the model, or all models of an ensemble, and predict tokenised documents."""

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import ray.data
import torch
from ray.data import ActorPoolStrategy

from xmc_ray import __version__
from xmc_ray.bundle.ensemble import Ensemble, Members
from xmc_ray.data.filters import LabelFilters
from xmc_ray.data.labels import IntArray, list_lengths
from xmc_ray.errors import ConfigError
from xmc_ray.model.lightxml import Scoring
from xmc_ray.model.predict import Precision, PredictConfig, cpu_has_bfloat16
from xmc_ray.on_ray.meters import PredictorMeters
from xmc_ray.on_ray.session import is_cluster
from xmc_ray.on_ray.stream import token_columns
from xmc_ray.settings import Bounds, NonNegativeFloat, NonNegativeInt, PositiveInt, Settings

_MADE_BY = b"made_by"  # key of a predicted table's metadata
_BESIDE = 2  # CPUs of a local Ray that are left to the tasks that run beside the actors


@dataclass(frozen=True, kw_only=True)
class PoolConfig(Settings):
    """The actors that hold the model, or all models of an ensemble."""

    min: PositiveInt = 1
    """Actors to start with."""
    max: NonNegativeInt = 0
    """Maximum number of actors; the pool grows towards it while documents wait. 0 is ``min`` on a cluster and in evaluation; a
    night on a single machine has as many as keep its GPUs, or cores, busy."""
    gpu: bool = False
    """Give each actor a GPU."""
    cpus: PositiveInt = 2
    """CPUs that an actor requests; with 1 and no GPU, Ray would tokenise inside the actor, sequentially."""
    threads: Annotated[int, Bounds(ge=0, le=1024)] = 0
    """Threads of an actor on a CPU; 0 shares the machine's cores among ``max`` actors."""
    token_budget: Annotated[int, Bounds(ge=0, le=200_000)] = 0
    """Maximum number of tokens, padding included, in a batch of the encoder; 0 is 8,192 on a GPU and 2,048 on a CPU."""
    patience: NonNegativeFloat = 30.0
    """Minutes to wait for a cluster that has no room for ``min`` actors yet."""

    def check(self) -> None:
        """Raises ConfigError if ``max`` is set and below ``min``."""
        if 0 < self.max < self.min:
            raise ConfigError("pool.max is below pool.min", found=self.max, expected=f"at least {self.min}, or 0")

    def settled(self) -> "PoolConfig":
        """This config with ``max`` = 0 replaced by a number of actors; Ray has to run.

        Two actors with a thread each are faster than one with two threads, which wait for each other.
        """
        if self.max:
            return self
        if is_cluster():
            return replace(self, max=self.min)
        there = ray.cluster_resources()
        kept_busy = int(there.get("GPU", 0)) if self.gpu else _cores() // max(1, self.threads)
        return replace(self, max=max(self.min, min(kept_busy, int(there["CPU"] - _BESIDE) // self.cpus)))

    def beside_tasks(self) -> "PoolConfig":
        """This config with so few ``cpus`` that the first actors leave one of a single machine's to the tasks around them.

        A pipeline whose actors hold all CPUs waits for ever. ConfigError if even actors of one CPU would. A Ray of several
        nodes, or of none with CPUs yet, is taken for one that can grow.
        """
        count = int(ray.cluster_resources().get("CPU", 0))
        if count == 0 or is_cluster() or len(ray.nodes()) > 1:
            return self
        if count <= self.min:
            way_out = "start Ray with more, as in ray.init(num_cpus=6): more than there are cores will do"
            raise ConfigError("too few CPUs for a stage", found=count, expected=f"at least {self.min + 1}", way_out=way_out)
        return replace(self, cpus=min(self.cpus, (count - 1) // self.min))

    @property
    def threads_each(self) -> int:
        """Threads of an actor; ``max`` must not be 0."""
        return self.threads or max(1, _cores() // self.max)

    @property
    def device(self) -> torch.device:
        """The kind of device of an actor."""
        return torch.device("cuda" if self.gpu else "cpu")

    @property
    def needs(self) -> dict[str, float]:
        """The resources of an actor."""
        return {"CPU": float(self.cpus)} | ({"GPU": 1.0} if self.gpu else {})

    @property
    def resources(self) -> dict[str, Any]:
        """Arguments of `map_batches`: the number of actors, and the CPUs and GPUs of each."""
        strategy = ActorPoolStrategy(min_size=self.min, max_size=self.max)
        return {"compute": strategy, "num_cpus": self.cpus, "num_gpus": 1 if self.gpu else 0}


@dataclass(frozen=True, kw_only=True)
class ScoringConfig(Settings):
    """How an actor computes scores; it changes them."""

    scoring: Literal["grouped", "exact", "auto"] = "grouped"
    """grouped ranks the labels of the best groups, exact ranks all labels; auto uses exact where it is as fast."""
    precision: Precision = "auto"
    """Arithmetic; auto is bfloat16 on a GPU, and for a transformer on CPUs if the driver's has it."""


class Predictor:
    """An actor with the model or models, loaded once."""

    def __init__(
        self, bundles: Members, k: int, pool: PoolConfig, scoring: ScoringConfig, filters: LabelFilters | None = None
    ) -> None:
        torch.set_num_threads(pool.threads_each)
        self.config = PredictConfig(token_budget=pool.token_budget, precision=scoring.precision)
        self.scoring: Scoring = "grouped" if scoring.scoring == "auto" else scoring.scoring
        self.device = pool.device
        self.ensemble = Ensemble.load(bundles).to(self.device)
        self.k = min(k, len(self.ensemble.labels))
        self.made_by = made_by(bundles.computed_by(scoring.precision, self.device))
        self.filters = filters
        self.meters = PredictorMeters()

    def __call__(self, table: pa.Table) -> pa.Table:
        """Predict every row that has tokens of every tokenizer; the others are padded with -1. The schema says by what."""
        columns = token_columns(len(self.ensemble.tokenizers))
        tokens = [table[name].combine_chunks() for name in columns]
        scores, ids = np.zeros((len(table), self.k), np.float32), np.full((len(table), self.k), -1, np.int64)
        rows = np.flatnonzero(np.all([list_lengths(lists) > 0 for lists in tokens], axis=0))
        taken = [lists.take(pa.array(rows)) for lists in tokens]
        filters = None if self.filters is None else self.filters.of_documents(_filter_names(table, rows), len(rows))
        with self.meters.measured([list_lengths(lists) for lists in taken], self.config.tokens_at_once(self.device)):
            scores[rows], ids[rows] = self.ensemble.predict(taken, self.k, self.config, self.scoring, filters)
        return with_predictions(table.drop_columns(columns), ids, scores, self.made_by)


def _filter_names(table: pa.Table, rows: IntArray) -> pa.Array | None:
    """The names of the filters of some rows; None if the documents name none."""
    return table["filter"].combine_chunks().take(pa.array(rows)) if "filter" in table.column_names else None


@dataclass(frozen=True)
class NothingToPredict:
    """In place of a `Predictor` of ``k`` labels where every row is a reject: no model is loaded."""

    n_tokenizers: int
    k: int
    made_by: Mapping[str, str]

    def __call__(self, table: pa.Table) -> pa.Table:
        """All rows are padded with -1. ValueError for a row that is no reject."""
        if table["reason"].null_count:
            raise ValueError("a document to tag, and no model")
        shape = len(table), self.k
        table = table.drop_columns(token_columns(self.n_tokenizers))
        return with_predictions(table, np.full(shape, -1, np.int64), np.zeros(shape, np.float32), self.made_by)


def with_predictions(table: pa.Table, ids: IntArray, scores: npt.NDArray[np.float32], made_by: Mapping[str, str]) -> pa.Table:
    """A table with its predictions; its schema says what has made them."""
    for name, values in (("ids", ids), ("probabilities", scores)):
        table = table.append_column(name, pa.FixedSizeListArray.from_arrays(pa.array(values.ravel()), values.shape[1]))
    return table.replace_schema_metadata({_MADE_BY: json.dumps(dict(made_by))})


def made_by(computed_by: Iterable[str]) -> dict[str, str]:
    """What computes here, with the arithmetic of each model: tags of two releases, or by two arithmetics, may differ."""
    return {"release": __version__, "arithmetic": ", ".join(sorted(set(computed_by)))}


def made_by_of(table: pa.Table) -> dict[str, str]:
    """What computed a table that a `Predictor` has returned."""
    return dict(json.loads((table.schema.metadata or {}).get(_MADE_BY, b"{}")))


def predictions(
    tokenised: ray.data.Dataset, bundles: Members, k: int, pool: PoolConfig, batch_rows: int, model: ScoringConfig
) -> ray.data.Dataset:
    """Replaces a stream's tokens by ``ids`` (fixed list<int64>[k], padded with -1) and ``probabilities`` (list<float32>[k]).

    k is ``k`` or the number of labels, if that is less. ``batch_rows``: documents that an actor takes at a time.
    """
    arguments = bundles, k, pool, model
    batches: dict[str, Any] = {"batch_format": "pyarrow", "batch_size": batch_rows}
    return tokenised.map_batches(Predictor, fn_constructor_args=arguments, **batches, **pool.resources)


def matrix(table: pa.Table, name: str) -> npt.NDArray[Any]:
    """A column of fixed-size lists as an array [rows, size], also of a table without rows."""
    column = table[name]
    return np.asarray(column.combine_chunks().flatten()).reshape(len(table), column.type.list_size)


def settle_scoring(config: ScoringConfig, bundles: Members, texts: list[str], k: int, pool: PoolConfig) -> ScoringConfig:
    """``config`` with ``auto`` replaced by the scoring that a measurement of some ``texts`` on an actor's resources chooses.

    Prints the choice, and a warning for bfloat16 on CPUs without instructions for it.
    """
    resources = {"num_cpus": pool.cpus, "num_gpus": 1 if pool.gpu else 0}
    if config.precision == "bfloat16" and not pool.gpu and not ray.get(_cpu_has_bfloat16.options(**resources).remote()):
        print("warning: the CPU has no bfloat16 instructions: model.precision = float32 is faster", flush=True)
    if not texts or config.scoring != "auto":
        return config
    scoring: Scoring = ray.get(_fastest_scoring.options(**resources).remote(config, bundles, texts, k, pool))
    print(f"scoring: {scoring}, measured on {len(texts):,} documents", flush=True)
    return replace(config, scoring=scoring)


_cpu_has_bfloat16 = ray.remote(cpu_has_bfloat16)


@ray.remote
def _fastest_scoring(config: ScoringConfig, bundles: Members, texts: list[str], k: int, pool: PoolConfig) -> Scoring:
    torch.set_num_threads(pool.threads_each)
    ensemble = Ensemble.load(bundles).to(pool.device)
    prediction = PredictConfig(token_budget=pool.token_budget, precision=config.precision)
    k = min(k, len(ensemble.labels))
    return ensemble.fastest_scoring(ensemble.encode(pa.array(texts, pa.string())), k, prediction)


def _cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
