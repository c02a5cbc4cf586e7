"""Fit, predict, evaluate, save and load in one process: the whole method without Ray.

    classifier = XMCClassifier.fit(texts, labels, config=FitConfig(encoder=EncoderConfig(name="...")))
    classifier.predict(["a new text"], k=5)         # [[("a label", 0.93), ...]]
    classifier.save("my-bundle")

The jobs on Ray call the same functions.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from xmc_ray.bundle.ensemble import Ensemble
from xmc_ray.bundle.explain import Explanation, explain
from xmc_ray.bundle.extend import extend
from xmc_ray.bundle.folder import Bundle, save_bundle
from xmc_ray.bundle.regression import RowsConfig
from xmc_ray.data.groups import group_labels
from xmc_ray.data.labels import LabelIndex, list_lengths
from xmc_ray.errors import ConfigError, DataError
from xmc_ray.metrics.at_k import Metrics
from xmc_ray.metrics.calibration import Calibration
from xmc_ray.model.lexical import term_weights
from xmc_ray.model.predict import PredictConfig, arithmetic
from xmc_ray.model.text import Tokenizer
from xmc_ray.training.fit import FitConfig, build_model, epoch_plan, predictions_and_hits, share_of_batches
from xmc_ray.training.loop import Step, TrainState, train


class XMCClassifier:
    """A trained model, or an ensemble of them, that takes and returns plain lists."""

    def __init__(self, bundle: Bundle | Ensemble, prediction: PredictConfig | None = None) -> None:
        self.ensemble = bundle if isinstance(bundle, Ensemble) else Ensemble([bundle])
        self.prediction = prediction or PredictConfig()

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
        texts: Sequence[str],
        labels: Sequence[Sequence[str]],
        *,
        config: FitConfig | None = None,
        names: dict[str, str] | None = None,
        device: str | None = None,
        on_step: Callable[[Step], None] | None = None,
    ) -> "XMCClassifier":
        """Train on ``texts`` and their ``labels``; ``names`` maps labels to display names.

        ``device`` defaults to a GPU if there is one. ``on_step`` is called after every step. Raises DataError if the two lists
        differ in length or hold no label, ConfigError if there are too few documents for ``loop.accumulate``, ModelError if the
        encoder is not found or the loss is not finite.
        """
        config = config or FitConfig()
        column, lists = _columns(texts, labels)
        index = LabelIndex.count([lists])
        if names:
            index = index.with_names(pa.table({"label": list(names), "name": list(names.values())}))
        tokenizer = Tokenizer.load(config.encoder.name, config.text.max_tokens)
        documents = pa.table({"tokens": tokenizer.encode(column)[0], "labels": index.encode(lists)})
        documents = documents.filter(pa.array(list_lengths(documents["labels"].combine_chunks()) > 0))
        columns = [documents[name].combine_chunks() for name in ("tokens", "labels")]
        groups = group_labels(config.groups, [columns[0]], [columns[1]], len(index))

        plan = epoch_plan(config.loop, len(documents))
        plan.check(config.loop.accumulate)
        weight_F = term_weights([columns[0]], config.lexical) if config.lexical.width else None
        model = build_model(config, tokenizer, index, groups, weight_F=weight_F, device=device or _best_device())
        state = TrainState.start(model, config.optim)
        batches_from = partial(share_of_batches, documents, plan, config.loop.epochs, exchange=model.exchange)
        for step in train(state, model, batches_from, plan.steps, config.loop):
            if on_step:
                on_step(step)
        state.averager.keep(model.eval())
        return cls(Bundle(model, tokenizer, index, groups, metrics={}), config.loop.prediction)

    def predict(self, texts: Sequence[str], k: int = 5) -> list[list[tuple[str, float]]]:
        """The ``k`` best (label, score) of each text, best first, scores in 0..1."""
        if k < 1:
            raise ConfigError("invalid value of k", found=k, expected="at least 1")
        scores, ids = self.ensemble.predict(self.ensemble.encode(pa.array(texts, pa.string())), k, self.prediction)
        labels = np.asarray(self.ensemble.labels.labels.to_pylist(), object)[ids]
        return [
            [(label, float(score)) for label, score, place in zip(*row, strict=True) if place >= 0]
            for row in zip(labels, scores, ids, strict=True)
        ]

    def explain(
        self, text: str, label: str, documents: tuple[Sequence[str], Sequence[Sequence[str]]] | None = None
    ) -> Explanation:
        """Why ``text`` gets its score for ``label``; of ``documents``, texts and their labels, the nearest are shown.

        Raises ConfigError for an unknown label; see `bundle.explain`.
        """
        chunks = None if documents is None else [_columns(*documents)]
        return explain(self.ensemble, text, label, self.prediction, chunks)

    def extend(
        self,
        texts: Sequence[str] = (),
        labels: Sequence[Sequence[str]] = (),
        *,
        names: dict[str, str] | None = None,
        deprecate: Sequence[str] = (),
        rows: RowsConfig | None = None,
    ) -> "XMCClassifier":
        """A new classifier that also knows the new labels in ``labels`` or ``names``, without training; see `bundle.extend`.

        This one is not changed. Labels in ``deprecate`` are never predicted again. Raises ConfigError for an ensemble and for
        an unknown deprecated label, DataError if nothing is new or the two lists differ in length.
        """
        table = None if names is None else pa.table({"label": list(names), "name": list(names.values())})
        bundle = extend(self.bundle, *_columns(texts, labels), table, deprecate, rows, self.prediction)
        return XMCClassifier(bundle, self.prediction)

    def evaluate(self, texts: Sequence[str], labels: Sequence[Sequence[str]]) -> dict[str, Any]:
        """Metrics of the predictions for ``texts`` against their true ``labels``; see `at_k.Metrics.result`.

        Raises DataError if the two lists differ in length.
        """
        index, (column, lists) = self.ensemble.labels, _columns(texts, labels)
        metrics = Metrics(index.counts, index.n_documents)
        _, ids = self.ensemble.predict(self.ensemble.encode(column), max(metrics.ks), self.prediction)
        metrics.update(ids, index.encode(lists))
        return metrics.result()

    def calibrate(self, texts: Sequence[str], labels: Sequence[Sequence[str]]) -> "XMCClassifier":
        """Calibrates the scores to probabilities on documents that training has not seen, and returns itself.

        If documents come in series, give whole series of which training has seen nothing, or the probabilities are too high.
        Documents without a label that the model knows are left out, as in evaluation. Raises ConfigError for an ensemble; its
        bundles are calibrated one by one.
        """
        bundle, (column, lists) = self.bundle, _columns(texts, labels)
        truth = bundle.labels.encode(lists)
        labelled = pa.array(list_lengths(truth) > 0)
        tokens, truth = bundle.tokenizer.encode(column.filter(labelled))[0], truth.filter(labelled)
        scores, ids, hits = predictions_and_hits(bundle.model, tokens, truth, len(bundle.labels), self.prediction)
        device = next(bundle.model.parameters()).device
        by = arithmetic(self.prediction.precision, device)
        bundle.calibration = Calibration.of(scores, ids, hits, bundle.labels.counts, by)
        return self

    def save(self, uri: str) -> str:
        """Write a bundle (folder or ``s3://``), return its fingerprint.

        Raises ConfigError if ``uri`` is not empty, and for an ensemble.
        """
        return save_bundle(self.bundle, uri)

    @classmethod
    def load(cls, uri: str | Sequence[str], device: str | None = None) -> "XMCClassifier":
        """Open a bundle, or a list of bundles over the same labels, whose scores are averaged.

        Raises ModelError if one is not a bundle, is damaged, has another format, or has other labels than the first.
        """
        return cls(Ensemble.load(uri).to(device or _best_device()))


def _columns(texts: Sequence[str], labels: Sequence[Sequence[str]]) -> tuple[pa.StringArray, pa.ListArray]:
    """Documents as Arrow arrays; DataError if the two lists differ in length."""
    if len(texts) != len(labels):
        raise DataError("texts and labels differ in length", found=f"{len(texts)} texts, {len(labels)} label lists")
    return pa.array(texts, pa.string()), pa.array([list(row) for row in labels], pa.list_(pa.string()))


def _best_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"
