"""The whole tagging job against its model alone: tate's documents from S3 to S3, on this machine's cores.

`job`: the library's own night, from a real S3 server (SeaweedFS) and back to it: plan, read, tokenise, tag, write, publish.
`bare`: the same model alone in one process with a thread a core, on the same documents, tokenised, sorted by
length as a whole, cut into batches of the same token budget and padded beforehand. Its scores are discarded.

Once the job's actor has loaded its model, the two take turns of 4 seconds (the other's processes are stopped), so that both
see the same machine; each one's own seconds are compared. The job's start-up (imports, Ray, the plan, the actor and its
weights) ends when the first piece reaches the model; what is read and tokenised before counts as the job's work, with its CPU
seconds divided by the cores. `tag-start` explains the start-up.

The model: MiniLM with all its layers (unless told) and tate's 14,954 labels, heads untrained: only speed is measured. The
median of the rounds counts. Bar: the job has 0.90 of the bare throughput.
"""

import tempfile
import threading
import time
from concurrent.futures import Future
from pathlib import Path
from statistics import median

import pyarrow as pa
import ray
import torch

from benchmarks.frame import verdict
from benchmarks.tagging._tagging import (
    CORES,
    K,
    Timed,
    Turns,
    diary,
    documents_of,
    label_lists,
    make_bundle,
    options,
    process_apart,
    ray_workers,
    s3_server,
    spread,
    tag_config,
    tagger,
    told,
    write_documents,
)
from xmc_ray.bundle.folder import load_bundle
from xmc_ray.data.labels import list_lengths
from xmc_ray.model.text import budget_batches, make_batch

BAR = 0.90


def bare(bundle: str, texts: pa.Array, token_budget: int, go: str) -> tuple[float, float, float]:
    """When the model alone began and ended, and its CPU seconds; it begins when a file ``go`` is there."""
    torch.set_num_threads(CORES)
    loaded = load_bundle(bundle)
    tokens = loaded.tokenizer.encode(texts)[0]
    rows = budget_batches(list_lengths(tokens), token_budget)
    batches = [make_batch(tokens.take(pa.array(part))) for part in rows]
    with torch.inference_mode():
        loaded.model.predict(batches[-1], K)  # warm
        while not Path(go).exists():
            time.sleep(0.01)
        began, cpu = time.time(), time.process_time()
        for batch in batches:
            loaded.model.predict(batch, K)
        return began, time.time(), time.process_time() - cpu


def main() -> None:
    arguments = options(__doc__, documents=12_288, rounds=3)
    documents, ratios, with_census = documents_of(arguments.data, arguments.documents), [], []
    rates, start_ups = list[tuple[float, float]](), []
    with tempfile.TemporaryDirectory() as folder, diary() as book, s3_server() as bucket:
        bundle = make_bundle(Path(folder) / "bundle", tagger(arguments.layers), label_lists(arguments.data))
        source = write_documents(f"{bucket}/documents", documents, files=4)
        print(told(arguments))
        print(f"{'':8}{'seconds':>16}{'':7}{'seconds of CPU':>22}{'seconds':>34}")
        print(
            f"{'bare':>12}{'job':>12}{'ratio':>7}{'bare':>10}{'tag':>6}{'read':>6}{'write':>7}"
            f"{'start-up':>10}{'census':>8}{'ahead':>7}{'publish':>9}",
            flush=True,
        )
        for number in range(arguments.rounds):
            go, turns = Path(folder) / f"go-{number}", Turns()
            config = tag_config(source, bundle, f"{bucket}/night-{number}", pool=arguments.pool)
            with process_apart() as process:
                alone: Future[tuple[float, float, float]] = process.submit(
                    bare, bundle, documents["text"].combine_chunks(), arguments.token_budget, str(go)
                )
                (pid,) = process._processes
                started = time.time()

                def begin(started: float = started, go: Path = go) -> None:
                    while not any(event.what == "load" for event in book.since(started)):
                        time.sleep(0.1)
                    go.touch()

                beginner = threading.Thread(target=begin, daemon=True)
                beginner.start()

                def bare_process(alone: Future[tuple[float, float, float]] = alone, go: Path = go, pid: int = pid) -> list[int]:
                    return [pid] if go.exists() and not alone.done() else []

                with turns.taken([bare_process, ray_workers]):
                    night: Timed = book.night(config)
                    ray.shutdown()
                    began, ended, cpu = alone.result()
            bare_seconds = turns.own(0, began, ended)
            job_seconds = turns.own(1, night.first, night.ended) + night.ahead
            ratios.append(bare_seconds / job_seconds)
            with_census.append(bare_seconds / (job_seconds + night.total("census")))
            rates.append((len(documents) / bare_seconds, len(documents) / job_seconds))
            start_ups.append(night.start_up)
            print(
                f"{bare_seconds:12.1f}{job_seconds:12.1f}{ratios[-1]:7.3f}{cpu:10.1f}{night.cpu('tag'):6.1f}"
                f"{night.cpu('read'):6.1f}{night.cpu('write'):7.1f}{night.start_up:10.1f}{night.total('census'):8.1f}"
                f"{night.ahead:7.1f}{night.total('publish'):9.1f}",
                flush=True,
            )
    print("documents/s: bare {}, job {}".format(*(spread(list(side), 0) for side in zip(*rates, strict=True))))
    print(f"start-up {spread(start_ups, 1)} s; ratio {spread(ratios)}; with the census counted {spread(with_census)}")
    verdict("tag-speed", f"{median(ratios):.2f}", f"{BAR:.2f}", median(ratios) >= BAR)


if __name__ == "__main__":
    main()
