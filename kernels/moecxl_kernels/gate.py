"""Gates of the next layers on this layer's input, on the device, into a ring that the host reads."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

#: Experts of one program.
_BLOCK_EXPERTS = 16
#: Elements of the hidden state that one program takes at a time.
_BLOCK_HIDDEN = 256
_WARPS = 4


def gate_lookahead(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    visit: torch.Tensor,
    out: torch.Tensor,
    token_count_max: int,
) -> None:
    """Scores of the next layers' experts from this layer's input, on the current stream, without the host.

    Each of the first `token_count_max` tokens has its words; those of tokens that a batch does not have stay as an
    older visit left them, which they say themselves.

    Args:
        x: [tokens, hidden] of any float type, device, contiguous: the layer's input.
        weight: [distances, experts, hidden] of any float type, device, contiguous: gates of the layers that follow.
        scale: [distances, hidden] of any float type, device, contiguous: what brings the input to the scale of each of
            those layers; or None.
        bias: [distances, experts] of any float type, device, contiguous, or None.
        visit: int32, device: its first element is the visit's number, as `SlotTable.totals` after `ensure_experts`.
        out: [depth, distances * token_count_max * experts] int64, contiguous, reached by the device; visit v writes row
            (v & 0x7fffffff) % depth: by distance, token and expert (v & 0x7fffffff) << 32 | bits of the float32 score.
        token_count_max: tokens whose scores a row holds.
    """
    distance_count, expert_count, hidden_size = weight.shape
    assert x.dim() == 2 and x.shape[1] == hidden_size and x.is_contiguous() and weight.is_contiguous()
    assert scale is None or (scale.shape == (distance_count, hidden_size) and scale.is_contiguous())
    assert bias is None or (bias.shape == (distance_count, expert_count) and bias.is_contiguous())
    assert visit.dtype == torch.int32 and visit.numel() > 0 and visit.is_contiguous()
    assert out.dtype == torch.int64 and out.is_contiguous() and len(out) > 0
    assert out.shape[1] == distance_count * token_count_max * expert_count
    token_count = min(len(x), token_count_max)
    if token_count == 0 or weight.numel() == 0:
        return
    _gate_lookahead[(token_count, distance_count, triton.cdiv(expert_count, _BLOCK_EXPERTS))](
        x,
        weight,
        scale,
        bias,
        visit,
        out,
        token_count_max,
        len(out),
        EXPERTS=expert_count,
        HIDDEN=hidden_size,
        BLOCK_EXPERTS=_BLOCK_EXPERTS,
        BLOCK_HIDDEN=_BLOCK_HIDDEN,
        num_warps=_WARPS,
    )


@triton.jit(
    do_not_specialize=["token_count_max", "depth"],
    do_not_specialize_on_alignment=["bias", "visit", "out"],
)
def _gate_lookahead(
    x,
    weight,
    scale,
    bias,
    visit,
    out,
    token_count_max,
    depth,
    EXPERTS: tl.constexpr,
    HIDDEN: tl.constexpr,
    BLOCK_EXPERTS: tl.constexpr,
    BLOCK_HIDDEN: tl.constexpr,
):
    # One token a program: the gates are read from the cache again for each, and few tokens are decoded at a time.
    token = tl.program_id(0)
    distance = tl.program_id(1)
    experts = tl.program_id(2) * BLOCK_EXPERTS + tl.arange(0, BLOCK_EXPERTS)
    gates = weight + (distance * EXPERTS + experts[:, None]) * HIDDEN
    sums = tl.zeros([BLOCK_EXPERTS, BLOCK_HIDDEN], dtype=tl.float32)
    for start in range(0, HIDDEN, BLOCK_HIDDEN):
        channels = start + tl.arange(0, BLOCK_HIDDEN)
        values = tl.load(x + token * HIDDEN + channels, mask=channels < HIDDEN, other=0.0)
        if scale is not None:
            factors = tl.load(scale + distance * HIDDEN + channels, mask=channels < HIDDEN, other=0.0)
            # The products are rounded to the input's type, as torch rounds them.
            factors = factors.to(values.dtype).to(tl.float32)
            values = (values.to(tl.float32) * factors).to(values.dtype)
        is_inside = (experts[:, None] < EXPERTS) & (channels[None, :] < HIDDEN)
        rows = tl.load(gates + channels[None, :], mask=is_inside, other=0.0)
        values = values.to(rows.dtype).to(tl.float32)
        sums += rows.to(tl.float32) * values[None, :]
    scores = tl.sum(sums, axis=1)
    if bias is not None:
        scores += tl.load(bias + distance * EXPERTS + experts, mask=experts < EXPERTS, other=0.0).to(tl.float32)

    tag = tl.load(visit).to(tl.int64) & 0x7FFFFFFF
    words = tag << 32 | scores.to(tl.int32, bitcast=True).to(tl.int64) & 0xFFFFFFFF
    first = ((tag % depth) * tl.num_programs(1) + distance) * token_count_max + token
    tl.store(out + first * EXPERTS + experts, words, mask=experts < EXPERTS)
