"""The folder of a night: what is in it, who it belongs to, and how it becomes finished all at once.

    <output>/dt=2026-11-23/
        part-<run>-00000.parquet   tags
        rejects/part-...           rows that cannot be tagged, with reasons
        label-counts.parquet       how often each label was given
        manifest.json              counts, times, histograms
        report.html                the same for people
        run.json                   what this run is: input files, bundle, settings
        _SUCCESS                   written last; names the files that make the night
        _work/                     of an unfinished run: its own run.json, its plan, its pieces

A night that replaces another is made in ``_work``, while the old one stays; whoever reads the files that ``_SUCCESS`` names
sees the old night or the new one, never a part of either.
"""

import json
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import ray

from xmc_ray import storage
from xmc_ray.errors import ConfigError, DataError
from xmc_ray.on_ray.tag.pieces import written
from xmc_ray.on_ray.tag.plan import PIECES, REUSED, Plan
from xmc_ray.storage.files import FileInfo, join
from xmc_ray.storage.lease import is_free

SUCCESS, MANIFEST, IDENTITY, WORK, COUNTS = "_SUCCESS", "manifest.json", "run.json", "_work", "label-counts.parquet"


REPORT = "report.html"


_ROWS = 1 << 16  # of a row group: pieces of a few hundred rows make none of their own


@dataclass(frozen=True)
class Night:
    """A night that is not finished; ``run`` names it, the same one whenever it is taken up again."""

    folder: str
    run: str
    identity: Mapping[str, Any]

    @property
    def work(self) -> str:
        """Where it is made."""
        return join(self.folder, WORK)

    @classmethod
    def open(cls, folder: str, identity: Mapping[str, Any], overwrite: bool) -> "Night | None":
        """The night to make or to go on with; None if it is finished. Nothing is written yet.

        Raises ConfigError when the folder holds something else, or another night without ``overwrite``.
        """
        if is_free(folder):
            return cls(folder, uuid.uuid4().hex[:8], identity)
        done, begun = (_read(join(place, IDENTITY)) for place in (folder, join(folder, WORK)))
        if done is None and begun is None:
            raise ConfigError(
                "the folder of the day holds something else", where=folder, found="no run.json", way_out="choose another output"
            )
        marker = _read(join(folder, SUCCESS))
        finished = marker is not None and done is not None and done["run"] == marker["run"] and _same(done, identity)
        if marker is not None and finished and not overwrite:
            if begun is None or begun["run"] == marker["run"]:
                cls(folder, marker["run"], identity)._tidy([*marker["files"], *marker["rejects"]])
            return None
        if begun is not None and _same(begun, identity) and (marker is None or begun["run"] != marker["run"]):
            return cls(folder, begun["run"], identity)
        if overwrite:
            return cls(folder, uuid.uuid4().hex[:8], identity)
        for known in (begun, done):
            if known is not None and not _same(known, identity):
                raise ConfigError(
                    "the folder of the day holds another run",
                    where=folder,
                    found=f"other {', '.join(name for name in identity if known.get(name) != identity[name])}",
                    way_out="choose another output or date, or give --overwrite",
                )
        return cls(folder, uuid.uuid4().hex[:8], identity)

    def plan(self) -> Plan | None:
        """What an earlier attempt has planned, if one came so far."""
        where = join(self.work, "plan.json")
        if not self._is_begun() or not storage.exists(where):
            return None
        return Plan(self._table("pieces-to-do", PIECES), self._table("reused", REUSED), **storage.read_json(where))

    def begin(self) -> None:
        """Make the folder this night's, unless it is."""
        if not self._is_begun():
            storage.remove(self.work, last=IDENTITY)
            storage.write_json(join(self.work, IDENTITY), {"run": self.run, **self.identity})

    def _is_begun(self) -> bool:
        begun = _read(join(self.work, IDENTITY))
        return begun is not None and begun["run"] == self.run

    def keep_plan(self, plan: Plan) -> None:
        """So that whoever goes on does the same pieces, whatever the input has become by then."""
        for name, table in (("pieces-to-do", plan.pieces), ("reused", plan.reused)):
            with storage.new_file(join(self.work, f"{name}.parquet")) as file:
                pq.write_table(table, file)
        counts = {"rows": plan.rows, "lost_bytes": plan.lost_bytes, "previous": plan.previous}
        _patiently(storage.write_json, join(self.work, "plan.json"), counts)

    def _table(self, name: str, schema: pa.Schema) -> pa.Table:
        return storage.read_parquet(join(self.work, f"{name}.parquet")).cast(schema)

    def publish(
        self, plan: Plan, target_bytes: int, manifest: Mapping[str, Any], others: Mapping[str, bytes]
    ) -> dict[str, Any]:
        """Join the pieces to files of about ``target_bytes`` and finish the night; the manifest with their names.

        ``others`` are further files by name. Every step may be repeated: names and contents follow from the pieces. Raises
        DataError unless there are the pieces of the plan and no others.
        """
        self._check_pieces(plan)
        replaces = marked_run(self.folder) is not None
        stage = join(self.work, "final") if replaces else self.folder
        merges, names = [], {}
        for kind, below in (("pieces", ""), ("rejects", "rejects/")):
            groups = _groups(list(written(self.work, kind).values()), target_bytes)
            names[kind] = [f"{below}part-{self.run}-{number:05}.parquet" for number in range(len(groups))]
            merges += [_merge.remote(group, join(stage, name)) for group, name in zip(groups, names[kind], strict=True)]
        ray.get(merges)
        files = names["pieces"] + names["rejects"]
        if replaces:
            for name in files:
                _patiently(storage.move, join(stage, name), join(self.folder, name))
        for name, content in others.items():
            _patiently(storage.write_bytes, join(self.folder, name), content)
        marker = {"run": self.run, "files": names["pieces"], "rejects": names["rejects"]}
        _patiently(storage.write_json, join(self.folder, MANIFEST), {**manifest, **marker})
        _patiently(storage.write_json, join(self.folder, IDENTITY), {"run": self.run, **self.identity})
        _patiently(storage.write_json, join(self.folder, SUCCESS), marker)
        self._tidy(files)
        return {**manifest, **marker}

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

    def _tidy(self, files: Sequence[str]) -> None:
        """Remove what no reader needs: a replaced night, halves of killed tasks, the work."""
        kept = {join(self.folder, name) for name in files}
        for file in storage.all_files(self.folder):
            name = file.uri.rpartition("/")[2]
            ours = name.startswith(".part-") or (name.startswith("part-") and name.endswith(".parquet"))
            if ours and file.uri not in kept and f"/{WORK}/" not in file.uri:
                storage.remove(file.uri)
        storage.remove(self.work, last=IDENTITY)


def marked_run(folder: str) -> str | None:
    """The run that a folder's ``_SUCCESS`` names, if there is one."""
    marker = _read(join(folder, SUCCESS))
    return None if marker is None else str(marker["run"])


def tag_files(folder: str) -> list[str]:
    """The files of tags of a finished night; DataError if it is not finished."""
    marker = _read(join(folder, SUCCESS))
    if marker is None:
        raise DataError("not a finished night", where=folder, found=f"no {SUCCESS}")
    return [join(folder, name) for name in marker["files"]]


def latest_before(folder: str) -> str | None:
    """The last finished night before the one in ``folder``, beside it, if there is one."""
    output, _, this = folder.rpartition("/")
    names = {file.uri.removeprefix(f"{output}/").partition("/")[0] for file in storage.all_files(output)}
    for name in sorted((name for name in names if name.startswith("dt=") and name < this), reverse=True):
        if marked_run(join(output, name)) is not None:
            return join(output, name)
    return None


def _read(uri: str) -> dict[str, Any] | None:
    """A JSON file of ours, if it is there; one that is none is not ours."""
    if not storage.exists(uri):
        return None
    try:
        content = json.loads(storage.read_bytes(uri))
    except ValueError:
        return None
    return content if isinstance(content, dict) and "run" in content else None


def _patiently(act: Callable[..., None], *arguments: Any) -> None:
    storage.patiently(lambda: act(*arguments), storage.PATIENCE)


def _same(known: Mapping[str, Any], identity: Mapping[str, Any]) -> bool:
    return all(known.get(name) == value for name, value in identity.items())


def _groups(files: Sequence[FileInfo], target_bytes: int) -> list[list[str]]:
    """Consecutive files of together about ``target_bytes``."""
    groups: list[list[str]] = []
    size = 0
    for file in files:
        if not groups or size + file.size > target_bytes:
            groups.append([])
            size = 0
        groups[-1].append(file.uri)
        size += file.size
    return groups


@ray.remote(num_cpus=1)
def _merge(sources: list[str], target: str) -> None:
    storage.patiently(lambda: _write_merged(sources, target), storage.PATIENCE)


def _write_merged(sources: Sequence[str], target: str) -> None:
    with storage.new_file(target) as file:
        writer: pq.ParquetWriter | None = None
        waiting: list[pa.Table] = []
        for source in [*sources, None]:
            if source is not None:
                waiting.append(storage.read_parquet(source).replace_schema_metadata(None))
            if waiting and (source is None or sum(map(len, waiting)) >= _ROWS):
                writer = writer or pq.ParquetWriter(file, waiting[0].schema, compression="zstd")
                writer.write_table(pa.concat_tables(waiting))
                waiting = []
        if writer is not None:
            writer.close()
