"""The shape of the library: its public surface and its layers."""

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
