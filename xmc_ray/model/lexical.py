"""The lexical branch: features from weighted words and pairs of words, beside a transformer or in its place.

Every token and every pair of neighbouring tokens is a *term*, hashed into one of F columns (`data.terms`). A document's
features are the TF-IDF weighted sum of its terms' vectors, followed by one small residual layer:

    x = sum over terms of w(term) v(term)      w: g(tf) idf, scaled to Euclidean norm 1, as in `groups`
    features = x + relu(A relu(x) + a)         (the residual block of Astec, Dahiya et al. 2021, section 3)

g(tf) = 1 + log tf. Of a document with fields, tf is the sum of the weights of the fields in which the term occurs, and g as in
`terms.saturated`: BM25F's order of weights and saturation (Robertson, Zaragoza and Taylor 2004).

The vectors are trained with the rest of the model. The branch reads all tokens of a document, even where the transformer reads
only the first; on a CPU its step costs a hundredth of a transformer's.

Letters: B documents, T tokens, S terms with repetitions, N distinct (document, term) pairs, F columns, H width.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xmc_ray.data import terms
from xmc_ray.data.fields import ids_of, numbers_of
from xmc_ray.data.terms import FIRST_OF_PAIR, SPREAD, document_frequency, inverse_document_frequency
from xmc_ray.model.device import upload
from xmc_ray.settings import NonNegativeInt, PositiveInt, Settings

_STD = 0.01  # of initial vectors: small, since a term that does not occur in training keeps its own


@dataclass(frozen=True, kw_only=True)
class LexicalConfig(Settings):
    """The lexical branch; see the module."""

    width: NonNegativeInt = 0
    """H, the number of its features; 0 turns the branch off."""
    columns: PositiveInt = 2**20
    """F, the columns that terms are hashed to; terms that collide share a vector. Each column costs 8 bytes."""
    rarest: PositiveInt = 2
    """Minimum number of training documents in which a column must occur: nothing is learned from a term seen once."""


class LexicalBranch(nn.Module):
    """Vectors of terms, their weights and the layer on top.

    ``weight_F``: float32[F], idf, 0 for columns that are left out. ``place_F``: the row of each other column's vector.
    ``field_weights``: of the fields in order; empty for texts without fields.
    """

    weight_F: Tensor
    place_F: Tensor

    def __init__(self, weight_F: Tensor, width: int, field_weights: Sequence[float] = ()) -> None:
        super().__init__()
        self.width, self.field_weights = width, tuple(field_weights)
        self.register_buffer("weight_F", weight_F)
        place_F = (weight_F > 0).cumsum(0, dtype=torch.int32) - 1
        self.register_buffer("place_F", place_F, persistent=False)
        self.vectors = nn.EmbeddingBag(max(1, int(place_F[-1]) + 1), width, mode="sum", sparse=True)
        nn.init.normal_(self.vectors.weight, std=_STD)
        self.mix = nn.Linear(width, width)
        nn.init.zeros_(self.mix.bias)
        self._copies: tuple[Tensor | None, tuple[Tensor, Tensor]] = None, (weight_F, place_F)

    def forward(self, tokens_BT: Tensor, mask_BT: Tensor) -> Tensor:
        """float32[B, H]: the features of padded documents."""
        row_N, column_N, weight_N = self.terms(tokens_BT, mask_BT)
        starts_B = torch.searchsorted(row_N, torch.arange(len(tokens_BT)))
        of_terms = self._on_host[1][column_N].long(), starts_B, weight_N
        place_N, starts_B, weight_N = (upload(part, self.place_F.device) for part in of_terms)
        x_BH = self.vectors(place_N, starts_B, per_sample_weights=weight_N)
        features_BH: Tensor = x_BH + F.relu(self.mix(F.relu(x_BH)))
        return features_BH

    def terms(self, tokens_BT: Tensor, mask_BT: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Row, column (int64[N], in rising order) and weight w of each document's distinct terms, without those left out.

        All is on the host, which would otherwise wait for the number of terms.
        """
        weight_F, _ = self._on_host
        row_N, column_N, count_N = count_terms(tokens_BT, mask_BT, len(weight_F), self.field_weights)
        count_N = count_N.to(weight_F.dtype)
        weight_N = torch.where(count_N < 1, count_N, 1 + count_N.clamp(min=1).log()) * weight_F[column_N]
        kept_N = weight_N > 0
        row_N, column_N, weight_N = row_N[kept_N], column_N[kept_N], weight_N[kept_N]
        square_B = weight_N.new_zeros(len(tokens_BT)).index_add_(0, row_N, weight_N.square())
        return row_N, column_N, weight_N * square_B.clamp(min=1e-12).rsqrt()[row_N]

    @property
    def _on_host(self) -> tuple[Tensor, Tensor]:
        """``weight_F`` and ``place_F`` on the host; copied once from any other device."""
        if self.weight_F.device.type == "cpu":
            return self.weight_F, self.place_F
        of, copies = self._copies
        if of is not self.weight_F:
            copies = self.weight_F.cpu(), self.place_F.cpu()
            self._copies = self.weight_F, copies
        return copies


def count_terms(
    tokens_BT: Tensor, mask_BT: Tensor, columns: int, weights: Sequence[float] = ()
) -> tuple[Tensor, Tensor, Tensor]:
    """`terms.count_terms` of padded documents: distinct rows and columns (int64[N], in rising order), and their counts.

    The counts are int64[N], with ``weights`` of fields float64[N].
    """
    field_BT, single_BT = numbers_of(tokens_BT), ids_of(tokens_BT) + 1
    pair_BT = single_BT[:, :-1] * FIRST_OF_PAIR + single_BT[:, 1:]
    column_BS = (torch.cat([single_BT, pair_BT], dim=1) * SPREAD >> 32 & 0xFFFFFFFF) % columns
    real_BS = torch.cat([mask_BT, mask_BT[:, 1:] & (field_BT[:, 1:] == field_BT[:, :-1])], dim=1)
    row_B1 = torch.arange(len(tokens_BT), device=tokens_BT.device)[:, None]
    key_S = (row_B1 * columns + column_BS)[real_BS]
    if not weights:
        key_N, count_N = torch.unique(key_S, return_counts=True)
        return key_N // columns, key_N % columns, count_N
    key_N, place_S = torch.unique(key_S, return_inverse=True)
    field_S = torch.cat([field_BT, field_BT[:, 1:]], dim=1)[real_BS]
    weight_S = torch.tensor(weights, dtype=torch.float64, device=key_S.device)[field_S]
    count_N = weight_S.new_zeros(len(key_N)).index_add_(0, place_S, weight_S)
    return key_N // columns, key_N % columns, count_N


def term_weights(tokens: Iterable[pa.ListArray], config: LexicalConfig) -> npt.NDArray[np.float32]:
    """float32[F]: the inverse document frequency of each column, over chunks of documents (list<int32>); 0 for rare ones."""
    n_documents, frequency_F = document_frequency(terms.count_terms(chunk, config.columns) for chunk in tokens)
    weight_F = inverse_document_frequency(n_documents, frequency_F)
    return np.where(frequency_F >= config.rarest, weight_F, 0).astype(np.float32)
