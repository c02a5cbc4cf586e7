"""Several models over one label index, whose scores are averaged (Jiang et al. 2021: three encoders on small label sets,
three clusterings on large ones).

Every model lists its best labels of a document; a label that a model does not list has a score of 0 there. So memory grows
with the labels listed, not with all labels.

Letters: D documents, C labels listed for a document by all models together, k labels asked for.
"""

import time
from collections.abc import Sequence
from statistics import median

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

from xmc_ray import storage
from xmc_ray.bundle.content import Bundle, load_bundle
from xmc_ray.bundle.members import Members, check_fields, check_labels, distinct
from xmc_ray.data.fields import names_of
from xmc_ray.data.filters import DocumentFilters
from xmc_ray.data.labels import IntArray, LabelIndex
from xmc_ray.errors import ModelError
from xmc_ray.model.lightxml import Scoring
from xmc_ray.model.predict import PredictConfig, predict

_ROUNDS = 3  # measurements, of which the median counts
_WORTH = 1.1  # times the duration of grouped scoring that exact scoring may take

_UNIT = 2.0**-52  # sums of scores are integers in these units, so that the order of the models does not change them

Scores = npt.NDArray[np.float32]
Listed = tuple[Scores, IntArray]
"""Scores [D, k], falling, and label ids [D, k], -1 (with score 0) where there are fewer."""


class Ensemble:
    """One model or several.

    ``tokenizers``: the distinct ones, in the order in which the bundles use them first. Each encodes a text once.
    """

    def __init__(self, bundles: Sequence[Bundle]) -> None:
        """Raises ConfigError without a bundle, ModelError when the bundles' labels, their order or the fields differ."""
        if len(bundles) != 1:
            names = [bundle.fingerprint or f"bundle {number}" for number, bundle in enumerate(bundles, 1)]
            check_labels([(name, bundle.labels.fingerprint) for name, bundle in zip(names, bundles, strict=True)])
            check_fields([(name, bundle.tokenizer.fields) for name, bundle in zip(names, bundles, strict=True)])
        self.bundles = list(bundles)
        self.tokenizers, self._reads = distinct([bundle.tokenizer for bundle in bundles])

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
