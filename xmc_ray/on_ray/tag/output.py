"""The folder of a night: what is in it, which run it belongs to, and how it is published atomically.

    <output>/tags/dt=2026-11-23/
        part-<run>-00000.parquet   tags; nothing else lies there, and nothing before the night is complete
    <output>/_nights/dt=2026-11-23/
        rejects/part-...           rows that cannot be tagged, with reasons
        changes/part-...           documents whose tags are not those of the night before (see `changes`)
        label-counts.parquet       how often each label was given
        manifest.json              counts, times, histograms
        report.html                the same for people
        run.json                   what this run is: input files, bundle, settings
        _SUCCESS                   written last; names the files that make up the night
        table.json                 later than that: the snapshot of an Iceberg table, if there is one (see `tables`)
        _work/                     of an unfinished run: its own run.json (which names the runs before it), its plan, its pieces

A night that replaces another is made in ``_work`` while the old one stays. Then its folder of tags takes the place of the old
one: a reader of the folder sees the old night or the new one, never both. On a file system that is a rename. On S3 each file is
copied, and a reader may see a part of the new night for some seconds; one that goes by ``_SUCCESS`` misses a file then.
"""

import re
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from xmc_ray import storage
from xmc_ray.errors import ConfigError, DataError
from xmc_ray.on_ray.session import own_errors
from xmc_ray.on_ray.tag.changes import write_changes
from xmc_ray.on_ray.tag.nights import (
    COUNTS,
    IDENTITY,
    MANIFEST,
    REMOVED,
    REPORT,
    SUCCESS,
    WORK,
    adopt,
    check_whole,
    files_named,
    listed,
    marker_of,
    output_of,
    point,
    read_own,
    tags_folder,
)
from xmc_ray.on_ray.tag.pieces import IDS, REJECTS, written
from xmc_ray.on_ray.tag.plan import Plan
from xmc_ray.on_ray.tag.runner import Runner
from xmc_ray.settings import difference_in_words
from xmc_ray.storage.files import join
from xmc_ray.storage.folders import take_place
from xmc_ray.storage.lease import held, is_free
from xmc_ray.storage.listing import FileInfo

_PART = re.compile(r"(?:(?:rejects|changes)/)?(?:part-(\w+)-\d{5}\.parquet|\.part-(\w+)-\d{5}\.parquet\.[0-9a-f]{32})")
_ROWS, _BYTES = 1 << 16, 256 << 20  # either is enough for a row group: a piece of a few hundred rows makes none of its own
_MADE_BY = ("release", "arithmetic")  # the part of an identity in which a finished night may differ from the one asked for


@dataclass(frozen=True)
class Night:
    """A night that is not finished; ``run`` identifies it, also when it is resumed."""

    folder: str
    run: str
    identity: Mapping[str, Any]

    @property
    def work(self) -> str:
        """Where it is made."""
        return join(self.folder, WORK)

    @classmethod
    def open(cls, folder: str, identity: Mapping[str, Any], overwrite: bool) -> "Night | None":
        """The night to begin or to resume; None if it is finished. Nothing is written yet.

        Raises ConfigError when the folder holds something else, or another night without ``overwrite``.
        """
        files = storage.all_files(folder)
        if is_free(folder, files):
            return cls(folder, uuid.uuid4().hex[:8], identity)
        if read_own(join(folder, REMOVED)) is not None:
            way_out = "let jobs/nights.py remove finish that, then run again"
            raise ConfigError("the night of this day is being removed", where=folder, way_out=way_out)
        done, begun = read_own(join(folder, IDENTITY)), read_own(join(folder, WORK, IDENTITY))
        if done is None and begun is None:
            raise ConfigError(
                "the folder of the day holds something else", where=folder, found="no run.json", way_out="choose another output"
            )
        marker = marker_of(folder)
        finished = marker is not None and done is not None and done["run"] == marker["run"] and not _other(done, identity)
        if marker is not None and finished and not overwrite:
            check_whole(folder, marker, [*files, *storage.all_files(tags_folder(folder))])
            return None
        is_same = begun is not None and not (_other(begun, identity) or _made_otherwise(begun, identity))
        if begun is not None and is_same and (marker is None or begun["run"] != marker["run"]):
            return cls(folder, begun["run"], identity)
        if overwrite:
            return cls(folder, uuid.uuid4().hex[:8], identity)
        for known in (begun, done):
            if known is not None and (other := _other(known, identity)):
                way_out = "choose another output or date, or give --overwrite"
                raise ConfigError("the folder of the day holds another run", where=folder, found=other, way_out=way_out)
        if begun is not None and marker is None and (otherwise := _made_otherwise(begun, identity)):
            way_out = "go on with the release and the devices that it began with, or give --overwrite to begin anew"
            raise ConfigError("an unfinished night was begun in another way", where=folder, found=otherwise, way_out=way_out)
        return cls(folder, uuid.uuid4().hex[:8], identity)

    def plan(self) -> Plan | None:
        """The plan of an earlier attempt, if there is one."""
        return Plan.load(self.work) if self._is_begun() else None

    def begin(self) -> None:
        """Claim the folder for this night, unless it is claimed already."""
        if self._is_begun():
            return
        claim, replaces = join(self.work, IDENTITY), sorted(self._known_runs() - {self.run})
        # The earlier claim stays until this one takes its place, or it would be forgotten whose the files here are; so does its
        # plan until its pieces are gone.
        for name in storage.subfolders(self.work):
            storage.remove(join(self.work, name))
        for file in storage.all_files(self.work):
            if file.uri != claim:
                storage.remove(file.uri)
        storage.write_json(claim, {"run": self.run, **self.identity, "replaces": replaces})

    def _is_begun(self) -> bool:
        begun = read_own(join(self.work, IDENTITY))
        return begun is not None and begun["run"] == self.run

    def publish(
        self,
        plan: Plan,
        target_bytes: int,
        manifest: Mapping[str, Any],
        report: str,
        label_counts: pa.Table,
        runner: Runner,
        confirm: Callable[[], None] = lambda: None,
        before: str | None = None,
    ) -> dict[str, Any]:
        """Merge the pieces into files of about ``target_bytes`` and finish the night; the manifest with their names.

        Every step may be repeated: names and contents follow from the pieces. Raises DataError unless there are exactly the
        pieces of the plan. ``confirm`` is called before each change of what readers see, and raises if another job has taken
        the folder over. ``before``: the night that changes are told against.
        """
        confirm()
        self._check_pieces(plan)
        stage = join(self.work, "final")
        storage.remove(stage)
        places = {"pieces": stage, "rejects": self.folder}
        rows = {kind: self._merged(kind, place, target_bytes, runner) for kind, place in places.items()}
        self._check_rows(manifest, [sum(rows[kind].values()) for kind in places])
        told, rows["changes"] = self._changes(plan, before, runner)
        marker: dict[str, Any] = {"run": self.run, "files": list(rows["pieces"])}
        marker |= {kind: list(rows[kind]) for kind in ("rejects", "changes")}
        marker["rows"] = {name: count for part in rows.values() for name, count in part.items()}
        self.check_place()
        confirm()
        if rows["pieces"]:
            take_place(stage, tags_folder(self.folder), join(self.work, "replaced"))
        sizes = {file.uri: file.size for file in listed(self.folder)}
        marker["sizes"] = {name: sizes[uri] for name, uri in files_named(self.folder, marker).items()}
        # not before: until then these are of the night that stays if this one fails
        storage.patiently(storage.write_bytes, join(self.folder, REPORT), report.encode())
        storage.patiently(storage.write_parquet, join(self.folder, COUNTS), label_counts)
        storage.patiently(storage.write_json, join(self.folder, MANIFEST), {**manifest, **told, **marker})
        storage.patiently(storage.write_json, join(self.folder, IDENTITY), {"run": self.run, **self.identity})
        confirm()
        storage.patiently(storage.write_json, join(self.folder, SUCCESS), marker)
        settle(self.folder)
        return {**manifest, **told, **marker}

    def _merged(self, kind: str, place: str, target_bytes: int, runner: Runner) -> dict[str, int]:
        """The files that pieces of a kind are merged into, in ``place``, and their rows."""
        groups = _groups(list(written(self.work, kind).values()), target_bytes)
        below, schema = ("rejects/", REJECTS) if kind == "rejects" else ("", None)
        names = [f"{below}part-{self.run}-{number:05}.parquet" for number in range(len(groups))]
        merges = [
            runner.submit(storage.patiently, _merge, group, join(place, name), schema)
            for group, name in zip(groups, names, strict=True)
        ]
        return dict(zip(names, runner.get(merges), strict=True))

    def _changes(self, plan: Plan, before: str | None, runner: Runner) -> tuple[dict[str, Any], dict[str, int]]:
        """What the manifest says of the changes, and their files; a night before that cannot be read does not end this one."""
        if before is None:
            return {"changes_since": None, "no_changes": "there is no finished night before this"}, {}
        try:
            with own_errors():
                told, files = write_changes(self.folder, self.run, plan, self.work, before, runner)
        except DataError as error:
            return {"changes_since": None, "no_changes": str(error)}, {}
        return {"changes_since": told, "no_changes": None}, files

    def check_place(self) -> None:
        """ConfigError if there are files of others where the tags are to lie: readers would take them for tags."""
        runs, place = self._known_runs(), tags_folder(self.folder)
        for file in storage.all_files(place):
            if not (storage.is_temporary(file.uri) or _run_of(file.uri.removeprefix(f"{place}/")) in runs):
                what = "the folder of the day's tags holds something else"
                raise ConfigError(what, where=file.uri, way_out="move it away, or choose another output")

    def _known_runs(self) -> set[str]:
        """This run, and those that had the folder before it."""
        places = (join(self.folder, SUCCESS), join(self.folder, IDENTITY), join(self.work, IDENTITY))
        known = [content for content in map(read_own, places) if content is not None]
        return {self.run, *(run for content in known for run in (content["run"], *content.get("replaces", [])))}

    def _check_rows(self, manifest: Mapping[str, Any], rows: list[int]) -> None:
        """The files and the counts come from different places: DataError unless they agree."""
        counted = [manifest["tagged"] + manifest["reused"], manifest["rejected"]]
        if rows != counted:
            raise DataError(
                "the rows to publish are not those that were counted",
                where=self.work,
                found="{:,} tagged, {:,} rejected".format(*rows),
                expected="{:,} and {:,}".format(*counted),
                way_out="give --overwrite to begin anew",
            )

    def _check_pieces(self, plan: Plan) -> None:
        expected, found = plan.names, set(written(self.work))
        if found != expected:
            raise DataError(
                "the pieces are not those of the plan",
                where=self.work,
                found=f"{len(found & expected)} of them and {len(found - expected)} others",
                expected=f"{len(expected)} pieces",
                way_out="let one run at a time work on a night, and start it again",
            )


def take_over(folder: str) -> None:
    """If the day has a finished night of the old layout, move it to ``folder``, as if it had been made there."""
    old = join(output_of(folder), folder.rpartition("/")[2])
    if marker_of(old) is not None and marker_of(folder) is None:
        with held(folder):
            adopt(old)
        print(f"taken over from the old layout: {old}", flush=True)
    elif (begun := read_own(join(old, WORK, IDENTITY))) is not None:
        what, way_out = "an earlier version has begun this night", "finish it by that version, or remove the folder"
        raise ConfigError(what, where=old, found=f"run {begun['run']}", way_out=way_out)


def is_unsettled(folder: str) -> bool:
    """Whether the driver of a finished night was killed before it was through with `settle`."""
    marker, begun = marker_of(folder), read_own(join(folder, WORK, IDENTITY))
    return marker is not None and begun is not None and begun["run"] == marker["run"]


def settle(folder: str) -> None:
    """What is left to do once a night is marked as finished: `nights.point`, and remove what no reader needs.

    That is a replaced night, temporary files of killed tasks, the work. Only the lease's holder may. Files are recognised by
    the names that this run, and those that it replaces, have given them.
    """
    point(output_of(folder))
    marker, begun = marker_of(folder), read_own(join(folder, WORK, IDENTITY)) or {}
    assert marker is not None
    runs = {marker["run"], *begun.get("replaces", [])}
    kept = set(files_named(folder, marker).values())
    for file in listed(folder):
        name = next(file.uri.removeprefix(f"{place}/") for place in (folder, tags_folder(folder)) if file.uri.startswith(place))
        if _run_of(name) in runs and file.uri not in kept:
            storage.remove(file.uri)
    storage.remove(join(folder, WORK), last=IDENTITY)


def _run_of(name: str) -> str | None:
    """The run that has given a file its name, in a folder of tags or of a night; None if none has."""
    part = _PART.fullmatch(name)
    return (part[1] or part[2]) if part else None


def _other(known: Mapping[str, Any], identity: Mapping[str, Any]) -> str:
    """How another run differs, in words; empty if it does not."""
    now = {name: value for name, value in identity["config"].items() if name != "bundle"}  # its address; see the fingerprint
    before = {name: value for name, value in known.get("config", {}).items() if name in now}
    words = [difference_in_words({name: known.get(name)}, {name: identity.get(name)}) for name in ("bundle", "hierarchy")]
    words += [difference_in_words(*({"input": _versions(each)} for each in (known, identity)))]
    words += [difference_in_words(*({"filters": each.get("filters")} for each in (known, identity)))]
    words += [difference_in_words(before, now)]
    return ", ".join(filter(None, words))


def _versions(identity: Mapping[str, Any]) -> dict[str, str]:
    return {file["uri"]: f"{file['size']:,} bytes, version {file['version']}" for file in identity.get("input", [])}


def _made_otherwise(known: Mapping[str, Any], identity: Mapping[str, Any]) -> str:
    """In what an unfinished run was computed otherwise, in words; empty if it was not."""
    differ = [name for name in _MADE_BY if known.get(name) != identity.get(name)]
    return ", ".join(f"{name} {known.get(name, 'unknown')} instead of {identity.get(name)}" for name in differ)


def _groups(files: Sequence[FileInfo], target_bytes: int) -> list[list[str]]:
    """Consecutive files that have about ``target_bytes`` together."""
    groups: list[list[str]] = []
    size = 0
    for file in files:
        if not groups or size + file.size > target_bytes:
            groups.append([])
            size = 0
        groups[-1].append(file.uri)
        size += file.size
    return groups


def _merge(sources: Sequence[str], target: str, schema: pa.Schema | None) -> int:
    """The number of rows. ``schema``: that of the first source, if not given; columns that a source lacks are null."""
    rows = 0
    with storage.new_file(target) as file:
        writer: pq.ParquetWriter | None = None
        waiting: list[pa.Table] = []
        for source in [*sources, None]:
            if source is not None:
                table = storage.read_parquet(source).replace_schema_metadata(None)
                waiting.append(table.select([name for name in table.column_names if name != IDS]))
                rows += len(table)
            is_full = sum(map(len, waiting)) >= _ROWS or sum(table.nbytes for table in waiting) >= _BYTES
            if waiting and (source is None or is_full):
                schema = schema or waiting[0].schema
                writer = writer or pq.ParquetWriter(file, schema, compression="zstd")
                writer.write_table(pa.concat_tables([schema.empty_table(), *waiting], promote_options="default"))
                waiting = []
        if writer is not None:
            writer.close()
    return rows
