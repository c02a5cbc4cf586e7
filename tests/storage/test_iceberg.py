"""Days of an Iceberg table: replaced in one snapshot each, once a run, whoever else commits."""

import datetime
import random
import uuid
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import requests
from catalogue import Lake
from pyiceberg.catalog.sql import SqlCatalog
from pyiceberg.exceptions import CommitStateUnknownException
from pyiceberg.manifest import DataFile
from pyiceberg.partitioning import PartitionField, PartitionSpec
from pyiceberg.schema import Schema
from pyiceberg.transforms import IdentityTransform, MonthTransform
from pyiceberg.types import DateType, FloatType, ListType, LongType, NestedField, StringType

from xmc_ray import storage
from xmc_ray.errors import ConfigError, DataError, UnavailableError, XmcError
from xmc_ray.storage import iceberg
from xmc_ray.storage.iceberg import ATTEMPT, RUN, Commit, DayTable

COLUMNS = pa.schema([("id", pa.string()), ("labels", pa.list_(pa.string())), ("scores", pa.list_(pa.float32()))])
DAYS = ["2026-11-22", "2026-11-23", "2026-11-24"]


@pytest.fixture
def lake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Lake:
    return Lake(tmp_path / "lake", monkeypatch)


def rows(*ids: int) -> list[dict[str, Any]]:
    return [{"id": str(n), "labels": [f"label {n}", "fruit"][: n % 3], "scores": [0.75, 0.5][: n % 3]} for n in ids]


def written(table: DayTable, day: str, rows: list[dict[str, Any]], folder: Path, name: str, size: int = 3) -> list[DataFile]:
    """Data files of ``size`` rows each, in row groups of two; no name comes twice."""
    files, now = [], table.create()
    for start in range(0, len(rows), size):
        source = folder / f"{name}-{start}.parquet"
        pq.write_table(pa.Table.from_pylist(rows[start : start + size], COLUMNS), source, row_group_size=2)
        (place,) = table.places(now, day, [f"{uuid.uuid4().hex}.parquet"])
        file = table.writer(now, day)(str(source), place)
        assert file is not None
        files.append(file)
    return files


def replace(table: DayTable, day: str, rows: list[dict[str, Any]], folder: Path, run: str, **further: Any) -> Commit:
    return table.replace(day, written(table, day, rows, folder, run), {RUN: run, ATTEMPT: f"of {run}"}, **further)


def test_a_day_is_replaced_in_one_snapshot_and_other_days_stay(lake: Lake, tmp_path: Path) -> None:
    """Beside a dictionary of days. Data files of one day have no row of another."""
    rng, expected = random.Random(0), dict[str, list[dict[str, Any]]]()
    table = DayTable("lake", "shop.tags", COLUMNS)
    assert table.load() is None
    for number in range(12):
        day, new = rng.choice(DAYS), rows(*range(rng.randrange(9)))
        assert replace(table, day, new, tmp_path, f"run{number}").attempt == f"of run{number}"
        expected[day] = new
        found = sorted(lake.rows().to_pylist(), key=lambda row: (row["dt"], row["id"]))
        assert found == [
            {"dt": datetime.date.fromisoformat(day), **row}
            for day, its in sorted(expected.items())
            for row in sorted(its, key=lambda row: str(row["id"]))
        ]
        assert [each[RUN] for each in lake.snapshots()] == [f"run{n}" for n in range(number + 1)]
    files = [task.file for task in lake.table.scan().plan_files()]
    epoch = datetime.date(1970, 1, 1)
    assert {str(epoch + datetime.timedelta(file.partition[0])) for file in files} == {day for day in DAYS if expected.get(day)}
    assert all(f"/dt={epoch + datetime.timedelta(file.partition[0])}/" in file.file_path for file in files)


def test_a_new_day_is_an_append_for_those_who_read_what_is_added(lake: Lake, tmp_path: Path) -> None:
    table = DayTable("lake", "shop.tags", COLUMNS)
    for day, run in ((DAYS[0], "a"), (DAYS[1], "b"), (DAYS[1], "c")):
        replace(table, day, rows(1, 2), tmp_path, run)
    operations = [each.summary.operation.value for each in lake.table.snapshots() if each.summary]
    assert operations == ["append", "append", "overwrite"]


def test_a_run_that_is_in_the_table_is_not_committed_again(lake: Lake, tmp_path: Path) -> None:
    """Not even on top of a later commit; but again once the table was rolled back to before it."""
    table = DayTable("lake", "shop.tags", COLUMNS)
    first = replace(table, DAYS[0], rows(1, 2), tmp_path, "a")
    replace(table, DAYS[1], rows(3), tmp_path, "b")
    assert replace(table, DAYS[0], rows(7), tmp_path, "a") == first
    assert sorted(lake.rows()["id"].to_pylist()) == ["1", "2", "3"]
    lake.table.manage_snapshots().rollback_to_snapshot(first.snapshot).commit()
    assert replace(table, DAYS[1], rows(3), tmp_path, "b") != first
    assert sorted(lake.rows()["id"].to_pylist()) == ["1", "2", "3"]


@pytest.mark.parametrize(
    ("other", "day", "landed", "attempt", "left"),
    [
        ("a", DAYS[0], ["a"], "the other's", ["5", "9"]),
        ("b", DAYS[0], ["b", "a"], "of a", ["1", "2", "9"]),
        ("b", DAYS[1], ["b", "a"], "of a", ["1", "2", "5", "9"]),
    ],
    ids=["the same run", "another run of the day", "another day"],
)
def test_of_two_at_once_the_second_looks_again(
    other: str, day: str, landed: list[str], attempt: str, left: list[str], lake: Lake, tmp_path: Path
) -> None:
    """The other one commits after the first has looked at the table."""
    first, second = (DayTable("lake", "shop.tags", COLUMNS) for _ in range(2))
    replace(first, DAYS[2], rows(9), tmp_path, "before")
    waiting = written(second, day, rows(5), tmp_path, "other")

    def confirm() -> None:
        if waiting:
            second.replace(day, waiting, {RUN: other, ATTEMPT: "the other's"})
            waiting.clear()

    done = replace(first, DAYS[0], rows(1, 2), tmp_path, "a", confirm=confirm)
    assert [each[RUN] for each in lake.snapshots()] == ["before", *landed] and done.attempt == attempt
    assert sorted(lake.rows()["id"].to_pylist()) == left


def test_who_may_not_commit_any_more_changes_nothing(lake: Lake, tmp_path: Path) -> None:
    table = DayTable("lake", "shop.tags", COLUMNS)
    replace(table, DAYS[0], rows(1), tmp_path, "before")

    def confirm() -> None:
        raise ConfigError("another job works in this folder")

    with pytest.raises(ConfigError, match="another job"):
        replace(table, DAYS[0], rows(2), tmp_path, "a", confirm=confirm)
    assert [each[RUN] for each in lake.snapshots()] == ["before"] and lake.rows()["id"].to_pylist() == ["1"]


@pytest.mark.parametrize("lost", [CommitStateUnknownException("502"), requests.ConnectionError("reset")])
@pytest.mark.parametrize("has_landed", [True, False])
def test_a_commit_whose_answer_was_lost_is_made_once(
    lost: Exception, has_landed: bool, lake: Lake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table, commit_table, answers = DayTable("lake", "shop.tags", COLUMNS), SqlCatalog.commit_table, iter([lost])
    table.create()

    def lose(self: SqlCatalog, *arguments: Any) -> Any:
        error = next(answers, None)
        result = commit_table(self, *arguments) if has_landed or error is None else None
        if error is not None:
            raise error
        return result

    monkeypatch.setattr(SqlCatalog, "commit_table", lose)
    files = written(table, DAYS[0], rows(1, 2), tmp_path, "a")
    done = storage.patiently(table.replace, DAYS[0], files, {RUN: "a", ATTEMPT: "x"})
    assert [each["id"] for each in lake.snapshots()] == [done.snapshot] and len(lake.rows()) == 2
    assert next(answers, None) is None


def test_others_who_never_stop_committing_are_not_given_way_to_for_ever(
    lake: Lake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(iceberg, "_CONFLICTS", 3)
    monkeypatch.setattr(iceberg, "_PAUSE", 0.0)
    table, other = (DayTable("lake", "shop.tags", COLUMNS) for _ in range(2))
    runs = iter("bcdef")

    def confirm() -> None:
        other.replace(DAYS[1], [], {RUN: next(runs), ATTEMPT: ""})

    with pytest.raises(UnavailableError, match="others keep committing"):
        replace(table, DAYS[0], rows(1), tmp_path, "a", confirm=confirm)
    assert next(runs) == "e" and len(lake.rows()) == 0


GOOD = [
    NestedField(1, "id", StringType(), required=False),
    NestedField(2, "labels", ListType(20, StringType(), False), required=False),
    NestedField(3, "scores", ListType(21, FloatType(), False), required=False),
    NestedField(4, "dt", DateType(), required=True),
]
BY_DAY = PartitionField(4, 1000, IdentityTransform(), "day")


@pytest.mark.parametrize(
    ("schema", "partitions", "told"),
    [
        (GOOD[1:], [BY_DAY], "lacks a column: shop.tags, column id; expected string"),
        ([NestedField(1, "id", LongType(), required=False), *GOOD[1:]], [BY_DAY], "column id; found long; expected string"),
        ([*GOOD, NestedField(5, "mine", LongType(), required=True)], [BY_DAY], "must not be null: shop.tags, column mine"),
        (GOOD, [], "other partitions: shop.tags; found none"),
        (GOOD, [PartitionField(4, 1000, MonthTransform(), "month")], "other partitions.*month"),
        (GOOD, [BY_DAY, PartitionField(1, 1001, IdentityTransform(), "id")], "other partitions"),
    ],
)
def test_a_table_of_another_kind_is_refused(
    schema: list[NestedField], partitions: list[PartitionField], told: str, lake: Lake
) -> None:
    catalog = lake.catalog
    catalog.create_namespace("shop")
    catalog.create_table("shop.tags", Schema(*schema), partition_spec=PartitionSpec(*partitions))
    with pytest.raises(ConfigError, match=f"{told}.*choose another table"):
        DayTable("lake", "shop.tags", COLUMNS)


def test_a_table_of_ones_own_may_have_other_names_and_further_columns(lake: Lake, tmp_path: Path) -> None:
    catalog = lake.catalog
    catalog.create_namespace("shop")
    fields = [*GOOD, NestedField(5, "mine", LongType(), required=False)]
    catalog.create_table("shop.tags", Schema(*fields), partition_spec=PartitionSpec(BY_DAY))
    replace(DayTable("lake", "shop.tags", COLUMNS), DAYS[0], rows(1), tmp_path, "a")
    (row,) = lake.rows().to_pylist()
    assert row == {**rows(1)[0], "dt": datetime.date.fromisoformat(DAYS[0]), "mine": None}


def test_a_file_of_several_days_is_not_replaced(lake: Lake, tmp_path: Path) -> None:
    """It is from before the table's partitions were changed."""
    catalog = lake.catalog
    catalog.create_namespace("shop")
    table = catalog.create_table("shop.tags", Schema(*GOOD))
    kinds = pa.schema([("id", pa.string()), pa.field("dt", pa.date32(), nullable=False)])
    table.append(pa.table({"id": ["1"], "dt": [datetime.date.fromisoformat(DAYS[0])]}, kinds))
    with table.update_spec() as update:
        update.add_identity("dt")
    ours = DayTable("lake", "shop.tags", COLUMNS)
    with pytest.raises(ConfigError, match="a file of the table is not of one day"):
        replace(ours, DAYS[0], rows(2), tmp_path, "a")
    replace(ours, DAYS[1], rows(2), tmp_path, "a")
    assert sorted(lake.rows()["id"].to_pylist()) == ["1", "2"]


def test_a_source_that_is_no_parquet_file_is_one_line(lake: Lake, tmp_path: Path) -> None:
    table = DayTable("lake", "shop.tags", COLUMNS)
    now = table.create()
    (place,) = table.places(now, DAYS[0], ["a.parquet"])
    with pytest.raises(DataError, match="no such file"):
        table.writer(now, DAYS[0])(str(tmp_path / "none.parquet"), place)
    (tmp_path / "text.parquet").write_text("text")
    with pytest.raises(DataError, match="not a Parquet file"):
        table.writer(now, DAYS[0])(str(tmp_path / "text.parquet"), place)
    pq.write_table(COLUMNS.empty_table(), tmp_path / "empty.parquet")
    assert table.writer(now, DAYS[0])(str(tmp_path / "empty.parquet"), place) is None and not lake.files()


def test_a_writer_of_files_has_no_credentials_of_the_catalogue(lake: Lake, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYICEBERG_CATALOG__LAKE__TOKEN", "a secret")
    monkeypatch.setenv("PYICEBERG_CATALOG__LAKE__S3__REGION", "eu-central-1")
    table = DayTable("lake", "shop.tags", COLUMNS)
    properties = table.writer(table.create(), DAYS[0]).io.properties
    assert properties["s3.region"] == "eu-central-1" and set(properties) <= {"s3.region", "s3.endpoint"}


@pytest.mark.parametrize(
    ("settings", "kind", "told"),
    [
        (
            {},
            ConfigError,
            "pyiceberg knows no such catalogue; found away; describe it in .pyiceberg.yaml.*PYICEBERG_CATALOG__AWAY__URI",
        ),
        ({"URI": "http://127.0.0.1:9/"}, UnavailableError, "cannot be reached: shop.tags in the catalogue away"),
        ({"URI": "sqlite:////nowhere/at/all.db"}, UnavailableError, "cannot be reached: shop.tags in the catalogue away"),
        ({"TYPE": "glue"}, ConfigError, "cannot be read or written"),
        ({"URI": "nonsense://x"}, ConfigError, "cannot be read or written"),
    ],
)
def test_a_catalogue_that_is_away_is_one_line(
    settings: dict[str, str], kind: type[XmcError], told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in settings.items():
        monkeypatch.setenv(f"PYICEBERG_CATALOG__AWAY__{name}", value)
    with pytest.raises(kind, match=told):
        DayTable("away", "shop.tags", COLUMNS)


def test_no_secret_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    error = ValueError("cannot log in to https://me:pass@host/x with hush\nand more")
    assert iceberg._line(error, {"token": "hush", "uri": "x"}) == "cannot log in to https://***@host/x with <token>"
    for address in ("postgresql://u:p/ss@db/x", "postgresql://u:p@ss@db/x"):
        assert iceberg._line(ValueError(f"cannot parse '{address}'"), {}) == "cannot parse 'postgresql://***@db/x'"
    assert iceberg._line(ValueError(), {"s3.secret-access-key": ""}) == "ValueError"
