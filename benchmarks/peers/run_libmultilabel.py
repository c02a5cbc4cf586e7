"""LibMultiLabel: three trees of linear classifiers, clusters of at most 100; its own defaults otherwise."""

from typing import Any

import libmultilabel.linear as linear
import numpy as np
import numpy.typing as npt
from _peer import THREADS, TOP, Data, Ranked, Tfidf, arguments, run

ROWS = 512  # predicted at a time: a row of scores is as wide as all nodes of the trees
BEAM = 10


def best(scores_DL: npt.NDArray[np.float64]) -> Ranked:
    order = np.argsort(-scores_DL, axis=1, kind="stable")[:, :TOP]
    return [[(int(label), float(row[label])) for label in top] for row, top in zip(scores_DL, order, strict=True)]


def main() -> None:
    given = arguments()
    data = Data(given.data)
    kept: dict[str, Any] = {}

    def fit() -> None:
        tfidf = Tfidf(data.texts, given.rarest)
        model = linear.train_ensemble_tree(data.truth_DL, tfidf.train_DF, f"-m {THREADS}", n_trees=3, verbose=False)
        linear.save_pipeline(str(given.out / "model"), None, model)
        tfidf.save(given.out / "model")
        kept.update(tfidf=tfidf, model=model)

    def predict() -> Ranked:
        features_DF = kept["tfidf"](data.test_texts)
        ranked: list[Any] = []
        for first in range(0, features_DF.shape[0], ROWS):
            ranked += best(kept["model"].predict_values(features_DF[first : first + ROWS], beam_width=BEAM))
        return ranked

    run(given.out, data, fit, predict)


if __name__ == "__main__":
    main()
