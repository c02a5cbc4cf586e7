"""Label groups: seconds and peak memory from label vectors to groups, at 10 K, 100 K and 1 M synthetic labels.

Each size runs in a process of its own, so that its peak is its own. Documents are synthetic: labels belong to topics,
a topic has words of its own. Bar: memory grows no faster than the label vectors' non-zeros (ratio at most 1.25 from 100 K
to 1 M labels), every group within one label of every other.

    make bench NAME=clustering ARGS="--data ../shared/data/git-paths"

groups the labels of a data set by all terms of their vectors and by the heaviest, on one core and on all. Coherence is the mean
length of a label's share in the sum of its group's vectors, by all terms: 1 if all labels of a group are alike.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from scipy import sparse

from benchmarks.frame import verdict
from benchmarks.inputs import minilm, require
from xmc_ray.data import groups
from xmc_ray.data.groups import GroupsConfig, balanced_groups, heaviest, label_incidence, label_vectors, tfidf, unit_rows
from xmc_ray.data.labels import IntArray, LabelIndex
from xmc_ray.data.terms import count_terms, document_frequency, inverse_document_frequency
from xmc_ray.model.tokenizer import Tokenizer

SIZES = (10_000, 100_000, 1_000_000)
FEATURES, NON_ZEROS, TOPIC_WORDS, MAX_SIZE = 2**18, 40, 400, 100
BAR = 1.25


def vectors(n_labels: int) -> sparse.csr_array:
    """float32[L, F]: as sparse as PIFA vectors of rare labels are; half of a label's words come from its topic."""
    rng = np.random.default_rng(0)
    topic = rng.integers(max(2, n_labels // 50), size=(n_labels, 1))
    own = (topic * 7919 + rng.integers(TOPIC_WORDS, size=(n_labels, NON_ZEROS // 2))) % FEATURES
    common = (FEATURES * rng.random((n_labels, NON_ZEROS // 2)) ** 3).astype(np.int64)
    columns = np.sort(np.concatenate([own, common], axis=1), axis=1).astype(np.int32).ravel()
    offsets = np.arange(n_labels + 1, dtype=np.int64 if n_labels * NON_ZEROS > 2**31 else np.int32) * NON_ZEROS
    return unit_rows(sparse.csr_array((rng.random(len(columns), np.float32), columns, offsets), shape=(n_labels, FEATURES)))


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure(n_labels: int) -> None:
    """In a child: group, and print what it took as JSON."""
    matrix = vectors(n_labels)
    size = matrix.data.nbytes + matrix.indices.nbytes + matrix.indptr.nbytes
    before, started = peak_bytes(), time.perf_counter()
    sizes = np.bincount(balanced_groups(matrix, MAX_SIZE, seed=0))
    seconds = time.perf_counter() - started
    peak = peak_bytes()
    print(json.dumps([len(sizes), int(sizes.min()), int(sizes.max()), seconds, size, before, peak]))


def vectors_of(folder: Path) -> sparse.csr_array:
    """float32[L, F]: those of a data set's labels, with all terms."""
    rows = pq.read_table(require(folder) / "train.parquet", columns=["text", "labels"])
    index, tokenizer, features = (
        LabelIndex.count(rows["labels"].chunks),
        Tokenizer.load(minilm(), 2048),
        GroupsConfig().features,
    )
    chunks = [rows.slice(first, 4096) for first in range(0, len(rows), 4096)]
    tokens = [tokenizer.encode(chunk["text"].combine_chunks())[0] for chunk in chunks]
    idf_F = inverse_document_frequency(*document_frequency(count_terms(part, features) for part in tokens))
    truth = [label_incidence(index.encode(chunk["labels"].combine_chunks()), len(index)) for chunk in chunks]
    return label_vectors(
        y_DL.T.tocsr() @ tfidf(count_terms(part, features), idf_F) for part, y_DL in zip(tokens, truth, strict=True)
    )


def coherence(vectors_LF: sparse.csr_array, group_L: IntArray) -> float:
    lengths = 0.0
    members = sparse.csr_array((np.ones(len(group_L), np.float32), (group_L, np.arange(len(group_L)))))
    for first in range(0, members.shape[0], 256):  # a few groups at a time: sums are dense
        sums = members[first : first + 256] @ vectors_LF
        sums.data **= 2
        lengths += float(np.sqrt(np.asarray(sums.sum(1))).sum())
    return lengths / len(group_L)


def compare(folder: Path, max_size: int) -> None:
    """All terms and the heaviest, one core and all of them."""
    vectors_LF = vectors_of(folder)
    print(f"{folder.name}: {vectors_LF.shape[0]:,} labels, {vectors_LF.nnz:,} terms of all, groups of up to {max_size}\n")
    print(f"{'terms':>8}{'cores':>7}{'seconds':>10}{'CPU s':>8}{'coherence':>11}")
    light_LF = unit_rows(heaviest(vectors_LF.copy(), groups._TERMS))
    for name, matrix in (("all", vectors_LF), (str(groups._TERMS), light_LF)):
        for cores in sorted({1, len(os.sched_getaffinity(0))}):
            started, spent = time.perf_counter(), time.process_time()
            group_L = balanced_groups(matrix, max_size, 0, cores)
            took = time.perf_counter() - started, time.process_time() - spent
            print(f"{name:>8}{cores:>7}{took[0]:>10.1f}{took[1]:>8.1f}{coherence(vectors_LF, group_L):>11.4f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="a folder with train.parquet; without it, synthetic labels")
    parser.add_argument("--max-size", type=int, default=32, help="labels of a group of the data set")
    parser.add_argument("--labels", type=int, help=argparse.SUPPRESS)  # of a child
    given = parser.parse_args()
    if given.labels:
        measure(given.labels)
    elif given.data:
        compare(given.data, given.max_size)
    else:
        synthetic()


def synthetic() -> None:
    print(f"{'labels':>10}{'groups':>9}{'sizes':>9}{'seconds':>10}{'vectors':>11}{'peak':>11}{'above vectors':>15}")
    per_label, even = {}, True
    for n_labels in SIZES:
        child = subprocess.run([sys.executable, __file__, f"--labels={n_labels}"], capture_output=True, text=True, check=True)
        groups, least, most, seconds, size, _, peak = json.loads(child.stdout)
        even &= most - least <= 1
        per_label[n_labels] = peak / n_labels
        shape = f"{n_labels:>10,}{groups:>9,}{f'{least}-{most}':>9}{seconds:>10.1f}"
        print(f"{shape}{size / 2**20:>8.0f} MiB{peak / 2**20:>8.0f} MiB{(peak - size) / 2**20:>11.0f} MiB")
    ratio = per_label[1_000_000] / per_label[100_000]
    verdict("clustering", f"{ratio:.2f}x memory a label", f"{BAR}x, sizes within one", ratio <= BAR and even)


if __name__ == "__main__":
    main()
