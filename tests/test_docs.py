"""The documents match the code: the figure and table of packages in design.md, the tests that operations.md names, links."""

import re
import subprocess
import sys
from itertools import pairwise, product
from pathlib import Path

import grimp
import pytest
from checkout import ROOT

DESIGN = (ROOT / "docs" / "design.md").read_text()
JOBS = ("on_ray.train", "on_ray.tag")


def package(module: str) -> str:
    """``xmc_ray.on_ray.train.worker`` is of ``on_ray.train``, ``xmc_ray.on_ray.stream`` of ``on_ray``."""
    name = module.removeprefix("xmc_ray.")
    return next((job for job in JOBS if name == job or name.startswith(f"{job}.")), name.split(".")[0])


def reach(arrows: set[tuple[str, str]]) -> set[tuple[str, str]]:
    """The arrows and all paths of them."""
    while longer := {(a, d) for (a, b), (c, d) in product(arrows, arrows) if b == c} - arrows:
        arrows = arrows | longer
    return arrows


def test_the_figure_draws_the_imports() -> None:
    figure = re.search(r"```mermaid\nflowchart TD\n(.*?)```", DESIGN, flags=re.DOTALL)
    assert figure is not None
    names = {"train": "on_ray.train", "tag": "on_ray.tag"}
    drawn = set()
    for line in figure[1].splitlines():
        parts = [re.sub(r"\[.*?\]", "", part).split("&") for part in line.split("-->")]
        for sources, targets in pairwise(parts):
            drawn |= {(names.get(a.strip(), a.strip()), names.get(b.strip(), b.strip())) for a, b in product(sources, targets)}
    graph = grimp.build_graph("xmc_ray")
    imported = {
        (package(module), package(target))
        for module in graph.modules - {"xmc_ray"}
        for target in graph.find_modules_directly_imported_by(module) - {"xmc_ray"}
        if package(module) != package(target)
    }
    assert drawn <= imported, f"no such import: {drawn - imported}"
    assert imported <= reach(drawn), f"not in the figure: {imported - reach(drawn)}"
    for arrow in drawn:
        assert arrow not in reach(drawn - {arrow}), f"a longer path implies {arrow}"


def test_the_table_lists_every_module() -> None:
    listed = set()
    for name, cell in re.findall(
        r"^\| `([a-z_/]+)` \| (.*) \|$", DESIGN.split("| package | modules |")[1].split("\n## ")[0], re.M
    ):
        folder = ROOT / "xmc_ray" / name
        listed |= (
            {folder / f"{part}.py" for part in re.findall(r"(?:^|· )`(\w+)`", cell)}
            if folder.is_dir()
            else {folder.with_suffix(".py")}
        )
    assert listed == {path for path in (ROOT / "xmc_ray").rglob("*.py") if path.name != "__init__.py"}


def test_operations_names_tests_that_exist() -> None:
    text = (ROOT / "docs" / "operations.md").read_text()
    tests = "".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    named = re.findall(r"`(?:[\w/]*?(test_\w+\.py)::)?(test_\w+)(?:\[.*?\])?`", text)
    assert len(named) > 80
    for file, name in named:
        inside = "".join(path.read_text() for path in (ROOT / "tests").rglob(file)) if file else tests
        assert f"def {name}(" in inside, f"{file} {name}"


@pytest.mark.slow
def test_the_api_reference_has_no_warnings(tmp_path: Path) -> None:
    """By the command of `make docs`."""
    assert "python docs/reference.py build/docs\n" in (ROOT / "Makefile").read_text()
    built = subprocess.run([sys.executable, "docs/reference.py", tmp_path], cwd=ROOT, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    assert "XMCClassifier" in (tmp_path / "xmc_ray.html").read_text()


def anchors(path: Path) -> set[str]:
    return {
        re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        for heading in re.findall(r"^#+ (.+)$", path.read_text(), re.M)
    }


@pytest.mark.parametrize(
    "path", [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *ROOT.glob("*/README.md")], ids=lambda path: path.name
)
def test_links_lead_somewhere(path: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", path.read_text()):
        file, _, anchor = link.partition("#")
        if not link.startswith(("http", "NNNN")):
            target = path.parent / file if file else path
            assert target.exists() and (not anchor or anchor in anchors(target)), link
