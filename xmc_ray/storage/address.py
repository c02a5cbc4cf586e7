"""Addresses and the file systems behind them: a local path (``/x``, ``x``, ``~/x``, ``file:///x``) or ``s3://bucket/key``.

A place may be spelt in many ways. Settings (of the types `Address`, `Source`) and arguments of the Python interface are
normalised when they arrive, so that equal strings are equal places from there on.

Small files go through fsspec, Parquet through pyarrow. Both use the credentials that `S3Access.from_environment` finds, so
that a job never reads as one user and writes as another.
"""

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import PurePosixPath
from typing import Annotated
from urllib.parse import unquote_to_bytes

import fsspec
import pyarrow.fs
from botocore.exceptions import BotoCoreError, ClientError, HTTPClientError
from botocore.exceptions import ConnectionError as EndpointError

from xmc_ray.errors import ConfigError, DataError, UnavailableError, XmcError
from xmc_ray.settings import Normalised

Uri = str | os.PathLike[str]
_EXPECTED = "a local path, file:///path or s3://bucket/key"

# An endpoint that does not answer is reported within about half a minute; a slow one is waited for.
CONNECT_SECONDS, READ_SECONDS, ATTEMPTS = 5, 60, 3

# Errors of a network, a network file system or an overloaded server, which pass by themselves.
_PASSING = {
    *(errno.EAGAIN, errno.EBUSY, errno.EREMOTEIO, errno.ESTALE, errno.ETIMEDOUT, errno.EHOSTUNREACH),
    *(errno.ENETUNREACH, errno.ENETDOWN, errno.EHOSTDOWN, errno.ENETRESET),
}
_WAYS_OUT = {
    errno.EACCES: "give this user the right, on the folders above as well",
    errno.EPERM: "give this user the right, on the folders above as well",
    errno.EROFS: "choose a place that may be written to",
    errno.ENOSPC: "make room there, or choose another place",
    errno.EDQUOT: "make room there, or choose another place",
    errno.ENOTDIR: "a folder on the way is a file: choose another place",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.ELOOP: "a link on the way leads back to itself: remove it",
}
# pyarrow reports S3's errors as text only. These are final answers, which a retry would not change.
_FINAL = re.compile(
    r"AWS Error (\w*(DENIED|NO_SUCH|NOT_FOUND|INVALID|SIGNATURE|EXPIRED|UNRECOGNIZED|VALIDATION)|\w+ \(HTTP status 4(?!08|29))"
)


@dataclass(frozen=True, kw_only=True)
class S3Access:
    """How to reach S3. Without keys the libraries look for credentials themselves (profile files, instance roles)."""

    key: str | None = field(default=None, repr=False)
    secret: str | None = field(default=None, repr=False)
    token: str | None = field(default=None, repr=False)
    region: str | None = None
    endpoint: str | None = None

    def __post_init__(self) -> None:
        if (self.key is None) != (self.secret is None):
            raise ConfigError("AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY go together", found="only one of them")
        expected = "http://host:port or https://host"
        if self.endpoint is not None and "@" in self.endpoint:  # not shown: it has a password
            raise ConfigError("an S3 endpoint has no user and no password in it", expected=expected)
        if self.endpoint is not None and not re.match("https?://.", self.endpoint):
            raise ConfigError("not an S3 endpoint", found=self.endpoint, expected=expected)

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


def normalise(uri: Uri, *, keep_slashes: bool = False) -> str:
    """The one spelling of a place: an absolute local path with its links resolved, or ``s3://bucket/key``.

    Understands relative paths, ``~`` and ``~user``, ``.`` and ``..``, ``file://`` with percent escapes, doubled slashes and
    slashes at the end. A link to a file keeps its name, which says what kind of file it is. On S3, ``a//b`` and ``a/b`` are
    different keys: ``keep_slashes`` is for what others have written (but s3fs knows no key that begins with a slash).
    ConfigError for what cannot be meant.
    """
    text = os.fspath(uri)
    if not text.strip():
        raise ConfigError("an empty address", found=repr(text), expected=_EXPECTED)
    if text != text.strip():
        raise ConfigError("an address with white space around it", found=repr(text), expected=_EXPECTED)
    if re.match("s3:", text, re.IGNORECASE):
        bucket, key = _bucket_and_key(text)
        if {".", ".."} & set(key.split("/")):
            raise ConfigError("an address on S3 with . or ..", where=text, way_out="write the key in full")
        key = key.strip("/") if keep_slashes else "/".join(filter(None, key.split("/")))
        return f"s3://{bucket}/{key}".rstrip("/")
    if re.match(r"hf:/", text):
        return re.sub("/+$", "", re.sub("^hf:/+", "hf://", text))  # of a model hub, which has bundles and nothing else
    if re.match(r"[a-z][a-z0-9+.-]*:/|file:", text, re.IGNORECASE):
        address = re.fullmatch(r"file:(?://(?:localhost)?(?=/)|(?!//))(/.*)", text, re.IGNORECASE | re.DOTALL)
        if address is None:
            raise _unsupported(text)
        return _real(os.fsdecode(unquote_to_bytes(address[1])), text)
    path = os.path.expanduser(text)
    if not path.startswith("/") and re.match(r"~|\$\{?\w+\}?(/|$)", text):
        what = "no such user, or no home" if text[0] == "~" else "a variable that no shell has replaced"
        raise ConfigError(what, where=text, way_out=f"give the path itself, or ./{text} for a file of this name")
    return _real(path, text)


def normalise_name(name: Uri) -> str:
    """Like `normalise` with ``keep_slashes``, for a setting that may also be the name of a model on a hub.

    It is an address if it looks like one, or if there is such a folder.
    """
    text = os.fspath(name)
    is_address = re.match(r"[~/.$]|[A-Za-z0-9+.-]+:|\s*$", text) or os.path.isdir(text)
    return normalise(text, keep_slashes=True) if is_address else text


def _address_or(*words: str) -> Normalised:
    """Of a setting that is one of ``words`` or an address; a folder of this name is ``./word``."""
    what = " or ".join([*map(repr, words), "an address"])
    return Normalised(lambda value: str(value) if value in words else normalise(value), what)


Address = Annotated[str, _address_or()]
"""A place that we have written, or are going to."""
Source = Annotated[str, Normalised(partial(normalise, keep_slashes=True), "an address")]
"""A place that others have written."""
ModelName = Annotated[str, Normalised(normalise_name, "a hub name or an address")]
"""A folder that others have written, or a name on a hub."""
PreviousNight = Annotated[str, _address_or("last")]
Start = Annotated[str, _address_or("auto", "never")]


def split(uri: Uri) -> tuple[str, str]:
    """Scheme (``file`` or ``s3``) and path: absolute for a file, ``bucket/key`` for S3, without a trailing slash.

    A key is taken as it is, since listings have names that `normalise` would change. ConfigError for any other scheme, and for
    credentials in the address.
    """
    text = os.fspath(uri)
    if text.startswith("/"):
        return "file", "/" + os.path.abspath(text).lstrip("/")
    if re.match("s3:", text, re.IGNORECASE):
        return "s3", "/".join(_bucket_and_key(text)).rstrip("/")
    if text.startswith("hf://"):
        return "hf", text.removeprefix("hf://")
    return "file", normalise(text)


def is_local(uri: Uri) -> bool:
    """Whether ``uri`` is a path on this machine, mounted file systems included."""
    return split(uri)[0] == "file"


def below(place: Uri, folder: Uri) -> str | None:
    """The path of ``place`` in ``folder``, whatever links lead there: ``/`` if it is the folder, None if it lies elsewhere."""
    (scheme, inner), (other, outer) = split(place), split(folder)
    if scheme == other == "file":
        inner, outer = os.path.realpath(inner), os.path.realpath(outer)
    path = PurePosixPath(inner)
    return "/" + "/".join(path.relative_to(outer).parts) if scheme == other and path.is_relative_to(outer) else None


def _bucket_and_key(text: str) -> tuple[str, str]:
    # A single slash is accepted, since pathlib turns s3://bucket into s3:/bucket.
    address = re.fullmatch(r"s3:/{1,2}([^/\s]+)(?:/+$|/(.*))?", text, re.IGNORECASE | re.DOTALL)
    if address is None or "\0" in text or (re.search("[:@]", address[1]) and "@" in text):
        raise _unsupported(text)
    return address[1], address[2] or ""


def _real(path: str, text: str) -> str:
    if "\0" in path:
        raise _unsupported(repr(text))
    try:
        if os.path.isfile(path):
            return os.path.join(os.path.realpath(os.path.dirname(path)), os.path.basename(path))
        return os.path.realpath(path)
    except FileNotFoundError:
        raise ConfigError("a relative path in a working folder that is gone", where=text) from None


def _unsupported(text: str) -> ConfigError:
    if re.match("[^/]*:/*[^@/]*:?[^@]*@", text):
        return ConfigError("the address contains credentials", expected="s3://bucket/key and AWS_* environment variables")
    return ConfigError("not a supported address", where=text, expected=_EXPECTED)


def filesystem(uri: Uri) -> tuple[fsspec.AbstractFileSystem, str]:
    """The fsspec file system of ``uri``, without cached listings, and the path in it; ConfigError as `split`."""
    scheme, path = split(uri)
    if scheme == "file":
        return fsspec.filesystem("file"), path
    if scheme == "hf":
        raise ConfigError(
            "a model hub has no files for this",
            where=uri,
            expected=_EXPECTED,
            way_out="bundles are read there, and pushed",
        )
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
    """The pyarrow file system of ``uri`` and the path in it; ConfigError as `split`."""
    scheme, path = split(uri)
    if scheme == "file":
        return pyarrow.fs.LocalFileSystem(), path
    if scheme == "hf" or "//" in path:  # a key that pyarrow's own refuses
        return pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(filesystem(uri)[0])), path
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
    """Turn what a file system raises into one line about ``uri`` that holds no secrets.

    Raises ``missing`` for a file or bucket that does not exist (writers ask for ConfigError), UnavailableError where
    `is_unavailable` says so, and otherwise ConfigError.
    """
    try:
        yield
    except FileNotFoundError as error:
        raise missing("no such file, folder or bucket", where=uri, found=_without_secrets(error)) from None
    except (OSError, BotoCoreError) as error:
        way_out: str | None = "check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_REGION and AWS_ENDPOINT_URL"
        if is_local(uri):
            way_out = _WAYS_OUT.get(error.errno or 0) if isinstance(error, OSError) else None
        kind = UnavailableError if is_unavailable(error) else ConfigError
        raise kind("cannot be read or written", where=uri, found=_without_secrets(error), way_out=way_out) from None


def is_unavailable(error: BaseException) -> bool:
    """Whether storage may answer when asked again: no connection, a time-out, throttling, an error of the server.

    Not so for missing files, refused credentials and full disks.
    """
    if isinstance(error, UnavailableError | HTTPClientError | EndpointError | ConnectionError | TimeoutError):
        return True
    if isinstance(error.__cause__, ClientError):  # s3fs translates it, and loses the status
        status = error.__cause__.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        return status >= 500 or status in (408, 409, 429) or isinstance(error, TimeoutError)
    if "AWS Error" in str(error):
        return isinstance(error, OSError) and not isinstance(error, FileNotFoundError) and not _FINAL.search(str(error))
    return isinstance(error, OSError) and error.errno in _PASSING


def _variable(*names: str) -> str | None:
    return next((os.environ[name] for name in names if os.environ.get(name)), None)


def _without_secrets(error: BaseException) -> str:
    text = str(error)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"):
        if value := _variable(name):
            text = text.replace(value, f"<{name}>")
    return text or type(error).__name__
