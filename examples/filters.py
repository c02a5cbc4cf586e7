"""Labels that a document may get: one model, two tenants, each with labels of its own.

    python examples/filters.py FOLDER --encoder ENCODER

``ENCODER`` is any hub name or folder; only its tokenizer is used, since the model reads words alone.
"""

import argparse
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from xmc_ray import EncoderConfig, FitConfig, GroupsConfig, LexicalConfig, LoopConfig, XMCClassifier
from xmc_ray.data.documents import DocumentsConfig
from xmc_ray.data.filters import FilterConfig, FiltersConfig
from xmc_ray.on_ray.tag.config import TagConfig
from xmc_ray.on_ray.tag.job import tag
from xmc_ray.on_ray.tag.nights import tags_folder
from xmc_ray.on_ray.tag.runner import Runner

COLOURS, KINDS = ("red", "green", "yellow"), ("apple", "pear", "plum")


def fit(encoder: str) -> XMCClassifier:
    """A model of colours and kinds of fruit."""
    pairs = [(colour, kind) for colour in COLOURS for kind in KINDS]
    config = FitConfig(
        encoder=EncoderConfig(name=encoder, layers=0),
        lexical=LexicalConfig(width=16, columns=1024, rarest=1),
        groups=GroupsConfig(max_size=1),
        loop=LoopConfig(epochs=20, batch_size=8),
    )
    return XMCClassifier.fit([f"a {colour} {kind}" for colour, kind in pairs] * 8, pairs * 8, config=config)


def night(folder: Path, bundle: str, runner: Runner | None = None) -> pa.Table:
    """Tag a catalogue of two tenants; those without a tenant get the labels of everybody."""
    table = {"label": [*COLOURS, *KINDS], "tenant": ["painter"] * 3 + ["grocer"] * 3}
    pq.write_table(pa.table(table), folder / "labels.parquet")
    documents = {"id": ["1", "2", "3"], "text": ["a red plum"] * 3, "tenant": ["painter", "grocer", None]}
    pq.write_table(pa.table(documents), folder / "catalogue.parquet")
    config = TagConfig(
        documents=DocumentsConfig(uri=str(folder / "catalogue.parquet")),
        bundle=bundle,
        output=str(folder / "out"),
        k=2,
        filters=FiltersConfig(
            column="tenant",
            by="tenant",
            table=str(folder / "labels.parquet"),
            named={"everybody": FilterConfig(deny=["pear"])},
            default="everybody",
        ),
    )
    return pq.read_table(tags_folder(tag(config, runner)))


def main(folder: Path, encoder: str, runner: Runner | None = None) -> pa.Table:
    """Print the tags of one text with and without a filter, and those of a night; returns the latter."""
    folder.mkdir(parents=True, exist_ok=True)
    classifier = fit(encoder)
    print("all labels ", classifier.predict(["a red plum"], k=2))
    print("allow      ", classifier.predict(["a red plum"], k=2, allow=KINDS))
    print("deny       ", classifier.predict(["a red plum"], k=2, deny=["red"]))
    classifier.save(folder / "bundle")
    tags = night(folder, str(folder / "bundle"), runner)
    for row in tags.to_pylist():
        print(row["id"], row["filter"], row["labels"])
    return tags


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--encoder", required=True)
    main(**vars(parser.parse_args()))
