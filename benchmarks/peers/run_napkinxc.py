"""napkinXC: three probabilistic label trees by hierarchical k-means; its own defaults otherwise (LIBLINEAR, logistic loss).

Their chances are averaged here: its own ``ensemble=3`` (0.7.2) ends in a segmentation fault on tate and debian-deps.
"""

from collections import defaultdict
from heapq import nlargest
from itertools import chain

from _peer import THREADS, TOP, Data, Ranked, Tfidf, arguments, run
from napkinxc.models import PLT

TREES = 3
KEPT = 5 * TOP  # labels of a tree that take part in the average


def main() -> None:
    given = arguments()
    data = Data(given.data)
    trees = [PLT(str(given.out / "model" / f"tree{seed}"), threads=THREADS, seed=seed) for seed in range(TREES)]
    kept: dict[str, Tfidf] = {}

    def fit() -> None:
        kept["tfidf"] = Tfidf(data.texts, given.rarest)
        labels = [sorted(row.indices.tolist()) for row in data.truth_DL]
        for tree in trees:
            tree.fit(kept["tfidf"].train_DF, labels)
            tree.load()
        kept["tfidf"].save(given.out / "model")

    def predict() -> Ranked:
        features_DF = kept["tfidf"](data.test_texts)
        rows = zip(*(tree.predict_proba(features_DF, top_k=KEPT) for tree in trees), strict=True)
        return [averaged(row) for row in rows]

    run(given.out, data, fit, predict)


def averaged(row: Ranked) -> list[tuple[int, float]]:
    """The best labels by the mean of all trees' chances; a label that a tree does not name has none there."""
    chances: dict[int, float] = defaultdict(float)
    for label, chance in chain.from_iterable(row):
        chances[label] += chance / TREES
    return nlargest(TOP, chances.items(), key=lambda one: one[1])


if __name__ == "__main__":
    main()
