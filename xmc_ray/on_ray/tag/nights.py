"""The nights of an output: where the files of each lie, which of them are finished, and which is the latest.

    <output>/
        tags/dt=2026-11-23/part-<run>-00000.parquet   tags and nothing else, so that any reader gets them right:
                                                      by folder, by partition and by pattern
        _nights/dt=2026-11-23/                        what a night has beside its tags (see `output`); "the night's folder"
        _latest.json                                  the latest finished night

The old layout, that of earlier versions, had all of a night in ``<output>/dt=2026-11-23/``. Such a night is read where it is,
and `adopt`ed on request.
"""

import os
import posixpath
from collections.abc import Mapping, Sequence
from datetime import date
from typing import Annotated, Any

from xmc_ray import storage
from xmc_ray.errors import ConfigError, DataError
from xmc_ray.settings import Normalised
from xmc_ray.storage.files import join
from xmc_ray.storage.listing import FileInfo

TAGS, NIGHTS, LATEST = "tags", "_nights", "_latest.json"
SUCCESS, MANIFEST, IDENTITY, WORK, COUNTS = "_SUCCESS", "manifest.json", "run.json", "_work", "label-counts.parquet"
REPORT, REJECTS, CHANGES, TABLE = "report.html", "rejects", "changes", "table.json"
REMOVED = "_removed.json"  # what a night's marker named, while it is being removed


def parse_day(text: str | os.PathLike[str]) -> str:
    """YYYY-MM-DD of a day, or of the name of its folder, dt=YYYY-MM-DD; ConfigError for anything else."""
    day = str(text).removeprefix("dt=")
    try:
        is_day = date.fromisoformat(day).isoformat() == day  # Python 3.11 reads 20261123 and weeks as well
    except ValueError:
        is_day = False
    if not is_day:
        raise ConfigError("not a day", found=repr(text), expected=_DAY)
    return day


_DAY = "YYYY-MM-DD or dt=YYYY-MM-DD"
Day = Annotated[str, Normalised(parse_day, _DAY)]


def folder_of(output: str, day: str) -> str:
    """The folder of a night; its tags are in `tags_folder`."""
    return join(output, NIGHTS, f"dt={day}")


def output_of(folder: str) -> str:
    """The output that a night's folder belongs to."""
    above = posixpath.dirname(folder)
    return above if is_old(folder) else posixpath.dirname(above)


def tags_folder(folder: str) -> str:
    """Where the tags of a night are: its own folder in the old layout."""
    return folder if is_old(folder) else join(output_of(folder), TAGS, posixpath.basename(folder))


def is_old(folder: str) -> bool:
    """Whether a night's folder is one of the old layout."""
    return posixpath.basename(posixpath.dirname(folder)) != NIGHTS


def named(address: str) -> str:
    """The night's folder, given that, the folder of its tags, or its place in the old layout."""
    above, name = posixpath.split(address)
    output = posixpath.dirname(above) if posixpath.basename(above) == TAGS else above
    if not _is_day(name) or not is_old(address) or marked_run(address) is not None:
        return address
    folder = folder_of(output, name.removeprefix("dt="))
    return folder if marked_run(folder) is not None else address


def all_nights(output: str) -> list[str]:
    """The folders of all nights, finished or not, by day; of a day in both layouts the present one."""
    old = {name: join(output, name) for name in storage.subfolders(output)}
    present = {name: join(output, NIGHTS, name) for name in storage.subfolders(join(output, NIGHTS))}
    return [folder for name, folder in sorted((old | present).items()) if _is_day(name)]


def latest_before(folder: str) -> str | None:
    """The last finished night before the one in ``folder``, in the same output, if there is one."""
    return _latest([night for night in all_nights(output_of(folder)) if day_of(night) < day_of(folder)])


def day_of(folder: str) -> str:
    """YYYY-MM-DD of a night's folder."""
    return posixpath.basename(folder).removeprefix("dt=")


def _latest(folders: Sequence[str]) -> str | None:
    return next((folder for folder in reversed(folders) if marked_run(folder) is not None), None)


def _is_day(name: str) -> bool:
    """Whether a folder's name is ``dt=`` and a day, YYYY-MM-DD."""
    try:
        return name == f"dt={parse_day(name)}"
    except ConfigError:
        return False


def marker_of(folder: str) -> dict[str, Any] | None:
    """The content of ``_SUCCESS``, if the night is finished."""
    return read_own(join(folder, SUCCESS), "files", "rejects")


def marked_run(folder: str) -> str | None:
    """The run that a night's ``_SUCCESS`` names, if there is one."""
    marker = marker_of(folder)
    return None if marker is None else str(marker["run"])


def read_own(uri: str, *needs: str) -> dict[str, Any] | None:
    """A JSON file of ours, which has ``run`` and what it ``needs`` besides, if it is there; None for anything else."""
    try:
        content = storage.read_json(uri)
    except DataError:
        return None
    return content if isinstance(content, dict) and content.keys() >= {"run", *needs} else None


def files_named(folder: str, marker: Mapping[str, Any]) -> dict[str, str]:
    """Address of each file of tags, rejects and changes that a marker names."""
    others = (*marker["rejects"], *marker.get("changes", []))
    return {name: join(tags_folder(folder), name) for name in marker["files"]} | {name: join(folder, name) for name in others}


def listed(folder: str) -> list[FileInfo]:
    """All files of a night: those in its folder, and its tags."""
    places = dict.fromkeys([folder, tags_folder(folder)])
    return [file for place in places for file in storage.all_files(place)]


def check_whole(folder: str, marker: Mapping[str, Any], files: Sequence[FileInfo]) -> None:
    """DataError if a finished night has lost a file, or a part of one. Unreleased versions noted no sizes."""
    sizes = {file.uri: file.size for file in files}
    for name, uri in files_named(folder, marker).items():
        size, expected = sizes.get(uri), marker.get("sizes", {}).get(name)
        if size is None or expected not in (None, size):
            raise DataError(
                "a finished night is damaged",
                where=uri,
                found="no such file" if size is None else f"{size:,} bytes",
                expected=None if expected is None else f"{expected:,} bytes",
                way_out="restore the file, or tag again with --overwrite",
            )


def tag_files(folder: str) -> list[FileInfo]:
    """The files of tags of a finished night; DataError if it is not finished, or if one of its files is missing or damaged."""
    marker = marker_of(folder)
    if marker is None:
        raise DataError("not a finished night", where=folder, found=f"no {SUCCESS}")
    files = listed(folder)
    check_whole(folder, marker, files)
    wanted = {join(tags_folder(folder), name) for name in marker["files"]}
    return [file for file in files if file.uri in wanted]


def manifest_of(folder: str) -> dict[str, Any]:
    """The manifest of a finished night; DataError while it is that of another run, or if it is none."""
    uri = join(folder, MANIFEST)
    manifest = read_own(uri, "config", "scoring")
    if manifest is None:
        raise DataError("not the manifest of a night", where=uri, way_out="restore it, or tag without this night as previous")
    if manifest["run"] != marked_run(folder):
        raise DataError("this night is being replaced by another run", where=folder, way_out="finish that run first")
    return manifest


def point(output: str) -> str | None:
    """Let ``_latest.json`` name the latest finished night, and return that; the file goes if there is none.

    Jobs of two days may do so at once: each looks again once it has written, so the last one to write has seen both.
    """
    uri = join(output, LATEST)
    while True:
        folder = _latest(all_nights(output))
        if folder is None:
            storage.remove(uri)
            return None
        marker = marker_of(folder)
        if marker is not None:  # else it has been removed since
            storage.patiently(storage.write_json, uri, _pointer(output, folder, marker))
            if _latest(all_nights(output)) == folder:
                return folder


def _pointer(output: str, folder: str, marker: Mapping[str, Any]) -> dict[str, Any]:
    """What `point` writes; addresses are relative to the output, which may be moved."""
    place, night = (each.removeprefix(f"{output}/") for each in (tags_folder(folder), folder))
    rows = marker.get("rows", {})
    return {
        "run": marker["run"],
        "day": day_of(folder),
        "night": night,
        "tags": place,
        "files": [posixpath.join(place, name) for name in marker["files"]],
        "rows": sum(rows[name] for name in marker["files"]) if rows else None,
        "changes": [posixpath.join(night, name) for name in marker.get("changes", [])],
    }


def latest(output: str) -> str:
    """The folder of the night that ``_latest.json`` names; DataError if there is none, or if that night is gone."""
    pointer = read_own(join(output, LATEST), "night")
    if pointer is None:
        raise DataError("no night is finished", where=output, found=f"no {LATEST}")
    folder = join(output, pointer["night"])
    if marked_run(folder) != pointer["run"]:
        way_out = "run jobs/nights.py remove, which lets it name another, or tag again"
        raise DataError("the latest night has been removed or replaced", where=folder, expected=pointer["run"], way_out=way_out)
    return folder


def adopt(folder: str) -> str:
    """Move a finished night of the old layout to where nights are now, and return its new folder; may be repeated after a kill.

    Files of others stay where they are. DataError if the night is not finished, or if the day has a night in both places.
    """
    marker, target = marker_of(folder), folder_of(output_of(folder), day_of(folder))
    if marker is None:
        raise DataError("not a finished night", where=folder, way_out="finish it by the version that began it, or tag anew")
    if marker_of(target) is not None:
        raise DataError("the day has a night in both layouts", where=folder, found=target, way_out="remove one of them")
    places = files_named(target, marker)
    for name, uri in files_named(folder, marker).items():
        storage.patiently(storage.move, uri, places[name])
    for name in (COUNTS, REPORT, MANIFEST, IDENTITY, SUCCESS):  # the marker last
        if storage.exists(join(folder, name)):
            storage.patiently(storage.move, join(folder, name), join(target, name))
    begun = read_own(join(folder, WORK, IDENTITY))
    if begun is not None and begun["run"] == marker["run"]:  # its driver was killed before it had tidied up
        storage.remove(join(folder, WORK), last=IDENTITY)
    storage.remove_empty(folder)
    return target
