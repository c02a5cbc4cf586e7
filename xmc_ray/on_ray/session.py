"""Joining a Ray cluster or starting one on this machine, waiting for room in it, and getting our own errors back from it."""

import json
import logging
import os
import site
import socket
import sys
import sysconfig
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, cast

import pyarrow as pa
import ray.data
from ray import exceptions
from ray.util.placement_group import placement_group, remove_placement_group

from xmc_ray import exits
from xmc_ray.errors import ConfigError, UnavailableError, XmcError
from xmc_ray.on_ray.terminal import without_lines_of_ray

_FIRST_LINE, _NEXT_LINE = 3.0, 30.0  # seconds to the first line while a cluster has no room, and between two lines
_LONGEST = 400  # characters of a message of Ray's
_ANSWER = 20.0  # seconds for which a cluster that does not answer is waited for
_SETTINGS = bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])  # an empty frame of HTTP/2, with one of whose kind gRPC greets
_LOCAL_CPUS = 6  # logical ones: a streaming plan of read, map, actor and write tasks stalls with fewer


def connect() -> None:
    """Join the cluster that ``ray job submit`` or ``RAY_ADDRESS`` names, else start a quiet one on this machine.

    Raises UnavailableError if no cluster answers there, ConfigError if it refuses or if none can be started.
    """
    set_up_streams()
    _hush()
    if ray.is_initialized():
        return
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.WARNING}  # the dashboard has what workers print
    if is_cluster():
        address = os.environ["RAY_ADDRESS"]
        _check_answer(address)
        _init("cannot join the Ray cluster", address, "check RAY_ADDRESS, or unset it to use this machine", options)
        return
    os.environ.setdefault("RAY_worker_niceness", "0")  # Ray's 15 would leave a job 3 % of a core that another program wants
    os.environ.setdefault("RAY_prestart_worker_first_driver", "0")  # else workers start that nobody needs
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # keep CUDA_VISIBLE_DEVICES for tasks without a GPU
    options |= {"address": "local", "num_cpus": max(_LOCAL_CPUS, os.cpu_count() or 1), "include_dashboard": False}
    options["_temp_dir"] = folder = _files_folder()
    own = str(Path(__file__).parents[2])  # first, so that all processes have this library, where Python does not look anyway
    paths = None if own in site_folders() else own, os.environ.get("PYTHONPATH")
    # Waiting threads sleep. Spinning ones fight whatever else runs here: on 2 cores, one of them busy, training made 89
    # documents a second with the default and 150 with this, on idle cores 238 and 249.
    with environment({"PYTHONPATH": os.pathsep.join(filter(None, paths)), "OMP_WAIT_POLICY": "PASSIVE"}):
        _init("cannot start Ray on this machine", folder, "logs/ in the newest session there may say more", options)


@contextmanager
def environment(variables: Mapping[str, str]) -> Iterator[None]:
    """These variables for processes that are started meanwhile, which inherit them: for a `runtime_env` they would wait."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def site_folders() -> set[str]:
    """Where what is installed lies, which every Python looks through last."""
    return {*site.getsitepackages(), site.getusersitepackages(), *(sysconfig.get_path(name) for name in ("purelib", "platlib"))}


def _init(what: str, where: str, way_out: str, options: Mapping[str, Any]) -> None:
    if exits.in_job():
        exits.end_with(without_lines_of_ray())  # after `ray.shutdown`
    try:
        with exits.keep_signals():
            ray.init(**options)
    except Exception as error:  # of many kinds, and none is our bug
        known = exits.own(error) if not isinstance(error, ConnectionError | TimeoutError) else None
        found = known or str(error).strip().partition("\n")[0] or type(error).__name__
        raise ConfigError(what, where=where, found=found, way_out=way_out) from None
    exits.end_with(ray.shutdown)  # it prints what has failed in its own processes, some of it late


def _check_answer(address: str) -> None:
    """UnavailableError if nothing like Ray answers at ``host:port``: Ray itself tries for minutes."""
    host, _, port = address.rpartition(":")
    if not port.isdigit() or "/" in host:
        return
    try:
        with socket.create_connection((host.strip("[]"), int(port)), _ANSWER) as connection:
            if os.environ.get("RAY_USE_TLS", "0") == "0":
                connection.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + _SETTINGS)
                if connection.recv(4, socket.MSG_WAITALL)[3:] != _SETTINGS[3:4]:
                    raise ConnectionError("what answers there is not Ray")
    except (OSError, OverflowError) as error:
        way_out = "start the cluster, correct RAY_ADDRESS, or unset it to use this machine"
        raise UnavailableError("no Ray cluster at this address", where=address, found=error, way_out=way_out) from None


def _files_folder() -> str:
    """The folder of a local Ray's files: Ray's default, or this user's own where that one belongs to somebody else."""
    default = os.path.join(os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp", "ray")
    if not os.path.isdir(default) or os.access(default, os.W_OK | os.X_OK):
        return default
    own = f"{default}-{os.getuid()}"  # short: sockets lie below it, and the path of one has at most 107 bytes
    with suppress(OSError):
        os.makedirs(own, mode=0o700, exist_ok=True)
        if os.lstat(own).st_uid == os.getuid() and os.access(own, os.W_OK | os.X_OK):
            return own
    way_out = "set RAY_TMPDIR to a short path of yours"
    raise ConfigError("the folder for Ray's files belongs to somebody else", where=default, way_out=way_out)


def set_up_streams() -> None:
    """Settings of all streams that this process makes with Ray Data."""
    context = ray.data.DataContext.get_current()
    # With blocks in order, the same catalogue gives the same files and the same seed the same batches.
    context.execution_options.preserve_order = True
    context.raise_original_map_exception = True  # in Ray's wrapper an error of ours would lose its message on the way here
    context.enable_progress_bars = sys.stderr.isatty()


def is_cluster() -> bool:
    """Whether the job runs on an existing cluster, which may grow."""
    return os.environ.get("RAY_ADDRESS", "") not in ("", "local")


def submission_id() -> str | None:
    """The name by which `ray job stop` knows this driver, if it was started by `ray job submit`."""
    try:
        return str(json.loads(os.environ["RAY_JOB_CONFIG_JSON_ENV_VAR"])["metadata"]["job_submission_id"])
    except (KeyError, ValueError, TypeError):
        return None


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


def make_room(what: str, count: int, needs: Mapping[str, float], minutes: float, beside: int = 0) -> None:
    """Wait until the cluster has room for ``count`` times ``needs``, which tells an autoscaler of the demand.

    ``beside``: CPUs for tasks that work with them, and without which they would wait for ever.

    Prints what is missing, soon and then every half minute. ConfigError if there is no room after ``minutes``.
    """
    check_room(what, count, needs)
    if not is_cluster():
        return
    wanted, pause = f"{count} {what} of {_in_words(needs)}", _FIRST_LINE
    wanted += f" and {beside} CPU for the tasks beside them" if beside else ""
    bundles = [dict(needs)] * count + [{"CPU": 1.0}] * beside
    group, give_up = placement_group(bundles), time.monotonic() + 60 * minutes
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
    """Keep log messages of Ray off the terminal; its log files have them, and errors are raised."""
    os.environ.setdefault("RAY_IGNORE_UNHANDLED_ERRORS", "1")  # of tasks beside the one whose error ends the job
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
    """Raise the `XmcError` of a Ray worker as it was raised there, without Ray's wrappers, and one for what befalls Ray."""
    try:
        yield
    except XmcError as error:
        # Ray's stand-in for a worker's exception has the same class, but a message of many lines.
        raise find_own(error) or error from None
    except Exception as error:
        own = find_own(error) or _of_ray(error)
        if own is None:
            raise
        raise own from None


def find_own(error: BaseException) -> XmcError | None:
    """The `XmcError` at the bottom of an exception from Ray Core, Data or Train, if there is one.

    What the system has refused to a worker counts as one (see `exits.own`).
    """
    is_stand_in = isinstance(error, exceptions.RayError) or (hasattr(error, "cause") and hasattr(error, "traceback_str"))
    if isinstance(error, XmcError) and not is_stand_in:
        return error  # and not what has caused it, such as the OSError behind "encoder not found"
    for inner in _inside(error):
        found = find_own(inner)
        if found is not None:
            return found
    return None if is_stand_in else exits.own(error)


def _inside(error: BaseException) -> list[BaseException]:
    """The exceptions that one of Ray's wraps."""
    named = (getattr(error, name, None) for name in ("cause", "controller_failure", "health_check_failure", "__cause__"))
    candidates = [*named, *(getattr(error, "worker_failures", None) or {}).values(), *error.args]
    return [inner for inner in candidates if isinstance(inner, BaseException) and inner is not error]


_AGAIN = "run the same command again, which resumes"
_LOST = (
    *(exceptions.LocalRayletDiedError, exceptions.WorkerCrashedError, exceptions.RayActorError, exceptions.NodeDiedError),
    *(exceptions.ObjectLostError, exceptions.RpcError, exceptions.TaskUnschedulableError, exceptions.ActorUnschedulableError),
    *(exceptions.TaskPlacementGroupRemoved, exceptions.ActorPlacementGroupRemoved),
)
_LOST_IN_TRAIN = (
    "WorkerHealthCheckTimeoutError",
    "WorkerGroupStartupFailedError",
    "BroadcastCollectiveTimeoutError",
)  # not public
# What happens to processes and machines, and the way out. Other errors of Ray are bugs.
_RAY: list[tuple[Any, str, str]] = [
    (exceptions.OutOfMemoryError, "a machine has run out of memory", "take fewer or smaller processes, or larger machines"),
    (exceptions.OutOfDiskError, "Ray has no room left for its files", "make room, or set RAY_TMPDIR to another folder"),
    (exceptions.ObjectStoreFullError, "Ray's object store is full", "take smaller batches or fewer processes, or more memory"),
    (exceptions.RuntimeEnvSetupError, "Ray cannot set up its processes", "check runtime_env"),
    (exceptions.AuthenticationError, "the Ray cluster refuses", "give the cluster's token; see RAY_AUTH_MODE"),
    (exceptions.TaskCancelledError, "a task was cancelled", _AGAIN),
    (_LOST, "Ray has lost a process, a machine or an object", _AGAIN),
]


def _of_ray(error: BaseException) -> XmcError | None:
    """One of our errors for what has befallen Ray; None for an exception that a worker's code has raised, which is a bug."""
    inner = _inside(error)
    if inner or isinstance(error, exceptions.RayTaskError):
        return next((own for own in map(_of_ray, inner) if own is not None), None)
    for kind, what, way_out in _RAY:
        if isinstance(error, kind) or (type(error).__name__ in _LOST_IN_TRAIN and kind is _LOST):
            text = (" ".join(str(error).split()) or type(error).__name__)[:_LONGEST]
            full = exits.full_folders()  # in which processes die without a word
            return exits.no_room(full, text) if full else UnavailableError(what, found=text, way_out=way_out)
    return None
