"""A night in which 3 % of the documents changed, against a night that tags all of them: tate, from S3 to S3.

The second night reuses the tags of the other 97 % (``previous``). All work counts: planning (which reads both nights), copying,
reading, tagging, merging. Start-up does not count: the start of Ray (one for all nights here, warmed up by
a small night) and of the actor; what is read in the meantime is counted with its CPU seconds shared among the cores.

The model: MiniLM with all its layers (unless told) and tate's labels, heads untrained. Bar: 10 % of the full night.
"""

import tempfile
from pathlib import Path
from statistics import median

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from benchmarks.frame import verdict
from benchmarks.tagging._tagging import (
    Timed,
    diary,
    documents_of,
    label_lists,
    make_bundle,
    options,
    own_ray,
    s3_server,
    tag_config,
    tagger,
    told,
    write_documents,
)
from xmc_ray import storage
from xmc_ray.on_ray.tag.output import MANIFEST

BAR, CHANGED, WARM = 0.10, 0.03, 2_000


def changed(documents: pa.Table, seed: int) -> pa.Table:
    """The documents with a share `CHANGED` of their texts replaced, spread over all of them."""
    rows = np.random.default_rng(seed).permutation(len(documents)) < CHANGED * len(documents)
    other = pc.binary_join_element_wise(documents["text"], "revised", " ")
    return documents.set_column(
        documents.column_names.index("text"), "text", pc.if_else(pa.array(rows), other, documents["text"])
    )


def row(name: str, night: Timed) -> None:
    manifest = storage.read_json(storage.join(night.folder, MANIFEST))
    print(
        f"{name:12}{night.all_work:8.1f}{night.total('scan'):10.1f}{night.total('tag'):8.1f}{night.total('publish'):11.1f}"
        f"{manifest['tagged']:10,}{manifest['reused']:10,}",
        flush=True,
    )


def main() -> None:
    arguments = options(__doc__, documents=50_088, rounds=3)
    documents = documents_of(arguments.data, arguments.documents)
    with tempfile.TemporaryDirectory() as folder, diary() as book, s3_server() as bucket, own_ray():
        bundle = make_bundle(Path(folder) / "bundle", tagger(arguments.layers), label_lists(arguments.data))
        few = write_documents(f"{bucket}/few", documents.slice(0, WARM))
        book.night(tag_config(few, bundle, f"{bucket}/nights", date="2026-11-01", pool=arguments.pool))
        print(told(arguments))
        print(f"{'night':12}{'work s':>8}{'scan s':>10}{'tag s':>8}{'publish s':>11}{'tagged':>10}{'reused':>10}")
        source = write_documents(f"{bucket}/documents", documents, files=4)
        full = book.night(tag_config(source, bundle, f"{bucket}/nights", date="2026-11-02", pool=arguments.pool))
        row("full", full)
        nights = []
        for seed in range(arguments.rounds):
            source = write_documents(f"{bucket}/changed-{seed}", changed(documents, seed), files=4)
            settings = {"pool": arguments.pool, "previous": full.folder, "date": f"2026-11-{seed + 3:02}"}
            nights.append(book.night(tag_config(source, bundle, f"{bucket}/nights", **settings)))
            row(f"{CHANGED:.0%} changed", nights[-1])
    ratio = median(night.all_work / full.all_work for night in nights)
    verdict("tag-incremental", f"{ratio:.1%}", f"{BAR:.0%}", ratio <= BAR)


if __name__ == "__main__":
    main()
