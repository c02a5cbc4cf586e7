"""omikuji: three trees of linear classifiers, as Parabel or as Bonsai builds them; its own defaults otherwise.

Parabel splits labels in two equal halves again and again; Bonsai in 100 clusters of any size, three levels deep at most.
"""

from pathlib import Path
from typing import Any

import omikuji
from _peer import THREADS, TOP, Data, Ranked, Tfidf, arguments, run
from scipy.sparse import csr_matrix

BEAM = 10


def write(path: Path, features_DF: csr_matrix, truth_DL: csr_matrix) -> None:
    """The text format of the Extreme Classification Repository, the only one that omikuji trains on."""
    with path.open("w") as file:
        file.write(f"{features_DF.shape[0]} {features_DF.shape[1]} {truth_DL.shape[1]}\n")
        for features, truth in zip(features_DF, truth_DL, strict=True):
            pairs = sorted(zip(features.indices, features.data, strict=True))
            file.write(",".join(map(str, truth.indices)) + "".join(f" {place}:{value:.6g}" for place, value in pairs) + "\n")


def main() -> None:
    given = arguments(mode="parabel")
    data = Data(given.data)
    kept: dict[str, Any] = {}

    def fit() -> None:
        tfidf = Tfidf(data.texts, given.rarest)
        write(given.out / "train.txt", tfidf.train_DF, data.truth_DL)
        settings = omikuji.Model.default_hyper_param()
        settings.n_trees = 3
        if given.mode == "bonsai":
            settings.cluster_balanced, settings.cluster_k, settings.max_depth = False, 100, 3
        model = omikuji.Model.train_on_data(str(given.out / "train.txt"), settings, n_threads=THREADS)
        (given.out / "train.txt").unlink()
        model.save(str(given.out / "model" / "trees"))
        tfidf.save(given.out / "model")
        kept.update(tfidf=tfidf, model=model)

    def predict() -> Ranked:
        rows = kept["tfidf"](data.test_texts)
        return [kept["model"].predict(zip(row.indices, row.data, strict=True), BEAM, TOP) for row in rows]

    run(given.out, data, fit, predict)


if __name__ == "__main__":
    main()
