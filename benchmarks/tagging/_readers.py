"""The ids that others' readers find in tags: by the folder of a day, by the days of an output, by a pattern."""

from collections.abc import Callable
from pathlib import Path

import duckdb
import pandas as pd
import polars as pl
import pyarrow.dataset as ds


def _ids(column: object) -> list[str]:
    return sorted(map(str, column))  # type: ignore[call-overload]


def _duck(pattern: str, day: str | None = None) -> list[str]:
    where = "" if day is None else f" where dt = '{day}'"
    query = f"select id from read_parquet('{pattern}', hive_partitioning = true){where}"
    return _ids(row[0] for row in duckdb.execute(query).fetchall())


READERS: dict[str, Callable[[Path, str], list[str]]] = {  # of the folder ``tags`` of an output, and a day
    "pyarrow, folder": lambda tags, day: _ids(ds.dataset(tags / f"dt={day}").to_table()["id"].to_pylist()),
    "pyarrow, partition": lambda tags, day: _ids(
        ds.dataset(tags, partitioning=ds.partitioning(flavor="hive")).to_table(filter=ds.field("dt") == day)["id"].to_pylist()
    ),
    "pandas, folder": lambda tags, day: _ids(pd.read_parquet(tags / f"dt={day}")["id"]),
    "pandas, partition": lambda tags, day: _ids(pd.read_parquet(tags, filters=[("dt", "==", day)])["id"]),
    "polars, folder": lambda tags, day: _ids(pl.read_parquet(tags / f"dt={day}")["id"]),
    "polars, pattern": lambda tags, day: _ids(pl.read_parquet(f"{tags}/dt={day}/*.parquet")["id"]),
    "polars, partition": lambda tags, day: _ids(
        pl.scan_parquet(tags, hive_partitioning=True).filter(pl.col("dt").cast(pl.String) == day).collect()["id"]
    ),
    "duckdb, pattern": lambda tags, day: _duck(f"{tags}/dt={day}/*.parquet"),
    "duckdb, partition": lambda tags, day: _duck(f"{tags}/*/*.parquet", day),
    "duckdb, deep pattern": lambda tags, day: _duck(f"{tags}/**/*.parquet", day),
}


def read_by_all(tags: Path, day: str) -> dict[str, list[str]]:
    """Of each reader the ids that it finds; none where there is no file at all, which most take for an error."""
    if not any(path.is_file() for path in tags.rglob("*")):
        return {name: [] for name in READERS}
    return {name: read(tags, day) for name, read in READERS.items()}
