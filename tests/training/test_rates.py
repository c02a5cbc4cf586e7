"""The default rates suit features of any number and length, with and without warm-up: no recipe has to know its encoder."""

from functools import partial

import numpy as np
import pyarrow as pa
import pytest
import torch
from transformers import BertConfig, BertModel

from xmc_ray.data.groups import LabelGroups
from xmc_ray.data.labels import IntArray
from xmc_ray.model.encoder import TextEncoder
from xmc_ray.model.lexical import LexicalBranch
from xmc_ray.model.lightxml import LightXML, ModelConfig
from xmc_ray.training.fit import epoch_plan, sample_loss, share_of_batches
from xmc_ray.training.loop import LoopConfig, TrainState, train
from xmc_ray.training.optim import OptimConfig

N_LABELS = 64
DEFAULT = OptimConfig()
BARE = OptimConfig(warmup=0.0, decay=False, clip_norm=0.0)  # the default rates from the first step on, as the paper has its own


def problem(n_rows: int) -> tuple[pa.Table, IntArray]:
    """Documents whose labels are their tokens, by Zipf's law, behind a first token that all have; and the labels' counts."""
    rng, share = np.random.default_rng(0), 1 / np.arange(1, N_LABELS + 1)
    rows = [np.unique(rng.choice(N_LABELS, 6, p=share / share.sum())) for _ in range(n_rows)]
    table = pa.table(
        {
            "tokens": pa.array([[N_LABELS, *row.tolist()] for row in rows], pa.list_(pa.int32())),
            "labels": pa.array([row.tolist() for row in rows], pa.list_(pa.int32())),
        }
    )
    return table, np.bincount(np.concatenate(rows), minlength=N_LABELS)


def transformer(width: int, feature_layers: int, pooling: str) -> TextEncoder:
    """Random, ``feature_layers`` - 1 layers; its hidden states are layer-normalised, as those of all BERTs."""
    torch.manual_seed(0)
    shape = {"hidden_size": width, "num_hidden_layers": feature_layers - 1, "num_attention_heads": 2, "intermediate_size": 64}
    bert = BertModel(BertConfig(vocab_size=N_LABELS + 1, max_position_embeddings=16, **shape), add_pooling_layer=False)
    bert.get_input_embeddings().sparse = True
    return TextEncoder(bert, feature_layers, pooling)


def losses(model: LightXML, optim: OptimConfig, epochs: int, n_rows: int = 400) -> tuple[float, list[float], float]:
    """The untrained model's loss, that of each step, and the trained model's."""
    table, counts = problem(n_rows)
    model.start_from_counts(counts, n_rows)
    loop = LoopConfig(epochs=epochs, batch_size=16)
    plan, state = epoch_plan(loop, n_rows), TrainState.start(model, optim)
    untrained = sample_loss(model, table, loop.prediction)
    batches_from = partial(share_of_batches, table, plan, epochs, exchange=model.exchange)
    steps = [step.loss for step in train(state, model, batches_from, plan.steps, loop)]
    return untrained, steps, sample_loss(model, table, loop.prediction)


def check(untrained: float, steps: list[float], trained: float) -> None:
    """After the first hundred steps the loss, batches differing, is below the untrained model's, and so it ends."""
    assert len(steps) == 125
    running = np.convolve(steps, np.full(10, 0.1), "valid")
    assert running[90:].max() < untrained
    assert trained < 0.9 * untrained


@pytest.mark.parametrize(
    "groups", [LabelGroups(np.arange(N_LABELS)), LabelGroups(np.arange(N_LABELS) % 16)], ids=["flat", "groups"]
)
@pytest.mark.parametrize(
    ("width", "layers", "pooling", "optim"),
    [(128, 3, "mean", DEFAULT), (128, 3, "mean", BARE), (384, 5, "first", BARE), (768, 5, "mean", BARE)],
    ids=["384 features", "384, bare", "1920, first token, bare", "3840, bare"],
)
def test_the_loss_does_not_overshoot_whatever_the_features(
    width: int, layers: int, pooling: str, optim: OptimConfig, groups: LabelGroups
) -> None:
    """The paper's recipe at the default rates: the loss went from 29.7 to 925 and ended above the untrained model's."""
    model = LightXML(transformer(width, layers, pooling), groups, ModelConfig(dropout=0.1))
    assert model.width in (384, 1920, 3840)
    untrained, steps, trained = losses(model, optim, epochs=5)
    check(untrained, steps, trained)
    assert max(steps) < 5 * untrained  # the row rule of before: up to 166 times


@pytest.mark.parametrize("width", [64, 512, 2048])
def test_words_of_any_width_are_learnt(width: int) -> None:
    torch.manual_seed(0)
    branch = LexicalBranch(torch.ones(4096), width)
    heads = LabelGroups(np.arange(N_LABELS)), ModelConfig(dropout=0.1)
    untrained, steps, trained = losses(LightXML(None, *heads, lexical=branch), DEFAULT, epochs=5)
    check(untrained, steps, trained)
    assert trained < 0.5 * untrained
