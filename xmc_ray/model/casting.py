"""Fewer casts within torch's autocast, and not a bit of difference.

Autocast casts each weight and each bias of a linear layer by a kernel of its own, and their gradients likewise: 144 kernels
forward and 144 backward for a BERT of twelve layers, most of them shorter than it takes to launch them.
"""

import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

_TOGETHER = 1 << 24  # numbers: about as many as one kernel of CUDA takes; more would keep workers waiting for the gradients

_LOCKS: WeakKeyDictionary[nn.Module, threading.RLock] = WeakKeyDictionary()  # not in the models, which are pickled
_LOCK = threading.Lock()


@contextmanager
def used_alone(model: nn.Module) -> Iterator[None]:
    """Other threads wait until the block ends before they use ``model`` in such a block."""
    with _LOCK:
        own = _LOCKS.setdefault(model, threading.RLock())
    with own:
        yield


@contextmanager
def cast_together(model: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """The weights and biases of ``model``'s linear layers are of ``dtype`` within the block, cast by a few kernels.

    Belongs inside `torch.autocast`, which would cast them to that type anyway. Gradients reach the float32 parameters by as few
    kernels. Until the block ends, nobody else may use the model; another thread that would cast it waits.
    """
    with used_alone(model):
        yield from _cast_layers(model, dtype)


def _cast_layers(model: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    layers = [part for part in model.modules() if type(part).forward is nn.Linear.forward]
    own = [{name: part for name, part in layer._parameters.items() if part is not None} for layer in layers]
    cast: dict[Tensor, Tensor] = {}
    for group in _groups(part for parts in own for part in parts.values()):
        cast.update(zip(group, _CastTogether.apply(dtype, *group), strict=True))  # type: ignore[no-untyped-call]
    try:
        for layer, parts in zip(layers, own, strict=True):
            layer._parameters.update({name: cast[part] for name, part in parts.items()})  # type: ignore[misc]
        yield
    finally:
        for layer, parts in zip(layers, own, strict=True):
            layer._parameters.update(parts)


def _groups(weights: Iterable[Tensor]) -> list[list[Tensor]]:
    """Distinct weights in their order, trained and frozen ones apart, `_TOGETHER` numbers at a time."""
    groups: dict[tuple[bool, int], list[Tensor]] = {}
    numbers = 0
    for weight in dict.fromkeys(weights):
        groups.setdefault((weight.requires_grad, numbers // _TOGETHER), []).append(weight)
        numbers += weight.numel()
    return [*groups.values()]


class _CastTogether(torch.autograd.Function):
    """Casts tensors, and their gradients back to float32, by one kernel each."""

    @staticmethod
    def forward(ctx, dtype, *wide):  # type: ignore[no-untyped-def]
        ctx.set_materialize_grads(False)
        return _cast(wide, dtype)

    @staticmethod
    def backward(ctx, *narrow):  # type: ignore[no-untyped-def]
        wide = iter(_cast([gradient for gradient in narrow if gradient is not None], torch.float32))
        return None, *(None if gradient is None else next(wide) for gradient in narrow)


def _cast(tensors: list[Tensor] | tuple[Tensor, ...], dtype: torch.dtype) -> tuple[Tensor, ...]:
    made = tuple(torch.empty_like(tensor, dtype=dtype) for tensor in tensors)
    if made:
        torch._foreach_copy_(made, tensors)
    return made
