"""Optimisers, learning-rate schedule and weight averaging.

All of them follow *progress*, the share of the training that is done (0 to 1), so that a run limited by time and a run
limited by epochs share one schedule.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from xmc_ray.errors import ConfigError
from xmc_ray.model.sharding import Exchange, OwnedRows

_ROWS = 4096  # of a parameter are averaged at a time: no second copy of a whole table
_TINY = 1e-10  # keeps a row without any gradient from dividing by zero


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """Learning rates, their schedule and stochastic weight averaging (SWA)."""

    encoder_lr: float = 5e-5
    """Peak learning rate of the encoder."""
    head_lr: float = 1e-3
    """Peak learning rate of the bottleneck and of the lexical branch's layer."""
    rows_lr: float = 0.08
    """Peak learning rate of recall head and label table: about the length of a number's first step (row-wise Adagrad)."""
    lexical_lr: float = 0.2
    """Peak learning rate of the lexical branch's vectors."""
    lexical_power: float = 0.25
    """How far a term's own gradients decide on its steps: 0.5 is row-wise Adagrad, 0 gives rare and frequent terms one rate."""
    weight_decay: float = 0.01
    """Decoupled weight decay; biases and normalisation layers have none."""
    warmup: float = 0.05
    """Share of the training in which learning rates rise from 0 to their peak."""
    decay: bool = True
    """Let learning rates fall linearly to 0 after the warm-up; false keeps them at their peak."""
    clip_norm: float = 10.0
    """Largest norm of the gradient of the encoder, and of the bottleneck, each on its own; 0 turns clipping off."""
    swa_start: float = 1.0
    """Share of the training after which weights are averaged; 1 turns averaging off."""
    swa_every: int = 50
    """Steps from one averaged set of weights to the next."""

    def __post_init__(self) -> None:
        if not 0 <= self.lexical_power <= 0.5:
            raise ConfigError("optim.lexical_power does not fit", found=self.lexical_power, expected="0 to 0.5")


class Optimizer:
    """A rule for each kind of weights, all driven by progress.

    - AdamW for what is dense: the transformer and the bottleneck, the same on all workers;
    - lazy Adam for the transformer's word vectors (`torch.optim.SparseAdam`): a step moves those of the words it has seen;
    - partially row-wise Adagrad for the lexical branch's vectors, the same on all workers, as lazily (decision 0012);
    - row-wise Adagrad for recall head and label table, each worker for the rows it owns.
    """

    def __init__(self, model: nn.Module, encoder: nn.Module | None, config: OptimConfig) -> None:
        """``encoder`` is the part of ``model`` that has the encoder's learning rate; the rest are heads."""
        self.config = config
        self.exchange: Exchange = getattr(model, "exchange", None) or Exchange()
        self.names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
        self.words = [] if encoder is None else word_vectors(encoder)
        self.terms = VectorAdagrad(term_vectors(model), config.lexical_power)
        of_encoder, seen = [] if encoder is None else _trained(encoder), {id(parameter) for parameter in self.words}
        elsewhere = {id(parameter) for parameter in (*of_encoder, *self.terms.vectors)}
        heads = [parameter for parameter in _trained(model) if id(parameter) not in elsewhere]
        self.parts = {name: part for name, part in (("encoder_lr", of_encoder), ("head_lr", heads)) if part}
        dense = [parameter for parameter in of_encoder if id(parameter) not in seen]
        groups = [
            {"params": parameters, "lr": peak, "peak": peak, "weight_decay": decay}
            for part, peak in ((dense, config.encoder_lr), (heads, config.head_lr))
            for parameters, decay in _by_decay(part, config.weight_decay)
        ]
        groups = [group for group in groups if group["params"]]
        self.adamw = torch.optim.AdamW(groups, fused=True) if groups else None
        words = [{"params": self.words, "lr": config.encoder_lr, "peak": config.encoder_lr}]
        self.lazy_adam = torch.optim.SparseAdam(words) if self.words else None
        self.rows = RowAdagrad(getattr(model, "heads", {}), config.weight_decay)
        self.factor = 0.0

    def step(self, progress: float) -> None:
        """Clip, update with the learning rates that belong to ``progress``, and clear the gradients."""
        self.factor = learning_rate_factor(progress, self.config)
        for parameter in (*self.words, *self.terms.vectors):
            if parameter.grad is not None:
                parameter.grad = gathered_sparse(parameter.grad, self.exchange)
        for part in self.parts.values():
            clip(part, self.config.clip_norm)
        for optimizer in (self.adamw, self.lazy_adam):
            if optimizer is not None:
                for group in optimizer.param_groups:
                    group["lr"] = group["peak"] * self.factor
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
        self.terms.step(self.config.lexical_lr * self.factor)
        self.rows.step(self.config.rows_lr * self.factor)

    def dense_state(self) -> dict[str, Tensor]:
        """What is remembered of replicated weights, by ``optimizer.<parameter>.<quantity>``; the same on all workers."""
        squares = zip(self.terms.vectors, self.terms.square, strict=True)
        return {f"optimizer.{self.names[parameter]}.square": square for parameter, square in squares} | {
            f"optimizer.{self.names[parameter]}.{quantity}": torch.as_tensor(value)
            for optimizer in (self.adamw, self.lazy_adam)
            if optimizer is not None
            for parameter, state in optimizer.state.items()
            for quantity, value in state.items()
        }

    def load_dense_state(self, tensors: Mapping[str, Tensor]) -> None:
        """The inverse of `dense_state`."""
        parameters = {name: parameter for parameter, name in self.names.items()}
        words = {id(parameter) for parameter in self.words}
        for name, tensor in tensors.items():
            name, _, quantity = name.removeprefix("optimizer.").rpartition(".")
            parameter = parameters[name]
            if quantity == "square":
                self.terms.square[[*map(id, self.terms.vectors)].index(id(parameter))].copy_(tensor)
            elif id(parameter) in words:
                assert self.lazy_adam is not None
                self.lazy_adam.state[parameter][quantity] = int(tensor) if quantity == "step" else tensor.to(parameter.device)
            else:
                assert self.adamw is not None
                self.adamw.state[parameter][quantity] = tensor.to(parameter.device)

    def learning_rates(self) -> dict[str, float]:
        """Learning rates of the last step, of the parts of the model that learn."""
        names = [*self.parts, *(["lexical_lr"] if self.terms.vectors else []), "rows_lr"]
        return {name: getattr(self.config, name) * self.factor for name in names}


class RowAdagrad:
    """Adagrad with one accumulator a row: the mean square of a row's gradients so far, its bias included.

    ``square``: by head, float32 of the rows' shape: four bytes a row, all the state there is. Weight decay is decoupled and
    lazy: a row decays when it is touched.
    """

    def __init__(self, heads: Mapping[str, OwnedRows], decay: float) -> None:
        self.heads = heads
        self.decay = decay
        self.square = {name: torch.zeros_like(head.bias, dtype=torch.float32) for name, head in heads.items()}

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """Update the rows whose gradients are due, a chunk of groups at a time."""
        for name, head in self.heads.items():
            for part in head.gradients():
                bias = part.bias
                mean = part.square().add_(bias.square()) / (head.weight.shape[-1] + 1)
                square = mean.add_(self.square[name][part.groups])
                self.square[name][part.groups] = square
                rate = lr / square.sqrt_().add_(_TINY)
                part.descend(head.weight, 1 - lr * self.decay, rate)
                head.bias[part.groups] -= bias * rate


class VectorAdagrad:
    """Adagrad with one accumulator a vector, for vectors with sparse gradients, adaptive as far as ``power`` says.

    The rate of a vector whose gradients' mean squares add up to s is lr s^-p m^(p - 1/2), m being the mean of s over the
    vectors of the step: p = 1/2 is Adagrad, and p = 0 gives all the same rate. (The exponent is that of Padam, Chen et al.
    2018.) Adagrad moves a vector by the whole rate when it is first seen, however rare it is: rare terms learn by heart.

    ``square``: float32[V], the s, for each of ``vectors`` [V, H].
    """

    def __init__(self, vectors: list[nn.Parameter], power: float) -> None:
        self.vectors, self.power = vectors, power
        self.square = [torch.zeros(len(parameter), device=parameter.device) for parameter in vectors]

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """Update the vectors that have a gradient (coalesced), and forget it. There is no decay."""
        for parameter, square_V in zip(self.vectors, self.square, strict=True):
            if parameter.grad is None:
                continue
            index_N, gradient_NH = parameter.grad._indices()[0], parameter.grad._values()
            square_N = gradient_NH.square().mean(1).add_(square_V[index_N])
            square_V[index_N] = square_N
            rate_N = lr / (square_N.pow(self.power) * square_N.mean().pow(0.5 - self.power)).add_(_TINY)
            parameter.data.index_add_(0, index_N, gradient_NH * rate_N[:, None], alpha=-1)
            parameter.grad = None


def term_vectors(model: nn.Module) -> list[nn.Parameter]:
    """The vectors of the lexical branch, if there is one."""
    bags = [module for module in model.modules() if isinstance(module, nn.EmbeddingBag)]
    return [parameter for module in bags for parameter in module.parameters() if parameter.requires_grad]


def word_vectors(encoder: nn.Module) -> list[nn.Parameter]:
    """The parameters of ``encoder`` whose gradients are sparse, in order."""
    embeddings = [module for module in encoder.modules() if isinstance(module, nn.Embedding) and module.sparse]
    return [parameter for module in embeddings for parameter in module.parameters() if parameter.requires_grad]


def gathered_sparse(gradient: Tensor, exchange: Exchange) -> Tensor:
    """The sum of all workers' sparse gradients [V, H], coalesced: what is sent is the words of a step, not the vocabulary."""
    gradient = gradient.coalesce()
    if exchange.world == 1:
        return gradient
    (counts,) = exchange.counts(gradient._nnz(), device=gradient.device)
    ids = exchange.gather(gradient.indices()[0], counts, "word gradients")
    values = exchange.gather(gradient.values(), counts, "word gradients")
    return torch.sparse_coo_tensor(ids[None], values, gradient.shape, check_invariants=False).coalesce()


def clip(parameters: list[nn.Parameter], norm: float) -> None:
    """Scale gradients, dense or sparse, so that all together they are at most ``norm`` long; 0 leaves them."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if norm <= 0 or not gradients:
        return
    values = [gradient._values() if gradient.is_sparse else gradient for gradient in gradients]
    scale = (norm / nn.utils.get_total_norm(values).clamp(min=norm)).item()
    if scale < 1:
        torch._foreach_mul_(values, scale)


def learning_rate_factor(progress: float, config: OptimConfig) -> float:
    """Share of the peak learning rate: linear warm-up, then linear decay to 0 (or constant)."""
    rising = progress / config.warmup if config.warmup > 0 else 1.0
    falling = (1 - progress) / max(1 - config.warmup, 1e-9) if config.decay else 1.0
    return max(0.0, min(rising, falling, 1.0))


class Averager:
    """Equal average of the weights at every ``swa_every``-th step from ``swa_start`` on (Izmailov et al. 2018).

    ``averaged``: float32, by parameter name, of this worker's rows; empty before the first. ``count``: sets averaged.
    """

    def __init__(self, config: OptimConfig) -> None:
        self.config = config
        self.averaged: dict[str, Tensor] = {}
        self.count = 0

    @torch.no_grad()
    def update(self, model: nn.Module, step: int, progress: float) -> None:
        """Take the weights of this step into the average, if it is their turn."""
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
        """Inside, ``model`` has the averaged weights, once there are some; afterwards its own again."""
        own = {name: parameter.data for name, parameter in model.named_parameters()}
        try:
            self.keep(model)
            yield
        finally:
            for name, parameter in model.named_parameters():
                parameter.data = own[name]

    def keep(self, model: nn.Module) -> None:
        """Give ``model`` the averaged weights for good, once there are some."""
        for name, parameter in model.named_parameters():
            parameter.data = self.averaged.get(name, parameter.data).to(parameter.dtype)


def _trained(module: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


def _by_decay(parameters: list[nn.Parameter], decay: float) -> list[tuple[list[nn.Parameter], float]]:
    """Matrices decay; vectors do not (biases, gains of normalisation layers)."""
    matrices = [parameter for parameter in parameters if parameter.ndim > 1]
    return [(matrices, decay), ([parameter for parameter in parameters if parameter.ndim <= 1], 0.0)]
