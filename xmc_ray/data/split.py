"""Which training documents are held out, to choose the best epoch and to calibrate the scores."""

import hashlib
from dataclasses import dataclass
from typing import Annotated

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from xmc_ray.data.labels import IntArray
from xmc_ray.errors import ConfigError
from xmc_ray.settings import Bounds, PositiveFloat, Settings

METRICS = [f"{name}@{k}" for name in ("P", "R", "nDCG", "PSP", "PSnDCG", "coverage") for k in (1, 3, 5, 10)]
"""What the best checkpoint may be chosen by; see `metrics.at_k`."""


@dataclass(frozen=True, kw_only=True)
class ValidationConfig(Settings):
    """Documents held out of training, to validate and calibrate."""

    share: Annotated[float, Bounds(ge=0, lt=1)] = 0.02
    """Share of the training documents that is held out, by a hash of their words; 0 trains on all, without validation."""
    series: str | None = None
    """Column of the series that a document belongs to, such as a collection or a seller, strings or integers: all documents of
    a series are held out, or none, by a hash of its name. If it is null or blank, the words decide."""
    every: PositiveFloat = 1.0
    """Epochs from one validation (and checkpoint) to the next; always one at the end, the only one if nothing is held out."""
    metric: str = "nDCG@5"
    """Metric that selects the best checkpoint."""
    calibrate: bool = True
    """Reserve half of the held-out documents, by the same hash, for calibration; false chooses the epoch by all of them."""

    def check(self) -> None:
        """Raises ConfigError for an unknown metric."""
        if self.metric not in METRICS:
            raise ConfigError("validation.metric is unknown", found=self.metric, expected=", ".join(METRICS))


def held_out_use(texts: pa.Array, series: pa.Array, validation: ValidationConfig) -> IntArray:
    """int64[n]: 0 (train), 1 (validate) or 2 (calibrate) for each text, as `uses` of its `draws`."""
    return uses(draws(texts, series), validation)


def draws(texts: pa.Array, series: pa.Array) -> npt.NDArray[np.uint64]:
    """uint64[n]: what decides whether a text is held out, for any share of them: a hash of its series or else of its words.

    It is the same in every run and on every machine. Documents of a series share theirs, and so do those without a series
    that have the same words: otherwise validation would reward memorising. A text without series and words is never held out.
    """
    words = pc.utf8_trim(pc.replace_substring_regex(pc.utf8_lower(texts), r"[^\pL\pN]+", " "), " ")
    series = pc.utf8_trim_whitespace(series.fill_null(""))
    keys = pc.if_else(pc.equal(series, ""), words, series)
    digests = b"".join(hashlib.sha256(key.encode()).digest()[:8] for key in keys.to_pylist())
    draw_D = np.frombuffer(digests, ">u8").astype(np.uint64)
    return np.where(np.asarray(pc.binary_length(keys)) > 0, draw_D, np.iinfo(np.uint64).max)


def uses(draw_D: npt.NDArray[np.uint64], validation: ValidationConfig) -> IntArray:
    """int64[n]: 0 (train), 1 (validate) or 2 (calibrate) for each of the `draws`. A larger share holds out these and more."""
    is_held_out_D = draw_D >> 32 < int(validation.share * 2**32)
    calibrates_D = draw_D % 2 == 1 if validation.calibrate else np.zeros(len(draw_D), bool)  # further bits: not the share's
    return np.where(is_held_out_D, 1 + calibrates_D, 0)
