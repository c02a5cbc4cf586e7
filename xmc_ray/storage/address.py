"""Addresses and the file systems behind them: a local path (``/x``, ``x``, ``file:///x``) or ``s3://bucket/key``.

Small files go through fsspec, Parquet through pyarrow. Both use the credentials that `S3Access.from_environment` finds, so
that a job never reads as one user and writes as another.
"""

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import fsspec
import pyarrow.fs
from botocore.exceptions import BotoCoreError, ClientError, HTTPClientError
from botocore.exceptions import ConnectionError as EndpointError

from xmc_ray.errors import ConfigError, DataError, UnavailableError, XmcError

Uri = str | os.PathLike[str]

# An endpoint that does not answer is reported within about half a minute; a slow one is waited for.
CONNECT_SECONDS, READ_SECONDS, ATTEMPTS = 5, 60, 3

# Errors of a network, a network file system or an overloaded server, which pass by themselves.
_PASSING = {
    *(errno.EAGAIN, errno.EBUSY, errno.EREMOTEIO, errno.ESTALE, errno.ETIMEDOUT, errno.EHOSTUNREACH),
    *(errno.ENETUNREACH, errno.ENETDOWN, errno.EHOSTDOWN, errno.ENETRESET),
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


def split(uri: Uri) -> tuple[str, str]:
    """Scheme (``file`` or ``s3``) and path: absolute for a file, ``bucket/key`` for S3, without a trailing slash.

    ConfigError for any other scheme, and for credentials in the address.
    """
    text = os.fspath(uri)
    # A single slash is accepted, since pathlib turns s3://bucket into s3:/bucket.
    address = re.fullmatch(r"([A-Za-z][A-Za-z0-9+.-]*):/+(.*)", text)
    if address is None:
        return "file", os.path.abspath(text)
    scheme, rest = address[1].lower(), address[2].rstrip("/")
    if scheme == "file":
        return "file", "/" + rest
    if scheme != "s3" or not rest:
        raise ConfigError("not a supported address", where=text, expected="a local path, file:///path or s3://bucket/key")
    if "@" in rest.partition("/")[0]:
        raise ConfigError("the address contains credentials", expected="s3://bucket/key and AWS_* environment variables")
    return "s3", rest


def is_local(uri: Uri) -> bool:
    """Whether ``uri`` is a path on this machine, mounted file systems included."""
    return split(uri)[0] == "file"


def filesystem(uri: Uri) -> tuple[fsspec.AbstractFileSystem, str]:
    """The fsspec file system of ``uri``, without cached listings, and the path in it; ConfigError as `split`."""
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
    """The pyarrow file system of ``uri`` and the path in it; ConfigError as `split`."""
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
    """Turn what a file system raises into one line about ``uri`` that holds no secrets.

    Raises ``missing`` for a file or bucket that does not exist (writers ask for ConfigError), UnavailableError where
    `is_unavailable` says so, and otherwise ConfigError.
    """
    try:
        yield
    except FileNotFoundError as error:
        raise missing("no such file, folder or bucket", where=uri, found=_without_secrets(error)) from None
    except (OSError, BotoCoreError) as error:
        is_s3 = split(uri)[0] == "s3"
        way_out = "check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_REGION and AWS_ENDPOINT_URL" if is_s3 else None
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
