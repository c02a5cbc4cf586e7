"""What Prometheus hears of a night, exported by an actor on the head that outlives the night's driver.

Ray exports the gauges of a process while it sets them, and drops them within seconds after that. A driver ends with its night,
perhaps before anybody has asked for its last values, and one that is killed cannot say that it has failed. So the driver tells
this actor how the night goes; the actor keeps exporting it as long as the cluster lives, or until the next night of the same
output begins, and takes a driver that falls silent for dead.

They are gauges, not counters: Ray's counters cannot start at zero, and a series that starts at its last value has no increase.
This module imports little, since the actor's process does; `Board` is the driver's side.
"""

import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, Protocol

import ray
from ray.util.metrics import Gauge

Value = tuple[str, Mapping[str, str], float]  # name without its prefix, labels beside those of the night, value

_AGAIN = 5.0  # seconds after which gauges are set again
_SILENT = 60.0  # seconds after which a driver that says nothing is taken for dead
_FREE = 20.0  # seconds within which Ray frees the name of an actor that was killed
_NAMESPACE = "xmc_ray"
_HEAD = "node:__internal_head__"  # a resource that Ray gives the head: a node with an actor on it would never count as idle


class Board(Protocol):
    """Where a night's status is shown."""

    def tell(self, values: Sequence[Value], is_over: bool, seconds: float) -> None:
        """Show these values from now on, and wait at most so many seconds until they are."""


def gauges() -> dict[str, Gauge]:
    """All gauges by the names that values have."""
    night = ("output", "date")
    each = [
        Gauge("xmc_ray_phase", "1 for the phase that the night is in", tag_keys=(*night, "phase")),
        Gauge("xmc_ray_attempt", "Attempts at this night, with this one", tag_keys=night),
        Gauge("xmc_ray_rows", "Documents of the plan: all, and those to tag", tag_keys=(*night, "what")),
        Gauge("xmc_ray_documents", "Documents done, by any attempt", tag_keys=(*night, "outcome")),
        Gauge("xmc_ray_rejects", "Documents rejected", tag_keys=(*night, "reason")),
        Gauge("xmc_ray_tags", "Tags by the lower bound of their score", tag_keys=(*night, "score")),
        Gauge("xmc_ray_drift", "Drift (PSI) of the labels", tag_keys=(*night, "against")),
        Gauge("xmc_ray_left_seconds", "Seconds until all documents are tagged", tag_keys=night),
        Gauge("xmc_ray_storage_silent_seconds", "Seconds without an answer of storage; 0 if it answers", tag_keys=night),
        Gauge("xmc_ray_progress_seconds", "Unix time at which the night last got on", tag_keys=night),
        Gauge("xmc_ray_success_seconds", "Unix time at which the night was finished", tag_keys=night),
        Gauge("xmc_ray_failure_seconds", "Unix time at which the attempt failed", tag_keys=night),
        Gauge("xmc_ray_date_seconds", "Unix time at which the night's date begins", tag_keys=night),
    ]
    return {gauge.info["name"].removeprefix("xmc_ray_"): gauge for gauge in each}


class Exporter:
    """The actor: exports what it was told last."""

    def __init__(self, labels: Mapping[str, str]) -> None:
        self._labels, self._gauges = labels, gauges()
        self._values: Sequence[Value] = ()
        self._is_over, self._heard = False, time.monotonic()
        threading.Thread(target=self._live, name="exporter", daemon=True).start()

    def tell(self, values: Sequence[Value], is_over: bool) -> None:
        """What to export from now on; ``is_over``: nothing more will be said."""
        self._values, self._is_over, self._heard = values, is_over, time.monotonic()
        self._export()

    def _live(self) -> None:
        while True:
            time.sleep(_AGAIN)
            if not self._is_over and time.monotonic() - self._heard > _SILENT:
                self._values, self._is_over = lost(self._values, time.time()), True
            self._export()

    def _export(self) -> None:
        for name, labels, value in self._values:
            self._gauges[name].set(value, {**self._labels, **labels})


def lost(values: Sequence[Value], now: float) -> list[Value]:
    """The values of a night whose driver was lost: what it was doing has failed."""
    kept = [value for value in values if value[0] not in ("left_seconds", "phase")]
    phases = [(name, labels, float(labels["phase"] == "failed")) for name, labels, _ in values if name == "phase"]
    return [*phases, *kept, ("failure_seconds", {}, now)]


class ActorBoard:
    """A board that is an actor; it replaces the one that an earlier night, or attempt, of this name has left."""

    def __init__(self, name: str, labels: Mapping[str, str]) -> None:
        with suppress(ValueError):  # there is none
            ray.kill(ray.get_actor(name, namespace=_NAMESPACE))
        actor: Any = ray.remote(num_cpus=0, resources={_HEAD: 0.001})(Exporter)
        options: dict[str, Any] = {"name": name, "namespace": _NAMESPACE, "lifetime": "detached", "max_restarts": -1}
        give_up = time.monotonic() + _FREE
        while True:
            try:
                self._actor = actor.options(**options).remote(dict(labels))
                return
            except ValueError:  # the name is not free yet
                if time.monotonic() > give_up:
                    raise
                time.sleep(0.2)

    def tell(self, values: Sequence[Value], is_over: bool, seconds: float) -> None:
        """See `Board`."""
        told = self._actor.tell.remote(list(values), is_over)
        if seconds:
            ray.get(told, timeout=seconds)
