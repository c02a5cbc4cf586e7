"""Files on a local path or on S3: listed, read, written atomically, removed.

There are only files: a folder is a prefix that some files share, since S3 knows nothing else.
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
from botocore.exceptions import BotoCoreError, ClientError

from xmc_ray.errors import ConfigError, DataError
from xmc_ray.storage.address import Uri, arrow_filesystem, explained, filesystem, is_local, is_unavailable, split

T = TypeVar("T")
PATIENCE = 300.0  # seconds for which a job in the middle of its work waits for a storage that does not answer
_REMOVERS = 16  # files removed at a time
_PAUSE = 1.0  # seconds between two attempts of `patiently`


@dataclass(frozen=True, kw_only=True)
class FileInfo:
    """A listed file: its size in bytes, and a version that changes with its content (S3's etag, else the time of change)."""

    uri: str
    size: int
    version: str


def join(uri: Uri, *parts: str) -> str:
    """The address of ``parts``, relative names, below ``uri``."""
    return posixpath.join(os.fspath(uri), *parts)


def absolute(uri: Uri) -> str:
    """The address as listings spell it, valid in any working directory: an absolute local path, or s3://."""
    scheme, path = split(uri)
    return path if scheme == "file" else f"s3://{path}"


def exists(uri: Uri) -> bool:
    """Whether the file exists. For folders ask ``is_empty``: some S3 servers remember a folder whose files are gone."""
    fs, path = filesystem(uri)
    with explained(uri):
        return bool(fs.exists(path))


def subfolders(uri: Uri) -> list[str]:
    """The names of the folders directly in ``uri``, sorted; none where it does not exist."""
    fs, path = filesystem(uri)
    with explained(uri), suppress(FileNotFoundError):
        entries = fs.ls(path, detail=True)
        return sorted(posixpath.basename(entry["name"].rstrip("/")) for entry in entries if entry["type"] == "directory")
    return []


def is_temporary(uri: Uri) -> bool:
    """Whether it is the file of an interrupted write (`write_bytes`, `new_file`), which nobody reads."""
    return re.search(r"/\.[^/]+\.[0-9a-f]{32}$", os.fspath(uri)) is not None


def is_empty(uri: Uri) -> bool:
    """Whether the folder does not exist or holds no file, hidden ones included."""
    return not all_files(uri)


def all_files(uri: Uri) -> list[FileInfo]:
    """All files below ``uri``, hidden ones included, sorted by address; none where the folder does not exist."""
    with explained(uri):
        files = _local_files(split(uri)[1]) if is_local(uri) else _s3_files(uri)
        return sorted(files, key=lambda file: file.uri)


def list_files(uri: Uri, suffixes: Sequence[str] = ()) -> list[FileInfo]:
    """All files below ``uri`` that end in one of ``suffixes`` (by default any), sorted by address.

    Names that begin with ``_`` or ``.``, and everything below such a folder, are left out. The address of a file gives
    that file alone, whatever its name. DataError if nothing matches.
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
    """Current size and version of a file; FileNotFoundError if it does not exist."""
    fs, path = filesystem(uri)
    if is_local(uri):
        return _local_file(path)
    try:
        return _s3_file(fs.info(path))
    except FileNotFoundError:
        raise
    except (OSError, BotoCoreError):
        with explained(uri):
            raise


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
        if entry.is_dir(follow_symlinks=False):
            shutil.rmtree(entry.path)
        else:
            os.unlink(entry.path)
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
            _sync(os.path.dirname(destination))
        else:
            fs.cp_file(source, destination)
            fs.rm_file(source)


def patiently(act: Callable[..., T], *arguments: Any, seconds: float | None = None) -> T:
    """``act(*arguments)``, retried for ``seconds`` (by default `PATIENCE`) while storage `is_unavailable`.

    Any other error is raised immediately: a missing file will not appear, and a full disk will not empty itself.
    """
    deadline = time.monotonic() + (PATIENCE if seconds is None else seconds)
    while True:
        try:
            return act(*arguments)
        except Exception as error:
            if not is_unavailable(error) or time.monotonic() > deadline:
                raise
            time.sleep(_PAUSE)


def _local_files(path: str) -> Iterator[FileInfo]:
    """Links are followed and an unreadable folder is an error: documents must not go missing in silence."""
    if os.path.isfile(path):
        yield _local_file(path)
    for folder, below, names in os.walk(path, onerror=_raise, followlinks=True) if os.path.isdir(path) else ():
        below[:] = [name for name in below if not _is_loop(folder, name)]
        for name in (os.path.join(folder, name) for name in names):
            try:
                yield _local_file(name)
            except FileNotFoundError:  # removed since the folder was read, or a link to nothing
                if os.path.islink(name) and not re.search("/[_.]", name[len(path) :]):
                    raise


def _is_loop(folder: str, name: str) -> bool:
    """Whether a link in ``folder`` leads to a folder that it lies in."""
    link = os.path.join(folder, name)
    return os.path.islink(link) and Path(os.path.realpath(folder)).is_relative_to(os.path.realpath(link))


def _local_file(path: str) -> FileInfo:
    status = os.stat(path)
    return FileInfo(uri=path, size=status.st_size, version=str(status.st_mtime_ns))


def _s3_files(uri: Uri) -> Iterator[FileInfo]:
    fs, path = filesystem(uri)
    for name, info in fs.find(path, detail=True).items():
        if info["type"] == "file" and not name.endswith("/"):
            yield _s3_file(info)


def _s3_file(info: dict[str, Any]) -> FileInfo:
    return FileInfo(uri=f"s3://{info['name']}", size=info["size"], version=info["ETag"].strip('"'))


def _raise(error: OSError) -> None:
    raise error


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
        _sync(temporary)
        publish(temporary, path)
        _sync(folder)
    finally:
        temporary.unlink(missing_ok=True)


def _make_folder(path: str) -> None:
    """Create a folder and those above it that are missing, on the disk."""
    if not os.path.isdir(path):
        above = os.path.dirname(path)
        _make_folder(above)
        os.makedirs(path, exist_ok=True)
        _sync(above)


def _sync(path: Uri) -> None:
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
