"""Label groups: seconds and peak memory from label vectors to groups, at 10 K, 100 K and 1 M synthetic labels.

Each size runs in a process of its own, so that its peak is its own. Documents are synthetic: labels belong to topics,
a topic has words of its own. Bar: memory grows no faster than the label vectors' non-zeros (ratio at most 1.25 from 100 K
to 1 M labels), every group within one label of every other.
"""

import json
import resource
import subprocess
import sys
import time

import numpy as np
from scipy import sparse

from benchmarks.frame import verdict
from xmc_ray.data.groups import balanced_groups, unit_rows

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


def main() -> None:
    print(f"{'labels':>10}{'groups':>9}{'sizes':>9}{'seconds':>10}{'vectors':>11}{'peak':>11}{'above vectors':>15}")
    per_label, even = {}, True
    for n_labels in SIZES:
        child = subprocess.run([sys.executable, __file__, str(n_labels)], capture_output=True, text=True, check=True)
        groups, least, most, seconds, size, _, peak = json.loads(child.stdout)
        even &= most - least <= 1
        per_label[n_labels] = peak / n_labels
        shape = f"{n_labels:>10,}{groups:>9,}{f'{least}-{most}':>9}{seconds:>10.1f}"
        print(f"{shape}{size / 2**20:>8.0f} MiB{peak / 2**20:>8.0f} MiB{(peak - size) / 2**20:>11.0f} MiB")
    ratio = per_label[1_000_000] / per_label[100_000]
    verdict("clustering", f"{ratio:.2f}x memory a label", f"{BAR}x, sizes within one", ratio <= BAR and even)


if __name__ == "__main__":
    measure(int(sys.argv[1])) if len(sys.argv) > 1 else main()
