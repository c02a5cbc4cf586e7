"""The folder of a night: what is in it, which run it belongs to, and how it is published atomically.

    <output>/dt=2026-11-23/
        part-<run>-00000.parquet   tags
        rejects/part-...           rows that cannot be tagged, with reasons
        label-counts.parquet       how often each label was given
        manifest.json              counts, times, histograms
        report.html                the same for people
        run.json                   what this run is: input files, bundle, settings
        _SUCCESS                   written last; names the files that make up the night
        _work/                     of an unfinished run: its own run.json (which names the runs before it), its plan, its pieces

A night that replaces another is made in ``_work`` while the old one stays. A reader of the files that ``_SUCCESS`` names sees
the old night or the new one, never a mixture.
"""

import os
import re
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from typing import Annotated, Any

import pyarrow as pa
import pyarrow.parquet as pq

from xmc_ray import storage
from xmc_ray.errors import ConfigError, DataError
from xmc_ray.on_ray.tag.pieces import IDS, REJECTS, written
from xmc_ray.on_ray.tag.plan import Plan
from xmc_ray.on_ray.tag.runner import Runner
from xmc_ray.settings import Normalised, difference_in_words
from xmc_ray.storage.files import FileInfo, join
from xmc_ray.storage.lease import is_free

SUCCESS, MANIFEST, IDENTITY, WORK, COUNTS = "_SUCCESS", "manifest.json", "run.json", "_work", "label-counts.parquet"
REPORT = "report.html"
_PART = re.compile(r"(?:rejects/)?(?:part-(\w+)-\d{5}\.parquet|\.part-(\w+)-\d{5}\.parquet\.[0-9a-f]{32})")
_ROWS, _BYTES = 1 << 16, 256 << 20  # either is enough for a row group: a piece of a few hundred rows makes none of its own
_MADE_BY = ("release", "arithmetic")  # the part of an identity in which a finished night may differ from the one asked for


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
        done, begun = read_own(join(folder, IDENTITY)), read_own(join(folder, WORK, IDENTITY))
        if done is None and begun is None:
            raise ConfigError(
                "the folder of the day holds something else", where=folder, found="no run.json", way_out="choose another output"
            )
        marker = _marker(folder)
        finished = marker is not None and done is not None and done["run"] == marker["run"] and not _other(done, identity)
        if marker is not None and finished and not overwrite:
            _check_whole(folder, marker, files)
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
        if not self._is_begun():
            before = [_marker(self.folder), read_own(join(self.folder, IDENTITY)), read_own(join(self.work, IDENTITY))]
            replaces = sorted({run for known in before if known for run in (known["run"], *known.get("replaces", []))})
            storage.remove(self.work, last=IDENTITY)
            storage.write_json(join(self.work, IDENTITY), {"run": self.run, **self.identity, "replaces": replaces})

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
    ) -> dict[str, Any]:
        """Merge the pieces into files of about ``target_bytes`` and finish the night; the manifest with their names.

        Every step may be repeated: names and contents follow from the pieces. Raises DataError unless there are exactly the
        pieces of the plan. ``confirm`` is called before each change of what readers see, and raises if another job has taken
        the folder over.
        """
        confirm()
        self._check_pieces(plan)
        replaces = marked_run(self.folder) is not None
        stage = join(self.work, "final") if replaces else self.folder
        merges, names = [], {}
        for kind, below in (("pieces", ""), ("rejects", "rejects/")):
            groups = _groups(list(written(self.work, kind).values()), target_bytes)
            names[kind] = [f"{below}part-{self.run}-{number:05}.parquet" for number in range(len(groups))]
            for group, name in zip(groups, names[kind], strict=True):
                schema = REJECTS if kind == "rejects" else None
                merges.append(runner.submit(storage.patiently, _merge, group, join(stage, name), schema))
        files = names["pieces"] + names["rejects"]
        rows = dict(zip(files, runner.get(merges), strict=True))
        self._check_rows(manifest, [sum(rows[name] for name in names[kind]) for kind in ("pieces", "rejects")])
        confirm()
        if replaces:
            for name in files:
                storage.patiently(storage.move, join(stage, name), join(self.folder, name))
        storage.patiently(storage.write_bytes, join(self.folder, REPORT), report.encode())
        storage.write_parquet(join(self.folder, COUNTS), label_counts)
        sizes = {file.uri: file.size for file in storage.all_files(self.folder)}
        marker = {"run": self.run, "files": names["pieces"], "rejects": names["rejects"], "rows": rows}
        marker["sizes"] = {name: sizes[join(self.folder, name)] for name in files}
        storage.patiently(storage.write_json, join(self.folder, MANIFEST), {**manifest, **marker})
        storage.patiently(storage.write_json, join(self.folder, IDENTITY), {"run": self.run, **self.identity})
        confirm()
        storage.patiently(storage.write_json, join(self.folder, SUCCESS), marker)
        tidy(self.folder)
        return {**manifest, **marker}

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


def is_untidy(folder: str) -> bool:
    """Whether the driver of a finished night was killed before it had tidied up."""
    marker, begun = _marker(folder), read_own(join(folder, WORK, IDENTITY))
    return marker is not None and begun is not None and begun["run"] == marker["run"]


def tidy(folder: str) -> None:
    """Remove what no reader of a finished night needs: a replaced night, temporary files of killed tasks, the work.

    Only the lease's holder may. Files are recognised by the names that this run, and those that it replaces, have given them.
    """
    marker, begun = _marker(folder), read_own(join(folder, WORK, IDENTITY)) or {}
    assert marker is not None
    runs = {marker["run"], *begun.get("replaces", [])}
    kept = {join(folder, name) for name in (*marker["files"], *marker["rejects"])}
    for file in storage.all_files(folder):
        part = _PART.fullmatch(file.uri.removeprefix(f"{folder}/"))
        if part and (part[1] or part[2]) in runs and file.uri not in kept:
            storage.remove(file.uri)
    storage.remove(join(folder, WORK), last=IDENTITY)


def _check_whole(folder: str, marker: Mapping[str, Any], files: Sequence[FileInfo]) -> None:
    """DataError if a finished night has lost a file, or a part of one. Unreleased versions noted no sizes."""
    sizes = {file.uri: file.size for file in files}
    for name in (*marker["files"], *marker["rejects"]):
        size, expected = sizes.get(join(folder, name)), marker.get("sizes", {}).get(name)
        if size is None or expected not in (None, size):
            raise DataError(
                "a finished night is damaged",
                where=join(folder, name),
                found="no such file" if size is None else f"{size:,} bytes",
                expected=None if expected is None else f"{expected:,} bytes",
                way_out="restore the file, or tag again with --overwrite",
            )


def marked_run(folder: str) -> str | None:
    """The run that a folder's ``_SUCCESS`` names, if there is one."""
    marker = _marker(folder)
    return None if marker is None else str(marker["run"])


def tag_files(folder: str) -> list[FileInfo]:
    """The files of tags of a finished night; DataError if it is not finished, or if one of its files is missing or damaged."""
    marker = _marker(folder)
    if marker is None:
        raise DataError("not a finished night", where=folder, found=f"no {SUCCESS}")
    files = storage.all_files(folder)
    _check_whole(folder, marker, files)
    names = {join(folder, name) for name in marker["files"]}
    return [file for file in files if file.uri in names]


def manifest_of(folder: str) -> dict[str, Any]:
    """The manifest of a finished night; DataError while it is that of another run, or if it is none."""
    uri = join(folder, MANIFEST)
    manifest = read_own(uri, "config", "scoring")
    if manifest is None:
        raise DataError("not the manifest of a night", where=uri, way_out="restore it, or tag without this night as previous")
    if manifest["run"] != marked_run(folder):
        raise DataError("this night is being replaced by another run", where=folder, way_out="finish that run first")
    return manifest


def latest_before(folder: str) -> str | None:
    """The last finished night before the one in ``folder``, among its siblings, if there is one."""
    output, _, this = folder.rpartition("/")
    for name in sorted((name for name in storage.subfolders(output) if _is_day(name) and name < this), reverse=True):
        if marked_run(join(output, name)) is not None:
            return join(output, name)
    return None


def _is_day(name: str) -> bool:
    """Whether a folder's name is ``dt=`` and a day, YYYY-MM-DD."""
    try:
        return name == f"dt={parse_day(name)}"
    except ConfigError:
        return False


def _marker(folder: str) -> dict[str, Any] | None:
    return read_own(join(folder, SUCCESS), "files", "rejects")


def read_own(uri: str, *needs: str) -> dict[str, Any] | None:
    """A JSON file of ours, which has ``run`` and what it ``needs`` besides, if it is there; None for anything else."""
    try:
        content = storage.read_json(uri)
    except DataError:
        return None
    return content if isinstance(content, dict) and content.keys() >= {"run", *needs} else None


def _other(known: Mapping[str, Any], identity: Mapping[str, Any]) -> str:
    """How another run differs, in words; empty if it does not."""
    now = {name: value for name, value in identity["config"].items() if name != "bundle"}  # its address; see the fingerprint
    before = {name: value for name, value in known.get("config", {}).items() if name in now}
    words = [difference_in_words({"bundle": known.get("bundle")}, {"bundle": identity["bundle"]})]
    words += [difference_in_words(*({"input": _versions(each)} for each in (known, identity)))]
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
