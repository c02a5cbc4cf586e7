"""Row groups: what of a file is one part, and that none is read again for rows further on."""

import io
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.fs
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.local import LocalFileSystem
from hypothesis import given, settings
from hypothesis import strategies as st

from xmc_ray import storage
from xmc_ray.data import row_groups
from xmc_ray.data.documents import DocumentsConfig, Rules
from xmc_ray.data.reader import Segment, read_all
from xmc_ray.data.row_groups import Opened, RowGroups, row_ranges
from xmc_ray.storage.listing import FileInfo

RULES = Rules.of(DocumentsConfig(uri="/x"), labelled=False)


def write(path: Path, rows: int, size: int) -> FileInfo:
    texts = [f"{n * 7919:050}" for n in range(rows)]
    pq.write_table(
        pa.table({"id": [f"{n}" for n in range(rows)], "text": texts}), path, row_group_size=size, compression="none"
    )
    return storage.stat(path)


@pytest.fixture
def bytes_read(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """What is read from Parquet files from now on, read by read."""
    counts: list[int] = []

    class Counted(io.FileIO):
        def read(self, size: int | None = -1) -> bytes:  # type: ignore[override]
            data = super().read(-1 if size is None else size)
            counts.append(len(data))
            return data

    class Counting(LocalFileSystem):  # type: ignore[misc]
        def open(self, path: str, mode: str = "rb", **settings: Any) -> Counted:
            return Counted(path)

    filesystem = pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(Counting(skip_instance_cache=True)))
    monkeypatch.setattr(row_groups.storage, "arrow_filesystem", lambda uri: (filesystem, uri))
    return counts


def test_a_large_file_is_read_in_runs_of_row_groups(tmp_path: Path) -> None:
    file = write(tmp_path / "x.parquet", 1050, 100)
    assert row_ranges(file, file.size) == [(0, None)]
    assert row_ranges(file, file.size // 3) == [(0, 300), (300, 300), (600, 300), (900, 150)]
    assert row_ranges(file, 1) == [*((first, 100) for first in range(0, 1000, 100)), (1000, 50)]
    (tmp_path / "y.parquet").write_bytes(bytes(100))
    assert row_ranges(storage.stat(tmp_path / "y.parquet"), 10) == [(0, None)]


@given(st.integers(1, 60), st.integers(1, 25), st.integers(1, 9), st.data())
@settings(deadline=None, max_examples=50)
def test_rows_are_those_asked_for_in_any_order(
    tmp_path_factory: pytest.TempPathFactory, rows: int, size: int, chunk: int, data: st.DataObject
) -> None:
    path = tmp_path_factory.mktemp("file") / "x.parquet"
    write(path, rows, size)
    file = RowGroups(str(path), ["id"], chunk)
    assert file.ends == [*range(size, rows, size), rows]
    for _ in range(5):
        group = data.draw(st.integers(0, len(file.ends) - 1))
        first, end = group * size, file.ends[group]
        start = data.draw(st.integers(first, end))
        stop = data.draw(st.integers(start, end))
        tables = list(file.rows(group, start, stop))
        assert [row for table in tables for row in table["id"].to_pylist()] == [f"{n}" for n in range(start, stop)]
        assert all(0 < len(table) <= chunk for table in tables)
    file.close()


def test_a_row_group_is_read_once_for_many_segments(tmp_path: Path, bytes_read: list[int]) -> None:
    """Kind: cost. A night with scattered changes has many segments in a row group, with gaps between them."""
    file = write(tmp_path / "x.parquet", 40_000, 20_000)
    assert file.size > 2 << 20, "small files are read ahead, each by itself"
    segments = [Segment(file, start, start, 300) for start in range(500, 40_000, 1000)]
    found = [row for _, chunk in read_all(segments, RULES) for row in chunk.table["row"].to_pylist()]
    assert found == [row for start in range(500, 40_000, 1000) for row in range(start, start + 300)]
    assert sum(bytes_read) < 1.1 * file.size, "20 times before"


def test_a_file_is_open_until_another_is_wanted(tmp_path: Path) -> None:
    paths = [str(tmp_path / name) for name in "ab"]
    for path in paths:
        write(Path(path), 10, 10)
    opened = Opened()
    first = opened.row_groups(paths[0], ["id"], 5)
    assert opened.row_groups(paths[0], ["id"], 5) is first and not first._stream.closed
    second = opened.row_groups(paths[1], ["id"], 5)
    assert first._stream.closed and not second._stream.closed
    opened.close()
    assert second._stream.closed


def test_after_an_error_a_row_group_is_begun_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kind: recovery. What pyarrow has in hand after an error is not known."""
    write(tmp_path / "x.parquet", 20, 20)
    file = RowGroups(str(tmp_path / "x.parquet"), ["id"], 5)
    rows = file.rows(0, 0, 20)
    next(rows)

    def failing() -> Any:
        raise OSError("AWS Error NETWORK_CONNECTION")
        yield

    file._batches = failing()
    with pytest.raises(OSError, match="NETWORK"):
        next(rows)
    assert [row for table in file.rows(0, 5, 20) for row in table["id"].to_pylist()] == [f"{n}" for n in range(5, 20)]
    file._batches, file._batch, file._first = iter(()), pa.table({}), 20
    with pytest.raises(pa.ArrowInvalid, match="fewer rows than its footer says"):
        list(file.rows(0, 20, 21))
