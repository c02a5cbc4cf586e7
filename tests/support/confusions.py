"""`Findings` of documents that a test lists."""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from xmc_ray.data.labels import LabelIndex
from xmc_ray.metrics.confusion import Findings

N_LABELS = 6
Documents = list[tuple[list[int], list[int]]]


def index(names: Sequence[str | None] = (None,) * N_LABELS) -> LabelIndex:
    labels = pa.array([f"label-{number}" for number in range(N_LABELS)])
    return LabelIndex(labels, np.arange(N_LABELS, 0, -1), pa.array(names, pa.string()), 10)


def lists(rows: Sequence[Sequence[int]]) -> pa.ListArray:
    return pa.array(rows, pa.list_(pa.int32()))


def find(rows: Documents, chunk: int, seed: int = 0, kinds: Sequence[str] = ("raw",)) -> Findings:
    """Of documents with (tags, true labels), ``chunk`` at a time; a document's only token is its number."""
    findings = Findings(index(), seed)
    for first in range(0, len(rows), chunk):
        part = rows[first : first + chunk]
        label_Dk = np.array([[*tags, -1, -1, -1, -1, -1][:5] for tags, _ in part], np.int64)
        score_Dk = np.where(label_Dk < 0, 0, np.linspace(0.9, 0.1, 5)).astype(np.float32)
        tokens = lists([[first + number] for number in range(len(part))])
        findings.update(tokens, lists([true for _, true in part]), label_Dk, dict.fromkeys(kinds, score_Dk))
    return findings
