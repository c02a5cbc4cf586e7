"""Arithmetic by name, before there is a model or a device."""

import typing
from pathlib import Path

import pytest
import torch

from xmc_ray.model import precision
from xmc_ray.model.precision import arithmetic, cpu_has_bfloat16, settled


@pytest.mark.parametrize("has_it", [False, True])
def test_arithmetic_is_named_without_the_device(has_it: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kind: results of one arithmetic taken for those of another. A driver has no GPU, and names that of its actors."""
    monkeypatch.setattr(precision, "cpu_has_bfloat16", lambda: has_it)
    cpu, cuda = "cpu", "cuda:1"
    assert settled("auto", cpu) == ("bfloat16" if has_it else "float32")
    assert arithmetic("auto", cpu, True) == f"cpu {settled('auto', cpu)}"
    assert arithmetic("auto", cpu, False) == arithmetic("bfloat16", cpu, False) == "cpu float32"  # words alone
    assert arithmetic("bfloat16", cpu, True) == "cpu bfloat16"
    for transformer in (False, True):
        assert arithmetic("float32", cpu, transformer) == "cpu float32"
        assert arithmetic("auto", cuda, transformer) == arithmetic("bfloat16", cuda, transformer) == "cuda bfloat16"
        assert arithmetic("float32", cuda, transformer) == "cuda float32"
        for kind in typing.get_args(precision.Precision):  # whoever settles it first gets the same
            for device in (cpu, cuda):
                assert arithmetic(settled(kind, device), device, transformer) == arithmetic(kind, device, transformer)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("flags\t\t: fpu avx2 avx512f avx512_vnni", False),
        ("flags\t\t: fpu avx2 avx512_bf16 hypervisor", True),
        ("flags\t\t: amx_bf16 amx_int8", True),
        ("Features\t: fp asimd bf16 i8mm", True),
        ("model name\t: a bf16x of the future", False),
    ],
)
def test_which_cpus_have_bfloat16(flags: str, expected: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cpuinfo").write_text(f"processor\t: 0\n{flags}\n")
    monkeypatch.setattr(precision, "_CPU", tmp_path / "cpuinfo")
    assert cpu_has_bfloat16() is expected


@pytest.mark.parametrize(("capabilities", "expected"), [({"avx2": True, "bf16": True}, True), ({"avx512_bf16": False}, False)])
def test_elsewhere_torch_is_asked(
    capabilities: dict[str, bool], expected: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "_CPU", tmp_path / "nothing")
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert cpu_has_bfloat16() is expected
