"""Banks: the places that home slabs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

import torch

from vllm_moecxl.config import BankSpec
from vllm_moecxl.data.host import anonymous_tensor
from vllm_moecxl.errors import CapacityError
from vllm_moecxl.units import format_bytes


class Bank(Protocol):
    """One place that homes slabs.

    Attributes:
        name: its label in logs and metrics.
        tier: "cxl", "dram" or "file".
        used_bytes: bytes handed out.
    """

    name: str
    tier: str
    used_bytes: int

    def allocate(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """A contiguous host tensor in this bank, exactly as large as asked (rounded up to pages), contents undefined.

        Raises:
            CapacityError: the bank is full.
        """


class DramBank:
    """Anonymous memory of this process, mapped in exact sizes.

    Args:
        capacity_bytes: bytes that it may hand out; None for no limit but the machine's.
    """

    tier = "dram"

    def __init__(self, capacity_bytes: int | None = None, name: str = "dram") -> None:
        self.name = name
        self.capacity_bytes = capacity_bytes
        self.used_bytes = 0

    def allocate(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        byte_count = math.prod(shape) * dtype.itemsize
        if self.capacity_bytes is not None and self.used_bytes + byte_count > self.capacity_bytes:
            raise CapacityError(
                f"--moe-offload-config: bank {self.name} holds {format_bytes(self.capacity_bytes)}, has "
                f"{format_bytes(self.used_bytes)} in use and cannot take {format_bytes(byte_count)} more: "
                "raise its size"
            )
        tensor = anonymous_tensor(shape, dtype)
        self.used_bytes += byte_count
        return tensor


def make_bank(spec: BankSpec) -> Bank:
    """The bank that the user named."""
    assert spec.kind == "dram"
    return DramBank(spec.capacity_bytes)
