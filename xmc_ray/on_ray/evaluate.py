"""Evaluation of a bundle on labelled documents, as a job and as the gate that a bundle has to pass before a night.

Documents are streamed through the same tokenising tasks and actors as in tagging; the driver adds up the metrics.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, ClassVar

import pyarrow.compute as pc
import ray.data

from xmc_ray import storage
from xmc_ray.bundle.members import Members
from xmc_ray.data.documents import DocumentsConfig
from xmc_ray.data.inputs import list_inputs
from xmc_ray.data.labels import LabelIndex, list_lengths
from xmc_ray.data.rejects import MAX_REJECT_SHARE, Rejects
from xmc_ray.errors import ConfigError, DataError, ModelError
from xmc_ray.metrics.at_k import Metrics, find_hits, summary, table
from xmc_ray.metrics.calibration import DEPTH, Reliability, Selection
from xmc_ray.model.precision import settled
from xmc_ray.on_ray.actors import predictions, settle_scoring
from xmc_ray.on_ray.pool import PoolConfig, ScoringConfig
from xmc_ray.on_ray.predicted import made_by, matrix
from xmc_ray.on_ray.session import arrow_batches, connect, make_room, own_errors
from xmc_ray.on_ray.stream import read_documents, tokenise
from xmc_ray.settings import Bounds, OpenShare, Settings, Share
from xmc_ray.storage.places import check_apart, check_writable

_MEASURED = 256  # documents that scoring is measured on


@dataclass(frozen=True, kw_only=True)
class EvaluationPoolConfig(PoolConfig):
    """The actors of an evaluation."""

    batch_rows: Annotated[int, Bounds(ge=1, le=1 << 16)] = 2048
    """Documents that an actor takes at a time and sorts by length."""


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(Settings):
    """Evaluate a bundle, or an ensemble of them, on labelled documents."""

    essentials: ClassVar = (
        "documents.uri",
        "bundle",
        "output",
        "documents.text",
        "documents.labels",
        "ks",
        "full",
        "min_precision",
        "pool.max",
        "pool.gpu",
    )

    documents: DocumentsConfig
    """The test split."""
    bundle: storage.Address | list[storage.Address]
    """Bundle folder, local or s3://, or a list of them whose scores are averaged."""
    output: storage.Address | None = None
    """Folder for metrics.json; if not given, the table is only printed."""
    ks: Annotated[list[Annotated[int, Bounds(ge=1, le=1000)]], Bounds(min_length=1)] = field(
        default_factory=lambda: [1, 3, 5, 10]
    )
    """Values of k at which metrics are computed."""
    full: bool = False
    """Print every metric of the total and of each band; without it the chief ones, which fit half a screen."""
    min_precision: OpenShare | None = None
    """Also evaluate the tags that pass the thresholds for this precision; needs calibrated bundles."""
    model: ScoringConfig = field(default_factory=ScoringConfig)
    max_reject_share: Share = MAX_REJECT_SHARE
    """Share of rejected documents above which the evaluation fails."""
    pool: EvaluationPoolConfig = field(default_factory=EvaluationPoolConfig)


def evaluate(config: EvaluateConfig) -> dict[str, Any]:
    """The evaluation job: the result of `evaluate_bundle`, printed as a table and written to ``metrics.json``.

    Raises ConfigError if that exists already, DataError when no document has a label that the bundle knows or too many are
    rejected.
    """
    if config.output is not None:
        metrics = storage.join(config.output, "metrics.json")
        if storage.exists(metrics):
            raise ConfigError(
                "metrics.json is there already", where=config.output, way_out="choose another output or remove it"
            )
        check_apart({"output": metrics}, {"documents.uri": config.documents.uri, "bundle": config.bundle})
        check_writable(config.output)
    started = time.monotonic()
    members, ks = Members.read(config.bundle), tuple(sorted(config.ks))
    limits = config.min_precision, config.max_reject_share
    result = evaluate_bundle(config.documents, members, config.pool, config.model, ks, *limits)
    print(table(result) if config.full else summary(result))
    print(_calibration_line(result["calibration"]))
    rate = result["documents"] / (time.monotonic() - started)
    print(f"{result['documents']:,} documents, {result['rejected']:,} rejected, {rate:,.0f} documents/s with start-up")
    if result["reasons"]:
        print("rejected: " + ", ".join(f"{reason} ({rows:,})" for reason, rows in result["reasons"].items()))
    if config.output is not None:
        storage.write_json(storage.join(config.output, "metrics.json"), result)
    return result


def evaluate_bundle(
    documents: DocumentsConfig,
    members: Members,
    pool: EvaluationPoolConfig,
    model: ScoringConfig | None = None,
    ks: tuple[int, ...] = (1, 3, 5, 10),
    min_precision: float | None = None,
    max_reject_share: float = MAX_REJECT_SHARE,
) -> dict[str, Any]:
    """Metrics of one bundle, or several whose scores are averaged, as a nested dict (see `Metrics.result`).

    True labels that the bundle does not know are left out; their number is ``unknown_labels``. ``calibration`` has ECE@5 and
    the effect of thresholds on the first `DEPTH` labels, whatever ``ks``, over documents with a known label. ``arithmetic`` and
    ``scoring`` say how scores were computed; prints a warning where calibrations are of another arithmetic.
    Raises DataError when there is no such document, and when more than ``max_reject_share`` is rejected.
    """
    documents, model = members.reading(documents), model or ScoringConfig()
    model = replace(model, precision=settled(model.precision, pool.device))
    computed_by = members.computed_by(model.precision, pool.device)
    selection = None if min_precision is None else Selection(members.thresholds(min_precision))
    index, tokenizers = members.fetch()
    labels = LabelIndex.from_table(index)
    warning = members.calibration_warning(computed_by)
    if warning:
        print(f"warning: {warning}", flush=True)
    metrics = Metrics(labels.counts, labels.n_documents, ks=ks)
    with own_errors():
        connect()
        make_room("actors", pool.min, pool.needs, pool.patience, beside=1)
        pool = replace(pool, max=pool.max or pool.min)  # a small file is one block, so one actor gets all of it
        inputs = list_inputs(documents)
        if inputs.left_out:
            print(inputs, flush=True)
        rejects = Rejects(sum(file.size for file in inputs.files))
        stream, reliability = read_documents(documents, labelled=True, files=inputs.files), Reliability()
        texts = _some_texts(stream) if model.scoring == "auto" else []
        model = settle_scoring(model, members, texts, max(*ks, DEPTH), pool)
        predicted = predictions(tokenise(stream, *tokenizers), members, max(*ks, DEPTH), pool, pool.batch_rows, model)
        counts = _count(predicted, labels, metrics, [reliability] if selection is None else [reliability, selection], rejects)
    way_out = "fix the documents, or run again with a higher max_reject_share"
    rejects.check(max_reject_share, where=documents.uri, way_out=way_out)
    result = metrics.result()
    if not result["total"]["documents"]:
        raise DataError("no document has a label that the bundle knows", where=documents.uri, found=counts)
    calibration = {"calibrated": all(members.calibrated), "by": members.calibrated_by, "ECE@5": reliability.result()}
    if selection is not None:
        calibration |= {"min_precision": min_precision} | selection.result()
    computed = {"bundle": members.fingerprint, "arithmetic": made_by(computed_by)["arithmetic"], "scoring": model.scoring}
    return result | counts | {"calibration": calibration} | computed


def _some_texts(documents: ray.data.Dataset) -> list[str]:
    """Texts of the first documents."""
    return [
        text
        for batch in arrow_batches(documents.limit(_MEASURED))
        for text in batch.filter(pc.is_null(batch["reason"]))["text"].to_pylist()
    ]


def _calibration_line(calibration: dict[str, Any]) -> str:
    kind = "calibrated" if calibration["calibrated"] else "not calibrated"
    shares = {name: calibration.get(name) for name in ("ECE@5", "precision", "coverage", "abstention")}
    known = ", ".join(f"{name} {100 * share:.2f}" for name, share in shares.items() if share is not None)
    never = f", {calibration['never']:,} labels are never assigned" if calibration.get("never") else ""
    return f"Scores are {kind}; {known}{never}"


def _count(
    predicted: ray.data.Dataset,
    labels: LabelIndex,
    metrics: Metrics,
    counted: Sequence[Reliability | Selection],
    rejects: Rejects,
) -> dict[str, Any]:
    """Add a stream of predictions to ``metrics``, ``counted`` and ``rejects``.

    All are sums, so neither order nor batches matter. Like ``metrics``, ``counted`` leaves out documents without a label that
    the bundle knows. Returns counts of documents, and of labels that the bundle does not know.
    """
    counts = dict.fromkeys(("documents", "truncated", "unknown_labels"), 0)
    for batch in arrow_batches(predicted):
        good = batch.filter(pc.is_null(batch["reason"]))
        lists = good["labels"].combine_chunks()
        truth = labels.encode(lists)
        ids = matrix(good, "ids")
        metrics.update(ids, truth)
        labelled, hits = list_lengths(truth) > 0, find_hits(ids, truth, len(labels))
        for part in counted:
            part.update(matrix(good, "probabilities")[labelled, :DEPTH], ids[labelled, :DEPTH], hits[labelled, :DEPTH])
        counts["documents"] += len(good)
        rejects.add(batch["reason"], pc.sum(batch["lost_bytes"]).as_py() or 0)
        counts["truncated"] += pc.sum(good["truncated"]).as_py() or 0
        counts["unknown_labels"] += len(pc.list_flatten(lists)) - len(truth.values)
    return counts | {"rejected": rejects.reasons.total(), "reasons": dict(rejects.reasons.most_common())}


@dataclass(frozen=True, kw_only=True)
class GateConfig(Settings):
    """Minimum quality that a bundle must reach on labelled documents before it tags anything."""

    documents: DocumentsConfig | None = None
    """Labelled documents; without them there is no gate."""
    at_least: dict[str, Share] = field(default_factory=dict)
    """Minimum value, 0 to 1, of each of some metrics, such as P@1."""
    max_reject_share: Share = MAX_REJECT_SHARE
    """Share of rejected labelled documents above which nothing is tagged."""

    def check(self) -> None:
        """Raises ConfigError if only one of the two is given."""
        if (self.documents is None) != (not self.at_least):
            raise ConfigError("gate.documents and gate.at_least require each other", found="only one of them")


def pass_gate(gate: GateConfig, members: Members, pool: PoolConfig, model: ScoringConfig) -> None:
    """Raises ModelError unless the bundle reaches ``gate.at_least``, ConfigError for a metric that does not exist."""
    if gate.documents is None:
        return
    own_pool, limit = EvaluationPoolConfig(**vars(pool)), gate.max_reject_share
    total = evaluate_bundle(gate.documents, members, own_pool, model, max_reject_share=limit)["total"]
    for name, least in gate.at_least.items():
        if name not in total:
            raise ConfigError("no such metric", where="gate.at_least", found=name, expected=", ".join(total))
        if total[name] < least:
            values = {"found": f"{name} {total[name]:.4f}", "expected": f"at least {least}"}
            way_out = "use the bundle of the night before, or train again"
            raise ModelError("the bundle does not pass the gate", where=", ".join(members.uris), **values, way_out=way_out)
    shown = ", ".join(f"{name} {total[name]:.4f}" for name in gate.at_least)
    print(f"the bundle passes the gate: {shown}", flush=True)
