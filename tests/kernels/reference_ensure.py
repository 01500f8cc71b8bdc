"""What `ensure_experts` has to do, in plain Python on the same tensors, and fast enough for a race search."""

from __future__ import annotations

import math

import numpy as np
import torch
from moecxl_kernels.tables import (
    ADOPTED,
    FLAG_TOO_WIDE,
    FLAG_UNKNOWN_IDS,
    HEADER_WORDS,
    HEAT_DECAY,
    HITS,
    MISSES,
    NO_EXPERT,
    NONE,
    REFUSED,
    TOO_WIDE,
    UNKNOWN_IDS,
    VISITS,
    Answer,
    Mailbox,
    SlotTable,
    pack_answer,
    pack_word,
    row_of,
    unpack_offer,
)

_DECAY = np.float32(HEAT_DECAY)


def ensure(
    topk_ids: torch.Tensor, is_padding: torch.Tensor | None, table: SlotTable, mailbox: Mailbox
) -> list[tuple[int, int]]:
    """One visit of a layer, see `moecxl_kernels.ensure.ensure_experts`; all tensors on the CPU, changed in place.

    Returns:
        (expert, slot) to fetch, in the order in which they are listed; empty where the visit is too wide.
    """
    expert_count = len(table.slot_of)
    routes = _routes(topk_ids, is_padding, expert_count)
    needed = sorted({expert for expert in routes if expert is not None and expert >= 0})
    unknown_count = routes.count(None)
    totals = table.totals.tolist()
    totals[VISITS] += 1

    state = _State(table, needed, totals[VISITS])
    for lane, word in enumerate(mailbox.offers.tolist()):
        state.answer(lane, word, mailbox, totals)
    missing = [expert for expert in needed if state.slot_of[expert] == NONE]
    victims = state.victims()
    is_too_wide = len(missing) > len(victims)
    copies = [] if is_too_wide else list(zip(missing, victims, strict=False))
    for expert, slot in copies:
        state.place(expert, slot)
    if needed and not is_too_wide:
        state.use(needed)
        totals[HITS] += len(needed) - len(missing)
        totals[MISSES] += len(missing)
    totals[TOO_WIDE] += is_too_wide
    totals[UNKNOWN_IDS] += unknown_count

    state.store(table, mailbox)
    table.totals.numpy()[:] = [(total + 2**31) % 2**32 - 2**31 for total in totals]
    flags = FLAG_TOO_WIDE * is_too_wide | FLAG_UNKNOWN_IDS * (unknown_count > 0)
    _record(mailbox.records.numpy(), totals, flags, int(table.step), routes)
    return copies


def _routes(topk_ids: torch.Tensor, is_padding: torch.Tensor | None, expert_count: int) -> list[int | None]:
    """The experts of the routes in order; NONE in padding rows, None for an id that the layer does not have."""
    rows = topk_ids.tolist()
    paddings = [False] * len(rows) if is_padding is None else is_padding.tolist()
    return [
        NONE if is_pad else expert if 0 <= expert < expert_count else None
        for row, is_pad in zip(rows, paddings, strict=True)
        for expert in row
    ]


def _record(records: np.ndarray, totals: list[int], flags: int, step: int, routes: list[int | None]) -> None:
    """Write the visit's row of the ring, as far as the words reach that it needs."""
    depth, word_count = records.shape
    listed = routes if len(routes) <= word_count - HEADER_WORDS else []
    payloads = [totals[HITS], totals[MISSES], flags, len(listed), step]
    payloads += [NO_EXPERT if expert is None or expert == NONE else expert for expert in listed]
    visit = totals[VISITS]
    records[row_of(visit, depth), : len(payloads)] = [pack_word(visit, payload) for payload in payloads]


class _State:
    """The table as lists, while one visit changes it."""

    def __init__(self, table: SlotTable, needed: list[int], visit: int) -> None:
        self.slot_of: list[int] = table.slot_of.tolist()
        self.expert_of: list[int] = table.expert_of.tolist()
        self.is_host: list[int] = table.is_host.tolist()
        self.used_at: list[int] = table.used_at.tolist()
        self.answered: list[int] = table.answered.tolist()
        self.heat = table.heat.numpy()
        self.cooled = self.heat * _DECAY
        self.classes = [max(math.frexp(count)[1], 0) for count in self.cooled.tolist()]
        self.needed = set(needed)
        self.visit = (visit + 2**31) % 2**32 - 2**31
        self.adopted: set[int] = set()

    def victims(self) -> list[int]:
        """The device's slots that hold nothing needed, the best victim first, those just adopted last."""
        return sorted(
            (
                slot
                for slot, expert in enumerate(self.expert_of)
                if not self.is_host[slot] and expert not in self.needed
            ),
            key=self._rank,
        )

    def _rank(self, slot: int) -> tuple[int, int, int]:
        expert = self.expert_of[slot]
        if slot in self.adopted:
            return (2**10, 0, slot)
        if expert == NONE:
            return (NONE, 0, slot)
        age = (self.visit - self.used_at[expert]) % 2**32
        return (self.classes[expert], -age, slot)

    def answer(self, lane: int, word: int, mailbox: Mailbox, totals: list[int]) -> None:
        """Adopt or refuse what a lane offers, unless that is done, or no slot can be lent in exchange."""
        offer = unpack_offer(word)
        if offer.sequence == self.answered[lane]:
            return
        assert self.is_host[offer.slot_id] and offer.expert_id < len(self.slot_of), "the host may not offer this"
        returned = offer.slot_id
        is_adopted = self.slot_of[offer.expert_id] == NONE
        if is_adopted:
            victims = [slot for slot in self.victims() if slot not in self.adopted]
            if not victims:
                return
            returned = victims[0]
            self._evict(returned)
            self.is_host[returned] = 1
            self.is_host[offer.slot_id] = 0
            self.place(offer.expert_id, offer.slot_id)
            self.used_at[offer.expert_id] = self.visit
            self.adopted.add(offer.slot_id)
        totals[ADOPTED if is_adopted else REFUSED] += 1
        self.answered[lane] = offer.sequence
        mailbox.answers.numpy()[lane] = pack_answer(Answer(offer.sequence, is_adopted, returned))

    def place(self, expert: int, slot: int) -> None:
        """The slot holds the expert from now on."""
        self._evict(slot)
        self.expert_of[slot] = expert
        self.slot_of[expert] = slot

    def _evict(self, slot: int) -> None:
        if self.expert_of[slot] != NONE:
            self.slot_of[self.expert_of[slot]] = NONE
            self.expert_of[slot] = NONE

    def use(self, needed: list[int]) -> None:
        """The visit is served: every expert cools, the needed ones are used."""
        self.heat[:] = self.cooled
        self.heat[needed] += np.float32(1)
        for expert in needed:
            self.used_at[expert] = self.visit

    def store(self, table: SlotTable, mailbox: Mailbox) -> None:
        """Write the lists back. The heat is in place already."""
        table.slot_of.numpy()[:] = self.slot_of
        table.expert_of.numpy()[:] = self.expert_of
        table.is_host.numpy()[:] = self.is_host
        table.used_at.numpy()[:] = self.used_at
        table.answered.numpy()[:] = self.answered
        mailbox.view.numpy()[:] = self.expert_of
