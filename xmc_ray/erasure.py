"""What a word is worth to a label: what its odds lose when the word is left out, everywhere in the text.

    contribution = log-odds of the label's score - log-odds without the word

in nats: the weight of evidence of Robnik-Sikonja and Kononenko (2008), by erasure as in Li et al. (2016, arXiv 1612.08220).
It asks of a model nothing but scores, so that it is the same for a transformer, the lexical branch and both; gradient x input
would be blind to pairs of words, which the branch hashes. Its limit: of two words that say the same, either can be missed.

A word is what stands between white space, without the punctuation around it. Its tokens are taken out of the token list: of
a text that is too long, what has been cut off stays so.

Letters: B documents, C characters, F features, T tokens, V variants of the text, W words and two rows besides.
"""

import re

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
import torch.nn.functional as F
from torch import Tensor

from xmc_ray.bundle import Bundle
from xmc_ray.labels import IntArray, lists_from_rows
from xmc_ray.model import LightXML

_AROUND = ".,:;!?()[]{}<>\"'`“”‘’«»…"


def log_odds(model: LightXML, features_BF: Tensor, label: int) -> Tensor:
    """float64[B]: log(p / (1 - p)) of the score p of ``label`` for documents of these features; -inf of a deprecated label."""
    group, features_BF = int(model.group_L[label]), features_BF.to(model.recall.weight.device)
    with torch.no_grad():
        recall_B = features_BF.double() @ model.recall.weight[group].double() + model.recall.lifted_bias[group].double()
        if model.table is None or model.bottleneck is None:
            return recall_B.cpu()
        place = group, int(model.table.slot_L[label])
        rank_B = model.bottleneck(features_BF).double() @ model.table.weight[place].double() + model.table.bias[place].double()
        # two logits, one score: log p = log sigmoid + log sigmoid, and 1 - p without the rounding of p
        log_p_B = (F.logsigmoid(recall_B) + F.logsigmoid(rank_B)).clamp(max=-1e-300)
        return (log_p_B - torch.log(-torch.expm1(log_p_B))).cpu()


def words_of(text: str) -> tuple[list[str], IntArray]:
    """The distinct words, in order of first occurrence, and the word of each character (int64[C]), -1 between words.

    Words are the same whatever their case.
    """
    word_C, places, forms = np.full(len(text), -1, np.int64), dict[str, int](), list[str]()
    for match in re.finditer(r"\S+", text):
        form = bare(match.group())
        place = places.setdefault(form.casefold(), len(places))
        if place == len(forms):
            forms.append(form)
        word_C[slice(*match.span())] = place
    return forms, word_C


def bare(form: str) -> str:
    """A word without the punctuation around it, if anything else is left."""
    return form.strip(_AROUND) or form


def starts(word_C: IntArray) -> npt.NDArray[np.bool_]:
    """bool[C]: where words start; two of them never touch."""
    return (word_C >= 0) & (np.concatenate([[-1], word_C[:-1]]) < 0)


def without_each_word(bundle: Bundle, text: str, word_C: IntArray, n_words: int) -> tuple[pa.ListArray, IntArray]:
    """Tokens (list<int32>[V]) of the text as it is, without each word that has a token, and without all; and where they are.

    The latter, int64[W], are the places among the variants of the text as it is, of each word's, and of the text without all
    words; 0 for a word that has no token, for then nothing is left out. So a long text has no more variants than tokens.
    """
    tokens = np.array(bundle.tokenizer.encode(pa.array([text]))[0][0].as_py(), np.int32)
    first_T, end_T = bundle.tokenizer.offsets(text).T
    # by a token's last character, for some tokenizers count the space before a word as part of its first token
    word_T = np.full(len(tokens), -1)
    word_T[end_T > first_T] = word_C[end_T[end_T > first_T] - 1]
    read = np.unique(word_T[word_T >= 0])
    kept_VT = np.concatenate([np.full((1, len(tokens)), True), word_T != read[:, None], word_T[None] < 0])
    rows, places = np.nonzero(kept_VT)
    variant_W = np.zeros(n_words + 2, np.int64)
    variant_W[1 + read], variant_W[-1] = np.arange(len(read)) + 1, len(read) + 1
    return lists_from_rows(rows, pa.array(tokens[places]), len(kept_VT)), variant_W
