"""What tests of storage share."""

from pathlib import Path

import pytest


@pytest.fixture(params=["local", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A folder that does not exist yet."""
    if request.param == "local":
        return str(tmp_path / "place")
    return str(request.getfixturevalue("s3").uri(f"storage/{request.node.name}"))
