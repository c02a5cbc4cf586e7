"""Slow, obvious twins of everything fast in ``xmc_ray``: plain loops over documents and labels, to hold the fast code to.

Metrics
- ``metrics_of``: every metric of a list of documents, in total or for one band.
"""

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from itertools import pairwise
from math import log, log2, sqrt
from typing import Any, NamedTuple

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


def recall_loss(
    features_BF: Tensor,
    weight_GF: Tensor,
    bias_G: Tensor,
    truth: list[list[int]],
    documents: int,
    counts: Sequence[Mapping[int, float]] | None = None,
) -> Tensor:
    """One binary cross-entropy for each document and group, by autograd; ``truth``: the true groups of each document.

    ``counts``: how much each group of a document counts, by default 1.
    """
    counts = counts or [{}] * len(truth)
    loss = torch.zeros((), dtype=torch.double)
    for features, groups, count in zip(features_BF, truth, counts, strict=True):
        for group, (weight, bias) in enumerate(zip(weight_GF, bias_G, strict=True)):
            loss = loss + count.get(group, 1) * _cross_entropy(features @ weight + bias, group in groups)
    return loss / documents


def rank_loss(
    vectors_BH: Tensor,
    weight_GMH: Tensor,
    bias_GM: Tensor,
    places: list[tuple[int, int]],
    chosen: Sequence[Collection[int]],
    truth: list[list[int]],
    documents: int,
    counts: Sequence[Mapping[int, float]] | None = None,
) -> Tensor:
    """One binary cross-entropy for each document and label of its ``chosen`` groups; ``places``: a label's group and slot.

    ``counts``: how much each label of a document counts, by default 1.
    """
    counts = counts or [{}] * len(truth)
    loss = torch.zeros((), dtype=torch.double)
    for vector, groups, labels, count in zip(vectors_BH, chosen, truth, counts, strict=True):
        for label, place in enumerate(places):
            if place[0] in groups:
                logit = vector @ weight_GMH[place] + bias_GM[place]
                loss = loss + count.get(label, 1) * _cross_entropy(logit, label in labels)
    return loss / documents


def products(
    vectors_BA: Tensor, block_GAC: Tensor, other_nC: Tensor, rows: list[int], groups: list[int]
) -> tuple[Tensor, Tensor]:
    """Each pair's vector times the block of its group [n, C]; and for each group the sum of its pairs' outer products
    [G, A, C], of vectors and ``other_nC``.
    """
    product_nC, outer_GAC = torch.zeros_like(other_nC), torch.zeros_like(block_GAC)
    for pair, (row, group) in enumerate(zip(rows, groups, strict=True)):
        product_nC[pair] = vectors_BA[row] @ block_GAC[group]
        outer_GAC[group] += torch.outer(vectors_BA[row], other_nC[pair])
    return product_nC, outer_GAC


def rows_of(model: Any) -> dict[str, Tensor]:
    """Copies of the output rows of recall head and label table, for autograd."""
    copies = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    return {name: copy.requires_grad_() for name, copy in copies.items() if name.startswith(("recall.", "table."))}


def losses(
    model: Any, rows: dict[str, Tensor], batch: Any, truth: list[list[int]], judged: Sequence[list[int]] | None = None
) -> tuple[Tensor, Tensor]:
    """Recall and ranking loss of a model whose output ``rows`` are plain tensors; averaged over documents.

    Labels that an editor has ``judged`` count ``model.judged_weight`` times, and so do their groups: those of accepted ones,
    and those of rejected ones that have no true label.
    """
    judged, weight = judged or [[]] * len(truth), model.judged_weight
    features_BF = model.encoder(batch.tokens_BT, batch.mask_BT)
    places, group_of = _places(model), model.group_L.tolist()
    true_groups = [[group_of[label] for label in labels] for labels in truth]
    label_counts = [dict.fromkeys(labels, weight) for labels in judged]
    group_counts = [
        {group_of[label]: weight for label in said if label in labels or group_of[label] not in groups}
        for said, labels, groups in zip(judged, truth, true_groups, strict=True)
    ]
    recall = recall_loss(features_BF, rows["recall.weight"], rows["recall.bias"], true_groups, len(truth), group_counts)
    if model.table is None:
        return recall, torch.zeros((), dtype=torch.double)
    scores = (features_BF @ rows["recall.weight"].T + rows["recall.bias"]).tolist()
    needed = [labels + said for labels, said in zip(truth, judged, strict=True)]
    chosen = candidate_groups(scores, model.shortlist, group_of, needed)
    table = model.bottleneck(features_BF), rows["table.weight"], rows["table.bias"]
    return recall, rank_loss(*table, places, chosen, truth, len(truth), label_counts)


def predictions(
    model: Any, batch: Any, k: int, scoring: str = "grouped", allowed: Sequence[set[int]] | None = None
) -> list[tuple[list[float], list[int]]]:
    """For each document the ``k`` best (scores, labels) by sigmoid(rank) * sigmoid(recall of the group), 0 and -1 as pads.

    Out of the labels in the groups with the best recall, or out of all; recall is lifted if the model's is. ``allowed``: the
    labels that each document may get; other groups are as if they were not there.
    """
    features = model.encoder(batch.tokens_BT, batch.mask_BT)
    lift = 0 if model.recall.lift is None else model.recall.lift
    recall = (features @ model.recall.weight.T + model.recall.bias + lift).sigmoid()
    results = []
    for row in range(len(features)):
        may_have = range(len(model.group_L)) if allowed is None else allowed[row]
        open_groups = {int(model.group_L[label]) for label in may_have}
        best = sorted(open_groups, key=lambda group: -recall[row, group].item())
        groups = set(best if model.table is None or scoring == "exact" else best[: model.shortlist])
        scored = []
        for label, (group, slot) in enumerate(_places(model)):
            if group in groups and label in may_have:
                rank = 1.0
                if model.table is not None:
                    logit = model.bottleneck(features[row]) @ model.table.weight[group, slot] + model.table.bias[group, slot]
                    rank = logit.sigmoid().item()
                scored.append((rank * recall[row, group].item(), label))
        scored = sorted(scored, reverse=True)[:k]
        scored += [(0.0, -1)] * (k - len(scored))
        results.append(([score for score, _ in scored], [label for _, label in scored]))
    return results


def lifts(group_of: list[int], counts: list[int], propensity: Sequence[float], strength: float) -> list[float]:
    """Of each group: ``strength`` times the log of how many documents its labels are true for, per document that says so."""
    results = []
    for group in range(max(group_of) + 1):
        members = [label for label, its in enumerate(group_of) if its == group]
        noted = sum(counts[label] + 0.5 for label in members)
        true = sum((counts[label] + 0.5) / propensity[label] for label in members)
        results.append(strength * log(true / noted))
    return results


def mean_scores(
    listed: Sequence[Sequence[dict[int, float]]], k: int, raw: Sequence[Sequence[dict[int, float]]] | None = None
) -> list[list[tuple[int, float]]]:
    """For each document the ``k`` best (label, mean score) of several models' {label: score}; what is not listed counts 0.

    Of equal ones the one with the higher sum of ``raw`` scores comes first, then that with the lower id; but a single model's
    labels stay in its order.
    """

    def totals(of_models: Sequence[dict[int, float]]) -> dict[int, float]:
        labels = dict.fromkeys(label for scores in of_models for label in scores)
        return {label: sum(scores.get(label, 0.0) for scores in of_models) for label in labels}

    results = []
    for of_models, raw_of_models in zip(zip(*listed, strict=True), zip(*(raw or listed), strict=True), strict=True):
        sums, raw_sums = totals(of_models), totals(raw_of_models)
        best = list(sums) if len(of_models) == 1 else sorted(sums, key=lambda label: (-sums[label], -raw_sums[label], label))
        results.append([(label, sums[label] / len(of_models)) for label in best[:k]])
    return results


def _places(model: Any) -> list[tuple[int, int]]:
    group_of = model.group_L.tolist()
    return [(group, group_of[:label].count(group)) for label, group in enumerate(group_of)]


def _cross_entropy(logit: Tensor, is_true: bool) -> Tensor:
    probability = logit.double().sigmoid()
    return -torch.log(probability if is_true else 1 - probability)


# -- optimiser -----------------------------------------------------------------------------------------------------------


def row_adagrad(
    row: list[float],
    bias: float,
    square: float,
    gradient: list[float],
    bias_gradient: float,
    lr: float,
    decay: float,
    power: float,
    by: list[float],
) -> tuple[list[float], float, float]:
    """One step of a touched row, its bias and its accumulator.

    ``power``: mean squared length of the first step's inputs, each of them multiplied ``by`` a number.
    """
    bias_power = min(1.0, 100 * power)
    reach = 25 * lr / (power + bias_power) ** 0.5
    gradient = [value * scale for value, scale in zip(gradient, by, strict=True)]
    square += sum(value * value for value in gradient) + bias_power * bias_gradient * bias_gradient
    rate, kept = reach / (square**0.5 + 1e-10), 1 - lr * decay
    moved = [value * kept - rate * towards * scale for value, towards, scale in zip(row, gradient, by, strict=True)]
    return moved, bias - rate * bias_power * bias_gradient, square


def input_scale(squares: list[float], steady: int) -> list[float]:
    """What each input is multiplied by, from mean squares: the first ``steady`` ones become about equally long, others stay."""
    mean = sum(squares[:steady]) / max(1, steady)
    return [(1.1 * mean / (square + 0.1 * mean)) ** 0.5 if place < steady else 1.0 for place, square in enumerate(squares)]


def vector_adagrad(
    vectors: list[list[float]], squares: list[float], gradients: dict[int, list[float]], lr: float, power: float
) -> None:
    """One step, in place, of the vectors that have a gradient."""
    for place, gradient in gradients.items():
        squares[place] += sum(value * value for value in gradient) / len(gradient)
    mean = sum(squares[place] for place in gradients) / len(gradients)
    for place, gradient in gradients.items():
        rate = lr / (squares[place] ** power * mean ** (0.5 - power) + 1e-10)
        vectors[place] = [value - rate * towards for value, towards in zip(vectors[place], gradient, strict=True)]


# -- groups --------------------------------------------------------------------------------------------------------------


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


def rows_of_lines(text: bytes) -> list[bytes]:
    """The rows of a file of JSON lines: its lines that are not blank."""
    return [line for line in text.split(b"\n") if line.strip()]


def _labels_of_line(line: str, separator: str | None) -> list[str]:
    labels = [label.strip() for label in line.split(separator)]
    return list(dict.fromkeys(label for label in labels if label))


class Joined(NamedTuple):
    same: list[int]
    same_before: list[int]
    first_of: dict[int, int]


def joined(now: list[tuple[int, int]], before: list[tuple[int, int]]) -> Joined:
    """Two nights of (id, text), row by row: unchanged rows of each, and the first row of each repeated id."""
    first: dict[int, int] = {}
    first_of, same, same_before = {}, [], []
    for row, (identifier, text) in enumerate(now):
        if identifier in first:
            first_of[row] = first[identifier]
            continue
        first[identifier] = row
        if (identifier, text) in before:
            same.append(row)
            same_before.append(before.index((identifier, text)))
    return Joined(same, sorted(same_before), first_of)


# -- lexical branch ------------------------------------------------------------------------------------------------------


def terms(rows: list[list[int]], columns: int) -> dict[tuple[int, int], int]:
    """How often each column occurs in each document: its tokens and its pairs of neighbours."""
    counts: dict[tuple[int, int], int] = {}
    for row, tokens in enumerate(rows):
        singles = [token + 1 for token in tokens]
        for term in [*singles, *(one * 0x14057B7EF767814F + other for one, other in pairwise(singles))]:
            place = row, (term * 0x5851F42D4C957F2D >> 32 & 0xFFFFFFFF) % columns
            counts[place] = counts.get(place, 0) + 1
    return counts


def weighted_terms(rows: list[list[tuple[int, int]]], weights: Sequence[float], columns: int) -> dict[tuple[int, int], float]:
    """`terms` of documents of (field, id) tokens: each field by itself, an occurrence as heavy as its field."""
    counts: dict[tuple[int, int], float] = {}
    for row, tokens in enumerate(rows):
        for field, weight in enumerate(weights):
            own = [token for number, token in tokens if number == field]
            for (_, column), count in terms([own], columns).items():
                counts[row, column] = counts.get((row, column), 0.0) + weight * count
    return counts


def term_weights(rows: list[list[int]], columns: int, rarest: int) -> list[float]:
    """The inverse document frequency of each column, 0 where too few documents have it."""
    frequency = [sum(column == found for _, found in terms(rows, columns)) for column in range(columns)]
    return [1 + log((1 + len(rows)) / (1 + found)) if found >= rarest else 0.0 for found in frequency]


def lexical_features(
    rows: list[list[int]], weights: Sequence[float], vectors_FH: Tensor, mix_HH: Tensor, bias_H: Tensor
) -> Tensor:
    """float32[B, H]: one document and one term at a time."""
    features = []
    for row in range(len(rows)):
        own = {
            column: (1 + log(n)) * weights[column] for (place, column), n in terms(rows, len(weights)).items() if place == row
        }
        length = sqrt(sum(weight**2 for weight in own.values())) or 1.0
        x_H = sum((weight / length * vectors_FH[column] for column, weight in own.items()), torch.zeros(vectors_FH.shape[1]))
        features.append(x_H + (mix_HH @ x_H.relu() + bias_H).relu())
    return torch.stack(features)


# -- explaining and extending --------------------------------------------------------------------------------------------


def contributions(words: list[str], around: str, score: Callable[[str], float]) -> dict[str, tuple[int, float]]:
    """How often each word occurs and what it adds to the log-odds: the text is scored again without it, word by word."""

    def log_odds(kept: list[str]) -> float:
        probability = score(" ".join(kept))
        return log(probability / (1 - probability))

    bare = [(word.strip(around) or word).casefold() for word in words]
    found = {}
    for form in dict.fromkeys(bare):
        kept = [word for word, its_form in zip(words, bare, strict=True) if its_form != form]
        found[form] = bare.count(form), log_odds(words) - log_odds(kept)
    return found


def cosines(rows: list[list[float]]) -> list[float]:
    """Of the first row with each of the others."""
    first, *others = rows
    length = sqrt(sum(x * x for x in first))
    return [
        sum(x * y for x, y in zip(first, other, strict=True)) / (length * sqrt(sum(y * y for y in other))) for other in others
    ]


def regression_loss(
    x_DF: Tensor, y_D: list[int], used_D: list[bool], population: int, penalty: float, row_F: Tensor, bias: Tensor
) -> Tensor:
    """What a row from documents minimises, document by document; the last document is the one that says nothing."""
    documents = [(x_F, y, used) for x_F, y, used in zip(x_DF, y_D, used_D, strict=True)]
    documents.append((torch.zeros_like(row_F), 0, True))
    positives = sum(y_D)
    rarity = max(1.0, (population - positives + 1) / (len(documents) - positives))
    loss = torch.zeros((), dtype=torch.double)
    for x_F, y, used in documents:
        weight = 1.0 if y else rarity * used
        loss = loss + weight * _cross_entropy(x_F @ row_F + bias, bool(y))
    square = sum(float(x) ** 2 for x_F, _, _ in documents for x in x_F) / (len(documents) * len(row_F))
    return loss + penalty * square / 2 * (row_F @ row_F)


def name_loss(name_EF: Tensor, rows_EI: Tensor, penalty: float, map_II: Tensor) -> Tensor:
    """What the map from names to rows minimises: squared differences, and a penalty on all but the constant."""
    loss = torch.zeros((), dtype=torch.double)
    for name_F, row_I in zip(name_EF, rows_EI, strict=True):
        loss = loss + (torch.cat([name_F, name_F.new_ones(1)]) @ map_II - row_I).square().sum()
    return loss + penalty * name_EF.square().mean() * map_II[:-1].square().sum()


# -- a training run ------------------------------------------------------------------------------------------------------


def mistaken(predicted: Sequence[Sequence[int]], truth: Sequence[Collection[int]]) -> dict[tuple[int, int], int]:
    """Documents with the first label among their wrong tags and the second missed, given as many tags as are true."""
    counts: dict[tuple[int, int], int] = {}
    for row, true in zip(predicted, truth, strict=True):
        given = row[: len(true)]
        for wrong in given:
            for missed in true:
                if wrong not in true and missed not in given:
                    counts[wrong, missed] = counts.get((wrong, missed), 0) + 1
    return counts


def curve(steps: Sequence[int]) -> list[int]:
    """Places of the entries that count: those after which no entry is of the same or an earlier step."""
    return [place for place, step in enumerate(steps) if all(later > step for later in steps[place + 1 :])]


# -- calibration ---------------------------------------------------------------------------------------------------------


def rising_steps(scores: Sequence[float], hits: Sequence[bool]) -> list[tuple[float, float]]:
    """Pool adjacent violators, one pair at a time: (mean score, share of hits) of each step of the isotonic regression."""
    by_score: dict[float, list[bool]] = {}
    for score, hit in sorted(zip(scores, hits, strict=True)):
        by_score.setdefault(score, []).append(hit)
    steps = [([score] * len(own), own) for score, own in by_score.items()]
    while True:
        shares = [sum(own) / len(own) for _, own in steps]
        wrong = [place for place in range(len(steps) - 1) if shares[place] >= shares[place + 1]]
        if not wrong:
            return [(sum(xs) / len(xs), share) for (xs, _), share in zip(steps, shares, strict=True)]
        first = wrong[0]
        (xs, own), (other_xs, other_own) = steps[first], steps[first + 1]
        steps[first : first + 2] = [(xs + other_xs, own + other_own)]


def lowest_threshold(chances: Sequence[float], hits: Sequence[bool], precision: float, expected: int) -> float:
    """The lowest of ``chances`` from which up right / (all + 1) reaches ``precision``; infinite where none does.

    It must reach it, too, with ``expected`` more predictions that are correct as often as the mean of those chances says.
    """
    reached = []
    for least in chances:
        kept = [hit for chance, hit in zip(chances, hits, strict=True) if chance >= least]
        mean = sum(chance for chance in chances if chance >= least) / len(kept)
        by_chance = sum(kept) + expected * mean >= precision * (len(kept) + 1 + expected)
        if sum(kept) >= precision * (len(kept) + 1) and by_chance:
            reached.append(least)
    return min(reached, default=float("inf"))


def expected_calibration_error(chances: Sequence[float], hits: Sequence[bool], n_bins: int) -> float:
    """The gap between mean chance and share of hits in bins of equal width, weighted by their size."""
    error = 0.0
    for number in range(n_bins):
        inside = [
            (chance, hit)
            for chance, hit in zip(chances, hits, strict=True)
            if number / n_bins <= chance < (number + 1) / n_bins or (number == n_bins - 1 and chance == 1)
        ]
        if inside:
            told, right = (sum(pair[side] for pair in inside) / len(inside) for side in (0, 1))
            error += abs(told - right) * len(inside) / len(chances)
    return error


def verdicts(rows: Sequence[tuple[Any, ...]]) -> tuple[dict[tuple[str, str], bool], dict[str, int]]:
    """The latest verdict of each (id, label) among rows of (id, label, verdict, time or None); how many rows do not count."""
    dated: dict[tuple[str, str], list[tuple[float, int, bool]]] = {}
    left_out = dict.fromkeys(("incomplete rows", "rows with another verdict", "overruled by later ones"), 0)
    for number, (identity, label, word, at) in enumerate(rows):
        label, word = (label or "").strip(), (word or "").strip().lower()
        if not (identity and label and word):
            left_out["incomplete rows"] += 1
        elif word not in ("accepted", "rejected"):
            left_out["rows with another verdict"] += 1
        else:
            time = float("-inf") if at is None else at.timestamp()
            dated.setdefault((identity, label), []).append((time, number, word == "accepted"))
    left_out["overruled by later ones"] = sum(len(said) - 1 for said in dated.values())
    return {pair: max(said)[2] for pair, said in dated.items()}, left_out


def corrected(latest: dict[tuple[str, str], bool], identity: str | None, labels: Sequence[str]) -> tuple[list[str], list[str]]:
    """The true labels among a, b, c of a document after the verdicts, and all its judged labels; sorted."""
    said = {label: right for (whose, label), right in latest.items() if whose == identity}
    accepted = {label for label, is_right in said.items() if is_right}
    right = (set(labels) | accepted) - (said.keys() - accepted)
    return sorted(right & {*"abc"}), sorted(said)
