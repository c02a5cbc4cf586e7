"""An Iceberg catalogue in SQLite, as pyiceberg's configuration describes one."""

import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyiceberg.catalog import Catalog, load_catalog
from pyiceberg.table import Table
from pyiceberg.utils.config import Config


class Lake:
    """The catalogue ``lake`` and its table ``shop.tags``; its settings are in the environment."""

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch, warehouse: str | None = None) -> None:
        folder.mkdir(exist_ok=True)
        self.file, self.warehouse = folder / "catalogue.db", warehouse or f"file://{folder / 'warehouse'}"
        self.data = folder / "warehouse" / "shop" / "tags" / "data"
        patch.setenv("PYICEBERG_CATALOG__LAKE__URI", f"sqlite:///{self.file}")
        patch.setenv("PYICEBERG_CATALOG__LAKE__WAREHOUSE", self.warehouse)

    @property
    def catalog(self) -> Catalog:
        """As anybody opens it; another lake may be in the environment by now."""
        known = Config().get_catalog_config("lake") or {}
        own = {"type": "sql", "uri": f"sqlite:///{self.file}", "warehouse": self.warehouse}
        return load_catalog("lake", **{name: str(value) for name, value in {**known, **own}.items()})

    @property
    def table(self) -> Table:
        return self.catalog.load_table("shop.tags")

    def rows(self) -> pa.Table:
        return self.table.scan().to_arrow()

    def snapshots(self) -> list[dict[str, Any]]:
        """The properties of all snapshots, the latest last."""
        return [
            {"id": each.snapshot_id, **each.summary.additional_properties} for each in self.table.snapshots() if each.summary
        ]

    def files(self) -> set[str]:
        """All data files that lie in the warehouse, whether the table has them or not."""
        return {path.name for path in self.data.rglob("*.parquet")}

    @contextmanager
    def read_only(self) -> Iterator[None]:
        """Another process holds the catalogue: it can be read, and commits wait in vain."""
        with closing(sqlite3.connect(self.file, isolation_level=None)) as connection:
            connection.execute("BEGIN IMMEDIATE")
            yield
