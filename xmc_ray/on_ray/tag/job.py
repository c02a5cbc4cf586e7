"""The tagging job: documents in, their best labels out, as Parquet in a folder for each day (see `nights` and `output`).

    scan      one pass over the input: rows, duplicates, what the night before has already tagged; cut into pieces
    gate      machines for the model, and its quality, only if there is something to tag
    pieces    read and tokenise (CPU tasks) -> tag (actors) -> write (CPU tasks), each piece atomically
    publish   pieces are merged into files of a good size, then manifest, report and, last, _SUCCESS
    commit    the finished night becomes a snapshot of an Iceberg table, if one is named

The same command resumes a run that was killed: the plan is kept, and a piece that is written is done.
"""

import time
from collections.abc import Callable, Container, Iterator
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from xmc_ray import storage
from xmc_ray.bundle.members import Members
from xmc_ray.data.documents import Rules
from xmc_ray.data.filters import LabelFilters, resolve
from xmc_ray.data.hierarchy import Hierarchy
from xmc_ray.data.input_columns import check_columns
from xmc_ray.data.inputs import Inputs, list_inputs
from xmc_ray.data.line_ranges import packed_notice
from xmc_ray.data.rejects import Rejects
from xmc_ray.data.tag_hierarchy import TagHierarchy
from xmc_ray.errors import DataError
from xmc_ray.model.precision import settled
from xmc_ray.on_ray.actors import load_predictor, settle_scoring
from xmc_ray.on_ray.evaluate import pass_gate
from xmc_ray.on_ray.pool import PoolConfig, ScoringConfig
from xmc_ray.on_ray.predicted import NothingToPredict, made_by
from xmc_ray.on_ray.session import own_errors, submission_id
from xmc_ray.on_ray.tag import nights, output, tables
from xmc_ray.on_ray.tag.config import TagConfig
from xmc_ray.on_ray.tag.gauges import Board
from xmc_ray.on_ray.tag.output import Night
from xmc_ray.on_ray.tag.pieces import (
    PieceCopier,
    PieceReader,
    PieceWriter,
    Summary,
    TagColumns,
    check_made_by,
    finished,
    some_texts,
)
from xmc_ray.on_ray.tag.plan import Plan, piece_name
from xmc_ray.on_ray.tag.progress import Pace, progress
from xmc_ray.on_ray.tag.rerank import Reranked
from xmc_ray.on_ray.tag.retention import decide, remove_nights
from xmc_ray.on_ray.tag.reuse import Previous
from xmc_ray.on_ray.tag.runner import Runner
from xmc_ray.on_ray.tag.scan import scan
from xmc_ray.on_ray.tag.status import Reporter, Status, reported
from xmc_ray.on_ray.tag.totals import Totals
from xmc_ray.settings import fixed_settings
from xmc_ray.storage.lease import Lease, held
from xmc_ray.storage.places import check_apart, check_writable

if TYPE_CHECKING:
    from xmc_ray.storage.iceberg import DayTable

_PIECES_AN_ACTOR = 12  # at least, so that no actor waits long at the end
_PIECE_ROWS, _PIECE_TAGS = 1 << 16, 1 << 24  # of a piece at most, whatever the settings
_MEASURED, _PIECES_MEASURED = 256, 8  # documents that scoring is measured on, of the first pieces
_SCORING, _ATTEMPTS = "scoring.json", "attempts.json"
_NO_MODEL = PoolConfig(min=1, max=1, cpus=1, threads=1)  # for pieces of rejects alone


def tag(config: TagConfig, runner: Runner | None = None) -> str:
    """Tag the catalogue and return the night's folder (see `nights`); a finished run is left as it is.

    ``runner``: Ray, if not given.

    Raises ConfigError when the folder holds another run, DataError when too much is rejected or the labels have moved too far,
    ModelError for a bundle that cannot be read or does not pass the gate. Nothing is written before the settings, the input
    and the bundle have been checked, but that a night of the old layout is moved; what is written stays for the next attempt.
    """
    started, runner = datetime.now(timezone.utc), runner or Runner()
    status = Status(config.date or str(started.date()))
    reporter = Reporter(status, partial(_board, runner, config.output, status.date))
    with reported(reporter):
        folder = _tag(config, runner, started, reporter)
    if config.keep.nights is not None:  # whatever becomes of it, the night is finished
        for gone in remove_nights(config.output, decide(config.output, config.keep.nights, made=folder)):
            print(f"removed: {gone}", flush=True)
    return folder


def _tag(config: TagConfig, runner: Runner, started: datetime, reporter: Reporter) -> str:
    folder = nights.folder_of(config.output, reporter.status.date)
    previous = None if config.previous == "last" else config.previous
    gate = None if config.gate.documents is None else config.gate.documents.uri
    reads: dict[str, str | list[str] | None] = {"documents.uri": config.documents.uri, "bundle": config.bundle}
    reads |= {"previous": previous, "gate.documents.uri": gate, "filters.table": config.filters.table}
    reads |= {"hierarchy.table": None if config.hierarchy is None else config.hierarchy.table}
    for place in (folder, nights.tags_folder(folder)):
        check_apart({"output": place}, reads)
    members, inputs = Members.read(config.bundle), list_inputs(config.documents)
    bundles = members.uris if isinstance(config.bundle, list) else members.uris[0]
    config = replace(config, bundle=bundles)  # of a hub, at the commit that was looked at
    files = inputs.files
    if config.min_precision is not None:
        members.check_precision()
    if config.rerank is not None:
        config.rerank.resolve()
    hierarchy = None if config.hierarchy is None else config.hierarchy.read()
    identity: dict[str, Any] = {"bundle": members.fingerprint, "input": [asdict(file) for file in files]}
    identity |= {"config": fixed_settings(config)} | ({} if hierarchy is None else {"hierarchy": hierarchy.digest})
    identity |= made_by(members.computed_by(config.model.precision, config.pool.device))
    filters = resolve(config.filters, members.labels()) if config.filters.is_set else None
    identity |= {} if filters is None else {"filters": filters.digest}
    table = tables.open_table(config.table)
    output.take_over(folder)
    if Night.open(folder, identity, config.overwrite) is None:
        return _finished_before(folder, table, config.pool, runner)
    if inputs.left_out:
        print(inputs, flush=True)
    if notice := packed_notice(files):
        print(notice, flush=True)
    for place in (folder, nights.tags_folder(folder)):
        check_writable(place)
    column = None if filters is None else filters.documents_column
    rules = Rules.of(members.reading(config.documents), labelled=False, filters=column)
    check_columns(files, rules)
    with held(folder, job=submission_id()) as lease, own_errors():
        night = Night.open(folder, identity, config.overwrite)  # once more: another job may just have finished here
        if night is None:
            return _finished_before(folder, table, config.pool, runner, lease)
        night.check_place()
        gate_passes = partial(pass_gate, config.gate, members, config.pool, config.model)
        config = replace(config, pool=runner.start(config.pool))
        reporter.begin()
        plan = night.plan()
        before = Previous(plan.previous, plan.not_reused) if plan else Previous.find(config.previous, folder, identity)
        tagging = _Tagging(
            config, night, members, inputs, hierarchy, before, lease, runner, reporter.status, gate_passes, rules, filters
        )
        manifest = tagging.finish(plan, started)
        print(_report(manifest, nights.tags_folder(folder)), flush=True)
        if table is not None:
            tables.commit(table, folder, runner, lease.confirm)
    reporter.status.end("finished")
    return folder


def _board(runner: Runner, output: str, date: str, is_night: bool) -> Board | None:
    """An attempt that ends before it holds the night's folder must not replace the board of one that does."""
    return runner.board(output if is_night else f"{output} (before it began)", {"output": output, "date": date})


def _finished_before(
    folder: str, table: "DayTable | None", pool: PoolConfig, runner: Runner, lease: Lease | None = None
) -> str:
    """Do what a driver that was killed after ``_SUCCESS`` has left to do. ``lease``: if the folder is held already."""
    is_due = table is not None and tables.is_due(table, folder)
    if is_due or output.is_unsettled(folder):
        with nullcontext(lease) if lease else held(folder, job=submission_id()) as mine, own_errors():
            if output.is_unsettled(folder):
                output.settle(folder)
            if table is not None and is_due:
                runner.start(pool)
                tables.commit(table, folder, runner, mine.confirm)
    print(f"finished before, nothing {'else ' if is_due else ''}to do: {nights.tags_folder(folder)}", flush=True)
    return folder


@dataclass
class _Tagging:
    """A night while it is computed."""

    config: TagConfig
    night: Night
    members: Members
    inputs: Inputs
    graph: Hierarchy | None
    previous: Previous
    lease: Lease
    runner: Runner
    status: Status
    pass_gate: Callable[[], None]
    rules: Rules
    filters: LabelFilters | None

    def __post_init__(self) -> None:
        index, self.tokenizers = self.members.fetch()
        labels = index.select(["label", "name", "count"])
        least = self.config.min_precision
        thresholds_L = None if least is None else self.members.thresholds(least)
        self.never = None if thresholds_L is None else int(np.isinf(thresholds_L).sum())
        self.n_labels, self.k = len(labels), min(self.config.k, len(labels))
        self.hierarchy: TagHierarchy | None = None
        if self.graph is not None and self.config.hierarchy is not None:
            self.hierarchy = TagHierarchy(self.graph, labels, self.config.hierarchy)
            labels = self.hierarchy.labels
        fingerprint, least = self.members.fingerprint, self.config.min_score
        self.columns = TagColumns(labels, fingerprint, least, thresholds_L, self.filters, self.hierarchy)
        self.totals = Totals(labels, self.hierarchy.is_narrowest if self.hierarchy else None)
        self.made_by = {name: self.night.identity[name] for name in ("release", "arithmetic")}
        self.model = replace(self.config.model, precision=settled(self.config.model.precision, self.config.pool.device))
        computed_by = self.members.computed_by(self.model.precision, self.config.pool.device)
        warnings = self.previous.not_reused, self.members.calibration_warning(computed_by)
        self.warnings = [warning for warning in warnings if warning is not None]

    def finish(self, plan: Plan | None, started: datetime) -> dict[str, Any]:
        """Do the remaining pieces, publish, and return the manifest. ``plan``: that of an earlier attempt."""
        clock = time.monotonic()
        before_this = self.previous.folder or nights.latest_before(self.night.folder)  # now, since it may not be readable
        known, done = plan, self._resume() if plan else set()
        plan = plan or self._plan()
        before, groups = self.totals.documents, plan.tasks(done)
        self._announce(plan, before)
        needs_model = bool(groups) and plan.to_tag > 0
        clock += self._prepare(needs_model)
        self.night.begin()
        if known is None:
            plan.save(self.night.work)
        storage.patiently(storage.write_json, storage.join(self.night.work, _ATTEMPTS), {"attempts": self.status.attempt})
        for summary in self._copied(plan, done):
            self._add(plan, summary)
        model = self._model(plan, needs_model)
        if groups:
            self.status.enter("tagging")
            self.status.pace = Pace(plan.to_tag, self.totals.counts["tagged"], self.config.pool.max)
            with progress(self.status.pace, self.totals):
                for summary in self._tagged(groups, model if needs_model else None):
                    self.status.pace.add(summary["tagged"])
                    self._add(plan, summary)
        self._check_rejects(plan)
        if self.totals.documents != plan.rows:
            raise DataError("rows were lost", where=self.night.folder, found=self.totals.documents, expected=plan.rows)
        manifest = {
            "run": self.night.run,
            **self.night.identity,
            "left_out": {kind: part._asdict() for kind, part in self.inputs.left_out.items()},
            "previous": self.previous.folder,
            "not_reused": self.previous.not_reused,
            "scoring": model.scoring,
            "calibrated": all(self.members.calibrated) and self.config.rerank is None,
            "calibrated_by": self.members.calibrated_by,
            "min_precision": self.config.min_precision,
            "labels_never_tagged": self.never,
            "started": started.isoformat(timespec="seconds"),
            "ended": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "documents_per_second": round((self.totals.documents - before) / (time.monotonic() - clock), 1),
            **self.totals.manifest(),
        }
        title = self.night.folder.rpartition("/")[2]
        in_vain = self.totals.filters_in_vain()
        page, warnings = self.totals.close(title, manifest, before_this, self.config.drift, [*self.warnings, *in_vain])
        for warning in [*in_vain, *warnings]:
            print(f"warning: {warning}", flush=True)
        label_counts = self.totals.label_table()
        confirm, size = self.lease.confirm, self.config.target_bytes
        self.status.drift = manifest["drift"]
        self.status.enter("publishing")
        manifest = self.night.publish(plan, size, manifest, page, label_counts, self.runner, confirm, before_this)
        if manifest["no_changes"] and before_this:
            print(f"warning: no changes are told: {manifest['no_changes']}", flush=True)
        return manifest

    def _resume(self) -> set[str]:
        """Add what earlier attempts have done, and return the names of its pieces."""
        with suppress(DataError):  # an attempt of an earlier version left no such file
            self.status.attempt = 1 + storage.read_json(storage.join(self.night.work, _ATTEMPTS))["attempts"]
        done = set()
        for name, summary in finished(self.night.work):
            check_made_by(summary["made_by"], self.made_by, storage.join(self.night.work, "pieces", name))
            self.totals.add(summary)
            done.add(name)
        return done

    def _plan(self) -> Plan:
        self.status.enter("census")
        tags = nights.tag_files(self.previous.folder) if self.previous.folder else []
        pieces = _PIECES_AN_ACTOR * self.config.pool.max
        n_tags = min(self.config.n_listed, self.n_labels) * (1 + (self.hierarchy.most_ancestors if self.hierarchy else 0))
        rows = max(1, min(self.config.commit_rows // 2, _PIECE_ROWS, _PIECE_TAGS // n_tags))
        plan = scan(self.inputs.files, self.rules, tags, rows, pieces, self.config.max_reject_share, self.runner)
        return replace(plan, previous=self.previous.folder, not_reused=self.previous.not_reused)

    def _announce(self, plan: Plan, before: int) -> None:
        """Say what there is to do, and what to mind."""
        self.status.rows, self.status.to_tag, self.status.totals = plan.rows, plan.to_tag, self.totals
        print(f"plan: {plan.rows:,} rows, {plan.to_tag:,} to tag in {len(plan.pieces):,} pieces", flush=True)
        for note in self.hierarchy.notes if self.hierarchy else []:
            print(f"hierarchy: {note}", flush=True)
        for warning in self.warnings:
            print(f"warning: {warning}", flush=True)
        if self.never:
            of = f"{self.never:,} of {self.n_labels:,} labels are never assigned"
            print(f"warning: {of}: no threshold reaches min_precision = {self.config.min_precision}", flush=True)
        if before:
            print(f"resuming after {before:,} of {plan.rows:,} documents: {self.night.folder}", flush=True)

    def _prepare(self, needs_model: bool) -> float:
        """Wait for machines, and pass the gate: both cost, and a night that tags nothing needs neither. The seconds it took."""
        began = time.monotonic()
        if needs_model:
            self.status.enter("room")
            self.runner.make_room(self.config.pool)
        if self.config.gate.documents is not None:
            self.status.enter("gate", "" if needs_model else "skipped, since the bundle tags nothing")
            if needs_model:
                self.pass_gate()
        return time.monotonic() - began

    def _add(self, plan: Plan, summary: Summary) -> None:
        """Add a piece that has just been done."""
        self.totals.add(summary)
        self.status.advance()
        self._check_rejects(plan)
        self.lease.check()

    def _copied(self, plan: Plan, done: Container[str]) -> Iterator[Summary]:
        """Copy the tags that are reused and not copied yet; yields the summary of each piece."""
        copies = [row for row in plan.reused.to_pylist() if piece_name("r", row["number"]) not in done]
        if copies:
            self.status.enter("reusing", f"{sum(row['rows'] for row in copies):,} documents of {self.previous.folder}")
            copy = self.runner.put(PieceCopier(self.night.work, self.columns, self.made_by))
            for handle in [self.runner.submit(copy, row) for row in copies]:
                yield self.runner.get(handle)

    def _tagged(self, groups: list[pa.Table], model: ScoringConfig | None) -> Iterator[Summary]:
        """Do pieces of rows to tag; yields the summary of each. Without a model they have nothing but rejects."""
        rerank = self.config.rerank
        read = PieceReader(self.rules, self.tokenizers, keeps_text=rerank is not None and model is not None)
        write = PieceWriter(self.night.work, self.columns, self.made_by)
        if model is None:
            nothing = partial(NothingToPredict, len(self.tokenizers), self.k, self.made_by)
            yield from self.runner.run_pieces(groups, read, nothing, write, _NO_MODEL)
        else:
            load = partial(load_predictor, self.members, self.config.n_listed, self.config.pool, model, self.filters)
            predictor = load if rerank is None else partial(Reranked, load, rerank, self.config.k)
            yield from self.runner.run_pieces(groups, read, predictor, write, self.config.pool)

    def _model(self, plan: Plan, is_needed: bool) -> ScoringConfig:
        """Settled once a night, and as in the night whose tags are reused."""
        uri, model = storage.join(self.night.work, _SCORING), self.model
        if storage.exists(uri):
            return replace(model, scoring=storage.read_json(uri))
        before: Any = nights.manifest_of(self.previous.folder)["scoring"] if self.previous.folder else "auto"
        if before != "auto":  # which a night with nothing to tag has left open
            model = replace(model, scoring=before)
        elif is_needed:
            texts = some_texts(plan.pieces.slice(0, _PIECES_MEASURED), self.rules, _MEASURED)
            model = settle_scoring(model, self.members, texts, self.config.n_listed, self.config.pool)
        storage.write_json(uri, model.scoring)
        return model

    def _check_rejects(self, plan: Plan) -> None:
        """DataError if more is rejected than is allowed, however much is left to do."""
        size = sum(file.size for file in self.inputs.files)
        rejects = Rejects(size, plan.rows, plan.lost_bytes, self.totals.reasons)
        rejects.check(
            self.config.max_reject_share,
            where=storage.join(self.night.work, "rejects"),
            way_out="fix the input, or run again with a higher max_reject_share; finished pieces are kept",
        )


def _report(manifest: dict[str, Any], place: str) -> str:
    parts = [f"{name} {manifest[name]:,}" for name in ("reused", "rejected", "truncated", "untagged")]
    rate = f"{manifest['documents_per_second']:,} documents/s"
    return f"tagged {manifest['tagged']:,} of {manifest['in']:,} documents, {', '.join(parts)}, {rate}: {place}"
