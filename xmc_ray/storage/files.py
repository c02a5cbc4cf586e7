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
import stat as file_modes
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
from xmc_ray.storage.outage import OUTAGE

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


def exists(uri: Uri) -> bool:
    """Whether the file exists. For folders ask ``is_empty``: some S3 servers remember a folder whose files are gone."""
    fs, path = filesystem(uri)
    with explained(uri):
        if not is_local(uri):
            return bool(fs.exists(path))
        with suppress(FileNotFoundError):  # of all errors: what may not be looked at is not "missing"
            os.stat(path)
            return True
        return False


def subfolders(uri: Uri) -> list[str]:
    """The names of the folders directly in ``uri``, sorted; none where it does not exist."""
    fs, path = filesystem(uri)
    with explained(uri), suppress(FileNotFoundError):
        if is_local(uri):
            with os.scandir(path) as below:
                return sorted(entry.name for entry in below if _is_folder(entry))
        entries = fs.ls(path, detail=True)
        return sorted(posixpath.basename(entry["name"].rstrip("/")) for entry in entries if entry["type"] == "directory")
    return []


def is_temporary(uri: Uri) -> bool:
    """Whether it is the file of an interrupted write (`write_bytes`, `new_file`), which nobody reads."""
    return re.search(r"/\.[^/]+\.[0-9a-f]{32}$", os.fspath(uri)) is not None


def is_hidden(path: str) -> bool:
    """Whether a listing of input leaves out ``path``, relative to the listed folder and with a slash before each part."""
    return re.search("/[_.]", path) is not None


def is_empty(uri: Uri) -> bool:
    """Whether the folder does not exist or holds no file, hidden ones included."""
    return not all_files(uri)


def all_files(uri: Uri) -> list[FileInfo]:
    """All files below ``uri``, hidden ones included, sorted by address; none where the folder does not exist."""
    with explained(uri):
        files = _local_files(split(uri)[1]) if is_local(uri) else _s3_files(uri)
        return sorted(files, key=lambda file: file.uri)


def visible_files(uri: Uri, needs: Callable[[str], bool] = lambda name: True) -> list[FileInfo]:
    """Like `all_files`, without hidden names (`is_hidden`) below ``uri``, which are not even looked at.

    DataError for a link to nothing whose name ``needs`` a file.
    """
    root = split(uri)[1]
    with explained(uri):
        files = _local_files(root, needs, visible=True) if is_local(uri) else _s3_files(uri)
        visible = (file for file in files if not is_hidden(split(file.uri)[1][len(root) :]))
        return sorted(visible, key=lambda file: file.uri)


def list_files(uri: Uri, suffixes: Sequence[str] = ()) -> list[FileInfo]:
    """The `visible_files` below ``uri`` that end in one of ``suffixes`` (by default any), sorted by address.

    The address of a file gives that file alone, whatever its name. DataError if nothing matches.
    """
    ends = tuple(suffixes) or ("",)
    files = visible_files(uri, lambda name: name.endswith(ends))
    if [split(file.uri)[1] for file in files] == [split(uri)[1]]:
        return files
    wanted = [file for file in files if file.uri.endswith(ends)]
    if not wanted:
        others = f"{len(files)} other files" if files else "nothing"
        raise DataError("no input", where=uri, found=others, expected=" or ".join(f"*{suffix}" for suffix in suffixes or [""]))
    return wanted


def stat(uri: Uri) -> FileInfo:
    """Current size and version of a file; FileNotFoundError if it does not exist."""
    fs, path = filesystem(uri)
    if is_local(uri):
        return _file_info(path, os.stat(path))
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


def _local_files(path: str, needs: Callable[[str], bool] = lambda name: True, *, visible: bool = False) -> Iterator[FileInfo]:
    """The regular files at and below ``path``; if ``visible``, hidden names below it are not looked at.

    Links are followed, but not to a folder that they lie in. Documents must not go missing in silence, so a folder that may not
    be read is an error, except lost+found, which the system keeps for itself. So is a link to nothing, if it is not hidden and
    ``needs`` a file. What vanishes meanwhile is left out.
    """
    try:
        status = os.stat(path)
    except FileNotFoundError:
        return
    if not file_modes.S_ISDIR(status.st_mode):
        yield _file_info(path, status)
        return

    def walk(entries: list[os.DirEntry[str]], above: frozenset[tuple[int, int]]) -> Iterator[FileInfo]:
        for entry in entries:
            name = entry.path[len(path.rstrip("/")) :]
            if visible and is_hidden(name):
                continue
            below: list[os.DirEntry[str]] = []
            try:
                status = os.stat(entry.path)
                is_new_folder = file_modes.S_ISDIR(status.st_mode) and _identity(status) not in above
                if is_new_folder:
                    below = _entries(entry.path)
            except OSError as error:
                is_gone = isinstance(error, FileNotFoundError) or error.errno == errno.ELOOP
                is_passed_over = not entry.is_symlink() or is_hidden(name) or not needs(name)
                if (is_gone and is_passed_over) or (isinstance(error, PermissionError) and entry.name == "lost+found"):
                    continue
                raise
            if file_modes.S_ISREG(status.st_mode):
                yield _file_info(entry.path, status)
            elif is_new_folder:
                yield from walk(below, above | {_identity(status)})

    above = [os.stat(folder) for folder in Path(os.path.realpath(path)).parents]
    yield from walk(_entries(path), frozenset(map(_identity, [*above, status])))


def _is_folder(entry: os.DirEntry[str]) -> bool:
    """Not so for a link in a circle, or to a place that this user may not enter."""
    try:
        return entry.is_dir()
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.EACCES):
            return False
        raise


def _entries(folder: str) -> list[os.DirEntry[str]]:
    with os.scandir(folder) as entries:
        return list(entries)


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino


def _file_info(path: str, status: os.stat_result) -> FileInfo:
    return FileInfo(uri=path, size=status.st_size, version=str(status.st_mtime_ns))


def _s3_files(uri: Uri) -> Iterator[FileInfo]:
    fs, path = filesystem(uri)
    for name, info in fs.find(path, detail=True).items():
        if info["type"] == "file" and not name.endswith("/"):
            yield _s3_file(info)


def _s3_file(info: dict[str, Any]) -> FileInfo:
    return FileInfo(uri=f"s3://{info['name']}", size=info["size"], version=info["ETag"].strip('"'))


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
