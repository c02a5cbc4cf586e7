"""Whole folders between this machine and storage, local and on a real S3 server."""

import errno
import os
from pathlib import Path
from typing import Any

import pytest
from places import content, make_folder
from seaweed import S3

from xmc_ray import storage
from xmc_ray.errors import ConfigError, DataError
from xmc_ray.storage import folders
from xmc_ray.storage.listing import FileInfo


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


def test_an_upload_that_is_interrupted_leaves_the_place_free(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C while an extended bundle is written: the same command is not refused for what it has left."""
    copy_file = folders.copy_file

    def copy_two(path: Path, uri: str) -> None:
        if path.name == "c":
            raise KeyboardInterrupt
        copy_file(path, uri)

    monkeypatch.setattr(folders, "copy_file", copy_two)
    with pytest.raises(KeyboardInterrupt):
        folders.upload(make_folder(tmp_path / "source", "a", "b", "c", "marker"), place, last="marker")
    assert storage.is_empty(place)


def test_upload_of_an_incomplete_folder_is_an_error(place: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nothing to copy"):
        folders.upload(tmp_path / "none", place)
    with pytest.raises(DataError, match=r"missing: .*marker"):
        folders.upload(make_folder(tmp_path / "source", "a"), place, last="marker")
    assert storage.is_empty(place)


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


def test_a_download_stays_in_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever may write below one prefix of a bucket would else write anywhere on the machines that read it."""
    names = ["s3://bucket/model/config.json", "s3://bucket/model/x/../../../outside"]
    monkeypatch.setattr(folders, "all_files", lambda _: [FileInfo(uri=name, size=1, version="v") for name in names])
    with pytest.raises(DataError, match=r"a name leads out of its folder: s3://bucket/model; found .*outside"):
        folders.local_copy("s3://bucket/model", tmp_path / "in" / "copy")
    assert not (tmp_path / "in").exists(), "nothing was downloaded"


@pytest.mark.parametrize("function", ["scandir", "open"])
def test_an_encoder_that_may_not_be_read_is_not_taken_for_a_name_on_a_hub(
    function: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """D, "errors of others": rights are said, not "not there"."""
    make_folder(tmp_path, "encoder/config.json")

    def refuse(path: Any, *arguments: Any) -> Any:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), os.fspath(path))

    if function == "scandir":
        monkeypatch.setattr(os, "scandir", refuse)
    else:
        monkeypatch.setattr(folders, "open", refuse, raising=False)
    with pytest.raises(ConfigError, match=r"/encoder; found .*Permission denied.*give this user the right"):
        folders.loadable(f"{tmp_path}/encoder")


def test_a_folder_takes_the_place_of_another(place: str, tmp_path: Path) -> None:
    """Where there is none, where there is one, and after a kill on the way."""
    source, target, aside = (storage.join(place, name) for name in ("work/new", "public/tags", "work/old"))

    def names(folder: str) -> list[str]:
        return [file.uri.removeprefix(f"{folder}/") for file in storage.all_files(folder)]

    for number, parts in enumerate((["a", "b"], ["b", "c", "d"], ["a"])):
        for name in parts:
            storage.write_bytes(storage.join(source, name), b"%d" % number)
        storage.write_bytes(storage.join(aside, "x"), b"left by a kill")
        folders.take_place(source, target, aside)
        assert names(target) == parts and names(source) == []
        assert {storage.read_bytes(storage.join(target, name)) for name in parts} == {b"%d" % number}


def test_what_is_empty_is_removed_and_nothing_else(tmp_path: Path) -> None:
    for name in ("a/b/c", "a/d"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "a" / "d" / "file").write_text("")
    storage.remove_empty(tmp_path / "a")
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")) == ["a", "a/d", "a/d/file"]
    storage.remove_empty(tmp_path / "nowhere")
