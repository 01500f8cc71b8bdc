"""A layer that the device serves, visit by visit, beside its reference; the same on the CPU, where kernels are
interpreted.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from moecxl_kernels.ensure import ensure_experts
from moecxl_kernels.gate import gate_lookahead
from moecxl_kernels.gather import gather_slabs, slab_map
from moecxl_kernels.remap import remap
from moecxl_kernels.tables import (
    NONE,
    VISIT_MASK,
    VISIT_SHIFT,
    VISITS,
    Mailbox,
    Offer,
    SlotTable,
    make_mailbox,
    make_table,
    next_sequence,
    pack_offer,
    read_record,
    unpack_answer,
)

from tests.kernels.reference_ensure import ensure
from tests.support.homes import random_bits
from vllm_moecxl.data.devices.base import DeviceBackend
from vllm_moecxl.data.host import anonymous_tensor
from vllm_moecxl.runtime.device_driven.layer import staged_words

EXPERT_COUNT, SLOT_COUNT, TOKEN_COUNT, TOPK, HIDDEN = 16, 7, 3, 2, 64
#: Rows of a slab: of any size, of several blocks with a tail, of whole 128-bit words.
ROW_BYTES = (1001, 3 * 16384 + 7, 4096)
DEPTH = 4


class Visits:
    """Look-up, gather, remap and the next gate as one piece of work on fixed buffers; and what it has to do.

    One slot is lent to the host, which fills it now and then and offers it.
    """

    def __init__(self, backend: DeviceBackend, device: torch.device) -> None:
        self.device, self._backend = device, backend
        self.homes = [_registered_home(backend, byte_count, seed) for seed, byte_count in enumerate(ROW_BYTES)]
        self.slots = [backend.allocate((SLOT_COUNT, byte_count), torch.uint8) for byte_count in ROW_BYTES]
        self._slabs = slab_map(
            [[rows[expert_id].data_ptr() for rows in self.homes] for expert_id in range(EXPERT_COUNT)],
            [rows.data_ptr() for rows in self.slots],
            ROW_BYTES,
            ROW_BYTES,
            device,
        )
        self.table: SlotTable = make_table(EXPERT_COUNT, SLOT_COUNT, 1, device)
        words = partial(staged_words, backend)
        self.mailbox: Mailbox = make_mailbox(SLOT_COUNT, 1, DEPTH, TOKEN_COUNT * TOPK, words)
        self.twin = make_table(EXPERT_COUNT, SLOT_COUNT, 1, "cpu")
        self._twin_mailbox = make_mailbox(SLOT_COUNT, 1, DEPTH, TOKEN_COUNT * TOPK)
        self.ids = torch.zeros((TOKEN_COUNT, TOPK), dtype=torch.int32, device=device)
        self.is_padding = torch.zeros(TOKEN_COUNT, dtype=torch.bool, device=device)
        self.x = torch.zeros((TOKEN_COUNT, HIDDEN), device=device)
        self.slot_ids = torch.zeros((TOKEN_COUNT, TOPK), dtype=torch.int32, device=device)
        self._gate = torch.randn((1, EXPERT_COUNT, HIDDEN), generator=torch.Generator().manual_seed(9))
        self._gate_there = self._gate.to(device)
        self.scores = words(DEPTH * TOKEN_COUNT * EXPERT_COUNT).view(DEPTH, -1)
        self._copies = torch.zeros((SLOT_COUNT, 2), dtype=torch.int32, device=device)
        self._copy_count = torch.zeros(1, dtype=torch.int32, device=device)
        self._rng = np.random.default_rng(11)
        self._lent_slot, self._sequence, self._is_waiting = SLOT_COUNT - 1, 0, False

    def work(self) -> None:
        """Queue one visit; nothing of it waits for anything."""
        ensure_experts(self.ids, self.is_padding, self.table, self.mailbox, self._copies, self._copy_count)
        gather_slabs(self._copies, self._copy_count, self._slabs, 8)
        remap(self.ids, self.is_padding, self.table.slot_of, self.slot_ids)
        gate_lookahead(self.x, self._gate_there, None, None, self.table.totals, self.scores, TOKEN_COUNT)

    def change(self) -> None:
        """New inputs in the same buffers, and perhaps an offer."""
        ids = self._rng.zipf(1.4, (TOKEN_COUNT, TOPK)) % EXPERT_COUNT
        self.ids.copy_(torch.from_numpy(ids.astype(np.int32)))
        is_padding = np.arange(TOKEN_COUNT) >= self._rng.integers(0, TOKEN_COUNT + 1)
        self.is_padding.copy_(torch.from_numpy(is_padding))
        self.x.copy_(torch.from_numpy(self._rng.standard_normal((TOKEN_COUNT, HIDDEN)).astype(np.float32)))
        if not self._is_waiting and self._rng.random() < 0.5:
            self._offer(int(self._rng.integers(EXPERT_COUNT)))

    def visit(self, serve: Callable[[], None]) -> None:
        """Have a visit served, by `work` or by what has captured it, and hold it against the reference."""
        serve()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        ensure(self.ids.cpu(), self.is_padding.cpu(), self.twin, self._twin_mailbox)
        for field, ours, other in zip(SlotTable._fields, self.table, self.twin, strict=True):
            assert torch.equal(ours.cpu(), other), field
        for field, ours, other in zip(Mailbox._fields, self.mailbox, self._twin_mailbox, strict=True):
            assert torch.equal(ours, other), field
        self._check_slots()
        self._check_scores()
        answer = unpack_answer(int(self.mailbox.answers[0]))
        if self._is_waiting and answer.sequence == self._sequence:
            self._lent_slot, self._is_waiting = answer.slot_id, False

    def _offer(self, expert_id: int) -> None:
        """Fill the lent slot on a stream of the host's, see that it is filled, and offer it."""
        stream = self._backend.copy_stream(0)
        for homes, slots in zip(self.homes, self.slots, strict=True):
            self._backend.copy(homes[expert_id], slots[self._lent_slot], stream)
        self._backend.synchronize(self._backend.record(stream))
        self._sequence, self._is_waiting = next_sequence(self._sequence), True
        word = pack_offer(Offer(self._sequence, expert_id, self._lent_slot))
        for mailbox in (self.mailbox, self._twin_mailbox):
            mailbox.offers[0] = word

    def _check_slots(self) -> None:
        """Every expert that has a slot is there, and routes lead to it."""
        slot_of = self.twin.slot_of.tolist()
        for homes, slots in zip(self.homes, self.slots, strict=True):
            there = slots.cpu()
            for expert_id, slot_id in enumerate(slot_of):
                assert slot_id == NONE or torch.equal(there[slot_id], homes[expert_id]), (expert_id, slot_id)
        visit = int(self.twin.totals[VISITS])
        record = read_record(self.mailbox.records, visit)
        assert record is not None
        taken = {slot_id for slot_id in slot_of if slot_id != NONE} or {0}
        rows = zip(self.ids.tolist(), self.is_padding.tolist(), self.slot_ids.tolist(), strict=True)
        for expert_ids, is_padding, slot_ids in rows:
            for expert_id, slot_id in zip(expert_ids, slot_ids, strict=True):
                assert slot_id in taken
                assert is_padding or record.is_too_wide or slot_id == slot_of[expert_id]

    def _check_scores(self) -> None:
        visit = int(self.twin.totals[VISITS])
        row = self.scores[(visit & VISIT_MASK) % DEPTH].view(TOKEN_COUNT, EXPERT_COUNT)
        assert (row >> VISIT_SHIFT == visit & VISIT_MASK).all()
        scores = (row & 0xFFFFFFFF).to(torch.uint32).view(torch.int32).view(torch.float32)
        torch.testing.assert_close(scores, self.x.cpu() @ self._gate[0].T, rtol=1e-4, atol=1e-4)


def _registered_home(backend: DeviceBackend, byte_count: int, seed: int) -> torch.Tensor:
    """[experts, bytes] of host memory that the device reads."""
    rows = anonymous_tensor((EXPERT_COUNT, byte_count), torch.uint8)
    rows.copy_(random_bits((EXPERT_COUNT, byte_count), torch.uint8, seed))
    assert backend.register(rows)
    return rows
