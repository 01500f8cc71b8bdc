"""Slabs and slots in guarded memory, for the gather."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from moecxl_kernels.gather import SlabMap, slab_map

#: Bytes around every row that no kernel may touch.
GUARD_BYTES = 32
_CANARY = 0xA5


@dataclass(frozen=True)
class Part:
    """One segment of a slab: an extent, or a stripe part of one.

    Attributes:
        size: bytes.
        source_shift: misalignment of expert 0's row.
        target_shift: misalignment of slot 0's row.
        source_gap: bytes between the rows of experts.
        target_gap: bytes between the rows of slots.
    """

    size: int
    source_shift: int = 0
    target_shift: int = 0
    source_gap: int = 0
    target_gap: int = 0


class Rows:
    """[count, size] rows of bytes in a buffer, `gap` bytes apart, with guards around them."""

    def __init__(self, count: int, size: int, shift: int, gap: int, seed: int | None) -> None:
        self.stride = size + gap
        self.buffer = torch.full((count * self.stride + 2 * GUARD_BYTES + 32,), _CANARY, dtype=torch.uint8)
        first = GUARD_BYTES + -(self.buffer.data_ptr() + GUARD_BYTES) % 16 + shift
        self.view = self.buffer[first : first + count * self.stride].view(count, self.stride)[:, :size]
        if seed is not None:
            random = torch.Generator().manual_seed(seed)
            self.view.copy_(torch.randint(0, 256, self.view.shape, dtype=torch.uint8, generator=random))

    @property
    def address(self) -> int:
        return self.view.data_ptr() if self.view.numel() else self.buffer.data_ptr()

    def addresses(self) -> list[int]:
        """Of each row."""
        return [self.address + row * self.stride for row in range(len(self.view))]


class Stage:
    """Homes of experts and slots, and the map of both.

    Attributes:
        homes: of each segment, the rows of all experts.
        slots: of each segment, the rows of all slots.
    """

    def __init__(self, parts: Sequence[Part], expert_count: int, slot_count: int) -> None:
        self.homes = [Rows(expert_count, p.size, p.source_shift, p.source_gap, seed) for seed, p in enumerate(parts)]
        self.slots = [Rows(slot_count, p.size, p.target_shift, p.target_gap, None) for p in parts]
        self._homes_before = [rows.buffer.clone() for rows in self.homes]
        self._slots_before = [rows.buffer.clone() for rows in self.slots]
        self.slabs: SlabMap = slab_map(
            list(zip(*(rows.addresses() for rows in self.homes), strict=True)) if parts else [[]] * expert_count,
            [rows.address for rows in self.slots],
            [rows.stride for rows in self.slots],
            [part.size for part in parts],
            "cpu",
        )

    def check(self, copies: Sequence[tuple[int, int]]) -> None:
        """These were copied, and no other byte has changed."""
        for homes, homes_before, slots, slots_before in zip(
            self.homes, self._homes_before, self.slots, self._slots_before, strict=True
        ):
            assert torch.equal(homes.buffer, homes_before)
            expected = slots_before.clone()
            rows = expected.as_strided(slots.view.shape, slots.view.stride(), slots.view.storage_offset())
            for expert_id, slot_id in copies:
                rows[slot_id] = homes.view[expert_id]
            assert torch.equal(slots.buffer, expected)


def int32(rows: Sequence[Sequence[int]] | Sequence[int], *shape: int) -> torch.Tensor:
    """A table for a kernel, of the shape of `rows` if none is named."""
    table = torch.tensor(rows, dtype=torch.int32)
    return table.reshape(shape) if shape else table
