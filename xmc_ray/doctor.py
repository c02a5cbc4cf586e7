"""What a machine has for these jobs, and what will be slow or fail there."""

import os
import platform
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from typing import NamedTuple

import torch

from xmc_ray.errors import ConfigError
from xmc_ray.model.precision import cpu_has_bfloat16
from xmc_ray.settings import Settings
from xmc_ray.storage.address import S3Access

_PACKAGES = ("xmc_ray", "ray", "torch", "transformers", "pyarrow", "s3fs")
_GIB = 1 << 30
_LEAST_SHARED, _LEAST_FREE = 2 * _GIB, 10 * _GIB  # below which Ray keeps objects on disk, and a demanding night fills it
_LEAST_MEMORY = 4 * _GIB


@dataclass(frozen=True, kw_only=True)
class DoctorConfig(Settings):
    """Look at this machine: versions, cores, GPUs, credentials, room; and what will be slow."""


class Finding(NamedTuple):
    """``advice``: "" where all is well."""

    name: str
    found: str
    advice: str = ""


def examine(config: DoctorConfig) -> None:
    """The job ``xmc-ray doctor``: prints what is found, then what to do about it."""
    found = list(findings())
    width = max(len(finding.name) for finding in found)
    for finding in found:
        print(f"{finding.name:<{width}}  {finding.found}{'  *' if finding.advice else ''}")
    advice = [f"* {finding.name}: {finding.advice}" for finding in found if finding.advice]
    print("\n" + ("\n".join(advice) or "nothing to mend"), flush=True)


def findings() -> Iterator[Finding]:
    """Everything that is looked at. Nothing is sent anywhere, and no credential is shown."""
    versions = ", ".join(f"{name} {_version(name)}" for name in _PACKAGES)
    yield Finding("versions", f"Python {platform.python_version()}, {versions}")
    yield _cores()
    yield _memory()
    yield _gpus()
    bfloat16 = (
        "" if cpu_has_bfloat16() or torch.cuda.is_available() else "transformers compute in float32, half as fast or less"
    )
    yield Finding("bfloat16", "on this CPU" if cpu_has_bfloat16() else "not on this CPU", bfloat16)
    yield _shared_memory()
    yield _disk("temporary files", tempfile.gettempdir(), "set TMPDIR, or make room")
    yield _disk("this folder", os.getcwd(), "write elsewhere, or make room")
    yield _s3()
    address = os.environ.get("RAY_ADDRESS")
    yield Finding("Ray", f"the cluster at {address}" if address else "started here by each job; RAY_ADDRESS names no cluster")


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "missing"


def _cores() -> Finding:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return Finding("cores", str(cores), "" if cores > 1 else "reading and the model take turns on a single core")


def _memory() -> Finding:
    size = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    advice = "" if size >= _LEAST_MEMORY else f"jobs want {_gib(_LEAST_MEMORY)} and more"
    return Finding("memory", _gib(size), advice)


def _gpus() -> Finding:
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not count:
        return Finding("GPUs", "none; a model of words alone (encoder.layers = 0) needs none")
    return Finding("GPUs", ", ".join(torch.cuda.get_device_name(number) for number in range(count)))


def _shared_memory() -> Finding:
    try:
        free = shutil.disk_usage("/dev/shm").free
    except OSError:
        return Finding("/dev/shm", "missing", "Ray keeps its objects on disk, which is slow")
    slow = f"below {_gib(_LEAST_SHARED)} Ray may keep its objects on disk, which is slow; docker run --shm-size sets it"
    return Finding("/dev/shm", f"{_gib(free)} free", "" if free >= _LEAST_SHARED else slow)


def _disk(name: str, folder: str, way_out: str) -> Finding:
    free = shutil.disk_usage(folder).free
    advice = "" if free >= _LEAST_FREE else f"below {_gib(_LEAST_FREE)}; {way_out}"
    return Finding(name, f"{folder}, {_gib(free)} free", advice)


def _s3() -> Finding:
    try:
        access = S3Access.from_environment()
    except ConfigError as error:
        return Finding("S3", "not usable", str(error))
    where = "Amazon's" if access.endpoint is None else access.endpoint
    return Finding(
        "S3", f"{where}, {'keys of the environment' if access.key else 'no keys: the role of the machine, if it has one'}"
    )


def _gib(size: int) -> str:
    return f"{size / _GIB:.1f} GiB"
