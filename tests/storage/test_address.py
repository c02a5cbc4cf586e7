"""Addresses and file systems: readable errors without secrets, and which of them may pass by themselves."""

import errno
import os
import pickle
import time
from dataclasses import dataclass
from pathlib import Path

import fsspec
import pytest
from botocore.exceptions import ClientError, EndpointConnectionError, NoCredentialsError, ReadTimeoutError
from hypothesis import given
from hypothesis import strategies as st
from seaweed import S3

from cluster.local import free_ports
from xmc_ray import storage
from xmc_ray.data.documents import DocumentsConfig
from xmc_ray.errors import ConfigError, DataError, UnavailableError, XmcError
from xmc_ray.model.encoder import EncoderConfig
from xmc_ray.settings import Settings
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


@dataclass(frozen=True, kw_only=True)
class TextAndBundle(Settings):
    bundle: storage.Address | list[storage.Address]


def test_pathlib_may_swallow_a_slash(s3: S3) -> None:
    assert storage.filesystem(Path(s3.uri("key")))[1] == "test/key"


SPELLINGS = {
    "/a/b": ["/a/b/", "//a///b", "/a/./b", "/a/c/../b", "file:///a/b", "file:/a/b/", "FILE://localhost/a//b", "file:///a/%62"],
    "/a b": ["/a b", "file:///a%20b", "file:///a b"],
    "/a%20b": ["/a%20b", "file:///a%2520b"],
    "/100%": ["/100%", "file:///100%"],
    "/": ["/", "//", "file:///"],
    "s3://b/k/l": ["s3://b/k/l", "s3://b//k/l", "s3://b/k///l//", "S3://b/k/l", "s3:/b/k/l"],
    "s3://b": ["s3://b", "s3://b/", "s3://b//"],
    "s3://b/~/%20?": ["s3://b/~/%20?"],
    "{home}/x": ["~/x", "~//x/", "~/./x"],
    "{home}": ["~", "~/"],
    "{here}/x": ["x", "./x", "y/../x", "x/"],
    "{here}/a:b": ["a:b", "./a:b"],
    "{here}/~/x": ["./~/x"],
    "{here}/$x": ["./$x", "a/../$x"],
}
REFUSED = {
    "": "an empty address; found ''",
    "  ": "an empty address; found ' '",
    " /a": "white space around it; found ' /a'",
    "s3://b/k\n": "white space around it",
    "s3://": "not a supported address: s3://;",
    "s3:///k": "not a supported address: s3:///k",
    "s3:b/k": "not a supported address",
    "s3a://b/k": "not a supported address",
    "s3://b/a/../k": r"an address on S3 with \. or \.\.: s3://b/a/../k; write the key in full",
    "s3://b/.": "an address on S3 with",
    "file://host/a": "not a supported address",
    "file:a": "not a supported address",
    "file:///a%00": "not a supported address",
    "/a\0b": "not a supported address: '/a.x00b'",
    "s3://b/a\0b": "not a supported address",
    "~nobody-of-this-name/x": "no such user, or no home: .*or ./~nobody-of-this-name/x for a file of this name",
    "$HOME/x": "a variable that no shell has replaced",
    "${DATA}": "a variable that no shell has replaced",
}


@pytest.mark.parametrize("place", SPELLINGS)
def test_a_place_has_one_spelling(place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """C9."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/somebody")
    expected = place.replace("{home}", "/somebody").replace("{here}", str(tmp_path))
    assert {storage.normalise(spelling) for spelling in [*SPELLINGS[place], expected]} == {expected}


@pytest.mark.parametrize("uri", REFUSED, ids=repr)
def test_what_cannot_be_meant_is_refused(uri: str) -> None:
    """C9: in one line, and at the one place that all addresses pass."""
    for config in (lambda: DocumentsConfig(uri=uri), lambda: TextAndBundle(bundle=["/x", uri])):
        with pytest.raises(ConfigError, match=REFUSED[uri]) as refused:
            config()
        assert "\n" not in str(refused.value) and str(refused.value).startswith("invalid value of ")


def test_slashes_in_keys_of_others_are_kept() -> None:
    """C9: on S3, a//b is another key than a/b, and may be read."""
    assert DocumentsConfig(uri="s3://b/a//c//").uri == "s3://b/a//c"
    assert DocumentsConfig(uri="s3://b//a//c").uri == "s3://b/a//c"
    assert storage.filesystem("s3://b//a//c")[1] == "b//a//c"


def test_keys_with_doubled_slashes_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """C9: pyarrow's own client refuses them."""
    monkeypatch.setattr(address, "filesystem", lambda uri: (fsspec.filesystem("memory"), ""))
    fsspec.filesystem("memory").pipe("bucket//a//b", b"text")
    fs, path = storage.arrow_filesystem("s3://bucket//a//b")
    with fs.open_input_file(path) as stream:
        assert path == "bucket//a//b" and stream.read() == b"text"


def test_a_link_to_a_file_keeps_its_name(tmp_path: Path) -> None:
    """C9: a model hub's cache and git-annex have files without endings, and links with their names."""
    (tmp_path / "blob").write_text("")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "a.parquet").symlink_to("../blob")
    (tmp_path / "link").symlink_to("folder")
    assert storage.normalise(tmp_path / "link" / "a.parquet") == f"{tmp_path}/folder/a.parquet"


PARTS = st.lists(st.sampled_from(["a", "b", "link", "up", "..", ".", "", "new"]), max_size=6)


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("tree")
    for name in ("a/b", "b/a"):
        (root / name).mkdir(parents=True)
    for name, target in (("link", "a"), ("a/link", "../b/a"), ("b/up", ".."), ("b/a/link", "../../a/b")):
        (root / name).symlink_to(target)
    return root


@given(one=PARTS, other=PARTS)
def test_equal_places_have_equal_addresses(one: list[str], other: list[str], tree: Path) -> None:
    """C9, against a slow twin: the system itself says what is the same place."""
    paths = ["/".join([str(tree), *parts]) for parts in (one, other)]
    addresses = [storage.normalise(path) for path in paths]
    assert (
        addresses == [storage.normalise(each) for each in addresses] == [storage.normalise(f"file://{path}") for path in paths]
    )
    if all(map(os.path.exists, paths)):
        assert (addresses[0] == addresses[1]) is os.path.samefile(*paths)
        assert all(os.path.samefile(path, each) for path, each in zip(paths, addresses, strict=True))


@given(parts=st.lists(st.sampled_from(["a", "b.parquet", "_x", "%20", "~", ""]), max_size=5))
def test_addresses_on_s3_are_stable(parts: list[str]) -> None:
    text = "s3://bucket/" + "/".join(parts)
    assert storage.normalise(text) == "/".join(["s3://bucket", *filter(None, parts)])
    kept = storage.normalise(text, keep_slashes=True)
    assert kept == ("s3://bucket/" + "/".join(parts).strip("/")).rstrip("/") == storage.normalise(kept, keep_slashes=True)
    assert "s3://" + "/".join(storage.filesystem(kept)[1:]) == kept


def test_names_on_a_hub_are_no_addresses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/somebody")
    (tmp_path / "mine").mkdir()
    for name, expected in (
        ("bert-base-uncased", "bert-base-uncased"),
        ("owner/name", "owner/name"),
        ("mine", f"{tmp_path}/mine"),
        ("./other", f"{tmp_path}/other"),
        ("~/model", "/somebody/model"),
        ("s3://b/m/", "s3://b/m"),
    ):
        assert EncoderConfig(name=name).name == expected
    with pytest.raises(ConfigError, match="an empty address"):
        EncoderConfig(name="")


def test_words_are_no_addresses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert address._address_or("last").form("last") == "last"
    assert address._address_or("last").form("./last") == f"{tmp_path}/last"


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
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", f"http://127.0.0.1:{free_ports(1)[0]}")
    start = time.monotonic()
    with pytest.raises(UnavailableError, match=r"s3://test/file; found .*(?i:could not connect)"):
        ATTEMPTS[attempt](s3.uri("file"))
    assert time.monotonic() - start < 30


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"AWS_SECRET_ACCESS_KEY": ""}, "go together"),
        ({"AWS_ENDPOINT_URL": "localhost:9000"}, "not an S3 endpoint; found localhost:9000"),
        (
            {"AWS_ENDPOINT_URL": "admin:hunter2@minio:9000"},
            "^an S3 endpoint has no user and no password in it; expected [^@]*$",
        ),
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
