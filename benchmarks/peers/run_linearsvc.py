"""One linear support vector machine a label (scikit-learn's LinearSVC), its own defaults: for some hundreds of labels."""

from typing import Any

import numpy as np
from _peer import THREADS, Data, Ranked, Tfidf, arguments, run
from run_libmultilabel import best
from sklearn.multiclass import OneVsRestClassifier
from sklearn.svm import LinearSVC


def main() -> None:
    given = arguments()
    data = Data(given.data)
    kept: dict[str, Any] = {}

    def fit() -> None:
        tfidf = Tfidf(data.texts, given.rarest)
        model = OneVsRestClassifier(LinearSVC(), n_jobs=THREADS).fit(tfidf.train_DF, data.truth_DL)
        parts = [(one.coef_, one.intercept_) for one in model.estimators_]
        np.savez(given.out / "model" / "weights.npz", *(np.vstack(part) for part in zip(*parts, strict=True)))
        tfidf.save(given.out / "model")
        kept.update(tfidf=tfidf, model=model)

    def predict() -> Ranked:
        return best(kept["model"].decision_function(kept["tfidf"](data.test_texts)))

    run(given.out, data, fit, predict)


if __name__ == "__main__":
    main()
