"""Optimisers, learning-rate schedule and weight averaging.

All of them follow *progress*, the share of the training that is done (0 to 1), so that a run limited by time and a run
limited by epochs share one schedule.
"""

from dataclasses import dataclass
from typing import TypeVar, cast

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

Module = TypeVar("Module", bound=nn.Module)


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW, its schedule and stochastic weight averaging (SWA)."""

    encoder_lr: float = 5e-5
    """Peak learning rate of the encoder."""
    head_lr: float = 1e-3
    """Peak learning rate of the recall head, the bottleneck and the label table."""
    weight_decay: float = 0.01
    """Decoupled weight decay; biases and normalisation layers have none."""
    warmup: float = 0.05
    """Share of the training in which learning rates rise from 0 to their peak."""
    decay: bool = True
    """Let learning rates fall linearly to 0 after the warm-up; false keeps them at their peak."""
    clip_norm: float = 10.0
    """Largest norm of the gradient of the encoder, and of the heads, each on its own; 0 turns clipping off."""
    swa_start: float = 1.0
    """Share of the training after which weights are averaged; 1 turns averaging off."""
    swa_every: int = 50
    """Steps from one averaged set of weights to the next."""


class Optimizer:
    """AdamW over two parts with learning rates of their own, driven by progress."""

    def __init__(self, model: nn.Module, encoder: nn.Module, config: OptimConfig) -> None:
        """``encoder`` is the part of ``model`` that has the encoder's learning rate; the rest are heads."""
        self.config = config
        encoder_parameters = _trained(encoder)
        inside = {id(parameter) for parameter in encoder_parameters}
        heads = [parameter for parameter in _trained(model) if id(parameter) not in inside]
        self.parts = [part for part in (encoder_parameters, heads) if part]
        groups = [
            {"params": parameters, "lr": peak, "peak": peak, "weight_decay": decay}
            for part, peak in ((encoder_parameters, config.encoder_lr), (heads, config.head_lr))
            for parameters, decay in _by_decay(part, config.weight_decay)
        ]
        self.adamw = torch.optim.AdamW([group for group in groups if group["params"]], fused=True)

    def step(self, progress: float) -> None:
        """Clip, update with the learning rates that belong to ``progress``, and clear the gradients."""
        factor = learning_rate_factor(progress, self.config)
        for group in self.adamw.param_groups:
            group["lr"] = group["peak"] * factor
        if self.config.clip_norm > 0:
            for part in self.parts:
                nn.utils.clip_grad_norm_(part, self.config.clip_norm)
        self.adamw.step()
        self.adamw.zero_grad(set_to_none=True)

    @property
    def learning_rates(self) -> tuple[float, float]:
        """Of the first and the last part: encoder and heads."""
        return self.adamw.param_groups[0]["lr"], self.adamw.param_groups[-1]["lr"]


def learning_rate_factor(progress: float, config: OptimConfig) -> float:
    """Share of the peak learning rate: linear warm-up, then linear decay to 0 (or constant)."""
    rising = progress / config.warmup if config.warmup > 0 else 1.0
    falling = (1 - progress) / max(1 - config.warmup, 1e-9) if config.decay else 1.0
    return max(0.0, min(rising, falling, 1.0))


class Averager:
    """Equal average of the weights at every ``swa_every``-th step from ``swa_start`` on (Izmailov et al. 2018)."""

    def __init__(self, config: OptimConfig) -> None:
        self.config = config
        self.averaged: AveragedModel | None = None

    def update(self, model: nn.Module, step: int, progress: float) -> None:
        """Take the weights of this step into the average, if it is their turn."""
        if progress < self.config.swa_start or step % self.config.swa_every:
            return
        if self.averaged is None:
            self.averaged = AveragedModel(model)
        self.averaged.update_parameters(model)

    def best_of(self, model: Module) -> Module:
        """The averaged model once there is one, else ``model`` itself."""
        return model if self.averaged is None else cast(Module, self.averaged.module)

    def state_dict(self) -> dict[str, Tensor]:
        """Averaged weights by name, and how many sets they average; empty before the first."""
        return {} if self.averaged is None else self.averaged.state_dict()

    def load_state_dict(self, state: dict[str, Tensor], model: nn.Module) -> None:
        """The inverse of `state_dict`."""
        if state:
            self.averaged = AveragedModel(model)
            self.averaged.load_state_dict(state)


def _trained(module: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


def _by_decay(parameters: list[nn.Parameter], decay: float) -> list[tuple[list[nn.Parameter], float]]:
    """Matrices decay; vectors do not (biases, gains of normalisation layers)."""
    matrices = [parameter for parameter in parameters if parameter.ndim > 1]
    return [(matrices, decay), ([parameter for parameter in parameters if parameter.ndim <= 1], 0.0)]
