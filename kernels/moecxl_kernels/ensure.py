"""Looks a visit's experts up on the device: which are missing, which slots make room, which offers are taken.

One program, so nothing races inside the device: the table is loaded into registers, changed there, and stored once.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from moecxl_kernels import tables
from moecxl_kernels.tables import EXPERTS_MAX, SLOTS_MAX, Mailbox, SlotTable

_NONE = tl.constexpr(tables.NONE)
_HEAT_DECAY = tl.constexpr(tables.HEAT_DECAY)
_VISITS = tl.constexpr(tables.VISITS)
_HITS = tl.constexpr(tables.HITS)
_MISSES = tl.constexpr(tables.MISSES)
_TOO_WIDE = tl.constexpr(tables.TOO_WIDE)
_UNKNOWN_IDS = tl.constexpr(tables.UNKNOWN_IDS)
_ADOPTED = tl.constexpr(tables.ADOPTED)
_REFUSED = tl.constexpr(tables.REFUSED)
_TOTAL_COUNT = tl.constexpr(tables.TOTAL_COUNT)
_SEQUENCE_SHIFT = tl.constexpr(tables.SEQUENCE_SHIFT)
_EXPERT_SHIFT = tl.constexpr(tables.EXPERT_SHIFT)
_FIELD_MASK = tl.constexpr(tables.FIELD_MASK)
_VISIT_SHIFT = tl.constexpr(tables.VISIT_SHIFT)
_VISIT_MASK = tl.constexpr(tables.VISIT_MASK)
_PAYLOAD_MASK = tl.constexpr(tables.PAYLOAD_MASK)
_HEADER_WORDS = tl.constexpr(tables.HEADER_WORDS)
_FLAG_TOO_WIDE = tl.constexpr(tables.FLAG_TOO_WIDE)
_FLAG_UNKNOWN_IDS = tl.constexpr(tables.FLAG_UNKNOWN_IDS)
_NO_EXPERT = tl.constexpr(tables.NO_EXPERT)

#: A victim's key, the lowest goes first: 1 + class of heat, then recency, then slot. Free slots: the slot alone.
_RECENCY_SHIFT = tl.constexpr(10)
_CLASS_SHIFT = tl.constexpr(42)
_SLOT_MASK = tl.constexpr(SLOTS_MAX - 1)
#: Keys of slots that were adopted in this visit begin here: the last to go, and never in exchange for an offer.
_ADOPTED_KEY = tl.constexpr(1 << 60)
#: Key of what is no victim: needed, lent to the host, or not a slot.
_NO_VICTIM = tl.constexpr((1 << 63) - 1)
assert 1 << _RECENCY_SHIFT.value == SLOTS_MAX and _CLASS_SHIFT.value == _RECENCY_SHIFT.value + 32

#: Of a float32 1.0, the exponent as it is stored; counts below 1 are one class.
_EXPONENT_OF_ONE = tl.constexpr(127)
_MANTISSA_BITS = tl.constexpr(23)

#: Threads of a warp on AMD, 32 on NVIDIA. No block is shorter: then each thread has elements of its own.
_WARP_THREADS_MAX = 64
#: Routes that are read at once, at least.
_ROUTES_BLOCK = 256

_POINTERS = [
    *("topk_ids", "is_padding", "slot_of", "expert_of", "is_host", "heat", "used_at", "totals", "answered", "step"),
    *("offers", "answers", "view", "records", "copies", "copy_count"),
]
_COUNTS = ["route_count", "topk_count", "expert_count", "slot_count", "lane_count", "depth", "word_count"]


@triton.jit
def _count_routes(
    topk_ids, is_padding, words, tag, word_count, route_count, topk_count, expert_count,
    EXPERTS: tl.constexpr, ROUTES: tl.constexpr,
):  # fmt: skip
    """([EXPERTS] int32 routes of each expert, routes of unknown experts, routes listed in the record's `words`)."""
    listed_count = tl.where(route_count <= word_count - _HEADER_WORDS, route_count, 0)
    counts = tl.zeros([EXPERTS], tl.int32)
    unknowns = tl.zeros([ROUTES], tl.int32)
    for first in range(0, route_count, ROUTES):
        routes = first + tl.arange(0, ROUTES)
        is_asked = routes < route_count
        expert_ids = tl.load(topk_ids + routes, mask=is_asked, other=0)
        if is_padding is not None:
            is_asked = is_asked & (tl.load(is_padding + routes // topk_count, mask=is_asked, other=1) == 0)
        is_known = is_asked & (expert_ids >= 0) & (expert_ids < expert_count)
        counts += tl.histogram(expert_ids.to(tl.int32), EXPERTS, mask=is_known)
        unknowns += (is_asked & (is_known == 0)).to(tl.int32)
        payloads = tl.where(is_known, expert_ids.to(tl.int64), _NO_EXPERT)
        tl.store(words + _HEADER_WORDS + routes, tag | payloads, mask=routes < listed_count)
    return counts, tl.sum(unknowns), listed_count


@triton.jit
def _victim_keys(expert_of, is_host, is_needed, heat, used_at, visit):
    """[SLOTS] int64: who makes room first, see `_RECENCY_SHIFT`. `heat` is that of the visit before, cooled."""
    slots = tl.arange(0, expert_of.shape[0])
    exponents = heat.to(tl.int32, bitcast=True) >> _MANTISSA_BITS
    classes = tl.maximum(exponents - (_EXPONENT_OF_ONE - 1), 0)
    # Visits wrap around: what counts is how long ago.
    ages = (visit.to(tl.int64) - used_at.to(tl.int64)) & _PAYLOAD_MASK
    ranks = (1 + classes.to(tl.int64) << _CLASS_SHIFT) | (_PAYLOAD_MASK - ages << _RECENCY_SHIFT)
    ranks = tl.where(is_needed, _NO_VICTIM, ranks)
    keys = tl.where(expert_of == _NONE, 0, tl.gather(ranks, tl.maximum(expert_of, 0), 0)) | slots
    return tl.where(is_host == 0, keys, _NO_VICTIM)


@triton.jit
def _answer_lanes(
    words, seen, answers, answered, lane_count, visit, is_needed, slot_of, expert_of, is_host, used_at, keys
):
    """Adopt or refuse what the lanes offer; the table and the keys after it, offers adopted and refused.

    `words` [LANES] int64 are the offers, `seen` [LANES] int32 the sequences that were answered before. An evicted
    expert keeps its `slot_of`, stale: the caller clears these.
    """
    experts, slots = tl.arange(0, slot_of.shape[0]), tl.arange(0, expert_of.shape[0])
    lanes = tl.arange(0, seen.shape[0])
    sequences, replies = seen, tl.zeros_like(words)
    adopted_count, refused_count = 0, 0
    for lane in range(lane_count):
        word = tl.sum(tl.where(lanes == lane, words, 0))
        sequence = (word >> _SEQUENCE_SHIFT).to(tl.int32)
        if sequence != tl.sum(tl.where(lanes == lane, seen, 0)):
            expert, slot = (word >> _EXPERT_SHIFT & _FIELD_MASK).to(tl.int32), (word & _FIELD_MASK).to(tl.int32)
            is_refused = tl.max((expert_of == expert).to(tl.int32)) > 0
            victim_key = tl.min(keys)
            is_adopted = (is_refused == 0) & (victim_key < _ADOPTED_KEY)
            victim = tl.where(is_adopted, victim_key & _SLOT_MASK, slot.to(tl.int64)).to(tl.int32)
            is_mine, is_victim = is_adopted & (slots == slot), is_adopted & (slots == victim)
            is_expert = is_adopted & (experts == expert)
            slot_of = tl.where(is_expert, slot, slot_of)
            used_at = tl.where(is_expert, visit, used_at)
            expert_of = tl.where(is_mine, expert, tl.where(is_victim, _NONE, expert_of))
            is_host = tl.where(is_mine, 0, tl.where(is_victim, 1, is_host))
            is_wanted = tl.max((is_expert & is_needed).to(tl.int32)) > 0
            adopted_key = tl.where(is_wanted, _NO_VICTIM, _ADOPTED_KEY | slot.to(tl.int64))
            keys = tl.where(is_mine, adopted_key, tl.where(is_victim, _NO_VICTIM, keys))
            is_answered = (lanes == lane) & (is_adopted | is_refused)
            reply = (sequence.to(tl.int64) << _SEQUENCE_SHIFT) | (is_adopted.to(tl.int64) << _EXPERT_SHIFT) | victim
            replies = tl.where(is_answered, reply, replies)
            sequences = tl.where(is_answered, sequence, sequences)
            adopted_count += is_adopted.to(tl.int32)
            refused_count += is_refused.to(tl.int32)
    # Some threads may still be reading `answered`.
    tl.debug_barrier()
    tl.store(answers + lanes, replies, mask=replies != 0)
    tl.store(answered + lanes, sequences, mask=replies != 0)
    return slot_of, expert_of, is_host, used_at, keys, adopted_count, refused_count


@triton.jit
def _place_missing(missing, copy_total, slot_of, expert_of, keys, copies):
    """Give each missing expert, in rising order, the best victim's slot; (slot_of, expert_of) after it."""
    experts, slots = tl.arange(0, slot_of.shape[0]), tl.arange(0, expert_of.shape[0])
    waiting = tl.where(missing, experts, slot_of.shape[0])
    for index in range(copy_total):
        expert = tl.min(waiting)
        slot = (tl.min(keys) & _SLOT_MASK).to(tl.int32)
        waiting = tl.where(experts == expert, slot_of.shape[0], waiting)
        keys = tl.where(slots == slot, _NO_VICTIM, keys)
        slot_of = tl.where(experts == expert, slot, slot_of)
        expert_of = tl.where(slots == slot, expert, expert_of)
        tl.store(copies + 2 * index, expert)
        tl.store(copies + 2 * index + 1, slot)
    return slot_of, expert_of


@triton.jit
def _count_visit(
    totals,
    words,
    tag,
    step,
    listed_count,
    hit_count,
    miss_count,
    is_too_wide,
    unknown_count,
    adopted_count,
    refused_count,
):
    """Add a visit to the totals, and write the header of its record."""
    index = tl.arange(0, _TOTAL_COUNT)
    before = tl.load(totals + index)
    gains = tl.where(index == _VISITS, 1, 0)
    gains = tl.where(index == _HITS, hit_count, gains)
    gains = tl.where(index == _MISSES, miss_count, gains)
    gains = tl.where(index == _TOO_WIDE, is_too_wide.to(tl.int32), gains)
    gains = tl.where(index == _UNKNOWN_IDS, unknown_count, gains)
    gains = tl.where(index == _ADOPTED, adopted_count, gains)
    gains = tl.where(index == _REFUSED, refused_count, gains)
    after = (before.to(tl.int64) + gains) & _PAYLOAD_MASK
    flags = is_too_wide.to(tl.int64) * _FLAG_TOO_WIDE + (unknown_count > 0).to(tl.int64) * _FLAG_UNKNOWN_IDS
    tl.store(words, tag | tl.sum(tl.where(index == _HITS, after, 0)))
    tl.store(words + 1, tag | tl.sum(tl.where(index == _MISSES, after, 0)))
    tl.store(words + 2, tag | flags)
    tl.store(words + 3, tag | listed_count)
    tl.store(words + 4, tag | tl.load(step).to(tl.int64) & _PAYLOAD_MASK)
    # Some threads may still be reading them.
    tl.debug_barrier()
    tl.store(totals + index, after.to(tl.int32))


@triton.jit(do_not_specialize=_POINTERS + _COUNTS)
def ensure_experts_kernel(
    topk_ids, is_padding, slot_of, expert_of, is_host, heat, used_at, totals, answered, step,
    offers, answers, view, records, copies, copy_count,
    route_count, topk_count, expert_count, slot_count, lane_count, depth, word_count,
    EXPERTS: tl.constexpr, SLOTS: tl.constexpr, LANES: tl.constexpr, ROUTES: tl.constexpr,
):  # fmt: skip
    """One visit; grid (1,). See `ensure_experts`; blocks are powers of two, LANES at least the program's threads."""
    experts, slots, lanes = tl.arange(0, EXPERTS), tl.arange(0, SLOTS), tl.arange(0, LANES)
    # The host may write meanwhile. Each thread has lanes of its own, so a word is read once, and the sums that pick one
    # out hand the same value to all threads; a scalar load would let each of them see another offer. It comes first
    # because the host's memory is far away.
    offered = tl.load(offers + lanes, mask=lanes < lane_count, other=0, volatile=True)
    seen = tl.load(answered + lanes, mask=lanes < lane_count, other=0)
    is_expert, is_slot = experts < expert_count, slots < slot_count
    homes = tl.load(slot_of + experts, mask=is_expert, other=_NONE)
    heats = tl.load(heat + experts, mask=is_expert, other=0.0)
    uses = tl.load(used_at + experts, mask=is_expert, other=0)
    guests = tl.load(expert_of + slots, mask=is_slot, other=_NONE)
    # What is no slot is never the device's.
    lent = tl.load(is_host + slots, mask=is_slot, other=1)
    visit = tl.load(totals + _VISITS) + 1
    tag = (visit & _VISIT_MASK).to(tl.int64) << _VISIT_SHIFT
    words = records + (visit & _VISIT_MASK) % depth * word_count

    counts, unknown_count, listed_count = _count_routes(
        topk_ids, is_padding, words, tag, word_count, route_count, topk_count, expert_count, EXPERTS, ROUTES
    )
    is_needed = counts > 0
    cooled = heats * _HEAT_DECAY
    keys = _victim_keys(guests, lent, is_needed, cooled, uses, visit)
    homes, guests, lent, uses, keys, adopted_count, refused_count = _answer_lanes(
        offered, seen, answers, answered, lane_count, visit, is_needed, homes, guests, lent, uses, keys
    )

    # A needed expert is never evicted, so its `homes` is not stale.
    is_missing = is_needed & (homes == _NONE)
    need_count, miss_count = tl.sum(is_needed.to(tl.int32)), tl.sum(is_missing.to(tl.int32))
    is_too_wide = miss_count > tl.sum((keys != _NO_VICTIM).to(tl.int32))
    is_served = (need_count > 0) & (is_too_wide == 0)
    miss_count = tl.where(is_too_wide, 0, miss_count)
    hit_count = tl.where(is_too_wide, 0, need_count - miss_count)
    homes, guests = _place_missing(is_missing, miss_count, homes, guests, keys, copies)
    homes = tl.where(tl.gather(guests, tl.maximum(homes, 0), 0) == experts, homes, _NONE)
    heats = tl.where(is_served, cooled + tl.where(is_needed, 1.0, 0.0), heats)
    uses = tl.where(is_served & is_needed, visit, uses)

    _count_visit(
        totals, words, tag, step, listed_count, hit_count, miss_count, is_too_wide,
        unknown_count, adopted_count, refused_count,
    )  # fmt: skip
    tl.store(copy_count, miss_count)
    tl.store(slot_of + experts, homes, mask=is_expert)
    tl.store(heat + experts, heats, mask=is_expert)
    tl.store(used_at + experts, uses, mask=is_expert)
    tl.store(expert_of + slots, guests, mask=is_slot)
    tl.store(is_host + slots, lent, mask=is_slot)
    tl.store(view + slots, guests, mask=is_slot)


def ensure_experts(
    topk_ids: torch.Tensor,
    is_padding: torch.Tensor | None,
    table: SlotTable,
    mailbox: Mailbox,
    copies: torch.Tensor,
    copy_count: torch.Tensor,
) -> None:
    """One visit of a layer: give every expert that it needs a slot, and list what has to be copied there.

    1. Needed are the distinct experts of the rows that are not padding. Ids that the layer does not have are flagged.
    2. Each lane's new offer: refused if its expert has a slot already; else adopted, and the best victim among the
       device's slots that hold nothing needed and were not adopted in this visit is lent to the host in exchange;
       where there is none, the offer waits for the next visit.
    3. Each missing expert, in rising order, takes the best victim's slot, those just adopted last of all. If there are
       too few, the visit is too wide: it is flagged, nothing is copied, and the table stays as step 2 left it.
    4. Totals, the record of the visit (also of an empty one), and the view.

    The best victim is a free slot, else the slot of the lowest class of heat, in it the least recently used one, and
    of equals the lowest slot: the policy `class-lru` that `moecxl simulate` replays. It differs in this: counts are
    float32, and what is missing is served in rising order; what was adopted counts as used just then, but gains no
    heat; and a visit that is too wide for the slots leaves no trace in the heat, where the policy would have it served
    in several passes.

    Runs on the current stream, without synchronisation, and is deterministic.

    Args:
        topk_ids: [tokens, k] int32 or int64, device, contiguous; tokens may be 0.
        is_padding: [tokens] bool, device, or None: no row is padding.
        table: of the layer, changed in place.
        mailbox: of the layer. An offer's slot has to be one that is lent to the host, its expert one of the layer's.
        copies: [slots, 2] int32, device, out: (expert, slot) of what is to be copied, the first `copy_count` rows.
        copy_count: [1] int32, device, out.
    """
    token_count, topk_count = topk_ids.shape
    expert_count, slot_count, lane_count = len(table.slot_of), len(table.expert_of), len(table.answered)
    assert expert_count <= EXPERTS_MAX and slot_count <= SLOTS_MAX and copies.shape == (slot_count, 2)
    assert topk_ids.is_contiguous() and (is_padding is None or is_padding.shape == (token_count,))
    depth, word_count = mailbox.records.shape
    ensure_experts_kernel[(1,)](
        topk_ids,
        is_padding,
        *table,
        *mailbox,
        copies,
        copy_count,
        topk_ids.numel(),
        topk_count,
        expert_count,
        slot_count,
        lane_count,
        depth,
        word_count,
        **blocks_of(expert_count, slot_count, lane_count),
        **options_of(expert_count, slot_count),
    )


def blocks_of(expert_count: int, slot_count: int, lane_count: int) -> dict[str, int]:
    """Lengths of the kernel's blocks, powers of two, by the names of its parameters."""
    thread_count_max = _WARP_THREADS_MAX * _warp_count(expert_count, slot_count)
    return {
        "EXPERTS": _block(expert_count),
        "SLOTS": _block(slot_count),
        "LANES": max(_block(lane_count), thread_count_max),
        "ROUTES": max(_ROUTES_BLOCK, thread_count_max),
    }


def options_of(expert_count: int, slot_count: int) -> dict[str, Any]:
    """What the kernel is to be compiled with."""
    # Heat is rounded after the product and after the sum, as on the host.
    return {"num_warps": _warp_count(expert_count, slot_count), "enable_fp_fusion": False}


def _warp_count(expert_count: int, slot_count: int) -> int:
    """As many that a thread has at most two experts and two slots: what lives in registers fits them."""
    return max(_block(expert_count), _block(slot_count)) // _WARP_THREADS_MAX


def _block(count: int) -> int:
    length: int = triton.next_power_of_2(count)
    return max(length, _WARP_THREADS_MAX)
