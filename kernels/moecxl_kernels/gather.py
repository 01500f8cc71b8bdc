"""Copies of whole slabs by the device itself, from wherever it can read into slots."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

_WARPS = 4
#: 128-bit loads that each of a warp's 32 threads has in flight (on AMD, whose warps have 64, half as many). A read of
#: host memory takes a microsecond or two, and bytes in flight are what hides it.
#: Source: arithmetic; re-measure by `python -m benchmarks copy` where a GPU is.
_LOADS = 8
#: Bytes that one program moves at a time.
BLOCK_BYTES = _WARPS * 32 * _LOADS * 16
#: Bytes of one step of the byte path.
_STEP_BYTES = 1024


class SlabMap(NamedTuple):
    """Where the slabs of a layer are, and where its slots. A slab is its segments: one for each extent and stripe part.

    All on the device, contiguous. Addresses are as the device sees them.

    Attributes:
        sources: [experts, segments] int64: address of each segment of each expert.
        targets: [segments] int64: address of the segment in slot 0.
        strides: [segments] int64: bytes from a slot to the next.
        sizes: [segments] int64: bytes.
        blocks: [blocks, 2] int64: (segment, offset) of the parts that one program moves at a time.
    """

    sources: torch.Tensor
    targets: torch.Tensor
    strides: torch.Tensor
    sizes: torch.Tensor
    blocks: torch.Tensor


def slab_map(
    sources: Sequence[Sequence[int]],
    targets: Sequence[int],
    strides: Sequence[int],
    sizes: Sequence[int],
    device: torch.device | str,
) -> SlabMap:
    """Make the map of a layer.

    Args:
        sources: of each expert, the address of each segment.
        targets: address of each segment in slot 0.
        strides: of each segment, bytes from a slot to the next.
        sizes: bytes of each segment, 0 too.
        device: where the map goes.
    """
    assert len(targets) == len(strides) == len(sizes) and all(len(row) == len(sizes) for row in sources)
    assert all(0 <= size <= stride for size, stride in zip(sizes, strides, strict=True))

    def table(rows: Any, *shape: int) -> torch.Tensor:
        return torch.tensor(rows, dtype=torch.int64).reshape(shape).to(device)

    segment_count = len(sizes)
    return SlabMap(
        sources=table(sources, len(sources), segment_count),
        targets=table(targets, segment_count),
        strides=table(strides, segment_count),
        sizes=table(sizes, segment_count),
        blocks=table(_plan(sizes), -1, 2),
    )


def _plan(sizes: Sequence[int]) -> list[tuple[int, int]]:
    """(segment, offset) of all blocks of a slab.

    Segments take turns in proportion to their sizes: the parts of a stripe are read from all banks at once, and all end
    together.
    """
    turns = [
        ((offset + BLOCK_BYTES / 2) / size, segment, offset)
        for segment, size in enumerate(sizes)
        for offset in range(0, size, BLOCK_BYTES)
    ]
    return [(segment, offset) for _, segment, offset in sorted(turns)]


def gather_slabs(copies: torch.Tensor, count: torch.Tensor, slabs: SlabMap, program_count: int) -> None:
    """Copy slabs into slots, on the current stream, without the host: how many is read on the device.

    Not a byte is read or written outside of the segments.

    Args:
        copies: [n, 2] int32, device, contiguous: (expert, slot); slots all different.
        count: [1] int32, device: how many of them, from the first on, are valid.
        slabs: of the layer.
        program_count: programs that share the work; a constant of the engine.
    """
    assert copies.dtype == torch.int32 and copies.dim() == 2 and copies.shape[1] == 2 and copies.is_contiguous()
    assert count.dtype == torch.int32 and count.numel() == 1
    assert all(table.dtype == torch.int64 and table.is_contiguous() for table in slabs)
    assert slabs.sources.shape[1:] == slabs.targets.shape == slabs.strides.shape == slabs.sizes.shape
    block_count = len(slabs.blocks)
    assert program_count > 0 and len(copies) * block_count < 2**31
    if block_count == 0:
        return
    _gather_slabs[(program_count,)](
        copies,
        count,
        *slabs,
        len(slabs.sizes),
        block_count,
        BLOCK_BYTES=BLOCK_BYTES,
        STEP_BYTES=_STEP_BYTES,
        num_warps=_WARPS,
    )


def copy_cells(moves: torch.Tensor, count: torch.Tensor, slabs: SlabMap, cell_count: int, program_count: int) -> None:
    """Copy slabs from slot to slot, for compaction; as `gather_slabs`.

    Args:
        moves: [n, 2] int32, device, contiguous: (from slot, to slot). No slot is both: there is no order among them.
        count: [1] int32, device: how many of them, from the first on, are valid.
        slabs: of the layer; what it says of sources is not used.
        cell_count: how many slots there are.
        program_count: programs that share the work.
    """
    cells = torch.arange(cell_count, dtype=torch.int64, device=slabs.targets.device)
    sources = slabs.targets + cells[:, None] * slabs.strides
    gather_slabs(moves, count, slabs._replace(sources=sources), program_count)


@triton.jit
def _copy_words(source, target, size, BLOCK_BYTES: tl.constexpr):
    """Copy the part of a block that is made of whole 128-bit words; both addresses are multiples of 16."""
    words = tl.arange(0, BLOCK_BYTES // 4)
    is_inside = words < size // 16 * 4
    reader = tl.multiple_of(source.to(tl.pointer_type(tl.int32)), 16)
    writer = tl.multiple_of(target.to(tl.pointer_type(tl.int32)), 16)
    # Slabs are read once; what is written is read soon, by the experts' kernel.
    values = tl.load(reader + words, mask=is_inside, eviction_policy="evict_first")
    tl.store(writer + words, values, mask=is_inside)


@triton.jit
def _copy_bytes(source, target, start, size, STEP_BYTES: tl.constexpr):
    """Copy the bytes from `start` on, of any alignment."""
    reader = source.to(tl.pointer_type(tl.int8))
    writer = target.to(tl.pointer_type(tl.int8))
    for step in range(start, size, STEP_BYTES):
        offsets = step + tl.arange(0, STEP_BYTES)
        values = tl.load(reader + offsets, mask=offsets < size, eviction_policy="evict_first")
        tl.store(writer + offsets, values, mask=offsets < size)


@triton.jit(
    # One compilation serves all layers, and table views at any offset.
    do_not_specialize=["segment_count", "block_count"],
    do_not_specialize_on_alignment=["copies", "count", "sources", "targets", "strides", "sizes", "blocks"],
)
def _gather_slabs(
    copies,
    count,
    sources,
    targets,
    strides,
    sizes,
    blocks,
    segment_count,
    block_count,
    BLOCK_BYTES: tl.constexpr,
    STEP_BYTES: tl.constexpr,
):
    for item in range(tl.program_id(0), tl.load(count) * block_count, tl.num_programs(0)):
        copy = item // block_count
        block = item % block_count
        expert_id = tl.load(copies + 2 * copy).to(tl.int64)
        slot_id = tl.load(copies + 2 * copy + 1).to(tl.int64)
        segment = tl.load(blocks + 2 * block)
        offset = tl.load(blocks + 2 * block + 1)
        size = tl.minimum(tl.load(sizes + segment) - offset, BLOCK_BYTES).to(tl.int32)
        source = tl.load(sources + expert_id * segment_count + segment) + offset
        stride = tl.load(strides + segment)
        target = tl.load(targets + segment) + slot_id * stride + offset
        # Rows of odd sizes are aligned for some experts and slots and not for others.
        done = 0
        if (source | target) % 16 == 0:
            _copy_words(source, target, size, BLOCK_BYTES)
            done = size // 16 * 16
        _copy_bytes(source, target, done, size, STEP_BYTES)
