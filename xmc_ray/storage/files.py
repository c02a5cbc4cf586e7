"""Files on a local path or on S3: read, written atomically, moved, removed."""

import errno
import io
import json
import os
import posixpath
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq
from botocore.exceptions import ClientError

from xmc_ray.errors import ConfigError, DataError
from xmc_ray.storage.address import Uri, arrow_filesystem, explained, filesystem, is_local, is_unavailable, split
from xmc_ray.storage.listing import all_files
from xmc_ray.storage.outage import OUTAGE

T = TypeVar("T")
PATIENCE = 300.0  # seconds for which a job in the middle of its work waits for a storage that does not answer
_REMOVERS = 16  # files removed at a time
_PAUSE = 1.0  # seconds between two attempts of `patiently`


def join(uri: Uri, *parts: str) -> str:
    """The address of ``parts``, relative names, below ``uri``."""
    return posixpath.join(os.fspath(uri), *parts)


def read_bytes(uri: Uri) -> bytes:
    """A whole file; DataError if it does not exist."""
    fs, path = filesystem(uri)
    with explained(uri):
        return bytes(fs.cat_file(path))


def write_bytes(uri: Uri, data: bytes) -> None:
    """Write a file atomically: readers see the old file or the new one. Missing folders are created."""
    fs, path = filesystem(uri)
    with explained(uri, missing=ConfigError):
        if is_local(uri):
            with _publishing(path) as temporary:
                temporary.write_bytes(data)
        else:
            fs.pipe_file(path, data)


def create(uri: Uri, data: bytes) -> bool:
    """Write a file unless it exists: of several callers at the same time, at most one gets True.

    Raises NotImplementedError where storage cannot promise that: a file system without hard links, or an S3 server without
    conditional writes. The file may have been written then.
    """
    fs, path = filesystem(uri)
    with explained(uri, missing=ConfigError):
        return _create_local(path, data) if is_local(uri) else _create_s3(fs, path, data)


@contextmanager
def new_file(uri: Uri) -> Iterator[Path]:
    """A local path to write to. Its file appears at ``uri`` atomically when the block ends; after an error it does not.

    A file for S3 is kept in this machine's temporary folder until then.
    """
    if is_local(uri):
        with explained(uri, missing=ConfigError), _publishing(split(uri)[1]) as temporary:
            yield temporary
    else:
        with tempfile.TemporaryDirectory(prefix="xmc_ray-") as folder:
            temporary = Path(folder, "file")
            yield temporary
            copy_file(temporary, os.fspath(uri))


def copy_file(source: Path, uri: str) -> None:
    """Copy a local file to ``uri``, atomically."""
    fs, path = filesystem(uri)
    with explained(uri, missing=ConfigError):
        if is_local(uri):
            with _publishing(path) as temporary:
                shutil.copyfile(source, temporary)
        else:
            fs.put_file(str(source), path)


def read_json(uri: Uri) -> Any:
    """The content of a JSON file; DataError if it does not exist or is not JSON."""
    try:
        return json.loads(read_bytes(uri))
    except (ValueError, RecursionError) as error:
        raise DataError("not a JSON file", where=uri, found=error) from None


def write_json(uri: Uri, value: object) -> None:
    """Write ``value`` atomically as indented JSON; ValueError for NaN and infinity, which JSON lacks."""
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    write_bytes(uri, text.encode(errors="backslashreplace"))  # lone surrogates (of file names) in JSON's own spelling


def read_parquet(uri: Uri, columns: Sequence[str] | None = None) -> pa.Table:
    """A Parquet file, or some of its columns, `patiently`; DataError if it does not exist or is not Parquet."""
    fs, path = arrow_filesystem(uri)
    with explained(uri):
        try:
            return patiently(lambda: pq.read_table(path, columns=columns, filesystem=fs, partitioning=None))
        except pa.ArrowInvalid as error:
            raise DataError("not a Parquet file", where=uri, found=error) from None


def write_parquet(uri: Uri, table: pa.Table) -> None:
    """Write a Parquet file atomically and `patiently`."""
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd")
    patiently(write_bytes, uri, buffer.getvalue())


def remove(uri: Uri, *, last: str | None = None) -> None:
    """Remove a file, or a folder with its content, if it exists; ConfigError for a whole bucket or top-level folder.

    ``last`` names the file that identifies the folder. It is removed at the very end, so that an interrupted removal can be
    distinguished from a folder of another kind. Symbolic links are removed; what they point to is not touched.
    """
    fs, path = filesystem(uri)
    if "/" not in path.strip("/"):
        raise ConfigError("a whole bucket or top folder is never removed", where=uri, expected="a folder inside it")
    with explained(uri), suppress(FileNotFoundError):
        if is_local(uri):
            _remove_local(path, last)
            return
        # One by one: the recursive form takes [, * and ? for patterns, and says nothing of files that it may not remove.
        names, marker = [split(file.uri)[1] for file in all_files(uri)], f"{path}/{last}"
        with ThreadPoolExecutor(_REMOVERS) as pool:
            list(pool.map(fs.rm_file, [name for name in names if name != marker]))
        if marker in names:
            fs.rm_file(marker)


def _remove_local(path: str, last: str | None) -> None:
    if os.path.islink(path) or not os.path.isdir(path):
        os.unlink(path)
        return
    for entry in sorted(os.scandir(path), key=lambda entry: entry.name == last):
        is_folder = entry.is_dir(follow_symlinks=False)
        while os.path.lexists(entry.path):  # until nothing is left, whoever else removes or renames something there
            with suppress(FileNotFoundError):
                shutil.rmtree(entry.path) if is_folder else os.unlink(entry.path)
    os.rmdir(path)


def move(uri: Uri, target: Uri) -> None:
    """Move a file on the same storage, replacing ``target``; nothing happens if it has been moved already."""
    fs, source = filesystem(uri)
    destination = split(target)[1]
    with explained(uri):
        if not fs.exists(source) and fs.exists(destination):
            return
        if is_local(uri):
            _make_folder(os.path.dirname(destination))
            os.replace(source, destination)
            sync(os.path.dirname(destination))
        else:
            fs.cp_file(source, destination)
            fs.rm_file(source)


def remove_empty(folder: Uri) -> None:
    """Remove a local folder and those in it, as far as they hold no file; on S3 there are no empty folders."""
    if is_local(folder):
        for below, _, _ in os.walk(split(folder)[1], topdown=False):
            with suppress(OSError):
                os.rmdir(below)


def patiently(act: Callable[..., T], *arguments: Any, seconds: float | None = None) -> T:
    """``act(*arguments)``, retried for ``seconds`` (by default `PATIENCE`) while storage `is_unavailable`, which is said.

    Any other error is raised immediately: a missing file will not appear, and a full disk will not empty itself.
    """
    deadline, me = time.monotonic() + (PATIENCE if seconds is None else seconds), object()
    try:
        while True:
            try:
                return act(*arguments)
            except Exception as error:
                if not is_unavailable(error) or time.monotonic() > deadline:
                    raise
                OUTAGE.begin(me, error)
                time.sleep(_PAUSE)
    finally:
        OUTAGE.end(me)


@contextmanager
def _publishing(path: str, publish: Callable[[Path, str], None] = os.replace) -> Iterator[Path]:
    """A temporary path in the folder of ``path``, to which its file is published at the end; an error only removes it.

    What is published is on the disk before anything that is published later, a marker above all: a power failure leaves no
    marker of files that are empty or missing.
    """
    folder, name = os.path.split(path)
    _make_folder(folder)
    temporary = Path(folder, f".{name}.{uuid.uuid4().hex}")
    try:
        yield temporary
        sync(temporary)
        publish(temporary, path)
        sync(folder)
    finally:
        temporary.unlink(missing_ok=True)


def _make_folder(path: str) -> None:
    """Create a folder and those above it that are missing, on the disk."""
    if not os.path.isdir(path):
        above = os.path.dirname(path)
        _make_folder(above)
        try:
            os.makedirs(path, exist_ok=True)
        except FileExistsError:  # which `create` would take for the file that it is to create
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), path) from None
        sync(above)


def sync(path: Uri) -> None:
    """Return once a file or the entries of a folder are on the disk."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except PermissionError:  # a folder that may be written to and not be listed
        return
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):  # of a file system that cannot, for folders mostly
            raise
    finally:
        os.close(handle)


def _create_local(path: str, data: bytes) -> bool:
    try:
        with _publishing(path, os.link) as temporary:  # O_EXCL would show an empty file for a moment
            temporary.write_bytes(data)
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP):
            raise
        raise NotImplementedError("a file system without hard links") from None
    return True


def _create_s3(fs: Any, path: str, data: bytes) -> bool:
    def put_if_absent() -> bool:
        try:
            fs.pipe_file(path, data, mode="create")
        except OSError as error:
            response = error.__cause__.response if isinstance(error.__cause__, ClientError) else {}
            status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
            if status == 501:
                raise NotImplementedError("an S3 server without conditional writes") from None
            if status in (409, 412):  # it lost against another writer that is not done, or is
                return False
            raise
        return True

    created = put_if_absent()
    # A server that ignores the condition overwrites what is there, and would do so now as well.
    if created and put_if_absent():
        raise NotImplementedError("an S3 server without conditional writes")
    return created
