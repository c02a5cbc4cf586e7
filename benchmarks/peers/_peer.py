"""What the scripts of all peers share: documents in, TF-IDF, and the labels that a peer predicts out.

A script is run by its peer's own interpreter, so nothing of xmc_ray is at hand:

    run_<peer>.py DATA OUT [--option ...]

DATA holds train.parquet and test.parquet (id, text, labels). OUT gets ``predictions.parquet`` (``labels`` and ``scores``, ten a
row of test.parquet in its order), ``model/`` as the peer saves it, and ``costs.json``. Seconds run from texts to a saved model,
and from a model in memory and texts to labels: what a peer needs to get its features is its cost.

Letters: D documents, F features, L labels.
"""

import argparse
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from scipy.sparse import csr_matrix
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.preprocessing import MultiLabelBinarizer

THREADS, TOP = 2, 10

Ranked = Sequence[Sequence[tuple[int, float]]]
"""(place of the label, score) of each document's best labels, the best first."""


class Data:
    """The training documents that have a label, and all test documents; ``truth_DL`` and the names of its columns."""

    def __init__(self, folder: Path) -> None:
        train, test = (pq.read_table(folder / f"{split}.parquet", columns=["text", "labels"]) for split in ("train", "test"))
        rows = [row for row in train.to_pylist() if row["labels"]]
        self.texts, self.test_texts = [row["text"] for row in rows], test["text"].to_pylist()
        binarizer = MultiLabelBinarizer(sparse_output=True)
        self.truth_DL: csr_matrix = csr_matrix(binarizer.fit_transform([row["labels"] for row in rows]), dtype=np.float32)
        self.names: list[str] = list(binarizer.classes_)


class Tfidf:
    """TF-IDF of the words and word pairs that ``rarest`` documents have, with logarithmic counts and rows of length one."""

    def __init__(self, texts: Sequence[str], rarest: int) -> None:
        self.vectorizer = TfidfVectorizer(ngram_range=(1, 2), min_df=rarest, sublinear_tf=True, dtype=np.float32)
        self.train_DF: csr_matrix = self.vectorizer.fit_transform(texts)

    def __call__(self, texts: Sequence[str]) -> csr_matrix:
        features_DF: csr_matrix = self.vectorizer.transform(texts)
        return features_DF

    def save(self, folder: Path) -> None:
        """The terms and their weights: without them the model is of no use, so they count in its size."""
        terms = pa.table({"term": self.vectorizer.get_feature_names_out(), "idf": self.vectorizer.idf_.astype(np.float32)})
        pq.write_table(terms, folder / "terms.parquet")


def arguments(**options: Any) -> argparse.Namespace:
    """DATA, OUT, the least documents of a term, and further options with their defaults; OUT/model is made."""
    parser = argparse.ArgumentParser()
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--rarest", type=int, default=1)
    for name, default in options.items():
        parser.add_argument(f"--{name}", type=type(default), default=default)
    given = parser.parse_args()
    (given.out / "model").mkdir(parents=True, exist_ok=True)
    return given


def run(out: Path, data: Data, fit: Callable[[], object], predict: Callable[[], Ranked]) -> None:
    """Train, predict, and write what came out; ``fit`` leaves its model in memory and in ``out / "model"``."""
    started = time.monotonic()
    fit()
    fitted = time.monotonic()
    ranked = predict()
    ended = time.monotonic()
    labels = [[data.names[label] for label, _ in row] for row in ranked]
    scores = [[float(score) for _, score in row] for row in ranked]
    table = pa.table({"labels": pa.array(labels, pa.list_(pa.string())), "scores": pa.array(scores, pa.list_(pa.float32()))})
    pq.write_table(table, out / "predictions.parquet")
    size = sum(file.stat().st_size for file in (out / "model").rglob("*") if file.is_file())
    costs = {"train_seconds": fitted - started, "predict_seconds": ended - fitted, "model_bytes": size}
    (out / "costs.json").write_text(json.dumps(costs))


def best_of(scores_DL: csr_matrix) -> Ranked:
    """The entries of each row by falling score."""
    rows = (scores_DL.getrow(row) for row in range(scores_DL.shape[0]))
    return [sorted(zip(row.indices, row.data, strict=True), key=lambda entry: -entry[1])[:TOP] for row in rows]
