"""Addresses and file systems: readable errors without secrets, and which of them may pass by themselves."""

import errno
import pickle
import time
from pathlib import Path

import pytest
from botocore.exceptions import ClientError, EndpointConnectionError, NoCredentialsError, ReadTimeoutError
from seaweed import S3, free_ports

from xmc_ray import storage
from xmc_ray.errors import ConfigError, DataError, UnavailableError, XmcError
from xmc_ray.storage import address, folders

SECRET = "a-secret-that-nobody-may-see"


ATTEMPTS = {
    "exists": storage.exists,
    "list": storage.list_files,
    "read": storage.read_bytes,
    "write": lambda uri: storage.write_bytes(uri, b""),
    "remove": storage.remove,
    "copy": folders.local_copy,
    "arrow": lambda uri: arrow_write(uri),
}


def test_pathlib_may_swallow_a_slash(s3: S3) -> None:
    assert storage.filesystem(Path(s3.uri("key")))[1] == "test/key"


@pytest.mark.parametrize("uri", ["gs://bucket/key", "http://host/file", "s3://"])
@pytest.mark.parametrize("open_it", [storage.filesystem, storage.arrow_filesystem])
def test_other_schemes_are_refused(uri: str, open_it: object) -> None:
    with pytest.raises(ConfigError, match=f"not a supported address: {uri}; expected a local path, file:///path or s3://"):
        open_it(uri)


def test_credentials_in_an_address_are_refused_without_a_word_of_them() -> None:
    with pytest.raises(ConfigError, match="credentials") as caught:
        storage.exists(f"s3://key:{SECRET}@bucket/key")
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize("attempt", ATTEMPTS)
def test_wrong_credentials_are_one_line_without_secrets(attempt: str, s3: S3, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    with pytest.raises(ConfigError, match=r"cannot be .*: s3://test/storage/file; found .* check AWS_") as caught:
        ATTEMPTS[attempt](s3.uri("storage/file"))
    assert_clean(caught.value)
    assert not isinstance(caught.value, UnavailableError)


def test_secrets_that_a_library_repeats_are_replaced(s3: S3, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SESSION_TOKEN", SECRET)
    with pytest.raises(ConfigError, match="<AWS_SESSION_TOKEN>") as caught, storage.explained("s3://bucket/key"):
        raise OSError(f"the token {SECRET} is\nno good")
    assert_clean(caught.value)


@pytest.mark.parametrize("attempt", ["write", "remove", "arrow"])
def test_lacking_permission(attempt: str, s3: S3, monkeypatch: pytest.MonkeyPatch) -> None:
    uri = s3.uri("storage/owned")
    storage.write_bytes(uri, b"text")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", s3.reader_access_key)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", s3.reader_secret_key)
    with pytest.raises(ConfigError, match=r"(?i)storage/owned; found .*access.?denied"):
        ATTEMPTS[attempt](uri)
    assert storage.read_bytes(uri) == b"text"


@pytest.mark.parametrize(("attempt", "kind"), [("list", DataError), ("read", DataError), ("write", ConfigError)])
def test_missing_bucket(attempt: str, kind: type[XmcError], s3: S3) -> None:
    with pytest.raises(kind, match="s3://none/file"):
        ATTEMPTS[attempt]("s3://none/file")
    assert not storage.exists("s3://none/file")


@pytest.mark.parametrize("attempt", ["exists", "write", "arrow"])
def test_an_endpoint_that_does_not_answer(attempt: str, s3: S3, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", f"http://127.0.0.1:{free_ports('nobody')['nobody']}")
    start = time.monotonic()
    with pytest.raises(UnavailableError, match=r"s3://test/file; found .*(?i:could not connect)"):
        ATTEMPTS[attempt](s3.uri("file"))
    assert time.monotonic() - start < 30


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"AWS_SECRET_ACCESS_KEY": ""}, "go together"),
        ({"AWS_ENDPOINT_URL": "localhost:9000"}, "not an S3 endpoint; found localhost:9000"),
    ],
)
def test_variables_that_do_not_fit(variables: dict[str, str], message: str, s3: S3, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=message):
        address.S3Access.from_environment()


def test_representations_keep_secrets(s3: S3, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("AWS_SESSION_TOKEN", SECRET)
    for thing in (
        address.S3Access.from_environment(),
        storage.filesystem("s3://b/k"),
        storage.arrow_filesystem("s3://b/k"),
    ):
        assert SECRET not in f"{thing} {thing!r}"


def assert_clean(error: XmcError) -> None:
    """One line, no secret, and neither after the error has crossed to another process."""
    for text in (str(error), repr(error), str(pickle.loads(pickle.dumps(error)))):
        assert SECRET not in text
        assert "\n" not in text
    assert error.__cause__ is None
    assert error.__suppress_context__, "the library's own error would be printed as well"


def arrow_write(uri: str) -> None:
    fs, path = storage.arrow_filesystem(uri)
    with storage.explained(uri), fs.open_output_stream(path) as stream:
        stream.write(b"text")


def client_error(status: int, kind: type[OSError] = OSError) -> OSError:
    """What s3fs makes of an answer of the server."""
    error = kind(errno.EIO, "an answer")
    error.__cause__ = ClientError({"ResponseMetadata": {"HTTPStatusCode": status}}, "GetObject")
    return error


ERRORS = {
    "no connection": (EndpointConnectionError(endpoint_url="there"), True),
    "no time": (ReadTimeoutError(endpoint_url="there"), True),
    "refused": (ConnectionRefusedError(), True),
    "server broken": (client_error(500), True),
    "throttled": (client_error(503), True),
    "too many requests": (client_error(429), True),
    "arrow, no connection": (OSError("AWS Error NETWORK_CONNECTION during GetObject operation"), True),
    "arrow, throttled": (OSError("AWS Error SLOW_DOWN (HTTP status 503) during GetObject operation"), True),
    "arrow, too many requests": (OSError("AWS Error UNKNOWN (HTTP status 429) during GetObject operation"), True),
    "network file system": (OSError(errno.ESTALE, "Stale file handle"), True),
    "missing": (FileNotFoundError(errno.ENOENT, "none"), False),
    "forbidden": (client_error(403, PermissionError), False),
    "precondition": (client_error(412), False),
    "no credentials": (NoCredentialsError(), False),
    "disk full": (OSError(errno.ENOSPC, "No space left on device"), False),
    "arrow, refused": (OSError("AWS Error ACCESS_DENIED during HeadObject operation: No response body."), False),
    "arrow, wrong key": (OSError("AWS Error INVALID_ACCESS_KEY_ID during GetObject operation"), False),
    "arrow, wrong request": (OSError("AWS Error UNKNOWN (HTTP status 400) during GetObject operation"), False),
    "damaged disk": (OSError(errno.EIO, "Input/output error"), False),
    "damaged file": (OSError("Couldn't deserialize thrift"), False),
    "ours": (DataError("no such file"), False),
}


@pytest.mark.parametrize("case", ERRORS)
def test_what_may_pass_by_itself(case: str) -> None:
    error, passes = ERRORS[case]
    assert storage.is_unavailable(error) is passes
    if not isinstance(error, XmcError):
        with pytest.raises(XmcError) as caught, storage.explained("s3://bucket/key"):
            raise error
        assert isinstance(caught.value, UnavailableError) is passes
