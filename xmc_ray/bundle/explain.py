"""Why a label: which words carried it, how it fared among the groups, and which labelled documents are nearest.

What a word is worth is found by leaving it out (`erasure`). Of several models, contributions and scores are means.

Letters: F features, G groups, M places in a group, V variants of the text, W words and two rows besides.

----
What a word is worth to a label: what its odds lose when the word is left out, everywhere in the text.

    contribution = log-odds of the label's score - log-odds without the word

in nats: the weight of evidence of Robnik-Sikonja and Kononenko (2008), by erasure as in Li et al. (2016, arXiv 1612.08220).
It asks of a model nothing but scores, so that it is the same for a transformer, the lexical branch and both; gradient x input
would be blind to pairs of words, which the branch hashes. Its limit: of two words that say the same, either can be missed.

A word is what stands between white space, without the punctuation around it. Its tokens are taken out of the token list: of
a text that is too long, what has been cut off stays so.

Letters: B documents, C characters, F features, T tokens, V variants of the text, W words and two rows besides.
"""

import re
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import torch
import torch.nn.functional as F
from torch import Tensor

from xmc_ray.bundle.ensemble import Ensemble
from xmc_ray.bundle.folder import Bundle
from xmc_ray.data.documents import DocumentsConfig
from xmc_ray.data.labels import IntArray, lists_from_rows, unique_in_rows
from xmc_ray.data.reader import read_rows
from xmc_ray.errors import ConfigError, printable
from xmc_ray.model.lightxml import LightXML
from xmc_ray.model.predict import PredictConfig, features

_SHOWN, _OTHERS, _WIDTH, _BAR = 12, 5, 100, 24  # words, labels of the group, columns of text, columns of the longest bar
Documents = Iterable[tuple[pa.Array, pa.ListArray]]
_AROUND = ".,:;!?()[]{}<>\"'`“”‘’«»…"


"""Chunks of labelled documents: texts, string[D], and labels, list<string>[D]."""


@dataclass(frozen=True, kw_only=True)
class ExplainConfig:
    """Explain why a text gets a label, or why it does not."""

    bundle: str | list[str]
    """The model: a bundle's folder, local or s3://; or a list of them, whose scores are averaged."""
    text: str
    """The text."""
    label: str
    """The label."""
    documents: DocumentsConfig | None = None
    """Labelled documents, such as the training split; the nearest ones that have the label are shown."""
    nearest: int = 3
    """How many are shown."""

    def __post_init__(self) -> None:
        if self.nearest < 1:
            raise ConfigError("nearest does not fit", found=self.nearest, expected="at least 1")


class Word(NamedTuple):
    """A word, how often the text has it, and its contribution; None where the model has not read that far."""

    word: str
    times: int
    contribution: float | None


@dataclass(frozen=True)
class Path:
    """How the label fared in one model. Ranks count from 1; ``others`` are the best other labels of the group, with scores.

    ``score`` = ``recall`` x ``rank_score``; in flat mode ``recall`` is the score, and the last three say nothing.
    """

    bundle: str
    score: float
    rank: int
    recall: float
    group: int
    group_rank: int
    shortlist: int
    rank_score: float | None = None
    rank_in_group: int | None = None
    others: tuple[tuple[str, float], ...] = ()


class Neighbour(NamedTuple):
    """A document with the label, and the cosine between its features and the text's."""

    text: str
    similarity: float


@dataclass(frozen=True)
class Explanation:
    """``words``: in the text's order. ``log_odds``: of the score, mean over the models; ``without_words``: of nothing read.

    ``score`` is the models' own; ``chance`` is what a tag has in its place, where all models are calibrated.

    ``notes``: what keeps the label from being predicted, or the words from being told. ``str()`` is fit for a terminal.
    """

    text: str
    label: str
    name: str | None
    score: float
    chance: float | None
    n_labels: int
    log_odds: float
    without_words: float
    words: tuple[Word, ...]
    paths: tuple[Path, ...]
    notes: tuple[str, ...]
    neighbours: tuple[Neighbour, ...] = ()

    def __str__(self) -> str:
        title = self.label if self.name in (None, self.label) else f"{self.label} ({self.name})"
        odds = f"log-odds {self.log_odds:+.2f}, without any word {self.without_words:+.2f}"
        chance = "" if self.chance is None else f", as a tag {self.chance:.4f}"
        parts = [[f"{title}: score {self.score:.4f}{chance}, {odds}", *(f"note: {note}" for note in self.notes)]]
        parts += [[line for path in self.paths for line in _told(path, self.n_labels)], self._words(), self._neighbours()]
        return "\n\n".join("\n".join(map(_line, part)) for part in parts if part)

    def _words(self) -> list[str]:
        read = [(word, word.contribution) for word in self.words if word.contribution is not None]
        read.sort(key=lambda pair: -abs(pair[1]))
        shown, rest = read[:_SHOWN], read[_SHOWN:]
        if not shown:
            return []
        longest = max(abs(shown[0][1]), 1e-9)
        lines = ["what the log-odds lose when a word is left out:"]
        for word, worth in sorted(shown, key=lambda pair: -pair[1]):
            bar = ("█" if worth > 0 else "░") * max(1, round(_BAR * abs(worth) / longest))
            lines.append(f"{worth:+8.2f} {bar:{_BAR}} {word.word}" + (f" ×{word.times}" if word.times > 1 else ""))
        if rest:
            lines.append(f"{sum(worth for _, worth in rest):+8.2f} by {len(rest)} further words, added up")
        signs = {word.word.casefold(): f"{worth:+.1f}"[0] for word, worth in shown}
        marked = [f"[{signs[key]}{form}]" if (key := bare(form).casefold()) in signs else form for form in self.text.split()]
        return [*lines, "", *textwrap.wrap(" ".join(marked), _WIDTH)]

    def _neighbours(self) -> list[str]:
        if not self.neighbours:
            return []
        texts = [f"{near.similarity:8.3f} {textwrap.shorten(near.text, _WIDTH - 9)}" for near in self.neighbours]
        return ["nearest documents with this label, by the cosine of their features:", *texts]


def run(config: ExplainConfig) -> Explanation:
    """Explain, print and return. Raises ConfigError for a label that the bundle does not know, naming those spelt most like it.

    Of ``documents``, those are read as they come that have the label, whatever their number; rows that do not fit are left out.
    """
    documents = None
    if config.documents is not None:
        rows = read_rows(config.documents, labelled=True)
        documents = ((table["text"].combine_chunks(), table["labels"].combine_chunks()) for table in rows)
    ensemble = Ensemble.load(config.bundle)
    explanation = explain(ensemble, config.text, config.label, PredictConfig(), documents, config.nearest)
    print(explanation)
    return explanation


def explain(
    ensemble: Ensemble,
    text: str,
    label: str,
    config: PredictConfig,
    documents: Documents | None = None,
    nearest: int = 3,
) -> Explanation:
    """Why ``text`` gets the score that it gets for ``label``; with the ``nearest`` of ``documents`` that have the label.

    Raises ConfigError for a label that is not known, naming those spelt most like it.
    """
    label_id = ensemble.labels.find(label)
    forms, word_C = words_of(text)
    paths, odds, reads, queries = [], [], [], []
    for bundle in ensemble.bundles:
        variants, variant_W = without_each_word(bundle, text, word_C, len(forms))
        features_VF = features(bundle.model, variants, config)
        paths.append(_path(bundle, features_VF[:1], label_id))
        odds.append(log_odds(bundle.model, features_VF, label_id)[variant_W])
        reads.append(variant_W[1:-1] > 0)
        queries.append(features_VF[0])
    odds_W = torch.stack(odds).mean(0)
    worth = (odds_W[0] - odds_W[1:-1]).tolist()
    is_read = np.any(reads, axis=0)
    hidden = bool(odds_W[0].isneginf())
    counts = np.bincount(word_C[starts(word_C)], minlength=len(forms)).tolist() if forms else []
    words = tuple(
        Word(form, count, value if read else None)
        for form, count, value, read in zip(forms, counts, worth, is_read, strict=True)
    )
    explanation = Explanation(
        text=text,
        label=label,
        name=ensemble.labels.names[label_id].as_py(),
        score=float(np.mean([path.score for path in paths])),
        chance=_chance(ensemble, paths),
        n_labels=len(ensemble.labels),
        log_odds=float(odds_W[0]),
        without_words=float(odds_W[-1]),
        words=() if hidden else words,
        paths=tuple(paths),
        notes=tuple(_notes(ensemble, paths, words, hidden)),
    )
    if documents is None:
        return explanation
    return replace(explanation, neighbours=_nearest(ensemble, _side_by_side(queries), label, config, documents, nearest))


def _chance(ensemble: Ensemble, paths: Sequence[Path]) -> float | None:
    """The mean of the calibrated scores, as `Ensemble.predict` takes it; None where a model has no calibration."""
    calibrations = [bundle.calibration for bundle in ensemble.bundles if bundle.calibration is not None]
    if len(calibrations) < len(paths):
        return None
    scores = [np.array([path.score], np.float32) for path in paths]
    listed = [np.where(score > 0, 0, -1) for score in scores]  # a score of 0 is no tag, and its chance is 0
    return float(np.mean([part.calibrated(*one) for part, *one in zip(calibrations, scores, listed, strict=True)]))


def _path(bundle: Bundle, features_1F: Tensor, label: int) -> Path:
    model, group = bundle.model, int(bundle.groups.group_L[label])
    with torch.no_grad():
        features_1F = features_1F.to(model.recall.weight.device)
        recall_G = model.recall.logits(features_1F)[0].float().sigmoid().cpu()
        recall, group_rank = float(recall_G[group]), _rank(recall_G, group)
        if model.table is None or model.bottleneck is None:
            return Path(bundle.fingerprint, recall, group_rank, recall, group, group_rank, len(recall_G))
        all_1G = torch.arange(len(recall_G), device=features_1F.device)[None]
        rank_GM = model.table.predict(model.bottleneck(features_1F), all_1G)[0].cpu()
    slot, score_GM = int(bundle.groups.slot_L[label]), rank_GM * recall_G[:, None]
    members = bundle.groups.label_GM[group]
    best = [int(place) for place in score_GM[group].argsort(descending=True) if place != slot and score_GM[group, place] > 0]
    return Path(
        bundle.fingerprint,
        float(score_GM[group, slot]),
        _rank(score_GM.flatten(), group * score_GM.shape[1] + slot),
        recall,
        group,
        group_rank,
        model.shortlist,
        float(rank_GM[group, slot]),
        _rank(rank_GM[group], slot),
        tuple((bundle.labels.labels[members[place]].as_py(), float(score_GM[group, place])) for place in best[:_OTHERS]),
    )


def _rank(scores: Tensor, place: int) -> int:
    return int((scores > scores[place]).sum()) + 1


def _line(text: str) -> str:
    """One line that a terminal shows and does not obey, whatever documents and labels have brought into it."""
    return printable(" ".join(text.splitlines()))


def _told(path: Path, n_labels: int) -> list[str]:
    bundle, place = f"bundle {path.bundle or '(not saved)'}: ", f"rank {path.rank:,} of {n_labels:,} labels"
    if path.rank_score is None:
        return [f"{bundle}score {path.score:.4f}, {place}; flat: the label has no group"]
    others = ", ".join(f"{label} {score:.3f}" for label, score in path.others) or "none"
    return [
        f"{bundle}score {path.score:.4f} = recall {path.recall:.4f} x rank {path.rank_score:.4f}, {place}",
        f"    recall: group {path.group} has rank {path.group_rank:,}, of which the first {path.shortlist:,} are shortlisted",
        f"    rank: {path.rank_in_group} in the group; others there: {others}",
    ]


def _notes(ensemble: Ensemble, paths: Sequence[Path], words: Sequence[Word], hidden: bool) -> list[str]:
    unread = sum(word.contribution is None for word in words)
    missed = [path for path in paths if path.group_rank > path.shortlist]
    return [
        note
        for note, holds in {
            "the label is deprecated: it is never predicted": hidden,
            "the text has no words": not words,
            f"{unread} words were cut off or give no token: the model has not read them": unread,
            "recall does not shortlist the label's group, so that the label is only found by exact scoring": missed,
            "the score is below 0.5": not hidden and np.mean([path.score for path in paths]) < 0.5,
        }.items()
        if holds
    ]


def _side_by_side(parts: Sequence[Tensor]) -> Tensor:
    """The models' features of a document, scaled so that the product of two such rows is the mean of the models' cosines."""
    return torch.cat([F.normalize(part, dim=-1) / len(parts) ** 0.5 for part in parts], dim=-1)


def _nearest(
    ensemble: Ensemble, query_F: Tensor, label: str, config: PredictConfig, documents: Documents, count: int
) -> tuple[Neighbour, ...]:
    """The best of each chunk compete with the best of those before."""
    found: list[Neighbour] = []
    for texts, lists in documents:
        lists = unique_in_rows(lists)
        texts = texts.take(pc.list_parent_indices(lists).filter(pc.equal(pc.list_flatten(lists), label)))
        if len(texts):
            parts = [features(bundle.model, bundle.tokenizer.encode(texts)[0], config) for bundle in ensemble.bundles]
            near_D = _side_by_side(parts) @ query_F
            found += map(Neighbour, texts.to_pylist(), near_D.tolist())
            found = sorted(found, key=lambda near: -near.similarity)[:count]
    return tuple(found)


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
