"""The shape of the library: its public surface, its layers, and a test file for every module."""

import subprocess
import sys
from pathlib import Path

from checkout import ROOT
from surface import surface

from benchmarks import house


def test_the_public_surface_is_the_listed_one() -> None:
    """No exported name, parameter, default or option of a job goes or comes unnoticed."""
    assert surface() == (ROOT / "tests" / "surface.txt").read_text().splitlines()


def test_packages_import_only_what_lies_below_them() -> None:
    command = [Path(sys.executable).with_name("lint-imports"), "--no-cache", "--no-logo"]
    checked = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout


def test_modules_do_not_import_each_other_in_a_circle() -> None:
    assert house.read_house().longest_chain()[-1] == "xmc_ray.errors"


def test_every_module_has_a_test_file() -> None:
    """`xmc_ray/model/batch.py` has `tests/model/test_batch.py`."""
    paths = [path.relative_to(ROOT / "xmc_ray") for path in (ROOT / "xmc_ray").rglob("*.py") if path.name != "__init__.py"]
    expected = {path.as_posix(): f"tests/{path.with_name(f'test_{path.name}').as_posix()}" for path in paths}
    assert len(expected) > 50
    assert {module: test for module, test in expected.items() if not (ROOT / test).exists()} == {}
