"""The scoring stage alone, at 15 K, 670 K and 3 M labels: no encoder, random vectors of H = 256, groups of 32 labels.

`grouped`: K = 16 random groups a document, their labels scored and the best 10 taken. `exact, all`: every group is scored, as
if recall excluded none. `exact, sure`: recall leaves 32 groups a document open (twice the shortlist); no other group can hold
one of the best labels, so no other is scored. `recall`: the matrix product that ranks the groups in every mode, F = 768; it
grows with the number of groups and is not included in the other columns.

GB/s is the table's bytes that must be read at least once a batch, divided by the time; the machine's read bandwidth is
measured in the same run. The sizes take turns in one process; medians are compared.

Bar: grouped scoring takes at most 1.5 times as long at 3 M labels as at 15 K. Random shortlists are the hardest case: at 15 K
all documents of a batch share 469 groups, which stay in the cache, at 3 M hardly two share one.
"""

import time
from collections.abc import Callable
from statistics import median
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from benchmarks.frame import verdict
from benchmarks.inputs import even_groups
from xmc_ray.model.ranking import LabelTable
from xmc_ray.model.recall import RecallHead
from xmc_ray.model.sharding import Exchange

SIZES, BATCHES = (15_000, 670_000, 3_000_000), (64, 1_024)
GROUP, WIDTH, FEATURES, SHORTLIST, OPEN, K, THREADS = 32, 256, 768, 16, 32, 10, 2
ROUNDS, PATIENCE = 15, 4.0  # turns; seconds after which a scoring is not measured again
BAR = 1.5


class Task(NamedTuple):
    """A batch for one table; ``sure_BG`` has `OPEN` groups a document."""

    table: LabelTable
    recall: RecallHead
    vectors_BH: Tensor
    features_BF: Tensor
    shortlist_BK: Tensor
    sure_BG: Tensor

    def grouped(self, shortlist_BK: Tensor | None = None) -> Tensor:
        score_BKM = self.table.predict(self.vectors_BH, self.shortlist_BK if shortlist_BK is None else shortlist_BK)
        return score_BKM.flatten(1).topk(K).values

    def exact(self, wanted_BG: Tensor) -> Tensor:
        return self.grouped(self.table.peaks(self.vectors_BH, wanted_BG).topk(K).indices)

    def choose(self) -> Tensor:
        return self.recall.best(self.recall.logits(self.features_BF), SHORTLIST)[1]

    @property
    def bytes_read(self) -> int:
        return len(self.shortlist_BK.unique()) * self.table.weight[0].nbytes


def task(table: LabelTable, recall: RecallHead, documents: int) -> Task:
    n_groups, generator = recall.n_groups, torch.Generator().manual_seed(documents)
    vectors_BH, features_BF = (torch.randn(documents, width, generator=generator) for width in (WIDTH, FEATURES))
    rng = np.random.default_rng(documents)
    open_BO = torch.from_numpy(np.stack([rng.choice(n_groups, OPEN, replace=False) for _ in range(documents)]))
    sure_BG = torch.zeros(documents, n_groups, dtype=torch.bool).scatter_(1, open_BO, True)
    return Task(table, recall, vectors_BH, features_BF, open_BO[:, :SHORTLIST], sure_BG)


def in_turns(calls: list[Callable[[], object]]) -> list[float]:
    """Median seconds of each; a slow one is not called again once it has had its time."""
    seconds: list[list[float]] = [[] for _ in calls]
    for _ in range(1 + ROUNDS):
        for taken, call in zip(seconds, calls, strict=True):
            if sum(taken) < PATIENCE:
                started = time.perf_counter()
                call()
                taken.append(time.perf_counter() - started)
    return [median(taken[1:] or taken) for taken in seconds]  # the first call warms up


def bandwidth() -> tuple[float, float]:
    """GB/s of the sum of 2 GB, and of their copy to other memory (read and written)."""
    numbers = torch.ones(1 << 29)
    target = torch.zeros_like(numbers)
    read, copied = in_turns([numbers.sum, lambda: target.copy_(numbers)])
    return numbers.nbytes / read / 1e9, 2 * numbers.nbytes / copied / 1e9


def main() -> None:
    torch.set_num_threads(THREADS)
    print("memory: {:.1f} GB/s read, {:.1f} GB/s copied".format(*bandwidth()))
    heads = []
    for n_labels in SIZES:
        groups = even_groups(n_labels, -(-n_labels // GROUP))
        head = LabelTable(groups, WIDTH, Exchange(), seed=0), RecallHead(FEATURES, len(groups), Exchange(), seed=1)
        heads.append(head)
    print(f"{'':19}{'recall':>9}{'grouped':>27}{'exact, all':>27}{'exact, sure':>16}")
    print(f"{'labels':>12}{'batch':>7}{'ms':>9}" + f"{'ms':>9}{'docs/s':>10}{'GB/s':>8}" * 2 + f"{'ms':>7}{'docs/s':>9}")
    ratios = {}
    with torch.inference_mode():
        for documents in BATCHES:
            tasks = [task(*head, documents) for head in heads]
            grouped, recall = in_turns([each.grouped for each in tasks]), in_turns([each.choose for each in tasks])
            every = in_turns([lambda each=each: each.exact(torch.ones_like(each.sure_BG)) for each in tasks])  # type: ignore[misc]
            sure = in_turns([lambda each=each: each.exact(each.sure_BG) for each in tasks])  # type: ignore[misc]
            for n_labels, each, *seconds in zip(SIZES, tasks, recall, grouped, every, sure, strict=True):
                of_recall, of_grouped, of_all, of_sure = seconds
                table_bytes = each.table.weight.nbytes
                print(
                    f"{n_labels:12,}{documents:7,}{1e3 * of_recall:9.1f}"
                    f"{1e3 * of_grouped:9.1f}{documents / of_grouped:10,.0f}{each.bytes_read / of_grouped / 1e9:8.2f}"
                    f"{1e3 * of_all:9.1f}{documents / of_all:10,.0f}{table_bytes / of_all / 1e9:8.2f}"
                    f"{1e3 * of_sure:7.0f}{documents / of_sure:9,.0f}"
                )
            ratios[documents] = grouped[-1] / grouped[0], grouped[-1] / grouped[1]
    for documents, (to_least, to_middle) in ratios.items():
        print(f"grouped at 3 M, batches of {documents:,}: {to_least:.2f} times 15 K, {to_middle:.2f} times 670 K")
    worst = max(to_least for to_least, _ in ratios.values())
    verdict("scoring", f"{worst:.2f}x", f"{BAR}x", worst <= BAR)


if __name__ == "__main__":
    main()
