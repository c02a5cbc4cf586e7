"""Why a label: which words contributed to it, how it ranked among the groups, and which labelled documents are nearest.

A word's contribution, in nats, is found by leaving it out everywhere in the text:

    contribution = log-odds of the label's score - log-odds without the word

This is the weight of evidence of Robnik-Sikonja and Kononenko (2008), by erasure as in Li et al. (2016, arXiv 1612.08220). It
needs only scores, so it also sees the lexical branch's pairs of words, unlike gradient x input. Its limit: of two words with
the same meaning, neither is missed. A word is a run of characters without white space, without the punctuation around it, in
any case. Its tokens are taken out of the token list, so what truncation has cut off stays cut off. With fields, a word of
the title and the same word of the body are two.

Letters: B documents, C characters, F features, G groups, M places in a group, T tokens, V variants of the text, W words and
two rows besides.
"""

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
import torch.nn.functional as F
from torch import Tensor

from xmc_ray import storage
from xmc_ray.bundle.content import Bundle
from xmc_ray.bundle.ensemble import Ensemble
from xmc_ray.bundle.explanation import Explanation, Neighbour, Path, Word, bare
from xmc_ray.bundle.members import calibration_warning
from xmc_ray.data.documents import DocumentsConfig
from xmc_ray.data.fields import MARK, join, readable
from xmc_ray.data.labels import IntArray, lists_from_rows, unique_in_rows
from xmc_ray.data.reader import read_rows
from xmc_ray.errors import ConfigError
from xmc_ray.model.predict import PredictConfig, computed_by, features, margins
from xmc_ray.settings import PositiveInt, Settings

_OTHERS = 5  # labels of the group

Documents = Iterable[tuple[pa.Array, pa.ListArray]]
"""Chunks of labelled documents: texts, string[D], and labels, list<string>[D]."""


@dataclass(frozen=True, kw_only=True)
class ExplainConfig(Settings):
    """Explain why a text gets a label, or why it does not."""

    bundle: storage.Address | list[storage.Address]
    """Bundle folder, local or s3://, or a list of them whose scores are averaged."""
    text: str | None = None
    """The text to explain."""
    fields: dict[str, str] | None = None
    """The text to explain, field by field, for a bundle that reads fields."""
    label: str
    """The label that the text gets, or might have got."""
    documents: DocumentsConfig | None = None
    """Labelled documents, such as the training split; the nearest ones that have the label are shown."""
    nearest: PositiveInt = 3
    """How many of them are shown."""

    def check(self) -> None:
        """Raises ConfigError unless there is a text, in one way."""
        if (self.text is None) == (self.fields is None):
            found = "neither" if self.text is None else "both"
            raise ConfigError(
                "nothing to explain, or two texts", found=found, expected="text, or fields for a bundle with fields"
            )


def print_explanation(config: ExplainConfig) -> Explanation:
    """Explain, print and return. Raises ConfigError for an unknown label, with suggestions, and for fields that do not fit.

    ``documents`` are streamed; rows that cannot be read are left out.
    """
    documents, ensemble = None, Ensemble.load(config.bundle)
    text = _text_of(config, ensemble.fields)
    if config.documents is not None:
        rows = read_rows(config.documents.with_fields(ensemble.fields), labelled=True, max_reject_share=1)
        documents = ((table["text"].combine_chunks(), table["labels"].combine_chunks()) for table in rows)
    explanation = explain(ensemble, text, config.label, PredictConfig(), documents, config.nearest)
    print(explanation)
    return explanation


def _text_of(config: ExplainConfig, names: Sequence[str]) -> str:
    """The text as a bundle with fields of these ``names``, or with none, reads it."""
    given = config.fields or {}
    if bool(names) != bool(given) or not set(given) <= set(names):
        found = ", ".join(given) or "text"
        raise ConfigError(
            "the bundle does not read this", found=found, expected=f"fields: {', '.join(names)}" if names else "text"
        )
    if not names:
        return str(config.text)
    return str(join([pa.array([given.get(name)], pa.string()) for name in names])[0])


def explain(
    ensemble: Ensemble,
    text: str,
    label: str,
    config: PredictConfig,
    documents: Documents | None = None,
    nearest: int = 3,
) -> Explanation:
    """Why ``text`` gets its score for ``label``, with the ``nearest`` of those ``documents`` that have the label.

    Texts of an ensemble with fields are as `fields.join` makes them.
    Raises ConfigError for an unknown label, with suggestions.
    """
    label_id = ensemble.labels.find(label)
    texts = text.split(MARK, len(ensemble.fields) - 1) if ensemble.fields else [text]
    forms, times, word_C, field_W = words_of(texts)
    names: Sequence[str | None] = ensemble.fields or [None]
    paths, odds, is_read, queries, notes = [], [], [], [], list[str]()
    for bundle in ensemble.bundles:
        variants, variant_W = without_each_word(bundle, text, word_C, len(forms))
        features_VF = features(bundle.model, variants, config)
        on_device_VF = features_VF.to(bundle.model.recall.weight.device)
        likelihood_L, likelihood_V = torch.ones(len(bundle.labels)), None
        if (ranker := bundle.model.linear) is not None:
            first = _first(bundle, on_device_VF[:1], ranker.candidates)
            behind = float(ranker.likelihood(torch.tensor(-math.inf)))  # as prediction has it for all labels but the first
            likelihood_L.fill_(behind)
            likelihood_L[first] = ranker.likelihood(margins(bundle.model, variants[:1], first[None]))[0]
            likelihood_V, is_behind = torch.full((len(variants),), behind), label_id not in first
            if not is_behind:
                this_V1 = np.full((len(variants), 1), label_id)
                likelihood_V = ranker.likelihood(margins(bundle.model, variants, this_V1))[:, 0]
            likelihood_V = likelihood_V.to(on_device_VF.device)
            reordered = f"the linear ranker reorders the first {ranker.candidates} labels, and this is none of them"
            notes += [reordered] if is_behind and reordered not in notes else []
        paths.append(_path(bundle, on_device_VF[:1], label_id, likelihood_L))
        odds.append(bundle.model.log_odds(on_device_VF, label_id, likelihood_V).cpu()[variant_W])
        is_read.append(variant_W[1:-1] > 0)
        queries.append(features_VF[0])
    odds_W = torch.stack(odds).mean(0)
    disabled = bool(odds_W[0].isneginf())
    columns = forms, times, (odds_W[0] - odds_W[1:-1]).tolist(), np.any(is_read, axis=0), field_W
    words = tuple(
        Word(form, count, value if read else None, names[number])
        for form, count, value, read, number in zip(*columns, strict=True)
    )
    query_F = _joint_features(queries)
    return Explanation(
        text="\n".join(texts),
        fields=dict(zip(ensemble.fields, texts, strict=False)),
        label=label,
        name=ensemble.labels.names[label_id].as_py(),
        score=float(np.mean([path.score for path in paths])),
        chance=_chance(ensemble, paths),
        n_labels=len(ensemble.labels),
        log_odds=float(odds_W[0]),
        without_words=float(odds_W[-1]),
        words=() if disabled else words,
        paths=tuple(paths),
        notes=(*_notes(paths, words, disabled), *notes, *_calibration_note(ensemble, config)),
        neighbours=_nearest(ensemble, query_F, label, config, documents or (), nearest),
    )


# -- words ---------------------------------------------------------------------------------------------------------------


def words_of(texts: Sequence[str]) -> tuple[list[str], list[int], IntArray, list[int]]:
    """The distinct words of each of some ``texts``, one or those of fields, as they occur first, and how often each occurs.

    Also the word of each character (int64[C]) of the texts with a character between any two, -1 between words, and the text
    that each word is in.
    """
    word_C, numbers = np.full(sum(map(len, texts)) + len(texts) - 1, -1, np.int64), dict[tuple[int, str], int]()
    forms, times, start = list[str](), list[int](), 0
    for place, text in enumerate(texts):
        for match in re.finditer(r"\S+", text):
            form = bare(match.group())
            number = numbers.setdefault((place, form.casefold()), len(numbers))
            if number == len(forms):
                forms.append(form)
                times.append(0)
            times[number] += 1
            word_C[start + match.start() : start + match.end()] = number
        start += len(text) + 1
    return forms, times, word_C, [place for place, _ in numbers]


def without_each_word(bundle: Bundle, text: str, word_C: IntArray, n_words: int) -> tuple[pa.ListArray, IntArray]:
    """Tokens (list<int32>[V]) of the text, of the text without each word that has a token, and of the text without all words.

    Also int64[W]: the variant of the text as it is, of the text without each word, and without all words. It is 0 for a word
    without tokens, since leaving it out changes nothing; so a long text has no more variants than tokens.
    """
    tokens = np.array(bundle.tokenizer.encode(pa.array([text]))[0][0].as_py(), np.int32)
    first_T, end_T = bundle.tokenizer.offsets(text).T
    # by a token's last character: some tokenizers count the space before a word as part of its first token
    word_T = np.full(len(tokens), -1)
    word_T[end_T > first_T] = word_C[end_T[end_T > first_T] - 1]
    read = np.unique(word_T[word_T >= 0])
    kept_VT = np.concatenate([np.full((1, len(tokens)), True), word_T != read[:, None], word_T[None] < 0])
    rows, kept = np.nonzero(kept_VT)
    variant_W = np.zeros(n_words + 2, np.int64)
    variant_W[1 + read], variant_W[-1] = np.arange(len(read)) + 1, len(read) + 1
    return lists_from_rows(rows, pa.array(tokens[kept]), len(kept_VT)), variant_W


# -- scores --------------------------------------------------------------------------------------------------------------


def _first(bundle: Bundle, features_1F: Tensor, count: int) -> IntArray:
    """int64[C]: the labels that score highest without the linear ranker, which reorders them."""
    recall_1G, rank_1GM = bundle.model.probabilities(features_1F)
    score_GM = recall_1G[0].cpu()[:, None] * (1 if rank_1GM is None else rank_1GM[0].cpu())
    members = torch.from_numpy(bundle.groups.label_GM)
    label_GM = F.pad(members, (0, score_GM.shape[1] - members.shape[1]), value=-1)
    best = score_GM.masked_fill(label_GM < 0, -1).flatten().topk(min(count, len(bundle.labels))).indices
    return np.asarray(label_GM.flatten()[best])


def _path(bundle: Bundle, features_1F: Tensor, label: int, likelihood_L: Tensor) -> Path:
    model, group, slot = bundle.model, int(bundle.groups.group_L[label]), int(bundle.groups.slot_L[label])
    recall_1G, rank_1GM = model.probabilities(features_1F)
    recall_G, linear = recall_1G[0].cpu(), float(likelihood_L[label])
    recall, group_rank = float(recall_G[group]), _rank(recall_G, group)
    if rank_1GM is None:
        score_G = recall_G * likelihood_L[bundle.groups.label_GM[:, 0]]
        score, rank = float(score_G[group]), _rank(score_G, group)
        return Path(bundle.fingerprint, score, rank, recall, group, group_rank, len(recall_G), linear)
    rank_GM = rank_1GM[0].cpu()
    members = bundle.groups.label_GM[group]
    label_GM = F.pad(torch.from_numpy(bundle.groups.label_GM), (0, rank_GM.shape[1] - len(members)), value=-1)
    score_GM = rank_GM * recall_G[:, None] * likelihood_L[label_GM]
    best = [int(place) for place in score_GM[group].argsort(descending=True) if place != slot and score_GM[group, place] > 0]
    return Path(
        bundle.fingerprint,
        float(score_GM[group, slot]),
        _rank(score_GM.flatten(), group * score_GM.shape[1] + slot),
        recall,
        group,
        group_rank,
        model.shortlist,
        linear,
        float(rank_GM[group, slot]),
        _rank(rank_GM[group], slot),
        tuple((bundle.labels.labels[members[place]].as_py(), float(score_GM[group, place])) for place in best[:_OTHERS]),
    )


def _rank(scores: Tensor, place: int) -> int:
    return int((scores > scores[place]).sum()) + 1


def _chance(ensemble: Ensemble, paths: Sequence[Path]) -> float | None:
    """The mean of the calibrated scores, as in `Ensemble.predict`; None if a model has no calibration."""
    calibrations = [bundle.calibration for bundle in ensemble.bundles if bundle.calibration is not None]
    if len(calibrations) < len(paths):
        return None
    scores = [np.array([path.score], np.float32) for path in paths]
    listed = [np.where(score > 0, 0, -1) for score in scores]  # a label with a score of 0 is not predicted: its chance is 0
    return float(np.mean([part.calibrated(*one) for part, *one in zip(calibrations, scores, listed, strict=True)]))


def _notes(paths: Sequence[Path], words: Sequence[Word], disabled: bool) -> list[str]:
    unread = sum(word.contribution is None for word in words)
    not_shortlisted = any(path.group_rank > path.shortlist for path in paths)
    notes = {
        "the label is deprecated: it is never predicted": disabled,
        "the text has no words": not words,
        f"{unread} words were cut off or have no token: the model has not read them": unread,
        "recall does not shortlist the label's group: only exact scoring finds the label": not_shortlisted,
        "the score is below 0.5": not disabled and np.mean([path.score for path in paths]) < 0.5,
    }
    return [note for note, holds in notes.items() if holds]


def _calibration_note(ensemble: Ensemble, config: PredictConfig) -> list[str]:
    calibrations = [bundle.calibration for bundle in ensemble.bundles if bundle.calibration is not None]
    if len(calibrations) < len(ensemble.bundles):
        return []
    found = [computed_by(bundle.model, config.precision) for bundle in ensemble.bundles]
    note = calibration_warning([calibration.arithmetic for calibration in calibrations], found)
    return [note] if note else []


# -- nearest documents ---------------------------------------------------------------------------------------------------


def _joint_features(parts: Sequence[Tensor]) -> Tensor:
    """The models' features of documents, concatenated so that a dot product is the mean of the models' cosines."""
    return torch.cat([F.normalize(part, dim=-1) / len(parts) ** 0.5 for part in parts], dim=-1)


def _nearest(
    ensemble: Ensemble, query_F: Tensor, label: str, config: PredictConfig, documents: Documents, count: int
) -> tuple[Neighbour, ...]:
    """A running top ``count`` over the chunks of documents."""
    nearest: list[Neighbour] = []
    for texts, lists in documents:
        lists = unique_in_rows(lists)
        texts = texts.take(pc.list_parent_indices(lists).filter(pc.equal(pc.list_flatten(lists), label)))
        if len(texts):
            parts = [features(bundle.model, bundle.tokenizer.encode(texts)[0], config) for bundle in ensemble.bundles]
            similarity_D = _joint_features(parts) @ query_F
            nearest += map(Neighbour, (readable(texts) if ensemble.fields else texts).to_pylist(), similarity_D.tolist())
            nearest = sorted(nearest, key=lambda near: -near.similarity)[:count]
    return tuple(nearest)
