"""What a single process and Ray have in common: untrained models, shares of batches, predictions with their hits."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from toys import documents, toy_model

from xmc_ray.data.documents import DocumentsConfig
from xmc_ray.data.groups import LabelGroups
from xmc_ray.data.labels import LabelIndex
from xmc_ray.errors import ConfigError
from xmc_ray.model.batch import make_batch
from xmc_ray.model.encoder import EncoderConfig
from xmc_ray.model.lexical import LexicalConfig, term_weights
from xmc_ray.model.lightxml import ModelConfig
from xmc_ray.model.linear import LinearConfig
from xmc_ray.model.predict import PredictConfig, predict
from xmc_ray.model.sharding import Exchange
from xmc_ray.model.tokenizer import Tokenizer
from xmc_ray.on_ray.train.config import TrainConfig
from xmc_ray.training.fit import FitConfig, build_model, epoch_plan, predictions_and_hits, sample_loss, share_of_batches
from xmc_ray.training.loop import LoopConfig

TEXTS = pa.array(["a red apple", "a green pear", "a red plum and a pear"])
LISTS = pa.array([["red", "apple"], ["green", "pear"], ["red", "plum", "pear"]])
GROUPS = LabelGroups(np.arange(5) % 3)


@pytest.fixture
def config(tiny_encoder: Path) -> FitConfig:
    return FitConfig(
        encoder=EncoderConfig(name=str(tiny_encoder), layers=1, feature_layers=2, pooling="mean"),
        lexical=LexicalConfig(width=8, columns=64, rarest=1),
        model=ModelConfig(shortlist=2, bottleneck=16),
    )


def built(config: FitConfig, exchange: Exchange | None = None) -> dict[str, torch.Tensor]:
    tokenizer = Tokenizer.load(config.encoder.name, 24)
    weight_F = term_weights([tokenizer.encode(TEXTS)[0]], config.lexical)
    return build_model(config, tokenizer, LabelIndex.count([LISTS]), GROUPS, exchange, weight_F=weight_F).state_dict()


def test_a_model_depends_on_its_seed_alone(config: FitConfig) -> None:
    one = built(config)
    torch.manual_seed(99)
    again, other = built(config), built(replace(config, loop=LoopConfig(seed=1)))
    assert all(torch.equal(tensor, again[name]) for name, tensor in one.items())
    assert not torch.equal(one["table.weight"], other["table.weight"])
    assert not torch.equal(one["lexical.vectors.weight"], other["lexical.vectors.weight"])
    assert one["table.weight"].dtype == torch.float32  # auto, on a CPU
    half = built(replace(config, model=replace(config.model, table="bfloat16")))
    assert half["table.weight"].dtype == torch.bfloat16


def test_workers_have_the_rows_of_one_and_all_else_in_common(config: FitConfig) -> None:
    whole, parts = built(config), [built(config, Exchange(rank, 2)) for rank in range(2)]
    for name, tensor in whole.items():
        if name.startswith(("recall.", "table.")):
            assert torch.equal(torch.cat([part[name] for part in parts]), tensor), name
        else:
            assert all(torch.equal(part[name], tensor) for part in parts), name


def test_biases_are_the_log_odds_of_the_counts(config: FitConfig) -> None:
    bias_G = built(config)["recall.bias"]
    counts_G = np.bincount(GROUPS.group_L, LabelIndex.count([LISTS]).counts)
    np.testing.assert_allclose(bias_G, np.minimum(np.log((counts_G + 0.5) / (3 + 0.5 - counts_G)), 0), rtol=1e-5)


@pytest.mark.parametrize("world", [1, 3])
def test_shares_of_a_step_are_its_documents_with_their_labels(world: int) -> None:
    table, config = documents(40), LoopConfig(batch_size=8, epochs=2)
    plan, by_tokens = epoch_plan(config, 40), dict[tuple[int, ...], int]()
    shares = [[*share_of_batches(table, plan, 2, 0, Exchange(rank, world))] for rank in range(world)]
    assert {len(part) for part in shares} == {2 * plan.steps}
    for step in zip(*shares, strict=True):
        assert sum(map(len, step)) == 8
        for batch in step:
            for row in range(len(batch)):  # a document's labels are its tokens
                tokens = tuple(batch.tokens_BT[row][batch.mask_BT[row]].tolist())
                assert tuple(batch.label_P[batch.row_P == row].tolist()) == tokens
                by_tokens[tokens] = by_tokens.get(tokens, 0) + 1
    assert sum(by_tokens.values()) == 80


def test_hits_are_those_of_the_truth() -> None:
    model, table = toy_model(), documents(12)
    tokens, truth = (table[name].combine_chunks() for name in ("tokens", "labels"))
    scores, ids, hits = predictions_and_hits(model, tokens, truth, 12, PredictConfig(), k=4)
    expected = predict(model, tokens, 4, PredictConfig())
    np.testing.assert_array_equal(scores, expected[0])
    np.testing.assert_array_equal(ids, expected[1])
    assert hits.tolist() == [
        [label in true for label in row] for row, true in zip(ids.tolist(), truth.to_pylist(), strict=True)
    ]
    assert hits.any() and not hits.all()


def test_the_sample_loss_is_that_of_the_loop_without_dropout() -> None:
    model, table = toy_model(dropout=0.5), documents(40)
    tokens, labels = (table[name].combine_chunks() for name in ("tokens", "labels"))
    with torch.no_grad():
        expected = sum(model.eval()(make_batch(tokens, labels))).item()
    assert sample_loss(model.train(), table, PredictConfig(token_budget=16)) == pytest.approx(expected, rel=1e-4)
    assert model.training and next(model.recall.gradients(), None) is None


def test_a_linear_ranker_without_a_lexical_branch_is_told_before_anything_is_read() -> None:
    with pytest.raises(ConfigError, match=r"reads the terms of the lexical branch; found linear\.candidates = 25"):
        FitConfig(linear=LinearConfig(candidates=25))
    with pytest.raises(ConfigError, match=r"lexical\.width = 0"):
        TrainConfig(documents=DocumentsConfig(uri="x"), output="y", linear=LinearConfig(candidates=25))
