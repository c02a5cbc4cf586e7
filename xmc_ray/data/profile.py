"""What kind of data a training split is: the figures from which a recipe follows, counted from its tokens and labels.

Letters: D documents, L labels.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from xmc_ray.data.labels import IntArray, LabelIndex, list_lengths

RARE = 10  # documents: below that, a label is rare


@dataclass(frozen=True, kw_only=True)
class Profile:
    """Documents are those left to train on, after the held-out ones; lengths are in tokens, as far as documents were read."""

    documents: int
    labels: int
    tokens: float
    """Tokens of a document, on average."""
    longest: int
    """Tokens that 95 % of the documents do not exceed."""
    labels_per_document: float
    rare: float
    """Share of all (document, label) pairs whose label has fewer than `RARE` documents."""
    typical: float
    """Documents of the median label."""
    single: float
    """Share of the labels that have one document."""
    everywhere: int
    """Labels that every document has: nothing is learnt from them."""
    repeated: float
    """Share of the documents whose tokens another one has, too: near-duplicates, up to case and white space."""

    @classmethod
    def of(cls, tokens: Iterable[pa.ListArray], labels: Iterable[pa.ListArray], index: LabelIndex) -> "Profile":
        """From chunks of documents: tokens (list<int32>) and label ids (list<int32>), each iterated once."""
        lengths, digests = [], []
        for chunk in tokens:
            lengths.append(list_lengths(chunk))
            digests.append(_digests(chunk))
        length_D, digest_D = np.concatenate(lengths), np.concatenate(digests)
        count_L = sum((_counts(chunk, len(index)) for chunk in labels), np.zeros(len(index), np.int64))
        pairs, n_documents = int(count_L.sum()), len(length_D)
        _, copies = np.unique(digest_D, return_counts=True)
        return cls(
            documents=n_documents,
            labels=len(index),
            tokens=float(length_D.mean()),
            longest=int(np.quantile(length_D, 0.95)),
            labels_per_document=pairs / n_documents,
            rare=float(count_L[count_L < RARE].sum()) / pairs,
            typical=float(np.median(count_L)),
            single=float((count_L == 1).mean()),
            everywhere=int((count_L == n_documents).sum()),
            repeated=float(copies[copies > 1].sum()) / n_documents,
        )


def _counts(labels: pa.ListArray, n_labels: int) -> IntArray:
    return np.bincount(pc.list_flatten(labels).to_numpy(), minlength=n_labels)


def _digests(tokens: pa.ListArray) -> npt.NDArray[np.uint64]:
    """uint64[D]: a hash of each document's tokens and their order, the sum of products of each token with odd numbers."""
    lengths = list_lengths(tokens)
    starts = np.cumsum(lengths) - lengths
    place = np.arange(lengths.sum()) - np.repeat(starts, lengths)
    token = pc.list_flatten(tokens).to_numpy().astype(np.uint64) + np.uint64(1)
    mixed = (token * np.uint64(0x9E3779B97F4A7C15)) ^ (place.astype(np.uint64) * np.uint64(0xC2B2AE3D27D4EB4F))
    mixed = (mixed ^ (mixed >> np.uint64(29))) * np.uint64(0xBF58476D1CE4E5B9)
    total = np.concatenate([[np.uint64(0)], np.cumsum(mixed, dtype=np.uint64)])
    return np.asarray(total[starts + lengths] - total[starts])
