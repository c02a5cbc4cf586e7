"""Labels added to a finished model, against retraining with them: debian-tags with a tenth of its labels hidden.

The recipe is trained without the hidden labels, then extended: with the training documents that have one of them, with
all training documents, and by names alone. Measured on the test split: the hidden labels among all labels, truth restricted to
them (R@5, R@10); the hidden labels ranked among themselves (P@1, P@5); the old labels (P@1, P@5), which lose ranks to the new
ones; and how far an old label's score has moved. One thread. Further settings go to the recipe: ``--groups.max_size=16``.

Bar: with all training documents, 90 % of the retrained model's R@5 of the hidden labels.
"""

import time
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch

from benchmarks.frame import verdict
from benchmarks.inputs import DATA, minilm, require
from xmc_ray.classifier import XMCClassifier
from xmc_ray.command import parse
from xmc_ray.data.labels import IntArray
from xmc_ray.metrics.at_k import Metrics
from xmc_ray.training.fit import FitConfig

ROOT, BAR, SHARE = Path(__file__).resolve().parents[2], 0.9, 0.1


def restricted(lists: pa.ListArray, labels: set[str], inside: bool = True) -> list[list[str]]:
    """The labels of each document that are among ``labels``, or that are not."""
    return [[label for label in row if (label in labels) == inside] for row in lists.to_pylist()]


def scores_of(classifier: XMCClassifier, texts: pa.Array) -> tuple[IntArray, np.ndarray]:
    """Every label of every document, best first: ids int64[D, L], -1 where there are no more, and scores."""
    ensemble = classifier.ensemble
    scores, ids = ensemble.predict(ensemble.encode(texts), len(ensemble.labels), classifier.prediction, "exact")
    return ids, scores


def fractions(ids_Dk: IntArray, truth: list[list[str]], classifier: XMCClassifier) -> dict[str, float]:
    """P and R of ids against the true labels, over the documents that have one."""
    index = classifier.ensemble.labels
    encoded = index.encode(pa.array(truth, pa.list_(pa.string())))
    metrics = Metrics(np.maximum(index.counts, 1), index.n_documents)
    metrics.update(ids_Dk[:, :10], encoded)
    found = metrics.result()["total"]
    return {name: 100 * (found[name] or 0.0) for name in ("P@1", "P@5", "R@5", "R@10")}


def row(name: str, classifier: XMCClassifier, test: pa.Table, hidden: set[str], seconds: float) -> dict[str, float]:
    """Print a line; the figures of the hidden labels among all labels."""
    ids_DL, _ = scores_of(classifier, test["text"].combine_chunks())
    is_hidden = np.array([*(label in hidden for label in classifier.ensemble.labels.labels.to_pylist()), False])
    first = np.argsort(~is_hidden[ids_DL], axis=1, kind="stable")
    alone_DL = np.take_along_axis(np.where(is_hidden[ids_DL], ids_DL, -1), first, 1)
    new, old = (restricted(test["labels"].combine_chunks(), hidden, inside) for inside in (True, False))
    among, alone, kept = (fractions(ids, true, classifier) for ids, true in ((ids_DL, new), (alone_DL, new), (ids_DL, old)))
    figures = (among["R@5"], among["R@10"], alone["P@1"], alone["P@5"], kept["P@1"], kept["P@5"])
    print(f"{name:34}" + "".join(f"{figure:9.2f}" for figure in figures) + f"{seconds:9.1f}", flush=True)
    return among


def moved(one: XMCClassifier, other: XMCClassifier, texts: pa.Array) -> float:
    """The largest difference of an old label's scores."""
    tables = []
    for classifier in (one, other):
        ids_DL, scores_DL = scores_of(classifier, texts)
        by_id_DL = np.zeros((len(ids_DL), ids_DL.shape[1] + 1), np.float32)
        np.put_along_axis(by_id_DL, ids_DL, scores_DL, 1)  # -1 is the last column
        tables.append(by_id_DL[:, : len(one.ensemble.labels)])
    return float(np.abs(tables[0] - tables[1]).max())


def timed(make: Callable[[], XMCClassifier]) -> tuple[XMCClassifier, float]:
    started = time.perf_counter()
    return make(), time.perf_counter() - started


def main() -> None:
    torch.set_num_threads(1)
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DATA / "debian-tags", help="folder with train, test and labels.parquet")
    parser.add_argument("--recipe", type=Path, default=ROOT / "jobs" / "configs" / "quality-debian-tags.toml")
    arguments, further = parser.parse_known_args()
    train, test = (pq.read_table(require(arguments.data) / f"{split}.parquet") for split in ("train", "test"))
    texts, lists = train["text"].to_pylist(), train["labels"].combine_chunks()
    table = pq.read_table(arguments.data / "labels.parquet")
    names = dict(zip(table["label"].to_pylist(), table["name"].to_pylist(), strict=True))
    known = sorted(set(pc.list_flatten(lists).to_pylist()))
    hidden = set(np.random.default_rng(0).permutation(known)[: int(SHARE * len(known))].tolist())
    has_hidden = [bool(row) for row in restricted(lists, hidden)]
    some = [text for text, has in zip(texts, has_hidden, strict=True) if has], lists.filter(pa.array(has_hidden)).to_pylist()
    of_hidden = {label: name for label, name in names.items() if label in hidden}
    print(f"{len(train):,} documents, {len(known)} labels, {len(hidden)} hidden, {len(some[0]):,} documents with one of these")

    config = parse(FitConfig, [f"--config={arguments.recipe}", f"--encoder.name={minilm()}", *further])
    print(f"{'':34}{'hidden among all':>18}{'among themselves':>18}{'old labels':>18}")
    print(f"{'':34}" + "".join(f"{name:>9}" for name in ("R@5", "R@10", "P@1", "P@5", "P@1", "P@5", "seconds")))
    all_lists = lists.to_pylist()
    base, seconds = timed(lambda: XMCClassifier.fit(texts, restricted(lists, hidden, False), config=config, names=names))
    row("without the hidden labels", base, test, hidden, seconds)
    full, seconds = timed(lambda: XMCClassifier.fit(texts, all_lists, config=config, names=names))
    retrained = row("trained again with all", full, test, hidden, seconds)
    figures = {}
    for name, make in {
        "extended by their documents": lambda: base.extend(*some, names=of_hidden),
        "extended by all documents": lambda: base.extend(texts, all_lists, names=of_hidden),
        "extended by names alone": lambda: base.extend(names=of_hidden),
    }.items():
        extended, seconds = timed(make)
        figures[name] = row(name, extended, test, hidden, seconds)
        print(f"    old labels' scores moved by {moved(base, extended, test['text'].combine_chunks()):.1e} at most")
    share = figures["extended by all documents"]["R@5"] / retrained["R@5"]
    verdict("extension", f"{share:.1%}", f"{BAR:.0%}", share >= BAR)


if __name__ == "__main__":
    main()
