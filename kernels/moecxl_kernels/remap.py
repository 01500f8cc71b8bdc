"""Routes from expert ids to slot ids, on the device."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from moecxl_kernels.tables import EXPERTS_MAX

#: Routes of one program.
_BLOCK_ROUTES = 512
_WARPS = 4
_POINTERS = ["topk_ids", "is_padding", "slot_of", "in_pass", "topk_weights", "slot_ids", "weights"]


def remap(topk_ids: torch.Tensor, is_padding: torch.Tensor | None, slot_of: torch.Tensor, out: torch.Tensor) -> None:
    """Slot ids of routes, in one launch on the current stream.

    What needs no slot (a padding row), or has none (an unknown id, or an expert that `ensure_experts` found no room
    for), is given the slot of some other expert, so that kernels which read it read weights: never -1, and never a slot
    that is lent to the host. Only where no expert has a slot it is slot 0.

    Args:
        topk_ids: [tokens, k] int32 or int64, device, contiguous.
        is_padding: [tokens] bool, device, contiguous, or None: no row is.
        slot_of: [experts] int32, device, contiguous, as in `SlotTable`.
        out: [tokens, k] int32, device, contiguous.
    """
    assert out.dtype == torch.int32 and out.shape == topk_ids.shape and out.is_contiguous()
    _launch(topk_ids, is_padding, slot_of, None, None, out, None)


def remap_pass(
    topk_ids: torch.Tensor, topk_weights: torch.Tensor, slot_of: torch.Tensor, in_pass: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Slot ids and weights of routes for a pass that holds some of the experts, in one launch on the current stream.

    Args:
        topk_ids: [tokens, k] int32 or int64, device, contiguous.
        topk_weights: [tokens, k] of any float type, device, contiguous.
        slot_of: [experts] int32, device, contiguous.
        in_pass: [experts] bool, device, contiguous: the pass computes this expert.

    Returns:
        [tokens, k] int32 slot ids and [tokens, k] weights of the type of `topk_weights`. Other experts' routes have
        weight 0 and a slot of the pass.
    """
    assert topk_weights.shape == topk_ids.shape and topk_weights.is_contiguous()
    assert in_pass.dtype == torch.bool and in_pass.shape == slot_of.shape and in_pass.is_contiguous()
    slot_ids = torch.empty_like(topk_ids, dtype=torch.int32)
    weights = torch.empty_like(topk_weights)
    _launch(topk_ids, None, slot_of, in_pass, topk_weights, slot_ids, weights)
    return slot_ids, weights


def _launch(
    topk_ids: torch.Tensor,
    is_padding: torch.Tensor | None,
    slot_of: torch.Tensor,
    in_pass: torch.Tensor | None,
    topk_weights: torch.Tensor | None,
    slot_ids: torch.Tensor,
    weights: torch.Tensor | None,
) -> None:
    assert topk_ids.dtype in (torch.int32, torch.int64) and topk_ids.dim() == 2 and topk_ids.is_contiguous()
    assert slot_of.dtype == torch.int32 and slot_of.dim() == 1 and slot_of.is_contiguous()
    assert 0 < len(slot_of) <= EXPERTS_MAX
    token_count, k = topk_ids.shape
    if is_padding is not None:
        assert is_padding.dtype == torch.bool and is_padding.shape == (token_count,) and is_padding.is_contiguous()
    if topk_ids.numel() == 0:
        return
    _remap[(triton.cdiv(topk_ids.numel(), _BLOCK_ROUTES),)](
        topk_ids,
        is_padding,
        slot_of,
        in_pass,
        topk_weights,
        slot_ids,
        weights,
        topk_ids.numel(),
        k,
        len(slot_of),
        BLOCK_ROUTES=_BLOCK_ROUTES,
        BLOCK_EXPERTS=triton.next_power_of_2(len(slot_of)),
        num_warps=_WARPS,
    )


@triton.jit(
    # Batches differ from step to step, and may be views that begin anywhere.
    do_not_specialize=["route_count", "k", "expert_count"],
    do_not_specialize_on_alignment=_POINTERS,
)
def _remap(
    topk_ids,
    is_padding,
    slot_of,
    in_pass,
    topk_weights,
    slot_ids,
    weights,
    route_count,
    k,
    expert_count,
    BLOCK_ROUTES: tl.constexpr,
    BLOCK_EXPERTS: tl.constexpr,
):
    experts = tl.arange(0, BLOCK_EXPERTS)
    slots = tl.load(slot_of + experts, mask=experts < expert_count, other=-1)
    if in_pass is not None:
        is_member = tl.load(in_pass + experts, mask=experts < expert_count, other=0) != 0
        slots = tl.where(is_member, slots, -1)
    spare_slot = tl.maximum(tl.max(slots, axis=0), 0)

    routes = tl.program_id(0) * BLOCK_ROUTES + tl.arange(0, BLOCK_ROUTES)
    is_inside = routes < route_count
    expert_ids = tl.load(topk_ids + routes, mask=is_inside, other=-1)
    is_known = is_inside & (expert_ids >= 0) & (expert_ids < expert_count)
    if is_padding is not None:
        is_known = is_known & (tl.load(is_padding + routes // k, mask=is_inside, other=1) == 0)
    if in_pass is not None:
        is_known = is_known & (tl.load(in_pass + expert_ids, mask=is_known, other=0) != 0)
    found = tl.load(slot_of + expert_ids, mask=is_known, other=-1)
    tl.store(slot_ids + routes, tl.where(found >= 0, found, spare_slot), mask=is_inside)
    if weights is not None:
        kept = tl.load(topk_weights + routes, mask=is_inside & (found >= 0), other=0.0)
        tl.store(weights + routes, kept, mask=is_inside)
