"""An Iceberg table of days: the rows of a day are replaced in one snapshot, and a run commits its day once.

The table is partitioned by ``dt``, a date, and has its own copy of what is committed to it. Data files are written first, then
one snapshot takes them in and drops those that the day had before. The snapshot's properties name the run. Before each attempt
to commit, the table is read again and the run is looked for, and the catalogue accepts a commit only on top of the snapshot
that was looked at (``assert-ref-snapshot-id``). So a commit whose answer was lost is not repeated, and of two at once only one
lands.

Catalogues are described in pyiceberg's own configuration, with their credentials; S3 is reached as in `address`. Needs
pyiceberg, which comes with ``xmc_ray[iceberg]``.
"""

import datetime
import random
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as pq
import requests
from botocore.exceptions import BotoCoreError, ClientError
from pyiceberg import exceptions, types
from pyiceberg.catalog import Catalog, load_catalog
from pyiceberg.io import FileIO, load_file_io
from pyiceberg.io.pyarrow import parquet_file_to_data_file, schema_to_pyarrow
from pyiceberg.manifest import DataFile
from pyiceberg.partitioning import PartitionField, PartitionFieldValue, PartitionKey, PartitionSpec
from pyiceberg.schema import Schema
from pyiceberg.table import Table
from pyiceberg.table.metadata import TableMetadata
from pyiceberg.table.snapshots import ancestors_of
from pyiceberg.transforms import IdentityTransform
from pyiceberg.utils.config import Config
from sqlalchemy.exc import OperationalError, SQLAlchemyError

from xmc_ray.errors import ConfigError, DataError, UnavailableError, scrubbed
from xmc_ray.storage.address import S3Access, arrow_filesystem, explained, is_unavailable

DAY = "dt"
RUN, ATTEMPT = "xmc-ray.run", "xmc-ray.attempt"  # properties of a snapshot

_CONFLICTS = 100  # commits of others in a row that one commit gives way to
_PAUSE = 0.5  # seconds before it is tried again, at most
_OF_STORAGE = ("s3.", "gcs.", "adls.", "hdfs.", "hf.", "client.", "py-io-impl")  # properties that a writer of files needs
_SECRET = re.compile("secret|token|password|credential|key", re.IGNORECASE)
_AWAY = (
    *(exceptions.ServerError, exceptions.ServiceUnavailableError, exceptions.TooManyRequestsError),
    *(exceptions.CommitStateUnknownException, exceptions.WaitingForLockException),
    *(requests.ConnectionError, requests.Timeout, OperationalError),
)
_REFUSED = (
    *(exceptions.RESTError, exceptions.NoSuchTableError, exceptions.NoSuchNamespaceError, exceptions.ValidationException),
    *(exceptions.NotInstalledError, exceptions.ValidationError, exceptions.SignError, exceptions.ResolveError),
    *(SQLAlchemyError, BotoCoreError, ClientError, ImportError, ValueError, OSError),
)


@dataclass(frozen=True)
class Commit:
    """A run's snapshot, and which of the run's attempts has made it."""

    snapshot: int
    attempt: str


@dataclass(frozen=True)
class DayWriter:
    """Writes the data files of a day. It may be sent to other processes, and has no credentials of the catalogue."""

    io: FileIO
    metadata: TableMetadata
    day: datetime.date

    def __call__(self, source: str, target: str) -> DataFile | None:
        """Copy a Parquet file, row group by row group, with a column ``dt``; None, and no file, if it has no rows.

        Columns that ``source`` lacks are null. DataError if it is missing or is no Parquet file.
        """
        with _explained(target, self.io.properties), _parquet(source) as file:
            if file.metadata.num_rows == 0:
                return None
            columns = {DAY, *file.schema_arrow.names}
            schema = pa.schema([field for field in schema_to_pyarrow(self.metadata.schema()) if field.name in columns])
            output = self.io.new_output(target).create(overwrite=True)
            with output, pq.ParquetWriter(output, schema, compression="zstd", store_schema=False) as writer:
                for number in range(file.num_row_groups):
                    with explained(source):
                        table = file.read_row_group(number)
                    table = table.append_column(DAY, pa.repeat(pa.scalar(self.day), len(table)))
                    writer.write_table(table.select(schema.names).cast(schema), row_group_size=len(table))
            return parquet_file_to_data_file(self.io, self.metadata, target)


class DayTable:
    """A table partitioned by ``dt`` alone, which may be missing as yet."""

    def __init__(self, catalog: str, name: str, columns: pa.Schema) -> None:
        """``name``: with its namespace; ``columns``: those beside ``dt``. The table may have others, if they are optional.

        ConfigError if pyiceberg's configuration knows no such catalogue, or if the table has other columns or partitions;
        UnavailableError if the catalogue does not answer.
        """
        self.name, self.catalog_name = name, catalog
        self._columns = pa.schema([(DAY, pa.date32()), *columns])
        self._properties: dict[str, str] = {}
        with self._explained():
            self._properties = _properties(catalog)
            self._catalog: Catalog = load_catalog(catalog, **self._properties)
        self.load()

    def load(self) -> Table | None:
        """The table as it is now, if it exists; ConfigError if it is not as it has to be."""
        with self._explained():
            try:
                table = self._catalog.load_table(self.name)
            except (exceptions.NoSuchTableError, exceptions.NoSuchNamespaceError):
                return None
        self._check(table)
        return table

    def create(self) -> Table:
        """The table, made now unless it exists."""
        table = self.load()
        if table is not None:
            return table
        schema = Schema(*(types.NestedField(n, f.name, _type(f.type, n), False) for n, f in enumerate(self._columns, 1)))
        spec = PartitionSpec(PartitionField(source_id=1, field_id=1000, transform=IdentityTransform(), name=DAY))
        namespace = self.name.rpartition(".")[0]
        with self._explained(), suppress(exceptions.TableAlreadyExistsError):
            with suppress(exceptions.NamespaceAlreadyExistsError):
                if not self._catalog.namespace_exists(namespace):
                    self._catalog.create_namespace(namespace)
            self._catalog.create_table(self.name, schema, partition_spec=spec)
        table = self.load()
        if table is None:
            raise UnavailableError("the table has been dropped meanwhile", where=self.name)
        return table

    def writer(self, table: Table, day: str) -> DayWriter:
        """What writes files of a day for ``table``."""
        properties = {key: value for key, value in table.io.properties.items() if key.startswith(_OF_STORAGE)}
        io = load_file_io(properties, table.metadata.location)
        return DayWriter(io, table.metadata, datetime.date.fromisoformat(day))

    def places(self, table: Table, day: str, names: Sequence[str]) -> list[str]:
        """Where data files of these names lie."""
        value = PartitionFieldValue(table.spec().fields[0], datetime.date.fromisoformat(day))
        key = PartitionKey([value], table.spec(), table.schema())
        return [table.location_provider().new_data_location(name, key) for name in names]

    def replace(
        self, day: str, files: Sequence[DataFile], properties: Mapping[str, str], confirm: Callable[[], None] = lambda: None
    ) -> Commit:
        """Make ``files`` the only ones of the day, by one snapshot with these properties, `RUN` and `ATTEMPT` among them.

        If the run is in the table already, nothing is done, and that commit is returned. ``confirm`` is called between looking
        at the table and committing, and raises if this process is not to commit any more.
        """
        for _ in range(_CONFLICTS):
            table = self.create()
            with self._explained():
                done = find(table, properties[RUN])
                if done is not None:
                    return done
                before = self._files_of(table, day)
                confirm()
                with suppress(exceptions.CommitFailedException):  # another commit came first: look again
                    return Commit(_commit(table, before, files, properties), properties[ATTEMPT])
            time.sleep(random.uniform(0, _PAUSE))
        raise UnavailableError("others keep committing to the table", where=self.name, found=f"{_CONFLICTS} commits")

    def remove(self, table: Table, places: Sequence[str]) -> None:
        """Remove data files that no snapshot has taken in. What cannot be removed is left to the table's maintenance."""
        for place in places:
            with suppress(OSError):
                table.io.delete(place)

    def _files_of(self, table: Table, day: str) -> list[DataFile]:
        """The data files of a day; ConfigError if one, from before the table's partitions were changed, may have other days."""
        files = [task.file for task in table.scan(row_filter=f"{DAY} = '{day}'").plan_files()]
        for file in files:
            if not _is_by_day(table.specs()[file.spec_id], table.schema()):
                way_out = f"rewrite the table's older files by {DAY}"
                raise ConfigError("a file of the table is not of one day", where=file.file_path, way_out=way_out)
        return files

    def _check(self, table: Table) -> None:
        found = {field.name: field for field in table.schema().fields}
        for field in self._columns:
            expected, name = str(_type(field.type, 1)), f"{self.name}, column {field.name}"
            if field.name not in found:
                raise ConfigError("the table lacks a column", where=name, expected=expected, way_out=_ANOTHER)
            if str(found[field.name].field_type) != expected:
                what = "the table has a column of another type"
                raise ConfigError(what, where=name, found=found[field.name].field_type, expected=expected, way_out=_ANOTHER)
        for name in found.keys() - set(self._columns.names):
            if found[name].required:
                what = "the table has another column that must not be null"
                raise ConfigError(what, where=f"{self.name}, column {name}", way_out=_ANOTHER)
        if not _is_by_day(table.spec(), table.schema()):
            what, is_now = "the table has other partitions", table.spec().fields or "none"
            raise ConfigError(what, where=self.name, found=is_now, expected=f"identity({DAY})", way_out=_ANOTHER)

    def _explained(self) -> AbstractContextManager[None]:
        return _explained(f"{self.name} in the catalogue {self.catalog_name}", self._properties)


_ANOTHER = "choose another table, which is created if it does not exist"


def find(table: Table, run: str) -> Commit | None:
    """The commit of a run, among those that the table's present state is made of and that have not expired."""
    for snapshot in ancestors_of(table.current_snapshot(), table.metadata):
        properties = snapshot.summary.additional_properties if snapshot.summary else {}
        if properties.get(RUN) == run:
            return Commit(snapshot.snapshot_id, properties.get(ATTEMPT, ""))
    return None


def count(files: Sequence[DataFile]) -> int:
    """The rows of data files."""
    return sum(file.record_count for file in files)


@contextmanager
def _parquet(uri: str) -> Iterator[pq.ParquetFile]:
    fs, path = arrow_filesystem(uri)
    with explained(uri):
        try:
            file = pq.ParquetFile(path, filesystem=fs)
        except pa.ArrowInvalid as error:
            raise DataError("not a Parquet file", where=uri, found=error) from None
    with file:
        yield file


def _commit(table: Table, before: Sequence[DataFile], files: Sequence[DataFile], properties: Mapping[str, str]) -> int:
    """The snapshot's id; CommitFailedException, and nothing is changed, if ``table`` is not the table's present state."""
    # pyiceberg would repeat an append on top of whatever has come first, this run's own commit by another process included.
    table.metadata.properties["commit.retry.num-retries"] = "0"  # of this copy of the metadata
    with table.transaction() as transaction:
        update = transaction.update_snapshot(snapshot_properties=dict(properties))
        with update.overwrite() if before else update.fast_append() as snapshot:
            for file in before:
                snapshot.delete_data_file(file)
            for file in files:
                snapshot.append_data_file(file)
    return int(snapshot.snapshot_id)


def _is_by_day(spec: PartitionSpec, schema: Schema) -> bool:
    field = spec.fields[0] if len(spec.fields) == 1 else None
    return (
        field is not None and schema.find_column_name(field.source_id) == DAY and isinstance(field.transform, IdentityTransform)
    )


def _type(kind: pa.DataType, number: int) -> types.IcebergType:
    """``number``: of the field, unlike that of others; ids of elements follow from it, and the catalogue renumbers them."""
    if pa.types.is_list(kind):
        return types.ListType(1000 + number, _type(kind.value_type, number), element_required=False)
    known = {pa.string(): types.StringType(), pa.float32(): types.FloatType(), pa.date32(): types.DateType()}
    return known[kind]


def _properties(catalog: str) -> dict[str, str]:
    """What is known of a catalogue; S3 is that of the ``AWS_*`` variables, unless it is said there."""
    known = Config().get_catalog_config(catalog)
    if known is None:
        way_out = f"describe it in .pyiceberg.yaml, or by variables such as PYICEBERG_CATALOG__{catalog.upper()}__URI"
        raise ConfigError("pyiceberg knows no such catalogue", found=catalog, way_out=way_out)
    access = S3Access.from_environment()  # keys are found there by pyarrow itself, in every process
    given = {"s3.endpoint": access.endpoint, "s3.region": access.region}
    return {name: value for name, value in given.items() if value is not None} | {k: str(v) for k, v in known.items()}


@contextmanager
def _explained(where: str, properties: Mapping[str, str]) -> Iterator[None]:
    """One line for what pyiceberg, a catalogue or its storage raise, without the secrets among ``properties``."""
    try:
        yield
    except _AWAY as error:
        raise UnavailableError("the table cannot be reached", where=where, found=_line(error, properties)) from None
    except _REFUSED as error:
        kind = UnavailableError if is_unavailable(error) else ConfigError
        raise kind("the table cannot be read or written", where=where, found=_line(error, properties)) from None


def _line(error: BaseException, properties: Mapping[str, str]) -> str:
    text = (str(error).strip() or type(error).__name__).splitlines()[0]
    for name, value in properties.items():
        if value and _SECRET.search(name):
            text = text.replace(value, f"<{name}>")
    return scrubbed(text)
