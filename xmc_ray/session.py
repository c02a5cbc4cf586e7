"""Joining a Ray cluster, or starting one on this machine; and getting our own errors back out of it."""

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import cast

import pyarrow as pa
import ray
import ray.data

from xmc_ray.errors import XmcError

_LOCAL_VARIABLES = {
    "PYTHONPATH": str(Path(__file__).parent.parent),  # workers find the library uninstalled, too
    # Threads that wait asleep. Spinning ones fight whatever else runs here: on 2 cores, one of them busy, training went at
    # 89 documents a second with the default and at 150 with this, on idle cores at 238 and 249.
    "OMP_WAIT_POLICY": "PASSIVE",
}
_LOCAL_CPUS = 6  # logical ones: a streaming plan of read, map, actor and write tasks stalls when it gets fewer


def connect() -> None:
    """Join the cluster that ``ray job submit`` or ``RAY_ADDRESS`` names, else start a quiet one on this machine."""
    # Blocks in the same order every time: the same catalogue gives the same files, the same seed the same batches.
    context = ray.data.DataContext.get_current()
    context.execution_options.preserve_order = True
    context.enable_progress_bars = sys.stderr.isatty()
    _hush()
    if ray.is_initialized():
        return
    if os.environ.get("RAY_ADDRESS"):
        ray.init()
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


def _hush() -> None:
    """Keep Ray Data's and Ray Train's running commentary off the terminal; their log files keep it, errors are raised."""
    for name in ("ray.data", "ray.train"):
        for handler in logging.getLogger(name).handlers:
            if isinstance(handler, logging.StreamHandler) and not isinstance(handler, logging.FileHandler):
                handler.setLevel(logging.CRITICAL)


def arrow_batches(stream: ray.data.DataIterator | ray.data.Dataset, rows: int | None = None) -> Iterator[pa.Table]:
    """The rows of a dataset as Arrow tables of ``rows`` rows, or block by block as they come."""
    for batch in stream.iter_batches(batch_format="pyarrow", batch_size=cast(int, rows)):
        yield cast(pa.Table, batch)


@contextmanager
def own_errors() -> Iterator[None]:
    """Raise the `XmcError` of a Ray worker as it was raised there, without the layers of wrapping around it."""
    try:
        yield
    except XmcError as error:
        # Ray's stand-in for a worker's exception is of its class, and says more than one line.
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
