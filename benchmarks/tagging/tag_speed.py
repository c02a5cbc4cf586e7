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

With `--precision`, the arithmetic is compared instead: one model, its heads trained for a while on a frozen encoder, predicts
the test documents in float32, in bfloat16 and with the encoder's linear layers in int8 (torch's dynamic quantisation), in
turns in one process. CPU seconds are compared, which other processes disturb least, and what changes against float32: the best
label, and the k best. Bar: bfloat16 takes at most half the CPU seconds of float32.
"""

import copy
import tempfile
import threading
import time
import warnings
from argparse import Namespace
from collections import defaultdict
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from statistics import median

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
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
    parsed,
    parser_of,
    process_apart,
    ray_workers,
    s3_server,
    spread,
    tag_config,
    tagger,
    told,
    write_documents,
)
from xmc_ray.bundle.content import load_bundle
from xmc_ray.classifier import XMCClassifier
from xmc_ray.data.labels import IntArray, list_lengths
from xmc_ray.model.batch import budget_batches, make_batch
from xmc_ray.model.lightxml import LightXML
from xmc_ray.model.predict import PredictConfig, predict
from xmc_ray.training.loop import LoopConfig

BAR, PRECISION_BAR = 0.90, 2.0


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


def compare_precisions(arguments: Namespace) -> None:
    """Rates and labels of float32, bfloat16 and int8, side by side."""
    torch.set_num_threads(arguments.threads)
    documents, base = documents_of(arguments.data, arguments.documents), tagger(arguments.layers)
    config = replace(
        base,
        encoder=replace(base.encoder, freeze=arguments.layers),
        loop=LoopConfig(epochs=3, batch_size=64, minutes=arguments.minutes),
    )
    classifier = XMCClassifier.fit(documents["text"].to_pylist(), documents["labels"].to_pylist(), config=config)
    texts = pq.read_table(arguments.data / "test.parquet", columns=["text"])["text"].combine_chunks()[: arguments.tested]
    model, (tokens,) = classifier.bundle.model, classifier.ensemble.encode(texts)
    variants = {"float32": (model, "float32"), "bfloat16": (model, "bfloat16"), "int8": (in_int8(model), "float32")}
    labels, seconds, cpu = dict[str, IntArray](), defaultdict[str, list[float]](list), defaultdict[str, list[float]](list)
    for _ in range(1 + arguments.rounds):
        for name, (variant, precision) in variants.items():
            prediction = PredictConfig(token_budget=arguments.token_budget, precision=precision)  # type: ignore[arg-type]
            began, cpu_began = time.perf_counter(), time.process_time()
            _, labels[name] = predict(variant, tokens, K, prediction)
            seconds[name].append(time.perf_counter() - began)
            cpu[name].append(time.process_time() - cpu_began)
    print(f"{told(arguments)}, {arguments.threads} threads; {len(tokens):,} documents predicted")
    print(f"{'':10}{'documents/s':>12}{'CPU seconds':>13}{'times float32':>15}{'same best label':>17}{f'of the {K} best':>16}")
    pace = {name: median(taken[1:]) for name, taken in cpu.items()}  # the first round warms up
    for name in variants:
        best, overlap = agreement(labels["float32"], labels[name])
        rate = len(tokens) / median(seconds[name][1:])
        print(f"{name:10}{rate:12.0f}{pace[name]:13.2f}{pace['float32'] / pace[name]:15.2f}{best:17.1%}{overlap:16.1%}")
    gain = pace["float32"] / pace["bfloat16"]
    verdict("tag-speed", f"{gain:.2f}", f"{PRECISION_BAR:.2f}", gain >= PRECISION_BAR)


def in_int8(model: LightXML) -> LightXML:
    """A copy whose encoder multiplies in int8."""
    model = copy.deepcopy(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its deprecation
        model.encoder = torch.ao.quantization.quantize_dynamic(model.encoder, {torch.nn.Linear}, dtype=torch.qint8)
    return model


def agreement(one_Dk: IntArray, other_Dk: IntArray) -> tuple[float, float]:
    """Share of the documents with the same best label, and of the labels in ``one_Dk`` that ``other_Dk`` has as well."""
    shared_Dk = (one_Dk[:, :, None] == other_Dk[:, None, :]).any(2) & (one_Dk >= 0)
    return float(np.mean(one_Dk[:, 0] == other_Dk[:, 0])), float(shared_Dk.sum() / (one_Dk >= 0).sum())


def main() -> None:
    parser = parser_of(__doc__, documents=12_288, rounds=3)
    parser.add_argument("--precision", action="store_true", help="compare float32, bfloat16 and int8 instead")
    parser.add_argument("--minutes", type=float, default=1.5, help="of training, with --precision")
    parser.add_argument("--tested", type=int, default=1024, help="documents that are predicted, with --precision")
    parser.add_argument("--threads", type=int, default=CORES, help="of the model, with --precision")
    arguments = parsed(parser)
    if arguments.precision:
        compare_precisions(arguments)
    else:
        compare_job(arguments)


def compare_job(arguments: Namespace) -> None:
    """The whole job and its model alone, in turns."""
    documents, ratios, with_scan = documents_of(arguments.data, arguments.documents), [], []
    rates, start_ups = list[tuple[float, float]](), []
    with tempfile.TemporaryDirectory() as folder, diary() as book, s3_server() as bucket:
        bundle = make_bundle(Path(folder) / "bundle", tagger(arguments.layers), label_lists(arguments.data))
        source = write_documents(f"{bucket}/documents", documents, files=4)
        print(told(arguments))
        print(f"{'':8}{'seconds':>16}{'':7}{'seconds of CPU':>22}{'seconds':>34}")
        print(
            f"{'bare':>12}{'job':>12}{'ratio':>7}{'bare':>10}{'tag':>6}{'read':>6}{'write':>7}"
            f"{'start-up':>10}{'scan':>8}{'ahead':>7}{'publish':>9}",
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
            with_scan.append(bare_seconds / (job_seconds + night.total("scan")))
            rates.append((len(documents) / bare_seconds, len(documents) / job_seconds))
            start_ups.append(night.start_up)
            print(
                f"{bare_seconds:12.1f}{job_seconds:12.1f}{ratios[-1]:7.3f}{cpu:10.1f}{night.cpu('tag'):6.1f}"
                f"{night.cpu('read'):6.1f}{night.cpu('write'):7.1f}{night.start_up:10.1f}{night.total('scan'):8.1f}"
                f"{night.ahead:7.1f}{night.total('publish'):9.1f}",
                flush=True,
            )
    print("documents/s: bare {}, job {}".format(*(spread(list(side), 0) for side in zip(*rates, strict=True))))
    print(f"start-up {spread(start_ups, 1)} s; ratio {spread(ratios)}; with the scan counted {spread(with_scan)}")
    verdict("tag-speed", f"{median(ratios):.2f}", f"{BAR:.2f}", median(ratios) >= BAR)


if __name__ == "__main__":
    main()
