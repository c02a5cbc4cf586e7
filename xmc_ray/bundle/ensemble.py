"""Several models over one label index, whose scores are averaged (Jiang et al. 2021: three encoders on small label sets,
three clusterings on large ones).

Every model lists its best labels of a document; a label that a model does not list counts 0 there. So memory grows with the
labels listed, never with all labels.

Letters: D documents, C labels listed for a document by all models together, k labels asked for.
"""

import hashlib
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

from xmc_ray import storage
from xmc_ray.bundle.folder import CALIBRATION_FILE, LABELS_FILE, Bundle, load_bundle, read_calibration, read_settings
from xmc_ray.data.labels import IntArray, LabelIndex
from xmc_ray.errors import ConfigError, ModelError
from xmc_ray.model.lightxml import Scoring
from xmc_ray.model.predict import PredictConfig, predict
from xmc_ray.model.text import Tokenizer
from xmc_ray.storage import folders

_ROUNDS = 3  # measurements whose median counts


_WORTH = 1.1  # times as long as grouped scoring: what exactness may cost


Listed = tuple[npt.NDArray[np.float32], IntArray]


"""Scores [D, k], falling, and label ids [D, k], -1 (with score 0) where there are fewer."""


@dataclass(frozen=True)
class Members:
    """The bundles of an ensemble as their ``config.json`` tell them, before any weights are read.

    ``fingerprint``: the bundle's own if it is the only one, else 16 hex digits of all bundles' (``fingerprints``) in order.
    ``calibrated``: which of them have a calibration.
    """

    uris: list[str]
    max_tokens: list[int]
    fingerprints: list[str]
    fingerprint: str
    calibrated: list[bool]

    @classmethod
    def read(cls, uris: storage.Uri | Sequence[storage.Uri]) -> "Members":
        """Look at one bundle or several.

        Raises ConfigError for an empty list; ModelError when one is not a bundle, or is of other labels than the first.
        """
        places = [os.fspath(uri) for uri in ([uris] if isinstance(uris, (str, os.PathLike)) else uris)]
        settings = [read_settings(uri) for uri in places]
        _check_labels([(uri, part["label_fingerprint"]) for uri, part in zip(places, settings, strict=True)])
        fingerprints = [part["fingerprint"] for part in settings]
        together = hashlib.sha256("".join(fingerprints).encode()).hexdigest()[:16]
        fingerprint = fingerprints[0] if len(places) == 1 else together
        calibrated = [CALIBRATION_FILE in part["files"] for part in settings]
        return cls(places, [part["max_tokens"] for part in settings], fingerprints, fingerprint, calibrated)

    def check_precision(self) -> None:
        """Raises ConfigError where thresholds are asked of a bundle that has no calibration."""
        for uri, calibrated in zip(self.uris, self.calibrated, strict=True):
            if not calibrated:
                raise ConfigError(
                    "min_precision needs a calibrated bundle",
                    where=uri,
                    found=f"no {CALIBRATION_FILE}",
                    way_out="train with validation.calibrate and a validation.share above 0, or give min_score",
                )

    def thresholds(self, precision: float) -> npt.NDArray[np.float32]:
        """float32[L]: `Calibration.thresholds`; of several bundles their mean. Raises ConfigError as `check_precision`."""
        self.check_precision()
        places = [folders.node_copy(*member) for member in zip(self.uris, self.fingerprints, strict=True)]
        labels = LabelIndex.load(places[0] / LABELS_FILE)
        parts = [read_calibration(folder, labels) for folder in places]
        thresholds = [part.thresholds(precision) for part in parts if part is not None]
        return np.asarray(np.mean(thresholds, axis=0), np.float32)

    def fetch(self) -> tuple[Path, list[Tokenizer]]:
        """The file of the labels and the distinct tokenizers, on this machine; see `Ensemble.tokenizers`."""
        places = [folders.node_copy(*member) for member in zip(self.uris, self.fingerprints, strict=True)]
        tokenizers = [Tokenizer.load(*member) for member in zip(places, self.max_tokens, strict=True)]
        return places[0] / LABELS_FILE, _distinct(tokenizers)[0]


class Ensemble:
    """One model or several.

    ``tokenizers``: the distinct ones, in the order of the bundles that need them first. A text is encoded once by each.
    """

    def __init__(self, bundles: Sequence[Bundle]) -> None:
        """Raises ConfigError without a bundle, ModelError when the bundles' labels or their order differ."""
        if len(bundles) != 1:
            names = [bundle.fingerprint or f"bundle {number}" for number, bundle in enumerate(bundles, 1)]
            _check_labels([(name, bundle.labels.fingerprint) for name, bundle in zip(names, bundles, strict=True)])
        self.bundles = list(bundles)
        self.tokenizers, self._reads = _distinct([bundle.tokenizer for bundle in bundles])

    @classmethod
    def load(cls, uris: storage.Uri | Sequence[storage.Uri]) -> "Ensemble":
        """Open one bundle or several, on the CPU; raises what `Members.read` and `bundle.load_bundle` raise."""
        return cls([load_bundle(uri) for uri in Members.read(uris).uris])

    def to(self, device: str | torch.device) -> "Ensemble":
        """Itself, with all models on ``device``."""
        for bundle in self.bundles:
            bundle.model.to(device)
        return self

    @property
    def labels(self) -> LabelIndex:
        """The label index; names and counts are those of the first bundle."""
        return self.bundles[0].labels

    def encode(self, texts: pa.Array) -> list[pa.ListArray]:
        """Tokens (list<int32>[D]) of ``texts`` (string[D]) by each of ``tokenizers``."""
        return [tokenizer.encode(texts)[0] for tokenizer in self.tokenizers]

    def predict(self, tokens: Sequence[pa.ListArray], k: int, config: PredictConfig, scoring: Scoring = "grouped") -> Listed:
        """The ``k`` labels with the highest mean score, of documents as `encode` gives them, one model after the other.

        Scores are calibrated before the mean where all models have a calibration, else none is: chances and scores do not mix.
        Exact for one model. With several, a label that a model does not list among its best (`n_listed`) counts 0 there.
        """
        n_listed_here = k if len(self.bundles) == 1 else n_listed(k, len(self.labels))
        listed = [
            predict(bundle.model, tokens[place], n_listed_here, config, scoring)
            for bundle, place in zip(self.bundles, self._reads, strict=True)
        ]
        calibrations = [bundle.calibration for bundle in self.bundles if bundle.calibration is not None]
        if len(calibrations) == len(self.bundles):
            listed = [(part.calibrated(*one), one[1]) for part, one in zip(calibrations, listed, strict=True)]
        return average(listed, k)

    def fastest_scoring(self, tokens: Sequence[pa.ListArray], k: int, config: PredictConfig) -> Scoring:
        """``exact`` where it takes at most 1.1 times as long as ``grouped``, measured on documents as `encode` gives them.

        All are predicted eight times; what comes out holds for this machine, these models and this k.
        """
        if all(bundle.model.table is None for bundle in self.bundles):
            return "exact"  # flat models score every label in any case
        seconds: dict[Scoring, list[float]] = {"grouped": [], "exact": []}
        for _ in range(1 + _ROUNDS):  # in turns: what else the machine does hits both
            for scoring, taken in seconds.items():
                started = time.perf_counter()
                self.predict(tokens, k, config, scoring)
                taken.append(time.perf_counter() - started)
        grouped, exact = (median(taken[1:]) for taken in seconds.values())  # the first ones warm up
        return "exact" if exact <= _WORTH * grouped else "grouped"

    def quantised(self) -> "Ensemble":
        """The same models with encoders in int8, for prediction on this CPU; see `LightXML.quantised`."""
        return Ensemble([replace(bundle, model=bundle.model.quantised()) for bundle in self.bundles])


class Agreement(NamedTuple):
    """How alike two predictions for the same documents are; 0..1 each.

    ``best``: share of the documents with the same best label; ``overlap``: of the labels that the one lists, the share that the
    other lists too.
    """

    best: float
    overlap: float


def agreement(one: Listed, other: Listed) -> Agreement:
    """What is left of the predictions ``one`` in ``other``, such as those of a model and of its `Ensemble.quantised`."""
    labels_Dk, others_Dk = one[1], other[1]
    same_Dk = (labels_Dk[:, :, None] == others_Dk[:, None, :]).any(2)
    listed_Dk = labels_Dk >= 0
    same_best = int((labels_Dk[:, 0] == others_Dk[:, 0]).sum())
    return Agreement(same_best / max(1, len(labels_Dk)), int((same_Dk & listed_Dk).sum()) / max(1, int(listed_Dk.sum())))


def n_listed(k: int, n_labels: int) -> int:
    """How many labels each of several models lists where ``k`` are asked for.

    The same for any k up to 10, so that the first tags do not depend on how many are asked for.
    """
    return max(k, min(n_labels, 1000, max(100, 10 * k)))


def average(listed: Sequence[Listed], k: int) -> Listed:
    """The ``k`` labels of each document with the highest mean of their scores in ``listed``, one entry a model.

    Among equals the one that is listed first comes first.
    """
    scores_DC, labels_DC = (np.concatenate(part, axis=1) for part in zip(*listed, strict=True))
    by_label_DC = labels_DC.argsort(axis=1, kind="stable")
    is_first_DC = np.diff(np.take_along_axis(labels_DC, by_label_DC, 1), axis=1, prepend=-2) != 0
    starts = np.flatnonzero(is_first_DC)  # of the runs of one label in one row; every row begins one
    sums = np.add.reduceat(np.take_along_axis(scores_DC, by_label_DC, 1).ravel(), starts, dtype=np.float64)

    mean_DC = np.full(labels_DC.shape, -1.0)
    mean_DC[np.nonzero(is_first_DC)[0], by_label_DC[is_first_DC]] = sums / len(listed)
    mean_DC[labels_DC < 0] = -1
    best_Dk = np.argsort(-mean_DC, axis=1, kind="stable")[:, :k]
    scores_Dk, labels_Dk = (np.take_along_axis(values, best_Dk, 1) for values in (mean_DC, labels_DC))
    return scores_Dk.clip(min=0).astype(np.float32), np.where(scores_Dk < 0, -1, labels_Dk)


def _check_labels(members: Sequence[tuple[str, str]]) -> None:
    """(bundle, label fingerprint) of each."""
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


def _distinct(tokenizers: Sequence[Tokenizer]) -> tuple[list[Tokenizer], list[int]]:
    """Those that differ in content or length, and for each of ``tokenizers`` its place among them."""
    kept: dict[str, Tokenizer] = {}
    contents = [tokenizer.pretrained.backend_tokenizer.to_str() for tokenizer in tokenizers]  # max_tokens is part of it
    for content, tokenizer in zip(contents, tokenizers, strict=True):
        kept.setdefault(content, tokenizer)
    return list(kept.values()), [list(kept).index(content) for content in contents]
