"""Where nights lie: any reader gets their tags right at any moment; which is the latest; nights of the old layout."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ray.data
from fruit import document, manifest_of, read_night, write

from benchmarks.tagging._readers import READERS, read_by_all
from xmc_ray import storage
from xmc_ray.errors import ConfigError, DataError
from xmc_ray.on_ray.tag import nights
from xmc_ray.storage.lease import Lease

DAY = "2026-11-23"


def ids(number: int) -> list[str]:
    return sorted(document(n)["id"] for n in range(number))


def in_the_old_layout(folder: str) -> Path:
    """Move a night to where earlier versions had it."""
    output, name = Path(nights.output_of(folder)), Path(folder).name
    shutil.move(folder, output / name)
    for file in (output / "tags" / name).iterdir():
        shutil.move(file, output / name / file.name)
    (output / "tags" / name).rmdir()
    return output / name


def test_every_reader_gets_every_night_right(tag: Callable[..., str], tmp_path: Path) -> None:
    """Finished nights, one beside the other, with all that a night has beside its tags."""
    for day, rows in (("22", 12), ("23", 15)):
        tag(write(tmp_path / "in.parquet", [document(n) for n in range(rows)]), date=f"2026-11-{day}", target_bytes=1)
    tags = tmp_path / "out" / "tags"
    for day, rows in (("22", 12), ("23", 15)):
        assert read_by_all(tags, f"2026-11-{day}") == dict.fromkeys(READERS, ids(rows))
    below = {path.parent.name for path in tags.rglob("*") if path.is_file()}
    assert below == {"dt=2026-11-22", "dt=2026-11-23"} and all(path.suffix == ".parquet" for path in tags.rglob("*.*"))


def test_ray_data_gets_nights_right(tag: Callable[..., str], tmp_path: Path) -> None:
    for day, rows in (("22", 12), ("23", 15)):
        tag(write(tmp_path / "in.parquet", [document(n) for n in range(rows)]), date=f"2026-11-{day}")
    tags = tmp_path / "out" / "tags"
    one = ray.data.read_parquet(str(tags / "dt=2026-11-22")).to_pandas()
    assert sorted(one["id"]) == ids(12)
    both = ray.data.read_parquet(str(tags)).to_pandas()
    assert both.groupby("dt")["id"].nunique().to_dict() == {"2026-11-22": 12, "2026-11-23": 15}


def test_readers_see_the_old_night_or_the_new_one_whatever_the_moment(
    tag: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A night in the making, and one that is replaced: looked at before each change of what readers see, and after it."""
    seen: list[dict[str, list[str]]] = []
    confirm = Lease.confirm

    def look(self: Lease) -> None:
        seen.append(read_by_all(tmp_path / "out" / "tags", DAY))
        confirm(self)

    monkeypatch.setattr(Lease, "confirm", look)
    tag(write(tmp_path / "in.parquet", [document(n) for n in range(12)]), target_bytes=1)
    tag(write(tmp_path / "in.parquet", [document(n) for n in range(15)]), "--overwrite", target_bytes=1)
    expected = [[], [], ids(12), ids(12), ids(12), ids(15)]
    assert seen == [dict.fromkeys(READERS, found) for found in expected]


@pytest.mark.parametrize("at", [1, 2])
def test_a_kill_between_the_renames_leaves_one_night_or_none(
    at: int, tag: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tag(write(tmp_path / "in.parquet", [document(n) for n in range(12)]))
    write(tmp_path / "in.parquet", [document(n) for n in range(15)])
    rename, calls = os.rename, []

    def die(*names: Any) -> None:
        calls.append(names)
        if len(calls) == at:
            raise KeyboardInterrupt
        rename(*names)

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", die)
        with pytest.raises(KeyboardInterrupt):
            tag(tmp_path / "in.parquet", "--overwrite")
    tags = tmp_path / "out" / "tags"
    assert read_by_all(tags, DAY) == dict.fromkeys(READERS, ids(12) if at == 1 else [])
    folder = tag(tmp_path / "in.parquet", "--overwrite")
    assert read_by_all(tags, DAY) == dict.fromkeys(READERS, ids(15)) and len(read_night(folder)[0]) == 15
    assert not Path(folder, "_work").exists()


def test_the_latest_night_is_named(tag: Callable[..., str], tmp_path: Path) -> None:
    """By a file that is replaced as a whole; a night of an earlier day that is made later is not the latest."""
    catalogue, output = write(tmp_path / "in.parquet", [document(n) for n in range(10)]), tmp_path / "out"
    with pytest.raises(DataError, match="no night is finished"):
        nights.latest(str(output))
    for day, latest in (("23", "23"), ("22", "23"), ("24", "24")):
        tag(catalogue, date=f"2026-11-{day}")
        assert nights.latest(str(output)) == f"{output}/_nights/dt=2026-11-{latest}"
    pointer = json.loads((output / "_latest.json").read_text())
    assert pointer["rows"] == 10 and all((output / name).exists() for name in (*pointer["files"], *pointer["changes"]))
    assert pointer["tags"] == "tags/dt=2026-11-24" and pointer["day"] == "2026-11-24"
    shutil.rmtree(output / "_nights" / "dt=2026-11-24")
    with pytest.raises(DataError, match=r"the latest night has been removed or replaced: .*dt=2026-11-24; expected"):
        nights.latest(str(output))
    assert nights.point(str(output)) == f"{output}/_nights/dt=2026-11-23" == nights.latest(str(output))


def test_a_driver_that_was_killed_before_the_pointer_is_followed_by_one_that_writes_it(
    tag: Callable[..., str], tmp_path: Path
) -> None:
    catalogue = write(tmp_path / "in.parquet", [document(n) for n in range(10)])
    folder = Path(tag(catalogue))
    (tmp_path / "out" / "_latest.json").unlink()
    storage.write_json(folder / "_work" / "run.json", {"run": storage.read_json(folder / "_SUCCESS")["run"]})
    tag(catalogue)
    assert nights.latest(str(tmp_path / "out")) == str(folder)


def test_a_night_is_named_by_any_of_its_folders(tag: Callable[..., str], tmp_path: Path) -> None:
    catalogue = write(tmp_path / "in.parquet", [document(n) for n in range(10)])
    folder = tag(catalogue)
    for day, name in (("24", "_nights/dt=2026-11-23"), ("25", "tags/dt=2026-11-23"), ("26", "dt=2026-11-23")):
        assert manifest_of(tag(catalogue, date=f"2026-11-{day}", previous=tmp_path / "out" / name))["reused"] == 10
    assert nights.named("/no/such/dt=2026-11-23") == "/no/such/dt=2026-11-23" and nights.named(folder) == folder


def test_a_night_of_the_old_layout_is_read_where_it_is(tag: Callable[..., str], tmp_path: Path) -> None:
    """For reuse, for changes, and as the one before; `adopt` moves it, again if it was killed on the way."""
    catalogue, output = write(tmp_path / "in.parquet", [document(n) for n in range(10)]), tmp_path / "out"
    old = in_the_old_layout(tag(catalogue, date="2026-11-22"))
    (old / "mine.txt").write_text("mine")
    assert nights.all_nights(str(output)) == [str(old)] and len(read_night(old)[0]) == 10
    for day, previous in (("23", "last"), ("24", old)):
        manifest = manifest_of(tag(catalogue, date=f"2026-11-{day}", previous=previous))
        assert manifest["reused"] == 10 and manifest["previous"] == str(old)
    (file,) = old.glob("part-*")
    (output / "tags" / "dt=2026-11-22").mkdir()
    shutil.move(file, output / "tags" / "dt=2026-11-22")  # as far as a kill has let it come
    folder = nights.adopt(str(old))
    assert len(read_night(folder)[0]) == 10 and nights.tag_files(folder)
    assert read_by_all(output / "tags", "2026-11-22") == dict.fromkeys(READERS, ids(10))
    assert [path.name for path in old.iterdir()] == ["mine.txt"]
    with pytest.raises(DataError, match="not a finished night"):
        nights.adopt(str(old))


def test_the_day_of_a_night_of_the_old_layout_is_taken_over(
    tag: Callable[..., str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its command finds it finished; one that has begun is left to that version."""
    catalogue, output = write(tmp_path / "in.parquet", [document(n) for n in range(10)]), tmp_path / "out"
    folder = tag(catalogue)
    run = storage.read_json(Path(folder, "_SUCCESS"))["run"]
    in_the_old_layout(folder)
    capsys.readouterr()
    assert tag(catalogue) == folder and storage.read_json(Path(folder, "_SUCCESS"))["run"] == run
    assert f"taken over from the old layout: {output}/dt={DAY}\nfinished before" in capsys.readouterr().out
    assert not (output / f"dt={DAY}").exists() and len(read_night(folder)[0]) == 10
    storage.write_json(output / "dt=2026-11-24" / "_work" / "run.json", {"run": "0123abcd"})
    with pytest.raises(
        ConfigError, match=r"an earlier version has begun this night: .*; found run 0123abcd; finish it by that version"
    ):
        tag(catalogue, date="2026-11-24")


def test_the_latest_night_before_is_a_finished_one(tmp_path: Path) -> None:
    below = tmp_path / "_nights"
    for day in ("21", "22", "23"):
        (below / f"dt=2026-11-{day}").mkdir(parents=True)
        (below / f"dt=2026-11-{day}" / "manifest.json").write_text("{}")
    (below / "dt=2026-11-21" / "_SUCCESS").write_text('{"run": "a", "files": ["x"], "rejects": []}')
    assert nights.latest_before(f"{below}/dt=2026-11-23") == f"{below}/dt=2026-11-21"
    assert nights.latest_before(f"{below}/dt=2026-11-21") is None
    tags = tmp_path / "tags" / "dt=2026-11-21"
    tags.mkdir(parents=True)
    (tags / "x").write_text("")
    assert nights.tag_files(f"{below}/dt=2026-11-21") == [storage.stat(tags / "x")]
    (tags / "x").unlink()
    with pytest.raises(DataError, match=r"a finished night is damaged: .*/x; found no such file; restore"):
        nights.tag_files(f"{below}/dt=2026-11-21")
    with pytest.raises(DataError, match="not a finished night"):
        nights.tag_files(f"{below}/dt=2026-11-22")


@pytest.mark.parametrize("below", ["", "_nights"])
def test_only_days_are_nights(below: str, tmp_path: Path) -> None:
    for name in ("dt=2026-11-20", "dt=2026-11-20.bad", "dt=20261121", "dt=2026-W47-6", "dt=2026-11-21 copy"):
        (tmp_path / below / name).mkdir(parents=True)
        (tmp_path / below / name / "_SUCCESS").write_text('{"run": "a", "files": [], "rejects": []}')
    (tmp_path / "lost+found").mkdir(mode=0)
    assert nights.latest_before(f"{tmp_path}/_nights/dt=2026-11-23") == str(tmp_path / below / "dt=2026-11-20")
