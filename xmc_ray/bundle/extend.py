"""Adds labels to a trained model, and takes some out of use, without further training.

Encoder, lexical branch, bottleneck and all existing rows stay as they are, so the scores of old labels do not change. New
labels get rows by `regression` from the documents that have them; the other documents are the negatives. A label that only has
a name gets its row from the name.

In group mode a label joins the group with the highest mean recall over its documents, if that is at least `join` and the group
has room; the others form new groups, with rows of their own in the recall head and a lift if the model has one. A label's row
is fitted on the documents that shortlist its group in prediction. New groups compete in recall: in grouped scoring, one can
displace an old group from a shortlist. A deprecated label keeps its id and is never predicted.

Letters: D documents, E known labels, F features or bottleneck, G groups, K shortlisted groups, L labels, N new labels, U new
groups.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import torch
from scipy import sparse
from torch import Tensor

from xmc_ray import storage
from xmc_ray.bundle.content import Bundle, changes, check_place, load_bundle, save_bundle
from xmc_ray.bundle.regression import Known, RowsConfig, Shortlisted, new_rows
from xmc_ray.data.documents import DocumentsConfig
from xmc_ray.data.fields import names_of
from xmc_ray.data.groups import LabelGroups, balanced_groups, label_incidence, unit_rows
from xmc_ray.data.labels import IntArray, LabelIndex, label_names, unique_in_rows
from xmc_ray.data.reader import read_rows
from xmc_ray.data.rejects import MAX_REJECT_SHARE
from xmc_ray.data.tables import read_label_names
from xmc_ray.errors import DataError
from xmc_ray.metrics.at_k import band_rows
from xmc_ray.model.lightxml import LightXML
from xmc_ray.model.linear import LinearConfig, LinearRanker
from xmc_ray.model.predict import PredictConfig, features
from xmc_ray.model.svm import Weights, examples_of, ranker_of, solved
from xmc_ray.settings import Settings, Share
from xmc_ray.storage.places import check_apart, check_writable

_KNOWN = 4096  # known labels, at most, that the map from names to rows is fitted on
_CELLS = 1 << 24  # (new label, group) cells, at most, that are in memory together
_DOCUMENTS = 1024  # documents whose recall scores are in memory together


@dataclass(frozen=True, kw_only=True)
class ExtendConfig(Settings):
    """Add labels to a bundle, or take some out of use, without training it again."""

    bundle: storage.Address
    """The bundle's folder, local or s3://; it is not changed."""
    output: storage.Address
    """Folder for the new bundle, empty or nonexistent."""
    documents: DocumentsConfig | None = None
    """Labelled documents, with new labels and without (the negatives). The features of all of them are in memory together."""
    label_names: storage.Source | None = None
    """Table (label, name): Parquet, CSV, TSV or JSON lines; a label in it that no document has is added from its name alone."""
    deprecate: list[str] = field(default_factory=list)
    """Labels that are never predicted again; they keep their ids."""
    max_reject_share: Share = MAX_REJECT_SHARE
    """Share of rejected documents above which nothing is added."""
    rows: RowsConfig = field(default_factory=RowsConfig)


class Extension(NamedTuple):
    """Training data of the new labels.

    ``labels``: old and new ones; ``x_DF``: features of the documents; ``y_DN``: sparse float32, 1 where a document has a new
    label; ``name_NF``: features of the new labels' names.
    """

    labels: LabelIndex
    x_DF: Tensor
    y_DN: sparse.csr_array
    name_NF: Tensor


def extend_bundle(config: ExtendConfig) -> str:
    """Extend, save, and return the new bundle's fingerprint. Raises ConfigError if there is something at ``output``."""
    documents = None if config.documents is None else config.documents.uri
    check_apart(
        {"output": config.output},
        {"bundle": config.bundle, "documents.uri": documents, "label_names": config.label_names},
    )
    check_place(config.output)
    check_writable(config.output)
    names = read_label_names(config.label_names)
    bundle = load_bundle(config.bundle)
    texts, lists = pa.array([], pa.string()), pa.array([], pa.list_(pa.string()))
    if config.documents is not None:
        read = config.documents.with_fields(names_of(bundle.tokenizer.fields))
        rows = read_rows(read, labelled=True, max_reject_share=config.max_reject_share)
        table = pa.concat_tables(part.select(["text", "labels"]) for part in rows)
        texts, lists = (table[name].combine_chunks() for name in ("text", "labels"))
    extended = extend(bundle, texts, lists, names, config.deprecate, config.rows, PredictConfig())
    fingerprint = save_bundle(extended, config.output)
    print(f"{changes(extended.metrics['extension'])}, of {len(extended.labels):,} labels in all")
    print(f"bundle {fingerprint}: {config.output}")
    return fingerprint


def extend(
    bundle: Bundle,
    texts: pa.Array,
    lists: pa.ListArray,
    names: pa.Table | None = None,
    deprecate: Sequence[str] = (),
    config: RowsConfig | None = None,
    prediction: PredictConfig | None = None,
) -> Bundle:
    """``bundle`` with the labels added that are new in ``lists`` (list<string>[D], of ``texts``, string[D]) or in ``names``.

    ``names`` has columns ``label`` and ``name``. ``bundle`` is not changed; encoder, lexical branch and bottleneck are shared
    with it. The new one is not evaluated: the metrics of ``bundle`` become its ``metrics["extension"]["before"]``.
    Raises ConfigError for an unknown deprecated label, DataError when nothing is new and nothing deprecated.
    """
    config, prediction = config or RowsConfig(), prediction or PredictConfig()
    deprecated = _ids(bundle.labels, deprecate)
    labels = _with_new(bundle.labels, lists, names)
    n_old, n_new = len(bundle.labels), len(labels) - len(bundle.labels)
    if not n_new and not len(deprecated):
        raise DataError("nothing to add", found=f"{len(lists)} documents, no new label", way_out="give documents of new labels")
    ids = labels.encode(lists)
    y_DN = label_incidence(ids, len(labels))[:, n_old:]
    tokens = bundle.tokenizer.encode(texts)[0]
    names_of_new = bundle.tokenizer.encode(_texts(labels, np.arange(n_old, len(labels))))[0]
    x_DF, name_NF = (features(bundle.model, part, prediction) for part in (tokens, names_of_new))
    new = Extension(labels, x_DF, y_DN, name_NF)
    groups = bundle.groups if not n_new else _extended_groups(bundle, new, config)
    model = _grown(bundle.model, groups, labels)
    if n_new:
        _fit_new_rows(bundle, model, groups, new, config, prediction)
    if (ranker := bundle.model.linear) is not None:
        documents = pa.table({"tokens": tokens, "labels": ids})
        model.linear = _extended_ranker(ranker, model, documents, prediction) if n_new else ranker
    model.disable(deprecated)
    counts = {"labels from documents": int((labels.counts[n_old:] > 0).sum()), "deprecated": len(deprecated)}
    counts["labels from names alone"] = n_new - counts["labels from documents"]
    metrics: dict[str, Any] = {"extension": {"of": bundle.fingerprint, **counts, "before": bundle.metrics}}
    if "feedback" in bundle.metrics:  # what it was trained with, still
        metrics["feedback"] = bundle.metrics["feedback"]
    calibration = bundle.calibration
    if calibration is not None:
        calibration = replace(calibration, band_L=band_rows(labels.counts))
    grown = replace(bundle, model=model, labels=labels, groups=groups, calibration=calibration)
    return replace(grown, metrics=metrics, fingerprint="")


# -- labels --------------------------------------------------------------------------------------------------------------


def _with_new(old: LabelIndex, lists: pa.ListArray, names: pa.Table | None) -> LabelIndex:
    """Old labels with their ids, counts and names; then those new in documents, most frequent first; then those in names.

    The number of documents is that of training or of ``lists``, whichever is larger.
    """
    values = pc.list_flatten(unique_in_rows(lists)).cast(pa.string())
    new = pa.table({"label": values.filter(pc.invert(pc.is_in(values, value_set=old.labels)))})
    new = new.group_by("label").aggregate([([], "count_all")]).sort_by([("count_all", "descending"), ("label", "ascending")])
    fresh, counts = new["label"].combine_chunks(), new["count_all"].to_numpy()
    if names is not None:
        names = label_names(names)
        old = replace(old, names=pc.coalesce(old.names, old.with_names(names).names))
        named = names["label"].combine_chunks()
        named = named.filter(pc.invert(pc.is_in(named, value_set=pa.concat_arrays([old.labels, fresh]))))
        fresh, counts = pa.concat_arrays([fresh, named]), np.concatenate([counts, np.zeros(len(named), np.int64)])
    index = LabelIndex(fresh, counts, pa.nulls(len(fresh), pa.string()), 0)
    index = index if names is None else index.with_names(names)
    return LabelIndex(
        pa.concat_arrays([old.labels, fresh]),
        np.concatenate([old.counts, counts]),
        pa.concat_arrays([old.names, index.names]),
        max(old.n_documents, len(lists)),
    )


def _ids(labels: LabelIndex, names: Sequence[str]) -> IntArray:
    """The ids of labels; ConfigError for the first one that is not in the index, with suggestions."""
    ids = pc.index_in(pa.array(names, pa.string()), value_set=labels.labels)
    if ids.null_count:
        labels.find(names[pc.is_null(ids).index(True).as_py()])
    return np.asarray(ids, np.int64)


def _texts(labels: LabelIndex, ids: IntArray) -> pa.Array:
    """string[n]: the names of labels; the label itself where it has none."""
    return pc.coalesce(labels.names.take(pa.array(ids)), labels.labels.take(pa.array(ids)))


# -- groups --------------------------------------------------------------------------------------------------------------


def _extended_groups(bundle: Bundle, new: Extension, config: RowsConfig) -> LabelGroups:
    """The groups of old and new labels; in flat mode every label is a group."""
    old = bundle.groups
    if old.flat:
        return LabelGroups(np.arange(len(new.labels)))
    assert bundle.model.table is not None
    only_named_N = new.y_DN.sum(axis=0) == 0
    evidence_DF = torch.cat([new.x_DF, new.name_NF[torch.from_numpy(only_named_N)]])
    of_names = sparse.eye_array(len(only_named_N), format="csr", dtype=np.float32)[np.flatnonzero(only_named_N)]
    share_DN = sparse.vstack([new.y_DN, of_names]).tocsc()
    share_DN = share_DN @ sparse.diags_array(1 / share_DN.sum(axis=0), dtype=np.float32)

    free_G, step = bundle.model.table.places - old.sizes_G, max(1, _CELLS // len(old))
    blocks = [share_DN[:, first : first + step] for first in range(0, len(only_named_N), step)]
    means = (_mean_recall(bundle.model, evidence_DF, share_Dn.tocsr()) for share_Dn in blocks)
    group_N = np.concatenate([joined(recall_nG, free_G, config.join) for recall_nG in means])
    left = np.flatnonzero(group_N < 0)
    if len(left):
        centres_NF = unit_rows(sparse.csr_array(share_DN[:, left].T @ evidence_DF.numpy()))
        group_N[left] = len(old) + balanced_groups(centres_NF, int(old.sizes_G.max()), seed=0)
    return LabelGroups(np.concatenate([old.group_L, group_N]))


def _mean_recall(model: LightXML, x_DF: Tensor, share_DN: sparse.csr_array) -> npt.NDArray[np.float32]:
    """float32[N, G]: the mean recall of each group over the documents of each label, whose shares in the mean are given."""
    used, mean_NG = np.flatnonzero(np.diff(share_DN.indptr)), np.zeros((share_DN.shape[1], model.recall.n_groups), np.float32)
    for first in range(0, len(used), _DOCUMENTS):
        here = used[first : first + _DOCUMENTS]
        mean_NG += share_DN[here].T @ _recall(model, x_DF[here]).sigmoid().numpy()
    return mean_NG


def joined(recall_NG: npt.NDArray[np.float32], free_G: IntArray, least: float) -> IntArray:
    """int64[N]: for one label after the other, the group with the highest recall among those with a free place.

    -1 where that recall is below ``least``. ``free_G`` counts the free places, and is reduced by those that are taken.
    """
    group_N = np.full(len(recall_NG), -1, np.int64)
    for label, recall_G in enumerate(recall_NG):
        group = int(np.where(free_G > 0, recall_G, -1).argmax())
        if free_G[group] > 0 and recall_G[group] >= least:
            group_N[label] = group
            free_G[group] -= 1
    return group_N


# -- rows ----------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def _grown(model: LightXML, groups: LabelGroups, labels: LabelIndex) -> LightXML:
    """``model`` with more ``groups`` and ``labels``, the first of which are its own; the rows of the others are random."""
    grown = LightXML(model.encoder, groups, model.config, lexical=model.lexical)
    grown.start_from_counts(labels.counts, labels.n_documents)  # for the lift of new groups
    grown.bottleneck = model.bottleneck
    for rows, before in zip(grown.heads.values(), model.heads.values(), strict=True):
        own = tuple(map(slice, before.bias.shape))
        rows.weight[own], rows.bias[own] = before.weight.to(rows.weight.device), before.bias.to(rows.bias.device)
    if grown.recall.lift is not None and model.recall.lift is not None:
        grown.recall.lift[: len(model.recall.lift)] = model.recall.lift.to(grown.recall.lift.device)
    return grown.to(model.recall.weight.device).eval()


@torch.no_grad()
def _fit_new_rows(
    bundle: Bundle, model: LightXML, groups: LabelGroups, new: Extension, config: RowsConfig, prediction: PredictConfig
) -> None:
    """Fit the rows of new groups in the recall head of ``model``, and of new labels in its table."""
    n_old, first = len(bundle.labels), len(bundle.groups)
    known_E = np.linspace(0, n_old - 1, min(n_old, _KNOWN)).astype(np.int64)
    group_E, group_N = bundle.groups.group_L[known_E], groups.group_L[n_old:]
    name_EF = features(bundle.model, bundle.tokenizer.encode(_texts(bundle.labels, known_E))[0], prediction)
    population = new.labels.n_documents

    n_groups = len(groups) - first
    if n_groups:
        inside = group_N >= first
        member_NU = sparse.csr_array(
            (np.ones(inside.sum()), (np.flatnonzero(inside), group_N[inside] - first)), shape=(len(group_N), n_groups)
        )
        y_DU = ((new.y_DN @ member_NU) > 0).astype(np.float32)
        in_use_U, of_U = np.unique(group_E, return_inverse=True)
        known = Known(_means(name_EF, of_U), *(part[in_use_U].cpu() for part in (model.recall.weight, model.recall.bias)))
        names_UF = _means(new.name_NF[inside], group_N[inside] - first)
        rows = new_rows(new.x_DF, y_DU.tocsc(), None, names_UF, known, population, config)
        for target, values in zip((model.recall.weight, model.recall.bias), rows, strict=True):
            target[first:] = values.to(target)
    if model.table is None or model.bottleneck is None:
        return
    x_DH, name_NH, name_EH = (_narrow(model, part) for part in (new.x_DF, new.name_NF, name_EF))
    shortlist_DK = torch.cat([_recall(model, part).topk(model.shortlist).indices for part in new.x_DF.split(_DOCUMENTS)])
    slots = torch.from_numpy(groups.slot_L)
    old, added = ((torch.from_numpy(groups.group_L[part]), slots[part]) for part in (known_E, slice(n_old, None)))
    known = Known(name_EH, model.table.weight[old].float().cpu(), model.table.bias[old].cpu())
    pairs = Shortlisted(shortlist_DK, torch.from_numpy(group_N))
    rows = new_rows(x_DH, new.y_DN.tocsc(), pairs, name_NH, known, population, config)
    for target, values in zip((model.table.weight, model.table.bias), rows, strict=True):
        target[added] = values.to(target)


def _extended_ranker(old: LinearRanker, model: LightXML, documents: pa.Table, prediction: PredictConfig) -> LinearRanker:
    """A ranker that also knows the labels that ``model`` has on top of ``old``'s, from these ``documents``."""
    config = LinearConfig(candidates=old.candidates, weight=old.weight)
    examples = examples_of(model, documents, config, prediction)
    new = solved(examples, range(len(old.bias_L), len(model.group_L)), config, torch.get_num_threads())
    sizes = old.start_L1.diff().cpu().numpy()
    before = Weights(sizes, *(part.cpu().numpy() for part in (old.column_W, old.weight_W, old.bias_L)))
    return ranker_of([before, new], config).to(old.bias_L.device)


def _narrow(model: LightXML, x_DF: Tensor) -> Tensor:
    assert model.bottleneck is not None
    vectors_DH: Tensor = model.bottleneck(x_DF.to(model.recall.weight.device))
    return vectors_DH.float().cpu()


def _recall(model: LightXML, x_DF: Tensor) -> Tensor:
    return model.recall.logits(x_DF.to(model.recall.weight.device)).float().cpu()


def _means(x_EF: Tensor, place_E: IntArray) -> Tensor:
    """float32[n, F]: the mean of the rows with the same ``place_E``, for places 0 to n - 1, each of which occurs."""
    sums_NF = x_EF.new_zeros(int(place_E.max()) + 1, x_EF.shape[1]).index_add_(0, torch.from_numpy(place_E), x_EF)
    return sums_NF / torch.from_numpy(np.bincount(place_E))[:, None]
