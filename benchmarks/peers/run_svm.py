"""One linear support vector machine a label (LibMultiLabel's one-vs-rest), its own defaults: for some hundreds of labels."""

from typing import Any

import libmultilabel.linear as linear
from _peer import THREADS, Data, Ranked, Tfidf, arguments, run
from run_libmultilabel import ROWS, best


def main() -> None:
    given = arguments()
    data = Data(given.data)
    kept: dict[str, Any] = {}

    def fit() -> None:
        tfidf = Tfidf(data.texts, given.rarest)
        model = linear.train_1vsrest(data.truth_DL, tfidf.train_DF, options=f"-m {THREADS}", verbose=False)
        linear.save_pipeline(str(given.out / "model"), None, model)
        tfidf.save(given.out / "model")
        kept.update(tfidf=tfidf, model=model)

    def predict() -> Ranked:
        features_DF = kept["tfidf"](data.test_texts)
        ranked: list[Any] = []
        for first in range(0, features_DF.shape[0], ROWS):
            ranked += best(linear.predict_values(kept["model"], features_DF[first : first + ROWS]))
        return ranked

    run(given.out, data, fit, predict)


if __name__ == "__main__":
    main()
