"""What `import xmc_ray` gives, and what it does not load."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from checkout import ROOT

import xmc_ray


def test_public_names() -> None:
    assert xmc_ray.__all__ == sorted(xmc_ray.__all__)
    assert all(getattr(xmc_ray, name).__name__ == name for name in xmc_ray.__all__)
    assert set(xmc_ray.__all__) <= set(dir(xmc_ray))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        xmc_ray.nothing  # noqa: B018


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("xmc_ray", {"torch", "ray", "transformers", "pyarrow", "mlflow", "wandb"}),
        ("xmc_ray.callbacks.calls", {"torch", "ray", "transformers", "mlflow", "wandb"}),
        ("xmc_ray.callbacks.mlflow, xmc_ray.callbacks.wandb", {"torch", "ray", "transformers", "mlflow", "wandb"}),
        ("xmc_ray.data.convert", {"torch", "ray", "transformers"}),
        ("xmc_ray.data.groups", {"torch", "ray", "transformers"}),
        ("xmc_ray.metrics.at_k", {"torch", "ray", "transformers"}),
        ("xmc_ray.storage", {"torch", "ray", "transformers"}),
        ("xmc_ray.classifier", {"ray", "mlflow", "wandb"}),
        ("xmc_ray.on_ray.train.job", {"mlflow", "wandb"}),
    ],
)
def test_importing_loads_no_more_than_it_needs(module: str, absent: set[str]) -> None:
    code = f"import sys, {module}; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not absent & set(loaded)


@pytest.mark.parametrize("path", sorted((ROOT / "xmc_ray").rglob("*.py")), ids=lambda path: str(path.relative_to(ROOT)))
def test_every_public_name_has_a_docstring(path: Path) -> None:
    tree = ast.parse(path.read_text())
    kinds = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    named = [*tree.body, *(part for node in tree.body if isinstance(node, ast.ClassDef) for part in node.body)]
    private = [f"{part.name}" for part in tree.body if isinstance(part, ast.ClassDef) and part.name.startswith("_")]
    inside = {id(part) for node in tree.body if isinstance(node, ast.ClassDef) and node.name in private for part in node.body}
    public = [node for node in named if isinstance(node, kinds) and not node.name.startswith("_") and id(node) not in inside]
    assert ast.get_docstring(tree) or not tree.body
    assert [node.name for node in public if not ast.get_docstring(node)] == []
