"""What the ablations change that is no setting of the library: other models, starts, rates and groups."""

import copy
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
import torch.nn.functional as F
from scipy import sparse
from torch import Tensor

from benchmarks.inputs import Split
from benchmarks.quality.variants import trained
from xmc_ray.bundle.ensemble import Listed
from xmc_ray.data.groups import LabelGroups, balanced_groups, group_labels, label_incidence, unit_rows
from xmc_ray.data.labels import lists_from_rows
from xmc_ray.metrics.at_k import propensities
from xmc_ray.model.batch import Batch, make_batch
from xmc_ray.model.judged import Judged
from xmc_ray.model.lightxml import LightXML, Losses
from xmc_ray.model.predict import features
from xmc_ray.model.recall import RecallHead
from xmc_ray.model.sharding import with_gradient
from xmc_ray.training.fit import FitConfig
from xmc_ray.training.loop import TrainState

BATCH, LAYER_DECAY = 64, 0.8


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
        self,
        features_BF: Tensor,
        row_P: Tensor,
        group_P: Tensor,
        shortlist: int,
        documents: int,
        judged: Judged | None = None,
    ) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            logits_BL, loss, gradient_BF, gradient_BL = self._without_positives(features_BF)
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


def with_layer_decay(state: TrainState) -> None:
    """The embeddings count as the layer below the lowest."""
    optimizer, encoder = state.optimizer, state.model.encoder
    assert encoder is not None and optimizer.adamw is not None and optimizer.lazy_adam is not None
    layers = int(encoder.transformer.config.num_hidden_layers)
    groups, name_of = [], {parameter: name for name, parameter in optimizer.dense.items()}
    for group in optimizer.adamw.param_groups:
        for parameter in group["params"]:
            of_layer = re.search(r"^encoder\..*\.layer\.(\d+)\.", name_of[parameter])
            lowest = layers if name_of[parameter].startswith("encoder.") else 0
            below = layers - 1 - int(of_layer[1]) if of_layer else lowest
            groups.append(group | {"params": [parameter], "peak": group["peak"] * LAYER_DECAY**below})
    optimizer.adamw = torch.optim.AdamW(groups, fused=True)
    for group in optimizer.lazy_adam.param_groups:
        group["peak"] *= LAYER_DECAY**layers


def twice(folder: Path, config: FitConfig, split: Split) -> Split:
    """The copy of label l is l + L, in the groups of another clustering; documents that have the one have the other."""
    tokens, labels = (split.table[name].combine_chunks() for name in ("tokens", "labels"))
    n_labels, index = len(split.index), split.index
    others = group_labels(replace(config.groups, seed=config.groups.seed + 1), [tokens], [labels], n_labels)
    names = pa.concat_arrays([index.names, index.names])
    called = pa.concat_arrays([index.labels, pc.binary_join_element_wise(index.labels, "again", " ")])
    ids, rows = labels.flatten().to_numpy(), pc.list_parent_indices(labels).to_numpy()
    ids, rows = np.concatenate([ids, ids + n_labels]), np.concatenate([rows, rows])
    order = np.argsort(rows, kind="stable")
    lists = lists_from_rows(rows[order], pa.array(ids[order], pa.int32()), len(labels))
    return replace(
        split,
        table=pa.table({"tokens": tokens, "labels": lists}),
        index=replace(index, labels=called, names=names, counts=np.tile(index.counts, 2)),
        groups=LabelGroups(np.concatenate([split.groups.group_L, others.group_L + len(split.groups)])),
    )


def merged(listed: Listed, n_labels: int) -> Listed:
    """Of a label and its copy, the one with the higher score, as the label itself."""
    scores_DK, ids_DK = listed
    ids_DK = np.where(ids_DK < 0, -1, ids_DK % n_labels)
    order_DK = np.argsort(ids_DK, axis=1, kind="stable")  # a label's higher score stays before the lower
    by_label_DK = np.take_along_axis(ids_DK, order_DK, 1)
    is_again_DK = np.zeros(ids_DK.shape, bool)
    np.put_along_axis(is_again_DK, order_DK, np.diff(by_label_DK, axis=1, prepend=-2) == 0, 1)
    order_DK = np.argsort(is_again_DK | (ids_DK < 0), axis=1, kind="stable")
    scores_DK, ids_DK = np.where(is_again_DK, 0, scores_DK), np.where(is_again_DK, -1, ids_DK)
    return np.take_along_axis(scores_DK, order_DK, 1), np.take_along_axis(ids_DK, order_DK, 1)


def by_learned_features(folder: Path, config: FitConfig, split: Split) -> Split:
    """The same documents, their labels in groups by what a model has learned in an epoch."""
    learned: list[LightXML] = []
    once = replace(config, loop=replace(config.loop, epochs=1))
    trained(folder, once, split, lambda model, split: learned.append(model))
    tokens, labels = (split.table[name].combine_chunks() for name in ("tokens", "labels"))
    features_DF = features(learned[0], tokens, config.loop.prediction).numpy()
    features_DF /= np.linalg.norm(features_DF, axis=1, keepdims=True).clip(1e-12)
    vectors_LF = unit_rows(sparse.csr_array(label_incidence(labels, len(split.index)).T @ features_DF))
    return replace(split, groups=LabelGroups(balanced_groups(vectors_LF, config.groups.max_size, config.groups.seed)))
