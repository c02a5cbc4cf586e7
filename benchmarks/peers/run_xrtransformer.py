"""XR-Transformer of libpecos: an encoder trained level by level down the tree, then linear rankers on its features and TF-IDF.

Its defaults, with batches of 32, a rate for a small encoder, and as many tokens and ``--steps`` a level as an hour of two cores
has time for. What a text says beyond its first tokens, the TF-IDF still sees.
"""

from typing import Any

import torch
from _peer import THREADS, TOP, Data, Ranked, Tfidf, arguments, best_of, run
from pecos.xmc.xtransformer.matcher import TransformerMatcher
from pecos.xmc.xtransformer.model import XTransformer
from pecos.xmc.xtransformer.module import MLProblemWithText

BEAM, BATCH, RATE, TOKENS = 50, 32, 1e-4, 64


def main() -> None:
    given = arguments(encoder="", steps=250)
    torch.set_num_threads(THREADS)
    data = Data(given.data)
    kept: dict[str, Any] = {}

    def fit() -> None:
        tfidf = Tfidf(data.texts, given.rarest)
        matcher = {
            "model_shortcut": given.encoder,
            "batch_size": BATCH,
            "learning_rate": RATE,
            "max_steps": given.steps,
            "warmup_steps": given.steps // 10,
            "save_steps": given.steps + 1,
            "batch_gen_workers": 1,
            "use_gpu": False,
            "checkpoint_dir": str(given.out / "checkpoints"),
        }
        train = XTransformer.TrainParams.from_dict({}, recursive=True)
        train.matcher_params_chain = TransformerMatcher.TrainParams.from_dict(matcher)
        predict = XTransformer.PredParams.from_dict({}, recursive=True)
        predict.matcher_params_chain = TransformerMatcher.PredParams.from_dict({"truncate_length": TOKENS})
        problem = MLProblemWithText(data.texts, data.truth_DL, X_feat=tfidf.train_DF)
        model = XTransformer.train(problem, train_params=train, pred_params=predict, threads=THREADS, beam_size=BEAM)
        model.save(str(given.out / "model"))
        tfidf.save(given.out / "model")
        kept.update(tfidf=tfidf, model=model)

    def predict() -> Ranked:
        features_DF = kept["tfidf"](data.test_texts)
        options = {"beam_size": BEAM, "only_topk": TOP, "batch_size": BATCH, "batch_gen_workers": 1, "threads": THREADS}
        return best_of(kept["model"].predict(data.test_texts, features_DF, use_gpu=False, **options))

    run(given.out, data, fit, predict)


if __name__ == "__main__":
    main()
