"""The tagging job: documents in, their best labels out, as Parquet in a folder for each day (see `output`).

    scan      one pass over the input: rows, duplicates, what the night before has already tagged; cut into pieces
    pieces    read and tokenise (CPU tasks) -> tag (actors) -> write (CPU tasks), each piece atomically
    publish   pieces are merged into files of a good size, then manifest, report and, last, _SUCCESS

The same command resumes a run that was killed: the plan is kept, and a piece that is written is done.
"""

import time
from collections.abc import Container, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime, timezone
from functools import partial
from typing import Annotated, Any

import numpy as np
import pyarrow as pa

from xmc_ray import storage
from xmc_ray.bundle.ensemble import Members
from xmc_ray.data.documents import DocumentsConfig, Rules
from xmc_ray.data.inputs import Inputs, list_inputs
from xmc_ray.data.reader import check_columns
from xmc_ray.data.rejects import MAX_REJECT_SHARE, Rejects
from xmc_ray.errors import DataError
from xmc_ray.metrics.drift import DriftConfig
from xmc_ray.model.predict import settled
from xmc_ray.on_ray.evaluate import GateConfig, pass_gate
from xmc_ray.on_ray.meters import announce
from xmc_ray.on_ray.predictor import PoolConfig, Predictor, ScoringConfig, made_by, settle_scoring
from xmc_ray.on_ray.session import own_errors
from xmc_ray.on_ray.tag import output
from xmc_ray.on_ray.tag.output import Day, Night
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
from xmc_ray.on_ray.tag.runner import Runner
from xmc_ray.on_ray.tag.scan import scan
from xmc_ray.on_ray.tag.totals import Totals, progress
from xmc_ray.settings import MAY_CHANGE_ON_RESUME, Bounds, OpenShare, PositiveInt, Settings, Share, difference, fixed_settings
from xmc_ray.storage.address import PreviousNight
from xmc_ray.storage.lease import Lease, held
from xmc_ray.storage.places import check_apart, check_writable

_PIECES_A_TASK = 8  # neighbours that one task reads, so that a large row group is not read for each
_PIECES_AN_ACTOR = 12  # at least, so that no actor waits long at the end
_PIECE_ROWS, _PIECE_TAGS = 1 << 16, 1 << 24  # of a piece at most, whatever the settings
_MEASURED = 256  # documents that scoring is measured on
_SCORING = "scoring.json"


@dataclass(frozen=True, kw_only=True)
class TagConfig(Settings):
    """Tag a catalogue with a bundle, or with an ensemble of them."""

    documents: DocumentsConfig
    """The catalogue."""
    bundle: storage.Address | list[storage.Address]
    """Bundle folder, local or s3://, or a list of them whose scores are averaged."""
    output: storage.Address = field(metadata=MAY_CHANGE_ON_RESUME)
    """Folder that contains a folder for each day."""
    date: Day | None = field(default=None, metadata=MAY_CHANGE_ON_RESUME)
    """The day, YYYY-MM-DD or dt=YYYY-MM-DD, that names the folder; today (UTC) if not given."""
    previous: PreviousNight | None = None
    """A finished night whose tags are reused for unchanged documents: its folder, or `last`."""
    k: PositiveInt = 10
    """Maximum number of tags per document, at most all labels."""
    min_score: Share = 0.0
    """Minimum score of a tag."""
    min_precision: OpenShare | None = None
    """Drop tags below the threshold at which their label reaches this precision; needs calibrated bundles."""
    max_reject_share: Share = field(default=MAX_REJECT_SHARE, metadata=MAY_CHANGE_ON_RESUME)
    """Share of rejected documents above which the night fails."""
    overwrite: bool = field(default=False, metadata=MAY_CHANGE_ON_RESUME)
    """Tag again even if the day's folder holds another run, which stays until it is replaced at the end."""
    commit_rows: Annotated[int, Bounds(ge=2)] = field(default=20_000, metadata=MAY_CHANGE_ON_RESUME)
    """Maximum number of documents per actor that are lost when the job is killed."""
    target_bytes: PositiveInt = field(default=128 << 20, metadata=MAY_CHANGE_ON_RESUME)
    """Approximate size of the files of tags."""
    model: ScoringConfig = field(default_factory=ScoringConfig)
    pool: PoolConfig = field(default_factory=PoolConfig, metadata=MAY_CHANGE_ON_RESUME)
    gate: GateConfig = field(default_factory=GateConfig, metadata=MAY_CHANGE_ON_RESUME)
    drift: DriftConfig = field(default_factory=DriftConfig, metadata=MAY_CHANGE_ON_RESUME)


def tag(config: TagConfig, runner: Runner | None = None) -> str:
    """Tag the catalogue and return the folder of the day; a finished run is left as it is. ``runner``: Ray, if not given.

    Raises ConfigError when the folder holds another run, DataError when too much is rejected or the labels have moved too far,
    ModelError for a bundle that cannot be read or does not pass the gate. Nothing is written before the settings, the input
    and the bundle have been checked; what is written stays for the next attempt.
    """
    started = datetime.now(timezone.utc)
    runner = runner or Runner()
    folder = storage.join(config.output, f"dt={config.date or started.date()}")
    previous = None if config.previous == "last" else config.previous
    gate = None if config.gate.documents is None else config.gate.documents.uri
    reads: dict[str, str | list[str] | None] = {"documents.uri": config.documents.uri, "bundle": config.bundle}
    reads |= {"previous": previous, "gate.documents.uri": gate}
    check_apart({"output": folder}, reads)
    members, inputs = Members.read(config.bundle), list_inputs(config.documents)
    files = inputs.files
    if config.min_precision is not None:
        members.check_precision()
    identity = {"bundle": members.fingerprint, "input": [asdict(file) for file in files], "config": fixed_settings(config)}
    identity |= made_by(members.computed_by(config.model.precision, config.pool.device))
    if Night.open(folder, identity, config.overwrite) is None:
        if output.is_untidy(folder):
            with held(folder):
                output.tidy(folder)
        return _nothing_to_do(folder)
    if inputs.left_out:
        print(inputs, flush=True)
    check_writable(folder)
    check_columns(files, Rules.of(config.documents, labelled=False))
    with held(folder) as lease, own_errors():
        night = Night.open(folder, identity, config.overwrite)  # once more: another job may just have finished here
        if night is None:
            return _nothing_to_do(folder)
        pool = runner.start(config.pool)
        pass_gate(config.gate, members, config.pool, config.model)
        config = replace(config, pool=pool)
        plan = night.plan()
        before = _Previous(plan.previous, plan.not_reused) if plan else _Previous.find(config, folder, identity)
        manifest = _Tagging(config, night, members, inputs, before, lease, runner).finish(plan, started)
    print(_report(manifest, folder), flush=True)
    return folder


def _nothing_to_do(folder: str) -> str:
    print(f"finished before, nothing to do: {folder}", flush=True)
    return folder


@dataclass
class _Tagging:
    """A night while it is computed."""

    config: TagConfig
    night: Night
    members: Members
    inputs: Inputs
    previous: "_Previous"
    lease: Lease
    runner: Runner

    def __post_init__(self) -> None:
        self.rules = Rules.of(self.config.documents, labelled=False)
        index, self.tokenizers = self.members.fetch()
        labels = index.select(["label", "name", "count"])
        least = self.config.min_precision
        thresholds_L = None if least is None else self.members.thresholds(least)
        self.never = None if thresholds_L is None else int(np.isinf(thresholds_L).sum())
        self.columns = TagColumns(labels, self.members.fingerprint, self.config.min_score, thresholds_L)
        self.totals = Totals(labels)
        self.made_by = {name: self.night.identity[name] for name in ("release", "arithmetic")}
        self.model = replace(self.config.model, precision=settled(self.config.model.precision, self.config.pool.device))
        computed_by = self.members.computed_by(self.model.precision, self.config.pool.device)
        warnings = self.previous.not_reused, self.members.calibration_warning(computed_by)
        self.warnings = [warning for warning in warnings if warning is not None]

    def finish(self, plan: Plan | None, started: datetime) -> dict[str, Any]:
        """Do the remaining pieces, publish, and return the manifest. ``plan``: that of an earlier attempt."""
        clock = time.monotonic()
        before_this = self.previous.folder or output.latest_before(self.night.folder)  # now, since it may not be readable
        self.night.begin()
        plan = plan or self._plan()
        model, done = self._model(plan), set()
        for name, summary in finished(self.night.work):
            check_made_by(summary["made_by"], self.made_by, storage.join(self.night.work, "pieces", name))
            self.totals.add(summary)
            done.add(name)
        before = self.totals.documents
        for warning in self.warnings:
            print(f"warning: {warning}", flush=True)
        if self.never:
            of = f"{self.never:,} of {len(self.totals.labels):,} labels are never assigned"
            print(f"warning: {of}: no threshold reaches min_precision = {self.config.min_precision}", flush=True)
        if before:
            print(f"resuming after {before:,} of {plan.rows:,} documents: {self.night.folder}", flush=True)
        with progress(self.totals, plan.rows):
            for summary in self._remaining(plan, done, model):
                self.totals.add(summary)
                self._check_rejects(plan)
                self.lease.check()
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
            "calibrated": all(self.members.calibrated),
            "calibrated_by": self.members.calibrated_by,
            "min_precision": self.config.min_precision,
            "labels_never_tagged": self.never,
            "started": started.isoformat(timespec="seconds"),
            "ended": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "documents_per_second": round((self.totals.documents - before) / (time.monotonic() - clock), 1),
            **self.totals.manifest(),
        }
        title = self.night.folder.rpartition("/")[2]
        page, warnings = self.totals.close(title, manifest, before_this, self.config.drift, self.warnings)
        for warning in warnings:
            print(f"warning: {warning}", flush=True)
        label_counts = self.totals.label_table()
        confirm, size = self.lease.confirm, self.config.target_bytes
        manifest = self.night.publish(plan, size, manifest, page, label_counts, self.runner, confirm)
        announce(manifest["drift"])
        return manifest

    def _plan(self) -> Plan:
        tags = output.tag_files(self.previous.folder) if self.previous.folder else []
        pieces = _PIECES_AN_ACTOR * self.config.pool.max
        n_tags = min(self.config.k, len(self.totals.labels))
        rows = max(1, min(self.config.commit_rows // 2, _PIECE_ROWS, _PIECE_TAGS // n_tags))
        plan = scan(self.inputs.files, self.rules, tags, rows, pieces, self.config.max_reject_share, self.runner)
        plan = replace(plan, previous=self.previous.folder, not_reused=self.previous.not_reused)
        plan.save(self.night.work)
        return plan

    def _remaining(self, plan: Plan, done: Container[str], model: ScoringConfig) -> Iterator[Summary]:
        """Do the pieces that are not done yet; yields the summary of each."""
        copies = [row for row in plan.reused.to_pylist() if piece_name("r", row["number"]) not in done]
        copy = self.runner.put(PieceCopier(self.night.work, self.columns, self.made_by)) if copies else None
        for handle in [self.runner.submit(copy, row) for row in copies]:
            yield self.runner.get(handle)
        groups = _neighbours(plan.pieces, done)
        if groups:
            read, write = PieceReader(self.rules, self.tokenizers), PieceWriter(self.night.work, self.columns, self.made_by)
            predictor = partial(Predictor, self.members, self.config.k, self.config.pool, model)
            yield from self.runner.run_pieces(groups, read, predictor, write, self.config.pool)

    def _model(self, plan: Plan) -> ScoringConfig:
        """Settled once a night, and as in the night whose tags are reused."""
        uri, model = storage.join(self.night.work, _SCORING), self.model
        if storage.exists(uri):
            return replace(model, scoring=storage.read_json(uri))
        if self.previous.folder:
            model = replace(model, scoring=output.manifest_of(self.previous.folder)["scoring"])
        elif plan.pieces:
            texts = some_texts(plan.pieces.slice(0, _PIECES_A_TASK), self.rules, _MEASURED)
            model = settle_scoring(model, self.members, texts, self.config.k, self.config.pool)
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


@dataclass(frozen=True)
class _Previous:
    """``folder``: the night whose tags are reused; ``not_reused``: why there is none, though there might be one."""

    folder: str | None = None
    not_reused: str | None = None

    @classmethod
    def find(cls, config: TagConfig, this: str, identity: Mapping[str, Any]) -> "_Previous":
        """The night that the config asks for, if it was made as this one is made; prints why not."""
        if config.previous is None:
            return cls()
        folder = output.latest_before(this) if config.previous == "last" else config.previous
        if folder is None:
            print("nothing is reused: there is no finished night before this", flush=True)
            return cls()
        output.tag_files(folder)
        known, settings = output.manifest_of(folder), asdict(config)
        names = ("k", "min_score", "min_precision", "model")
        changed = difference({name: known["config"].get(name) for name in names}, {name: settings[name] for name in names})
        different = [changed[0]] if changed else []
        different += [name for name in ("bundle", "release", "arithmetic") if known.get(name) != identity[name]]
        if not different:
            return cls(folder)
        not_reused = f"nothing is reused: the night before had another {', '.join(different)}: {folder}"
        print(not_reused, flush=True)
        return cls(None, not_reused)


def _neighbours(pieces: pa.Table, done: Container[str]) -> list[pa.Table]:
    """The pieces that are not done, in groups of neighbours."""
    groups: list[list[int]] = []
    for row, number in enumerate(pieces["number"].to_pylist()):
        if piece_name("t", number) in done:
            continue
        if not groups or len(groups[-1]) >= _PIECES_A_TASK or groups[-1][-1] != row - 1:
            groups.append([])
        groups[-1].append(row)
    return [pieces.take(pa.array(group)) for group in groups]


def _report(manifest: dict[str, Any], folder: str) -> str:
    parts = [f"{name} {manifest[name]:,}" for name in ("reused", "rejected", "truncated", "untagged")]
    rate = f"{manifest['documents_per_second']:,} documents/s"
    return f"tagged {manifest['tagged']:,} of {manifest['in']:,} documents, {', '.join(parts)}, {rate}: {folder}"
