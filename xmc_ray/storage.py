"""Files wherever they lie: a local path (``/x``, ``x``, ``file:///x``) or ``s3://bucket/key``.

Small files (markers, manifests, bundles) go through fsspec, Parquet through pyarrow. Both reach S3 with the one set of
credentials that ``S3Access.from_environment`` finds, so that a job never reads as one user and writes as another.

Only files exist: a folder is a prefix that some files share, because that is all that S3 knows.
"""

import errno
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
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import fsspec
import pyarrow as pa
import pyarrow.fs
import pyarrow.parquet as pq
from botocore.exceptions import BotoCoreError

from xmc_ray.errors import ConfigError, DataError, XmcError

Uri = str | os.PathLike[str]
T = TypeVar("T")

# An endpoint that does not answer is reported within about half a minute; a slow one is waited for.
CONNECT_SECONDS, READ_SECONDS, ATTEMPTS = 5, 60, 3
PATIENCE = 300.0  # seconds that a job in the middle of its work waits for a storage that does not answer
_REMOVERS = 16  # files removed at a time
_PAUSE = 1.0  # seconds from one attempt of `patiently` to the next


@dataclass(frozen=True, kw_only=True)
class S3Access:
    """How to reach S3. Without keys the libraries search for themselves (profile files, instance roles)."""

    key: str | None = field(default=None, repr=False)
    secret: str | None = field(default=None, repr=False)
    token: str | None = field(default=None, repr=False)
    region: str | None = None
    endpoint: str | None = None

    def __post_init__(self) -> None:
        if (self.key is None) != (self.secret is None):
            raise ConfigError("AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY go together", found="only one of them")
        if self.endpoint is not None and not re.match("https?://.", self.endpoint):
            raise ConfigError("not an S3 endpoint", found=self.endpoint, expected="http://host:port or https://host")

    @classmethod
    def from_environment(cls) -> "S3Access":
        """Read the ``AWS_*`` variables, where an empty one counts as unset; ConfigError if they do not fit together."""
        endpoint = _variable("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL")
        return cls(
            key=_variable("AWS_ACCESS_KEY_ID"),
            secret=_variable("AWS_SECRET_ACCESS_KEY"),
            token=_variable("AWS_SESSION_TOKEN"),
            # S3-compatible stores rarely have regions, yet a signature needs one; this is their customary answer.
            region=_variable("AWS_REGION", "AWS_DEFAULT_REGION") or ("us-east-1" if endpoint else None),
            endpoint=endpoint,
        )


@dataclass(frozen=True, kw_only=True)
class FileInfo:
    """A file as listed: its size in bytes, and a version (S3's etag, else the time of change) that a change changes."""

    uri: str
    size: int
    version: str


def filesystem(uri: Uri) -> tuple[fsspec.AbstractFileSystem, str]:
    """The fsspec file system of ``uri`` and the path in it, never with cached listings; ConfigError for an unknown scheme."""
    scheme, path = split(uri)
    if scheme == "file":
        return fsspec.filesystem("file"), path
    access = S3Access.from_environment()
    return fsspec.filesystem(
        "s3",
        key=access.key,
        secret=access.secret,
        token=access.token,
        endpoint_url=access.endpoint,
        client_kwargs={"region_name": access.region},
        config_kwargs={
            "connect_timeout": CONNECT_SECONDS,
            "read_timeout": READ_SECONDS,
            "retries": {"max_attempts": ATTEMPTS, "mode": "standard"},
        },
        use_listings_cache=False,
    ), path


def arrow_filesystem(uri: Uri) -> tuple[pyarrow.fs.FileSystem, str]:
    """The pyarrow file system of ``uri`` and the path in it; ConfigError for an unknown scheme."""
    scheme, path = split(uri)
    if scheme == "file":
        return pyarrow.fs.LocalFileSystem(), path
    access = S3Access.from_environment()
    endpoint_scheme, _, endpoint_host = (access.endpoint or "https://").partition("://")
    return pyarrow.fs.S3FileSystem(
        access_key=access.key,
        secret_key=access.secret,
        session_token=access.token,
        region=access.region,
        scheme=endpoint_scheme,
        endpoint_override=endpoint_host or None,
        connect_timeout=CONNECT_SECONDS,
        request_timeout=READ_SECONDS,
        retry_strategy=pyarrow.fs.AwsStandardS3RetryStrategy(max_attempts=ATTEMPTS),
    ), path


@contextmanager
def explained(uri: Uri, *, missing: type[XmcError] = DataError) -> Iterator[None]:
    """Turn what a file system raises inside into one line about ``uri`` without secrets.

    Raises ``missing`` where a file or bucket is not there (a place to write to asks for ConfigError), else ConfigError.
    """
    try:
        yield
    except FileNotFoundError as error:
        raise missing("no such file, folder or bucket", where=uri, found=_without_secrets(error)) from None
    except (OSError, BotoCoreError) as error:
        is_s3 = split(uri)[0] == "s3"
        way_out = "check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_REGION and AWS_ENDPOINT_URL" if is_s3 else None
        raise ConfigError("cannot be read or written", where=uri, found=_without_secrets(error), way_out=way_out) from None


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


def _variable(*names: str) -> str | None:
    return next((os.environ[name] for name in names if os.environ.get(name)), None)


def split(uri: Uri) -> tuple[str, str]:
    """Scheme (``file`` or ``s3``) and path: absolute for a file, ``bucket/key`` for S3, without a slash at the end."""
    text = os.fspath(uri)
    # One slash will do, since pathlib makes s3:/bucket of s3://bucket, and a local folder called "s3:" helps nobody.
    address = re.fullmatch(r"([A-Za-z][A-Za-z0-9+.-]*):/+(.*)", text)
    if address is None:
        return "file", os.path.abspath(text)
    scheme, rest = address[1].lower(), address[2].rstrip("/")
    if scheme == "file":
        return "file", "/" + rest
    if scheme != "s3" or not rest:
        raise ConfigError("not an address to use", where=text, expected="a local path, file:///path or s3://bucket/key")
    if "@" in rest.partition("/")[0]:
        raise ConfigError("an address with credentials in it", expected="s3://bucket/key and AWS_* environment variables")
    return "s3", rest


def is_local(uri: Uri) -> bool:
    """Whether it lies on this machine, or on a file system that is mounted here."""
    return split(uri)[0] == "file"


def _without_secrets(error: BaseException) -> str:
    text = str(error)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"):
        if value := _variable(name):
            text = text.replace(value, f"<{name}>")
    return text or type(error).__name__


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
