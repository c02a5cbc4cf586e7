"""The candidate step: distinct (document, group) pairs and their targets, vectorised against per-document lists.

Shapes of the paper's large sets. Bar: at least 5 times faster at Amazon-670K's shapes, on one CPU thread.
"""

import numpy as np
import torch

from benchmarks.frame import side_by_side, verdict
from xmc_ray.data.groups import LabelGroups
from xmc_ray.model.pairs import candidate_pairs
from xmc_ray.model.ranking import LabelTable
from xmc_ray.model.sharding import Exchange

SHAPES = {  # labels, groups, shortlist, batch, labels a document
    "Amazon-670K": (670_091, 8_192, 75, 16, 5),
    "Wiki-500K": (501_070, 8_192, 32, 32, 5),
    "3 M labels": (2_812_281, 32_768, 75, 16, 36),
}
BAR = 5.0


def vectorised(table: LabelTable, shortlist_BK: torch.Tensor, row_P: torch.Tensor, label_P: torch.Tensor) -> torch.Tensor:
    """What training does: pairs, and a target for every place in their groups."""
    group_P = table.group_L[label_P]
    pairs = candidate_pairs(shortlist_BK, row_P, group_P)
    target_NM = torch.zeros(len(pairs.key_n), table.places)
    target_NM[torch.searchsorted(pairs.key_n, group_P * len(shortlist_BK) + row_P), table.slot_L[label_P]] = 1
    return target_NM


def per_document(
    members: list[list[int]], group_of: list[int], shortlist_BK: torch.Tensor, truth: list[list[int]]
) -> tuple[torch.Tensor, torch.Tensor]:
    """The plain way: a list of labels and a list of targets a document, then padded tensors."""
    candidates, targets = [], []
    for shortlist, true in zip(shortlist_BK.tolist(), truth, strict=True):
        groups = dict.fromkeys(shortlist)
        for label in true:
            groups.setdefault(group_of[label])
        labels = [label for group in groups for label in members[group]]
        positive = set(true)
        candidates.append(labels)
        targets.append([1.0 if label in positive else 0.0 for label in labels])
    longest = max(map(len, candidates))
    ids = torch.tensor([labels + [-1] * (longest - len(labels)) for labels in candidates])
    return ids, torch.tensor([row + [0.0] * (longest - len(row)) for row in targets])


def main() -> None:
    torch.set_num_threads(1)
    rng, ratios = np.random.default_rng(0), {}
    print(f"{'shapes':14}{'per document':>16}{'vectorised':>14}{'ratio':>9}")
    for name, (n_labels, n_groups, k, batch, true) in SHAPES.items():
        groups = LabelGroups(rng.permutation(np.arange(n_labels) % n_groups))
        table = LabelTable(groups, width=8, exchange=Exchange(), seed=0)
        shortlist_BK = torch.stack([torch.randperm(n_groups)[:k] for _ in range(batch)])
        truth = [rng.choice(n_labels, true, replace=False).tolist() for _ in range(batch)]
        row_P, label_P = torch.arange(batch).repeat_interleave(true), torch.tensor(truth).flatten()
        members = [[label for label in row if label >= 0] for row in groups.label_GM.tolist()]
        group_of = groups.group_L.tolist()
        assert vectorised(table, shortlist_BK, row_P, label_P).sum() == batch * true
        slow, fast = side_by_side(
            lambda: per_document(members, group_of, shortlist_BK, truth),  # noqa: B023
            lambda: vectorised(table, shortlist_BK, row_P, label_P),  # noqa: B023
        )
        ratios[name] = slow / fast
        print(f"{name:14}{1000 * slow:13.2f} ms{1000 * fast:11.2f} ms{ratios[name]:8.1f}x")
    figure = ratios["Amazon-670K"]
    verdict("candidates", f"{figure:.1f}x", f"{BAR:.0f}x", figure >= BAR)


if __name__ == "__main__":
    main()
