"""Remember what `create_weights` puts into a tensor before any checkpoint is read.

Experts are created on the meta device, where `torch.zeros` and `torch.ones` leave nothing behind. Values that the
checkpoint never overwrites (padding, absent biases, default scales) would then be somebody's old memory.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_FILLS: dict[Callable[..., Any], Callable[..., float]] = {
    torch.zeros: lambda *args, **kwargs: 0,
    torch.zeros_like: lambda *args, **kwargs: 0,
    torch.ones: lambda *args, **kwargs: 1,
    torch.ones_like: lambda *args, **kwargs: 1,
    torch.full: lambda size, fill_value, **kwargs: fill_value,
    torch.full_like: lambda tensor, fill_value, **kwargs: fill_value,
}


class InitialValues(TorchFunctionMode):
    """A mode under which tensors are made on the meta device and their fill values are kept."""

    def __init__(self) -> None:
        super().__init__()
        # A parameter shares its storage with the tensor that it was made from; the storages stay alive in here, so an
        # address is never used twice.
        self._fills: dict[int, tuple[torch.UntypedStorage, float]] = {}

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        with torch.device("meta"):
            result = func(*args, **(kwargs or {}))
        if (fill := _FILLS.get(func)) is not None:
            storage = result.untyped_storage()
            self._fills[storage._cdata] = (storage, fill(*args, **(kwargs or {})))
        return result

    def of(self, tensor: torch.Tensor) -> float | None:
        """The value that every element of a created tensor had; None where it was left undefined."""
        known = self._fills.get(tensor.untyped_storage()._cdata)
        return None if known is None else known[1]
