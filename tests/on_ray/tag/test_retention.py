"""Which nights stay, and what is left of those that go: nothing of theirs, everything of others."""

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from fruit import document, read_night, write

from xmc_ray import command, storage
from xmc_ray.errors import ConfigError
from xmc_ray.on_ray.tag import nights, retention
from xmc_ray.on_ray.tag.retention import NightsConfig, decide, remove_nights, run
from xmc_ray.storage.lease import DRIVER, held, is_held


@pytest.fixture
def catalogue(tmp_path: Path) -> Path:
    return write(tmp_path / "in.parquet", [document(n) for n in range(10)] + [{"id": "bad", "text": None}])


@pytest.fixture
def tag_days(tag: Callable[..., str], catalogue: Path) -> Callable[..., list[str]]:
    """Nights of some days of November 2026."""
    return lambda *days, **settings: [tag(catalogue, date=f"2026-11-{day}", max_reject_share=0.5, **settings) for day in days]


def job(action: str, output: Path, **settings: Any) -> None:
    run(command.parse(NightsConfig, [f"--action={action}", f"--output={output}", *(f"--{k}={v}" for k, v in settings.items())]))


def days(decided: list[retention.Stay], why: str = "") -> list[str]:
    return [Path(night.folder).name[-2:] for night in decided if (why in night.why if why else not night.why)]


def test_old_nights_go_whole_and_files_of_others_stay(
    tag_days: Callable[..., list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Said first, done with --yes."""
    output, folders = tmp_path / "out", tag_days(20, 21, 22, 23)
    Path(folders[1], "mine.txt").write_text("mine")
    before = sorted(output.rglob("*"))
    capsys.readouterr()
    job("remove", output, keep=2)
    assert capsys.readouterr().out.count("would be removed") == 2 and sorted(output.rglob("*")) == before
    job("remove", output, keep=2, yes="true")
    left = {
        str(path.relative_to(output)) for path in output.rglob("*") if "2026-11-20" in str(path) or "2026-11-21" in str(path)
    }
    assert left == {"_nights/dt=2026-11-21", "_nights/dt=2026-11-21/mine.txt"}
    assert [len(read_night(folder)[0]) for folder in folders[2:]] == [10, 10]
    assert nights.latest(str(output)) == folders[3]
    job("list", output)
    said = capsys.readouterr().out
    assert f"dt=2026-11-23  10 tagged, 0 reused, 1 rejected, 0 added, 0 changed, 0 removed  {output}/tags/dt=2026-11-23" in said
    job("latest", output)
    assert capsys.readouterr().out == f"{folders[3]}\n"
    with pytest.raises(ConfigError, match=r"keep is missing.*--keep 30"):
        job("remove", output)


def test_a_night_keeps_the_number_that_it_is_told(tag_days: Callable[..., list[str]], tmp_path: Path) -> None:
    folders = tag_days(20, 21) + tag_days(22, keep__nights=2)
    assert nights.all_nights(str(tmp_path / "out")) == folders[1:]
    tag_days(22, keep__nights=1)  # finished before, and yet what it was killed before, or is told now, is done
    assert nights.all_nights(str(tmp_path / "out")) == folders[2:]


def test_what_an_unfinished_night_needs_stays(tag_days: Callable[..., list[str]], tmp_path: Path) -> None:
    """The night that it names, the one before it, itself."""
    output = str(tmp_path / "out")
    tag_days(10, 14, 18, 20, 21, 22)
    for day, previous in (("15", "last"), ("19", f"{output}/tags/dt=2026-11-10")):
        identity = {"run": "0123abcd", "config": {"previous": previous}}
        storage.write_json(f"{output}/_nights/dt=2026-11-{day}/_work/run.json", identity)
    decided = decide(output, 1)
    assert days(decided) == ["20", "21"] and days(decided, "one of the latest 1") == ["22"]
    assert days(decided, "needs it") == ["10", "14", "18"] and days(decided, "unfinished") == ["15", "19"]


def test_a_night_in_which_a_job_works_stays_and_one_whose_job_was_killed_goes(
    tag_days: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A driver that is killed right at the end of its night leaves its lease there for ever, here on another machine."""
    monkeypatch.setattr(retention, "is_held", partial(is_held, beat=0.2))
    output = str(tmp_path / "out")
    folders = tag_days(20, 21, 22, 23)
    with held(folders[1], beat=0.2):
        lease = json.loads(Path(folders[1], DRIVER).read_text())
        for number, killed in ((0, {"process": 2**22 + 1}), (2, {"host": "another"})):
            Path(folders[number], DRIVER).write_text(json.dumps(lease | {"driver": f"killed {number}"} | killed))
        decided = decide(output, 1)
    assert days(decided, "a job works there") == ["21"] and days(decided, "needs it") == ["20"] and days(decided) == ["22"]
    assert days(decide(output, 1)) == ["20", "21", "22"]


def test_the_night_that_the_pointer_names_stays(tag_days: Callable[..., list[str]], tmp_path: Path) -> None:
    output = tmp_path / "out"
    tag_days(20, 21, 22)
    pointer = json.loads((output / "_latest.json").read_text())
    (output / "_latest.json").write_text(json.dumps(pointer | {"night": "_nights/dt=2026-11-20"}))
    assert days(decide(str(output), 1)) == ["21"]


def test_a_removal_that_was_killed_is_gone_on_with(
    tag_days: Callable[..., list[str]],
    tag: Callable[..., str],
    catalogue: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """At any point: what is left is no night, and nobody makes one there meanwhile."""
    output = str(tmp_path / "out")
    tag_days(20, 23)
    saved = tmp_path / "saved"
    shutil.copytree(output, saved)
    remove = storage.remove
    for at in range(1, 9):
        shutil.rmtree(output)
        shutil.copytree(saved, output)
        calls: list[object] = []

        def die(uri: object, last: str | None = None, at: int = at, calls: list[object] = calls) -> None:
            calls.append(uri)
            if len(calls) == at:
                raise KeyboardInterrupt
            remove(uri, last=last)  # type: ignore[arg-type]

        decided = decide(output, 1)
        with monkeypatch.context() as patch:
            patch.setattr(storage, "remove", die)
            with pytest.raises(KeyboardInterrupt):
                remove_nights(output, decided)
        if at > 1:
            with pytest.raises(ConfigError, match="the night of this day is being removed"):
                tag(catalogue, date="2026-11-20", max_reject_share=0.5)
        assert days(decide(output, 1)) == ["20"]
        remove_nights(output, decide(output, 1))
        assert nights.all_nights(output) == [f"{output}/_nights/dt=2026-11-23"]
        assert not Path(output, "tags", "dt=2026-11-20").exists()


def test_a_bundle_goes_with_the_last_night_that_it_made(
    tag_days: Callable[..., list[str]], trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """But not if another bundle lies there by now; and nothing else that lies there."""
    places = [tmp_path / name / "bundle" for name in ("old", "other", "now")]
    for place, day in zip(places, (20, 21, 22), strict=True):
        shutil.copytree(trained / "bundle", place)
        tag_days(day, bundle=place)
    tag_days(23, bundle=places[2])
    (places[0] / "mine.txt").write_text("mine")
    config = json.loads((places[1] / "config.json").read_text())
    (places[1] / "config.json").write_text(json.dumps(config | {"fingerprint": "0" * 16}))
    job("remove", tmp_path / "out", keep=1, bundles="true", yes="true")
    assert f"{places[0]}: removed, a bundle of removed nights alone" in capsys.readouterr().out
    assert [path.name for path in places[0].rglob("*")] == ["mine.txt"]
    assert (places[1] / "config.json").exists() and (places[2] / "config.json").exists()
    assert len(nights.all_nights(str(tmp_path / "out"))) == 1


def test_nights_of_the_old_layout_are_taken_over_and_removed(tag_days: Callable[..., list[str]], tmp_path: Path) -> None:
    output = tmp_path / "out"
    for folder in tag_days(20, 21):
        name = Path(folder).name
        shutil.move(folder, output / name)
        for file in (output / "tags" / name).iterdir():
            shutil.move(file, output / name / file.name)
    job("adopt", output)
    assert nights.all_nights(str(output)) == [f"{output}/_nights/dt=2026-11-{day}" for day in (20, 21)]
    assert nights.latest(str(output)).endswith("dt=2026-11-21")


def test_a_bundle_that_a_night_in_the_making_needs_stays(
    tag_days: Callable[..., list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By what it was begun with: it has no manifest yet. Where nobody knows, none goes."""
    output = tmp_path / "out"
    folders = tag_days(20, 21)
    manifest = json.loads(Path(folders[0], "manifest.json").read_text())
    other = manifest | {"config": manifest["config"] | {"bundle": "/another"}}
    Path(folders[1], "manifest.json").write_text(json.dumps(other))
    Path(folders[1], "run.json").write_text(json.dumps(other))
    assert retention.unused_bundles(decide(str(output), 1)) == [manifest["config"]["bundle"]]
    begun = output / "_nights" / "dt=2026-11-23" / "_work" / "run.json"
    storage.write_json(begun, {name: manifest[name] for name in ("run", "bundle", "config")})
    assert retention.unused_bundles(decide(str(output), 1)) == []
    begun.write_text("{")
    capsys.readouterr()
    assert retention.unused_bundles(decide(str(output), 1)) == []
    assert f"no bundle is removed: that of {begun.parent.parent} is not known" in capsys.readouterr().out


def test_the_night_that_was_just_made_stays_whatever_its_day(tag_days: Callable[..., list[str]], tmp_path: Path) -> None:
    tag_days(21, 22)
    (folder,) = tag_days(20, keep__nights=1)
    assert [Path(night).name[-2:] for night in nights.all_nights(str(tmp_path / "out"))] == ["20", "22"]
    assert nights.marker_of(folder) is not None


def test_a_night_that_is_not_in_its_table_yet_stays(tag_days: Callable[..., list[str]], tmp_path: Path) -> None:
    folders = tag_days(20, 21, 22)
    for folder, other, snapshot in ((folders[0], None, None), (folders[1], "of before", 7)):
        record = {"run": other or nights.marked_run(folder), "uuid": "", "attempts": [], "snapshot": snapshot}
        Path(folder, "table.json").write_text(json.dumps(record))
    decided = decide(str(tmp_path / "out"), 1)
    assert days(decided, "not in its table yet") == ["20", "21"] and days(decided, "one of the latest") == ["22"]
