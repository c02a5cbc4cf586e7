"""Slow, obvious twins of everything fast in ``xmc_ray``: plain loops over documents and labels, to hold the fast code to.

Metrics
- ``metrics_of``: every metric of a list of documents, in total or for one band.
"""

from collections.abc import Collection, Sequence
from math import log2


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
