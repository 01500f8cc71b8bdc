"""Banks, homes and movers for tests: small, in DRAM, and filled with every bit pattern."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import torch

from vllm_moecxl.config import Verify
from vllm_moecxl.control.placement import Part, Route
from vllm_moecxl.data.banks.base import Bank, BankProfile
from vllm_moecxl.data.banks.memory import DramBank
from vllm_moecxl.data.devices.base import DeviceBackend
from vllm_moecxl.data.devices.cpu import CpuBackend
from vllm_moecxl.data.mover import Mover
from vllm_moecxl.data.slabs import Cells, Home, HomeBuilder
from vllm_moecxl.runtime.counters import Counters
from vllm_moecxl.types import Cause

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
    builder = HomeBuilder(banks, verify)
    return builder.store("layer", tensors, [WHOLE] * expert_count if routes is None else routes)


def banks_of(home: Home) -> list[Bank]:
    """The banks that a home's slabs can be read from."""
    return list({shard.bank.name: shard.bank for shard in home.shards}.values())


def fetch(
    home: Home,
    cells: Cells,
    expert_ids: Sequence[int],
    cell_ids: Sequence[int],
    *,
    backend: DeviceBackend | None = None,
    has_hands: bool = False,
) -> None:
    """Have slabs brought into cells of the host, or of `backend`, and wait for them; nothing is under way after."""
    banks = banks_of(home)
    counters = Counters([bank.name for bank in banks])
    mover = Mover(banks, backend or CpuBackend(), counters, has_hands=has_hands)
    fetches = [
        mover.start(home, expert_id, cells.rows(cell_id), Cause.DEMAND, 0.0)
        for expert_id, cell_id in zip(expert_ids, cell_ids, strict=True)
    ]
    try:
        mover.wait(fetches)
    finally:
        mover.cancel(fetches)
        end_hands(mover)


def hands(mover: Mover) -> list[threading.Thread]:
    """The threads that carry for a mover now."""
    threads = threading.enumerate()
    return [one for one in threads if getattr(getattr(one, "_target", None), "__self__", None) is mover]


def end_hands(mover: Mover) -> None:
    """Close a mover and see its threads end."""
    mover.close()
    for thread in hands(mover):
        thread.join(20)
        assert not thread.is_alive(), f"{thread.name} outlives its mover"


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
