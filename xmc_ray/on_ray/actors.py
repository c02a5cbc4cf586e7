"""Starts the actors that hold the model. `predictor`, and torch, are imported where they run: a driver needs neither."""

from dataclasses import replace
from typing import Any

import pyarrow as pa
import ray
import ray.data

from xmc_ray.bundle.members import Members
from xmc_ray.data.filters import LabelFilters
from xmc_ray.model.precision import cpu_has_bfloat16
from xmc_ray.on_ray.pool import PoolConfig, ScoringConfig
from xmc_ray.on_ray.session import is_cluster


def load_predictor(
    bundles: Members, k: int, pool: PoolConfig, scoring: ScoringConfig, filters: LabelFilters | None = None
) -> Any:
    """A `Predictor`, in the process that is to be its actor."""
    from xmc_ray.on_ray.predictor import Predictor

    return Predictor(bundles, k, pool, scoring, filters)


class _Predicting:
    """`load_predictor` as a class, which is what Ray Data takes for an actor."""

    def __init__(self, *arguments: Any) -> None:
        self.predict = load_predictor(*arguments)

    def __call__(self, table: pa.Table) -> Any:
        return self.predict(table)


def predictions(
    tokenised: ray.data.Dataset, bundles: Members, k: int, pool: PoolConfig, batch_rows: int, model: ScoringConfig
) -> ray.data.Dataset:
    """Replaces a stream's tokens by ``ids`` (fixed list<int64>[k], padded with -1) and ``probabilities`` (list<float32>[k]).

    k is ``k`` or the number of labels, if that is less. ``batch_rows``: documents that an actor takes at a time.
    """
    arguments = bundles, k, pool, model
    batches: dict[str, Any] = {"batch_format": "pyarrow", "batch_size": batch_rows}
    return tokenised.map_batches(_Predicting, fn_constructor_args=arguments, **batches, **pool.resources)


def settle_scoring(config: ScoringConfig, bundles: Members, texts: list[str], k: int, pool: PoolConfig) -> ScoringConfig:
    """``config`` with ``auto`` replaced by the scoring that a measurement of some ``texts`` on an actor's resources chooses.

    Prints the choice, and a warning for bfloat16 on CPUs without instructions for it.
    """
    resources = {"num_cpus": pool.cpus, "num_gpus": 1 if pool.gpu else 0}
    if config.precision == "bfloat16" and not pool.gpu and not _has_bfloat16(resources):
        print("warning: the CPU has no bfloat16 instructions: model.precision = float32 is faster", flush=True)
    if not texts or config.scoring != "auto":
        return config
    scoring = ray.get(_fastest_scoring.options(**resources).remote(config, bundles, texts, k, pool))
    print(f"scoring: {scoring}, measured on {len(texts):,} documents", flush=True)
    return replace(config, scoring=scoring)


def _has_bfloat16(resources: dict[str, Any]) -> bool:
    """Whether the CPU of an actor has it; on a cluster that may be another than here."""
    return bool(ray.get(ray.remote(cpu_has_bfloat16).options(**resources).remote())) if is_cluster() else cpu_has_bfloat16()


@ray.remote
def _fastest_scoring(*arguments: Any) -> str:
    from xmc_ray.on_ray.predictor import fastest_scoring

    return fastest_scoring(*arguments)
