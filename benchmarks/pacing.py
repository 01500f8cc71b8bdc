"""How fast this machine copies, and banks that are paced to a share of that."""

from __future__ import annotations

import ctypes
import time
from statistics import median
from typing import Any

import torch

from vllm_moecxl.data.host import anonymous_tensor
from vllm_moecxl.units import GIB, MIB

_COPY_BYTES = GIB
_PIECE_BYTES = MIB
_COPY_COUNT = 5
#: Source: the CXL devices of the MoE-CXL paper have 214 to 394 ns.
_LATENCY = "300ns"


def copy_bytes_per_s() -> float:
    """What one thread copies from memory to memory, in pieces as a fetch does."""
    source, target = (anonymous_tensor((_COPY_BYTES,), torch.uint8).fill_(value) for value in (1, 2))
    source_address, target_address = source.data_ptr(), target.data_ptr()
    times_s = []
    for _ in range(_COPY_COUNT):
        started_s = time.perf_counter()
        for start in range(0, _COPY_BYTES, _PIECE_BYTES):
            ctypes.memmove(target_address + start, source_address + start, _PIECE_BYTES)
        times_s.append(time.perf_counter() - started_s)
    return _COPY_BYTES / median(times_s)


def paced_bank(bytes_per_s: float) -> str:
    """A bank for `banks` that reads at this rate, with the latency of a CXL device."""
    return f"emulated:{_LATENCY},{round(bytes_per_s / 1e6)}MB/s"


def keeps_pace(model: Any) -> bool:
    """Whether the emulated banks of an engine's model took no longer than their devices would; for `apply_model`."""
    return all(bank.keeps_pace for bank in model.moe_offload_runtime.banks)
