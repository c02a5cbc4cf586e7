"""Joining a Ray cluster or starting one on this machine, waiting for room in it, and getting our own errors back from it."""

import logging
import os
import sys
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import cast

import pyarrow as pa
import ray.data
from ray.util.placement_group import placement_group, remove_placement_group

from xmc_ray.errors import ConfigError, XmcError

_LOCAL_VARIABLES = {
    "PYTHONPATH": str(Path(__file__).parents[2]),  # workers find the library even where it is not installed
    # Waiting threads sleep. Spinning ones fight whatever else runs here: on 2 cores, one of them busy, training made 89
    # documents a second with the default and 150 with this, on idle cores 238 and 249.
    "OMP_WAIT_POLICY": "PASSIVE",
}


_FIRST_LINE, _NEXT_LINE = 3.0, 30.0  # seconds to the first line while a cluster has no room, and between two lines
_LOCAL_CPUS = 6  # logical ones: a streaming plan of read, map, actor and write tasks stalls with fewer


def connect() -> None:
    """Join the cluster that ``ray job submit`` or ``RAY_ADDRESS`` names, else start a quiet one on this machine."""
    set_up_streams()
    _hush()
    if ray.is_initialized():
        return
    if is_cluster():
        ray.init(log_to_driver=False, logging_level=logging.WARNING)  # the dashboard has what workers print
        return
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # keep CUDA_VISIBLE_DEVICES for tasks without a GPU
    ray.init(
        address="local",
        num_cpus=max(_LOCAL_CPUS, os.cpu_count() or 1),
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.WARNING,
        runtime_env={"env_vars": _LOCAL_VARIABLES},
    )


def set_up_streams() -> None:
    """Settings of all streams that this process makes with Ray Data."""
    context = ray.data.DataContext.get_current()
    # With blocks in order, the same catalogue gives the same files and the same seed the same batches.
    context.execution_options.preserve_order = True
    context.raise_original_map_exception = True  # in Ray's wrapper an error of ours would lose its message on the way here
    context.enable_progress_bars = sys.stderr.isatty()


def is_cluster() -> bool:
    """Whether the job runs on an existing cluster, which may grow."""
    return bool(os.environ.get("RAY_ADDRESS"))


def check_room(what: str, count: int, needs: Mapping[str, float]) -> None:
    """ConfigError if a Ray started on this machine, which cannot grow, is too small for ``count`` times ``needs``."""
    if is_cluster():
        return
    total = ray.cluster_resources()
    for name in ("GPU", "CPU"):
        if count * needs.get(name, 0) > total.get(name, 0):
            raise ConfigError(
                f"too few {name}s here",
                found=f"{total.get(name, 0):.0f} {name}s, {count} {what} of {_in_words(needs)}",
                way_out=f"take fewer {what}, let each ask for less, or submit to a cluster",
            )


def make_room(what: str, count: int, needs: Mapping[str, float], minutes: float) -> None:
    """Wait until the cluster has room for ``count`` times ``needs``, which tells an autoscaler of the demand.

    Prints what is missing, soon and then every half minute. ConfigError if there is no room after ``minutes``.
    """
    check_room(what, count, needs)
    if not is_cluster():
        return
    wanted, pause = f"{count} {what} of {_in_words(needs)}", _FIRST_LINE
    group, give_up = placement_group([dict(needs)] * count), time.monotonic() + 60 * minutes
    try:
        while not group.wait(max(1.0, min(pause, give_up - time.monotonic()))):
            pause = _NEXT_LINE
            if time.monotonic() >= give_up:
                raise ConfigError(
                    f"the cluster has no room for the {what}",
                    found=f"{_cluster()} after {minutes:g} minutes",
                    expected=wanted,
                    way_out=f"take fewer {what}, let each ask for less, add nodes, or raise the setting 'patience'",
                )
            print(f"waiting for {wanted}; found {_cluster()}", flush=True)
    finally:
        remove_placement_group(group)


def _in_words(resources: Mapping[str, float]) -> str:
    return " and ".join(f"{amount:g} {name}" for name, amount in resources.items() if amount)


def _cluster() -> str:
    """The cluster's nodes, and what is free of its CPUs and GPUs."""
    nodes = sum(node["Alive"] for node in ray.nodes())
    total, free = ray.cluster_resources(), ray.available_resources()
    parts = [f"{free.get(name, 0):g} of {total.get(name, 0):g} {name}s free" for name in ("CPU", "GPU")]
    return f"{nodes} nodes, {', '.join(parts)}"


def _hush() -> None:
    """Keep Ray Data's and Ray Train's log messages off the terminal; their log files have them, and errors are raised."""
    warnings.filterwarnings("ignore", message="The maximum number of concurrent tasks", category=UserWarning)
    for name in ("ray.data", "ray.train"):
        for handler in logging.getLogger(name).handlers:
            if isinstance(handler, logging.StreamHandler) and not isinstance(handler, logging.FileHandler):
                handler.setLevel(logging.CRITICAL)


def arrow_batches(stream: ray.data.Dataset) -> Iterator[pa.Table]:
    """The rows of a dataset as Arrow tables, block by block."""
    return cast(Iterator[pa.Table], iter(stream.iter_batches(batch_format="pyarrow", batch_size=None)))


@contextmanager
def own_errors() -> Iterator[None]:
    """Raise the `XmcError` of a Ray worker as it was raised there, without Ray's wrappers."""
    try:
        yield
    except XmcError as error:
        # Ray's stand-in for a worker's exception has the same class, but a message of many lines.
        raise find_own(error) or error from None
    except Exception as error:
        own = find_own(error)
        if own is None:
            raise
        raise own from None


def find_own(error: BaseException) -> XmcError | None:
    """The `XmcError` at the bottom of an exception from Ray Core, Data or Train, if there is one."""
    failures = getattr(error, "worker_failures", None) or {}
    inner = [getattr(error, "cause", None), error.__cause__, *failures.values()]
    for candidate in inner:
        if isinstance(candidate, BaseException) and candidate is not error:
            found = find_own(candidate)
            if found is not None:
                return found
    is_stand_in = hasattr(error, "cause") and hasattr(error, "traceback_str")
    return error if isinstance(error, XmcError) and not is_stand_in else None
