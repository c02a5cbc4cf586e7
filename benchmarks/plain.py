"""A plain implementation of the method, which `epoch_speed` compares with.

Documents are padded to the maximal length, targets of recall are a dense matrix, candidates are a Python list a document,
their vectors are gathered one by one, and AdamW updates everything in every step. Nothing is slowed down on purpose.
"""

import copy
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xmc_ray.model.lightxml import LightXML
from xmc_ray.training.optim import OptimConfig, learning_rate_factor


class PlainModel(nn.Module):
    """Encoder, recall and ranking as ordinary layers, starting from the weights of ``model``."""

    def __init__(self, model: LightXML) -> None:
        super().__init__()
        assert model.table is not None
        assert model.encoder is not None
        self.encoder, self.bottleneck = copy.deepcopy(model.encoder), copy.deepcopy(model.bottleneck)
        self.encoder.transformer.get_input_embeddings().sparse = False
        self.dropout, self.shortlist = nn.Dropout(model.dropout.p), model.shortlist
        self.recall = nn.Linear(model.recall.weight.shape[1], model.recall.n_groups)
        self.recall.weight.data.copy_(model.recall.weight)
        self.recall.bias.data.copy_(model.recall.bias)
        places = model.group_L, model.table.slot_L
        n_labels, width = len(model.group_L), model.table.weight.shape[2]
        self.vectors, self.biases = (nn.Embedding(n_labels + 1, columns, padding_idx=n_labels) for columns in (width, 1))
        self.vectors.weight.data[:n_labels] = model.table.weight[places]
        self.biases.weight.data[:n_labels, 0] = model.table.bias[places]
        self.members = [[label for label in row if label >= 0] for row in model.label_GM.tolist()]
        self.group_of: list[int] = model.group_L.tolist()

    def forward(self, tokens_BT: Tensor, mask_BT: Tensor, truth: Sequence[Sequence[int]]) -> Tensor:
        """The sum of both cross-entropies over their outputs, a mean over the documents."""
        features_BF = self.dropout(self.encoder(tokens_BT, mask_BT))
        logits_BG = self.recall(features_BF)
        target_BG = torch.zeros_like(logits_BG)
        for row, labels in enumerate(truth):
            target_BG[row, [self.group_of[label] for label in labels]] = 1
        loss = F.binary_cross_entropy_with_logits(logits_BG, target_BG, reduction="sum")

        label_BC, target_BC = self.candidates(logits_BG.detach().topk(self.shortlist).indices, truth)
        vectors_BH = self.bottleneck(features_BF)  # type: ignore[misc]
        logits_BC = torch.bmm(self.vectors(label_BC), vectors_BH[..., None])[..., 0] + self.biases(label_BC)[..., 0]
        loss_BC = F.binary_cross_entropy_with_logits(logits_BC, target_BC, reduction="none")
        return (loss + (loss_BC * (label_BC < len(self.group_of))).sum()) / len(truth)

    def candidates(self, shortlist_BK: Tensor, truth: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """Labels of shortlisted and true groups, padded with a label that does not exist, and which of them are true."""
        labels, targets = [], []
        for shortlist, true in zip(shortlist_BK.tolist(), truth, strict=True):
            groups = dict.fromkeys([*shortlist, *(self.group_of[label] for label in true)])
            labels.append([label for group in groups for label in self.members[group]])
            positive = set(true)
            targets.append([1.0 if label in positive else 0.0 for label in labels[-1]])
        longest, missing = max(map(len, labels)), len(self.group_of)
        label_BC = torch.tensor([row + [missing] * (longest - len(row)) for row in labels])
        return label_BC, torch.tensor([row + [0.0] * (longest - len(row)) for row in targets])


class PlainTrainer:
    """One AdamW over all parameters, with the schedule and the clipping of `optim.Optimizer`."""

    def __init__(self, model: PlainModel, config: OptimConfig, max_tokens: int | None) -> None:
        """``max_tokens``: what batches are padded to; None is the longest document of each."""
        self.model, self.config, self.max_tokens = model, config, max_tokens
        encoder = [parameter for parameter in model.encoder.parameters() if parameter.requires_grad]
        inside = {id(parameter) for parameter in model.encoder.parameters()}
        heads = [parameter for parameter in model.parameters() if id(parameter) not in inside]
        self.parts = ((encoder, config.encoder_lr), (heads, config.head_lr))
        groups = [{"params": part, "lr": peak} for part, peak in self.parts]
        self.adamw = torch.optim.AdamW(groups, weight_decay=config.weight_decay)

    def step(self, documents: Sequence[Sequence[int]], truth: Sequence[Sequence[int]], progress: float) -> float:
        """Train on token lists and label lists; the loss."""
        tokens_BT = np.zeros((len(documents), self.max_tokens or max(map(len, documents))), np.int64)
        mask_BT = np.zeros_like(tokens_BT, bool)
        for row, tokens in enumerate(documents):
            tokens_BT[row, : len(tokens)], mask_BT[row, : len(tokens)] = tokens, True
        self.model.train()
        self.adamw.zero_grad()
        loss = self.model(torch.from_numpy(tokens_BT), torch.from_numpy(mask_BT), truth)
        loss.backward()
        for group, (part, peak) in zip(self.adamw.param_groups, self.parts, strict=True):
            nn.utils.clip_grad_norm_(part, self.config.clip_norm)
            group["lr"] = peak * learning_rate_factor(progress, self.config)
        self.adamw.step()
        return loss.item()  # type: ignore[no-any-return]
