"""The shape of the library: lines, modules, the longest chain of imports, and the modules that only one other imports.

    make house                                       the working tree
    make house ARGS="--rev v0.1.0"                   any commit

Imports are read from the source, those under ``if TYPE_CHECKING`` left out. An ``__init__.py`` counts as a module where it
imports something.
"""

import argparse
import ast
import io
import subprocess
import tarfile
from collections.abc import Mapping
from dataclasses import dataclass
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "xmc_ray"


@dataclass(frozen=True, kw_only=True)
class House:
    """``imports``: of each module, the modules of this package that it imports."""

    lines: int
    imports: Mapping[str, frozenset[str]]

    def longest_chain(self) -> list[str]:
        """The longest path along imports, the importer first. Raises CycleError where imports form a circle."""
        chains: dict[str, list[str]] = {}
        for module in TopologicalSorter(self.imports).static_order():
            below = [chains[imported] for imported in sorted(self.imports[module])]
            chains[module] = [module, *max(below, key=len, default=[])]
        return max(chains.values(), key=len)

    def single_importers(self) -> dict[str, str]:
        """Of each module that only one other imports, that other."""
        importers = {module: [other for other, names in self.imports.items() if module in names] for module in self.imports}
        return {module: others[0] for module, others in importers.items() if len(others) == 1}


def read_house(rev: str | None = None) -> House:
    """The library as it is in the working tree, or as it was at a commit."""
    sources = _tree() if rev is None else _commit(rev)
    trees = {_name(path): ast.parse(source) for path, source in sources.items()}
    imports = {name: frozenset(_imported(tree, set(trees)) - {name}) for name, tree in trees.items()}
    plain = {name for name in trees if f"{name.replace('.', '/')}/__init__.py" in sources and not imports[name]}
    return House(
        lines=sum(source.count("\n") for source in sources.values()),
        imports={name: names - plain for name, names in imports.items() if name not in plain},
    )


def _tree() -> dict[str, str]:
    return {path.relative_to(ROOT).as_posix(): path.read_text() for path in sorted((ROOT / PACKAGE).rglob("*.py"))}


def _commit(rev: str) -> dict[str, str]:
    packed = subprocess.run(["git", "archive", rev, PACKAGE], cwd=ROOT, capture_output=True, check=True).stdout
    with tarfile.open(fileobj=io.BytesIO(packed)) as archive:
        files = {member.name: archive.extractfile(member) for member in archive if member.name.endswith(".py")}
        return {name: file.read().decode() for name, file in sorted(files.items()) if file is not None}


def _name(path: str) -> str:
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def _imported(tree: ast.AST, modules: set[str]) -> set[str]:
    """The ``modules`` that a source file imports; of ``from xmc_ray.data import labels`` it is the module labels."""
    if isinstance(tree, ast.If) and ast.unparse(tree.test) == "TYPE_CHECKING":
        return set()
    found = {alias.name for alias in tree.names} if isinstance(tree, ast.Import) else set()
    if isinstance(tree, ast.ImportFrom) and tree.module:
        found = {f"{tree.module}.{alias.name}" for alias in tree.names}
        found = {name if name in modules else tree.module for name in found}
    return (found & modules).union(*(_imported(child, modules) for child in ast.iter_child_nodes(tree)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rev", help="a commit instead of the working tree")
    house = read_house(parser.parse_args().rev)
    chain, single = house.longest_chain(), house.single_importers()
    print(f"lines                    {house.lines:,}")
    print(f"modules                  {len(house.imports)}")
    print(f"longest import chain     {len(chain)}: {' > '.join(chain)}")
    print(f"with a single importer   {len(single)}: {', '.join(sorted(single))}")


if __name__ == "__main__":
    main()
