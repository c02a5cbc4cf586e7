"""Which of the paper's claims hold on our data, and what else might pay: one setting changed at a time.

    make bench NAME=ablations ARGS="--tables negatives 'groups from'"

Recall and ranking with groups, the lexical branch as the cheap encoder, so that a run takes a minute or two; the number of
layers with the transformer. All on the first documents; seconds are those of the last training. Nothing is held to a bar: the
tables go to docs/quality.md.

    static negatives    those that the model's own recall proposed after the first epoch, for good: encoder and recall of that
                        moment go on choosing the groups whose labels are ranked
    learned features    labels are grouped anew, by their documents' features after an epoch, and all is trained again
    propensity          a true label counts by the inverse of its propensity (Jain et al. 2016), one in the mean over training
    from names          a label's vector starts as the fresh model reads its name: labels whose names say the same start alike
    EMA                 exponential moving averages of all weights, 0.999 a step, are what predicts
"""

import argparse
import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
import torch.nn.functional as F
from _setup import DATA, Split, minilm, require, training_split
from scipy import sparse
from torch import Tensor
from variants import SHOWN, figures, trained

from xmc_ray.classifier import FitConfig
from xmc_ray.command import parse
from xmc_ray.groups import LabelGroups, balanced_groups, label_incidence, unit_rows
from xmc_ray.labels import list_lengths
from xmc_ray.metrics import propensities
from xmc_ray.model import LightXML, Losses
from xmc_ray.recall import RecallHead
from xmc_ray.rows import with_gradient
from xmc_ray.text import Batch, budget_batches, make_batch


@dataclass(frozen=True)
class Run:
    """``settings`` as the training job takes them; ``prepare`` changes the fresh model, ``regrouped`` the groups before it."""

    settings: str
    prepare: Callable[[LightXML, Split], None] = lambda model, split: None
    regrouped: bool = False


# -- what is no setting --------------------------------------------------------------------------------------------------


class StaticNegatives(LightXML):
    """The shortlist is that of the model as it was after ``frozen_after`` steps."""

    frozen_after: int
    steps: int
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


def with_static_negatives(model: LightXML, split: Split) -> None:
    model.__class__ = StaticNegatives
    model.frozen_after, model.steps = -(-len(split.table) // BATCH), 0  # type: ignore[assignment]


class MovingAverage(LightXML):
    """Predicts with exponential moving averages of its weights, taken every ``EVERY`` steps."""

    EVERY, KEPT = 10, 0.99
    averages: dict[str, Tensor]
    steps: int

    def forward(self, batch: Batch, documents: int | None = None) -> Losses:
        if self.steps % self.EVERY == 0:
            n = self.steps // self.EVERY
            kept = min(self.KEPT, (1 + n) / (10 + n))  # the first weights are soon forgotten
            for name, weights in self.named_parameters():
                if name not in self.averages:
                    self.averages[name] = weights.detach().clone()
                self.averages[name].lerp_(weights.detach(), 1 - kept)
        self.steps += 1
        return super().forward(batch, documents)

    def train(self, mode: bool = True) -> "MovingAverage":
        for name, weights in [] if mode else self.named_parameters():
            weights.data = self.averages[name]
        return super().train(mode)


def with_moving_average(model: LightXML, split: Split) -> None:
    model.__class__ = MovingAverage
    model.averages, model.steps = {}, 0  # type: ignore[assignment]


class WeightedRecall(RecallHead):
    """Flat mode's loss with a weight for each label where it is true; ``weight_L``: float32[L]."""

    weight_L: Tensor

    def loss(
        self, features_BF: Tensor, row_P: Tensor, group_P: Tensor, shortlist: int, documents: int
    ) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            logits_BL, loss, gradient_BF, gradient_BL = self._as_if_false(features_BF)
            true_P = torch.unique(row_P * self.n_groups + group_P)
            row_P, label_P = true_P // self.n_groups, true_P % self.n_groups
            logit_P, weight_P = logits_BL[row_P, label_P], self.weight_L[label_P]
            change_P = -weight_P * torch.sigmoid(-logit_P) - torch.sigmoid(logit_P)
            loss = (loss + (weight_P * F.softplus(-logit_P) - F.softplus(logit_P)).sum()) / documents
            gradient_BF.index_add_(0, row_P, self.weight[label_P] * change_P[:, None])
            gradient_BL[row_P, label_P] += change_P
            self._pending.append((gradient_BL.div_(documents), features_BF.detach()))
            shortlist_BK = self.best(logits_BL, shortlist)[1]
        return with_gradient(features_BF, loss, gradient_BF.div_(documents)), shortlist_BK


def with_propensities(model: LightXML, split: Split) -> None:
    counts_L = split.index.counts
    weight_L = 1 / propensities(counts_L, split.index.n_documents)
    weight_L /= (weight_L * counts_L).sum() / counts_L.sum()
    model.recall.__class__ = WeightedRecall
    model.recall.weight_L = torch.from_numpy(weight_L).float()


def with_named_rows(model: LightXML, split: Split) -> None:
    """Flat mode's label vectors start in the direction of the fresh features of the labels' names, as long as before."""
    named = np.flatnonzero(split.index.names.is_valid())
    tokens = split.tokenizer.encode(split.index.names.take(pa.array(named)))[0]
    with torch.inference_mode():
        for rows in np.array_split(np.arange(len(named)), -(-len(named) // 1024)):
            weight_LF, label_B = model.recall.weight, torch.from_numpy(named[rows])
            features_BF = F.normalize(model.features(make_batch(tokens.take(pa.array(rows)))))
            weight_LF[label_B] = features_BF * weight_LF[label_B].norm(dim=1, keepdim=True)


def by_learned_features(folder: Path, config: FitConfig, split: Split) -> Split:
    """The same documents, their labels in groups by what a model has learned in an epoch."""
    learned: list[LightXML] = []
    once = replace(config, loop=replace(config.loop, epochs=1))
    trained(folder, once, split, lambda model, split: learned.append(model))
    tokens, labels = (split.table[name].combine_chunks() for name in ("tokens", "labels"))
    features_DF = np.zeros((len(tokens), learned[0].width), np.float32)
    with torch.inference_mode():
        for rows in budget_batches(list_lengths(tokens), config.loop.token_budget):
            features_DF[rows] = learned[0].eval().features(make_batch(tokens.take(rows))).numpy()
    features_DF /= np.linalg.norm(features_DF, axis=1, keepdims=True).clip(1e-12)
    vectors_LF = unit_rows(sparse.csr_array(label_incidence(labels, len(split.index)).T @ features_DF))
    return replace(split, groups=LabelGroups(balanced_groups(vectors_LF, config.groups.max_size, config.groups.seed)))


# -- the tables ----------------------------------------------------------------------------------------------------------

BATCH = 64
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
    "groups from": {"TF-IDF": Run(GROUPED), "learned features": Run(GROUPED, regrouped=True)},
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
                if run.regrouped:
                    split = by_learned_features(folder, config, split)
                listed, cost = trained(folder, config, split, run.prepare)
                found = figures(folder, config, listed, arguments.documents)
                done[run] = " | ".join([*(f"{found[name]:.2f}" for name in SHOWN), f"{cost['seconds']:.0f}"])
            print(f"| {name} | {done[run]} |", flush=True)


if __name__ == "__main__":
    main()
