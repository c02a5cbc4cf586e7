"""Several models over one label index, whose scores are averaged (Jiang et al. 2021: three encoders on small label sets,
three clusterings on large ones).

Every model lists its best labels of a document; a label that a model does not list has a score of 0 there. So memory grows
with the labels listed, not with all labels.

Letters: D documents, C labels listed for a document by all models together, k labels asked for.
"""

import hashlib
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from xmc_ray import storage
from xmc_ray.bundle.folder import (
    CALIBRATED_BY,
    CALIBRATION_FILE,
    LABELS_FILE,
    Bundle,
    fields_of,
    load_bundle,
    local_bundle,
    read_calibration,
    read_settings,
)
from xmc_ray.data.documents import DocumentsConfig
from xmc_ray.data.fields import Fields, names_of
from xmc_ray.data.filters import DocumentFilters
from xmc_ray.data.labels import IntArray, LabelIndex
from xmc_ray.errors import ConfigError, ModelError
from xmc_ray.model.lightxml import Scoring
from xmc_ray.model.predict import Precision, PredictConfig, arithmetic, predict
from xmc_ray.model.tokenizer import Tokenizer

_ROUNDS = 3  # measurements, of which the median counts
_WORTH = 1.1  # times the duration of grouped scoring that exact scoring may take

_UNIT = 2.0**-52  # sums of scores are integers in these units, so that the order of the models does not change them

Scores = npt.NDArray[np.float32]
Listed = tuple[Scores, IntArray]
"""Scores [D, k], falling, and label ids [D, k], -1 (with score 0) where there are fewer."""


@dataclass(frozen=True)
class Members:
    """The bundles of an ensemble by their ``config.json``, before any weights are read.

    ``fingerprint``: that of a single bundle, else 16 hex digits that depend on all ``fingerprints`` and their order.
    ``calibrated``: which of them have a calibration; ``calibrated_by``: the arithmetic of each calibration, None if not known.
    ``transformers``: which of them have a transformer. ``fields``: what each reads, by the same names.
    """

    uris: list[str]
    max_tokens: list[int]
    fingerprints: list[str]
    fingerprint: str
    calibrated: list[bool]
    calibrated_by: list[str | None]
    transformers: list[bool]
    fields: list[Fields]

    @classmethod
    def read(cls, uris: storage.Uri | Sequence[storage.Uri]) -> "Members":
        """Read the settings of one bundle or several.

        Raises ConfigError for an empty list; ModelError when one is not a bundle, or has other labels or fields than the first.
        """
        addresses = [storage.normalise(uri) for uri in ([uris] if isinstance(uris, (str, os.PathLike)) else uris)]
        settings = [read_settings(uri) for uri in addresses]
        _check_labels([(uri, part["label_fingerprint"]) for uri, part in zip(addresses, settings, strict=True)])
        fields = [fields_of(part) for part in settings]
        _check_fields(list(zip(addresses, fields, strict=True)))
        fingerprints = [part["fingerprint"] for part in settings]
        joint = hashlib.sha256("".join(fingerprints).encode()).hexdigest()[:16]
        fingerprint = fingerprints[0] if len(addresses) == 1 else joint
        calibrated = [CALIBRATION_FILE in part["files"] for part in settings]
        calibrated_by = [part.get(CALIBRATED_BY) for part in settings]
        transformers = [part["encoder"] is not None for part in settings]
        max_tokens = [part["max_tokens"] for part in settings]
        return cls(addresses, max_tokens, fingerprints, fingerprint, calibrated, calibrated_by, transformers, fields)

    def reading(self, documents: DocumentsConfig) -> DocumentsConfig:
        """How the bundles read ``documents``; raises ConfigError if these have other columns than the bundles' fields."""
        return documents.with_fields(names_of(self.fields[0]))

    def check_precision(self) -> None:
        """Raises ConfigError if a bundle has no calibration, and so no thresholds."""
        for uri, calibrated in zip(self.uris, self.calibrated, strict=True):
            if not calibrated:
                raise ConfigError(
                    "min_precision needs a calibrated bundle",
                    where=uri,
                    found=f"no {CALIBRATION_FILE}",
                    way_out="train with validation.calibrate and a validation.share above 0, or give min_score",
                )

    def computed_by(self, precision: Precision, device: str | torch.device) -> list[str]:
        """The arithmetic of each bundle's scores on ``device``, see `predict.arithmetic`."""
        return [arithmetic(precision, device, transformer) for transformer in self.transformers]

    def calibration_warning(self, computed_by: Sequence[str]) -> str | None:
        """What to say of scores by these arithmetics; None if they are calibrated by the same, or not calibrated at all."""
        return calibration_warning(self.calibrated_by, computed_by) if all(self.calibrated) else None

    def thresholds(self, precision: float) -> npt.NDArray[np.float32]:
        """float32[L]: `Calibration.thresholds`, for several bundles their mean. Raises ConfigError as `check_precision`."""
        self.check_precision()
        with self._local_copies() as copies:
            labels = LabelIndex.load(copies[0] / LABELS_FILE)
            parts = [read_calibration(folder, labels) for folder in copies]
        thresholds = [part.thresholds(precision) for part in parts if part is not None]
        return np.asarray(np.mean(thresholds, axis=0, dtype=np.float64), np.float32)  # rounded once, as scores are

    def labels(self) -> pa.StringArray:
        """string[L]: the labels, which are those of all bundles."""
        with local_bundle(self.uris[0], self.fingerprints[0]) as folder:
            return pq.read_table(folder / LABELS_FILE, columns=["label"])["label"].combine_chunks()

    def fetch(self) -> tuple[pa.Table, list[Tokenizer]]:
        """The content of the first bundle's ``labels.parquet``, and the distinct tokenizers; see `Ensemble.tokenizers`."""
        with self._local_copies() as copies:
            tokenizers = [Tokenizer.load(*member) for member in zip(copies, self.max_tokens, self.fields, strict=True)]
            return pq.read_table(copies[0] / LABELS_FILE), _distinct(tokenizers)[0]

    @contextmanager
    def _local_copies(self) -> Iterator[list[Path]]:
        with ExitStack() as stack:
            members = zip(self.uris, self.fingerprints, strict=True)
            yield [stack.enter_context(local_bundle(*member)) for member in members]


class Ensemble:
    """One model or several.

    ``tokenizers``: the distinct ones, in the order in which the bundles use them first. Each encodes a text once.
    """

    def __init__(self, bundles: Sequence[Bundle]) -> None:
        """Raises ConfigError without a bundle, ModelError when the bundles' labels, their order or the fields differ."""
        if len(bundles) != 1:
            names = [bundle.fingerprint or f"bundle {number}" for number, bundle in enumerate(bundles, 1)]
            _check_labels([(name, bundle.labels.fingerprint) for name, bundle in zip(names, bundles, strict=True)])
            _check_fields([(name, bundle.tokenizer.fields) for name, bundle in zip(names, bundles, strict=True)])
        self.bundles = list(bundles)
        self.tokenizers, self._reads = _distinct([bundle.tokenizer for bundle in bundles])

    @classmethod
    def load(cls, bundles: Members | storage.Uri | Sequence[storage.Uri]) -> "Ensemble":
        """Open one bundle or several, on the CPU; raises what `Members.read` and `load_bundle` raise.

        ``bundles`` that were read before have to be the same still: ModelError if one has been replaced.
        """
        members = bundles if isinstance(bundles, Members) else Members.read(bundles)
        return cls([load_bundle(*member) for member in zip(members.uris, members.fingerprints, strict=True)])

    def to(self, device: str | torch.device) -> "Ensemble":
        """This ensemble, with all models moved to ``device``."""
        for bundle in self.bundles:
            bundle.model.to(device)
        return self

    @property
    def labels(self) -> LabelIndex:
        """The label index; names and counts are those of the first bundle."""
        return self.bundles[0].labels

    @property
    def fields(self) -> list[str]:
        """The names of the fields that the models read; none if they read plain texts."""
        return names_of(self.bundles[0].tokenizer.fields)

    def encode(self, texts: pa.Array) -> list[pa.ListArray]:
        """Tokens (list<int32>[D]) of ``texts`` (string[D]) by each of ``tokenizers``."""
        return [tokenizer.encode(texts)[0] for tokenizer in self.tokenizers]

    def predict(
        self,
        tokens: Sequence[pa.ListArray],
        k: int,
        config: PredictConfig,
        scoring: Scoring = "grouped",
        filters: DocumentFilters | None = None,
    ) -> Listed:
        """The ``k`` labels with the highest mean score, of documents as `encode` gives them, one model after the other.

        Of the labels that a document's filter allows, if there are ``filters``.
        Scores are calibrated before the mean where all models have a calibration, else none is: calibrated probabilities and
        raw scores must not be mixed. Where calibration makes scores equal, they stay in the order of the raw ones. With several
        models, a label that one does not list among its best (`n_listed`) has a score of 0 there. Raises ModelError for scores
        that are not finite, and when somebody has written into a bundle's file of weights meanwhile.
        """
        n_listed_here = k if len(self.bundles) == 1 else n_listed(k, len(self.labels))
        listed = [
            predict(bundle.model, tokens[tokenizer], n_listed_here, config, scoring, filters)
            for bundle, tokenizer in zip(self.bundles, self._reads, strict=True)
        ]
        for bundle, (scores, _) in zip(self.bundles, listed, strict=True):
            if bundle.mapped is not None:
                bundle.mapped.check()
            if not np.isfinite(scores).all():
                found = f"{(~np.isfinite(scores)).any(1).sum():,} of {len(scores):,} documents with such a score"
                raise ModelError(f"bundle {bundle.fingerprint}: scores are not finite", found=found, way_out="train it again")
        calibrations = [bundle.calibration for bundle in self.bundles if bundle.calibration is not None]
        raw = [scores for scores, _ in listed]
        if len(calibrations) == len(self.bundles):
            listed = [(part.calibrated(*one), one[1]) for part, one in zip(calibrations, listed, strict=True)]
        return average(listed, k, raw)

    def fastest_scoring(self, tokens: Sequence[pa.ListArray], k: int, config: PredictConfig) -> Scoring:
        """``exact`` where it takes at most 1.1 times as long as ``grouped``, measured on documents as `encode` gives them.

        All of them are predicted eight times; the answer holds for this machine, these models and this k.
        """
        if all(bundle.model.table is None for bundle in self.bundles):
            return "exact"  # flat models score every label anyway
        seconds: dict[Scoring, list[float]] = {"grouped": [], "exact": []}
        for _ in range(1 + _ROUNDS):  # in turns, so that other load on the machine affects both
            for scoring, taken in seconds.items():
                started = time.perf_counter()
                self.predict(tokens, k, config, scoring)
                taken.append(time.perf_counter() - started)
        grouped, exact = (median(taken[1:]) for taken in seconds.values())  # the first ones warm up
        return "exact" if exact <= _WORTH * grouped else "grouped"


def n_listed(k: int, n_labels: int) -> int:
    """How many labels each of several models lists to predict ``k``.

    The same for any k up to 10, so that the first labels do not depend on k.
    """
    return max(k, min(n_labels, 1000, max(100, 10 * k)))


def average(listed: Sequence[Listed], k: int, raw: Sequence[Scores] | None = None) -> Listed:
    """The ``k`` labels of each document with the highest mean score in ``listed``, which has one entry per model.

    Labels with the same mean are ordered by the mean of their uncalibrated scores, ``raw``, if given, then by id; so the order
    of the models does not matter. The list of a single model keeps its order.
    """
    if len(listed) == 1:
        ((scores_DC, labels_DC),) = listed
        return scores_DC[:, :k], labels_DC[:, :k]
    scores_DC, labels_DC = (np.concatenate(part, axis=1) for part in zip(*listed, strict=True))
    raw_DC = scores_DC if raw is None else np.concatenate(raw, axis=1)
    by_label_DC = labels_DC.argsort(axis=1, kind="stable")
    labels_DC = np.take_along_axis(labels_DC, by_label_DC, 1)
    is_first_DC = np.diff(labels_DC, axis=1, prepend=-2) != 0  # of the run of a label; every row begins with one
    starts, is_label_DC = np.flatnonzero(is_first_DC), is_first_DC & (labels_DC >= 0)

    def means(values_DC: Scores) -> npt.NDArray[np.float64]:
        """The mean of each label where its run begins, -1 elsewhere."""
        units_DC = np.rint(np.take_along_axis(values_DC, by_label_DC, 1).astype(np.float64) / _UNIT).astype(np.int64)
        mean_DC = np.zeros(labels_DC.shape)
        mean_DC[is_first_DC] = np.add.reduceat(units_DC.ravel(), starts) * (_UNIT / len(listed))
        return np.where(is_label_DC, mean_DC, -1)

    mean_DC = means(scores_DC).astype(np.float32)  # equal means are those that are equal in the answer
    best_Dk = np.lexsort((-means(raw_DC), -mean_DC), axis=1)[:, :k]
    scores_Dk, labels_Dk = np.take_along_axis(mean_DC, best_Dk, 1), np.take_along_axis(labels_DC, best_Dk, 1)
    return scores_Dk.clip(min=0), np.where(scores_Dk < 0, -1, labels_Dk)


def calibration_warning(calibrated_by: Sequence[str | None], computed_by: Sequence[str]) -> str | None:
    """What to say where scores of one of several models were calibrated by another arithmetic, or by one that is not known."""
    differ = [(by, computed) for by, computed in zip(calibrated_by, computed_by, strict=True) if by != computed]
    others = ", ".join(sorted({by or "an arithmetic that the bundle does not name" for by, _ in differ}))
    own = ", ".join(sorted({computed for _, computed in differ}))
    promise = "their precision and ECE may differ from those that training measured"
    return f"scores are computed by {own} and were calibrated by {others}: {promise}" if differ else None


def _check_labels(members: Sequence[tuple[str, str]]) -> None:
    """Raises unless all ``members``, (bundle, label fingerprint) each, have the same labels."""
    if not members:
        raise ConfigError("no bundle is given", found="an empty list", expected="at least one bundle")
    (first, expected), *others = members
    for name, found in others:
        if found != expected:
            raise ModelError(
                "the bundles of an ensemble have different labels",
                where=name,
                found=f"labels {found}",
                expected=f"labels {expected} as in {first}",
                way_out="train all of them on the same documents",
            )


def _check_fields(members: Sequence[tuple[str, Fields]]) -> None:
    """Raises ModelError unless all ``members``, (bundle, fields) each, read fields of the same names."""
    (first, own), *others = members
    for name, fields in others:
        if names_of(fields) != names_of(own):
            raise ModelError(
                "the bundles of an ensemble read different fields",
                where=name,
                found=", ".join(names_of(fields)) or "no fields",
                expected=f"{', '.join(names_of(own)) or 'no fields'} as in {first}",
                way_out="train all of them with the same names in text.fields",
            )


def _distinct(tokenizers: Sequence[Tokenizer]) -> tuple[list[Tokenizer], list[int]]:
    """The distinct ``tokenizers``, by content, length and fields, and for each of ``tokenizers`` its index among them."""
    kept: dict[str, Tokenizer] = {}
    contents = [tokenizer.fingerprint for tokenizer in tokenizers]
    for content, tokenizer in zip(contents, tokenizers, strict=True):
        kept.setdefault(content, tokenizer)
    return list(kept.values()), [list(kept).index(content) for content in contents]
