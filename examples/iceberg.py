"""A night's tags in an Iceberg table: written by the tagging job, read by pyiceberg, day by day and as of any snapshot.

python examples/iceberg.py --bundle runs/demo/hpo/train/bundle --documents examples/hpo/data/test.parquet --output runs/iceberg

The catalogue is a file of SQLite in the output; `PYICEBERG_CATALOG__DEMO__...` would as well describe one behind REST.
"""

import argparse
import os
from datetime import date
from pathlib import Path

from pyiceberg.catalog import load_catalog

from xmc_ray.command import parse
from xmc_ray.exits import run_and_exit
from xmc_ray.on_ray.tag.config import TagConfig
from xmc_ray.on_ray.tag.job import tag
from xmc_ray.on_ray.tag.runner import Runner


def main(arguments: list[str] | None = None, runner: Runner | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", required=True)
    parser.add_argument("--documents", required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--date", default=str(date.today()))
    given, settings = parser.parse_known_args(arguments)

    catalogue = {
        "uri": f"sqlite:///{given.output.resolve()}/catalogue.db",
        "warehouse": f"file://{given.output.resolve()}/warehouse",
    }
    given.output.mkdir(parents=True, exist_ok=True)
    for name, value in catalogue.items():  # where pyiceberg looks for them, credentials included
        os.environ[f"PYICEBERG_CATALOG__DEMO__{name.upper()}"] = value
    night = {"documents.uri": given.documents, "bundle": given.bundle, "output": given.output, "date": given.date}
    night |= {"table.name": "shop.tags", "table.catalog": "demo"}
    tag(parse(TagConfig, [*(f"--{name}={value}" for name, value in night.items()), *settings]), runner)

    table = load_catalog("demo", type="sql", **catalogue).load_table("shop.tags")
    for snapshot in table.snapshots():
        properties = snapshot.summary.additional_properties if snapshot.summary else {}
        run, day = properties["xmc-ray.run"], properties["xmc-ray.date"]
        rows = table.scan(f"dt = '{day}'", snapshot_id=snapshot.snapshot_id).count()
        print(f"snapshot {snapshot.snapshot_id}: run {run} of {day}, {rows:,} rows")
    for row in table.scan(f"dt = '{given.date}'", selected_fields=("id", "labels", "scores"), limit=3).to_arrow().to_pylist():
        tags = ", ".join(f"{label} {score:.2f}" for label, score in zip(row["labels"], row["scores"], strict=True))
        print(f"{row['id']}: {tags}")


if __name__ == "__main__":
    run_and_exit(main)
