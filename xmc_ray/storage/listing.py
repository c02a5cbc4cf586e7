"""Which files there are, on a local path or on S3: whether one exists, and what a folder holds.

There are only files: a folder is a prefix that some files share, since S3 knows nothing else.
"""

import errno
import os
import posixpath
import re
import stat as file_modes
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from botocore.exceptions import BotoCoreError

from xmc_ray.errors import DataError
from xmc_ray.storage.address import Uri, explained, filesystem, is_local, split


@dataclass(frozen=True, kw_only=True)
class FileInfo:
    """A listed file: its size in bytes, and a version that changes with its content (S3's etag, else the time of change)."""

    uri: str
    size: int
    version: str


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
    """Whether it is the file of an interrupted write (`files.write_bytes`, `files.new_file`), which nobody reads."""
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
    if info["type"] != "file":  # by now there are keys below the name
        raise FileNotFoundError(info["name"])
    return FileInfo(uri=f"s3://{info['name']}", size=info["size"], version=info["ETag"].strip('"'))
