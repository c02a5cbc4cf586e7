"""The whole tagging job against a straightforward loop over the same documents, tate's, with the same model.

`plain`: one process with a thread a core reads a Parquet file and takes 32 documents at a time as they come, pads them to the
maximum (128 tokens), lists the candidates of each document (labels of its best groups), gathers their vectors one by one, and
writes labels and scores as Parquet at the end. Tokenising is the same fast tokenizer. `job`: the library's own night on local
files, start-up excluded as in `tag-speed`.

Scores are the same product of recall and ranking; how many documents have the same best label is printed. Rates are compared;
the plain loop takes every fourth document, since it is slow. The model: MiniLM with all its layers (unless told) and tate's
labels, heads untrained. They take turns. Bar: 3 times.
"""

import tempfile
import time
from pathlib import Path
from statistics import median

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import ray
import torch

from benchmarks.frame import verdict
from benchmarks.plain import PlainModel
from benchmarks.tagging._tagging import (
    CORES,
    MAX_TOKENS,
    K,
    apart,
    diary,
    documents_of,
    label_lists,
    make_bundle,
    options,
    spread,
    tag_config,
    tagger,
    told,
    write_documents,
)
from xmc_ray.bundle.content import load_bundle
from xmc_ray.on_ray.tag.nights import tag_files

BAR, BATCH, EVERY = 3.0, 32, 4


def plain(bundle: str, source: str, target: str) -> tuple[float, int]:
    """Seconds and documents of the straightforward loop; the loading of the model is not counted."""
    torch.set_num_threads(CORES)
    loaded = load_bundle(bundle)
    model, names = PlainModel(loaded.model).eval(), loaded.labels.labels.to_pylist()
    started = time.perf_counter()
    documents = pq.read_table(source)
    ids, texts, tags, scores = documents["id"].to_pylist(), documents["text"].to_pylist(), [], []
    with torch.inference_mode():
        for first in range(0, len(texts), BATCH):
            lists = loaded.tokenizer.encode(pa.array(texts[first : first + BATCH]))[0].to_pylist()
            tokens_BT = torch.tensor([row + [0] * (MAX_TOKENS - len(row)) for row in lists])
            mask_BT = torch.tensor([[True] * len(row) + [False] * (MAX_TOKENS - len(row)) for row in lists])
            for labels, best in best_labels(model, tokens_BT, mask_BT):
                tags.append([names[label] for label in labels])
                scores.append(best)
    pq.write_table(pa.table({"id": ids, "labels": tags, "scores": scores}), target)
    return time.perf_counter() - started, len(texts)


def best_labels(model: PlainModel, tokens_BT: torch.Tensor, mask_BT: torch.Tensor) -> list[tuple[list[int], list[float]]]:
    """The `K` best labels of each document, and their scores."""
    features_BF = model.encoder(tokens_BT, mask_BT)
    logits_BG = model.recall(features_BF)
    label_BC, _ = model.candidates(logits_BG.topk(model.shortlist).indices, [[]] * len(tokens_BT))
    vectors_BH = model.bottleneck(features_BF)  # type: ignore[misc]
    best = []
    for labels_C, vector_H, logits_G in zip(label_BC, vectors_BH, logits_BG, strict=True):
        labels_C = labels_C[labels_C < len(model.group_of)]
        groups_C = torch.tensor([model.group_of[label] for label in labels_C.tolist()])
        rank_C = model.vectors(labels_C) @ vector_H + model.biases(labels_C)[:, 0]
        scores_K, places_K = (rank_C.sigmoid() * logits_G[groups_C].sigmoid()).topk(K)
        best.append((labels_C[places_K].tolist(), scores_K.tolist()))
    return best


def same_best(folder: str, target: str) -> float:
    """Share of the plain loop's documents whose best label is that of the night."""
    ours = pa.concat_tables([pq.read_table(file.uri, partitioning=None) for file in tag_files(folder)])
    theirs = pq.read_table(target)
    rows = pc.index_in(theirs["id"], value_set=ours["id"].combine_chunks())
    first = (pc.list_element(table["labels"], 0) for table in (ours.take(rows), theirs))
    return float(np.mean(pc.equal(*first).to_numpy()))


def main() -> None:
    arguments = options(__doc__, documents=16_384, rounds=3)
    documents, ratios = documents_of(arguments.data, arguments.documents), []
    rates: list[tuple[float, float]] = []
    with tempfile.TemporaryDirectory() as folder, diary() as book:
        bundle = make_bundle(Path(folder) / "bundle", tagger(arguments.layers), label_lists(arguments.data))
        source = write_documents(f"{folder}/documents", documents, files=4)
        some = write_documents(f"{folder}/some", documents.take(pa.array(np.arange(0, len(documents), EVERY))))
        print(told(arguments))
        print(f"{'plain docs/s':>13}{'job docs/s':>12}{'ratio':>7}{'same best label':>17}")
        for turn in range(arguments.rounds):
            seconds, rows = apart(plain, bundle, some, f"{folder}/plain.parquet")
            night = book.night(tag_config(source, bundle, f"{folder}/night-{turn}", pool=arguments.pool))
            ray.shutdown()
            rates.append((rows / seconds, len(documents) / night.seconds))
            ratios.append(rates[-1][1] / rates[-1][0])
            same = same_best(night.folder, f"{folder}/plain.parquet")
            print(f"{rates[-1][0]:13.0f}{rates[-1][1]:12.0f}{ratios[-1]:7.2f}{same:17.2%}", flush=True)
    print(f"ratio {spread(ratios)}")
    verdict("tag-plain", f"{median(ratios):.1f}x", f"{BAR:.0f}x", median(ratios) >= BAR)


if __name__ == "__main__":
    main()
