"""Are our models ahead because of the lift alone (decision 0016)? With it and without, beside peers that are lifted as well.

Kept runs of `quality` are read, nothing is trained. Our ensembles predict again, as they are and with the lift removed from
their models. All methods are also lifted from outside: the ten best labels in the order of their scores' odds over the labels'
propensities, which is what a lift can do for a model without one; for a peer, the better of half and full strength counts for
each figure.

Bar: ours as they are ahead of every peer, lifted or not, and ours without a lift ahead of every peer without one, in P@1, P@3,
P@5 and PSP@5 on every set, and no run is missing; a peer may have taken too long.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.frame import verdict
from benchmarks.inputs import DATA, require
from benchmarks.quality._quality import DEPTH, ROOT, Method, collect, labels_of, ranking, score_ranking
from benchmarks.quality._tables import JUDGED, OURS
from benchmarks.quality.quality import SETS, methods
from xmc_ray.bundle.ensemble import Ensemble, Listed
from xmc_ray.data.labels import IntArray, LabelIndex
from xmc_ray.metrics.at_k import FloatArray, propensities
from xmc_ray.model.predict import PredictConfig

STRENGTHS = (0.5, 1.0)
_NEAREST = 1e-7  # to 0 and 1 that a score is taken to be

Figures = dict[str, float]


def scored(folder: Path, index: LabelIndex, ids_DK: IntArray) -> Figures:
    """The judged metrics of predictions for a test split, in percent."""
    total = score_ranking(folder, index, ids_DK)["total"]
    return {name: 100 * total[name] for name in JUDGED}


def of_ours(texts: pa.Array, members: list[Path]) -> tuple[Listed, Listed]:
    """What an ensemble predicts as it is, and without the lift."""
    ensemble = Ensemble.load(members)
    heads = [bundle.model.recall for bundle in ensemble.bundles]
    if any(head.lift is None for head in heads):
        raise SystemExit(
            f"a model in {members[0].parents[2]} was trained without a lift: make bench-quality ARGS='--methods {OURS}'"
        )
    tokens = ensemble.encode(texts)
    lifted = ensemble.predict(tokens, DEPTH, PredictConfig())
    for head in heads:
        head.lift = None
    return lifted, ensemble.predict(tokens, DEPTH, PredictConfig())


def of_peer(out: Path, index: LabelIndex) -> Listed:
    predicted = pq.read_table(out / "predictions.parquet")
    scores_DK = np.array([(row + [0.0] * DEPTH)[:DEPTH] for row in predicted["scores"].to_pylist()], np.float32)
    return scores_DK, ranking(predicted["labels"].combine_chunks(), index)


def reordered(listed: Listed, propensity_L: FloatArray, strength: float) -> IntArray:
    """The labels of each document in the order of their lifted odds; -1 stays last. Margins, below 0 or above 1, are logits."""
    scores_DK, ids_DK = listed
    logit_DK = scores_DK.astype(np.float64)
    if logit_DK.min() >= 0 and logit_DK.max() <= 1:
        chance_DK = logit_DK.clip(_NEAREST, 1 - _NEAREST)
        logit_DK = np.log(chance_DK / (1 - chance_DK))
    logit_DK -= strength * np.log(propensity_L[ids_DK])
    order_DK = np.argsort(np.where(ids_DK < 0, np.inf, -logit_DK), axis=1, kind="stable")
    return np.take_along_axis(ids_DK, order_DK, 1)


def rows(folder: Path, results: Path, method: Method, index: LabelIndex) -> Iterator[tuple[str, Figures]]:
    """What is printed of a method: how it was lifted, and its figures."""
    if method.members:
        texts = pq.read_table(folder / "test.parquet", columns=["text"])["text"].combine_chunks()
        lifted, plain = of_ours(texts, [results / name / "run" / "bundle" for name in method.members])
        yield "lifted", scored(folder, index, lifted[1])
    else:
        plain = of_peer(results / method.name, index)
    yield "", scored(folder, index, plain[1])
    propensity_L = propensities(index.counts, index.n_documents)
    for strength in STRENGTHS:
        yield f"ten best, {strength:g}", scored(folder, index, reordered(plain, propensity_L, strength))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DATA, help="the folder that the data sets are in")
    parser.add_argument("--results", type=Path, default=ROOT / "runs" / "quality", help="runs of quality")
    parser.add_argument("--sets", nargs="+", default=list(SETS), choices=SETS, help="names of data sets in it")
    arguments = parser.parse_args()
    least, missing = dict.fromkeys(("with", "without"), float("inf")), 0
    for set_ in arguments.sets:
        folder, results = require(arguments.data / set_), arguments.results / set_
        index = labels_of(folder)
        known = methods(set_, None, [])
        over = {name: "failure" not in one for name, one in collect(folder, results, [one.name for one in known]).items()}
        queue = [method for method in known if method.members or not method.name.startswith(OURS)]
        print(f"\n{set_:24}{'lifted':16}" + "".join(f"{name:>8}" for name in JUDGED))
        ours: dict[str, Figures] = {}
        best = {name: dict.fromkeys(JUDGED, float("-inf")) for name in least}
        for method in queue:
            if not all(over.get(name) for name in (method.name, *method.members)):
                print(f"{method.name:24}is missing or has not ended")
                missing += method.name not in over
                continue
            for how, figures in rows(folder, results, method, index):
                print(f"{method.name:24}{how:16}" + "".join(f"{value:8.2f}" for value in figures.values()), flush=True)
                if method.members:
                    ours |= {"with": figures} if how == "lifted" else {} if how else {"without": figures}
                else:
                    for side in ("with",) if how else ("with", "without"):
                        best[side] = {name: max(value, figures[name]) for name, value in best[side].items()}
        for side in least:
            found = ours.get(side, dict.fromkeys(JUDGED, float("-inf")))
            margins = {name: found[name] - best[side][name] for name in JUDGED}
            print(f"ours {side} a lift: " + ", ".join(f"{name} {value:+.2f}" for name, value in margins.items()))
            least[side] = min(least[side], *margins.values())
    figure = f"{least['with']:+.2f} points at the worst with lifts, {least['without']:+.2f} without"
    figure += f", {missing} runs missing" if missing else ""
    verdict("lift", figure, "above 0 on every set, either way", min(least.values()) > 0 and not missing)


if __name__ == "__main__":
    main()
