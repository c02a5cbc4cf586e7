"""Does each of the configs for the paper's five data sets learn? The first steps of its run, with a small encoder and our data.

A config is taken as it stands: rates without warm-up, decay or clipping, features of the first token of five layers, dropout,
groups, batches. In place of BERT there is all-MiniLM-L6-v2, in place of its data set random training documents of one of
ours that resembles it in its labels. Documents are cut at ``--tokens``, for a CPU's sake. As rates are constant, the first
steps are those of a whole run.

Loss of steps: a mean over ten of them, in units of the untrained model's loss of the same documents, with dropout like it:
documents differ so much in their labels that ten batches of one model differ by a fifth. Loss before and after: without
dropout, of the same 128 training documents. Precision: of training documents held out by their words, beside that of the most
frequent labels for everybody. Bar: no mean of ten steps that ends at the hundredth or later exceeds that of the untrained
model, nor does the loss after training, and P@1, P@3 and P@5 are above those of the most frequent labels.
"""

import argparse
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from benchmarks.frame import verdict
from benchmarks.inputs import DATA, Split, encoded, minilm, require, split_of
from xmc_ray.command import parse
from xmc_ray.data.labels import IntArray, LabelIndex
from xmc_ray.data.split import ValidationConfig, held_out_use
from xmc_ray.metrics.at_k import KS, Metrics
from xmc_ray.model.predict import predict
from xmc_ray.on_ray.train.config import TrainConfig
from xmc_ray.training.fit import epoch_plan, sample_loss
from xmc_ray.training.loop import TrainState, train

CONFIGS = Path(__file__).resolve().parents[2] / "xmc_ray" / "recipes"
SETS = {
    "eurlex-4k": "debian-tags",
    "wiki10-31k": "debian-deps",
    "amazoncat-13k": "tate",
    "wiki-500k": "tate",
    "amazon-670k": "tate",
}
HELD_OUT = 1_000  # documents at most
MEAN = 10  # steps of a running mean
SETTLED = 100  # steps, after which the loss has to stay below the untrained model's


def dealt(folder: Path, documents: int) -> tuple[pa.Table, pa.Table]:
    """``text`` and ``labels`` of random training documents, at most ``documents``, and of those that are held out of them."""
    rows = pq.read_table(require(folder) / "train.parquet", columns=["text", "labels"])
    rows = rows.take(pa.array(np.random.default_rng(0).permutation(len(rows))[:documents])).combine_chunks()
    texts = rows["text"].combine_chunks()
    held = held_out_use(texts, pa.nulls(len(rows), pa.string()), ValidationConfig(share=0.05)) > 0
    return rows.filter(pa.array(~held)), rows.filter(pa.array(held)).slice(0, HELD_OUT)


def precision(ranked_BK: IntArray, truth: pa.ListArray, labels: LabelIndex) -> list[float]:
    """P@1, P@3 and P@5, in percent."""
    metrics = Metrics(labels.counts, labels.n_documents)
    metrics.update(ranked_BK, truth)
    total = metrics.result()["total"]
    return [100 * total[name] for name in ("P@1", "P@3", "P@5")]


def first_steps(config: TrainConfig, split: Split, test: pa.Table, steps: int) -> tuple[list[float], list[float], list[float]]:
    """Train for some steps.

    Returns losses (of the untrained and of the trained model; in units of the untrained model's of the same documents, the
    highest mean of ten steps, and the highest from the hundredth on) and P@1, P@3 and P@5 of the model and of the most frequent
    labels.
    """
    model, prediction = split.model(config), config.loop.prediction
    untrained = sample_loss(model, split.table, prediction)
    with torch.no_grad():
        model.train()
        before = [float(sum(model(batch))) for batch in islice(split.batches(config.loop), steps)]
    state, plan = TrainState.start(model, config.optim), epoch_plan(config.loop, len(split.table))
    run = train(state, model, lambda first: split.batches(config.loop, first=first), plan.steps, config.loop)
    means, means_before = (
        np.convolve(losses, np.ones(MEAN), "valid") for losses in ([step.loss for step in islice(run, steps)], before)
    )
    ratios = means / means_before
    losses = [untrained, sample_loss(model, split.table, prediction), ratios.max(), ratios[SETTLED - MEAN :].max()]
    tokens, truth = (test[name].combine_chunks() for name in ("tokens", "labels"))
    _, ranked_BK = predict(model, tokens, max(KS), prediction)
    frequent_K = np.argsort(-split.index.counts, kind="stable")[: max(KS)]
    frequent_BK = np.broadcast_to(frequent_K, (len(truth), len(frequent_K)))
    return losses, precision(ranked_BK, truth, split.index), precision(frequent_BK, truth, split.index)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DATA, help="the folder that the data sets are in")
    parser.add_argument("--configs", nargs="+", default=list(SETS), choices=list(SETS), help="which of them")
    parser.add_argument("--set", help="one data set for all of them, instead of the one that resembles each")
    parser.add_argument("--steps", type=int, default=200, help=f"of each config, {SETTLED} or more")
    parser.add_argument("--documents", type=int, default=20_000, help="of each data set, at most")
    parser.add_argument("--tokens", type=int, default=48, help="read of a document, at most")
    parser.add_argument("--settings", default="", help="on top of each config, such as --settings='--optim.head_lr 1e-3'")
    arguments = parser.parse_args()
    if arguments.steps < SETTLED:
        parser.error(f"--steps is below {SETTLED}")
    torch.set_num_threads(1)
    overrides = [f"--encoder.name={minilm()}", f"--text.max_tokens={arguments.tokens}", "--loop.precision=float32"]
    overrides += arguments.settings.split()
    print(f"{arguments.steps} steps of each config, but with all-MiniLM-L6-v2 and {' '.join(overrides[1:])}")
    print(
        f"{'config':15}{'data':13}{'documents':>9}{'labels':>8}{'groups':>8}{'batch':>6}  |{'untrained':>10}{'trained':>9}"
        f"{'highest':>9}{f'from {SETTLED}':>9}  | {'P@1 / P@3 / P@5':21}| most frequent labels"
    )
    settled, gains = [], []
    for name in arguments.configs:
        config = parse(TrainConfig, [f"--config={CONFIGS / name}.toml", "--documents.uri=x", "--output=y", *overrides])
        folder = require(arguments.data / (arguments.set or SETS[name]))
        rows, held = dealt(folder, arguments.documents)
        split = split_of(rows, config)
        test = encoded(held, split.tokenizer, split.index)
        losses, ours, frequent = first_steps(config, split, test, arguments.steps)
        sizes = f"{len(split.table):9,}{len(split.index):8,}{len(split.groups):8,}{config.loop.batch_size:6}"
        shown = [" / ".join(f"{value:.2f}" for value in values) for values in (ours, frequent)]
        figures = "".join(f"{value:{width}.2f}" for value, width in zip(losses, (10, 9, 9, 9), strict=True))
        print(f"{name:15}{folder.name:13}{sizes}  |{figures}  | {shown[0]:21}| {shown[1]}", flush=True)
        settled.append(max(losses[1] / losses[0], losses[3]))
        gains += [own - other for own, other in zip(ours, frequent, strict=True)]
    figure = f"loss {max(settled):.2f} of the untrained model's from step {SETTLED} on, {min(gains):+.2f} points at least"
    verdict("paper-configs", figure, "1; 0 points", max(settled) < 1 and min(gains) > 0)


if __name__ == "__main__":
    main()
