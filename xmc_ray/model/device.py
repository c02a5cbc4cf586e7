"""What depends on the device that a model is on: copies to it, and what it can compute.

A host runs ahead of an accelerator and waits for it where it reads a result, or a size that depends on one. So sizes are
settled on the host, from what the host knows, and copies to the device lie in pinned memory, from which they are asynchronous.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


def upload(tensor: Tensor, device: torch.device) -> Tensor:
    """``tensor`` on ``device``; the host does not wait for the copy."""
    if tensor.device == device or device.type == "cpu":
        return tensor.to(device)
    return (tensor.pin_memory() if tensor.device.type == "cpu" else tensor).to(device, non_blocking=True)


def download(*tensors: Tensor) -> list[Tensor]:
    """``tensors``, float32 or int64, on the host, in one copy of those that are elsewhere."""
    if all(tensor.device.type == "cpu" for tensor in tensors):
        return list(tensors)
    # float32 travels by its bits
    flat = [(tensor.view(torch.int32) if tensor.dtype == torch.float32 else tensor).flatten().long() for tensor in tensors]
    parts = torch.cat(flat).cpu().split([tensor.numel() for tensor in tensors])
    return [
        (part.int().view(torch.float32) if tensor.dtype == torch.float32 else part).view(tensor.shape)
        for part, tensor in zip(parts, tensors, strict=True)
    ]


def has_bfloat16(device: torch.device) -> bool:
    """Whether an accelerator has instructions for bfloat16, as GPUs of compute capability 8 and later do."""
    return bool(torch.get_device_module(device).is_bf16_supported(including_emulation=False))


def has_grouped_kernel(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether `grouped_mm` is one kernel on this accelerator; else it copies its offsets to the host and loops over groups."""
    if dtype != torch.bfloat16:
        return False
    return torch.get_device_module(device).get_device_capability(device)[0] in (9, 10)


class KnownMask(TorchFunctionMode):
    """Answers from the host whether a padding mask is all true, which transformers asks of the device for every batch.

    ``mask_BT``: bool, on the host; the mask on the device may have fewer columns.
    """

    def __init__(self, mask_BT: Tensor) -> None:
        super().__init__()
        self.mask_BT = mask_BT

    def __torch_function__(
        self, function: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if function is Tensor.all and len(args) == 1 and args[0].dtype == torch.bool and not kwargs:
            rows, *columns = args[0].shape
            if rows == len(self.mask_BT) and len(columns) == 1 and columns[0] <= self.mask_BT.shape[1]:
                return self.mask_BT[:, : columns[0]].all()
        return function(*args, **(kwargs or {}))
