"""What rare labels would gain if their odds were lifted: the ten best labels of kept runs of `quality`, in another order.

A label's odds are divided by its propensity to the power of a strength: with 1 a small chance that it is noted becomes the
chance that it is right (Jain et al. 2016); as a bias on logits this is how Menon et al. 2021 act against long tails. Nothing is
trained, and nothing in the library does it yet. All methods are lifted, for what helps ours may help the peers. Bar, for the
greatest strength: no loss for our ensembles in P@1, P@3, P@5 and PSP@5 on any set.
"""

import argparse
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from _frame import verdict
from _quality import DEPTH, ROOT, ranking
from _setup import DATA, require
from quality import JUDGED, OURS, SEEDS, SETS, methods

from xmc_ray.labels import IntArray, LabelIndex
from xmc_ray.metrics import FloatArray, Metrics, propensities

_NEAREST = 1e-7  # to 0 and 1 that a score is taken to be


def lifted(ids_DK: IntArray, scores_DK: FloatArray, propensity_L: FloatArray, strength: float) -> IntArray:
    """The labels of each document in the order of their lifted odds; -1 stays last."""
    chance_DK = np.clip(scores_DK, _NEAREST, 1 - _NEAREST)
    logit_DK = np.log(chance_DK / (1 - chance_DK)) - strength * np.log(propensity_L[ids_DK])
    order_DK = np.argsort(np.where(ids_DK < 0, np.inf, -logit_DK), axis=1, kind="stable")
    return np.take_along_axis(ids_DK, order_DK, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DATA, help="the folder that the data sets are in")
    parser.add_argument("--results", type=Path, default=ROOT / "runs" / "peers-results", help="runs of quality")
    parser.add_argument("--strengths", type=float, nargs="+", default=[0.0, 0.5, 1.0])
    arguments = parser.parse_args()
    losses = []
    for set_ in SETS:
        data = require(arguments.data / set_)
        index = LabelIndex.count(pq.read_table(data / "train.parquet", columns=["labels"])["labels"].chunks)
        truth = index.encode(pq.read_table(data / "test.parquet", columns=["labels"])["labels"].combine_chunks())
        offsets, values = (np.asarray(part, np.int64) for part in (truth.offsets, truth.values))
        propensity_L = propensities(index.counts, index.n_documents)
        print(f"\n{set_:32}{'strength':>9}" + "".join(f"{name:>8}" for name in JUDGED))
        for name in sorted(method.name for method in methods(set_, SEEDS[set_], [])):
            file = arguments.results / set_ / name / "predictions.parquet"
            if not file.exists():
                continue
            predicted = pq.read_table(file)
            ids_DK = ranking(predicted["labels"].combine_chunks(), index)
            scores_DK = np.array([(row + [0.0] * DEPTH)[:DEPTH] for row in predicted["scores"].to_pylist()])
            found = {}
            for strength in arguments.strengths:
                metrics = Metrics.empty(index.counts, index.n_documents)
                metrics.update(lifted(ids_DK, scores_DK, propensity_L, strength), offsets, values)
                found[strength] = metrics.result()["total"]
                print(f"{name:32}{strength:9.1f}" + "".join(f"{100 * found[strength][metric]:8.2f}" for metric in JUDGED))
            if name.startswith(f"{OURS}-ensemble"):
                losses += [100 * (found[max(found)][metric] - found[min(found)][metric]) for metric in JUDGED]
    least = min(losses, default=float("-inf"))
    verdict("lift", f"{least:+.2f} points at the worst of {', '.join(JUDGED)}", "no loss", least >= 0)


if __name__ == "__main__":
    main()
