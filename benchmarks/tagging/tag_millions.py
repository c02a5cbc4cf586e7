"""Two million short documents through the whole tagging job: do the driver's memory and the object store stay bounded?

The documents are the commit messages of git-paths under fresh ids, written to a folder as several Parquet files. The model is
as small as possible, to put the load on everything around it: a BERT of one layer and width 32 with random weights, MiniLM's
tokenizer, at most 64 tokens, and the 4,096 most frequent labels. Files are local.

Sampled every second: resident memory of the driver (without shared pages), bytes in the object store, bytes spilled to disk.
The driver must not grow with the documents: at the end of the pieces at most 1.1 times and 50 MiB more than after a tenth.
"""

import tempfile
import threading
import time
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray

from benchmarks.frame import verdict
from benchmarks.inputs import DATA, minilm, require
from benchmarks.tagging._tagging import Timed, apart, diary, label_lists, machine, make_bundle, tag_config, tagger
from xmc_ray import storage
from xmc_ray.model.encoder import EncoderConfig
from xmc_ray.model.lightxml import ModelConfig
from xmc_ray.model.tokenizer import TextConfig
from xmc_ray.on_ray.pool import PoolConfig
from xmc_ray.on_ray.tag.nights import MANIFEST

LABELS, TOKENS, WIDTH, FILES, CHUNK = 4_096, 64, 32, 20, 50_000
GROWTH, SLACK = 1.1, 50 << 20


def write_catalogue(data: Path, folder: str, documents: int) -> None:
    """In a process of its own, so that it leaves no memory behind here."""
    texts = pq.read_table(require(data) / "train.parquet", columns=["text"])["text"].combine_chunks()
    Path(folder).mkdir()
    for number, rows in enumerate(np.array_split(np.arange(documents), FILES)):
        table = pa.table({"id": [f"{row:09}" for row in rows.tolist()], "text": texts.take(pa.array(rows % len(texts)))})
        pq.write_table(table, f"{folder}/{number:03}.parquet", row_group_size=CHUNK)


def write_model(folder: str, labels: pa.ListArray, most: int | None = None) -> None:
    """The bundle, with an encoder made here; ``labels`` and ``most`` as in `make_bundle`."""
    from transformers import AutoConfig, AutoTokenizer, BertModel
    from transformers.utils import logging

    logging.disable_progress_bar()
    small = {"hidden_size": WIDTH, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 2 * WIDTH}
    BertModel(AutoConfig.from_pretrained(minilm(), **small)).save_pretrained(f"{folder}/encoder")
    AutoTokenizer.from_pretrained(minilm()).save_pretrained(f"{folder}/encoder")
    config = replace(
        tagger(1),
        encoder=EncoderConfig(name=f"{folder}/encoder", feature_layers=1, pooling="mean"),
        text=TextConfig(max_tokens=TOKENS),
        model=ModelConfig(shortlist=8, bottleneck=WIDTH),
    )
    make_bundle(Path(folder) / "bundle", config, labels, most)


@dataclass(frozen=True)
class Sample:
    moment: float
    driver: int
    stored: int
    spilled: int


@contextmanager
def sampled() -> Iterator[list[Sample]]:
    """The driver and the object store, once a second while Ray runs."""
    from ray._private.internal_api import node_stats

    samples, over = list[Sample](), threading.Event()

    def watch() -> None:
        while not over.wait(1):
            try:
                (node,) = ray.nodes()
                store = node_stats(node["NodeManagerAddress"], node["NodeManagerPort"], include_memory_info=False).store_stats
            except Exception:  # Ray is on its way up or down
                continue
            else:
                _, resident, shared = map(int, Path("/proc/self/statm").read_text().split()[:3])
                memory = (resident - shared) * 4096
                samples.append(Sample(time.time(), memory, store.object_store_bytes_used, store.spilled_bytes_total))

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield samples
    finally:
        over.set()
        watcher.join()


def driver_at(samples: list[Sample], night: Timed, share: float) -> int:
    """Memory of the driver when a share of the pieces was tagged."""
    ends = sorted(event.ended for event in night.of("tag"))
    moment = ends[min(len(ends) - 1, int(share * len(ends)))]
    return min(samples, key=lambda sample: abs(sample.moment - moment)).driver


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DATA / "git-paths", help="folder with train.parquet and test.parquet")
    parser.add_argument("--documents", type=int, default=2_000_000)
    parser.add_argument("--token-budget", type=int, default=2048, help="of a batch; else the library's")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, diary() as book:
        apart(write_catalogue, arguments.data, f"{folder}/documents", arguments.documents)
        apart(write_model, folder, label_lists(arguments.data), LABELS)
        print(f"{arguments.documents:,} documents, {machine()}", flush=True)
        config = tag_config(
            f"{folder}/documents", f"{folder}/bundle", f"{folder}/nights", pool=PoolConfig(token_budget=arguments.token_budget)
        )
        with sampled() as samples:
            night = book.night(config)
        ray.shutdown()
        manifest = storage.read_json(storage.join(night.folder, MANIFEST))
    assert manifest["in"] == manifest["tagged"] == arguments.documents, manifest
    seconds = night.ended - night.began
    print(
        f"all of it {seconds:.0f} s, {arguments.documents / seconds:,.0f} documents/s; without start-up {night.all_work:.0f} s"
    )
    for what in ("connect", "scan", "read", "tag", "write", "publish"):
        print(f"  {what:8}{night.total(what):8.1f} s in {len(night.of(what)):,} parts, {night.cpu(what):8.1f} s of CPU")
    mib = {f"after {share:.0%} of the pieces": driver_at(samples, night, share) >> 20 for share in (0.1, 0.5, 1.0)}
    mib = {"at the start": samples[0].driver >> 20} | mib | {"at most": max(sample.driver for sample in samples) >> 20}
    print("driver: " + ", ".join(f"{value:,} MiB {name}" for name, value in mib.items()))
    stored, spilled = (max(getattr(sample, name) for sample in samples) >> 20 for name in ("stored", "spilled"))
    print(f"object store: at most {stored:,} MiB, {spilled:,} MiB spilled")
    early, late = (driver_at(samples, night, share) for share in (0.1, 1.0))
    flat = late <= max(GROWTH * early, early + SLACK)
    figure = f"driver {late / early:.2f}x, {spilled:,} MiB spilled, {arguments.documents / seconds:,.0f} documents/s"
    verdict("tag-millions", figure, f"{GROWTH}x or 50 MiB, 0 MiB", flat and spilled == 0)


if __name__ == "__main__":
    main()
