"""What a worker sends in a training step, at 10 K and at 3 M labels: two processes, the same documents, more labels.

MiniLM cut to 1 layer, 2 x 16 documents of 64 tokens and 5 labels, groups of 92 labels or so, vectors of H = 64. Bytes are
those that `sharding.Exchange` counts, by what is sent: no part depends on the number of labels. Beside them stands what plain
data parallelism would send for recall head and table: their dense gradients, summed by a ring, 2 n (W - 1) / W bytes; at 10 K
labels that is also run, as a DistributedDataParallel of the two heads whose hook counts its buckets.

Bar: a step at 3 M labels sends at most 1.05 times the bytes of one at 10 K.
"""

import json
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.multiprocessing.spawn import spawn

from benchmarks.frame import verdict
from benchmarks.inputs import encoder_of, even_groups, small_transformer, synthetic_batches
from xmc_ray.model.lightxml import LightXML, ModelConfig
from xmc_ray.model.sharding import Exchange
from xmc_ray.training.loop import LoopConfig, TrainState, data_parallel, train
from xmc_ray.training.optim import OptimConfig

SIZES = (10_000, 3_000_000)
WORLD, DOCUMENTS, TOKENS, LABELS, GROUP, WIDTH, STEPS = 2, 16, 64, 5, 92, 64, 4
BAR = 1.05


def work(rank: int, folder: str, n_labels: int) -> None:
    """In a process of its own: train, and leave the bytes of a step in ``folder``."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet-{n_labels}", rank=rank, world_size=WORLD)
    encoder, groups = encoder_of(small_transformer()), even_groups(n_labels, -(-n_labels // GROUP))
    model = LightXML(encoder, groups, ModelConfig(bottleneck=WIDTH), Exchange.of_process_group())
    state, module = TrainState.start(model, OptimConfig()), data_parallel(model)
    model.exchange.sent.clear()
    batches = synthetic_batches(n_labels, STEPS, DOCUMENTS, TOKENS, LABELS, seed=rank)
    for _ in train(state, module, lambda _: batches, STEPS, LoopConfig(epochs=1)):
        pass
    assert model.table is not None
    rows = model.recall.weight.shape[1] + 1, (model.table.weight.shape[2] + 1) * model.table.weight.shape[1]
    dense = model.exchange.bytes_of_sum(4 * len(groups) * sum(rows))
    result = {what: n_bytes / STEPS for what, n_bytes in model.exchange.sent.items()} | {"dense": dense}
    if n_labels == min(SIZES):
        result["dense, run"] = plain_sum(len(groups), model.recall.weight.shape[1], tuple(model.table.weight.shape[1:]))
    if rank == 0:
        Path(f"{folder}/{n_labels}.json").write_text(json.dumps(result))
    dist.destroy_process_group()


class Heads(nn.Module):
    """Recall head and table as ordinary parameters."""

    def __init__(self, n_groups: int, features: int, block: tuple[int, ...]) -> None:
        super().__init__()
        self.recall = nn.Linear(features, n_groups)
        self.weight = nn.Parameter(torch.zeros(n_groups, *block))
        self.bias = nn.Parameter(torch.zeros(n_groups, block[0]))

    def forward(self, features_BF: Tensor) -> Tensor:
        total: Tensor = self.recall(features_BF).sum() + self.weight.sum() + self.bias.sum()
        return total


def plain_sum(n_groups: int, features: int, block: tuple[int, ...]) -> int:
    """Bytes that a step of plain data parallelism sends for the heads, as its buckets go by."""
    exchange, sent = Exchange.of_process_group(), 0

    def count(_, bucket):  # type: ignore[no-untyped-def]  # see loop.data_parallel
        nonlocal sent
        sent += exchange.bytes_of_sum(bucket.buffer().nbytes)
        future = dist.all_reduce(bucket.buffer(), async_op=True).get_future()
        return future.then(lambda done: done.value()[0])

    module = nn.parallel.DistributedDataParallel(Heads(n_groups, features, block))
    module.register_comm_hook(None, count)
    module(torch.ones(1, features)).backward()
    return sent


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        for n_labels in SIZES:
            spawn(work, args=(folder, n_labels), nprocs=WORLD)
        few, many = (json.loads(Path(f"{folder}/{n_labels}.json").read_text()) for n_labels in SIZES)
    print(f"{'KiB a worker sends in a step':40}" + "".join(f"{f'{n:,} labels':>20}" for n in SIZES))
    kinds = [what for what in few if not what.startswith("dense") or what == "dense gradients"]
    for what in kinds:
        print(f"{what:40}{few[what] / 1024:20,.1f}{many[what] / 1024:20,.1f}")
    totals = [sum(sent[what] for what in kinds) for sent in (few, many)]
    print(f"{'in all':40}{totals[0] / 1024:20,.1f}{totals[1] / 1024:20,.1f}")
    print(f"{'dense gradients of the heads, by formula':40}{few['dense'] / 1024:20,.1f}{many['dense'] / 1024:20,.1f}")
    print(f"{'dense gradients of the heads, run':40}{few['dense, run'] / 1024:20,.1f}{'-':>20}")
    ratio = totals[1] / totals[0]
    verdict("step-traffic", f"{ratio:.3f}x", f"{BAR}x", ratio <= BAR)


if __name__ == "__main__":
    main()
