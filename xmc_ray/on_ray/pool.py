"""How many actors hold the model, what each of them has, and how they compute."""

import os
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

import ray
from ray.data import ActorPoolStrategy

from xmc_ray.errors import ConfigError
from xmc_ray.model.precision import Precision
from xmc_ray.on_ray.session import is_cluster
from xmc_ray.settings import Bounds, NonNegativeFloat, NonNegativeInt, PositiveInt, Settings

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
    def device(self) -> str:
        """The kind of device of an actor, in torch's words."""
        return "cuda" if self.gpu else "cpu"

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


def _cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
