"""A night in which 3 % of the documents changed, with its feed of changes, against one that tags all: tate, from S3 to S3.

The second night reuses the tags of the other 97 % (``previous``). All work counts: planning (which reads both nights), copying,
reading, tagging, merging, and telling the changes. Of these 3 % a sixth is gone, as much is new, the rest has another text. A
slow twin joins the tags of both nights; what the night tells has to be the same. Start-up does not count: the start of Ray (one
for all nights here, warmed up by a small night) and of the actor; what is read in the meantime is counted with its CPU seconds
shared among the cores.

The model: MiniLM with all its layers (unless told) and tate's labels, heads untrained. Bars: 10 % of the full night; not a row
that the join has not.
"""

import tempfile
from pathlib import Path
from statistics import median
from typing import Any

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
from xmc_ray.on_ray.tag.nights import MANIFEST, SUCCESS, tag_files

BAR, CHANGED, WARM = 0.10, 0.03, 2_000


def changed(documents: pa.Table, seed: int) -> pa.Table:
    """The documents with a share `CHANGED` of them changed, spread over all: texts revised, some gone, as many new."""
    place = np.random.default_rng(seed).permutation(len(documents)) / len(documents)
    other = pc.binary_join_element_wise(documents["text"], "revised", " ")
    revised = pc.if_else(pa.array(place < CHANGED), other, documents["text"])
    table = documents.set_column(documents.column_names.index("text"), "text", revised)
    new = table.filter(pa.array(place < CHANGED / 6))
    ids = pc.binary_join_element_wise(new["id"].cast(pa.string()), f"new-{seed}", "-")
    new = new.set_column(new.column_names.index("id"), "id", ids)
    table = table.set_column(table.column_names.index("id"), "id", table["id"].cast(pa.string()))
    return pa.concat_tables([table.filter(pa.array(place >= CHANGED / 6)), new])


def differing(before: str, now: str) -> int:
    """Rows that the changes of a night have, or lack, or tell otherwise than a join of both nights' tags."""
    sides = [{row["id"]: (row["labels"], row["scores"]) for row in tags(night)} for night in (now, before)]
    kinds = {(True, True): "changed", (True, False): "added", (False, True): "removed"}
    nothing = (None, None)
    joined = {
        id: (kinds[id in sides[0], id in sides[1]], *sides[0].get(id, nothing), *sides[1].get(id, nothing))
        for id in {*sides[0], *sides[1]}
        if sides[0].get(id) != sides[1].get(id)
    }
    names = storage.read_json(storage.join(now, SUCCESS))["changes"]
    rows = [row for name in names for row in storage.read_parquet(storage.join(now, name)).to_pylist()]
    told_ = {row.pop("id"): tuple(row.values()) for row in rows}
    return len(rows) - len(told_) + sum(joined.get(id) != told_.get(id) for id in {*joined, *told_})


def tags(night: str) -> list[dict[str, Any]]:
    columns = ["id", "labels", "scores"]
    return [row for file in tag_files(night) for row in storage.read_parquet(file.uri, columns).to_pylist()]


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
        nights, wrong = [], 0
        for seed in range(arguments.rounds):
            source = write_documents(f"{bucket}/changed-{seed}", changed(documents, seed), files=4)
            settings = {"pool": arguments.pool, "previous": full.folder, "date": f"2026-11-{seed + 3:02}"}
            nights.append(book.night(tag_config(source, bundle, f"{bucket}/nights", **settings)))
            row(f"{CHANGED:.0%} changed", nights[-1])
            wrong += differing(full.folder, nights[-1].folder)
    ratio = median(night.all_work / full.all_work for night in nights)
    figure = f"{ratio:.1%}; {wrong} rows are not those of the join"
    verdict("tag-changes", figure, f"{BAR:.0%}; 0", ratio <= BAR and not wrong)


if __name__ == "__main__":
    main()
