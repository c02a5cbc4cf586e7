"""omikuji with a single tree, as Parabel builds it: the cheapest of all peers; otherwise as run_omikuji.py.

It is a script of its own because rows are valid for one state of their script: with one more option in run_omikuji.py, omikuji
would have to be run again on every data set.
"""

from typing import Any

import omikuji
from _peer import THREADS, TOP, Data, Ranked, Tfidf, arguments, run
from run_omikuji import BEAM, write


def main() -> None:
    given = arguments()
    data = Data(given.data)
    kept: dict[str, Any] = {}

    def fit() -> None:
        tfidf = Tfidf(data.texts, given.rarest)
        write(given.out / "train.txt", tfidf.train_DF, data.truth_DL)
        settings = omikuji.Model.default_hyper_param()
        settings.n_trees = 1
        kept["model"] = omikuji.Model.train_on_data(str(given.out / "train.txt"), settings, n_threads=THREADS)
        (given.out / "train.txt").unlink()
        kept["model"].save(str(given.out / "model" / "trees"))
        tfidf.save(given.out / "model")
        kept["tfidf"] = tfidf

    def predict() -> Ranked:
        rows = kept["tfidf"](data.test_texts)
        return [kept["model"].predict(zip(row.indices, row.data, strict=True), BEAM, TOP) for row in rows]

    run(given.out, data, fit, predict)


if __name__ == "__main__":
    main()
