"""The folder of a night: what is replaced, what is left alone, and when a night is finished."""

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from fruit import contents, document, manifest_of, read_night, write
from in_process import InProcess

from xmc_ray import storage
from xmc_ray.data.documents import DocumentsConfig
from xmc_ray.errors import ConfigError, DataError, UnavailableError
from xmc_ray.on_ray.tag import job, nights, output
from xmc_ray.on_ray.tag.config import TagConfig
from xmc_ray.on_ray.tag.nights import folder_of, tags_folder
from xmc_ray.on_ray.tag.plan import PIECES, REUSED, Plan
from xmc_ray.settings import fixed_settings
from xmc_ray.storage import listing


def test_rejects_of_an_older_version_are_merged(tmp_path: Path) -> None:
    """They have no column ``detail``."""
    night = output.Night(folder_of(str(tmp_path), "2026-11-23"), "run", {})
    new = {"file": "f", "row": 1, "id": "b", "reason": "invalid JSON", "detail": "at character 7"}
    old = {"file": "f", "row": 0, "id": "a", "reason": "text is null"}
    for number, row in enumerate((old, new)):
        write(Path(night.work) / "rejects" / f"t{number:06}.parquet", [row])
    plan = Plan(PIECES.empty_table(), REUSED.empty_table(), 2, 0, 0)
    counts = {"tagged": 0, "reused": 0, "rejected": 2}
    night.publish(plan, 1 << 20, counts, "", pa.table({"label": ["red"]}), InProcess())
    assert read_night(night.folder)[1].to_pylist() == [old | {"detail": None}, new]


@pytest.mark.parametrize("call", [1, 2, 3])
def test_no_marker_is_written_once_another_job_has_taken_the_folder_over(call: int, tmp_path: Path) -> None:
    """Before the merges, after them, and right before ``_SUCCESS``."""
    night = output.Night(folder_of(str(tmp_path), "2026-11-23"), "run", {})
    night.begin()
    calls = iter(range(1, 4))

    def confirm() -> None:
        if next(calls) == call:
            raise ConfigError("another job works in this folder")

    plan = Plan(PIECES.empty_table(), REUSED.empty_table(), 0, 0, 0)
    counts = {"tagged": 0, "reused": 0, "rejected": 0}
    with pytest.raises(ConfigError, match="another job"):
        night.publish(plan, 1 << 20, counts, "", pa.table({"label": ["red"]}), InProcess(), confirm)
    assert next(calls, None) == (call + 1 if call < 3 else None)
    assert not Path(night.folder, "_SUCCESS").exists() and Path(night.work, "run.json").exists()


def test_what_lies_beside_the_days_and_may_not_be_looked_at_is_no_night(tag: Callable[..., str], tmp_path: Path) -> None:
    """Kind: a listing that fails, once everything is tagged, on what has nothing to do with the night."""
    catalogue = write(tmp_path / "in.parquet", [document(n) for n in range(10)])
    days = Path(tag(catalogue)).parent
    for name in ("loop", "dt=2026-11-22", "dt=2026-11-24"):
        (days / name).symlink_to(name)
    (days / "dt=2026-11-21").write_text("a file")
    (days / "dt=2026-11-20").symlink_to("nowhere")
    assert manifest_of(tag(catalogue, date="2026-11-25", previous="last"))["reused"] == 10


def test_an_earlier_night_that_may_not_be_read_is_told_before_anything_is_tagged(
    tag: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(folder: str) -> str:
        raise ConfigError("cannot be read or written", where=folder)

    monkeypatch.setattr(nights, "latest_before", refused)
    with pytest.raises(ConfigError, match="cannot be read"):
        tag(write(tmp_path / "in.parquet", [document(n) for n in range(10)]))
    assert not list(tmp_path.rglob("pieces/*.parquet"))


def test_a_night_is_not_ended_by_the_manifest_of_an_earlier_one(tag: Callable[..., str], tmp_path: Path) -> None:
    """It is read for the report alone, once everything is tagged."""
    catalogue = write(tmp_path / "in.parquet", [document(n) for n in range(10)])
    for day, content in (("23", "{}"), ("24", "not JSON"), ("25", "[]")):
        (Path(tag(catalogue, date=f"2026-11-{day}")) / "manifest.json").write_text(content)
    assert manifest_of(tag(catalogue, date="2026-11-26"))["tagged"] == 10


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("_SUCCESS", '{"run": "abc"}', "not a finished night"),
        ("_SUCCESS", "", "not a finished night"),
        ("manifest.json", "[]", "not the manifest of a night"),
        ("manifest.json", '{"run": "abc"}', "not the manifest of a night"),
        ("manifest.json", None, "not the manifest of a night"),
    ],
)
def test_a_night_before_whose_files_are_not_those_of_a_night_is_one_line(
    name: str, content: str | None, told: str, tag: Callable[..., str], tmp_path: Path
) -> None:
    catalogue = write(tmp_path / "in.parquet", [document(n) for n in range(10)])
    before = Path(tag(catalogue))
    (before / name).unlink()
    if content is not None:
        (before / name).write_text(content)
    with pytest.raises(DataError, match=told):
        tag(catalogue, date="2026-11-24", previous=before)


def test_a_night_that_replaces_another_leaves_it_until_the_end(tag: Callable[..., str], tmp_path: Path) -> None:
    catalogue = write(tmp_path / "in.parquet", [document(n) for n in range(20)])
    folder = tag(catalogue)
    first, before = read_night(folder), contents(folder)
    write(catalogue, [document(n) for n in range(30)] + [{"id": "x", "text": None}])
    with pytest.raises(ConfigError, match=r"another run.*input.*in\.parquet = '.* bytes.*' instead of '.* bytes.*--over"):
        tag(catalogue)
    with pytest.raises(DataError, match="too many documents are rejected"):
        tag(catalogue, "--overwrite")
    assert contents(folder).items() >= before.items() and read_night(folder)[0].equals(first[0])
    with pytest.raises(ConfigError, match="another run"):
        tag(catalogue, min_score=0.5)
    tag(catalogue, "--overwrite", max_reject_share=0.1)
    assert len(read_night(folder)[0]) == 30
    assert not set(before) & {str(path) for path in Path(folder).glob("part-*")}


@pytest.mark.parametrize("at", ["take_place", "confirm"])
def test_a_replacement_that_fails_at_its_end_has_changed_nothing_of_the_night_that_stays(
    at: str, tag: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its report and counts of labels included, by which others compare."""
    catalogue = write(tmp_path / "in.parquet", [document(n) for n in range(10)])
    folder = tag(catalogue)
    before = contents(folder)

    def fail(*_: Any) -> None:
        raise UnavailableError("storage is away")

    with monkeypatch.context() as patch:
        if at == "take_place":
            patch.setattr(output, "take_place", fail)
        else:
            patch.setattr(output.Night, "check_place", fail)
        with pytest.raises(UnavailableError):
            tag(catalogue, "--overwrite", k=1)
    assert contents(folder).items() >= before.items()
    tag(catalogue, "--overwrite", k=1)
    assert all(len(labels) == 1 for labels in read_night(folder)[0]["labels"].to_pylist())


def test_whose_a_folder_was_is_never_forgotten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However a driver is killed while it clears the work of the run before up."""
    folder = folder_of(str(tmp_path), "2026-11-23")
    first = output.Night(folder, "0123abcd", {"config": {}})
    first.begin()
    work = Path(first.work)
    for name in ("plan.json", "pieces/a.parquet", "rejects/b.parquet"):
        (work / name).parent.mkdir(exist_ok=True)
        (work / name).write_text("x")
    removed: list[str] = []

    def remove(uri: str) -> None:
        removed.append(Path(uri).name)
        if len(removed) in (1, 3):
            raise KeyboardInterrupt
        shutil.rmtree(uri) if Path(uri).is_dir() else Path(uri).unlink()

    second = output.Night(folder, "89abcdef", {"config": {}})
    with monkeypatch.context() as patch:
        patch.setattr(output.storage, "remove", remove)
        for _ in range(2):
            with pytest.raises(KeyboardInterrupt):
                second.begin()
            assert storage.read_json(work / "run.json")["run"] == "0123abcd" and (work / "plan.json").exists()
    second.begin()
    assert storage.read_json(work / "run.json") == {"run": "89abcdef", "config": {}, "replaces": ["0123abcd"]}
    assert removed == ["pieces", "pieces", "rejects"] and [path.name for path in work.rglob("*.*")] == ["run.json"]


def test_an_unfinished_night_of_an_older_version_is_resumed_and_another_is_named_by_its_setting(tmp_path: Path) -> None:
    """Older versions kept the output, and knew model.int8."""
    config = TagConfig(documents=DocumentsConfig(uri="x", id=None), bundle="y", output="z")
    identity = IDENTITY | {"input": [{"uri": "x", "size": 1, "version": "v"}], "config": fixed_settings(config)}
    model = {"scoring": "grouped", "precision": "auto", "int8": False}
    documents = {
        "uri": config.documents.uri,
        "id": None,
        "text": ["text"],
        "separator": "\n",
        "labels": "labels",
        "max_bytes": 1 << 20,
    }
    known = {"documents": documents, "bundle": "y", "output": "elsewhere", "previous": None, "k": 10, "min_score": 0.0}
    known |= {"min_precision": None, "model": model}
    storage.write_json(tmp_path / "_work" / "run.json", {"run": "0123", **identity, "config": known})
    night = output.Night.open(str(tmp_path), identity, overwrite=False)
    assert night is not None and night.run == "0123"
    for changes, found in (
        ({"k": 5}, "k = 5 instead of 10"),
        ({"documents": documents | {"id": "id"}}, "documents.id = 'id' instead of None"),
        ({"model": model | {"int8": True}}, "model.int8 = True instead of None"),
    ):
        storage.write_json(tmp_path / "_work" / "run.json", {"run": "0123", **identity, "config": known | changes})
        with pytest.raises(ConfigError, match=rf"another run.*found {found}; choose another output"):
            output.Night.open(str(tmp_path), identity, overwrite=False)


def test_a_foreign_folder_is_left_alone(tag: Callable[..., str], fruit: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out" / "_nights" / "dt=2026-11-23"
    folder.mkdir(parents=True)
    (folder / "precious.txt").write_text("mine")
    for overwrite in ("false", "true"):
        with pytest.raises(ConfigError, match="something else"):
            tag(fruit / "test.parquet", f"--overwrite={overwrite}")
    assert [path.name for path in folder.iterdir()] == ["precious.txt"]


def test_files_of_others_survive_a_night_that_is_finished_or_tagged_again(tag: Callable[..., str], tmp_path: Path) -> None:
    catalogue = write(tmp_path / "in.parquet", [document(n) for n in range(10)])
    folder = Path(tag(catalogue))
    foreign = [folder / "enriched" / "part-00000.parquet", folder / "part-of-mine.parquet"]
    foreign += [folder / "part-0123abcd-00000.parquet"]  # of a night of another folder
    for path in foreign:
        path.parent.mkdir(exist_ok=True)
        path.write_text("mine")
    for further in ((), ("--overwrite",)):
        tag(catalogue, *further)
        assert [path.read_text() for path in foreign] == ["mine"] * 3
    assert len(read_night(folder)[0]) == 10


def test_files_of_a_run_that_was_killed_while_it_was_published_go_with_the_run_that_replaces_it(
    tag: Callable[..., str], tmp_path: Path
) -> None:
    """They are known by the run, whose folder of work is gone by then, and not by a pattern."""
    catalogue = write(tmp_path / "in.parquet", [document(n) for n in range(10)])
    folder = Path(tag(catalogue))
    storage.write_json(folder / "_work" / "run.json", {"run": "89abcdef", "replaces": ["0123abcd"]})
    tags = Path(tags_folder(str(folder)))
    for run in ("89abcdef", "0123abcd"):
        (tags / f"part-{run}-00003.parquet").write_text("half a file")
    for run in ("89abcdef", "76543210"):
        (folder / "rejects").mkdir(exist_ok=True)
        (folder / "rejects" / f"part-{run}-00003.parquet").write_text("half a file")
    tag(catalogue, "--overwrite", k=2)
    assert [path.name for path in tags.iterdir()] == storage.read_json(folder / "_SUCCESS")["files"]
    assert [path.name for path in (folder / "rejects").iterdir()] == ["part-76543210-00003.parquet"]


def test_where_tags_lie_nothing_of_others_is_replaced(tag: Callable[..., str], tmp_path: Path) -> None:
    """A reader of the folder would take it for tags, and a night's folder of tags is replaced as a whole."""
    catalogue = write(tmp_path / "in.parquet", [document(n) for n in range(10)])
    tags = tmp_path / "out" / "tags" / "dt=2026-11-23"
    tags.mkdir(parents=True)
    for name in ("notes.txt", "part-0123abcd-00000.parquet"):
        (tags / name).write_text("mine")
        with pytest.raises(ConfigError, match=rf"day's tags holds something else: .*/{name}; move it away"):
            tag(catalogue)
        assert (tags / name).read_text() == "mine"
        (tags / name).unlink()
    tag(catalogue)
    (tags / "notes.txt").write_text("mine")
    tag(catalogue)  # finished, and so left alone
    with pytest.raises(ConfigError, match="holds something else"):
        tag(catalogue, "--overwrite")
    assert (tags / "notes.txt").read_text() == "mine" and len(list(tags.glob("part-*"))) == 1


def test_a_finished_night_leaves_the_work_of_another_driver_alone(tag: Callable[..., str], tmp_path: Path) -> None:
    """A second command for a finished night comes while the first one makes the night anew, with --overwrite."""
    catalogue = write(tmp_path / "in.parquet", [document(n) for n in range(10)])
    folder = Path(tag(catalogue))
    storage.write_json(folder / "_work" / "run.json", {"run": "89abcdef"})
    tag(catalogue)
    assert (folder / "_work" / "run.json").exists()
    run = storage.read_json(folder / "_SUCCESS")["run"]
    storage.write_json(folder / "_work" / "run.json", {"run": run})  # as a driver leaves it that is killed while it tidies up
    tag(catalogue)
    assert not (folder / "_work").exists()


@pytest.mark.parametrize("name", [".out", "_work", "a_.b"])
def test_an_output_may_have_any_name(name: str, tag: Callable[..., str], tmp_path: Path) -> None:
    catalogue = write(tmp_path / "in.parquet", [document(n) for n in range(10)])
    folder = tag(catalogue, output=tmp_path / name / "tags")
    assert len(read_night(folder)[0]) == 10 and not (Path(folder) / "_work").exists()


def test_what_a_killed_write_has_left_does_not_block_the_day(tag: Callable[..., str], tmp_path: Path) -> None:
    folder = tmp_path / "out" / "_nights" / "dt=2026-11-23"
    folder.mkdir(parents=True)
    (folder / f"._driver.json.{'0' * 32}").write_text("{")
    catalogue = write(tmp_path / "in.parquet", [document(n) for n in range(10)])
    assert len(read_night(tag(catalogue))[0]) == 10


def test_a_finished_night_that_has_lost_a_file_is_not_taken_for_whole(tag: Callable[..., str], tmp_path: Path) -> None:
    catalogue = write(tmp_path / "in.parquet", [document(n) for n in range(10)])
    folder = Path(tag(catalogue))
    marker = storage.read_json(folder / "_SUCCESS")
    (name,) = marker["files"]
    file = Path(tags_folder(str(folder)), name)
    assert marker["rows"] == {name: 10} and marker["sizes"] == {name: file.stat().st_size}
    file.write_bytes(b"PAR1")
    with pytest.raises(DataError, match=rf"a finished night is damaged: .*{name}; found 4 bytes"):
        tag(catalogue)
    file.unlink()
    with pytest.raises(DataError, match="found no such file"):
        tag(catalogue)
    tag(catalogue, "--overwrite")
    assert len(read_night(folder)[0]) == 10


def test_rows_are_not_both_tagged_and_rejected(
    tag: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An attempt that cannot read a file writes its rejects and is killed; the next one can."""
    catalogue = write(tmp_path / "in.parquet", [document(n) for n in range(10)])
    folder = tmp_path / "out" / "_nights" / "dt=2026-11-23"
    reject = {"file": str(catalogue), "row": 0, "id": "d0", "reason": "cannot be read", "detail": "away"}
    run_pieces = InProcess.run_pieces

    def leave_rejects(self: Any, *arguments: Any) -> Any:
        write(folder / "_work" / "rejects" / "t000000.parquet", [reject])
        return run_pieces(self, *arguments)

    monkeypatch.setattr(InProcess, "run_pieces", leave_rejects)
    tags, rejects = read_night(tag(catalogue))
    assert (len(tags), len(rejects)) == (10, 0)


def test_rows_that_were_not_counted_are_not_published(tmp_path: Path) -> None:
    night = output.Night(folder_of(str(tmp_path), "2026-11-23"), "0123abcd", {"bundle": "b"})
    write(Path(night.work) / "rejects" / "t000000.parquet", [{"file": "f", "row": 0, "id": "a", "reason": "r"}])
    plan = Plan(PIECES.empty_table(), REUSED.empty_table(), 1, 0, 0)
    with pytest.raises(DataError, match=r"not those that were counted.*found 0 tagged, 1 rejected; expected 0 and 0"):
        night.publish(plan, 1 << 20, {"tagged": 0, "reused": 0, "rejected": 0}, "", pa.table({"label": ["red"]}), InProcess())
    assert not Path(night.folder, "_SUCCESS").exists()


def test_addresses_may_be_spelt_in_several_ways(
    tag: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is kept and what is removed at the end goes by address."""
    write(tmp_path / "in" / "a.parquet", [document(n) for n in range(10)])
    monkeypatch.chdir(tmp_path)
    folder = tag(f"file://{tmp_path}/in/", "--documents.id=null", output=f"file://{tmp_path}/out/", date="2026-11-22")
    assert read_night(folder)[0]["id"].to_pylist() == [f"a.parquet:{n}" for n in range(10)]
    again = tag("in", "--documents.id=null", "--previous=last", output="./out")
    assert [manifest_of(again)[name] for name in ("tagged", "reused")] == [0, 10]


def test_a_finished_night_is_the_same_however_its_places_are_spelt(
    tag: Callable[..., str], trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """C9: a relative path, ``file://``, doubled slashes, a link, ``dt=``; and the bundle may lie elsewhere."""
    write(tmp_path / "a b" / "a.parquet", [document(n) for n in range(10)])
    (tmp_path / "link").symlink_to("a b")
    (tmp_path / "model").symlink_to(trained / "bundle")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    folder = tag("a b", "--documents.id=null")
    before = contents(folder)
    for settings in (
        {"output": "~/out", "date": "dt=2026-11-23"},
        {"documents__uri": f"file://{tmp_path}/a%20b/"},
        {"documents__uri": tmp_path / "link", "output": f"{tmp_path}//out/x/.."},
        {"bundle": "model"},
    ):
        capsys.readouterr()
        assert tag(settings.pop("documents__uri", "./a b/."), "--documents.id=null", **settings) == folder
        assert "finished before, nothing to do" in capsys.readouterr().out
    assert contents(folder) == before
    with pytest.raises(ConfigError, match=r"another run.*found documents\.id = None instead of 'id'"):
        tag("a b")


def test_the_output_of_a_night_lies_apart_from_what_it_reads(tag: Callable[..., str], trained: Path, tmp_path: Path) -> None:
    """D, "a run is what its strings are": the next night would read the tags of this one."""
    catalogue = write(tmp_path / "in" / "a.parquet", [document(n) for n in range(10)]).parent
    for place in (catalogue, catalogue / "tags", f"file://{catalogue}/x/../tags"):
        with pytest.raises(ConfigError, match=r"output lies in documents\.uri: .*/dt=2026-11-23; expected a place outside"):
            tag(catalogue, output=place)
    night = tag(catalogue)
    for further, words in (
        ({"output": trained / "bundle"}, "output lies in bundle"),
        ({"output": night, "previous": night, "date": "2026-11-24"}, "output lies in previous"),
        ({"previous": night}, "output lies in previous"),
        ({"bundle": f"{tmp_path}/out/tags/dt=2026-11-25/bundle", "date": "2026-11-25"}, "bundle lies in output"),
    ):
        with pytest.raises(ConfigError, match=words):
            tag(catalogue, **further)
    with pytest.raises(ConfigError, match=r"documents\.uri lies in output"):
        tag(night + "/rejects")
    (catalogue / "link").symlink_to(tmp_path / "out")
    with pytest.raises(ConfigError, match=r"output lies in documents\.uri: .*; found the link .*/in/link"):
        tag(catalogue, date="2026-11-24")
    (catalogue / "link").unlink()
    hidden = tag(catalogue, output=catalogue / "_tags")  # which no listing of the catalogue has
    assert len(read_night(hidden)[0]) == len(read_night(tag(catalogue, output=catalogue / "_tags", date="2026-11-24"))[0]) == 10


def test_a_day_is_given_as_it_is_or_as_its_folder(tag: Callable[..., str], tmp_path: Path) -> None:
    """C10: one parser for the setting and for the names of folders."""
    catalogue = write(tmp_path / "in.parquet", [document(n) for n in range(3)])
    assert tag(catalogue, date="dt=2026-11-22") == f"{tmp_path}/out/_nights/dt=2026-11-22"
    for day in (
        "20261122",
        "2026-W47-7",
        "dt=dt=2026-11-22",
        "2026-11-31",
        "dt=2026-11-22.bad",
        "DT=2026-11-22",
        " 2026-11-22",
        "",
    ):
        with pytest.raises(ConfigError, match=r"date: not a day; found .*; expected YYYY-MM-DD or dt=YYYY-MM-DD"):
            tag(catalogue, f"--date={day}")


def test_rights_are_looked_at_before_documents_are_read(
    tag: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """D, "errors of others": no place for the output, or one behind a file."""
    catalogue = write(tmp_path / "in.parquet", [document(n) for n in range(3)])
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(job, "check_columns", lambda *arguments: pytest.fail("documents are read"))
    with pytest.raises(
        ConfigError, match=r"cannot be read or written: .*/file/tags/dt=2026-11-23/_SUCCESS; found .*Not a directory"
    ):
        tag(catalogue, output=tmp_path / "file" / "tags")
    write_bytes = Path.write_bytes

    def refuse(path: Path, data: bytes) -> int:
        if path.name.startswith(".probe."):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
        return write_bytes(path, data)

    monkeypatch.setattr(Path, "write_bytes", refuse)
    with pytest.raises(ConfigError, match="Read-only file system"):
        tag(catalogue)
    assert not (tmp_path / "out").exists()


def test_pieces_that_are_not_those_of_the_plan_are_no_night(
    tag: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when another run has finished the night meanwhile, and tidied up."""
    catalogue = write(tmp_path / "in.parquet", [document(n) for n in range(40)])
    publish = output.Night.publish

    def meddle(self: Any, *arguments: Any) -> Any:
        (tmp_path / "out" / "_nights" / "dt=2026-11-23" / "_work" / "pieces" / "t000001.parquet").unlink()
        return publish(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(output.Night, "publish", meddle)
        with pytest.raises(DataError, match=r"not those of the plan.*found \d+ of them and 0 others"):
            tag(catalogue, commit_rows=20)
    assert not (tmp_path / "out" / "_nights" / "dt=2026-11-23" / "_SUCCESS").exists()
    (tmp_path / "out" / "_nights" / "dt=2026-11-23" / "_work" / "pieces" / "t000002.parquet").write_bytes(b"")
    assert len(read_night(tag(catalogue, commit_rows=20))[0]) == 40


def test_a_finished_night_is_listed_once_when_it_is_started_again(
    tag: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    catalogue = write(tmp_path / "in.parquet", [document(n) for n in range(10)])
    folder, listed = tag(catalogue), []
    local_files = listing._local_files
    monkeypatch.setattr(
        listing, "_local_files", lambda path, *how, **more: [listed.append(path), *local_files(path, *how, **more)][1:]
    )
    assert tag(catalogue) == folder
    assert [listed.count(place) for place in (folder, tags_folder(folder))] == [1, 1]


IDENTITY = {"bundle": "b", "input": [], "config": {"k": 10}, "release": "0.1.0", "arithmetic": "cpu float32"}


@pytest.mark.parametrize("name", ["release", "arithmetic"])
def test_a_night_is_not_resumed_by_another_release_or_arithmetic(name: str, tmp_path: Path) -> None:
    """Kind: a night's identity holds to the end. A version before this noted neither."""
    begun = output.Night.open(str(tmp_path), IDENTITY, overwrite=False)
    assert begun is not None
    begun.begin()
    same = output.Night.open(str(tmp_path), IDENTITY, overwrite=False)
    assert same is not None and same.run == begun.run
    other = IDENTITY | {name: "another"}
    match = (
        rf"^an unfinished night was begun in another way: {tmp_path}; found {name} \S+.* instead of another; go on with .*, or"
    )
    with pytest.raises(ConfigError, match=match):
        output.Night.open(str(tmp_path), other, overwrite=False)
    anew = output.Night.open(str(tmp_path), other, overwrite=True)
    assert anew is not None and anew.run != begun.run
    known = {key: value for key, value in IDENTITY.items() if key != name}
    storage.write_json(tmp_path / "_work" / "run.json", {"run": "0123", **known})
    with pytest.raises(ConfigError, match=rf"found {name} unknown instead of"):
        output.Night.open(str(tmp_path), IDENTITY, overwrite=False)


def test_a_finished_night_is_finished_whatever_release_and_arithmetic_made_it(tmp_path: Path) -> None:
    storage.write_json(tmp_path / "run.json", {"run": "0123", **IDENTITY})
    storage.write_json(tmp_path / "_SUCCESS", {"run": "0123", "files": [], "rejects": []})
    other = IDENTITY | {"release": "0.2.0", "arithmetic": "cuda bfloat16"}
    assert output.Night.open(str(tmp_path), other, overwrite=False) is None
