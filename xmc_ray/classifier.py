"""Fit, predict, evaluate, save and load in one process: the whole method without Ray.

    encoder = FitConfig(encoder=EncoderConfig(name="..."))
    classifier = XMCClassifier.fit(texts, labels, config=encoder, minutes=10)   # the best recipe in this time
    classifier.predict(["a new text"], k=5)         # [[("a label", 0.93), ...]]
    classifier.save("my-bundle")

Texts of a model with fields (`TextConfig.fields`) are mappings such as {"title": "...", "body": "..."}, or a table of columns.
The jobs on Ray call the same functions.
"""

import math
import os
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from xmc_ray import storage
from xmc_ray.bundle.content import Bundle, save_bundle
from xmc_ray.bundle.ensemble import Ensemble
from xmc_ray.bundle.explain import explain
from xmc_ray.bundle.explanation import Explanation
from xmc_ray.bundle.extend import extend
from xmc_ray.bundle.hub import upload
from xmc_ray.bundle.regression import RowsConfig
from xmc_ray.callbacks.callback import Callback
from xmc_ray.callbacks.calls import check_callbacks
from xmc_ray.data.columns import Texts, document_columns, id_column, label_column, listed, name_table, text_column
from xmc_ray.data.filters import DocumentFilters, FiltersConfig, resolve
from xmc_ray.data.labels import list_lengths
from xmc_ray.data.tag_hierarchy import HierarchyConfig, TagHierarchy
from xmc_ray.errors import ConfigError, DataError
from xmc_ray.fitting import Documents, fit
from xmc_ray.metrics.at_k import Metrics
from xmc_ray.metrics.calibration import Calibration
from xmc_ray.model.predict import PredictConfig, computed_by
from xmc_ray.training.fit import FitConfig, predictions_and_hits
from xmc_ray.training.loop import Step
from xmc_ray.training.recipe import undecided

Labels = Iterable[Iterable[str | int] | None]


class XMCClassifier:
    """A trained model, or an ensemble of them, that takes and returns plain lists."""

    def __init__(self, bundle: Bundle | Ensemble, prediction: PredictConfig | None = None) -> None:
        """Raises ConfigError for anything but an open bundle, such as its address; see `load`."""
        _check_kind(bundle, "bundle", Bundle, Ensemble)
        self.ensemble = bundle if isinstance(bundle, Ensemble) else Ensemble([bundle])
        self.prediction = PredictConfig() if prediction is None else prediction
        _check_kind(self.prediction, "prediction", PredictConfig)

    @property
    def bundle(self) -> Bundle:
        """The bundle of the model; raises ConfigError if there are several."""
        if len(self.ensemble.bundles) > 1:
            raise ConfigError(
                "an ensemble is not one bundle",
                found=f"{len(self.ensemble.bundles)} bundles",
                way_out="save each bundle, and load the list of them",
            )
        return self.ensemble.bundles[0]

    @classmethod
    def fit(
        cls,
        texts: Texts,
        labels: Labels,
        *,
        config: FitConfig | None = None,
        minutes: float | None = None,
        names: Mapping[str | int, str | None] | None = None,
        ids: Iterable[str | int] | None = None,
        device: str | None = None,
        on_step: Callable[[Step], None] | None = None,
        callbacks: Sequence[Callback] = (),
    ) -> "XMCClassifier":
        """Train on ``texts`` and their ``labels``; ``names`` maps labels to display names.

        Without ``config`` the documents decide the settings, by rule. With ``minutes`` a few recipes are tried first, judged on
        held-out documents (`training.tuning`), and the best is trained on everything in the time they leave; measuring comes on
        top. ``config`` then gives only what no recipe decides, such as the encoder's name; ``bundle.metrics`` has the trials.

        With ``config.feedback`` editors' verdicts correct the labels (`data.feedback`); ``ids`` are those of the documents.

        ``device`` defaults to a GPU if there is one. ``on_step`` is called after every step of that training; ``callbacks``
        follow it (`callbacks.callback`), and one that raises is warned of and not called again.

        Raises DataError if the two lists differ in length, hold no label or something else than texts and labels, ConfigError
        for settings that a recipe decides, for ``minutes`` that are no positive number, if there are too few documents for
        ``loop.accumulate`` or there is no such device, ModelError if the encoder is not found or does not work
        (`encoder.try_encoder`), or if the loss is not finite. Warns of a model that is worse than it could be, with what to
        change (`training.advice`).
        """
        by_rule = config is None or minutes is not None
        config = FitConfig() if config is None else config
        _check_kind(config, "config", FitConfig)
        _check_minutes(minutes, config)
        check_callbacks(callbacks)
        config = undecided(config) if by_rule else config
        device, named = _checked_device(device), name_table(names)
        column, lists = document_columns(texts, labels, [*(config.text.fields or {})])
        if config.feedback.uri is not None and ids is None:
            raise ConfigError("feedback needs the ids of the documents", way_out="give ids, one for each text")
        id_D = None if ids is None else id_column(ids, len(lists))
        given = Documents.of(column, lists, config.feedback, id_D).named(named)
        bundle = fit(config, given, device, by_rule=by_rule, minutes=minutes, on_step=on_step, callbacks=callbacks)
        return cls(bundle, config.loop.prediction)

    def hierarchy(self, config: HierarchyConfig) -> TagHierarchy:
        """Broader and narrower labels of this model's, for `predict`; raises DataError for a bad or another table."""
        _check_kind(config, "config", HierarchyConfig)
        return TagHierarchy(config.read(), self.ensemble.labels.to_table(), config)

    def predict(
        self,
        texts: Texts,
        k: int = 5,
        *,
        allow: Iterable[str | int] | None = None,
        deny: Iterable[str | int] = (),
        hierarchy: TagHierarchy | None = None,
    ) -> list[list[tuple[str, float]]]:
        """The ``k`` best (label, score) of each text, best first, scores in 0..1; all labels if there are fewer than ``k``.

        They are chosen among the labels ``allow``, by default all, without those in ``deny``. A ``hierarchy``, as `hierarchy`
        returns it, then adds, drops or moves labels; it adds none that the model knows and the filter leaves out.

        Raises DataError for anything but a list of strings, or of mappings for a model with fields; ConfigError for a ``k``
        below 1, for labels that the model does not know, if none is left, and for a hierarchy of other labels.
        """
        labels, k = self.ensemble.labels.labels, _checked_k(k, len(self.ensemble.labels))
        column = text_column(texts, fields=self.ensemble.fields)
        filters = self._filters(len(column), allow, deny)
        scores_Dk, ids_Dk = self.ensemble.predict(self.ensemble.encode(column), k, self.prediction, filters=filters)
        listed_Dk = ids_Dk >= 0
        rows, ids, scores = np.nonzero(listed_Dk)[0], ids_Dk[listed_Dk], scores_Dk[listed_Dk]
        if hierarchy is not None:
            _check_kind(hierarchy, "hierarchy", TagHierarchy)
            own, labels = labels, hierarchy.labels["label"].combine_chunks()
            if labels.slice(0, len(own)) != own:
                raise ConfigError("the hierarchy is of other labels", way_out="take that of this classifier's method hierarchy")
            rows, ids, scores = hierarchy(rows, ids, scores)
            may = np.ones(len(ids), bool) if filters is None else filters.admit(rows, ids)
            rows, ids, scores = rows[may], ids[may], scores[may]
        tags = list(zip(labels.take(pa.array(ids)).to_pylist(), scores.tolist(), strict=True))
        ends_D = np.cumsum(np.bincount(rows, minlength=len(ids_Dk))).tolist()
        return [tags[first:end] for first, end in zip([0, *ends_D], ends_D, strict=False)]

    def _filters(
        self, n_documents: int, allow: Iterable[str | int] | None, deny: Iterable[str | int]
    ) -> DocumentFilters | None:
        """One filter for all documents; None if it allows all labels."""
        allowed = None if allow is None else _label_list(allow, "allow")
        config = FiltersConfig(allow=allowed, deny=_label_list(deny, "deny"))
        return resolve(config, self.ensemble.labels.labels).of_documents(None, n_documents) if config.is_set else None

    def explain(
        self, text: str | Mapping[str, str | None], label: str, documents: tuple[Texts, Labels] | None = None
    ) -> Explanation:
        """Why ``text`` gets its score for ``label``; of ``documents``, texts and their labels, the nearest are shown.

        Raises ConfigError for an unknown label, DataError for documents that are none; see `bundle.explain`.
        """
        fields = self.ensemble.fields
        (one,) = text_column([text], "text", fields).to_pylist()  # type: ignore[arg-type]
        (label,) = text_column([str(label)], "label").to_pylist()
        if documents is not None and not (isinstance(documents, tuple | list) and len(documents) == 2):
            raise DataError("documents are no pair", found=type(documents).__name__, expected="(texts, labels)")
        chunks = None if documents is None else [document_columns(*documents, fields)]
        return explain(self.ensemble, one, label, self.prediction, chunks)

    def extend(
        self,
        texts: Texts = (),
        labels: Labels = (),
        *,
        names: Mapping[str | int, str | None] | None = None,
        deprecate: Iterable[str | int] = (),
        rows: RowsConfig | None = None,
    ) -> "XMCClassifier":
        """A new classifier that also knows the new labels in ``labels`` or ``names``, without training; see `bundle.extend`.

        This one is not changed. Labels in ``deprecate`` are never predicted again. Raises ConfigError for an ensemble and for
        an unknown deprecated label, DataError if nothing is new, the two lists differ in length or hold something else.
        """
        if rows is not None:
            _check_kind(rows, "rows", RowsConfig)
        old = _label_list(deprecate, "deprecate")
        columns, named = document_columns(texts, labels, self.ensemble.fields), name_table(names)
        bundle = extend(self.bundle, *columns, named, old, rows, self.prediction)
        return XMCClassifier(bundle, self.prediction)

    def evaluate(self, texts: Texts, labels: Labels) -> dict[str, Any]:
        """Metrics of the predictions for ``texts`` against their true ``labels``; see `at_k.Metrics.result`.

        Raises DataError if the two lists differ in length or hold something else, or if no document has a known label.
        """
        index, (column, lists) = self.ensemble.labels, document_columns(texts, labels, self.ensemble.fields)
        truth = index.encode(lists)
        _check_known(truth)
        metrics = Metrics(index.counts, index.n_documents)
        _, ids = self.ensemble.predict(self.ensemble.encode(column), max(metrics.ks), self.prediction)
        metrics.update(ids, truth)
        return metrics.result()

    def calibrate(self, texts: Texts, labels: Labels) -> "XMCClassifier":
        """Calibrates the scores to probabilities on documents that training has not seen, and returns itself.

        If documents come in series, give whole series of which training has seen nothing, or the probabilities are too high.
        Documents without a label that the model knows are left out, as in evaluation. Raises ConfigError for an ensemble; its
        bundles are calibrated one by one. Raises DataError as `evaluate`.
        """
        bundle, (column, lists) = self.bundle, document_columns(texts, labels, self.ensemble.fields)
        truth = bundle.labels.encode(lists)
        _check_known(truth)
        labelled = pa.array(list_lengths(truth) > 0)
        tokens, truth = bundle.tokenizer.encode(column.filter(labelled))[0], truth.filter(labelled)
        scores, ids, hits = predictions_and_hits(bundle.model, tokens, truth, len(bundle.labels), self.prediction)
        by = computed_by(bundle.model, self.prediction.precision)
        bundle.calibration = Calibration.of(scores, ids, hits, bundle.labels.counts, by)
        bundle.fingerprint = ""  # it is no longer what was saved
        return self

    def save(self, uri: storage.Uri) -> str:
        """Write a bundle (folder or ``s3://``), return its fingerprint.

        Raises ConfigError if ``uri`` is not empty, and for an ensemble.
        """
        return save_bundle(self.bundle, _address(uri))

    def push_to_hub(
        self,
        name: str,
        *,
        private: bool | None = None,
        license: str | None = None,
        datasets: Sequence[str] = (),
        message: str = "A bundle of xmc_ray",
    ) -> str:
        """Write a bundle to the model ``owner/name`` on a hub (`bundle.hub`), in one commit; the address of that commit.

        ``license``, as the hub spells it (``apache-2.0``), and ``datasets``, by their names, stand in the head of the card,
        which is part of the bundle: its fingerprint changes with them. What the model has on the hub before is replaced, and
        stays readable by its own commit. Raises ConfigError for an ensemble, for what is no name and for missing rights,
        UnavailableError if the hub does not answer.
        """
        with tempfile.TemporaryDirectory() as folder:
            given = {"license": license, "datasets": list(datasets)}
            about = {key: value for key, value in given.items() if value}
            save_bundle(replace(self.bundle), f"{folder}/bundle", about=about)  # this one keeps its own fingerprint
            return upload(Path(folder, "bundle"), name, private=private, message=message)

    @classmethod
    def load(cls, uri: storage.Uri | Sequence[storage.Uri], device: str | int | torch.device | None = None) -> "XMCClassifier":
        """Open a bundle, or a list of bundles over the same labels, whose scores are averaged; also from ``hf://owner/name``.

        Raises ModelError if one is not a bundle, is damaged, has another format, or has other labels than the first;
        ConfigError for an empty list and for a device that is not there.
        """
        device = _checked_device(device)
        uris = [_address(part) for part in uri] if isinstance(uri, list | tuple) else _address(uri)
        return cls(Ensemble.load(uris).to(device))


def _check_minutes(minutes: float | None, config: FitConfig) -> None:
    if minutes is None:
        return
    if isinstance(minutes, bool) or not isinstance(minutes, Real) or not 0 < float(minutes) < math.inf:
        raise ConfigError("invalid value of minutes", found=repr(minutes), expected="a number above 0")
    if config.loop.minutes is not None:
        raise ConfigError("the minutes are given twice", found=f"minutes and loop.minutes = {config.loop.minutes:g}")


def _check_known(truth: pa.ListArray) -> None:
    if not list_lengths(truth).any():
        raise DataError("no document has a label that the model knows", found=f"{len(truth):,} documents")


def _label_list(labels: Iterable[str | int], name: str) -> list[str]:
    labels = sorted(labels, key=str) if isinstance(labels, set | frozenset) else labels
    (checked,) = label_column([listed(labels, name, "a list of labels")], name).to_pylist()
    return list(checked)


def _check_kind(value: object, name: str, *kinds: type) -> None:
    if not isinstance(value, kinds):
        expected = " or ".join(kind.__name__ for kind in kinds)
        raise ConfigError(f"invalid {name}", found=type(value).__name__, expected=expected)


def _checked_k(k: int, n_labels: int) -> int:
    """At most the number of labels, which bounds the memory; ConfigError for anything but a positive integer."""
    if isinstance(k, bool) or not isinstance(k, Integral) or k < 1:
        raise ConfigError("invalid value of k", found=repr(k), expected="an integer, at least 1")
    return min(int(k), n_labels)


def _address(uri: Any) -> str:
    if not isinstance(uri, str | os.PathLike):
        raise ConfigError(
            "not an address", found=type(uri).__name__, expected="a path, or s3://bucket/key, as a string or a Path"
        )
    return os.fspath(uri)


def _checked_device(given: str | int | torch.device | None) -> str:
    """The name of a device, or of a GPU by its number, by default a GPU if there is one; ConfigError if it is not there."""
    if given is None:
        given = "cuda" if torch.cuda.is_available() else "cpu"
    device = f"cuda:{given}" if isinstance(given, int) else str(given)
    try:
        torch.zeros(1, device=device).cpu()  # "meta" has no numbers
    except (RuntimeError, AssertionError, TypeError, ImportError) as error:
        found, expected = f"{device!r}: {str(error).splitlines()[0]}", "cpu, cuda or cuda:N"
        raise ConfigError("no such device", found=found, expected=expected) from None
    return device
