"""The linear ranker: a sparse linear classifier of words for each label, by which the model's first candidates are reordered.

    z     = w . x + b                            x: the weights of a document's terms, of Euclidean norm 1 (`model.lexical`)
    score = score of the model * exp(-weight max(0, 1 - z)^2)  (the squared hinge as a probability: Prabhu et al. 2018)

Its classifiers are solved for, not waited for: a label of three documents has its weights at once (`model.svm`). They know what
words say alone, and err where the trained features do not; decision 0021 has what that gains.

Letters: B documents, C candidates, E pairs of a candidate and one of its weights, F columns, k labels of a prediction,
L labels, N distinct (document, term) pairs, P (document, candidate) pairs, W non-zero weights.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from xmc_ray.model.device import upload
from xmc_ray.settings import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, Settings

ARRAYS = "start_L1", "column_W", "weight_W", "bias_L"  # of a ranker, by their names in a bundle

_LEAST = -3.0  # z below it counts as it, and so does that of labels behind the candidates

Terms = tuple[Tensor, Tensor, Tensor]
"""Row and column (int64[N], in rising order) and weight (float32[N]) of the terms of documents, as `LexicalBranch.terms`."""

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int32]
Longs = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class LinearConfig(Settings):
    """The linear ranker; it needs the lexical branch, whose terms it reads."""

    candidates: NonNegativeInt = 0
    """Labels of each document, the model's first ones, that are reordered; those behind stay behind. 0 turns the ranker off."""
    depth: PositiveInt = 4
    """Times as many candidates are learned from, true labels apart: those behind show what a wrong label looks like."""
    weight: NonNegativeFloat = 1.0
    """How much the ranker says: the exponent of its factor in the score. With a good transformer less than 1 is right."""
    cost: PositiveFloat = 1.0
    """C, the cost of an error in training, against the length of the weights."""
    smallest: NonNegativeFloat = 0.1
    """Weights below it are dropped: most of the memory for little of the quality."""


class LinearRanker(nn.Module):
    """The weights of all labels, label by label.

    Those of label l are ``weight_W`` (float32) from ``start_L1[l]`` to ``start_L1[l + 1]``, of the columns ``column_W``
    (int32); ``bias_L``: float32. ``candidates`` and ``weight``: see `LinearConfig`.
    """

    start_L1: Tensor
    column_W: Tensor
    weight_W: Tensor
    bias_L: Tensor

    def __init__(
        self, start_L1: Tensor, column_W: Tensor, weight_W: Tensor, bias_L: Tensor, candidates: int, weight: float
    ) -> None:
        super().__init__()
        self.candidates, self.weight = candidates, weight
        for name, values in zip(ARRAYS, (start_L1, column_W, weight_W, bias_L), strict=True):
            self.register_buffer(name, values)

    def reordered(self, score_Bk: Tensor, label_Bk: Tensor, z_BC: Tensor) -> tuple[Tensor, Tensor]:
        """The model's first labels and their scores, as `lightxml.Ranked`, in the order of the scores with the ranker's part.

        ``z_BC``: `margins` of the first of them.
        """
        behind_Bk = torch.full_like(score_Bk, _LEAST)
        behind_Bk[:, : z_BC.shape[1]] = z_BC
        # a score of 0 would mean that the label is disabled
        least = torch.finfo(torch.float32).tiny
        score_Bk = torch.where(score_Bk > 0, (score_Bk * self.likelihood(behind_Bk)).clamp(min=least), 0)
        score_Bk, order_Bk = score_Bk.sort(dim=1, descending=True, stable=True)
        return score_Bk, label_Bk.gather(1, order_Bk)

    def margins(self, terms: Terms, n_columns: int, label_BC: Tensor) -> Tensor:
        """float32[B, C]: z of the labels ``label_BC`` (int64); any number where it is -1."""
        label_BC = label_BC.clamp(min=0)
        score = self._on_cpu if label_BC.device.type == "cpu" else self._on_gpu
        return score(terms, n_columns, label_BC)

    def likelihood(self, z: Tensor) -> Tensor:
        """exp(-weight max(0, 1 - z)^2), the factor of the module, but not for z far below."""
        return torch.exp(-self.weight * (1 - z.clamp(_LEAST, 1)).square())

    def _on_cpu(self, terms: Terms, n_columns: int, label_BC: Tensor) -> Tensor:
        from xmc_ray.model import kernels  # and numba with it, which processes without a ranker need not wait for

        row_N, column_N, weight_N = (part.numpy() for part in terms)
        start_B1 = np.searchsorted(row_N, np.arange(len(label_BC) + 1))
        weights = self.start_L1.numpy(), self.column_W.numpy(), self.weight_W.numpy(), self.bias_L.numpy()
        z_BC = np.zeros(label_BC.shape, np.float32)
        kernels.margins(
            start_B1, column_N, weight_N.astype(np.float32, copy=False), label_BC.numpy(), *weights, n_columns, z_BC
        )
        return torch.from_numpy(z_BC)

    def _on_gpu(self, terms: Terms, n_columns: int, label_BC: Tensor) -> Tensor:
        """By looking each weight of a candidate up among the document's terms, all of them at once."""
        row_N, column_N, weight_N = (upload(part, label_BC.device) for part in terms)
        if not len(row_N):
            return self.bias_L[label_BC]
        label_P = label_BC.flatten()
        start_P = self.start_L1[label_P]
        size_P = self.start_L1[label_P + 1] - start_P
        pair_E = torch.repeat_interleave(torch.arange(len(label_P), device=label_P.device), size_P)
        place_E = torch.arange(len(pair_E), device=label_P.device) - (size_P.cumsum(0) - size_P - start_P)[pair_E]
        key_E = pair_E // label_BC.shape[1] * n_columns + self.column_W[place_E]
        key_N = row_N * n_columns + column_N
        found_E = torch.searchsorted(key_N, key_E).clamp(max=len(key_N) - 1)
        product_E = torch.where(key_N[found_E] == key_E, weight_N[found_E].float(), 0.0) * self.weight_W[place_E]
        return self.bias_L[label_P].index_add(0, pair_E, product_E).view_as(label_BC)
