"""LightXML: one transformer, label-group recall, label ranking with dynamic negatives, trained jointly.

    features = dropout(encoder(text), lexical(text))  the last n hidden states' summaries; vectors of words, if wanted
    recall   = linear(features)                       one logit a group (Jiang et al. 2021, section 3.2, "generator")
    ranking  = bottleneck(features) . label vectors   of the labels in the K best groups (section 3.4, "discriminator")
    loss     = BCE(recall) + BCE(ranking)             negatives change as recall learns (section 3.3)
    score    = sigmoid(ranking) * sigmoid(recall of the label's group + lift of the group)

In flat mode every group is one label: recall scores the labels themselves and there is no ranking stage. The lift, which is
higher for rare labels, is not in the paper; it is 0 by default (decision 0016). Neither is the linear ranker, which multiplies
the score by a third factor once training has ended (`model.linear`).

Letters: B documents, F features, G groups, K shortlisted groups, M places in a group, H bottleneck, P true pairs,
J judged ones.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xmc_ray.data.filters import LabelFilters
from xmc_ray.data.groups import LabelGroups
from xmc_ray.data.labels import IntArray
from xmc_ray.errors import ConfigError
from xmc_ray.metrics.at_k import propensities
from xmc_ray.model.batch import Batch
from xmc_ray.model.device import KnownMask, upload
from xmc_ray.model.encoder import TextEncoder
from xmc_ray.model.filtering import BARRED, BatchFilter, FilterMasks
from xmc_ray.model.judged import Judged
from xmc_ray.model.lexical import LexicalBranch
from xmc_ray.model.linear import LinearRanker
from xmc_ray.model.ranking import ALIGNMENT, LabelTable
from xmc_ray.model.recall import RecallHead
from xmc_ray.model.sharding import Exchange, OwnedRows
from xmc_ray.settings import Bounds, PositiveInt, Settings, Share


@dataclass(frozen=True, kw_only=True)
class ModelConfig(Settings):
    """The heads on top of the encoder."""

    shortlist: PositiveInt = 10
    """K, the groups with the highest recall score whose labels are ranked."""
    bottleneck: Annotated[int, Bounds(ge=ALIGNMENT, multiple_of=ALIGNMENT)] = 384
    """H, the width of the label vectors; a multiple of 8."""
    dropout: Share = 0.5
    """Dropout of the features."""
    table: Literal["auto", "float32", "bfloat16"] = "auto"
    """Data type of the label vectors; auto is bfloat16 with stochastic rounding on a GPU and float32 on a CPU."""
    lift: Annotated[float, Bounds(ge=0, le=2)] = 0.0
    """How far predictions raise rare labels, 0 to 2: with 1 a group's odds are divided by its labels' mean propensity."""


Scoring = Literal["grouped", "exact"]
"""Which labels a prediction scores: those in the groups that recall shortlists, or all. The same in flat mode."""


class Losses(NamedTuple):
    """Two sums over the labels, each a mean over the documents of a batch; scalars."""

    recall: Tensor
    rank: Tensor


class TrainedParameters(NamedTuple):
    """The parameters that learn by autograd, by how they are updated; each by its name in the model, in order.

    ``encoder``: all of the encoder's, ``words``: those of them with sparse gradients; ``terms``: the vectors of the lexical
    branch, whose gradients are sparse as well; ``head``: the bottleneck and the lexical branch's layer.
    """

    encoder: dict[str, nn.Parameter]
    words: dict[str, nn.Parameter]
    terms: dict[str, nn.Parameter]
    head: dict[str, nn.Parameter]

    @property
    def dense(self) -> dict[str, nn.Parameter]:
        """Those with dense gradients."""
        return {name: parameter for name, parameter in (self.encoder | self.head).items() if name not in self.words}


class Ranked(NamedTuple):
    """The best labels of each document, scores falling.

    ``score_Bk``: float32 in 0..1; ``label_Bk``: int64, -1 (with score 0) where a document has fewer candidates than k.
    """

    score_Bk: Tensor
    label_Bk: Tensor


class LightXML(nn.Module):
    """Encoder, lexical branch (one of the two may be missing), recall head, bottleneck, label table; ``forward`` is the loss.

    In a process group every worker has the whole encoder and bottleneck, but of recall head and table only the rows of its own
    groups (`sharding.Exchange.share`). A model in a single process has all rows, by the same code.
    """

    label_GM: Tensor

    def __init__(
        self,
        encoder: TextEncoder | None,
        groups: LabelGroups,
        config: ModelConfig,
        exchange: Exchange | None = None,
        seed: int = 0,
        lexical: LexicalBranch | None = None,
    ) -> None:
        """``seed`` determines the rows of recall head and table, the same for any number of workers.

        Raises ConfigError when there is neither an encoder nor a lexical branch.
        """
        super().__init__()
        self.config = config
        self.exchange = exchange or Exchange()
        self.shortlist = min(config.shortlist, len(groups))
        self.encoder, self.lexical = encoder, lexical
        self.linear: LinearRanker | None = None
        self.judged_weight: float | None = None  # of pairs that editors have judged, if there is feedback
        self._filter_masks: FilterMasks | None = None
        self.width = sum(part.width for part in (encoder, lexical) if part is not None)
        if not self.width:
            raise ConfigError(
                "the model has nothing to read with",
                found="encoder.layers = 0 and lexical.width = 0",
                way_out="give one of them a number above 0",
            )
        self.dropout = nn.Dropout(config.dropout)
        self.recall = RecallHead(self.width, len(groups), self.exchange, 2 * seed)
        self.recall.steady = 0 if encoder is None else encoder.width
        if config.lift:
            self.recall.lift = torch.zeros_like(self.recall.bias)
        self.bottleneck = None if groups.flat else nn.Linear(self.width, config.bottleneck)
        dtype = torch.bfloat16 if config.table == "bfloat16" else torch.float32
        self.table = None if groups.flat else LabelTable(groups, config.bottleneck, self.exchange, 2 * seed + 1, dtype)
        self.group_L = torch.from_numpy(groups.group_L)  # on the host
        self.register_buffer("label_GM", torch.from_numpy(groups.label_GM), persistent=False)

    def __getstate__(self) -> dict[str, Any]:
        """Without masks of filters, which cannot be pickled and are made again when they are asked for."""
        return self.__dict__ | {"_filter_masks": None}

    @property
    def heads(self) -> dict[str, OwnedRows]:
        """The parts whose rows are divided among the workers, by name."""
        return {"recall": self.recall} | ({} if self.table is None else {"table": self.table})

    def trained_parameters(self) -> TrainedParameters:
        """The parameters that are not frozen, but for the rows of `heads`, which take no part in autograd."""
        trained = {name: parameter for name, parameter in self.named_parameters() if parameter.requires_grad}
        embeddings = (nn.Embedding, nn.EmbeddingBag)
        is_sparse = {f"{name}.weight": part.sparse for name, part in self.named_modules() if isinstance(part, embeddings)}
        encoder = {name: parameter for name, parameter in trained.items() if name.startswith("encoder.")}
        sparse = {name: parameter for name, parameter in trained.items() if is_sparse.get(name)}
        words = {name: parameter for name, parameter in sparse.items() if name in encoder}
        terms = {name: parameter for name, parameter in sparse.items() if name not in encoder}
        head = {name: parameter for name, parameter in trained.items() if name not in encoder | terms}
        return TrainedParameters(encoder, words, terms, head)

    @torch.no_grad()
    def start_from_counts(self, counts_L: IntArray, n_documents: int) -> None:
        """Set the biases to the log-odds in training, so that the first steps need not learn that labels are rare.

        The odds of a group follow from the sum of its labels' counts, those of a label from its share of that sum. (The prior
        initialisation of Lin et al. 2017, section 3.3, for each output.)

        Also sets the lift, which training does not change: `ModelConfig.lift` times log(true / observed) of each group.
        Observed is the sum of its labels' counts, true is the sum of each label's count over its propensity.
        """
        counts_L = np.maximum(counts_L, 0)
        counts, group_L = torch.from_numpy(counts_L).double(), self.group_L
        counts_G = torch.zeros(len(self.label_GM), dtype=torch.double).index_add_(0, group_L, counts)
        own = slice(self.recall.own.start, self.recall.own.stop)
        self.recall.bias.copy_(torch.logit((counts_G[own] + 0.5) / (n_documents + 1), eps=1e-6).clamp(max=0))
        if self.recall.lift is not None:
            observed = counts + 0.5  # a label without documents has a propensity, too
            true = observed / torch.from_numpy(propensities(counts_L, n_documents))
            observed_G, true_G = (torch.zeros_like(counts_G).index_add_(0, group_L, part) for part in (observed, true))
            self.recall.lift.copy_(self.config.lift * torch.log(true_G / observed_G)[own])
        if self.table is not None:
            own_L = self.table.owned(group_L)
            share_L = (counts + 0.5) / (counts_G[group_L] + 1)
            rows = group_L[own_L] - own.start, self.table.slot_L[own_L]
            self.table.bias[rows] = torch.logit(share_L[own_L], eps=1e-6).to(self.table.bias)

    def forward(self, batch: Batch, documents: int | None = None) -> Losses:
        """The training loss of a batch (on the host), divided by ``documents`` (by default those of the batch).

        With several workers it is this worker's part of the loss of all workers' documents; ``documents`` counts them all.
        """
        features_bF = self.dropout(self.features(batch))
        documents = len(batch) if documents is None else documents
        features_BF, row_P, label_P = self._gathered(features_bF, batch)
        labels = self._judged(batch, row_P, label_P)

        # recall: every group, against the groups that hold a true label
        group_P = self.group_L[label_P]
        groups = None if labels is None else labels.of_groups(self.group_L, row_P, group_P, self.recall.n_groups)
        recall_loss, shortlist_BK = self.recall.loss(features_BF, row_P, group_P, self.shortlist, documents, groups)
        if self.table is None or self.bottleneck is None:
            return Losses(recall_loss, torch.zeros_like(recall_loss))

        # rank: the labels of the groups that recall shortlists now, and of all true or judged ones; the choice has no gradient
        vectors_BH = self.bottleneck(features_BF)
        return Losses(recall_loss, self.table.loss(vectors_BH, shortlist_BK, row_P, label_P, documents, labels))

    def features(self, batch: Batch) -> Tensor:
        """float[B, F]: the features of encoder and lexical branch, concatenated."""
        parts, device = [], self.recall.weight.device
        if self.encoder is not None:
            with nullcontext() if device.type == "cpu" else KnownMask(batch.mask_BT):
                parts.append(self.encoder(upload(batch.tokens_BT, device), upload(batch.mask_BT, device)))
        if self.lexical is not None:
            parts.append(self.lexical(batch.tokens_BT, batch.mask_BT))
        return torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]

    def filter_masks(self, filters: LabelFilters) -> FilterMasks:
        """What makes the filters of batches, from filters over this model's labels; kept until others are asked for."""
        kept = self._filter_masks
        if kept is None or kept.filters is not filters or kept.label_GM.device != self.label_GM.device:
            missing = 0 if self.table is None else self.table.places - self.label_GM.shape[1]
            label_GM = F.pad(self.label_GM, (0, missing), value=-1)
            self._filter_masks = kept = FilterMasks(filters, self.group_L, label_GM, self.recall.own)
        return kept

    def predict(self, batch: Batch, k: int, scoring: Scoring = "grouped", filters: BatchFilter | None = None) -> Ranked:
        """The ``k`` best labels of each document, of those that its filter allows; call in eval mode, without gradients.

        Exact scoring needs memory for one score per group and document. The ``k`` best labels lie in the ``k`` groups whose own
        best labels score highest; and no label scores higher than its group, so only groups matter whose recall exceeds the
        last score of grouped scoring: few of them where recall is confident, all in the worst case.

        With several workers all must call it; each gets the results of all documents, in order of rank, which is that of
        ``filters`` as well. A model with a linear ranker predicts in a single process.
        """
        if self.linear is None or self.lexical is None:
            return self._first(batch, k, scoring, filters)
        first = self._first(batch, max(k, self.linear.candidates), scoring, filters)
        terms = self.lexical.terms(batch.tokens_BT, batch.mask_BT)
        z_BC = self.linear.margins(terms, len(self.lexical.weight_F), first.label_Bk[:, : self.linear.candidates])
        score_Bk, label_Bk = self.linear.reordered(*first, z_BC)
        return Ranked(score_Bk[:, :k], label_Bk[:, :k])

    def _first(self, batch: Batch, k: int, scoring: Scoring, filters: BatchFilter | None) -> Ranked:
        """The ``k`` best labels by recall and rank."""
        features_bF = self.features(batch) if len(batch) else self.recall.weight.new_zeros(0, self.width)
        features_BF, _, _ = self._gathered(features_bF, batch)
        recall_Bg = self.recall.logits(features_BF)
        if self.table is None or self.bottleneck is None:
            choices_BW, group_BW = (recall_Bg, None) if filters is None else filters.choices(recall_Bg)
            recall_Bk, group_Bk = self.recall.best(choices_BW, min(k, self.recall.n_groups), group_BW)
            return _padded(recall_Bk.sigmoid(), self.label_GM[:, 0][group_Bk], k)
        if filters is not None:
            filters.bar_groups(recall_Bg)
        vectors_BH, (_, shortlist_BK) = self.bottleneck(features_BF), self.recall.best(recall_Bg, self.shortlist)
        ranked = self._ranked(self.table, vectors_BH, recall_Bg, shortlist_BK, k, filters)
        if scoring == "grouped" or self.shortlist == self.recall.n_groups:
            return ranked
        score_Bg = recall_Bg.sigmoid()
        wanted_Bg = score_Bg >= ranked.score_Bk[:, -1:]
        if filters is not None:
            wanted_Bg &= recall_Bg > BARRED / 2
        score_Bg *= self.table.peaks(vectors_BH, wanted_Bg, filters).sigmoid_()
        _, best_BK = self.recall.best(score_Bg, min(k, self.recall.n_groups))
        return self._ranked(self.table, vectors_BH, recall_Bg, best_BK, k, filters)

    @torch.no_grad()
    def probabilities(self, features_BF: Tensor) -> tuple[Tensor, Tensor | None]:
        """The two factors of every score, float32, for documents of these features: recall [B, G] and rank [B, G, M].

        The latter is -1 where a group has no label, and None in flat mode. For a single process, and few documents.
        """
        recall_BG = self.recall.logits(features_BF).sigmoid_()
        if self.table is None or self.bottleneck is None:
            return recall_BG, None
        every_BG = torch.arange(recall_BG.shape[1], device=features_BF.device).expand_as(recall_BG)
        return recall_BG, self.table.predict(self.bottleneck(features_BF), every_BG)

    @torch.no_grad()
    def log_odds(self, features_BF: Tensor, label: int, likelihood_B: Tensor | None = None) -> Tensor:
        """float64[B]: log(p / (1 - p)) of the score p of ``label`` for documents of these features; -inf if it is disabled.

        ``likelihood_B``: the linear ranker's factor, if the model has a ranker.
        """
        group = int(self.group_L[label])
        recall_B = features_BF.double() @ self.recall.weight[group].double() + self.recall.lifted_bias[group].double()
        log_p_B = F.logsigmoid(recall_B)
        if self.table is not None and self.bottleneck is not None:
            row = group, int(self.table.slot_L[label])
            rank_B = self.bottleneck(features_BF).double() @ self.table.weight[row].double() + self.table.bias[row].double()
            log_p_B = log_p_B + F.logsigmoid(rank_B)
        elif likelihood_B is None:
            return recall_B
        if likelihood_B is not None:
            log_p_B = log_p_B + likelihood_B.double().log()
        log_p_B = log_p_B.clamp(max=-1e-300)  # expm1 gives 1 - p without the rounding of p
        return log_p_B - torch.log(-torch.expm1(log_p_B))

    @torch.no_grad()
    def disable(self, label_P: IntArray) -> None:
        """Make the score of these labels 0 for all documents: they are never predicted again."""
        group_P = self.group_L[label_P]
        if self.table is None:
            self.recall.bias[group_P] = -torch.inf
        else:
            self.table.bias[group_P, self.table.slot_L[label_P]] = -torch.inf

    def _ranked(
        self,
        table: LabelTable,
        vectors_BH: Tensor,
        recall_Bg: Tensor,
        shortlist_BK: Tensor,
        k: int,
        filters: BatchFilter | None,
    ) -> Ranked:
        """The best labels in the groups of a shortlist, which is the same on all workers, by the scores of all workers."""
        score_BKM = table.predict(vectors_BH, shortlist_BK)
        recall_BK = self.recall.of_groups(recall_Bg, shortlist_BK).sigmoid_()
        score_BKM = torch.where(score_BKM < 0, -1, score_BKM * recall_BK[..., None])
        label_BKM = F.pad(self.label_GM, (0, score_BKM.shape[2] - self.label_GM.shape[1]), value=-1)[shortlist_BK]
        if filters is not None:
            filters.bar_labels(score_BKM, label_BKM, -1)
        best = score_BKM.flatten(1).topk(min(k, score_BKM.shape[1] * score_BKM.shape[2]))
        own_label_Bk = label_BKM.flatten(1).gather(1, best.indices)
        return _padded(*self.exchange.best_of_all(best.values, own_label_Bk, best.values.shape[1]), k)

    def _gathered(self, features_bF: Tensor, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Features, float32, and true pairs, on the host, of all workers; rows are numbered through the documents of all."""
        exchange = self.exchange
        documents, pairs = exchange.counts(len(batch), len(batch.row_P), device=features_bF.device)
        row_P, label_P = self._gathered_pairs(batch.row_P, batch.label_P, documents, pairs, "true labels")
        device = features_bF.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else torch.float32
        return exchange.gather_features(features_bF.to(dtype), documents), row_P, label_P

    def _judged(self, batch: Batch, row_P: Tensor, label_P: Tensor) -> Judged | None:
        """The judged labels of all workers' documents, if there is feedback; ``row_P``, ``label_P``: the true ones."""
        if self.judged_weight is None:
            return None
        documents, pairs = self.exchange.counts(len(batch), len(batch.row_J), device=self.recall.weight.device)
        row_J, label_J = self._gathered_pairs(batch.row_J, batch.label_J, documents, pairs, "judged labels")
        return Judged.of_labels(row_J, label_J, row_P, label_P, len(self.group_L), self.judged_weight)

    def _gathered_pairs(
        self, row_p: Tensor, label_p: Tensor, documents: Sequence[int], pairs: Sequence[int], what: str
    ) -> tuple[Tensor, ...]:
        """(document, label) pairs, on the host, of all workers: so many ``pairs`` of each, which has so many ``documents``."""
        pairs_P2 = torch.stack([row_p + sum(documents[: self.exchange.rank]), label_p], dim=1)
        if self.exchange.world > 1:
            pairs_P2 = self.exchange.gather(upload(pairs_P2, self.recall.weight.device), pairs, what).cpu()
        return pairs_P2.unbind(1)


def _padded(score_Bk: Tensor, label_Bk: Tensor, k: int) -> Ranked:
    """Padded to ``k`` columns. A label with a score of 0 is no prediction: it is disabled (`LightXML.disable`)."""
    label_Bk = label_Bk.masked_fill(score_Bk <= 0, -1)
    missing = max(0, k - score_Bk.shape[1])
    return Ranked(F.pad(score_Bk, (0, missing)).clamp(min=0), F.pad(label_Bk, (0, missing), value=-1))
