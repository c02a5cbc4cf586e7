"""Listings of local folders and of a real S3 server: the same files, in the same order."""

import errno
import os
import time
from pathlib import Path
from typing import Any

import pytest
from places import make_folder, names

from xmc_ray import storage
from xmc_ray.errors import ConfigError, DataError
from xmc_ray.storage import listing


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


def test_links_are_followed(tmp_path: Path) -> None:
    make_folder(tmp_path / "elsewhere", "a")
    (tmp_path / "data").mkdir()
    (tmp_path / "data/linked").symlink_to(tmp_path / "elsewhere")
    assert names(str(tmp_path / "data")) == ["linked/a"]


def test_a_link_to_a_folder_above_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "below").mkdir()
    (tmp_path / "below" / "a.txt").write_text("")
    (tmp_path / "below" / "up").symlink_to(tmp_path)
    assert [file.uri for file in storage.all_files(tmp_path)] == [str(tmp_path / "below" / "a.txt")]


def test_what_vanishes_under_a_listing_is_left_out_but_a_visible_link_to_nothing_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / ".hidden").symlink_to(tmp_path / "nothing")
    for name in ("a", "b"):
        (tmp_path / name).write_text("")
    (tmp_path / "folder").mkdir()
    list_entries = listing._entries

    def list_and_remove(folder: str) -> Any:
        entries = list_entries(folder)
        (tmp_path / "a").unlink(missing_ok=True)
        (tmp_path / "folder").rmdir()
        return entries

    with monkeypatch.context() as patch:
        patch.setattr(listing, "_entries", list_and_remove)
        assert [file.uri for file in storage.all_files(tmp_path)] == [str(tmp_path / "b")]
    (tmp_path / "c").symlink_to(tmp_path / "nothing")
    with pytest.raises(DataError, match="no such file"):
        storage.all_files(tmp_path)


def test_links_in_a_circle_are_not_followed(tmp_path: Path) -> None:
    """C11: two folders that link to each other, a link to itself, and one to a folder above the listed one."""
    for name, target in (("a/b", "../b"), ("b/a", "../a"), ("a/.self", ".self"), ("b/up", "../..")):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).symlink_to(target)
    (tmp_path / "in" / "a" / "file").write_text("")
    (tmp_path / "outside").write_text("")
    found = [file.uri for file in storage.all_files(tmp_path / "in")]
    assert found == [str(tmp_path / "in" / name) for name in ("a/file", "b/a/file")]
    (tmp_path / "in" / "self").symlink_to("self")
    with pytest.raises(ConfigError, match=r"Too many levels of symbolic links.*a link on the way leads back to itself"):
        storage.list_files(tmp_path / "in")


def test_hidden_names_are_passed_over_before_they_are_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """C11: an editor's lock, a folder that may not be read, and what has another ending than documents."""
    make_folder(tmp_path, "a.txt", ".cache/b.txt", "_tmp/c.txt")
    for name in (".#lock", ".cache/link.txt", "README"):
        (tmp_path / name).symlink_to("nowhere")
    stat, looked_at = os.stat, []
    monkeypatch.setattr(os, "stat", lambda path, **options: looked_at.append(str(path)) or stat(path, **options))
    assert names(str(tmp_path), ".txt") == ["a.txt"]
    assert not [path for path in looked_at if "/." in path or "/_" in path]


@pytest.mark.parametrize("name", ["lost+found", "private"])
def test_a_folder_that_may_not_be_read_is_an_error_unless_it_is_the_systems(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """C11, and errors of others: documents in a folder without rights do not go missing in silence."""
    make_folder(tmp_path, "a.txt", f"{name}/b.txt", f".{name}/c.txt")
    scandir = os.scandir

    def refuse(path: Any) -> Any:
        if str(path).endswith(name):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    if name == "lost+found":
        assert names(str(tmp_path)) == ["a.txt"]
        return
    with pytest.raises(ConfigError, match=r"Permission denied: '.*/private'; give this user the right"):
        names(str(tmp_path))


def test_what_is_no_file_is_not_listed(tmp_path: Path) -> None:
    """Reading a named pipe would wait for ever."""
    os.mkfifo(tmp_path / "pipe.txt")
    assert storage.all_files(tmp_path) == []


@pytest.mark.parametrize("ask", [storage.exists, storage.is_empty, storage.all_files, storage.list_files, storage.subfolders])
def test_what_cannot_be_looked_at_is_not_missing(ask: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Errors of others: each by its own name, and none as "not there"."""
    make_folder(tmp_path, "file", "closed/folder/x")
    with pytest.raises(ConfigError, match=r"Not a directory.*a folder on the way is a file"):
        ask(tmp_path / "file" / "folder")
    with pytest.raises(ConfigError, match=r"File name too long.*choose a shorter name"):
        ask(tmp_path / ("x" * 300))
    real = {name: getattr(os, name) for name in ("stat", "scandir")}

    def refuse(name: str) -> Any:
        def act(path: Any, **options: Any) -> Any:
            if "/closed/" in str(path):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
            return real[name](path, **options)

        return act

    for name in real:
        monkeypatch.setattr(os, name, refuse(name))
    with pytest.raises(ConfigError, match=r"Permission denied.*give this user the right, on the folders above as well"):
        ask(tmp_path / "closed" / "folder")


def test_subfolders_are_those_directly_below(place: str) -> None:
    assert storage.subfolders(storage.join(place, "folder")) == []
    for name in ("folder/dt=2/x", "folder/dt=1/deeper/y", "folder/z"):
        storage.write_bytes(storage.join(place, name), b"-")
    assert storage.subfolders(storage.join(place, "folder")) == ["dt=1", "dt=2"]


def test_a_link_that_cannot_be_followed_is_no_subfolder(tmp_path: Path) -> None:
    """Kind: one odd entry in a folder of ours, such as a link in a circle, ends the listing of all others."""
    (tmp_path / "dt=1").mkdir()
    for name, target in (("loop", "loop"), ("nowhere", "x"), ("dt=2", "dt=1")):
        (tmp_path / name).symlink_to(target)
    assert storage.subfolders(tmp_path) == ["dt=1", "dt=2"]


def arrow_write(uri: str) -> None:
    fs, path = storage.arrow_filesystem(uri)
    with storage.explained(uri), fs.open_output_stream(path) as stream:
        stream.write(b"text")
