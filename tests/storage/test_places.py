"""Places that a job reads and writes: kept apart, and tried before anything is read."""

import errno
import os
from pathlib import Path

import pytest
from places import content, make_folder
from seaweed import S3

from xmc_ray import storage
from xmc_ray.errors import ConfigError
from xmc_ray.storage.places import check_apart, check_writable


@pytest.mark.parametrize("root", ["/data", "s3://bucket"])
def test_an_output_and_an_input_lie_apart(root: str) -> None:
    """D, "a run is what its strings are instead of what its places are"."""
    for output, source in (("in/out", "in"), ("in", "in"), ("in/a/_b", "in/a/_b"), ("in/a", "in/a/")):
        with pytest.raises(
            ConfigError, match=r"output lies in documents\.uri: .*/in.*; expected a place outside .*; choose another"
        ):
            check_apart({"output": f"{root}/{output}"}, {"documents.uri": f"{root}/{source}"})
    with pytest.raises(ConfigError, match=r"bundle lies in output: .*/out/bundle; expected a place outside .*/out"):
        check_apart({"output": f"{root}/out"}, {"bundle": [f"{root}/other", f"{root}/out/bundle"]})
    for output, source in (("in/_out/tags", "in"), ("in/.out", "in"), ("in2", "in"), ("i", "in"), ("out", "in")):
        check_apart({"output": f"{root}/{output}", "cache": None}, {"documents.uri": f"{root}/{source}", "label_names": None})


def test_different_storages_lie_apart() -> None:
    check_apart({"output": "/bucket/in/out"}, {"documents.uri": "s3://bucket/in"})
    check_apart({"output": "s3://bucket/in/out"}, {"documents.uri": "/bucket/in"})


def test_links_do_not_hide_where_a_place_lies(tmp_path: Path) -> None:
    make_folder(tmp_path, "in/a.txt", "tags/b.txt", "more/c.txt", "others/d.txt")
    (tmp_path / "link").symlink_to("in")
    with pytest.raises(ConfigError, match="output lies in"):
        check_apart({"output": f"{tmp_path}/link/out"}, {"documents.uri": f"{tmp_path}/in"})
    (tmp_path / "in" / "deeper").symlink_to("../tags")
    (tmp_path / "tags" / "further").symlink_to("../more")
    for output in ("tags", "tags/dt=2026-11-23", "more/tags"):
        with pytest.raises(ConfigError, match=rf"output lies in .*/{output}; found the link .*/in/deeper|/further"):
            check_apart({"output": f"{tmp_path}/{output}"}, {"documents.uri": f"{tmp_path}/in"})
    (tmp_path / "in" / "up").symlink_to(tmp_path)  # to which listings do not go
    (tmp_path / "in" / "_hidden").symlink_to(tmp_path / "others")
    for output in ("elsewhere", "others"):
        check_apart({"output": f"{tmp_path}/{output}"}, {"documents.uri": f"{tmp_path}/in"})


def test_a_place_is_tried_and_nothing_is_left_behind(tmp_path: Path) -> None:
    """D, "errors of others": rights are looked at before documents are read."""
    make_folder(tmp_path, "folder/file")
    for name in ("folder", "folder/new/deeper", "new"):
        check_writable(str(tmp_path / name))
    assert content(tmp_path) == {"folder/file": b"folder/file"} and {path.name for path in tmp_path.iterdir()} == {"folder"}


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.EACCES, "Permission denied.*give this user the right"),
        (errno.EROFS, "Read-only file system.*choose a place that may be written to"),
        (errno.ENOSPC, "No space left on device.*make room there"),
    ],
)
def test_a_place_that_cannot_be_written_is_one_line(
    number: int, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(path: Path, data: bytes) -> int:
        path.touch()  # a full disk has room for an empty file
        raise OSError(number, os.strerror(number), str(path))

    monkeypatch.setattr(Path, "write_bytes", fail)
    with pytest.raises(ConfigError, match=f"cannot be read or written: {tmp_path}/new; found .*{words}"):
        check_writable(f"{tmp_path}/new")
    assert not list(tmp_path.iterdir())


def test_a_place_behind_a_file_or_of_a_name_too_long(tmp_path: Path) -> None:
    make_folder(tmp_path, "file")
    for name, words in (("file/tags", "Not a directory"), ("file", "Not a directory"), ("x" * 300, "File name too long")):
        with pytest.raises(ConfigError, match=words):
            check_writable(str(tmp_path / name))


def test_a_bucket_is_tried(s3: S3, monkeypatch: pytest.MonkeyPatch) -> None:
    check_writable(s3.uri("storage/places/new"))
    assert storage.is_empty(s3.uri("storage/places"))
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", s3.reader_access_key)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", s3.reader_secret_key)
    with pytest.raises(ConfigError, match=r"(?i)places/new.*access.?denied"):
        check_writable(s3.uri("storage/places/new"))
