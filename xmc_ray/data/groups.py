"""Label groups: clusters of labels that occur in similar documents, of nearly equal size.

A label's vector is the normalised sum of the TF-IDF vectors of its documents (PIFA: positive instance feature
aggregation), of which the heaviest terms alone count. Recursive balanced 2-means halves the label set until a part holds at
most ``max_size`` labels, so group sizes differ by at most one. All matrices are sparse: memory grows with the number of
non-zeros.

Letters: D documents, F hashed features, L labels, G groups, M slots of a group.
"""

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, partial, reduce
from operator import add
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from scipy import sparse

from xmc_ray.data.labels import IntArray, list_lengths
from xmc_ray.data.terms import count_terms, document_frequency, inverse_document_frequency, saturated
from xmc_ray.settings import NonNegativeInt, PositiveInt, Settings

_TERMS = 256  # of a label's vector that count, the heaviest: a frequent label has met every term there is
_BLOCK = 2**22  # entries of rows that are sorted at a time
_ROUNDS = 20  # 2-means settles in about ten; the limit only guards against a cycle between equal splits


@dataclass(frozen=True, kw_only=True)
class GroupsConfig(Settings):
    """How labels are grouped."""

    max_size: PositiveInt = 100
    """Maximum number of labels in a group. 1 is flat mode: recall scores labels directly, without a ranking stage."""
    features: PositiveInt = 2**18
    """Width of the hashed TF-IDF vectors (tokens and pairs of adjacent tokens)."""
    seed: NonNegativeInt = 0
    """Seed of the clustering; a different seed gives a different grouping, which an ensemble benefits from."""


@dataclass(frozen=True, eq=False)
class LabelGroups:
    """A partition of labels; ``group_L``: int64[L], the group of each label."""

    group_L: IntArray

    @cached_property
    def sizes_G(self) -> IntArray:
        """int64[G]: labels in each group."""
        return np.bincount(self.group_L)

    @cached_property
    def slot_L(self) -> IntArray:
        """int64[L]: a label's position in its group, in order of id."""
        order = np.argsort(self.group_L, kind="stable")
        slots = np.empty_like(order)
        slots[order] = np.arange(len(order)) - np.repeat(np.cumsum(self.sizes_G) - self.sizes_G, self.sizes_G)
        return slots

    @cached_property
    def label_GM(self) -> IntArray:
        """int64[G, M]: the label in each slot, -1 where it is empty."""
        table = np.full((len(self), int(self.sizes_G.max())), -1, np.int64)
        table[self.group_L, self.slot_L] = np.arange(len(self.group_L))
        return table

    @property
    def flat(self) -> bool:
        """Whether every group is a single label."""
        return len(self) == len(self.group_L)

    def __len__(self) -> int:
        return len(self.sizes_G)


def group_labels(
    config: GroupsConfig, tokens: Iterable[pa.ListArray], labels: Iterable[pa.ListArray], n_labels: int, threads: int = 1
) -> LabelGroups:
    """Groups of the ``n_labels`` labels from chunks of documents: tokens (list<int32>) and label ids (list<int32>).

    Both are iterated chunk by chunk, the tokens twice: memory grows with the labels, not with the documents. A label without
    documents has a zero vector and joins any group with room. Groups are the same for any number of ``threads``.
    """
    if config.max_size == 1 or n_labels <= 1:
        return LabelGroups(np.arange(n_labels))
    if n_labels <= config.max_size:
        return LabelGroups(np.zeros(n_labels, np.int64))
    n_documents, frequency_F = document_frequency(count_terms(chunk, config.features) for chunk in tokens)
    idf_F = inverse_document_frequency(n_documents, frequency_F)
    sums = (
        label_incidence(label_chunk, n_labels).T.tocsr() @ tfidf(count_terms(token_chunk, config.features), idf_F)
        for token_chunk, label_chunk in zip(tokens, labels, strict=True)
    )
    vectors_LF = unit_rows(heaviest(label_vectors(sums), _TERMS))
    return LabelGroups(balanced_groups(vectors_LF, config.max_size, config.seed, threads))


def tfidf(counts: sparse.csr_array, idf_F: npt.NDArray[np.float64]) -> sparse.csr_array:
    """float32[D, F]: rows (1 + log tf) * idf, scaled to length one; ``counts`` is overwritten. See `terms.saturated`."""
    counts.data = (saturated(counts.data) * idf_F[counts.indices]).astype(np.float32)
    return unit_rows(counts)


def label_incidence(labels: pa.ListArray, n_labels: int) -> sparse.csr_array:
    """float32[D, L]: 1 where a document has a label."""
    offsets = np.concatenate([[0], np.cumsum(list_lengths(labels))])
    ids = pc.list_flatten(labels).to_numpy()
    return sparse.csr_array((np.ones(len(ids), np.float32), ids, offsets), shape=(len(labels), n_labels))


def label_vectors(sums: Iterable[sparse.csr_array]) -> sparse.csr_array:
    """float32[L, F]: PIFA, the sum of the vectors of a label's documents, scaled to length one.

    ``sums``: such sums over chunks of documents, which are added up as merge sort would, equal sizes first.
    """
    parts: list[sparse.csr_array] = []
    for part in sums:
        parts.append(part)
        while len(parts) > 1 and parts[-1].nnz >= parts[-2].nnz:
            parts.append(parts.pop() + parts.pop())
    return unit_rows(reduce(add, reversed(parts)).tocsr())


def unit_rows(matrix: sparse.csr_array) -> sparse.csr_array:
    """Scale rows to Euclidean length one, in place; zero rows stay zero."""
    starts, filled = matrix.indptr[:-1], np.diff(matrix.indptr) > 0
    squares = np.zeros(matrix.shape[0], np.float32)
    squares[filled] = np.add.reduceat(matrix.data**2, starts[filled]) if filled.any() else 0
    scale = 1 / np.sqrt(np.where(squares > 0, squares, 1))
    matrix.data *= np.repeat(scale, np.diff(matrix.indptr)).astype(matrix.data.dtype)
    return matrix


def heaviest(matrix: sparse.csr_array, most: int) -> sparse.csr_array:
    """The ``most`` largest entries of each row, and those equal to the last; overwrites ``matrix``, which has none below 0."""
    size_L, start_L = np.diff(matrix.indptr), matrix.indptr[:-1]
    least_L = np.zeros(len(size_L), matrix.dtype)
    wide = np.flatnonzero(size_L > most)
    wide = wide[np.argsort(size_L[wide], kind="stable")]  # rows of similar length meet in a block: less than half is padding
    blocks, doubled = np.cumsum(size_L[wide]) // _BLOCK, np.frexp(size_L[wide])[1]
    for rows in np.split(wide, np.flatnonzero(np.diff(blocks) | np.diff(doubled)) + 1):
        width = int(size_L[rows].max(initial=most))
        place_RW = np.arange(width)
        value_RW = np.where(
            place_RW < size_L[rows, None], matrix.data[np.minimum(start_L[rows, None] + place_RW, matrix.nnz - 1)], 0
        )
        least_L[rows] = np.partition(value_RW, width - most, axis=1)[:, width - most]
    light = matrix.data < np.repeat(least_L, size_L)
    matrix.data[light] = 0
    matrix.eliminate_zeros()
    return matrix


class _Part(NamedTuple):
    """Labels that stay together so far: node ``node`` of level ``level`` in the tree of halves."""

    vectors: sparse.csr_array
    members: IntArray
    level: int
    node: int


def balanced_groups(vectors_LF: sparse.csr_array, max_size: int, seed: int, threads: int = 1) -> IntArray:
    """int64[L]: the group of each label, sizes differing by at most one, by recursive balanced 2-means.

    Each thread goes through a subtree depth first: beside the vectors, there are two copies of them in memory at most.
    """
    n_labels = vectors_LF.shape[0]
    depth = int(np.ceil(np.log2(n_labels / max_size))) if n_labels > max_size else 0
    group_L, parts = np.zeros(n_labels, np.int64), [_Part(vectors_LF, np.arange(n_labels), 0, 0)]
    with ThreadPoolExecutor(threads) as pool:
        while len(parts) < threads and parts[0].level < depth:
            parts = [half for halves in pool.map(partial(_halved, seed=seed), parts) for half in halves]
        for leaves in pool.map(partial(_leaves, depth=depth, seed=seed), parts):
            for members, node in leaves:
                group_L[members] = node
    return group_L


def _leaves(part: _Part, depth: int, seed: int) -> list[tuple[IntArray, int]]:
    """The groups of a subtree, and their numbers."""
    stack, leaves = [part], []
    while stack:
        part = stack.pop()
        if part.level == depth:
            leaves.append((part.members, part.node))
        else:
            stack.extend(_halved(part, seed))
    return leaves


def _halved(part: _Part, seed: int) -> list[_Part]:
    vectors, members, level, node = part
    vectors = _drop_empty_columns(vectors)
    right = halve(vectors, np.random.default_rng([seed, level, node]))
    halves = (~right, 2 * node), (right, 2 * node + 1)
    return [_Part(vectors[np.flatnonzero(half)], members[half], level + 1, child) for half, child in halves]


def halve(vectors: sparse.csr_array, rng: np.random.Generator) -> npt.NDArray[np.bool_]:
    """bool[n]: which rows go right, n // 2 of them, by balanced spherical 2-means from two random rows."""
    n_rows = vectors.shape[0]
    transposed = vectors.T  # a view: csr read as csc
    seeds = np.zeros(n_rows, np.float32)
    seeds[rng.choice(n_rows, 2, replace=False)] = -1, 1
    direction, total = transposed @ seeds, transposed @ np.ones(n_rows, np.float32)
    right = np.zeros(n_rows, bool)
    for _ in range(_ROUNDS):
        order = np.argsort(vectors @ direction, kind="stable")
        before, right = right, np.zeros(n_rows, bool)
        right[order[n_rows - n_rows // 2 :]] = True
        if (before == right).all():
            break
        of_right = transposed @ right.astype(np.float32)
        direction = _unit(of_right) - _unit(total - of_right)
    return right


def _unit(vector: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    return vector / max(float(np.linalg.norm(vector)), 1e-12)


def _drop_empty_columns(matrix: sparse.csr_array) -> sparse.csr_array:
    """Renumber the columns in use, so that the centres of small parts are short."""
    used = np.zeros(matrix.shape[1], bool)
    used[matrix.indices] = True
    renumbered = (np.cumsum(used) - 1)[matrix.indices].astype(matrix.indices.dtype)
    return sparse.csr_array((matrix.data, renumbered, matrix.indptr), shape=(matrix.shape[0], int(used.sum())))
