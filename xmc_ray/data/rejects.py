"""Rejects: why rows are not used, and how much of the input may be rejected, by one rule for all jobs."""

from collections import Counter
from dataclasses import dataclass, field
from typing import NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from xmc_ray.errors import DataError

MAX_REJECT_SHARE = 0.01  # by default, everywhere

_SHOWN = 5  # reasons, the most frequent ones


class Reject(NamedTuple):
    """Why a row cannot be used: one of a few phrases, which can be counted, and the particulars of this row, if any."""

    reason: str
    detail: str | None = None

    def __str__(self) -> str:
        return self.reason if self.detail is None else f"{self.reason}: {self.detail}"


class Damaged(Exception):
    """A file, or the rest of it, holds something that cannot be read; ``reject`` is what becomes of it."""

    def __init__(self, reason: str, detail: str | None = None) -> None:
        self.reject = Reject(reason, detail)
        super().__init__(str(self.reject))


@dataclass
class Rejects:
    """Rows and rejects of files that have ``size`` bytes in all.

    A file that could not be read counts as one row, since it is unknown how many it has, and as its ``lost_bytes``.
    """

    size: int
    rows: int = 0
    lost_bytes: int = 0
    reasons: Counter[str] = field(default_factory=Counter)

    def add(self, reasons: pa.Array | pa.ChunkedArray, lost_bytes: int = 0) -> None:
        """Count rows by their ``reasons``, null in good ones."""
        self.rows += len(reasons)
        self.lost_bytes += lost_bytes
        for entry in pc.value_counts(reasons.drop_null()).to_pylist():
            self.reasons[entry["values"]] += entry["counts"]

    @property
    def share(self) -> float:
        """The share of the rows that is rejected, or of the bytes that is lost, whichever is more."""
        return max(self.reasons.total() / max(self.rows, 1), self.lost_bytes / max(self.size, 1))

    def __str__(self) -> str:
        """The most frequent reasons and their numbers."""
        return ", ".join(f"{reason} ({rows:,})" for reason, rows in self.reasons.most_common(_SHOWN))

    def check(self, limit: float, *, where: str, way_out: str) -> None:
        """DataError if more than the share ``limit`` is rejected."""
        if self.share > limit:
            found, expected = f"{self.share:.1%}: {self}", f"at most {limit:.1%}"
            raise DataError("too many documents are rejected", where=where, found=found, expected=expected, way_out=way_out)
