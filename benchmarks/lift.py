"""Whether ours are ahead because of the lift alone (decision 0016): with it and without, and the peers lifted as well.

Kept runs of `quality` are read, nothing is trained. Our ensembles predict anew, as they are and with the lift taken out of
their models. A peer's ten best labels are put into another order, by its scores' odds over the labels' propensities: what a
lift can do for a model from outside. Bar: our ensembles, lifted, ahead of every peer, lifted or not, in P@1, P@3, P@5 and PSP@5
on every set.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from _frame import verdict
from _quality import DEPTH, ROOT, Method, ranking
from _setup import DATA, require
from quality import JUDGED, OURS, SEEDS, SETS, methods

from xmc_ray.ensemble import Ensemble
from xmc_ray.labels import IntArray, LabelIndex
from xmc_ray.loop import LoopConfig
from xmc_ray.metrics import FloatArray, Metrics, propensities

_NEAREST = 1e-7  # to 0 and 1 that a score is taken to be


@dataclass(frozen=True)
class Split:
    """The test split of a data set: texts (string[D]), true labels' offsets and ids, and the labels of its training split."""

    texts: pa.Array
    offsets: IntArray
    labels: IntArray
    index: LabelIndex

    @classmethod
    def read(cls, folder: Path) -> "Split":
        index = LabelIndex.count(pq.read_table(folder / "train.parquet", columns=["labels"])["labels"].chunks)
        test = pq.read_table(folder / "test.parquet", columns=["text", "labels"])
        truth = index.encode(test["labels"].combine_chunks())
        offsets, labels = (np.asarray(part, np.int64) for part in (truth.offsets, truth.values))
        return cls(test["text"].combine_chunks(), offsets, labels, index)

    def score(self, ids_DK: IntArray) -> dict[str, Any]:
        metrics = Metrics.empty(self.index.counts, self.index.n_documents)
        metrics.update(ids_DK, self.offsets, self.labels)
        total: dict[str, Any] = metrics.result()["total"]
        return total


def of_ours(split: Split, method: Method, results: Path) -> tuple[IntArray, IntArray]:
    """The labels of an ensemble's models without a lift, and with it."""
    ensemble = Ensemble.load([results / name / "run" / "bundle" for name in method.members])
    tokens, found = ensemble.encode(split.texts), []
    for _ in ("lifted", "plain"):
        found.append(ensemble.predict(tokens, DEPTH, LoopConfig())[1])
        for bundle in ensemble.bundles:
            bundle.model.recall.lift = None
    return found[1], found[0]


def of_peers(split: Split, out: Path) -> tuple[IntArray, IntArray]:
    """The labels that a peer has predicted, as they are and in the order of their lifted odds; -1 stays last."""
    predicted = pq.read_table(out / "predictions.parquet")
    ids_DK = ranking(predicted["labels"].combine_chunks(), split.index)
    scores_DK = np.array([(row + [0.0] * DEPTH)[:DEPTH] for row in predicted["scores"].to_pylist()])
    propensity_L = propensities(split.index.counts, split.index.n_documents)
    return ids_DK, lifted(ids_DK, scores_DK, propensity_L)


def lifted(ids_DK: IntArray, scores_DK: FloatArray, propensity_L: FloatArray) -> IntArray:
    chance_DK = np.clip(scores_DK, _NEAREST, 1 - _NEAREST)
    logit_DK = np.log(chance_DK / (1 - chance_DK)) - np.log(propensity_L[ids_DK])
    order_DK = np.argsort(np.where(ids_DK < 0, np.inf, -logit_DK), axis=1, kind="stable")
    return np.take_along_axis(ids_DK, order_DK, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DATA, help="the folder that the data sets are in")
    parser.add_argument("--sets", nargs="+", default=list(SETS), help="names of data sets in it")
    parser.add_argument("--results", type=Path, default=ROOT / "runs" / "peers-results", help="runs of quality")
    arguments = parser.parse_args()
    margins = []
    for set_ in arguments.sets:
        split, results = Split.read(require(arguments.data / set_)), arguments.results / set_
        print(f"\n{set_:42}" + "".join(f"{name:>8}" for name in JUDGED))
        ours, peers = [], []
        for method in sorted(methods(set_, SEEDS[set_], []), key=lambda method: method.name):
            is_ours = method.name.startswith(OURS)
            if (is_ours and not method.members) or not (results / method.name / "predictions.parquet").exists():
                continue
            both = of_ours(split, method, results) if is_ours else of_peers(split, results / method.name)
            plain, lifted_ = map(split.score, both)
            for told, found in (("", plain), (", lifted", lifted_)):
                print(f"{method.name + told:42}" + "".join(f"{100 * found[metric]:8.2f}" for metric in JUDGED), flush=True)
            if is_ours:
                ours.append(lifted_)
            else:
                peers += [plain, lifted_]
        margins += [100 * (one[metric] - max(peer[metric] for peer in peers)) for one in ours for metric in JUDGED if peers]
    least = min(margins, default=float("-inf"))
    verdict("lift", f"{least:+.2f} points at the worst of {', '.join(JUDGED)}", "above 0 on every set", least > 0)


if __name__ == "__main__":
    main()
