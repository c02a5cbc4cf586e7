"""Actors that hold the model, or all models of an ensemble, and predict tokenised documents."""

import numpy as np
import pyarrow as pa
import torch

from xmc_ray.bundle.ensemble import Ensemble
from xmc_ray.bundle.members import Members
from xmc_ray.data.filters import LabelFilters
from xmc_ray.data.labels import IntArray, list_lengths
from xmc_ray.model.lightxml import Scoring
from xmc_ray.model.predict import PredictConfig
from xmc_ray.on_ray.meters import PredictorMeters
from xmc_ray.on_ray.pool import PoolConfig, ScoringConfig
from xmc_ray.on_ray.predicted import made_by, with_predictions
from xmc_ray.on_ray.stream import token_columns


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
        self.made_by = made_by(bundles.computed_by(scoring.precision, pool.device))
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


def fastest_scoring(config: ScoringConfig, bundles: Members, texts: list[str], k: int, pool: PoolConfig) -> Scoring:
    """`Ensemble.fastest_scoring` for ``texts``, measured in this process with the resources of an actor."""
    torch.set_num_threads(pool.threads_each)
    ensemble = Ensemble.load(bundles).to(pool.device)
    prediction = PredictConfig(token_budget=pool.token_budget, precision=config.precision)
    k = min(k, len(ensemble.labels))
    return ensemble.fastest_scoring(ensemble.encode(pa.array(texts, pa.string())), k, prediction)
