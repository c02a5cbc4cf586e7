"""Which of the paper's claims hold on our data, and what else may help: one setting changed at a time.

    make bench NAME=ablations ARGS="--tables negatives 'groups from'"

Recall and ranking with groups, the lexical branch as the cheap encoder, so that a run takes a minute or two; the number of
layers with the transformer. All on the first documents; seconds are those of the last training. There is no bar; the tables go
to docs/quality.md.

    static negatives    fixed to those that the model's own recall proposed after the first epoch: encoder and
                        recall of that moment keep choosing the groups whose labels are ranked
    learned features    labels are regrouped by their documents' features after an epoch, and training restarts
    propensity          a true label is weighted by its inverse propensity (Jain et al. 2016), normalised to a mean of 1
    from names          a label's vector starts as the untrained model encodes its name: labels with similar names start alike
    EMA                 predictions use exponential moving averages of all weights, 0.999 a step
    two groups a label  each label occurs twice, in groups of two clusterings; the higher of its two scores counts
    layer-wise decay    each layer of the transformer learns at a fraction of the rate of the one above it
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.inputs import DATA, Split, minilm, require, training_split
from benchmarks.quality._levers import (
    BATCH,
    LAYER_DECAY,
    by_learned_features,
    merged,
    twice,
    with_layer_decay,
    with_moving_average,
    with_named_rows,
    with_propensities,
    with_static_negatives,
)
from benchmarks.quality.variants import SHOWN, figures, trained
from xmc_ray.command import parse
from xmc_ray.model.lightxml import LightXML
from xmc_ray.training.fit import FitConfig
from xmc_ray.training.loop import TrainState


@dataclass(frozen=True)
class Run:
    """``settings`` as the training job takes them; ``prepare`` changes the fresh model, ``begin`` its optimiser.

    ``regroup`` makes other labels and groups of a split, before there is a model.
    """

    settings: str
    prepare: Callable[[LightXML, Split], None] = lambda model, split: None
    begin: Callable[[TrainState], None] = lambda state: None
    regroup: Callable[[Path, FitConfig, Split], Split] = lambda folder, config, split: split


LEXICAL = f"--encoder.layers 0 --lexical.width 256 --optim.weight_decay 0 --optim.warmup 0.02 --loop.batch_size {BATCH}"
GROUPED = f"{LEXICAL} --groups.max_size 32 --model.shortlist 8 --model.bottleneck 256 --model.dropout 0.4 --loop.epochs 5"
FLAT = f"{GROUPED} --groups.max_size 1"
LAYERS = "--groups.max_size 32 --model.shortlist 8 --model.bottleneck 256 --model.dropout 0.2 --loop.epochs 3"
LAYERS += " --encoder.feature_layers 2 --encoder.pooling mean --encoder.dropout 0 --optim.encoder_lr 3e-4 --optim.head_lr 5e-3"
TABLES = {
    "negatives": {"dynamic (the paper's)": Run(GROUPED), "static": Run(GROUPED, with_static_negatives)},
    "labels a group": {
        f"{size}, shortlist {k}": Run(f"{GROUPED} --groups.max_size {size} --model.shortlist {k}")
        for size, k in ((8, 32), (32, 8), (32, 32), (128, 2), (128, 8))
    }
    | {"1 (flat)": Run(FLAT)},
    "groups from": {"TF-IDF": Run(GROUPED), "learned features": Run(GROUPED, regroup=by_learned_features)},
    "groups a label": {"one": Run(GROUPED)}
    | {f"two, shortlist {k}": Run(f"{GROUPED} --model.shortlist {k}", regroup=twice) for k in (8, 16)},
    "weight averaging": {
        "off, rates fall to 0": Run(GROUPED),
        "on, last half, rates fall": Run(f"{GROUPED} --optim.swa_start 0.5"),
        "EMA, rates fall": Run(GROUPED, with_moving_average),
        "off, constant rates": Run(f"{GROUPED} --optim.decay false"),
        "on, last half, constant rates": Run(f"{GROUPED} --optim.decay false --optim.swa_start 0.5"),
        "EMA, constant rates": Run(f"{GROUPED} --optim.decay false", with_moving_average),
    },
    "label vectors start, flat": {"at random": Run(FLAT), "from names": Run(FLAT, with_named_rows)},
    "how it is trained": {"as in the other tables": Run(GROUPED)}
    | {
        name: Run(f"{GROUPED} {settings}")
        for name, settings in {
            "no warm-up": "--optim.warmup 0",
            "warm-up of a tenth": "--optim.warmup 0.1",
            "half the rates": "--optim.lexical_lr 0.1 --optim.rows_lr 0.04 --optim.head_lr 5e-4",
            "twice the rates": "--optim.lexical_lr 0.4 --optim.rows_lr 0.16 --optim.head_lr 2e-3",
            "dropout 0.2": "--model.dropout 0.2",
            "dropout 0.6": "--model.dropout 0.6",
            "batches of 32": "--loop.batch_size 32",
            "batches of 128": "--loop.batch_size 128",
        }.items()
    },
    "true labels, flat": {"all alike": Run(FLAT), "by inverse propensity": Run(FLAT, with_propensities)},
    "layers of the transformer": {f"{n}": Run(f"{LAYERS} --encoder.layers {n}") for n in (1, 2, 4)}
    | {
        "2, beside the lexical branch": Run(f"{LAYERS} --encoder.layers 2 --lexical.width 256"),
        "none, the lexical branch": Run(f"{LAYERS} --encoder.layers 0 --lexical.width 256"),
    },
    "rates of four layers": {
        "all alike": Run(f"{LAYERS} --encoder.layers 4"),
        f"falling to {LAYER_DECAY} a layer": Run(f"{LAYERS} --encoder.layers 4", begin=with_layer_decay),
    },
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DATA / "tate", help="a data set")
    parser.add_argument("--documents", type=int, default=20_000, help="the first training documents")
    parser.add_argument("--tables", nargs="+", default=list(TABLES), choices=list(TABLES))
    arguments = parser.parse_args()
    torch.set_num_threads(2)
    folder, done = require(arguments.data), dict[Run, str]()
    for table in arguments.tables:
        print(f"\n| {table} | " + " | ".join(SHOWN) + " | seconds |\n|" + " --- |" * (len(SHOWN) + 2), flush=True)
        for name, run in TABLES[table].items():
            if run not in done:
                config = parse(FitConfig, [f"--encoder.name={minilm()}", "--text.max_tokens=96", *run.settings.split()])
                split = training_split(folder, config, arguments.documents)
                changed = run.regroup(folder, config, split)
                listed, cost = trained(folder, config, changed, run.prepare, run.begin)
                found = figures(folder, config, merged(listed, len(split.index)), arguments.documents)
                done[run] = " | ".join([*(f"{found[name]:.2f}" for name in SHOWN), f"{cost['seconds']:.0f}"])
            print(f"| {name} | {done[run]} |", flush=True)


if __name__ == "__main__":
    main()
