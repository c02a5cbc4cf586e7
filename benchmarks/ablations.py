"""Which of the paper's claims hold on our data: one setting changed at a time, everything else as in the recipe.

    make bench NAME=ablations

Recall and ranking with groups, the lexical branch as the cheap encoder, so that a run takes a minute or two; the number of
layers with the transformer, on the first documents. Static negatives are those that the model's own recall proposed after the
first epoch, for good: encoder and recall of that moment go on choosing the groups whose labels are ranked. Nothing is held to a
bar: the table goes to docs/quality.md.
"""

import argparse
import copy
from pathlib import Path

import torch
from _setup import DATA, minilm, require
from variants import SHOWN, figures, trained

from xmc_ray.classifier import FitConfig
from xmc_ray.command import parse
from xmc_ray.model import LightXML, Losses
from xmc_ray.text import Batch

LEXICAL = "--encoder.layers 0 --lexical.width 256 --optim.weight_decay 0 --optim.warmup 0.02 --loop.batch_size 64"
GROUPED = f"{LEXICAL} --groups.max_size 32 --model.shortlist 8 --model.bottleneck 256 --model.dropout 0.4 --loop.epochs 5"
LAYERS = "--groups.max_size 32 --model.shortlist 8 --model.bottleneck 256 --model.dropout 0.2 --loop.epochs 3"
LAYERS += " --encoder.feature_layers 2 --encoder.pooling mean --encoder.dropout 0 --optim.encoder_lr 3e-4 --optim.head_lr 5e-3"
TABLES = {
    "negatives": {"dynamic (the paper's)": (GROUPED, False), "static": (GROUPED, True)},
    "labels a group": {
        f"{size}, shortlist {k}": (f"{GROUPED} --groups.max_size {size} --model.shortlist {k}", False)
        for size, k in ((8, 32), (32, 8), (32, 32), (128, 2), (128, 8))
    }
    | {"1 (flat)": (f"{GROUPED} --groups.max_size 1", False)},
    "weight averaging": {
        "off, rates fall to 0": (GROUPED, False),
        "on, last half, rates fall": (f"{GROUPED} --optim.swa_start 0.5", False),
        "off, constant rates": (f"{GROUPED} --optim.decay false", False),
        "on, last half, constant rates": (f"{GROUPED} --optim.decay false --optim.swa_start 0.5", False),
    },
    "layers of the transformer": {f"{n}": (f"{LAYERS} --encoder.layers {n}", False) for n in (1, 2, 4)},
}


class StaticNegatives(LightXML):
    """The shortlist is that of the model as it was after `frozen_after` steps."""

    frozen_after = 0
    steps = 0
    frozen: list[LightXML]

    def forward(self, batch: Batch, documents: int | None = None) -> Losses:
        self.steps += 1
        if self.steps == self.frozen_after:
            self.__class__ = LightXML  # type: ignore[assignment]  # or the copy would copy itself
            then = copy.deepcopy(self).eval()
            self.__class__, self.frozen = StaticNegatives, [then]  # a list: no part of the model
        assert self.table is not None and self.bottleneck is not None
        features_BF, row_P, label_P = self._gathered(self.dropout(self.features(batch)), batch)
        documents = len(batch) if documents is None else documents
        recall_loss, shortlist_BK = self.recall.loss(features_BF, row_P, self.group_L[label_P], self.shortlist, documents)
        if self.steps >= self.frozen_after:
            with torch.no_grad():
                logits_BG = self.frozen[0].recall.logits(self.frozen[0].features(batch))
                shortlist_BK = self.recall.best(logits_BG, self.shortlist)[1]
        return Losses(recall_loss, self.table.loss(self.bottleneck(features_BF), shortlist_BK, row_P, label_P, documents))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DATA / "tate", help="a data set")
    parser.add_argument("--documents", type=int, default=20_000, help="the first training documents")
    parser.add_argument("--tables", nargs="+", default=list(TABLES), choices=list(TABLES))
    arguments = parser.parse_args()
    torch.set_num_threads(2)
    folder, done = require(arguments.data), dict[tuple[str, bool], str]()
    for table in arguments.tables:
        print(f"\n| {table} | " + " | ".join(SHOWN) + " | seconds |\n|" + " --- |" * (len(SHOWN) + 2), flush=True)
        for name, (settings, static) in TABLES[table].items():
            if (settings, static) not in done:
                config = parse(FitConfig, [f"--encoder.name={minilm()}", "--text.max_tokens=96", *settings.split()])
                StaticNegatives.frozen_after = -(-arguments.documents // config.loop.batch_size)
                kind = StaticNegatives if static else LightXML
                listed, cost = trained(folder, config, arguments.documents, kind)
                found = figures(folder, config, listed, arguments.documents)
                done[settings, static] = " | ".join([*(f"{found[name]:.2f}" for name in SHOWN), f"{cost['seconds']:.0f}"])
            print(f"| {name} | {done[settings, static]} |", flush=True)


if __name__ == "__main__":
    main()
