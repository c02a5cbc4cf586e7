"""Nights in an Iceberg table: one snapshot each, whatever is killed, and with the rows of the manifest."""

import itertools
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from catalogue import Lake
from checkout import ROOT
from faults import wait_for
from fruit import COLOURS, KINDS, document, manifest_of, read_night, write
from in_process import InProcess
from pyiceberg.catalog.sql import SqlCatalog
from pyiceberg.io.pyarrow import PyArrowFileIO
from pyiceberg.schema import Schema
from pyiceberg.types import LongType, NestedField
from ray.data import read_iceberg
from seaweed import S3

from xmc_ray import storage
from xmc_ray.data.filters import LabelFilters
from xmc_ray.errors import ConfigError, DataError, UnavailableError
from xmc_ray.on_ray.tag import nights, tables
from xmc_ray.on_ray.tag.pieces import PieceWriter, TagColumns
from xmc_ray.on_ray.tag.tables import TableConfig
from xmc_ray.storage import files, folders, iceberg

IN_TABLE = ("--table.name=shop.tags", "--table.catalog=lake")


@pytest.fixture
def lake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Lake:
    return Lake(tmp_path / "lake", monkeypatch)


@pytest.fixture
def catalogue(tmp_path: Path) -> Path:
    return write(tmp_path / "in.parquet", [document(n) for n in range(40)])


def check(lake: Lake, folder: str) -> dict[str, Any]:
    """The night is in the table once, with the rows that it has; no data file of it lies about. Returns the snapshot."""
    day, marker = nights.day_of(folder), storage.read_json(f"{folder}/_SUCCESS")
    (snapshot,) = [each for each in lake.snapshots() if each[iceberg.RUN] == marker["run"]]
    manifest, record = manifest_of(folder), storage.read_json(f"{folder}/table.json")
    rows = lake.table.scan(f"dt = '{day}'").to_arrow()
    assert len(rows) == manifest["tagged"] + manifest["reused"] == int(snapshot["xmc-ray.rows"])
    tags = read_night(folder)[0]
    kept = rows.select(tags.column_names).cast(tags.schema) if len(tags) else rows.select(["id"])
    assert kept.sort_by("id").to_pylist() == tags.sort_by("id").select(kept.column_names).to_pylist()
    assert (snapshot["xmc-ray.date"], snapshot["xmc-ray.bundle"]) == (day, manifest["bundle"])
    assert (record["run"], record["snapshot"]) == (marker["run"], snapshot["id"])
    its = {name for name in lake.files() if name.startswith(marker["run"])}
    assert {name.split("-")[1] for name in its} <= {snapshot[iceberg.ATTEMPT]}
    return snapshot


def test_the_columns_of_a_table_are_those_of_tags() -> None:
    labels = pa.table({"label": ["red"], "name": ["Red"]})
    filters = LabelFilters.over({"all": np.array([0])}, 1, column="tenant")
    assert TagColumns(labels, "model", 0.0, filters=filters).schema == tables.COLUMNS


def test_a_night_is_a_snapshot_and_its_repetition_none(
    tag: Callable[..., str], catalogue: Path, lake: Lake, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tag(catalogue, *IN_TABLE, target_bytes=1, commit_rows=20)
    snapshot = check(lake, folder)
    assert f"\ncommitted: snapshot {snapshot['id']} of shop.tags\n" in capsys.readouterr().out
    assert len(lake.files()) == len(storage.read_json(f"{folder}/_SUCCESS")["files"]) > 1
    tag(catalogue, *IN_TABLE)
    assert capsys.readouterr().out.startswith("finished before, nothing to do")
    Path(folder, "table.json").unlink()  # as if its driver had been killed right after the commit
    tag(catalogue, *IN_TABLE)
    tag(catalogue, *IN_TABLE, date="2026-11-24", previous="last")
    assert [check(lake, f)["id"] for f in (folder, folder.replace("23", "24"))] == [each["id"] for each in lake.snapshots()]
    assert len(lake.rows()) == 80


def test_a_night_from_before_there_was_a_table_is_committed(tag: Callable[..., str], catalogue: Path, lake: Lake) -> None:
    """By the same command with the table's name; and to a table that was dropped, again."""
    folder = tag(catalogue)
    tag(catalogue, *IN_TABLE)
    check(lake, folder)
    lake.catalog.purge_table("shop.tags")
    tag(catalogue, *IN_TABLE)
    check(lake, folder)


def test_a_night_that_is_tagged_again_replaces_its_day_in_one_snapshot(
    tag: Callable[..., str], catalogue: Path, lake: Lake
) -> None:
    tag(catalogue, *IN_TABLE, date="2026-11-22")
    folder = tag(catalogue, *IN_TABLE)
    write(catalogue, [document(n) for n in range(10, 35)])
    tag(catalogue, *IN_TABLE, "--overwrite", k=2)
    check(lake, folder)
    assert [each["xmc-ray.rows"] for each in lake.snapshots()] == ["40", "40", "25"] and len(lake.rows()) == 65
    before = lake.table.scan(snapshot_id=lake.snapshots()[1]["id"]).to_arrow()
    assert len(before) == 80, "the table has its own copy of what the night had been"


def test_a_night_without_any_tags_empties_its_day(tag: Callable[..., str], catalogue: Path, lake: Lake) -> None:
    tag(catalogue, *IN_TABLE)
    write(catalogue, [{"id": f"d{n}", "text": None} for n in range(3)])
    check(lake, tag(catalogue, *IN_TABLE, "--overwrite", max_reject_share=1))
    assert len(lake.rows()) == 0 and len(lake.snapshots()) == 2


class Killed(BaseException):
    """Not an Exception: nobody handles it, as nobody handles SIGKILL."""


@pytest.fixture
def kill_at(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Arranges a kill at a step of the next commit: before and after each call that reads the table or changes anything."""
    calls = [(SqlCatalog, name) for name in ("load_table", "create_namespace", "create_table", "commit_table")]
    calls += [(PyArrowFileIO, "delete"), (iceberg.DayWriter, "__call__"), (files, "write_bytes")]
    left = -1  # steps until the kill

    def step(name: str) -> None:
        nonlocal left
        left -= 1
        if left == -1:
            raise Killed(name)

    def watch(owner: Any, name: str, call: Callable[..., Any]) -> None:
        def watched(*arguments: Any, **named: Any) -> Any:
            if name == "write_bytes" and not str(arguments[0]).endswith("/table.json"):
                return call(*arguments, **named)
            step(f"before {name}")
            result = call(*arguments, **named)
            step(f"after {name}")
            return result

        monkeypatch.setattr(owner, name, watched)

    for owner, name in calls:
        watch(owner, name, getattr(owner, name))

    def arrange(number: int) -> None:
        nonlocal left
        left = number

    return arrange


@pytest.mark.parametrize("is_first", [True, False], ids=["first attempt", "second attempt"])
def test_a_kill_at_any_step_of_a_commit_leaves_one_snapshot_once_it_is_repeated(
    is_first: bool,
    tag: Callable[..., str],
    catalogue: Path,
    tmp_path: Path,
    kill_at: Callable[[int], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """At each step of an attempt; the second one is that of a night whose first was killed with one data file written."""
    folder = tag(catalogue, target_bytes=1, commit_rows=40)
    assert len(storage.read_json(f"{folder}/_SUCCESS")["files"]) > 1

    def attempt(step: int = -1) -> str | None:
        """Where the attempt was killed."""
        kill_at(step)
        table = tables.open_table(TableConfig(name="shop.tags", catalog="lake"))
        try:
            if table is not None and tables.is_due(table, folder):
                tables.commit(table, folder, InProcess(), lambda: None)
        except Killed as killed:
            return str(killed)
        return None

    def fresh(name: str) -> Lake:
        Path(folder, "table.json").unlink(missing_ok=True)
        return Lake(tmp_path / name, monkeypatch)

    written = next(n for n in itertools.count(2) if fresh(f"trial{n}") and attempt(n) == "after __call__")
    killed = set()
    for number in itertools.count(2):  # opening the table takes two steps
        lake = fresh(f"lake{number}")
        if not is_first:
            attempt(written)
        killed.add(attempt(number))
        attempt()
        check(lake, folder)
        assert len(lake.snapshots()) == 1
        if None in killed:
            break
    steps = ["load_table", "write_bytes", "__call__", "commit_table"]
    steps += ["create_namespace", "create_table"] if is_first else ["delete"]
    assert {f"{when} {step}" for when in ("before", "after") for step in steps} <= killed


A_NIGHT = """
import sys
from in_process import InProcess
from xmc_ray import command
from xmc_ray.on_ray.tag import job
from xmc_ray.on_ray.tag.config import TagConfig

job.tag(command.parse(TagConfig, sys.argv[1:]), InProcess())
"""


def test_the_driver_is_killed_while_it_commits(
    tag: Callable[..., str], trained: Path, catalogue: Path, lake: Lake, tmp_path: Path
) -> None:
    """By SIGKILL, with the snapshot written and its commit waiting for the catalogue."""
    tag(catalogue, *IN_TABLE, date="2026-11-22")
    arguments = [f"--documents.uri={catalogue}", f"--bundle={trained / 'bundle'}", f"--output={tmp_path / 'out'}", *IN_TABLE]
    arguments += ["--date=2026-11-23", "--k=3", "--pool.max=1", "--pool.threads=1"]
    arguments += ["--model.precision=float32", "--model.scoring=exact"]  # which need no Ray
    support = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests" / "support")])}
    metadata = lake.data.with_name("metadata")
    before = set(metadata.glob("snap-*"))
    with lake.read_only(), subprocess.Popen([sys.executable, "-c", A_NIGHT, *arguments], env=support) as driver:
        try:
            wait_for(lambda: set(metadata.glob("snap-*")) - before or driver.poll() is not None)
        finally:
            driver.kill()
    folder = str(tmp_path / "out" / "_nights" / "dt=2026-11-23")
    assert driver.returncode == -signal.SIGKILL and len(read_night(folder)[0]) == 40 and len(lake.snapshots()) == 1
    killed = lake.files() - {name for name in lake.files() if name.startswith(lake.snapshots()[0][iceberg.RUN])}
    tag(catalogue, *IN_TABLE, model__precision="float32", model__scoring="exact")
    check(lake, folder)
    assert len(lake.snapshots()) == 2 and len(lake.rows()) == 80 and not killed & lake.files()


def test_a_catalogue_that_is_away_leaves_the_night_finished(
    tag: Callable[..., str], catalogue: Path, lake: Lake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Away when it is to commit, and then when it is asked whether it has."""
    tag(catalogue, *IN_TABLE, date="2026-11-22")
    monkeypatch.setattr(files, "PATIENCE", 0.0)
    told = r"is finished, but not in the table shop\.tags: .*database is locked.*run the same command again, which commits it"
    with lake.read_only(), pytest.raises(UnavailableError, match=told):
        tag(catalogue, *IN_TABLE)
    folder = str(tmp_path / "out" / "_nights" / "dt=2026-11-23")
    assert len(read_night(folder)[0]) == 40 and nights.latest(str(tmp_path / "out")) == folder
    assert storage.read_json(f"{folder}/table.json")["snapshot"] is None, "so that it stays until it is there"
    away = lake.file.rename(tmp_path / "away")
    lake.file.mkdir()
    with pytest.raises(UnavailableError, match="cannot be reached"):
        tag(catalogue, *IN_TABLE)
    lake.file.rmdir()
    away.rename(lake.file)
    assert len(lake.snapshots()) == 1
    tag(catalogue, *IN_TABLE)
    check(lake, folder)


def test_what_cannot_be_committed_to_is_told_before_the_night_begins(
    tag: Callable[..., str], catalogue: Path, lake: Lake, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="no such catalogue; found elsewhere"):
        tag(catalogue, "--table.name=shop.tags", "--table.catalog=elsewhere")
    lake.catalog.create_namespace("shop")
    lake.catalog.create_table("shop.tags", Schema(NestedField(1, "id", LongType())))
    with pytest.raises(ConfigError, match=r"lacks a column: shop\.tags, column dt; expected date; choose another"):
        tag(catalogue, *IN_TABLE)
    assert not (tmp_path / "out").exists()


def test_a_driver_that_has_lost_the_folder_does_not_commit(
    tag: Callable[..., str], catalogue: Path, lake: Lake, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another run may have replaced the night by then, and be in the table."""
    folder = tag(catalogue, *IN_TABLE)
    Path(folder, "table.json").unlink()
    monkeypatch.setattr(iceberg, "find", lambda table, run: None)
    table = tables.open_table(TableConfig(name="shop.tags", catalog="lake"))
    assert table is not None

    def refuse() -> None:
        raise ConfigError("another job works in this folder", way_out="let it finish")

    def let_another_run_finish() -> None:
        marker = storage.read_json(f"{folder}/_SUCCESS")
        storage.write_json(f"{folder}/_SUCCESS", {**marker, "run": "another"})

    told = r"finished, but not in the table shop\.tags: another job.*; let it finish; then run the same command again"
    with pytest.raises(ConfigError, match=told):
        tables.commit(table, folder, InProcess(), refuse)
    with pytest.raises(ConfigError, match="another run has replaced the night"):
        tables.commit(table, folder, InProcess(), let_another_run_finish)
    assert len(lake.snapshots()) == 1


def test_a_night_that_has_lost_a_file_is_not_committed(tag: Callable[..., str], catalogue: Path, lake: Lake) -> None:
    folder = tag(catalogue)
    marker = storage.read_json(f"{folder}/_SUCCESS")
    storage.write_json(f"{folder}/_SUCCESS", {**marker, "files": [], "rows": {}, "sizes": {}})
    with pytest.raises(DataError, match=r"files of a night do not have its rows.*found 0; expected 40"):
        tag(catalogue, *IN_TABLE)
    storage.write_json(f"{folder}/_SUCCESS", marker)
    tag(catalogue, *IN_TABLE)
    check(lake, folder)


def test_nights_that_are_removed_stay_in_the_table(
    tag: Callable[..., str], catalogue: Path, lake: Lake, tmp_path: Path
) -> None:
    for day in (21, 22, 23):
        tag(catalogue, *IN_TABLE, "--keep.nights=1", date=f"2026-11-{day}")
    assert [Path(night).name for night in nights.all_nights(str(tmp_path / "out"))] == ["dt=2026-11-23"]
    assert len(lake.rows()) == 120 and {path.name for path in (tmp_path / "out" / "_nights").iterdir()} == {"dt=2026-11-23"}


def test_a_night_on_s3(
    tag: Callable[..., str], catalogue: Path, s3: S3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The warehouse and the night lie there; credentials come from the environment, and are written nowhere."""
    for name, value in (("endpoint", s3.endpoint), ("region", "us-east-1")):
        monkeypatch.setenv(f"PYICEBERG_CATALOG__LAKE__S3__{name.upper()}", value)  # for those who read
    lake = Lake(tmp_path / "lake", monkeypatch, warehouse=s3.uri("warehouse"))
    output = s3.uri("nights")
    exact = {"model__scoring": "exact", "model__precision": "float32"}
    folder = tag(catalogue, *IN_TABLE, output=output, target_bytes=1, commit_rows=20, **exact)
    tag(catalogue, *IN_TABLE, output=output, **exact)
    check(lake, folder)
    assert len(lake.snapshots()) == 1
    for file in [*storage.all_files(output), *storage.all_files(s3.uri("warehouse"))]:
        assert s3.secret_key.encode() not in storage.read_bytes(file.uri)


def test_filters_a_hierarchy_and_a_table_at_once_on_s3_killed_and_resumed(
    tag: Callable[..., str], s3: S3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kill_at: Callable[[int], None]
) -> None:
    """Each tenant has the best of its own labels and those above them, but none that its filter leaves out; once a night."""
    for name, value in (("endpoint", s3.endpoint), ("region", "us-east-1")):
        monkeypatch.setenv(f"PYICEBERG_CATALOG__LAKE__S3__{name.upper()}", value)
    lake = Lake(tmp_path / "lake", monkeypatch, warehouse=s3.uri("all-at-once/warehouse"))
    rows = [{**document(n), "tenant": ["painter", "grocer"][n % 2]} for n in range(40)]
    folders.upload(write(tmp_path / "in" / "documents.parquet", rows).parent, s3.uri("all-at-once/in"))
    above = {"label": [*COLOURS, *KINDS, "colour"], "parent": ["colour"] * 3 + ["fruit"] * 4 + ["everything"]}
    pq.write_table(pa.table(above), tmp_path / "above.parquet")
    filters = f'--filters.named={{"painter": {{"allow": {json.dumps(COLOURS)}}}, "grocer": {{"deny": {json.dumps(COLOURS)}}}}}'
    options = ["--filters.column=tenant", filters, f"--hierarchy.table={tmp_path / 'above.parquet'}", "--hierarchy.close=true"]
    where = {"output": s3.uri("all-at-once/nights"), "commit_rows": 10, "k": 2}
    exact = {"model__scoring": "exact", "model__precision": "float32"}
    write_piece, pieces = PieceWriter.__call__, itertools.count()

    def killed_in_the_third(writer: PieceWriter, number: int, table: pa.Table) -> Any:
        if next(pieces) == 2:
            raise Killed("a piece")
        return write_piece(writer, number, table)

    monkeypatch.setattr(PieceWriter, "__call__", killed_in_the_third)
    for step in (-1, 9, 4):
        kill_at(step)
        with pytest.raises(Killed):
            tag(s3.uri("all-at-once/in"), *options, *IN_TABLE, **where, **exact)
    kill_at(-1)
    for _ in range(2):
        folder = tag(s3.uri("all-at-once/in"), *options, *IN_TABLE, **where, **exact)
    check(lake, folder)
    assert len(lake.snapshots()) == 1 and len(lake.rows()) == 40
    for row in lake.rows().to_pylist():
        labels, n = set(row["labels"]), int(row["id"][1:])
        assert row["filter"] == ["painter", "grocer"][n % 2]
        own = labels - {"colour", "everything", "fruit"}
        assert own <= set(COLOURS if row["filter"] == "painter" else KINDS) and len(own) >= 1
        assert labels - own == ({"colour", "everything"} if row["filter"] == "painter" else {"fruit"})


def test_a_night_on_ray_that_ray_data_reads(
    tag_with: Callable[..., str], ray_session: None, catalogue: Path, lake: Lake
) -> None:
    check(lake, tag_with(None, catalogue, *IN_TABLE, target_bytes=1, commit_rows=20))
    properties = {"name": "lake", "type": "sql", "uri": f"sqlite:///{lake.file}"}
    read = read_iceberg(table_identifier="shop.tags", catalog_kwargs=properties)
    assert sorted(row["id"] for row in read.take_all()) == sorted(f"d{n}" for n in range(40))


def test_without_pyiceberg_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "xmc_ray.storage.iceberg", raising=False)
    monkeypatch.setitem(sys.modules, "pyiceberg", None)
    with pytest.raises(ConfigError, match=r"pyiceberg is missing.*pip install 'xmc_ray\[iceberg\]'"):
        tables.open_table(TableConfig(name="shop.tags"))
    assert tables.open_table(TableConfig()) is None


@pytest.mark.parametrize("name", ["tags", ".tags", "shop.", "shop..tags", ""])
def test_a_table_has_a_namespace(name: str) -> None:
    with pytest.raises(ConfigError, match="a table without its namespace"):
        TableConfig(name=name)
