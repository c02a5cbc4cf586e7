"""Keeps a bundle and a night of this version for the tests of later ones: before a release, in an empty folder.

PYTHONPATH=.:tests/support python tests/support/keep_version.py /data && mv /data tests/kept/0.2.0

The folder's address stays in the night's manifest, so take one that says nothing of the machine.
"""

import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from conftest import WORDS, save_encoder
from fruit import COLOURS, KINDS, document
from in_process import InProcess

from xmc_ray import EncoderConfig, FitConfig, GroupsConfig, LexicalConfig, LoopConfig, OptimConfig, XMCClassifier
from xmc_ray.command import parse
from xmc_ray.on_ray.tag.config import TagConfig
from xmc_ray.on_ray.tag.job import tag

CONFIG = {
    "lexical": LexicalConfig(width=8, columns=512, rarest=1),
    "groups": GroupsConfig(max_size=1),
    "optim": OptimConfig(head_lr=2e-2),
    "loop": LoopConfig(epochs=10, batch_size=8, precision="float32"),
}


def keep(folder: Path) -> None:
    """``bundle``, ``documents.parquet`` and ``nights`` with one day."""
    encoder = save_encoder(folder / "encoder", WORDS[1:], 16)
    labels = [[colour, kind] for colour in COLOURS for kind in KINDS] * 8
    config = FitConfig(encoder=EncoderConfig(name=str(encoder), layers=0), **CONFIG)
    XMCClassifier.fit([f"a {colour} {kind}" for colour, kind in labels], labels, config=config).save(folder / "bundle")
    for path in encoder.iterdir():
        path.unlink()
    encoder.rmdir()
    pq.write_table(pa.Table.from_pylist([document(number) for number in range(24)]), folder / "documents.parquet")
    places = {"documents.uri": folder / "documents.parquet", "bundle": folder / "bundle", "output": folder / "nights"}
    options = [f"--{name}={place}" for name, place in places.items()]
    tag(parse(TagConfig, [*options, "--date=2026-11-23", "--k=3", "--pool.threads=1"]), InProcess())


if __name__ == "__main__":
    keep(Path(sys.argv[1]))
