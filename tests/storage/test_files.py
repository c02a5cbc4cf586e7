"""Files on local folders and on a real S3 server: the same behaviour, with readable errors and without secrets."""

import os
import pickle
import threading
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from seaweed import S3, free_ports

from xmc_ray import storage
from xmc_ray.errors import ConfigError, DataError, XmcError
from xmc_ray.storage import address, folders

SECRET = "a-secret-that-nobody-may-see"


@pytest.fixture(params=["local", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A folder that does not exist yet."""
    if request.param == "local":
        return str(tmp_path / "place")
    return request.getfixturevalue("s3").uri(f"storage/{request.node.name}")


def names(place: str, *suffixes: str) -> list[str]:
    return [file.uri.removeprefix(f"{place}/") for file in storage.list_files(place, suffixes)]


def test_what_is_written_is_read(place: str) -> None:
    uri = storage.join(place, "deep", "file")
    assert not storage.exists(uri)
    storage.write_bytes(uri, b"old")
    storage.write_bytes(uri, b"new")
    assert storage.exists(uri)
    assert storage.read_bytes(uri) == b"new"


def test_listings_are_never_stale(place: str) -> None:
    assert storage.is_empty(place)
    for name in ("a", "b", "c"):
        storage.write_bytes(storage.join(place, name), b"")
        assert names(place)[-1] == name
    assert not storage.is_empty(place)
    storage.remove(place)
    assert storage.is_empty(place)


def test_what_another_client_writes_is_seen_at_once(place: str) -> None:
    for name in ("a", "b"):
        uri = storage.join(place, name)
        assert not storage.exists(uri)
        fs, path = storage.arrow_filesystem(uri)
        fs.create_dir(os.path.dirname(path))
        arrow_write(uri)
        assert names(place)[-1] == name
        assert storage.exists(uri)


def test_a_new_file_appears_when_it_is_complete(place: str) -> None:
    uri = storage.join(place, "file")
    with storage.new_file(uri) as path:
        path.write_bytes(b"whole")
        assert not storage.exists(uri)
    assert storage.read_bytes(uri) == b"whole"
    with pytest.raises(ZeroDivisionError), storage.new_file(uri) as path:
        print(path.write_bytes(b"half") / 0)
    assert storage.read_bytes(uri) == b"whole"
    assert names(place) == ["file"] and not path.exists()


def test_json_survives(place: str) -> None:
    value = {"name": "Größe", "counts": [1, 2.5, None], "nested": {"yes": True}}
    uri = storage.join(place, "file.json")
    storage.write_json(uri, value)
    assert storage.read_json(uri) == value
    assert "Größe" in storage.read_bytes(uri).decode()
    with pytest.raises(ValueError, match="not JSON compliant"):
        storage.write_json(uri, float("nan"))


def test_broken_json_is_an_error(place: str) -> None:
    uri = storage.join(place, "file.json")
    storage.write_bytes(uri, b'{"half":')
    with pytest.raises(DataError, match=r"not a JSON file.*file\.json"):
        storage.read_json(uri)


def test_list_files_is_recursive_sorted_and_skips_hidden_names(place: str) -> None:
    for name in ("b.parquet", "a/c.parquet", "a/d.jsonl", "_SUCCESS", ".part", "_tmp/e.parquet", "a/.x/f.parquet", "a_b/_g"):
        storage.write_bytes(storage.join(place, name), b"12345")
    assert names(place) == ["a/c.parquet", "a/d.jsonl", "b.parquet"]
    assert names(place, ".parquet") == ["a/c.parquet", "b.parquet"]
    assert names(place, ".jsonl", ".parquet") == names(place)
    assert {file.size for file in storage.list_files(place)} == {5}


def test_a_hidden_folder_lists_its_own_files(place: str) -> None:
    storage.write_bytes(storage.join(place, "_hidden", "a"), b"")
    assert names(storage.join(place, "_hidden")) == ["a"]


def test_a_listed_address_can_be_read(place: str) -> None:
    storage.write_bytes(storage.join(place, "a b", "ü%20.txt"), b"text")
    (file,) = storage.list_files(place)
    assert storage.read_bytes(file.uri) == b"text"


def test_version_changes_with_the_content(place: str) -> None:
    uri = storage.join(place, "file")
    storage.write_bytes(uri, b"old")
    before = storage.list_files(uri)
    assert storage.list_files(uri) == before
    time.sleep(0.02)  # a file system's clock may tick at 100 Hz
    storage.write_bytes(uri, b"new")
    assert storage.list_files(uri)[0].version != before[0].version


def test_a_single_file_lists_itself(place: str) -> None:
    uri = storage.join(place, "_file.txt")
    storage.write_bytes(uri, b"text")
    storage.write_bytes(uri + "2", b"a neighbour that shares its prefix")
    assert [(file.uri, file.size) for file in storage.list_files(uri, [".parquet"])] == [(uri, 4)]


def test_no_files_is_an_error_that_says_what_was_looked_for(place: str) -> None:
    with pytest.raises(DataError, match=r"no input: .*found nothing; expected \*\.parquet or \*\.jsonl"):
        storage.list_files(place, [".parquet", ".jsonl"])
    storage.write_bytes(storage.join(place, "readme.txt"), b"")
    with pytest.raises(DataError, match="found 1 other files"):
        storage.list_files(place, [".parquet"])


def test_a_missing_file_is_an_error(place: str) -> None:
    with pytest.raises(DataError, match=r"no such file.*place|no such file.*storage"):
        storage.read_bytes(storage.join(place, "none"))


def test_remove(place: str) -> None:
    for name in ("folder/a", "folder/b/c", "folder2/d"):
        storage.write_bytes(storage.join(place, name), b"")
    storage.remove(storage.join(place, "folder"))
    assert names(place) == ["folder2/d"]
    storage.remove(storage.join(place, "folder2/d"))
    assert storage.is_empty(place)
    storage.remove(storage.join(place, "folder"))


def test_remove_takes_no_name_for_a_pattern(place: str) -> None:
    for name in ("a*/b", "ab/b", "[ab]/b", "a?"):
        storage.write_bytes(storage.join(place, name), b"")
    for name in ("a*", "[ab]", "a?"):
        storage.remove(storage.join(place, name))
    assert names(place) == ["ab/b"]


@pytest.mark.parametrize("uri", ["/", "/tmp", "s3://test", "s3://test/"])
def test_remove_spares_buckets_and_top_folders(uri: str, s3: S3) -> None:
    with pytest.raises(ConfigError, match="never removed"):
        storage.remove(uri)


def test_upload_and_local_copy_are_inverse(place: str, tmp_path: Path) -> None:
    source = make_folder(tmp_path / "source", "a", "b/c", ".hidden")
    folders.upload(source, place)
    copy = folders.local_copy(place, tmp_path / "copy")
    assert content(copy) == content(source)
    assert folders.local_copy(storage.join(place, "b", "c"), tmp_path / "copy2").read_bytes() == b"b/c"


def test_upload_writes_the_marker_last(place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = make_folder(tmp_path / "source", "a", "marker", "z/a")
    folders.upload(source, place, last="marker")
    order = []
    copy_file = folders.copy_file

    def copy_and_look(path: Path, uri: str) -> None:
        order.append(path.name)
        assert not storage.exists(storage.join(place, "marker")), "the old marker vouches for a mixture"
        copy_file(path, uri)

    monkeypatch.setattr(folders, "copy_file", copy_and_look)
    folders.upload(source, place, last="marker")
    assert order == ["a", "a", "marker"]
    assert storage.exists(storage.join(place, "marker"))


def test_upload_of_an_incomplete_folder_is_an_error(place: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nothing to copy"):
        folders.upload(tmp_path / "none", place)
    with pytest.raises(DataError, match=r"missing: .*marker"):
        folders.upload(make_folder(tmp_path / "source", "a"), place, last="marker")
    assert storage.is_empty(place)


def test_pyarrow_sees_the_same_files(place: str) -> None:
    table = pa.table({"id": ["a", "b"]})
    fs, path = storage.arrow_filesystem(storage.join(place, "t.parquet"))
    fs.create_dir(os.path.dirname(path))
    pq.write_table(table, path, filesystem=fs)
    assert names(place) == ["t.parquet"]
    fs, path = storage.arrow_filesystem(storage.list_files(place)[0].uri)
    assert pq.read_table(path, filesystem=fs).equals(table)


def test_a_reader_never_sees_half_a_file(place: str) -> None:
    uri, versions = storage.join(place, "file"), [bytes([letter]) * 3_000_000 for letter in b"ab"]
    storage.write_bytes(uri, versions[0])
    writer = threading.Thread(target=lambda: [storage.write_bytes(uri, versions[turn % 2]) for turn in range(20)])
    writer.start()
    while writer.is_alive():
        assert storage.read_bytes(uri) in versions
    writer.join()
    assert names(place) == ["file"]


def test_a_failed_local_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uri = str(tmp_path / "file")
    storage.write_bytes(uri, b"old")

    def stop_halfway(path: Path, data: bytes) -> int:
        path.open("wb").write(data[:1])
        raise OSError("No space left on device")

    monkeypatch.setattr(Path, "write_bytes", stop_halfway)
    with pytest.raises(ConfigError, match=r"file; found No space left on device"):
        storage.write_bytes(uri, b"new")
    assert storage.read_bytes(uri) == b"old"
    assert os.listdir(tmp_path) == ["file"]


def test_local_addresses_have_three_spellings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    storage.write_bytes("folder/file", b"text")
    for uri in (tmp_path / "folder/file", f"{tmp_path}/folder/file", f"file://{tmp_path}/folder/file", "folder/file"):
        assert storage.read_bytes(uri) == b"text"
        assert folders.local_copy(uri) == tmp_path / "folder/file"
    assert storage.list_files("folder")[0].uri == str(tmp_path / "folder/file")


def test_links_are_followed(tmp_path: Path) -> None:
    make_folder(tmp_path / "elsewhere", "a")
    (tmp_path / "data").mkdir()
    (tmp_path / "data/linked").symlink_to(tmp_path / "elsewhere")
    assert names(str(tmp_path / "data")) == ["linked/a"]


def test_pathlib_may_swallow_a_slash(s3: S3) -> None:
    assert storage.filesystem(Path(s3.uri("key")))[1] == "test/key"


@pytest.mark.parametrize("uri", ["gs://bucket/key", "http://host/file", "s3://"])
@pytest.mark.parametrize("open_it", [storage.filesystem, storage.arrow_filesystem])
def test_other_schemes_are_refused(uri: str, open_it: object) -> None:
    with pytest.raises(ConfigError, match=f"not an address to use: {uri}; expected a local path, file:///path or s3://"):
        open_it(uri)


def test_credentials_in_an_address_are_refused_without_a_word_of_them() -> None:
    with pytest.raises(ConfigError, match="credentials") as caught:
        storage.exists(f"s3://key:{SECRET}@bucket/key")
    assert SECRET not in str(caught.value)


def test_temporary_copies_are_removed_at_exit(s3: S3, monkeypatch: pytest.MonkeyPatch) -> None:
    storage.write_bytes(s3.uri("storage/exit/file"), b"text")
    at_exit = []
    monkeypatch.setattr(folders.atexit, "register", lambda *call, **options: at_exit.append((call, options)))
    folder = folders.local_copy(s3.uri("storage/exit"))
    assert content(folder) == {"file": b"text"}
    for (function, *values), options in at_exit:
        function(*values, **options)
    assert not folder.exists()


def test_digest(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"abc")
    assert folders.digest(tmp_path / "file") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    with pytest.raises(DataError, match="no such file"):
        folders.digest(tmp_path / "none")


ATTEMPTS = {
    "exists": storage.exists,
    "list": storage.list_files,
    "read": storage.read_bytes,
    "write": lambda uri: storage.write_bytes(uri, b""),
    "remove": storage.remove,
    "copy": folders.local_copy,
    "arrow": lambda uri: arrow_write(uri),
}


@pytest.mark.parametrize("attempt", ATTEMPTS)
def test_wrong_credentials_are_one_line_without_secrets(attempt: str, s3: S3, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    with pytest.raises(ConfigError, match=r"cannot be .*: s3://test/storage/file; found .* check AWS_") as caught:
        ATTEMPTS[attempt](s3.uri("storage/file"))
    assert_clean(caught.value)


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
    with pytest.raises(ConfigError, match=r"s3://test/file; found .*(?i:could not connect)"):
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


def make_folder(folder: Path, *names: str) -> Path:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode())
    return folder


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def arrow_write(uri: str) -> None:
    fs, path = storage.arrow_filesystem(uri)
    with storage.explained(uri), fs.open_output_stream(path) as stream:
        stream.write(b"text")


def assert_clean(error: XmcError) -> None:
    """One line, no secret, and neither after the error has crossed to another process."""
    for text in (str(error), repr(error), str(pickle.loads(pickle.dumps(error)))):
        assert SECRET not in text
        assert "\n" not in text
    assert error.__cause__ is None
    assert error.__suppress_context__, "the library's own error would be printed as well"


def test_a_removal_that_breaks_off_keeps_the_file_that_says_what_it_was(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a", "run.json", "z/z"):
        storage.write_bytes(storage.join(place, name), b"x")
    files, _ = storage.filesystem(place)
    remove_one, removed = files.rm_file, []

    def break_off(name: str) -> None:
        if len(removed) == 2:
            raise PermissionError("no more")
        removed.append(name)
        remove_one(name)

    monkeypatch.setattr(files, "rm_file", break_off)  # fsspec gives out the same object every time
    with pytest.raises(ConfigError, match="no more"):
        storage.remove(place, last="run.json")
    assert storage.exists(storage.join(place, "run.json"))
    monkeypatch.undo()
    storage.remove(place, last="run.json")
    assert storage.is_empty(place)
