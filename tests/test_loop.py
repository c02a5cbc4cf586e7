"""Training steps and prediction batches in one process."""

import numpy as np
import pyarrow as pa
import pytest
import torch
from test_ranking import BagOfTokens

from xmc_ray.checkpoint import TrainState
from xmc_ray.errors import ConfigError, ModelError
from xmc_ray.groups import LabelGroups
from xmc_ray.loop import LoopConfig, Step, predict, train
from xmc_ray.model import LightXML, ModelConfig
from xmc_ray.optim import OptimConfig
from xmc_ray.text import shuffled_windows, training_batches

OPTIM = OptimConfig(encoder_lr=0.05, head_lr=0.05)


def documents(n_rows: int = 64) -> pa.Table:
    """Documents of one to five tokens; a document's labels are its tokens."""
    rng = np.random.default_rng(0)
    rows = [sorted({int(token) for token in rng.integers(0, 12, rng.integers(1, 6))}) for _ in range(n_rows)]
    return pa.table({name: pa.array(rows, pa.list_(pa.int32())) for name in ("tokens", "labels")})


def run(config: LoopConfig, optim: OptimConfig = OPTIM, state: TrainState | None = None) -> tuple[TrainState, list[Step]]:
    torch.manual_seed(config.seed)
    if state is None:
        model = LightXML(BagOfTokens(), LabelGroups(np.arange(12) % 4), ModelConfig(shortlist=2, bottleneck=8, dropout=0.1))  # type: ignore[arg-type]
        state = TrainState.start(model, optim)
    table = documents()

    def epoch_batches(epoch: int):  # type: ignore[no-untyped-def]
        rng = np.random.default_rng([config.seed, epoch])
        return training_batches(shuffled_windows(table, config.window, rng), config.batch_size, rng)

    steps = list(train(state, state.model, epoch_batches, -(-len(table) // config.batch_size), config))
    return state, steps


def test_loss_falls_and_counts_add_up() -> None:
    state, steps = run(LoopConfig(epochs=12, batch_size=8))
    assert len(steps) == state.step == 12 * 8
    assert np.mean([step.loss for step in steps[-8:]]) < 0.5 * np.mean([step.loss for step in steps[:8]])
    assert steps[-1].documents == 12 * 64
    assert steps[-1].tokens == 12 * sum(map(len, documents()["tokens"].to_pylist()))
    assert 0 <= steps[-1].padding_share < 0.3
    assert [step.epoch for step in steps] == [epoch for epoch in range(12) for _ in range(8)]
    assert all(0 <= step.progress < 1 for step in steps)
    assert sorted(step.progress for step in steps) == [step.progress for step in steps]


def test_same_seed_same_model() -> None:
    one, other, third = (run(LoopConfig(epochs=1, batch_size=8, seed=seed))[0].model.state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert not all(torch.equal(one[name], third[name]) for name in one)


def test_dropout_is_on_in_every_step_even_after_an_evaluation() -> None:
    config, seen = LoopConfig(epochs=2, batch_size=8), []
    model = LightXML(BagOfTokens(), LabelGroups(np.arange(12) % 4), ModelConfig(shortlist=2, bottleneck=8))  # type: ignore[arg-type]
    model.dropout.register_forward_hook(lambda module, *_: seen.append(module.training))
    state = TrainState.start(model, OPTIM)
    table, rng = documents(), np.random.default_rng(0)
    for _ in train(state, model, lambda _: training_batches([table], 8, rng), 8, config):
        predict(model.eval(), table["tokens"].combine_chunks(), 3, config)
    assert len(seen) == 16
    assert all(seen)


def test_time_limit_ends_training_and_the_schedule() -> None:
    state, steps = run(LoopConfig(epochs=100_000, batch_size=8, minutes=0.005))
    assert 0 < len(steps) < 100_000
    assert steps[-1].progress > 0.5
    assert state.optimizer.learning_rates[0] < 0.5 * OPTIM.encoder_lr


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_step() -> None:
    with pytest.raises(ModelError, match=r"not finite: step [2-9]\b.*head_lr"):
        run(LoopConfig(epochs=3, batch_size=8), OptimConfig(encoder_lr=1e38, head_lr=1e38, warmup=0, clip_norm=0))


@pytest.mark.parametrize("budget", [1, 7, 64, 10_000])
def test_prediction_is_that_of_one_document_at_a_time(budget: int) -> None:
    state, _ = run(LoopConfig(epochs=2, batch_size=8))
    tokens = documents(20)["tokens"].combine_chunks()
    scores, labels = predict(state.model, tokens, 4, LoopConfig(token_budget=budget))
    assert scores.dtype == np.float32
    for row in range(len(tokens)):
        alone = predict(state.model, tokens.slice(row, 1), 4, LoopConfig())
        np.testing.assert_allclose(scores[row], alone[0][0], rtol=1e-4)
        assert labels[row].tolist() == alone[1][0].tolist()
    assert state.model.training  # as it was found


def test_prediction_of_nothing() -> None:
    state, _ = run(LoopConfig(epochs=1))
    scores, labels = predict(state.model, pa.array([], pa.list_(pa.int32())), 3, LoopConfig())
    assert scores.shape == labels.shape == (0, 3)


@pytest.mark.parametrize("bad", [{"epochs": 0}, {"batch_size": 0}, {"window": 0}, {"token_budget": 0}, {"minutes": 0.0}])
def test_settings_that_do_not_fit(bad: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=next(iter(bad))):
        LoopConfig(**bad)  # type: ignore[arg-type]
