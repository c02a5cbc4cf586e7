"""Builds the API reference of the library in a folder, from the docstrings: python docs/reference.py build/docs

A warning of pdoc's is an error.
"""

import sys
import warnings
from pathlib import Path

import pdoc

import xmc_ray


def main(folder: Path) -> None:
    for name in xmc_ray.__all__:
        setattr(xmc_ray, name, getattr(xmc_ray, name))  # pdoc does not ask for names that are resolved on first use
    for kind in (UserWarning, RuntimeWarning):
        warnings.filterwarnings("error", category=kind, module=r"pdoc\.")
    pdoc.pdoc("xmc_ray", output_directory=folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
