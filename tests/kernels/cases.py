"""Sample calls of every kernel: each compiles what a real launch of such tensors would compile."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from moecxl_kernels.ensure import ensure_experts
from moecxl_kernels.gate import gate_lookahead
from moecxl_kernels.gather import copy_cells, gather_slabs, slab_map
from moecxl_kernels.remap import remap, remap_pass
from moecxl_kernels.tables import make_mailbox, make_table

Call = Callable[[], object]


def int32(*shape: int, begin: int = 0) -> torch.Tensor:
    """Zeros, a view that begins anywhere."""
    count = torch.Size(shape).numel()
    return torch.zeros(begin + count, dtype=torch.int32)[begin:].view(shape)


def gather(sizes: Sequence[int] = (1 << 20, 48), copy_count: int = 4, begin: int = 0) -> None:
    """A gather of slabs of these segments."""
    zeros = [0] * len(sizes)
    slabs = slab_map([zeros] * 8, zeros, sizes, sizes, "cpu")
    gather_slabs(int32(copy_count, 2, begin=begin), int32(1, begin=begin), slabs, 32)


def cells() -> None:
    """A compaction."""
    slabs = slab_map([[0, 0]] * 8, [0, 0], [1 << 20, 48], [1 << 20, 48], "cpu")
    copy_cells(int32(4, 2), int32(1), slabs, 4, 32)


def routes(
    token_count: int = 16, k: int = 8, *, is_wide: bool = False, has_padding: bool = False, begin: int = 0
) -> None:
    """A remap of a batch."""
    ids = int32(token_count, k, begin=begin)
    padding = torch.zeros(begin + token_count, dtype=torch.bool)[begin:] if has_padding else None
    remap(ids.long() if is_wide else ids, padding, int32(128, begin=begin), int32(token_count, k, begin=begin))


def routes_of_pass(token_count: int = 16, k: int = 8, dtype: torch.dtype = torch.float32) -> None:
    """A remap for a pass."""
    weights = torch.zeros((token_count, k), dtype=dtype)
    remap_pass(int32(token_count, k), weights, int32(128), torch.zeros(128, dtype=torch.bool))


def gate(
    token_count: int = 8,
    weight_dtype: torch.dtype = torch.bfloat16,
    *,
    is_plain: bool = True,
    depth: int = 4,
    token_count_max: int = 8,
) -> None:
    """A lookahead over two layers."""
    weight = torch.zeros((2, 128, 4096), dtype=weight_dtype)
    scale = None if is_plain else torch.zeros((2, 4096))
    bias = None if is_plain else torch.zeros((2, 128), dtype=weight_dtype)
    out = torch.zeros((depth, 2 * token_count_max * 128), dtype=torch.int64)
    x = torch.zeros((token_count, 4096), dtype=torch.bfloat16)
    gate_lookahead(x, weight, scale, bias, int32(8), out, token_count_max)


def ensure(
    expert_count: int = 128,
    slot_count: int = 64,
    token_count: int = 16,
    k: int = 8,
    *,
    is_wide: bool = False,
    has_padding: bool = False,
    depth: int = 4,
) -> None:
    """A visit of a layer."""
    ids = int32(token_count, k)
    padding = torch.zeros(token_count, dtype=torch.bool) if has_padding else None
    table = make_table(expert_count, slot_count, 2, "cpu")
    mailbox = make_mailbox(slot_count, 2, depth, 1024)
    ensure_experts(ids.long() if is_wide else ids, padding, table, mailbox, int32(slot_count, 2), int32(1))


#: What is compiled and looked at.
CALLS: dict[str, Call] = {
    "gather_slabs": gather,
    "copy_cells": cells,
    "remap, int32": routes,
    "remap, int64, padding": partial(routes, is_wide=True, has_padding=True),
    "remap_pass, float32": routes_of_pass,
    "remap_pass, bfloat16": partial(routes_of_pass, dtype=torch.bfloat16),
    "gate_lookahead, bfloat16": gate,
    "gate_lookahead, float32, scale, bias": partial(gate, weight_dtype=torch.float32, is_plain=False),
    "ensure_experts, 8 experts": partial(ensure, 8, 4),
    "ensure_experts, 128 experts": ensure,
    "ensure_experts, 1024 experts, int64, padding": partial(ensure, 1024, 1024, is_wide=True, has_padding=True),
}

#: Calls that differ in what differs from step to step, or from layer to layer: one compilation has to serve them.
ALIKE: dict[str, list[Call]] = {
    "gather_slabs": [
        gather,
        partial(gather, [16]),
        partial(gather, [1 << 18] * 16, copy_count=1, begin=1),
        partial(gather, [3, 16 << 10] * 3, copy_count=16, begin=3),
    ],
    "remap": [
        partial(routes, *shape, begin=begin) for shape in ((1, 1), (16, 8), (2, 16), (17, 3)) for begin in (0, 1)
    ],
    "remap_pass": [partial(routes_of_pass, *shape) for shape in ((1, 1), (16, 8), (17, 3))],
    "gate_lookahead": [
        partial(gate, token_count, depth=depth, token_count_max=token_count_max)
        for token_count in (1, 3, 16)
        for depth, token_count_max in ((1, 16), (16, 1), (4, 8))
    ],
    "ensure_experts": [
        partial(ensure, token_count=token_count, k=k, depth=depth)
        for token_count in (0, 1, 16, 17)
        for k, depth in ((1, 16), (8, 3), (16, 1))
    ],
}
