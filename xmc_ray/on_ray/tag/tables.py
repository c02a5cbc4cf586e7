"""A finished night in an Iceberg table, as one snapshot: see `storage.iceberg`.

A night is finished without the table. It is committed after its ``_SUCCESS``, by the same command or by its repetition, whoever
was killed in between, and ``table.json`` in its folder says so:

    {"run": ..., "catalog": ..., "table": "shop.tags", "uuid": ..., "attempts": [...], "snapshot": 5294632662649713752, ...}

Attempts are noted before they write data files, so that those of an attempt that was killed can be removed later.
"""

import uuid
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import partial
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from xmc_ray import storage
from xmc_ray.errors import ConfigError, DataError, XmcError
from xmc_ray.on_ray.tag.nights import (
    TABLE,
    check_whole,
    day_of,
    listed,
    manifest_of,
    marked_run,
    marker_of,
    read_own,
    tags_folder,
)
from xmc_ray.on_ray.tag.runner import Runner
from xmc_ray.settings import Settings
from xmc_ray.storage.files import join

if TYPE_CHECKING:
    from pyiceberg.manifest import DataFile
    from pyiceberg.table import Table

    from xmc_ray.storage.iceberg import DayTable, DayWriter

_STRINGS = pa.list_(pa.string())
_LISTS = [("labels", _STRINGS), ("scores", pa.list_(pa.float32())), ("names", _STRINGS)]
_OTHERS = [(name, pa.string()) for name in ("model", "text_digest", "filter")]
COLUMNS = pa.schema([("id", pa.string()), *_LISTS, *_OTHERS])
"""Of a table of tags, beside ``dt``; ``names`` is null where the bundle has none, ``filter`` where documents name none."""


@dataclass(frozen=True, kw_only=True)
class TableConfig(Settings):
    """An Iceberg table that finished nights are committed to."""

    name: str | None = None
    """Table that the finished night is committed to as one snapshot, with its namespace: `shop.tags`. Created if missing."""
    catalog: str = "default"
    """Name of the table's catalogue in pyiceberg's configuration, which has its address and credentials."""

    def check(self) -> None:
        """Raises ConfigError for a table without a namespace."""
        parts = [] if self.name is None else self.name.split(".")
        if self.name is not None and (len(parts) < 2 or not all(parts)):
            raise ConfigError("a table without its namespace", found=repr(self.name), expected="a name such as shop.tags")


def open_table(config: TableConfig) -> "DayTable | None":
    """The table, if one is asked for; ConfigError if nights cannot be committed to it."""
    if config.name is None:
        return None
    try:
        from xmc_ray.storage.iceberg import DayTable
    except ModuleNotFoundError as error:
        raise ConfigError("pyiceberg is missing", found=error, way_out="pip install 'xmc_ray[iceberg]'") from None
    return DayTable(config.catalog, config.name, COLUMNS)


def is_due(table: "DayTable", folder: str) -> bool:
    """Whether a finished night is not known to be in the table."""
    now = table.load()
    return now is None or _record(folder, str(now.metadata.table_uuid)).get("snapshot") is None


def commit(table: "DayTable", folder: str, runner: Runner, confirm: Callable[[], None]) -> None:
    """Commit a finished night, unless it is in the table already. Only the lease's holder may, which ``confirm`` checks."""
    try:
        snapshot = _commit(table, folder, runner, confirm)
    except XmcError as error:
        record = read_own(join(folder, TABLE))
        if record is None or record["run"] != marked_run(folder):  # so that the night stays until it is there
            with suppress(XmcError):
                storage.write_json(join(folder, TABLE), _new_record(table, "", folder))
        what = f"the night is finished, but not in the table {table.name}: {error.what}"
        way_out = "; then ".join(filter(None, [error.way_out, "run the same command again, which commits it"]))
        raise type(error)(what, where=error.where, found=error.found, expected=error.expected, way_out=way_out) from None
    print(f"committed: snapshot {snapshot} of {table.name}", flush=True)


def _commit(table: "DayTable", folder: str, runner: Runner, confirm: Callable[[], None]) -> int:
    """The night's snapshot, made now or before."""
    from xmc_ray.storage import iceberg

    now = storage.patiently(table.create)
    record = _record(folder, str(now.metadata.table_uuid)) or _new_record(table, str(now.metadata.table_uuid), folder)
    done = iceberg.find(now, record["run"])
    if done is None:
        attempt = uuid.uuid4().hex[:8]
        record["attempts"] = [*record["attempts"], attempt]
        storage.patiently(storage.write_json, join(folder, TABLE), record)
        files = _written(table.writer(now, day_of(folder)), folder, _places(table, now, folder, attempt), runner)
        properties = {iceberg.RUN: record["run"], iceberg.ATTEMPT: attempt, "xmc-ray.date": day_of(folder)}
        properties |= {"xmc-ray.bundle": manifest_of(folder)["bundle"], "xmc-ray.rows": str(iceberg.count(files))}
        confirm = partial(_check_ours, folder, record["run"], confirm)
        done = storage.patiently(table.replace, day_of(folder), files, properties, confirm)
    for attempt in record["attempts"]:  # none of them can be committed any more
        if attempt != done.attempt:
            table.remove(now, _places(table, now, folder, attempt))
    recorded = datetime.now(timezone.utc).isoformat(timespec="seconds")
    storage.patiently(storage.write_json, join(folder, TABLE), {**record, "snapshot": done.snapshot, "recorded": recorded})
    return done.snapshot


def _written(writer: "DayWriter", folder: str, places: Sequence[str], runner: Runner) -> "list[DataFile]":
    """Write the table's copy of a night's files, each in a task; DataError if rows are missing."""
    marker, manifest = marker_of(folder), manifest_of(folder)
    assert marker is not None
    check_whole(folder, marker, listed(folder))
    shared = runner.put(writer)
    pairs = zip(marker["files"], places, strict=True)
    tasks = [runner.submit(_write, shared, join(tags_folder(folder), name), place) for name, place in pairs]
    files = [file for file in runner.get(tasks) if file is not None]
    rows, expected = sum(file.record_count for file in files), manifest["tagged"] + manifest["reused"]
    if rows != expected:
        raise DataError("the files of a night do not have its rows", where=folder, found=f"{rows:,}", expected=f"{expected:,}")
    return files


def _places(table: "DayTable", now: "Table", folder: str, attempt: str) -> list[str]:
    """Where an attempt's data files lie."""
    marker = marker_of(folder)
    assert marker is not None
    names = [f"{marker['run']}-{attempt}-{number:05}.parquet" for number in range(len(marker["files"]))]
    return table.places(now, day_of(folder), names)


def _write(writer: Any, source: str, target: str) -> Any:
    return storage.patiently(writer, source, target)


def _check_ours(folder: str, run: str, confirm: Callable[[], None]) -> None:
    confirm()
    if marked_run(folder) != run:
        raise ConfigError("another run has replaced the night", where=folder)


def _record(folder: str, table: str) -> dict[str, Any]:
    """What is known of the present run in the table with this uuid; empty for another run or table."""
    record = read_own(join(folder, TABLE), "uuid", "attempts", "snapshot")
    return record if record and (record["run"], record["uuid"]) == (marked_run(folder), table) else {}


def _new_record(table: "DayTable", uuid: str, folder: str) -> dict[str, Any]:
    named = {"catalog": table.catalog_name, "table": table.name, "uuid": uuid}
    return {"run": marked_run(folder), **named, "attempts": [], "snapshot": None}
