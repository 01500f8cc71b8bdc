"""State of one device-driven layer: its slot table, and the words it exchanges with the sidecar.

Every word of the mailbox is 64 bit wide and says by itself which offer or visit it belongs to: both sides read and
write words whole, so none needs a fence between two of them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

EXPERTS_MAX = 1024
SLOTS_MAX = 1024

#: What an empty slot holds, and where an expert without a slot is.
NONE = -1

#: Indices of `SlotTable.totals`.
VISITS, HITS, MISSES, TOO_WIDE, UNKNOWN_IDS, ADOPTED, REFUSED = range(7)
TOTAL_COUNT = 8

#: A visit's share of what an expert's heat is at the next one.
#: Source: `class-lru` of `vllm_moecxl.control.eviction`, half-life of 128 visits.
HEAT_DECAY = 0.5 ** (1 / 128)

#: Offer: sequence << 48 | expert << 24 | slot. Answer: sequence << 48 | is_adopted << 24 | slot.
SEQUENCE_SHIFT = 48
EXPERT_SHIFT = 24
FIELD_MASK = (1 << EXPERT_SHIFT) - 1
#: Sequences count from 1 to here and begin again; 0 says that nothing was ever offered.
SEQUENCE_MAX = 0x7FFF

#: Word of a record: (visit & VISIT_MASK) << 32 | payload.
VISIT_SHIFT = 32
VISIT_MASK = 0x7FFF_FFFF
PAYLOAD_MASK = 0xFFFF_FFFF
#: Words before the routes: total of hits, total of misses, flags, count of the routes that follow, step.
HEADER_WORDS = 5
FLAG_TOO_WIDE = 1
FLAG_UNKNOWN_IDS = 2
#: Payload of a route that needs no expert: of a padding row, or of an id that the layer does not have.
NO_EXPERT = 0xFFFF_FFFF

assert max(EXPERTS_MAX, SLOTS_MAX) <= FIELD_MASK and SEQUENCE_MAX << SEQUENCE_SHIFT < 1 << 63
assert VISIT_MASK << VISIT_SHIFT < 1 << 63


class SlotTable(NamedTuple):
    """Who is where, on the device. Only `ensure_experts` writes it.

    Attributes:
        slot_of: [experts] int32: slot of each expert, -1: none.
        expert_of: [slots] int32: expert in each slot, -1: empty, or lent to the host.
        is_host: [slots] int32: 1 = lent to the host: the device neither reads, fills nor evicts it.
        heat: [experts] float32: use counts, each visit that needs any expert multiplies them by `HEAT_DECAY`.
        used_at: [experts] int32: visit that last needed the expert, or that adopted it.
        totals: [8] int32: visits, hits, misses (fetched on demand), too wide visits, unknown ids, adopted and refused
            offers, a spare one. They wrap around at 2**32.
        answered: [lanes] int32: sequence of the last offer that was answered, 0: none yet.
        step: [1] int32: number of the forward under way, of all layers; the host writes it, on the compute stream.
    """

    slot_of: torch.Tensor
    expert_of: torch.Tensor
    is_host: torch.Tensor
    heat: torch.Tensor
    used_at: torch.Tensor
    totals: torch.Tensor
    answered: torch.Tensor
    step: torch.Tensor


class Mailbox(NamedTuple):
    """Host memory that the device reaches (pinned and mapped), contiguous.

    Attributes:
        offers: [lanes] int64, written by the host, read by the device.
        answers: [lanes] int64, written by the device, read by the host.
        view: [slots] int32: copy of `expert_of` after the latest visit; stale reads do no harm.
        records: [depth, words] int64: visit v (1, 2, ...) writes row (v & VISIT_MASK) % depth.
    """

    offers: torch.Tensor
    answers: torch.Tensor
    view: torch.Tensor
    records: torch.Tensor


class Offer(NamedTuple):
    """The host filled `slot_id`, which is lent to it, with `expert_id`."""

    sequence: int
    expert_id: int
    slot_id: int


class Answer(NamedTuple):
    """`slot_id` is the host's from now on: the offered slot itself where the offer was refused."""

    sequence: int
    is_adopted: bool
    slot_id: int


class Record(NamedTuple):
    """What one visit left in the ring.

    Attributes:
        hits: of all visits so far, mod 2**32.
        misses: of all visits so far, mod 2**32.
        is_too_wide: the visit needed more experts than fit, and was not served.
        has_unknown_ids: some ids are none of the layer's experts.
        step: the forward that it was a part of.
        expert_ids: [tokens * k] uint32 in the order of the routes, `NO_EXPERT` for what needs none; empty where the
            record is too short for them.
    """

    hits: int
    misses: int
    is_too_wide: bool
    has_unknown_ids: bool
    step: int
    expert_ids: npt.NDArray[np.uint32]


def make_table(
    expert_count: int, slot_count: int, lane_count: int, device: torch.device | str, step: torch.Tensor | None = None
) -> SlotTable:
    """An empty table. Its last slots are lent to the host: lane i has slot slot_count - lane_count + i.

    Args:
        step: of all layers; one of its own where not given.
    """
    assert 0 < expert_count <= EXPERTS_MAX and 0 <= lane_count < slot_count <= SLOTS_MAX
    is_host = torch.zeros(slot_count, dtype=torch.int32)
    is_host[slot_count - lane_count :] = 1
    return SlotTable(
        slot_of=torch.full((expert_count,), NONE, dtype=torch.int32, device=device),
        expert_of=torch.full((slot_count,), NONE, dtype=torch.int32, device=device),
        is_host=is_host.to(device),
        heat=torch.zeros(expert_count, dtype=torch.float32, device=device),
        used_at=torch.zeros(expert_count, dtype=torch.int32, device=device),
        totals=torch.zeros(TOTAL_COUNT, dtype=torch.int32, device=device),
        answered=torch.zeros(lane_count, dtype=torch.int32, device=device),
        step=torch.zeros(1, dtype=torch.int32, device=device) if step is None else step,
    )


def _zeros(word_count: int) -> torch.Tensor:
    return torch.zeros(word_count, dtype=torch.int64)


def make_mailbox(
    slot_count: int,
    lane_count: int,
    depth: int,
    route_count_max: int,
    allocate: Callable[[int], torch.Tensor] = _zeros,
) -> Mailbox:
    """A mailbox without offers, whose records hold visits of up to `route_count_max` routes.

    Args:
        depth: visits that the ring of records remembers.
        allocate: gives so many zeros, int64, in host memory that the device reaches: any, for Triton's interpreter.
    """
    assert depth > 0 and route_count_max >= 0
    word_count = HEADER_WORDS + route_count_max
    view = allocate(-(-slot_count // 2)).view(torch.int32)[:slot_count]
    return Mailbox(
        offers=allocate(lane_count),
        answers=allocate(lane_count),
        view=view.fill_(NONE),
        records=allocate(depth * word_count).view(depth, word_count),
    )


def next_sequence(sequence: int) -> int:
    """The sequence of the offer after the one of `sequence`; after 0, the first one."""
    return sequence % SEQUENCE_MAX + 1


def pack_offer(offer: Offer) -> int:
    """The offer as a word."""
    assert 0 < offer.sequence <= SEQUENCE_MAX
    assert 0 <= offer.expert_id < EXPERTS_MAX and 0 <= offer.slot_id < SLOTS_MAX
    return offer.sequence << SEQUENCE_SHIFT | offer.expert_id << EXPERT_SHIFT | offer.slot_id


def unpack_offer(word: int) -> Offer:
    """The offer in a word; one of sequence 0 is none."""
    return Offer(word >> SEQUENCE_SHIFT, word >> EXPERT_SHIFT & FIELD_MASK, word & FIELD_MASK)


def pack_answer(answer: Answer) -> int:
    """The answer as a word."""
    assert 0 < answer.sequence <= SEQUENCE_MAX and 0 <= answer.slot_id < SLOTS_MAX
    return answer.sequence << SEQUENCE_SHIFT | int(answer.is_adopted) << EXPERT_SHIFT | answer.slot_id


def unpack_answer(word: int) -> Answer:
    """The answer in a word; one of sequence 0 is none."""
    return Answer(word >> SEQUENCE_SHIFT, bool(word >> EXPERT_SHIFT & 1), word & FIELD_MASK)


def pack_word(visit: int, payload: int) -> int:
    """A word of the ring: `payload` (mod 2**32), marked as the visit's."""
    return (visit & VISIT_MASK) << VISIT_SHIFT | payload & PAYLOAD_MASK


def row_of(visit: int, depth: int) -> int:
    """The ring's row of a visit."""
    return (visit & VISIT_MASK) % depth


def read_record(records: torch.Tensor, visit: int) -> Record | None:
    """What a visit left in the ring, or None: not yet written, only in part, or overwritten since.

    Args:
        records: [depth, words] int64 in host memory; the device may be writing it.
        visit: 1, 2, ...; larger than 2**31 too.
    """
    row = records[row_of(visit, len(records))].numpy().copy()
    is_its = row >> VISIT_SHIFT == visit & VISIT_MASK
    payloads = (row & PAYLOAD_MASK).astype(np.uint32)
    if not is_its[:HEADER_WORDS].all():
        return None
    hits, misses, flags, route_count, step = payloads[:HEADER_WORDS].tolist()
    if not is_its[: HEADER_WORDS + route_count].all():
        return None
    return Record(
        hits=hits,
        misses=misses,
        is_too_wide=bool(flags & FLAG_TOO_WIDE),
        has_unknown_ids=bool(flags & FLAG_UNKNOWN_IDS),
        step=step,
        expert_ids=payloads[HEADER_WORDS : HEADER_WORDS + route_count],
    )
