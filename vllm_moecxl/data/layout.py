"""Slab layouts: which tensors a slab is made of, and how its rows look as bytes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch


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


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """A contiguous [rows, ...] tensor as [rows, row bytes] uint8, on the same memory."""
    assert tensor.is_contiguous()
    return tensor.unsqueeze(-1).view(torch.uint8).view(tensor.shape[0], -1)
