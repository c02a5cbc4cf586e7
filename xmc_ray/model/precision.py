"""In which arithmetic a model computes, and what that is called: a driver names that of its actors, and needs no torch."""

import re
from pathlib import Path
from typing import Literal

Precision = Literal["auto", "float32", "bfloat16"]

_CPU = Path("/proc/cpuinfo")


def settled(precision: Precision, device: str) -> Precision:
    """``precision`` with ``auto`` replaced by what it is on ``device``, for a CPU by what this machine's has instructions for.

    A job settles it once, so that all of its processes compute alike, whatever their CPUs. ``device``: such as ``cuda:1``.
    """
    if precision != "auto":
        return precision
    return "bfloat16" if _kind(device) != "cpu" or cpu_has_bfloat16() else "float32"


def arithmetic(precision: Precision, device: str, transformer: bool) -> str:
    """The name of a model's arithmetic on ``device``, such as ``cpu float32`` or ``cuda bfloat16``.

    ``transformer``: whether the model has one; words alone are always in float32 on a CPU (decision 0022). A GPU need not be
    there. Scores of one name differ by rounding alone, those of two names by more: calibrations and tags hold for one name.
    """
    kind = _kind(device)
    in_bfloat16 = (transformer or kind != "cpu") and settled(precision, device) == "bfloat16"
    return f"{kind} {'bfloat16' if in_bfloat16 else 'float32'}"


def cpu_has_bfloat16() -> bool:
    """Whether this CPU has instructions for bfloat16, such as AVX-512 BF16 and AMX; one without emulates it, slowly."""
    try:
        return re.search(r"\b(avx512_|amx_)?bf16\b", _CPU.read_text()) is not None
    except OSError:  # no Linux
        import torch

        return any(available for name, available in torch.cpu.get_capabilities().items() if name.endswith("bf16"))


def _kind(device: str) -> str:
    return device.partition(":")[0]
