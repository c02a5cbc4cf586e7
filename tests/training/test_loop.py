"""Training steps in one process."""

from collections.abc import Iterator
from copy import deepcopy
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from toys import OPTIM, documents, toy_model

from xmc_ray.data.epochs import EpochPlan
from xmc_ray.data.groups import LabelGroups
from xmc_ray.errors import ModelError
from xmc_ray.model.batch import Batch
from xmc_ray.model.predict import PredictConfig, predict
from xmc_ray.training import loop
from xmc_ray.training.fit import share_of_batches
from xmc_ray.training.loop import LoopConfig, Step, TrainState, train
from xmc_ray.training.optim import OptimConfig

AVERAGING = OptimConfig(encoder_lr=0.05, head_lr=0.05, rows_lr=0.04, swa_start=0.3, swa_every=3)


def steps_of(state: TrainState, config: LoopConfig, module: Any = None, read: Any = share_of_batches) -> Iterator[Step]:
    """The steps that train ``state`` on the toy documents to the end."""
    table = documents()
    plan = EpochPlan(n_documents=len(table), batch_size=config.batch_size, window=config.window, seed=config.seed)
    exchange = state.model.exchange

    def batches(first: int) -> Any:
        return read(table, plan, config.epochs, first, exchange)

    return train(state, module or state.model, batches, plan.steps, config)


def run(config: LoopConfig, optim: OptimConfig = OPTIM, state: TrainState | None = None) -> tuple[TrainState, list[Step]]:
    """Train a state, or a fresh one, to the end."""
    state = state or TrainState.start(toy_model(seed=config.seed, dropout=0.1), optim)
    return state, list(steps_of(state, config))


def everything(state: TrainState) -> dict[str, torch.Tensor]:
    """All tensors that training changes."""
    optimizer = state.optimizer
    assert optimizer.adamw is not None and optimizer.lazy_adam is not None
    remembered = [*optimizer.adamw.state.values(), *optimizer.lazy_adam.state.values()]
    return {
        **state.model.state_dict(),
        **{f"average {name}": tensor for name, tensor in state.averager.averaged.items()},
        **{f"square {name}": tensor for name, tensor in optimizer.rows.square.items()},
        **{f"{place} {name}": torch.as_tensor(value) for place, of in enumerate(remembered) for name, value in of.items()},
    }


# -- training ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("groups", [None, LabelGroups(np.arange(12)), LabelGroups(np.zeros(12, np.int64))])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_loss_falls(groups: LabelGroups | None, precision: Any) -> None:
    state = TrainState.start(toy_model(groups), OPTIM)
    _, steps = run(LoopConfig(epochs=8, batch_size=8, precision=precision), state=state)
    assert len(steps) == state.step == 8 * 8
    assert np.mean([step.loss for step in steps[-8:]]) < 0.5 * np.mean([step.loss for step in steps[:8]])


def test_counts_add_up() -> None:
    _, steps = run(LoopConfig(epochs=3, batch_size=8))
    assert [step.number for step in steps] == list(range(1, 25))
    assert [step.epoch for step in steps] == [epoch for epoch in range(3) for _ in range(8)]
    assert [step.progress for step in steps] == pytest.approx([number / 24 for number in range(24)])
    assert [step.documents for step in steps] == [8 * number for number in range(1, 25)]
    assert [step.tokens for step in steps[7::8]] == [n * sum(map(len, documents()["tokens"].to_pylist())) for n in (1, 2, 3)]
    assert 0 <= steps[-1].padding_share < 0.3


def test_same_seed_same_model() -> None:
    one, other, third = (run(LoopConfig(epochs=1, batch_size=8, seed=seed))[0].model.state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert not any(torch.equal(one[name], third[name]) for name in one)


def test_a_state_goes_on_in_the_middle_of_an_epoch_as_if_nothing_had_happened() -> None:
    """Bit for bit, with dropout, micro-batches, a table that is rounded by chance, and averaging."""
    config = LoopConfig(epochs=3, batch_size=8, accumulate=2)
    state = TrainState.start(toy_model(dropout=0.3, table="bfloat16"), AVERAGING)
    copies, losses = {}, []
    for step in steps_of(state, config):
        losses.append(step.loss)
        if step.number in (1, 11, 16, 23):  # the first, inside an epoch, between two, the last but one
            copies[step.number] = deepcopy(state)
    end = everything(state)
    assert any(name.startswith("average") for name in end)
    for number, copy in copies.items():
        torch.manual_seed(number)  # whatever else has drawn random numbers
        _, rest = run(config, state=copy)
        assert [step.loss for step in rest] == losses[number:]
        assert (copy.step, copy.documents, copy.tokens) == (state.step, state.documents, state.tokens)
        again = everything(copy)
        assert [name for name in end if not torch.equal(end[name], again[name])] == []
        assert end.keys() == again.keys()


def test_micro_batches_change_no_result() -> None:
    (whole, one), (parts, many) = (
        run(LoopConfig(epochs=2, batch_size=13, accumulate=n), state=TrainState.start(toy_model(), OPTIM)) for n in (1, 3)
    )
    assert [step.loss for step in many] == pytest.approx([step.loss for step in one], rel=1e-5)
    torch.testing.assert_close(everything(parts), everything(whole), rtol=1e-4, atol=1e-5)


def test_a_frozen_encoder_under_recall_alone_trains_rows_only() -> None:
    model = toy_model(LabelGroups(np.arange(12)))
    model.encoder.requires_grad_(False)
    before = deepcopy(model.state_dict())
    _, steps = run(LoopConfig(epochs=4, batch_size=8), state=TrainState.start(model, OPTIM))
    assert steps[-1].loss < steps[0].loss
    assert [name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])] == [
        "recall.weight",
        "recall.bias",
    ]


def test_dropout_is_on_in_every_step_even_after_an_evaluation() -> None:
    model, seen = toy_model(dropout=0.5), []
    model.dropout.register_forward_hook(lambda module, *_: seen.append(module.training))
    for _ in steps_of(TrainState.start(model, OPTIM), LoopConfig(epochs=2, batch_size=8)):
        predict(model.eval(), documents(5)["tokens"].combine_chunks(), 3, PredictConfig())
    assert seen == [True] * 16


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_step() -> None:
    state, steps = TrainState.start(toy_model(), OPTIM), []
    with pytest.raises(ModelError, match=r"not finite: step 11 \(epoch 2\); found recall nan.*head_lr"):  # noqa: PT012
        for step in steps_of(state, LoopConfig(epochs=3, batch_size=8)):
            steps.append(step)
            if step.number == 10:
                state.model.recall.weight[3] = torch.nan
    assert state.step == len(steps) == 10


@pytest.mark.parametrize("clip_norm", [0.0, 10.0])
@pytest.mark.parametrize("kind", ["encoder", "bottleneck", "lexical"])
def test_a_gradient_that_is_not_finite_stops_the_run_before_it_is_applied(kind: str, clip_norm: float) -> None:
    """The loss is finite in that step, and would not be in the next, which a checkpoint may not see."""
    state = TrainState.start(toy_model(lexical=True), replace(OPTIM, clip_norm=clip_norm))
    model, steps = state.model, []
    weights = {"encoder": model.encoder, "bottleneck": model.bottleneck, "lexical": model.lexical.vectors}[kind]  # type: ignore[union-attr]
    with pytest.raises(ModelError, match=r"a gradient is not finite: step 4 .*found .*nan.*head_lr"):  # noqa: PT012
        for step in steps_of(state, LoopConfig(epochs=3, batch_size=8)):
            steps.append(step)
            if step.number == 3:
                parameter = next(weights.parameters())
                before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
                parameter.register_hook(lambda gradient: gradient * torch.nan)
    assert state.step == len(steps) == 3
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


# -- time ----------------------------------------------------------------------------------------------------------------


class Clock:
    """Time that passes when told."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr(loop, "time", SimpleNamespace(monotonic=lambda: self.now))

    def train(self, state: TrainState, config: LoopConfig, reading: float, computing: float, pause: float) -> list[Step]:
        """Steps that wait ``reading`` seconds for their batch and compute for ``computing``, with pauses in between."""

        def module(batch: Batch, documents: int) -> Any:
            self.now += computing
            return state.model(batch, documents)

        def slow_batches(*arguments: Any) -> Iterator[Batch]:
            for batch in share_of_batches(*arguments):
                self.now += reading
                yield batch

        steps = []
        for step in steps_of(state, config, module, slow_batches):
            steps.append(step)
            self.now += pause
        return steps


def test_the_share_of_waiting_is_told_and_the_callers_time_is_not_training(monkeypatch: pytest.MonkeyPatch) -> None:
    state = TrainState.start(toy_model(), OPTIM)
    steps = Clock(monkeypatch).train(state, LoopConfig(epochs=1, batch_size=8), reading=1.0, computing=3.0, pause=100.0)
    # a step's seconds are those when its batch has come: its own computing counts in the next
    assert [step.seconds for step in steps] == [4.0 * number for number in range(8)]  # it begins with the first batch
    assert [step.waiting for step in steps] == [1.0 * number for number in range(8)]
    assert steps[-1].waiting_share == pytest.approx(7 / 28)
    assert steps[-1].seconds_left == pytest.approx(28 * (1 / 8) / (7 / 8))


def test_time_limit_ends_training_and_the_schedule(monkeypatch: pytest.MonkeyPatch) -> None:
    state, config = TrainState.start(toy_model(), OPTIM), LoopConfig(epochs=1000, batch_size=8, minutes=1.0)
    steps = Clock(monkeypatch).train(state, config, reading=1.0, computing=3.0, pause=100.0)
    assert len(steps) == state.step == 15  # 4 seconds each; the sixteenth would begin at 60
    assert [step.progress for step in steps] == pytest.approx([4 * number / 60 for number in range(15)])
    assert state.optimizer.learning_rates()["encoder_lr"] == pytest.approx(
        OPTIM.encoder_lr * (1 - 56 / 60) / (1 - OPTIM.warmup)
    )
