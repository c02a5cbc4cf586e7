"""Actors that hold the model, or all models of an ensemble, and predict tokenised documents."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import ray.data
import torch

from xmc_ray.bundle.ensemble import Ensemble, Members
from xmc_ray.data.filters import LabelFilters
from xmc_ray.data.labels import IntArray, list_lengths
from xmc_ray.model.lightxml import Scoring
from xmc_ray.model.predict import Precision, PredictConfig, cpu_has_bfloat16
from xmc_ray.on_ray.meters import PredictorMeters
from xmc_ray.on_ray.pool import PoolConfig
from xmc_ray.on_ray.predicted import made_by, with_predictions
from xmc_ray.on_ray.stream import token_columns
from xmc_ray.settings import Settings


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
        self.device = torch.device(pool.device)
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


def predictions(
    tokenised: ray.data.Dataset, bundles: Members, k: int, pool: PoolConfig, batch_rows: int, model: ScoringConfig
) -> ray.data.Dataset:
    """Replaces a stream's tokens by ``ids`` (fixed list<int64>[k], padded with -1) and ``probabilities`` (list<float32>[k]).

    k is ``k`` or the number of labels, if that is less. ``batch_rows``: documents that an actor takes at a time.
    """
    arguments = bundles, k, pool, model
    batches: dict[str, Any] = {"batch_format": "pyarrow", "batch_size": batch_rows}
    return tokenised.map_batches(Predictor, fn_constructor_args=arguments, **batches, **pool.resources)


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
