"""Banks and homes for tests: small, in DRAM, and filled with every bit pattern."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from vllm_moecxl.config import Verify
from vllm_moecxl.control.placement import Part, Route
from vllm_moecxl.data.banks.base import Bank, BankProfile
from vllm_moecxl.data.banks.memory import DramBank
from vllm_moecxl.data.links import Links
from vllm_moecxl.data.slabs import Home, HomeBuilder

PROFILE = BankProfile(latency_s=100e-9, read_bytes_per_s=50e9, source="published")
#: Everything in the first bank.
WHOLE: Route = (Part(0, 1.0),)


def dram(name: str = "dram", capacity_bytes: int | None = None) -> DramBank:
    """A bank of plain memory."""
    return DramBank(name, name, capacity_bytes, PROFILE)


def store(
    tensors: dict[str, torch.Tensor],
    routes: Sequence[Route] | None = None,
    banks: Sequence[Bank] | None = None,
    verify: Verify = "load",
) -> Home:
    """A home for `tensors`, which it empties; in one bank of DRAM where nothing else is said."""
    banks = [dram()] if banks is None else banks
    expert_count = len(next(iter(tensors.values())))
    builder = HomeBuilder(banks, Links(len(banks)), verify)
    return builder.store("layer", tensors, [WHOLE] * expert_count if routes is None else routes)


def random_bits(shape: Sequence[int], dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """A tensor of random bytes: every bit pattern has to survive, NaNs too."""
    generator = torch.Generator().manual_seed(seed)
    raw = torch.randint(256, (*shape[:-1], shape[-1] * dtype.itemsize), dtype=torch.uint8, generator=generator)
    return raw.view(dtype)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor's bytes in order."""
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def assert_same_bits(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal in shape, type and every bit."""
    assert actual.shape == expected.shape and actual.dtype == expected.dtype
    assert torch.equal(bits(actual), bits(expected))
