"""Whole folders, copied between this machine and storage, or cached on this machine for all its processes."""

import atexit
import fcntl
import hashlib
import json
import os
import posixpath
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from xmc_ray.errors import ConfigError, DataError, XmcError
from xmc_ray.storage.address import Uri, explained, filesystem, is_local, normalise_name, split
from xmc_ray.storage.files import copy_file, join, move, patiently, remove, sync
from xmc_ray.storage.listing import all_files

_MOVERS = 16  # files that are moved on S3 at a time
_SETTLED = 1_000_000_000  # nanoseconds after which a file's next change certainly has another time

Stamps = dict[str, list[int]]
"""What tells, without reading a file, whether it is still the same; by its name."""


def upload(folder: Uri, uri: Uri, *, last: str | None = None, confirm: Callable[[], None] = lambda: None) -> None:
    """Copy a local folder with all its files to ``uri``.

    ``last`` names the file that marks the copy complete: an old one is removed first, the new one is written at the very end,
    after ``confirm``, which raises if that must not be. What cannot be copied completely is removed. DataError if the folder
    is empty or lacks ``last``.
    """
    sources = sorted(path for path in Path(folder).rglob("*") if path.is_file())
    if last is not None:
        if Path(folder, last) not in sources:
            raise DataError("the file that completes a folder is missing", where=Path(folder, last))
        sources.remove(Path(folder, last))
        remove(join(uri, last))
    if not sources and last is None:
        raise DataError("nothing to copy", where=folder, found="no files")
    copies = [join(uri, source.relative_to(folder).as_posix()) for source in sources]
    try:
        for source, copy in zip(sources, copies, strict=True):
            copy_file(source, copy)
    except BaseException:
        with suppress(XmcError, OSError):  # so that the place is free for the next attempt
            for copy in copies if last is not None else ():
                remove(copy)
        raise
    if last is not None:
        confirm()
        copy_file(Path(folder, last), join(uri, last))


def take_place(source: str, target: str, aside: str) -> None:
    """Let the folder ``source`` take the place of ``target``, all of whose files go; may be repeated after a kill.

    On a file system both are renamed, the old one to ``aside``: readers see the files of one of them, never of both. On S3 the
    old files are removed and the new ones moved, several at a time, which takes seconds for a hundred large files.
    """
    if not is_local(target):
        moves = [(file.uri, join(target, file.uri.removeprefix(f"{source}/"))) for file in all_files(source)]
        remove(target)
        with ThreadPoolExecutor(_MOVERS) as pool:
            list(pool.map(lambda move_: patiently(move, *move_), moves))
        return
    with explained(target, missing=ConfigError):
        remove(aside)
        os.makedirs(os.path.dirname(target), exist_ok=True)
        with suppress(FileNotFoundError):
            os.rename(target, aside)
        os.rename(source, target)
        for folder in (os.path.dirname(target), os.path.dirname(source)):
            sync(folder)


def local_copy(uri: Uri, folder: Uri | None = None) -> Path:
    """The local path of the file or folder ``uri``, which is downloaded to ``folder`` if it is on S3.

    ``folder`` is by default a temporary one, removed when the process ends. DataError if S3 has nothing at ``uri``.
    """
    fs, path = filesystem(uri)
    if is_local(uri):
        return Path(path)
    names = [split(file.uri)[1] for file in all_files(uri)]
    if not names:
        raise DataError("no such file or folder", where=uri)
    base = posixpath.dirname(path) if names == [path] else path
    if folder is None:
        folder = tempfile.mkdtemp(prefix="xmc_ray-")
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
    target = Path(folder)
    copies = {name: posixpath.relpath(name, base) for name in names}
    for name, below in copies.items():
        if ".." in below.split("/"):
            raise DataError("a name leads out of its folder", where=uri, found=name, way_out="rename it on the storage")
    with explained(uri):
        for name, below in copies.items():
            copy = target / below
            copy.parent.mkdir(parents=True, exist_ok=True)
            fs.get_file(name, str(copy))
    return target / posixpath.relpath(path, base)


def node_copy(uri: Uri, key: str, check: Callable[[Path], None] = lambda folder: None) -> Path:
    """Like `local_copy`, but one copy for all processes of this user on this machine; ``key`` identifies its content.

    The first process downloads while the others wait; if it is killed, another one starts afresh. The copy outlives the
    process, until no process uses it and something else is downloaded. Its files must not be changed. ``check`` raises if the
    content is not that of ``key``: it looks at a download once, and at a local folder, which others may change, every time.
    """
    if is_local(uri):
        folder = local_copy(uri)
        check(folder)
        return folder

    home = _home()
    copy, part = home / key, home / f"{key}.part"
    # The kernel releases a lock when its file is closed: the first at the end of this call, the other with the process.
    with open(home / f"{key}.download", "w") as downloading:
        fcntl.flock(downloading, fcntl.LOCK_EX)
        fcntl.flock(os.open(home / f"{key}.use", os.O_CREAT | os.O_RDWR), fcntl.LOCK_SH)
        root = split(uri)[1]
        expected = {posixpath.relpath(split(file.uri)[1], root): file.size for file in all_files(uri)}
        sizes = {str(path.relative_to(copy)): path.stat().st_size for path in copy.rglob("*") if path.is_file()}
        if sizes != expected or not expected:
            _remove_unused(home)
            shutil.rmtree(part, ignore_errors=True)
            shutil.rmtree(copy, ignore_errors=True)
            downloaded = local_copy(uri, part)
            check(downloaded)
            downloaded.rename(copy)
    return copy


def loadable(name: str) -> str:
    """A name for libraries that read local folders alone: a folder on S3 becomes its `node_copy`, any other name stays.

    FileNotFoundError if there is nothing on S3.
    """
    name = normalise_name(name)
    if not name.startswith(("/", "s3://")):
        return name
    if is_local(name):
        if os.path.isfile(name):
            return name
        with explained(name), suppress(FileNotFoundError), os.scandir(name) as entries:
            for entry in entries:  # the libraries take what may not be read for something that is not there
                if entry.is_file():
                    open(entry).close()
        return name
    files = [(file.uri, file.size, file.version) for file in all_files(name)]
    if not files:
        raise FileNotFoundError("nothing there")
    return str(node_copy(name, hashlib.sha256(repr(sorted(files)).encode()).hexdigest()[:16]))


def check_once(folder: Path, names: Sequence[str], key: str, check: Callable[[], None]) -> Stamps:
    """Call ``check`` of files in a local folder, unless it has passed before and they have not been touched since.

    Once for all processes of this user on this machine: those that give the same ``key`` wait for each other. Files that were
    changed in the last second are always checked, since a further change might leave the same time. Returns the `stamps` from
    before the check.
    """
    found = stamps(folder, names)
    if time.time_ns() - max((stamp[-1] for stamp in found.values() if stamp), default=0) < _SETTLED:
        check()
        return found
    state = json.dumps([str(folder), found])
    with open(_home() / f"{key}.checked", "a+") as record:
        fcntl.flock(record, fcntl.LOCK_EX)
        record.seek(0)
        if record.read() != state:
            check()
            record.truncate(0)
            record.write(state)
    return found


def stamps(folder: Path, names: Iterable[str]) -> Stamps:
    """Device, inode, size and time of the last change of files: they differ whenever one is written, replaced or moved.

    Empty for a file that is not there.
    """
    return {name: _stamp(folder / name) for name in names}


def _stamp(path: Path) -> list[int]:
    try:
        state = path.stat()
    except OSError:
        return []
    return [state.st_dev, state.st_ino, state.st_size, state.st_ctime_ns]


def _home() -> Path:
    """This user's folder on this machine, for copies and for what is known of them."""
    home = Path(tempfile.gettempdir(), f"xmc_ray-{os.getuid()}")
    home.mkdir(mode=0o700, exist_ok=True)
    if home.lstat().st_uid != os.getuid():
        raise ConfigError("the folder for copies belongs to another user", where=home, way_out="set TMPDIR")
    return home


def _remove_unused(home: Path) -> None:
    """Remove the copies that no process uses, to make room."""
    for lock in home.glob("*.use"):
        with open(lock) as held, suppress(BlockingIOError):
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            for unused in (lock.with_suffix(""), lock.with_suffix(".part")):
                shutil.rmtree(unused, ignore_errors=True)


def digest(path: Uri) -> str:
    """SHA-256 of a local file in hexadecimal, in constant memory."""
    sha = hashlib.sha256()
    with explained(path), open(path, "rb") as stream:
        while block := stream.read(1 << 20):
            sha.update(block)
    return sha.hexdigest()
