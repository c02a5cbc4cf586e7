"""Files on local folders and on a real S3 server: the same behaviour."""

import errno
import os
import re
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from places import names
from seaweed import S3

from xmc_ray import storage
from xmc_ray.errors import ConfigError, DataError, UnavailableError
from xmc_ray.storage import files, folders


def test_what_is_written_is_read(place: str) -> None:
    uri = storage.join(place, "deep", "file")
    assert not storage.exists(uri)
    storage.write_bytes(uri, b"old")
    storage.write_bytes(uri, b"new")
    assert storage.exists(uri)
    assert storage.read_bytes(uri) == b"new"


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


def test_a_broken_file_is_an_error(place: str) -> None:
    uri = storage.join(place, "file.json")
    storage.write_bytes(uri, b'{"half":')
    with pytest.raises(DataError, match=r"not a JSON file.*file\.json"):
        storage.read_json(uri)
    with pytest.raises(DataError, match=r"not a Parquet file.*file\.json"):
        storage.read_parquet(uri)
    storage.write_bytes(uri, 100_000 * b"[")
    with pytest.raises(DataError, match=r"not a JSON file.*file\.json.*recursion"):
        storage.read_json(uri)


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


def test_what_a_marker_names_is_on_the_disk_before_the_marker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A power failure cannot leave the marker of a file that is empty, or whose folder has no entry for it."""
    synced: list[tuple[str, bool]] = []
    fsync = os.fsync

    def note(handle: int) -> None:
        path = re.sub(r"\.(\w+)\.[0-9a-f]{32}", r"\1", os.readlink(f"/proc/self/fd/{handle}"))
        synced.append((os.path.relpath(path, tmp_path), os.path.exists(path)))
        fsync(handle)

    monkeypatch.setattr(os, "fsync", note)
    storage.write_bytes(tmp_path / "night" / "part", b"tags")
    with storage.new_file(tmp_path / "night" / "more") as file:
        file.write_bytes(b"tags")
    storage.write_json(tmp_path / "night" / "marker", {})
    content = [(f"night/{name}", False) for name in ("part", "more", "marker")]  # before it has its name
    entry = ("night", True)
    assert synced == [(".", True), content[0], entry, content[1], entry, content[2], entry]
    storage.move(tmp_path / "night" / "part", tmp_path / "other" / "part")
    assert synced[-2:] == [(".", True), ("other", True)]


@pytest.mark.parametrize("code", [errno.EINVAL, errno.EOPNOTSUPP])
def test_a_file_system_that_cannot_sync_is_written_to(code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(handle: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", refuse)
    storage.write_bytes(tmp_path / "a", b"1")
    assert storage.read_bytes(tmp_path / "a") == b"1"


def test_a_disk_that_fails_to_sync_publishes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(handle: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(ConfigError, match="cannot be read or written"):
        storage.write_bytes(tmp_path / "a", b"1")
    assert not list(tmp_path.iterdir())


def test_json_with_a_file_name_that_is_not_utf_8_is_valid_and_read_back(tmp_path: Path) -> None:
    value = {"file": os.fsdecode(b"caf\xe9"), "label": "größe"}
    storage.write_json(tmp_path / "a.json", value)
    written = (tmp_path / "a.json").read_bytes()
    assert storage.read_json(tmp_path / "a.json") == value and b"\\udce9" in written and "größe".encode() in written


def test_local_addresses_have_three_spellings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    storage.write_bytes("folder/file", b"text")
    for uri in (tmp_path / "folder/file", f"{tmp_path}/folder/file", f"file://{tmp_path}/folder/file", "folder/file"):
        assert storage.read_bytes(uri) == b"text"
        assert folders.local_copy(uri) == tmp_path / "folder/file"
    assert storage.list_files("folder")[0].uri == str(tmp_path / "folder/file")


def test_what_vanishes_under_a_removal_does_not_end_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a/f", "b/g/f", "run.json", "zz.tmp"):
        (tmp_path / "x" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "x" / name).touch()
    scandir = os.scandir

    def scanned(path: Any) -> Any:
        entries = sorted(scandir(path), key=lambda entry: entry.name)
        for name in ("zz.tmp", "b/g/f"):  # by others
            (tmp_path / "x" / name).unlink(missing_ok=True)
        return Entries(entries)

    with monkeypatch.context() as patch:
        patch.setattr(files.os, "scandir", scanned)
        storage.remove(tmp_path / "x", last="run.json")
    assert not (tmp_path / "x").exists()


class Entries(list[Any]):
    """As `os.scandir` returns them."""

    def __enter__(self) -> "Entries":
        return self

    def __exit__(self, *_: object) -> None:
        pass


def test_removal_does_not_follow_links(tmp_path: Path) -> None:
    precious, folder = tmp_path / "precious", tmp_path / "night" / "_work"
    for path in (precious / "below" / "a.txt", folder / "inside" / "b.txt"):
        path.parent.mkdir(parents=True)
        path.write_text("mine")
    for link, target in ((folder / "folder", precious), (folder / "inside" / "file", precious / "below" / "a.txt")):
        link.symlink_to(target)
    (folder / "to nothing").symlink_to(tmp_path / "nothing")
    storage.remove(folder, last="file that is not there")
    assert not folder.exists() and (precious / "below" / "a.txt").read_text() == "mine"
    (tmp_path / "link").symlink_to(precious)
    storage.remove(tmp_path / "link")
    assert not (tmp_path / "link").is_symlink() and (precious / "below" / "a.txt").exists()


def test_a_removal_that_breaks_off_keeps_the_file_that_says_what_it_was(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a", "run.json", "z", "zz"):
        storage.write_bytes(storage.join(place, name), b"x")
    # fsspec gives out the same object every time
    remover, method = (os, "unlink") if storage.is_local(place) else (storage.filesystem(place)[0], "rm_file")
    remove_one, removed = getattr(remover, method), []

    def break_off(name: str) -> None:
        if len(removed) == 2:
            raise PermissionError("no more")
        removed.append(name)
        remove_one(name)

    monkeypatch.setattr(remover, method, break_off)
    with pytest.raises(ConfigError, match="no more"):
        storage.remove(place, last="run.json")
    assert storage.exists(storage.join(place, "run.json"))
    monkeypatch.undo()
    storage.remove(place, last="run.json")
    assert storage.is_empty(place)


class Storage:
    """Stands for a storage that fails some times before it answers; counts how often it is asked."""

    def __init__(self, *failures: Exception) -> None:
        self.failures, self.calls = list(failures), 0

    def __call__(self) -> str:
        self.calls += 1
        if self.failures:
            raise self.failures.pop(0)
        return "answer"


PASSING = [
    UnavailableError("away"),
    ConnectionResetError(),
    TimeoutError(),
    OSError(errno.ESTALE, "a network file system is away"),
]


def test_a_storage_that_is_away_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "_PAUSE", 0)
    act = Storage(*PASSING)
    assert storage.patiently(act) == "answer" and act.calls == 5
    monkeypatch.setattr(files, "PATIENCE", 0)
    with pytest.raises(UnavailableError):
        storage.patiently(Storage(*[UnavailableError("away")] * 1000))


@pytest.mark.parametrize(
    "error",
    [
        DataError("no such file"),
        ConfigError("credentials"),
        FileNotFoundError(),
        PermissionError(),
        OSError(errno.ENOSPC, "full"),
    ],
    ids=repr,
)
def test_what_will_not_pass_is_raised_at_once(error: Exception) -> None:
    act = Storage(error)
    with pytest.raises(type(error)):
        storage.patiently(act)
    assert act.calls == 1


def test_a_missing_file_is_not_waited_for(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "_PAUSE", pytest.fail)
    for read in (storage.read_bytes, storage.read_json, storage.read_parquet):
        with pytest.raises(DataError, match="no such file"):
            storage.patiently(lambda read=read: read(storage.join(place, "none")))


def test_of_many_that_create_a_file_one_does(place: str) -> None:
    for turn in range(5):
        uri = storage.join(place, f"{turn}")
        with ThreadPoolExecutor(8) as pool:
            created = list(pool.map(lambda number, uri=uri: storage.create(uri, b"%d" % number), range(8)))
        assert sorted(created) == [False] * 7 + [True]
        assert storage.read_bytes(uri) == b"%d" % created.index(True)
        assert not storage.create(uri, b"late")
    assert names(place) == ["0", "1", "2", "3", "4"] == [file.uri[-1] for file in storage.all_files(place)]


def test_a_file_system_without_hard_links_cannot_create(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(source: str, target: str) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    with pytest.raises(NotImplementedError, match="hard links"):
        storage.create(tmp_path / "file", b"")
    assert not list(tmp_path.iterdir())


def test_a_server_that_ignores_the_condition_is_found_out(s3: S3, monkeypatch: pytest.MonkeyPatch) -> None:
    uri = s3.uri("storage/unconditional")
    server, _ = storage.filesystem(uri)
    pipe_file = server.pipe_file
    monkeypatch.setattr(server, "pipe_file", lambda path, data, mode: pipe_file(path, data))
    with pytest.raises(NotImplementedError, match="conditional writes"):
        storage.create(uri, b"")
