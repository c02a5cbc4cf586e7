"""Optimiser, schedule and weight averaging."""

import pytest
import torch
from torch import nn

from xmc_ray.optim import Averager, OptimConfig, Optimizer, learning_rate_factor


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.encoder = nn.Linear(4, 4)
        self.head = nn.Linear(4, 3)


def step(model: Model, optimizer: Optimizer, progress: float = 0.5, scale: float = 1.0) -> None:
    (scale * model.head(model.encoder(torch.ones(2, 4))).sum()).backward()
    optimizer.step(progress)


def test_the_rate_rises_to_its_peak_and_falls_to_nothing() -> None:
    config = OptimConfig(warmup=0.1)
    factors = [learning_rate_factor(share / 100, config) for share in range(101)]
    assert factors[0] == 0
    assert factors[5] == pytest.approx(0.5)
    assert factors[10] == max(factors) == pytest.approx(1)
    assert factors[55] == pytest.approx(0.5)
    assert factors[100] == 0
    assert learning_rate_factor(0.9, OptimConfig(warmup=0.1, decay=False)) == 1
    assert learning_rate_factor(0.0, OptimConfig(warmup=0.0)) == 1


def test_encoder_and_heads_have_rates_of_their_own_and_vectors_no_decay() -> None:
    model = Model()
    optimizer = Optimizer(model, model.encoder, OptimConfig(encoder_lr=1e-3, head_lr=1e-1, warmup=0, decay=False))
    step(model, optimizer)
    assert optimizer.learning_rates == (1e-3, 1e-1)
    rates = {id(parameter): group for group in optimizer.adamw.param_groups for parameter in group["params"]}
    assert [rates[id(parameter)]["lr"] for parameter in model.parameters()] == [1e-3, 1e-3, 1e-1, 1e-1]
    assert [rates[id(parameter)]["weight_decay"] for parameter in model.parameters()] == [0.01, 0, 0.01, 0]
    assert all(parameter.grad is None for parameter in model.parameters())


def test_frozen_parameters_stay() -> None:
    model = Model()
    model.encoder.requires_grad_(False)
    before = model.encoder.weight.clone()
    optimizer = Optimizer(model, model.encoder, OptimConfig(head_lr=0.1))
    step(model, optimizer)
    assert torch.equal(model.encoder.weight, before)
    assert optimizer.learning_rates[0] == optimizer.learning_rates[1] > 0


def test_clipping_bounds_each_part(monkeypatch: pytest.MonkeyPatch) -> None:
    model, norms = Model(), []
    optimizer = Optimizer(model, model.encoder, OptimConfig(clip_norm=2.0))

    def look() -> None:
        for part in (model.encoder, model.head):
            gradients = [parameter.grad for parameter in part.parameters() if parameter.grad is not None]
            norms.append(float(nn.utils.get_total_norm(gradients)))

    monkeypatch.setattr(optimizer.adamw, "step", look)
    step(model, optimizer, scale=1000.0)
    assert norms == pytest.approx([2.0, 2.0], rel=1e-3)


def test_the_average_is_the_plain_mean_of_the_weights_seen() -> None:
    config = OptimConfig(head_lr=0.1, encoder_lr=0.1, swa_start=0.3, swa_every=2)
    model, averager, seen = Model(), Averager(config), []
    optimizer = Optimizer(model, model.encoder, config)
    for number in range(1, 11):
        step(model, optimizer)
        averager.update(model, number, number / 10)
        if number >= 3 and number % 2 == 0:
            seen.append(model.head.weight.detach().clone())
        if number == 3:
            assert averager.best_of(model) is model, "nothing has been averaged yet"
    torch.testing.assert_close(averager.best_of(model).head.weight, torch.stack(seen).mean(0))
    again = Averager(config)
    again.load_state_dict(averager.state_dict(), Model())
    torch.testing.assert_close(again.best_of(model).head.weight, averager.best_of(model).head.weight)


def test_averaging_is_off_by_default() -> None:
    model, averager = Model(), Averager(OptimConfig())
    for number in range(200):
        averager.update(model, number, number / 200)
    assert averager.best_of(model) is model
    assert averager.state_dict() == {}
