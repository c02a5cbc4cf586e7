"""What `import xmc_ray` gives, and what it does not load."""

import subprocess
import sys

import pytest

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
        ("xmc_ray", {"torch", "ray", "transformers", "pyarrow"}),
        ("xmc_ray.data.convert", {"torch", "ray", "transformers"}),
        ("xmc_ray.data.groups", {"torch", "ray", "transformers"}),
        ("xmc_ray.metrics.at_k", {"torch", "ray", "transformers"}),
        ("xmc_ray.storage", {"torch", "ray", "transformers"}),
        ("xmc_ray.classifier", {"ray"}),
    ],
)
def test_importing_loads_no_more_than_it_needs(module: str, absent: set[str]) -> None:
    code = f"import sys, {module}; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not absent & set(loaded)
