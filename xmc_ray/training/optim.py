"""Optimisers, learning-rate schedule and weight averaging.

All of them follow *progress*, the share of the training that is done (0 to 1), so that a run limited by time and a run
limited by epochs have the same schedule.

Letters: N vectors of a step, V vectors in all, H width.
"""

import math
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Annotated

import torch
from torch import Tensor, nn

from xmc_ray.model.lightxml import LightXML
from xmc_ray.model.sharding import Exchange, FactoredGradients, OwnedRows, RowGradients
from xmc_ray.model.threads import mapped
from xmc_ray.settings import Bounds, NonNegativeFloat, PositiveInt, Settings, Share

_ROWS = 4096  # of a parameter that are averaged at a time: no second copy of a whole table
_INPUTS = 625  # of a row whose weights learn at `rows_lr` itself, so that a logit's longest step is 25 times that
_TINY = 1e-10  # keeps a row without any gradient from dividing by zero


@dataclass(frozen=True, kw_only=True)
class OptimConfig(Settings):
    """Learning rates, their schedule and stochastic weight averaging (SWA)."""

    encoder_lr: NonNegativeFloat = 5e-5
    """Peak learning rate of the encoder."""
    head_lr: NonNegativeFloat = 1e-3
    """Peak learning rate of the bottleneck and of the lexical branch's layer."""
    rows_lr: NonNegativeFloat = 0.08
    """Peak learning rate of recall head and label table; a label's first document moves its logit by about 18 times as much."""
    lexical_lr: NonNegativeFloat = 0.2
    """Peak learning rate of the lexical branch's vectors."""
    lexical_power: Annotated[float, Bounds(ge=0, le=0.5)] = 0.25
    """How far a term's own gradients determine its rate: 0.5 is row-wise Adagrad, 0 gives rare and frequent terms one rate."""
    weight_decay: NonNegativeFloat = 0.01
    """Decoupled weight decay; biases and normalisation layers have none."""
    warmup: Share = 0.05
    """Share of training in which learning rates rise from 0 to their peak."""
    decay: bool = True
    """Let learning rates fall linearly to 0 after the warm-up; false keeps them at their peak."""
    clip_norm: NonNegativeFloat = 10.0
    """Maximum gradient norm of the encoder and of the bottleneck, each by itself; 0 turns clipping off."""
    swa_start: Share = 1.0
    """Share of training after which weights are averaged; 1 turns averaging off."""
    swa_every: PositiveInt = 50
    """Steps from one averaged set of weights to the next."""


class Optimizer:
    """One rule for each kind of parameters of a model, all following progress.

    - AdamW for dense ones: the transformer, the bottleneck and the lexical branch's layer, replicated on all workers;
    - lazy Adam (`torch.optim.SparseAdam`) for the transformer's word vectors: a step updates those of the words it has seen;
    - partially row-wise Adagrad for the lexical branch's vectors, replicated and just as lazy (decision 0012);
    - row-wise Adagrad for recall head and label table, each worker for the rows it owns (decisions 0007 and 0020).
    """

    def __init__(self, model: LightXML, config: OptimConfig) -> None:
        self.config = config
        self.exchange = model.exchange
        trained = model.trained_parameters()
        self.words = trained.words
        self.terms = VectorAdagrad(trained.terms, config.lexical_power)
        self.rows = RowAdagrad(model.heads, config.weight_decay)
        self.clipped = {"encoder_lr": trained.encoder, "head_lr": trained.head}
        self.dense = trained.dense
        groups = [
            {"params": parameters, "lr": peak, "peak": peak, "weight_decay": decay}
            for part, peak in ((trained.encoder, config.encoder_lr), (trained.head, config.head_lr))
            for parameters, decay in _by_decay([part[name] for name in part if name in self.dense], config.weight_decay)
            if parameters
        ]
        words = [{"params": [*self.words.values()], "lr": config.encoder_lr, "peak": config.encoder_lr}]
        self.adamw = torch.optim.AdamW(groups, fused=True) if groups else None
        self.lazy_adam = torch.optim.SparseAdam(words) if self.words else None
        self.factor = 0.0

    def norms(self) -> dict[str, Tensor]:
        """The norms of the gradients, float64 scalars by the names of learning rates; sparse ones are those of all workers."""
        for parameter in (*self.words.values(), *self.terms.vectors.values()):
            if parameter.grad is not None:
                parameter.grad = gathered_sparse(parameter.grad, self.exchange)
        parts = self.clipped | {"lexical_lr": self.terms.vectors}
        gradients = {name: _values(part.values()) for name, part in parts.items()}
        return {name: nn.utils.get_total_norm(values).double() for name, values in gradients.items() if values}

    def step(self, progress: float, norms: Mapping[str, float] | None = None) -> None:
        """Clip, update with the learning rates of ``progress``, and clear the gradients.

        ``norms`` are what `norms` has returned, if it was called for these gradients. Raises FloatingPointError, on all workers
        alike and before anything is updated, if one is not finite.
        """
        self.factor = learning_rate_factor(progress, self.config)
        norms = {name: norm.item() for name, norm in self.norms().items()} if norms is None else norms
        if not math.isfinite(sum(norms.values())):
            raise FloatingPointError(", ".join(f"a norm of {norm:g} under {name}" for name, norm in norms.items()))
        for name, part in self.clipped.items():
            clip(part.values(), norms.get(name, 0.0), self.config.clip_norm)
        for optimizer in (self.adamw, self.lazy_adam):
            if optimizer is not None:
                for group in optimizer.param_groups:
                    group["lr"] = group["peak"] * self.factor
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
        self.terms.step(self.config.lexical_lr * self.factor)
        self.rows.step(self.config.rows_lr * self.factor)

    def dense_state(self) -> dict[str, Tensor]:
        """The state of replicated parameters, by ``optimizer.<parameter>.<quantity>``; the same on all workers."""
        powers = {f"optimizer.{name}.power": torch.tensor(power) for name, power in self.rows.power.items()}
        powers |= {f"optimizer.{name}.scale": scale_H for name, scale_H in self.rows.scale.items()}
        squares = {f"optimizer.{name}.square": square_V for name, square_V in self.terms.square.items()}
        return (
            powers
            | squares
            | {
                f"optimizer.{name}.{quantity}": torch.as_tensor(value)
                for optimizer, parameters in ((self.adamw, self.dense), (self.lazy_adam, self.words))
                if optimizer is not None
                for name, parameter in parameters.items()
                for quantity, value in optimizer.state.get(parameter, {}).items()
            }
        )

    def load_dense_state(self, tensors: Mapping[str, Tensor]) -> None:
        """The inverse of `dense_state`."""
        for key, tensor in tensors.items():
            name, _, quantity = key.removeprefix("optimizer.").rpartition(".")
            if name in self.rows.heads and quantity == "power":
                self.rows.power[name] = tensor.item()
            elif name in self.rows.heads:
                self.rows.scale[name] = tensor.to(self.rows.heads[name].weight.device)
            elif name in self.terms.square:
                self.terms.square[name].copy_(tensor)
            elif name in self.words:
                assert self.lazy_adam is not None
                value = int(tensor) if quantity == "step" else tensor.to(self.words[name].device)
                self.lazy_adam.state[self.words[name]][quantity] = value
            else:
                assert self.adamw is not None
                self.adamw.state[self.dense[name]][quantity] = tensor.to(self.dense[name].device)

    def learning_rates(self) -> dict[str, float]:
        """Learning rates of the last step, by the names of `OptimConfig`, for the parts of the model that learn."""
        names = [name for name, part in self.clipped.items() if part]
        names += [*(["lexical_lr"] if self.terms.vectors else []), "rows_lr"]
        return {name: getattr(self.config, name) * self.factor for name in names}


class RowAdagrad:
    """Adagrad with one accumulator per row, for inputs of any width and length.

    A row w, b has the logit w x + b: its input is (x, 1). With x of mean squared length r² in the first step, the row moves as
    Adagrad would on inputs divided by c = sqrt(r² + 1), that is of mean squared length 1. With the gradients g and g_b, and the
    accumulator s, which starts at (c / n)² for a first step of n documents and to which |g|² + g_b² of each step is added:

        w <- w - 25 lr / (c sqrt(s)) g        b <- b - 25 lr / (c sqrt(s)) g_b

    (c / n)² is the square of the gradient of one true document, for which g is x / n: every row starts as if it had seen one.
    So its first true document moves the logit of a typical one by 25 lr / sqrt(2), whatever the number of features and their
    scale, and the many documents without the label, whose gradients are tiny, hardly move it. From 0 they would, by a whole
    step: a rare label would be pushed down as far as it is pulled up. (25: a row of 625 inputs of mean squared length 1 learns
    as by Adagrad at the rate lr.) Where features are shorter than a tenth, the bias is an input of ten times their length
    instead of 1, so that they still count. (Dividing by the power of the input is the normalised LMS filter of Nagumo and Noda,
    1967; a constant to start with is in Duchi, Hazan and Singer 2011.)

    c is that of the untrained model, and stays: the features of a transformer are layer-normalised and keep their length; those
    of words grow a hundredfold, and with them the steps of the logits, which is what they learn by (decision 0020).

    Of those features a few are far longer than all others together, and the same for all documents: one learning rate for them
    and for the rest would be right for them alone. So inputs that keep their scale are divided by their root mean square in the
    first step, to which a tenth of the mean one is added, and have the mean length they had (decision 0024).

    ``square``: s, float32 of the rows' shape, by head; four bytes per row. ``power``: r² by head. ``scale``: float32[H], what
    inputs are multiplied by, of heads with steady ones. Both are the same on all workers. Weight decay is decoupled and lazy: a
    row decays when it is updated.
    """

    def __init__(self, heads: Mapping[str, OwnedRows], decay: float) -> None:
        self.heads = heads
        self.decay = decay
        self.square = {name: torch.zeros_like(head.bias, dtype=torch.float32) for name, head in heads.items()}
        self.power: dict[str, float] = {}
        self.scale: dict[str, Tensor] = {}

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """Update the rows that have gradients, a chunk of groups at a time."""
        for name, head in self.heads.items():
            if name not in self.power and not self._start(name, head):
                for _ in head.gradients():  # dropped: only biases would learn from documents without features
                    pass
                continue
            bias_power = self._bias_power(name)
            reach = lr * math.sqrt(_INPUTS) / max(math.sqrt(self.power[name] + bias_power), _TINY)
            update = partial(
                self._update, head, self.square[name], self.scale.get(name), reach, bias_power, 1 - lr * self.decay
            )
            exact = head.weight.dtype == torch.float32  # others are rounded at random, with numbers of one generator: in order
            deque((mapped if exact else map)(update, head.gradients()), maxlen=0)

    @staticmethod
    def _update(
        head: OwnedRows,
        square: Tensor,
        scale_H: Tensor | None,
        reach: float,
        bias_power: float,
        kept: float,
        part: RowGradients | FactoredGradients,
    ) -> None:
        """Update the rows of one chunk of groups, and their accumulators ``square``."""
        bias, part = part.bias, part if scale_H is None else part.scaled(scale_H)
        total = part.square().add_(bias.square(), alpha=bias_power).add_(square[part.groups])
        square[part.groups] = total
        rate = reach / total.sqrt_().add_(_TINY)
        part = part if scale_H is None else part.scaled(scale_H)  # of the weights themselves: w x = (w / by) (by x)
        part.descend(head.weight, kept, rate)
        head.bias[part.groups] -= bias * rate * bias_power

    def _start(self, name: str, head: OwnedRows) -> bool:
        """What stays as it is in the first step: lengths, scales, and what accumulators begin with.

        False where no document of the step has features: then the next one is the first.
        """
        square_H, documents = head.input_squares()
        if not square_H.any():
            return False
        if head.steady:
            own_H, scale_H = square_H[: head.steady], torch.ones_like(square_H)
            mean = own_H.mean()
            scale_H[: head.steady] = ((1.1 * mean + _TINY) / (own_H + 0.1 * mean + _TINY)).sqrt()
            self.scale[name] = scale_H
            square_H = square_H * scale_H.square()
        self.power[name] = square_H.sum().item()
        self.square[name] += (self.power[name] + self._bias_power(name)) / max(1, documents) ** 2
        return True

    def _bias_power(self, name: str) -> float:
        """The square of the input that the bias is the weight of."""
        return min(1.0, 100 * self.power[name])


class VectorAdagrad:
    """Adagrad with one accumulator per vector, for vectors with sparse gradients, adaptive to the degree ``power``.

    A vector whose gradients' mean squares sum to s has the rate lr s^-p m^(p - 1/2), where m is the mean of s over the vectors
    of the step: p = 1/2 is Adagrad, and p = 0 gives all of them one rate. (The exponent is that of Padam, Chen et al. 2018.)
    Adagrad moves a vector by the whole rate when it is first seen, however rare it is, so that rare terms are memorised.

    ``vectors``: [V, H] each, by name; ``square``: float32[V], the s of each.
    """

    def __init__(self, vectors: Mapping[str, nn.Parameter], power: float) -> None:
        self.vectors, self.power = vectors, power
        self.square = {name: torch.zeros(len(parameter), device=parameter.device) for name, parameter in vectors.items()}

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """Update the vectors that have a (coalesced) gradient, and clear it. There is no weight decay."""
        for name, parameter in self.vectors.items():
            if parameter.grad is None:
                continue
            square_V = self.square[name]
            index_N, gradient_NH = parameter.grad._indices()[0], parameter.grad._values()
            square_N = gradient_NH.square().mean(1).add_(square_V[index_N])
            square_V[index_N] = square_N
            rate_N = lr / (square_N.pow(self.power) * square_N.mean().pow(0.5 - self.power)).add_(_TINY)
            parameter.data.index_add_(0, index_N, gradient_NH * rate_N[:, None], alpha=-1)
            parameter.grad = None


def gathered_sparse(gradient: Tensor, exchange: Exchange) -> Tensor:
    """The coalesced sum of all workers' sparse gradients [V, H]: traffic is by the words of a step, not by the vocabulary."""
    gradient = gradient.coalesce()
    if exchange.world == 1:
        return gradient
    (counts,) = exchange.counts(gradient._nnz(), device=gradient.device)
    ids = exchange.gather(gradient.indices()[0], counts, "word gradients")
    values = exchange.gather(gradient.values(), counts, "word gradients")
    return torch.sparse_coo_tensor(ids[None], values, gradient.shape, check_invariants=False).coalesce()


def clip(parameters: Iterable[nn.Parameter], norm: float, most: float) -> None:
    """Scale gradients, dense and coalesced sparse ones, of a joint ``norm``, to one of ``most``; 0 does not clip."""
    if 0 < most < norm:
        torch._foreach_mul_(_values(parameters), (most / torch.tensor(norm, dtype=torch.float32)).item())


def _values(parameters: Iterable[nn.Parameter]) -> list[Tensor]:
    """The gradients, of sparse ones the values."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    return [gradient._values() if gradient.is_sparse else gradient for gradient in gradients]


def learning_rate_factor(progress: float, config: OptimConfig) -> float:
    """Share of the peak learning rate: linear warm-up, then linear decay to 0 (or constant)."""
    rising = progress / config.warmup if config.warmup > 0 else 1.0
    falling = (1 - progress) / max(1 - config.warmup, 1e-9) if config.decay else 1.0
    return max(0.0, min(rising, falling, 1.0))


class Averager:
    """Equal average of the weights at every ``swa_every``-th step from ``swa_start`` on (Izmailov et al. 2018).

    ``averaged``: float32, by parameter name, of this worker's rows; empty before the first. ``count``: sets averaged.
    It takes the memory of one table, where `torch.optim.swa_utils.AveragedModel` takes up to three (decision 0019).
    """

    def __init__(self, config: OptimConfig) -> None:
        self.config = config
        self.averaged: dict[str, Tensor] = {}
        self.count = 0

    @torch.no_grad()
    def update(self, model: nn.Module, step: int, progress: float) -> None:
        """Include the weights of this step in the average if it is one of those."""
        if progress < self.config.swa_start or step % self.config.swa_every:
            return
        self.count += 1
        for name, parameter in model.named_parameters():
            if self.count == 1:
                self.averaged[name] = torch.zeros_like(parameter, dtype=torch.float32)
            for average, part in zip(self.averaged[name].split(_ROWS), parameter.split(_ROWS), strict=True):
                average.lerp_(part.float(), 1 / self.count)

    @contextmanager
    def in_use(self, model: nn.Module) -> Iterator[None]:
        """Give ``model`` the averaged weights, if there are any, for the duration of the block."""
        own = {name: parameter.data for name, parameter in model.named_parameters()}
        try:
            self.keep(model)
            yield
        finally:
            for name, parameter in model.named_parameters():
                parameter.data = own[name]

    def keep(self, model: nn.Module) -> None:
        """Give ``model`` the averaged weights, if there are any, for good."""
        for name, parameter in model.named_parameters():
            parameter.data = self.averaged.get(name, parameter.data).to(parameter.dtype)


def _by_decay(parameters: list[nn.Parameter], decay: float) -> list[tuple[list[nn.Parameter], float]]:
    """Matrices decay; vectors do not (biases, gains of normalisation layers)."""
    matrices = [parameter for parameter in parameters if parameter.ndim > 1]
    return [(matrices, decay), ([parameter for parameter in parameters if parameter.ndim <= 1], 0.0)]
