"""Two data-parallel processes do what one does with the same global batches."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from test_loop import OPTIM, documents
from test_ranking import BagOfTokens

from xmc_ray.checkpoint import TrainState
from xmc_ray.groups import LabelGroups
from xmc_ray.loop import LoopConfig, data_parallel, train
from xmc_ray.model import LightXML, ModelConfig
from xmc_ray.text import make_batch

STEPS, BATCH = 20, 16


def train_share(rank: int, world: int, folder: str) -> None:
    """Train on every ``world``-th document of each batch, and leave the parameters and losses in ``folder``."""
    torch.set_num_threads(1)
    if world > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)
    torch.manual_seed(0)
    groups = LabelGroups(np.arange(12) % 4)
    model = LightXML(BagOfTokens(), groups, ModelConfig(shortlist=2, bottleneck=8, dropout=0.0))  # type: ignore[arg-type]
    state, table, rng = TrainState.start(model, OPTIM), documents(), np.random.default_rng(0)
    shares = [pa.array(rng.permutation(len(table))[:BATCH][rank::world]) for _ in range(STEPS)]
    batches = [make_batch(*(table[name].combine_chunks().take(rows) for name in ("tokens", "labels"))) for rows in shares]
    losses = [step.loss for step in train(state, data_parallel(model), lambda _: batches, STEPS, LoopConfig(epochs=1))]
    torch.save({"parameters": list(model.parameters()), "losses": losses}, f"{folder}/{world}-{rank}.pt")
    if world > 1:
        dist.destroy_process_group()


def test_one_and_two_processes_end_at_the_same_parameters(tmp_path: Path) -> None:
    train_share(0, 1, str(tmp_path))
    multiprocessing.spawn(train_share, args=(2, str(tmp_path)), nprocs=2)
    alone, first, second = (torch.load(tmp_path / f"{name}.pt") for name in ("1-0", "2-0", "2-1"))
    for one, two, other in zip(alone["parameters"], first["parameters"], second["parameters"], strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(two, other, rtol=0, atol=0)
    np.testing.assert_allclose(alone["losses"], np.mean([first["losses"], second["losses"]], axis=0), rtol=1e-4)
    assert alone["losses"][-1] < alone["losses"][0]
