"""XR-Linear of libpecos: a tree of linear rankers over labels clustered by their documents' features (PIFA).

Its defaults (squared hinge loss, 16 branches, leaves of at most 100 labels), with a beam of 50 instead of 10 in prediction.
"""

from typing import Any

from _peer import THREADS, TOP, Data, Ranked, Tfidf, arguments, best_of, run
from pecos.xmc import Indexer, LabelEmbeddingFactory
from pecos.xmc.xlinear.model import XLinearModel

BEAM = 50


def main() -> None:
    given = arguments()
    data = Data(given.data)
    kept: dict[str, Any] = {}

    def fit() -> None:
        tfidf = Tfidf(data.texts, given.rarest)
        clusters = Indexer.gen(LabelEmbeddingFactory.create(data.truth_DL, tfidf.train_DF, method="pifa"))
        model = XLinearModel.train(tfidf.train_DF, data.truth_DL, C=clusters, threads=THREADS)
        model.save(str(given.out / "model" / "tree"))
        tfidf.save(given.out / "model")
        kept.update(tfidf=tfidf, model=model)

    def predict() -> Ranked:
        features_DF = kept["tfidf"](data.test_texts)
        return best_of(kept["model"].predict(features_DF, beam_size=BEAM, only_topk=TOP, threads=THREADS))

    run(given.out, data, fit, predict)


if __name__ == "__main__":
    main()
