"""A device that claims to be an accelerator and computes on the CPU: faults of devices and waits for them, found without a GPU.

Importing it builds `mimic.cpp` with g++ where that has not been done, and makes torch's slot for foreign devices the device
``mimic``, for the whole process: it belongs in a process of its own. Like CUDA it raises where tensors of two devices meet, and
refuses what an H100's `grouped_mm` refuses. It knows nothing of streams, of data types that CUDA's kernels lack, and of speed.

Launches are counted as CUDA makes them, by PyTorch's sources: attention is one kernel forward and three backward, dropout one
each way, an operation on a list of tensors one for some dozens of them, and what only looks at a tensor none. Operations that
sort, coalesce or select the best launch several kernels there, and matrix products sometimes a second one; here they are one.
"""

import fcntl
import hashlib
import importlib.machinery
import importlib.util
import subprocess
import sys
import sysconfig
import tempfile
import threading
import types
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

SOURCE = Path(__file__).with_suffix(".cpp")
H100, L4, T4 = (9, 0), (8, 9), (7, 5)  # compute capabilities
_ROOT = "/xmc_ray/"

# What makes the host wait for CUDA besides what mimic.cpp tells: the size of the result is known only when it is there.
_SIZED_BY_THE_DEVICE = {
    *("nonzero", "masked_select", "_unique", "_unique2", "unique_consecutive", "unique_dim", "_coalesce", "equal", "bincount"),
    "repeat_interleave.Tensor",
}


def library() -> Path:
    """The built extension, by the digest of its source; one process builds it, others wait."""
    digest = hashlib.sha256(SOURCE.read_bytes() + torch.__version__.encode()).hexdigest()[:16]
    folder = Path(tempfile.gettempdir()) / f"mimic-{digest}"
    folder.mkdir(exist_ok=True)
    built, home = folder / "mimic_native.so", Path(torch.__file__).parent
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not built.exists():
            include = [home / "include", home / "include/torch/csrc/api/include", Path(sysconfig.get_paths()["include"])]
            flags = ["-fPIC", "-shared", "-std=c++20", "-O0", "-w", "-fvisibility=hidden", *(f"-I{path}" for path in include)]
            libraries = [f"-L{home / 'lib'}", "-lc10", "-ltorch_cpu", "-ltorch", "-ltorch_python"]
            made = built.with_suffix(".made")
            subprocess.run(["g++", *flags, str(SOURCE), "-o", str(made), *libraries], check=True)
            made.rename(built)
    return built


def _load() -> Any:
    loader = importlib.machinery.ExtensionFileLoader("mimic_native", str(library()))
    spec = importlib.util.spec_from_loader("mimic_native", loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


_native = _load()
_capability = H100


def become(capability: tuple[int, int]) -> None:
    """Have the limits of cards with this compute capability."""
    global _capability
    _capability = capability
    _native.set_grouped_kernel(capability[0] in (9, 10))


@contextmanager
def apart() -> Iterator[None]:
    """Attention is made of its parts, and lists are counted tensor by tensor, as launches were before decision 0039."""
    _native.take_apart(True)
    try:
        yield
    finally:
        _native.take_apart(False)


torch.utils.rename_privateuse1_backend("mimic")
_module: Any = types.ModuleType("torch.mimic")
_module.is_available = _module.is_initialized = lambda: True
_module._is_in_bad_fork = lambda: False
_module.device_count = lambda: 1
_module.current_device = lambda: 0
_module.set_device = _module.synchronize = lambda device=None: None
_module.manual_seed = _module.manual_seed_all = lambda seed: None  # its numbers are those of the CPU's generator
_module.get_rng_state = lambda device=0: torch.get_rng_state()
_module.set_rng_state = lambda state, device=0: None
_module.get_amp_supported_dtype = lambda: [torch.bfloat16, torch.float16]
_module.get_device_capability = lambda device=None: _capability
_module.is_bf16_supported = lambda including_emulation=True: including_emulation or _capability[0] >= 8
torch._register_device_module("mimic", _module)
DEVICE = torch.device("mimic:0")


class Log:
    """What the host asked of the device, by the line of the library that asked: ``waits`` and ``launches`` of kernels.

    ``most_groups``: in a call of `grouped_mm`.
    """

    def __init__(self) -> None:
        self.waits: Counter[tuple[str, str]] = Counter()
        self.launches: Counter[tuple[str, str]] = Counter()
        self.most_groups = 0
        self._lock = threading.Lock()

    def hear(self, what: str, kernels: int) -> None:
        with self._lock:
            if what.startswith("groups: "):
                self.most_groups = max(self.most_groups, int(what[8:]))
            elif what.startswith("wait: "):
                self.waits[_line(), what[6:]] += 1
            else:
                name = what.removeprefix("aten::")
                if kernels:
                    self.launches[_line(), name] += kernels
                if name in _SIZED_BY_THE_DEVICE:
                    self.waits[_line(), name] += 1

    def table(self, per: int = 1) -> str:
        """Waits and launches by line, as a table, divided by ``per``."""
        rows = [(line, f"wait: {what}", count) for (line, what), count in self.waits.items()]
        by_line: Counter[str] = Counter()
        for (line, _), count in self.launches.items():
            by_line[line] += count
        rows += [(line, "launches", count) for line, count in by_line.items()]
        lines = [f"{count / per:10.2f}  {line:40} {what}" for line, what, count in sorted(rows)]
        totals = [
            f"{counts.total() / per:10.2f}  {what} in all"
            for counts, what in ((self.waits, "waits"), (self.launches, "launches"))
        ]
        return "\n".join(lines + totals)

    def operations(self, per: int = 1) -> str:
        """Launches by operation, forward or backward, most first, as a table, divided by ``per``."""
        by_name: Counter[tuple[str, str]] = Counter()
        for (line, name), count in self.launches.items():
            by_name["backward" if line == "backward" else "", name] += count
        return "\n".join(f"{count / per:10.2f}  {name:40} {when}".rstrip() for (when, name), count in by_name.most_common())


def _line() -> str:
    frame: types.FrameType | None = sys._getframe()
    while frame is not None:
        file = frame.f_code.co_filename
        if _ROOT in file and "site-packages" not in file:
            return f"{file.rpartition(_ROOT)[2]}:{frame.f_lineno}"
        frame = frame.f_back
    return "backward" if threading.current_thread() is not threading.main_thread() else "elsewhere"


@contextmanager
def listening() -> Iterator[Log]:
    """What happens inside the block."""
    log = Log()
    _native.listen(log.hear)
    try:
        yield log
    finally:
        _native.listen(None)
