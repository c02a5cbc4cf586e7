"""What `make house` counts, on a library of a few lines."""

import graphlib
from pathlib import Path

import pytest

from benchmarks import house

SOURCES = {
    "__init__.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from xmc_ray.top import Top\n",
    "top.py": "import os\nfrom xmc_ray import store\nfrom xmc_ray.data import rows\n",
    "data/__init__.py": '"""Nothing."""\n',
    "data/rows.py": "from xmc_ray.store.files import read\n",
    "store/__init__.py": "from xmc_ray.store.files import read\n",
    "store/files.py": "def read():\n    import xmc_ray.errors\n",
    "errors.py": "",
}


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(house, "ROOT", tmp_path)
    for name, source in SOURCES.items():
        path = tmp_path / "xmc_ray" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source)
    return tmp_path / "xmc_ray"


def test_lines_modules_chain_and_single_importers(library: Path) -> None:
    found = house.read_house()
    names = {
        name.removeprefix("xmc_ray."): {other.removeprefix("xmc_ray.") for other in found.imports[name]}
        for name in found.imports
    }
    assert names == {
        "top": {"store", "data.rows"},
        "data.rows": {"store.files"},
        "store": {"store.files"},
        "store.files": {"errors"},
        "errors": set(),
    }
    assert found.lines == 11
    chain = [name.removeprefix("xmc_ray.") for name in found.longest_chain()]
    assert chain in (["top", "store", "store.files", "errors"], ["top", "data.rows", "store.files", "errors"])
    assert found.single_importers() == {
        "xmc_ray.store": "xmc_ray.top",
        "xmc_ray.data.rows": "xmc_ray.top",
        "xmc_ray.errors": "xmc_ray.store.files",
    }


def test_a_circle_is_an_error(library: Path) -> None:
    (library / "errors.py").write_text("import xmc_ray.top\n")
    with pytest.raises(graphlib.CycleError):
        house.read_house().longest_chain()
