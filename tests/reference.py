"""Slow, obvious twins of everything fast in ``xmc_ray``: plain loops over documents and labels, to hold the fast code to.

Metrics
- ``metrics_of``: every metric of a list of documents, in total or for one band.
"""

import json
from collections.abc import Collection, Sequence
from itertools import pairwise
from math import log2
from typing import Any

import torch
from torch import Tensor


def metrics_of(
    predicted: Sequence[Sequence[int]],
    truth: Sequence[Collection[int]],
    inside: Collection[int],
    propensity: Sequence[float],
    k: int,
) -> dict[str, float | None]:
    """P, R, nDCG, PSP, PSnDCG and coverage at ``k``, with the truth restricted to the labels ``inside``."""
    documents = [(row, [label for label in true if label in inside]) for row, true in zip(predicted, truth, strict=True)]
    documents = [(row[:k], true) for row, true in documents if true]
    if not documents:
        return dict.fromkeys(("P", "R", "nDCG", "PSP", "PSnDCG", "coverage"))
    precision = recall = ndcg = psp = best_psp = psndcg = best_psndcg = 0.0
    covered: set[int] = set()
    for row, true in documents:
        best_first = sorted(true, key=lambda label: propensity[label])[:k]
        norm = sum(1 / log2(rank + 2) for rank in range(len(best_first)))
        for rank, label in enumerate(row):
            if label in true:
                covered.add(label)
                precision += 1 / k
                recall += 1 / len(true)
                ndcg += 1 / log2(rank + 2) / norm
                psp += 1 / propensity[label]
                psndcg += 1 / propensity[label] / log2(rank + 2) / norm
        for rank, label in enumerate(best_first):
            best_psp += 1 / propensity[label]
            best_psndcg += 1 / propensity[label] / log2(rank + 2) / norm
    return {
        "P": precision / len(documents),
        "R": recall / len(documents),
        "nDCG": ndcg / len(documents),
        "PSP": psp / best_psp,
        "PSnDCG": psndcg / best_psndcg,
        "coverage": len(covered) / len({label for _, true in documents for label in true}),
    }


# -- ranking and model ---------------------------------------------------------------------------------------------------


def candidate_groups(recall: list[list[float]], k: int, group_of: list[int], truth: list[list[int]]) -> list[list[int]]:
    """For each document the ``k`` groups with the highest recall score and the groups of its true labels, each once."""
    chosen = []
    for scores, labels in zip(recall, truth, strict=True):
        best = sorted(range(len(scores)), key=lambda group: -scores[group])[:k]
        chosen.append(sorted({*best, *(group_of[label] for label in labels)}))
    return chosen


def losses(model: Any, batch: Any, truth: list[list[int]]) -> tuple[Tensor, Tensor]:
    """Recall and ranking loss, one binary cross-entropy at a time: summed over outputs, averaged over documents."""
    features = model.encoder(batch.tokens_BT, batch.mask_BT)
    recall = model.recall(features)
    group_of = model.group_L.tolist()
    recall_loss, rank_loss = torch.zeros(()), torch.zeros(())
    for row, labels in enumerate(truth):
        true_groups = {group_of[label] for label in labels}
        for group in range(recall.shape[1]):
            recall_loss = recall_loss + _cross_entropy(recall[row, group], group in true_groups)
    if model.table is not None:
        chosen = candidate_groups(recall.tolist(), model.shortlist, group_of, truth)
        for row, groups in enumerate(chosen):
            for label in (label for label, group in enumerate(group_of) if group in groups):
                logit = _label_logit(model, features[row], label)
                rank_loss = rank_loss + _cross_entropy(logit, label in truth[row])
    return recall_loss / len(truth), rank_loss / len(truth)


def predictions(model: Any, batch: Any, k: int) -> list[tuple[list[float], list[int]]]:
    """For each document the ``k`` best (scores, labels) by sigmoid(rank) * sigmoid(recall of the group), 0 and -1 as pads."""
    features = model.encoder(batch.tokens_BT, batch.mask_BT)
    recall = model.recall(features).sigmoid()
    group_of, results = model.group_L.tolist(), []
    for row in range(len(features)):
        best = sorted(range(recall.shape[1]), key=lambda group: -recall[row, group].item())
        groups = set(best if model.table is None else best[: model.shortlist])
        scored = []
        for label, group in enumerate(group_of):
            if group in groups:
                rank = 1.0 if model.table is None else _label_logit(model, features[row], label).sigmoid().item()
                scored.append((rank * recall[row, group].item(), label))
        scored = sorted(scored, reverse=True)[:k]
        scored += [(0.0, -1)] * (k - len(scored))
        results.append(([score for score, _ in scored], [label for _, label in scored]))
    return results


def mean_scores(listed: Sequence[Sequence[dict[int, float]]], k: int) -> list[list[tuple[int, float]]]:
    """For each document the ``k`` best (label, mean score) of several models' {label: score}; what is not listed counts 0."""
    results = []
    for of_models in zip(*listed, strict=True):
        totals: dict[int, float] = {}
        for scores in of_models:
            for label, score in scores.items():
                totals[label] = totals.get(label, 0.0) + score
        best = sorted(totals, key=lambda label: -totals[label])[:k]
        results.append([(label, totals[label] / len(of_models)) for label in best])
    return results


def _label_logit(model: Any, features: Tensor, label: int) -> Tensor:
    place = int(model.table.group_L[label]), int(model.table.slot_L[label])
    logit: Tensor = model.bottleneck(features) @ model.table.weight_GMH[place] + model.table.bias_GM[place]
    return logit


def _cross_entropy(logit: Tensor, is_true: bool) -> Tensor:
    probability = logit.double().sigmoid()
    return -torch.log(probability if is_true else 1 - probability).float()


# -- groups --------------------------------------------------------------------------------------------------------------


def hashed_counts(rows: list[list[int]], n_features: int) -> list[list[float]]:
    """Counts of tokens and of pairs of neighbours, hashed into columns by multiplication modulo 2**64."""
    table = [[0.0] * n_features for _ in rows]
    for row, tokens in enumerate(rows):
        pairs = [(one * 0x9E3779B97F4A7C15 + other + 1) % 2**64 for one, other in pairwise(tokens)]
        for key in [*tokens, *pairs]:
            table[row][((key * 0xD6E8FEB86659FD93) % 2**64 >> 32) % n_features] += 1
    return table


def label_vectors(features: Sequence[Sequence[float]], labels: list[list[int]], n_labels: int) -> list[list[float]]:
    """PIFA: the sum of the feature vectors of each label's documents, scaled to length one."""
    vectors = []
    for label in range(n_labels):
        total = [0.0] * len(features[0])
        for row, true in zip(features, labels, strict=True):
            if label in true:
                total = [one + float(other) for one, other in zip(total, row, strict=True)]
        length = sum(value * value for value in total) ** 0.5
        vectors.append([value / length if length else 0.0 for value in total])
    return vectors


# -- layouts -------------------------------------------------------------------------------------------------------------


def documents_of_lines(texts: str, labels: str, separator: str | None) -> list[dict[str, Any]]:
    """A row for each line of ``texts``, with the labels in the same line of ``labels``; every line ends with a newline."""
    lines = zip(texts.split("\n")[:-1], labels.split("\n")[:-1], strict=True)
    return [
        {"id": str(number), "text": text.rstrip("\r"), "labels": _labels_of_line(line, separator)}
        for number, (text, line) in enumerate(lines, 1)
    ]


def documents_of_tsv(lines: str, separator: str | None) -> list[dict[str, Any]]:
    """A row for each line of two or three fields."""
    rows = []
    for number, line in enumerate(lines.split("\n")[:-1], 1):
        *identifier, labels, text = line.rstrip("\r").split("\t")
        rows.append({"id": [str(number), *identifier][-1], "text": text, "labels": _labels_of_line(labels, separator)})
    return rows


def documents_of_json(lines: str, names: Sequence[str] | None) -> list[dict[str, Any]]:
    """A row for each line that is not blank; ``names`` are the labels by place."""
    rows = []
    for line in lines.split("\n"):
        if line.strip():
            value = json.loads(line)
            labels = [str(place) if names is None else names[place] for place in value["target_ind"]]
            texts = {"title": value.get("title"), "content": value.get("content")}
            rows.append({"id": str(value["uid"]), **texts, "labels": list(dict.fromkeys(labels))})
    return rows


def _labels_of_line(line: str, separator: str | None) -> list[str]:
    labels = [label.strip() for label in line.split(separator)]
    return list(dict.fromkeys(label for label in labels if label))
