"""Counts the memory accesses of interpreted kernels.

`python -m tests.kernels.traffic` prints, for each kernel that moves slabs, bytes moved / bytes of the slabs, as JSON.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from moecxl_kernels.gather import copy_cells, gather_slabs
from triton.runtime import interpreter

from tests.kernels.stage import Part, Stage, int32


class Traffic:
    """Every access of the kernels that run meanwhile.

    Attributes:
        loads: (addresses [n] uint64, bytes of each) of each load.
        stores: the same of each store.
    """

    def __init__(self) -> None:
        self.loads: list[tuple[np.ndarray, int]] = []
        self.stores: list[tuple[np.ndarray, int]] = []

    def reads_of(self, buffer: torch.Tensor) -> np.ndarray:
        """[bytes] int64: how often each byte of a buffer was read."""
        return _count(self.loads, buffer)

    def writes_of(self, buffer: torch.Tensor) -> np.ndarray:
        """[bytes] int64: how often each byte of a buffer was written."""
        return _count(self.stores, buffer)

    def words_of(self, buffer: torch.Tensor) -> list[int]:
        """First address of each access to a buffer in words of 4 bytes, which the device makes 128 bits wide."""
        first, last = buffer.data_ptr(), buffer.data_ptr() + buffer.nbytes
        accesses = self.loads + self.stores
        starts = [int(addresses.min()) for addresses, size in accesses if size == 4 and len(addresses)]
        return [start for start in starts if first <= start < last]


def _count(accesses: list[tuple[np.ndarray, int]], buffer: torch.Tensor) -> np.ndarray:
    counts = np.zeros(buffer.nbytes, dtype=np.int64)
    for addresses, size in accesses:
        starts = addresses.astype(np.int64) - buffer.data_ptr()
        places = starts[:, None] + np.arange(size)
        np.add.at(counts, places[(places >= 0) & (places < buffer.nbytes)], 1)
    return counts


@contextmanager
def traffic() -> Iterator[Traffic]:
    """Count, until the end of the block."""
    seen = Traffic()
    builder = interpreter.InterpreterBuilder
    load, store = builder.create_masked_load, builder.create_masked_store

    def note(accesses: list[tuple[np.ndarray, int]], pointers: Any, mask: Any, itemsize: int) -> None:
        accesses.append((pointers.data[np.broadcast_to(mask.data, pointers.data.shape)].ravel(), itemsize))

    def counted_load(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        loaded = load(self, pointers, mask, *rest)
        note(seen.loads, pointers, mask, loaded.data.itemsize)
        return loaded

    def counted_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        note(seen.stores, pointers, mask, value.data.itemsize)
        return store(self, pointers, value, mask, *rest)

    builder.create_masked_load, builder.create_masked_store = counted_load, counted_store
    try:
        yield seen
    finally:
        builder.create_masked_load, builder.create_masked_store = load, store


def _moved_per_needed(move: Callable[[Stage], None], copy_count: int) -> float:
    """Of a slab of large, small, odd and misaligned segments: bytes read and written / twice its bytes."""
    parts = [Part(100_000), Part(48), Part(3), Part(40_007, source_shift=5), Part(64, target_shift=8, target_gap=3)]
    stage = Stage(parts, expert_count=6, slot_count=6)
    with traffic() as seen:
        move(stage)
    moved = sum(seen.reads_of(rows.buffer).sum() for rows in (*stage.homes, *stage.slots))
    moved += sum(seen.writes_of(rows.buffer).sum() for rows in (*stage.homes, *stage.slots))
    return float(moved / (2 * copy_count * sum(part.size for part in parts)))


def _main() -> None:
    copies, count = int32([[5, 0], [2, 3], [1, 4]]), int32([3])
    ratios = {
        "gather_slabs": _moved_per_needed(lambda stage: gather_slabs(copies, count, stage.slabs, 4), 3),
        "copy_cells": _moved_per_needed(lambda stage: copy_cells(copies, count, stage.slabs, 6, 4), 3),
    }
    print(json.dumps(ratios))


if __name__ == "__main__":
    _main()
