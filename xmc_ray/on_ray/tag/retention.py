"""Which nights stay, and the removal of the others, as ``jobs/nights.py`` and the end of a tagging job do it.

A night goes as a whole: its marker first, so that nobody takes the rest for a night, then the files that the marker named, and
what a night has besides. Files of others stay, and so do folders that hold them. A removal that was killed is gone on with by
the next one.
"""

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal

from xmc_ray import storage
from xmc_ray.bundle.folder import MARKER, read_settings
from xmc_ray.bundle.hub import is_hub
from xmc_ray.bundle.members import Members
from xmc_ray.errors import ConfigError, DataError, ModelError
from xmc_ray.on_ray.tag import live, nights
from xmc_ray.on_ray.tag.nights import (
    CHANGES,
    COUNTS,
    IDENTITY,
    MANIFEST,
    REJECTS,
    REMOVED,
    REPORT,
    SUCCESS,
    TABLE,
    WORK,
    all_nights,
    day_of,
    files_named,
    latest_before,
    marked_run,
    marker_of,
    read_own,
    tags_folder,
)
from xmc_ray.settings import PositiveInt, Settings
from xmc_ray.storage.files import join
from xmc_ray.storage.lease import held, is_held

Action = Literal["list", "latest", "remove", "adopt", "feedback"]


@dataclass(frozen=True, kw_only=True)
class KeepConfig(Settings):
    """How many nights of an output stay."""

    nights: PositiveInt | None = None
    """Finished nights that stay, the latest ones; older ones are removed once this one is finished. None removes none."""


@dataclass(frozen=True, kw_only=True)
class NightsConfig(Settings):
    """List the nights of an output, name the latest one, remove old ones, take over those of the old layout, or show how right
    their tags are."""

    action: Action
    """What to do; may be given as the first argument: `list`, `latest`, `remove`, `adopt`, `feedback`."""
    output: storage.Address
    """The output of the tagging job."""
    keep: PositiveInt | None = None
    """With `remove`: how many finished nights stay, the latest ones."""
    bundles: bool = False
    """With `remove`: bundles go as well, each with the last night that was made with it."""
    yes: bool = False
    """With `remove`: really remove; without it, say what would go."""
    feedback: storage.Source | None = None
    """With `feedback`: table or folder of editors' verdicts, as in training; what they say of tags is shown."""
    last: PositiveInt = 30
    """With `feedback`: how many finished nights are looked at, the latest ones."""
    report: storage.Address | None = None
    """With `feedback`: HTML page to write it to as well."""

    def check(self) -> None:
        """Raises ConfigError if a removal does not say how many nights stay, and for feedback without a file."""
        if self.action == "feedback" and self.feedback is None:
            raise ConfigError("feedback is missing", found="feedback", way_out="name the file, such as --feedback FILE.parquet")
        if self.action == "remove" and self.keep is None:
            raise ConfigError("keep is missing", found="remove", way_out="say how many nights stay, such as --keep 30")


@dataclass(frozen=True)
class Stay:
    """A night, and why it stays: "" if it may go."""

    folder: str
    why: str


def run(config: NightsConfig) -> None:
    """The job ``jobs/nights.py``."""
    if config.action == "latest":
        print(nights.latest(config.output))
    elif config.action == "list":
        print("\n".join(_line(folder) for folder in all_nights(config.output)) or f"no nights: {config.output}")
    elif config.action == "adopt":
        old = [folder for folder in all_nights(config.output) if nights.is_old(folder) and marked_run(folder) is not None]
        for folder in old:
            with held(nights.folder_of(config.output, day_of(folder))):
                print(f"{folder} -> {nights.adopt(folder)}", flush=True)
        nights.point(config.output)
    elif config.action == "feedback":
        assert config.feedback is not None
        live.show(config.output, config.feedback, config.last, config.report)
    else:
        _remove_old(config)


def _remove_old(config: NightsConfig) -> None:
    assert config.keep is not None
    decided = decide(config.output, config.keep)
    for night in decided:
        print(f"{night.folder}: {night.why or ('removed' if config.yes else 'would be removed')}", flush=True)
    bundles = unused_bundles(decided) if config.bundles else []
    for uri in bundles:
        print(f"{uri}: {'removed' if config.yes else 'would be removed'}, a bundle of removed nights alone", flush=True)
    if config.yes:
        remove_nights(config.output, decided)
        for uri in bundles:
            _remove_bundle(uri)
    elif not all(night.why for night in decided):
        print("nothing has been removed; give --yes to do so")


def decide(output: str, keep: int, made: str | None = None) -> list[Stay]:
    """All nights of an output, by day, each with the reason why it stays, if the ``keep`` latest finished ones do.

    ``made``: a night that has just been made, of whatever day.
    """
    folders = all_nights(output)
    finished = [folder for folder in folders if marked_run(folder) is not None]
    stay = dict.fromkeys(finished[len(finished) - min(keep, len(finished)) :], f"one of the latest {keep}")
    pointer = read_own(join(output, nights.LATEST), "night")
    if pointer is not None and join(output, pointer["night"]) in finished:
        stay.setdefault(join(output, pointer["night"]), "the one that _latest.json names")
    if made is not None:
        stay.setdefault(made, "just made")
    for folder in finished:
        record = read_own(join(folder, TABLE), "snapshot")
        if record is not None and (record["snapshot"] is None or record["run"] != marked_run(folder)):
            stay.setdefault(folder, "not in its table yet")
    for folder in folders:
        if folder not in finished and not storage.exists(join(folder, REMOVED)):
            stay[folder] = "unfinished"
        works = is_held(folder)
        for needed in _needed_by(folder, works):
            stay.setdefault(needed, f"dt={day_of(folder)} is being made and needs it")
        if works:
            stay.setdefault(folder, "a job works there")
    return [Stay(folder, stay.get(folder, "")) for folder in folders]


def _needed_by(folder: str, works: bool) -> Iterator[str]:
    """The nights whose tags a night that is being made takes, or may take. ``works``: whether a job works there now."""
    begun = read_own(join(folder, WORK, IDENTITY))
    if begun is None and not works:
        return
    previous = (begun or {}).get("config", {}).get("previous")
    if previous not in (None, "last"):
        yield nights.named(previous)
    before = latest_before(folder)
    if before is not None:
        yield before


def remove_nights(output: str, decided: Sequence[Stay]) -> list[str]:
    """Remove those that may go, the oldest first, and let ``_latest.json`` be right; the folders that went."""
    gone = [night.folder for night in decided if not night.why]
    for folder in gone:
        with held(folder):
            _remove(folder)
        for place in (folder, tags_folder(folder)):
            storage.remove_empty(place)
    nights.point(output)
    return gone


def _remove(folder: str) -> None:
    """Remove a night's own files. Whose are its own stays on record until the end."""
    record = join(folder, REMOVED)
    marker = marker_of(folder) or read_own(record, "files", "rejects")
    if marker is None:
        raise DataError("not a finished night", where=folder, way_out="remove it by hand")
    storage.write_json(record, marker)
    storage.remove(join(folder, SUCCESS))
    for uri in files_named(folder, marker).values():
        storage.remove(uri)
    storage.remove(join(folder, WORK), last=IDENTITY)
    for name in (TABLE, COUNTS, REPORT, MANIFEST, IDENTITY, REMOVED):
        storage.remove(join(folder, name))
    for place in (join(folder, REJECTS), join(folder, CHANGES)):
        storage.remove_empty(place)


def unused_bundles(decided: Sequence[Stay]) -> list[str]:
    """Addresses of the bundles that made nights which go, and none that stays. A place with another bundle by now is none.

    Nights that are being made, or made again, count by what they were begun with. None where nobody knows of a night that
    stays.
    """
    used: dict[bool, dict[str, dict[str, Any]]] = {True: {}, False: {}}
    for night in decided:
        names = (MANIFEST, IDENTITY, join(WORK, IDENTITY)) if night.why else (MANIFEST,)
        known = [content for name in names if (content := read_own(join(night.folder, name), "config", "bundle")) is not None]
        for content in known:
            used[bool(night.why)] |= dict.fromkeys(_bundles(content), content)
        if night.why and not any(map(_bundles, known)):
            print(f"no bundle is removed: that of {night.folder} is not known", flush=True)
            return []
    unused = []
    for uri, manifest in used[False].items():
        if uri not in used[True] and not is_hub(uri):  # what lies on a hub is for others as well
            with suppress(ModelError):  # it is gone, or something else lies there by now
                if Members.read(manifest["config"]["bundle"]).fingerprint == manifest["bundle"]:
                    unused.append(uri)
    return unused


def _remove_bundle(uri: str) -> None:
    """Its own files, ``config.json`` first, without which nobody takes the rest for a bundle."""
    names = read_settings(uri)["files"]
    for name in (MARKER, *names):
        storage.remove(join(uri, name))
    storage.remove_empty(uri)


def _bundles(manifest: dict[str, Any] | None) -> list[str]:
    places = [] if manifest is None else manifest["config"].get("bundle", [])
    return [places] if isinstance(places, str) else places


def _line(folder: str) -> str:
    """A night in a few words."""
    marker, manifest = marker_of(folder), read_own(join(folder, MANIFEST), "in")
    if marker is None:
        return f"dt={day_of(folder)}  {'removed in part' if storage.exists(join(folder, REMOVED)) else 'unfinished'}  {folder}"
    counts = {name: (manifest or {}).get(name) for name in ("tagged", "reused", "rejected")}
    changes = (manifest or {}).get("changes_since")
    words = [f"{value:,} {name}" for name, value in counts.items() if value is not None]
    words += [f"{changes[name]:,} {name}" for name in ("added", "changed", "removed")] if changes else []
    layout = ["old layout"] if nights.is_old(folder) else []
    return f"dt={day_of(folder)}  {', '.join([*words, *layout])}  {tags_folder(folder)}"
