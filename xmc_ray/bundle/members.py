"""The bundles of an ensemble by their settings: what a driver knows of a model, which only its actors load."""

import hashlib
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from xmc_ray import storage
from xmc_ray.bundle.folder import (
    CALIBRATED_BY,
    CALIBRATION_FILE,
    LABELS_FILE,
    fields_of,
    local_bundle,
    read_calibration,
    read_settings,
)
from xmc_ray.bundle.hub import pinned
from xmc_ray.data.documents import DocumentsConfig
from xmc_ray.data.fields import Fields, names_of
from xmc_ray.data.labels import LabelIndex
from xmc_ray.errors import ConfigError, ModelError
from xmc_ray.model.precision import Precision, arithmetic
from xmc_ray.model.tokenizer import Tokenizer


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
        addresses = [pinned(storage.normalise(uri)) for uri in ([uris] if isinstance(uris, (str, os.PathLike)) else uris)]
        settings = [read_settings(uri) for uri in addresses]
        check_labels([(uri, part["label_fingerprint"]) for uri, part in zip(addresses, settings, strict=True)])
        fields = [fields_of(part) for part in settings]
        check_fields(list(zip(addresses, fields, strict=True)))
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

    def computed_by(self, precision: Precision, device: str) -> list[str]:
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
            tokenizers = [
                Tokenizer.of_bundle(*member, lazily=True) for member in zip(copies, self.max_tokens, self.fields, strict=True)
            ]
            return pq.read_table(copies[0] / LABELS_FILE), distinct(tokenizers)[0]

    @contextmanager
    def _local_copies(self) -> Iterator[list[Path]]:
        with ExitStack() as stack:
            members = zip(self.uris, self.fingerprints, strict=True)
            yield [stack.enter_context(local_bundle(*member)) for member in members]


def calibration_warning(calibrated_by: Sequence[str | None], computed_by: Sequence[str]) -> str | None:
    """What to say where scores of one of several models were calibrated by another arithmetic, or by one that is not known."""
    differ = [(by, computed) for by, computed in zip(calibrated_by, computed_by, strict=True) if by != computed]
    others = ", ".join(sorted({by or "an arithmetic that the bundle does not name" for by, _ in differ}))
    own = ", ".join(sorted({computed for _, computed in differ}))
    promise = "their precision and ECE may differ from those that training measured"
    return f"scores are computed by {own} and were calibrated by {others}: {promise}" if differ else None


def check_labels(members: Sequence[tuple[str, str]]) -> None:
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


def check_fields(members: Sequence[tuple[str, Fields]]) -> None:
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


def distinct(tokenizers: Sequence[Tokenizer]) -> tuple[list[Tokenizer], list[int]]:
    """The distinct ``tokenizers``, by content, length and fields, and for each of ``tokenizers`` its index among them."""
    kept: dict[str, Tokenizer] = {}
    contents = [tokenizer.fingerprint for tokenizer in tokenizers]
    for content, tokenizer in zip(contents, tokenizers, strict=True):
        kept.setdefault(content, tokenizer)
    return list(kept.values()), [list(kept).index(content) for content in contents]
