"""Slab layouts, homes and slots of one layer: every per-expert tensor, and the cells that its rows are copied to.

A *slab* is one expert's row of each per-expert tensor. A *home* keeps, per tensor, the experts in order.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from vllm_moecxl.data.banks import Bank
from vllm_moecxl.data.devices import DeviceBackend


@dataclass(frozen=True)
class Extent:
    """The part of a slab that comes from one tensor.

    Attributes:
        name: the tensor's name.
        row_shape: shape of one expert's row.
        dtype: its element type.
    """

    name: str
    row_shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def row_bytes(self) -> int:
        count = self.dtype.itemsize
        for size in self.row_shape:
            count *= size
        return count


@dataclass(frozen=True)
class SlabLayout:
    """The extents of a slab, in a fixed order; two layers with equal layouts can share a layer buffer."""

    extents: tuple[Extent, ...]

    @classmethod
    def of(cls, tensors: Mapping[str, torch.Tensor]) -> SlabLayout:
        """Layout of tensors that are [experts, ...] each."""
        return cls(tuple(Extent(name, tuple(t.shape[1:]), t.dtype) for name, t in tensors.items()))

    @property
    def slab_bytes(self) -> int:
        return sum(extent.row_bytes for extent in self.extents)


@dataclass(frozen=True)
class Home:
    """All slabs of one layer in one bank.

    Attributes:
        bank: who owns the bytes.
        tensors: per extent [experts, ...] host tensors, experts in order.
    """

    bank: Bank
    tensors: tuple[torch.Tensor, ...]

    @property
    def slab_bytes(self) -> int:
        return sum(tensor[0].nbytes for tensor in self.tensors)

    @classmethod
    def store(cls, bank: Bank, tensors: dict[str, torch.Tensor]) -> Home:
        """Copy kernel-format tensors ([experts, ...], any device) into `bank`; empties `tensors`.

        Raises:
            CapacityError: the bank is full.
        """
        homes = []
        for name in list(tensors):
            source = tensors.pop(name)
            target = bank.allocate(source.shape, source.dtype)
            target.copy_(source)
            homes.append(target)
        return cls(bank, tuple(homes))


class Cells:
    """Device memory for a number of slabs: the slots of a layer, or the layer buffer.

    Attributes:
        tensors: per extent [cells, ...] tensors on the compute device.
    """

    def __init__(self, layout: SlabLayout, cell_count: int, backend: DeviceBackend) -> None:
        self.cell_count = cell_count
        self.tensors = tuple(
            backend.allocate((cell_count, *extent.row_shape), extent.dtype) for extent in layout.extents
        )
        self._backend = backend

    def fetch(self, home: Home, expert_ids: list[int], cell_ids: list[int]) -> None:
        """Copy slabs from their home, expert by expert, every extent with it."""
        self._backend.copy_rows(home.tensors, expert_ids, self.tensors, cell_ids)

    def take(self, cells: Cells, from_ids: list[int], cell_ids: list[int]) -> None:
        """Copy slabs from other cells of the same layout."""
        self._backend.copy_rows(cells.tensors, from_ids, self.tensors, cell_ids)
