"""Files wherever they lie, on a local path or on S3 (`access`): listed, read, written at once or not at all, removed.

Only files exist: a folder is a prefix that some files share, because that is all that S3 knows.
"""

import errno
import io
import json
import os
import posixpath
import re
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq
from botocore.exceptions import BotoCoreError

from xmc_ray import storage
from xmc_ray.errors import ConfigError, DataError, XmcError
from xmc_ray.storage.address import Uri, arrow_filesystem, explained, filesystem, is_local, split

T = TypeVar("T")
PATIENCE = 300.0  # seconds that a job in the middle of its work waits for a storage that does not answer
_REMOVERS = 16  # files removed at a time
_PAUSE = 1.0  # seconds from one attempt of `patiently` to the next


@dataclass(frozen=True, kw_only=True)
class FileInfo:
    """A file as listed: its size in bytes, and a version (S3's etag, else the time of change) that a change changes."""

    uri: str
    size: int
    version: str


def join(uri: Uri, *parts: str) -> str:
    """The address of ``parts``, relative names, below ``uri``."""
    return posixpath.join(os.fspath(uri), *parts)


def absolute(uri: Uri) -> str:
    """The same address as listings spell it, for processes that run in another folder: a local path in full, or s3://."""
    scheme, path = split(uri)
    return path if scheme == "file" else f"s3://{path}"


def exists(uri: Uri) -> bool:
    """Whether there is such a file. For folders ask ``is_empty``: some S3 servers remember a folder whose files are gone."""
    fs, path = filesystem(uri)
    with explained(uri):
        return bool(fs.exists(path))


def is_empty(uri: Uri) -> bool:
    """Whether there is no such folder or no file in it, hidden ones included."""
    return not all_files(uri)


def all_files(uri: Uri) -> list[FileInfo]:
    """All files below ``uri``, hidden ones included, in the order of their addresses; none where there is no such folder."""
    with explained(uri):
        files = _local_files(split(uri)[1]) if is_local(uri) else _s3_files(uri)
        return sorted(files, key=lambda file: file.uri)


def list_files(uri: Uri, suffixes: Sequence[str] = ()) -> list[FileInfo]:
    """All files below ``uri`` that end in one of ``suffixes`` (none: any), in the order of their addresses.

    Names that begin with ``_`` or ``.``, and whatever lies below such a folder, are left out. The address of a file gives
    that file alone, whatever its name. DataError if there is none.
    """
    root, files = split(uri)[1], all_files(uri)
    if [split(file.uri)[1] for file in files] == [root]:
        return files
    visible = [file for file in files if not re.search("/[_.]", split(file.uri)[1][len(root) :])]
    wanted = [file for file in visible if file.uri.endswith(tuple(suffixes) or "")]
    if not wanted:
        found = f"{len(files)} other files" if files else "nothing"
        raise DataError("no input", where=uri, found=found, expected=" or ".join(f"*{suffix}" for suffix in suffixes or [""]))
    return wanted


def stat(uri: Uri) -> FileInfo:
    """Size and version of one file, as it is now; FileNotFoundError if there is none."""
    fs, path = filesystem(uri)
    if is_local(uri):
        status = os.stat(path)
        return FileInfo(uri=os.fspath(uri), size=status.st_size, version=str(status.st_mtime_ns))
    try:
        info = fs.info(path)
    except FileNotFoundError:
        raise
    except (OSError, BotoCoreError):
        with explained(uri):
            raise
    return FileInfo(uri=os.fspath(uri), size=info["size"], version=info["ETag"].strip('"'))


def read_bytes(uri: Uri) -> bytes:
    """A whole file; DataError if there is none."""
    fs, path = filesystem(uri)
    with explained(uri):
        return bytes(fs.cat_file(path))


def write_bytes(uri: Uri, data: bytes) -> None:
    """Write a whole file at once: a reader sees the old one or the new one, never a part. Folders are made as needed."""
    fs, path = filesystem(uri)
    with explained(uri, missing=ConfigError):
        if is_local(uri):
            with _replacing(path) as temporary:
                temporary.write_bytes(data)
        else:
            fs.pipe_file(path, data)


@contextmanager
def new_file(uri: Uri) -> Iterator[Path]:
    """A local path to write to; at the end its file appears at ``uri`` at once, or nothing does after an error.

    On the way to S3 the whole file lies in this machine's temporary folder.
    """
    if is_local(uri):
        with explained(uri, missing=ConfigError), _replacing(split(uri)[1]) as temporary:
            yield temporary
    else:
        with tempfile.TemporaryDirectory(prefix="xmc_ray-") as folder:
            temporary = Path(folder, "file")
            yield temporary
            copy_file(temporary, os.fspath(uri))


def read_json(uri: Uri) -> Any:
    """The content of a JSON file; DataError if there is none or if it is no JSON."""
    try:
        return json.loads(read_bytes(uri))
    except ValueError as error:
        raise DataError("not a JSON file", where=uri, found=error) from None


def read_parquet(uri: Uri, columns: Sequence[str] | None = None) -> pa.Table:
    """A whole Parquet file, or some of its columns; a storage that is away is waited for."""
    fs, path = arrow_filesystem(uri)

    def read() -> pa.Table:
        with explained(uri):
            return pq.read_table(path, columns=columns, filesystem=fs, partitioning=None)

    return patiently(read, PATIENCE)


def write_json(uri: Uri, value: object) -> None:
    """Write ``value`` as indented JSON, at once like ``write_bytes``; ValueError for NaN and infinity, which JSON lacks."""
    write_bytes(uri, (json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode())


def remove(uri: Uri, *, last: str | None = None) -> None:
    """Remove a file, or a folder with all that is in it, if there is one; ConfigError for a whole bucket or a top folder.

    ``last`` names the file that says what the folder is: it goes at the very end, so that a removal that breaks off can be
    told from a folder of somebody else's.
    """
    fs, path = filesystem(uri)
    if "/" not in path.strip("/"):
        raise ConfigError("a whole bucket or top folder is never removed", where=uri, expected="a folder inside it")
    names = [split(file.uri)[1] for file in all_files(uri)]
    with explained(uri), suppress(FileNotFoundError):
        # One by one: the recursive form takes [, * and ? for patterns and keeps silent on files that it may not remove.
        marker = f"{path}/{last}"
        with ThreadPoolExecutor(_REMOVERS) as pool:
            list(pool.map(fs.rm_file, [name for name in names if name != marker]))
        if marker in names:
            fs.rm_file(marker)
        if is_local(uri) and os.path.isdir(path):
            shutil.rmtree(path)


def move(uri: Uri, target: Uri) -> None:
    """Give a file another address on the same storage, in place of what is there; nothing is done if that was done before."""
    fs, source = filesystem(uri)
    destination = split(target)[1]
    with explained(uri):
        if not fs.exists(source) and fs.exists(destination):
            return
        if is_local(uri):
            os.makedirs(os.path.dirname(destination), exist_ok=True)
            os.replace(source, destination)
        else:
            fs.cp_file(source, destination)
            fs.rm_file(source)


def patiently(act: Callable[[], T], seconds: float) -> T:
    """The result of ``act``, which is tried again for ``seconds`` while storage does not answer as it should.

    A full disk is not waited for.
    """
    give_up = time.monotonic() + seconds
    while True:
        try:
            return act()
        except (XmcError, OSError) as error:
            if time.monotonic() > give_up or os.strerror(errno.ENOSPC) in str(error):
                raise
            time.sleep(_PAUSE)


def _local_files(path: str) -> Iterator[FileInfo]:
    names = [path] if os.path.isfile(path) else []
    if os.path.isdir(path):
        # Links are followed and an unreadable folder is an error: documents must not go missing in silence.
        walk = os.walk(path, onerror=_raise, followlinks=True)
        names = [os.path.join(folder, name) for folder, _, inside in walk for name in inside]
    for name in names:
        status = os.stat(name)
        yield FileInfo(uri=name, size=status.st_size, version=str(status.st_mtime_ns))


def _s3_files(uri: Uri) -> Iterator[FileInfo]:
    fs, path = filesystem(uri)
    for name, info in fs.find(path, detail=True).items():
        if info["type"] == "file" and not name.endswith("/"):
            yield FileInfo(uri=f"s3://{name}", size=info["size"], version=info["ETag"].strip('"'))


def _raise(error: OSError) -> None:
    raise error


@contextmanager
def _replacing(path: str) -> Iterator[Path]:
    """A path to write to, whose file takes the place of ``path`` at the end or vanishes with the error that prevents it."""
    folder, name = os.path.split(path)
    os.makedirs(folder, exist_ok=True)
    temporary = Path(folder, f".{name}.{uuid.uuid4().hex}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def copy_file(source: Path, uri: str) -> None:
    """Copy a local file to ``uri``, where it appears at once."""
    fs, path = filesystem(uri)
    with explained(uri, missing=ConfigError):
        if is_local(uri):
            with _replacing(path) as temporary:
                shutil.copyfile(source, temporary)
        else:
            fs.put_file(str(source), path)


def write_parquet(uri: str, table: pa.Table) -> None:
    """Write a file that appears when it is complete; a storage that is away is waited for."""
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd")
    storage.patiently(lambda: storage.write_bytes(uri, buffer.getvalue()), storage.PATIENCE)
