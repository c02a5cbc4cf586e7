"""napkinXC: three probabilistic label trees by hierarchical k-means; its own defaults otherwise (LIBLINEAR, logistic loss)."""

from typing import Any

from _peer import THREADS, TOP, Data, Ranked, Tfidf, arguments, run
from napkinxc.models import PLT


def main() -> None:
    given = arguments()
    data = Data(given.data)
    model = PLT(str(given.out / "model"), ensemble=3, threads=THREADS, seed=0)
    kept: dict[str, Any] = {}

    def fit() -> None:
        kept["tfidf"] = Tfidf(data.texts)
        model.fit(kept["tfidf"].train_DF, [row.indices.tolist() for row in data.truth_DL])
        kept["tfidf"].save(given.out / "model")
        model.load()

    def predict() -> Ranked:
        ranked: Ranked = model.predict_proba(kept["tfidf"](data.test_texts), top_k=TOP)
        return ranked

    run(given.out, data, fit, predict)


if __name__ == "__main__":
    main()
