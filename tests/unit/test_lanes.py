"""Lanes: what is brought for the device, offered to it and answered by it, and what the host makes of that."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from moecxl_kernels.tables import NONE, SEQUENCE_MAX, Mailbox, Offer, unpack_answer, unpack_offer

from tests.kernels import reference_ensure
from tests.races.lending import device_table
from tests.support.homes import PROFILE, random_bits, store
from tests.unit.test_modelled import InOrder, Lazy
from vllm_moecxl.data.banks.base import RowCopy
from vllm_moecxl.data.banks.memory import DramBank, MemoryRows
from vllm_moecxl.data.devices.base import Touches
from vllm_moecxl.data.devices.modelled import Chooser, ModelledBackend
from vllm_moecxl.data.mover import Mover
from vllm_moecxl.data.slabs import Cells
from vllm_moecxl.errors import TransferError
from vllm_moecxl.runtime.counters import Counters, PrefetchOutcome
from vllm_moecxl.runtime.device_driven.lanes import DeviceSlots
from vllm_moecxl.types import SlotState

EXPERT_COUNT, SLOT_COUNT, LANE_COUNT = 8, 5, 2
#: Slots that are lent to begin with.
FIRST, SECOND = 3, 4


class FailingBank(DramBank):
    """A bank whose memory the device does not read by itself, and which is told to fail."""

    fails = False

    def read(self, copies: Sequence[RowCopy]) -> None:
        if self.fails:
            raise TransferError("the bank is told to fail")
        super().read(copies)


class Rig:
    """One layer: lanes and mover, and the device's side as the kernels' reference has it."""

    def __init__(
        self, chooser: Chooser | None = None, *, lane_count: int = LANE_COUNT, is_staged: bool = False
    ) -> None:
        self.backend = ModelledBackend(chooser or InOrder())
        self.bank = FailingBank("bank", "bank", None, PROFILE)
        self.home = store({"a": random_bits((EXPERT_COUNT, 4), torch.int16)}, banks=[self.bank], verify="off")
        self.counters = Counters(["bank"])
        self.mover = Mover([self.bank], self.backend, self.counters, has_hands=False)
        if not is_staged:
            rows = self.home.shards[0].rows[0]
            assert isinstance(rows, MemoryRows) and self.backend.register(rows.tensor)
            self.mover.mark_registered("bank")
        self.cells = Cells(self.home.layout, SLOT_COUNT, self.backend)
        self.table = device_table(EXPERT_COUNT, SLOT_COUNT, lane_count)
        self.mailbox = Mailbox(
            offers=self.backend.stage(lane_count * 8).view(torch.int64),
            answers=self.backend.stage(lane_count * 8).view(torch.int64),
            view=torch.full((SLOT_COUNT,), NONE, dtype=torch.int32),
            records=torch.zeros((2, 16), dtype=torch.int64),
        )
        self.slots = DeviceSlots(
            self.home, self.cells, self.mailbox, self.backend, self.mover, self.counters, lane_count
        )

    def visit(self, *expert_ids: int) -> None:
        """A forward needs these, and the sidecar does not know of it yet."""

        def look_up() -> None:
            reference_ensure.ensure(torch.tensor([expert_ids], dtype=torch.int32), None, self.table, self.mailbox)

        def touched() -> Touches:
            lane_ids = range(len(self.mailbox.offers))
            return [(self.mailbox.offers, lane_ids)], [(self.mailbox.answers, lane_ids)]

        self.backend.run("look-up", look_up, touched)
        self.backend.synchronize(self.backend.record(self.backend.compute_stream()))

    def bring(self, *expert_ids: int) -> None:
        """Prefetch, and let all of it arrive."""
        assert self.slots.prefetch(expert_ids, 1.0) == len(expert_ids)
        self.land()

    def land(self) -> None:
        """Let arrive what is on its way."""
        while not self.mover.is_idle:
            self.mover.feed()
        self.slots.settle()

    @property
    def offers(self) -> list[Offer]:
        """By lane, the last offer."""
        return [unpack_offer(word) for word in self.mailbox.offers.tolist()]

    @property
    def resident(self) -> set[int]:
        """What is in the device's slots, as the host sees it."""
        return set(np.flatnonzero(self.slots.view().resident).tolist())

    @property
    def pending(self) -> set[int]:
        """What is on its way there, as the host sees it."""
        return set(np.flatnonzero(self.slots.view().pending).tolist())

    @property
    def outcomes(self) -> tuple[int, int, int]:
        """Prefetches that were useful, late, wasted."""
        useful, late, wasted = (int(self.counters.values[self.counters.prefetch[one]]) for one in PrefetchOutcome)
        return useful, late, wasted

    @property
    def gauge(self) -> list[int]:
        """Slots that are free, filling, resident."""
        return [int(self.counters.values[self.counters.slots[state]]) for state in SlotState]


def test_what_was_prefetched_is_offered_adopted_and_useful() -> None:
    rig = Rig()
    rig.bring(6)
    assert rig.offers == [Offer(1, 6, FIRST), Offer(0, 0, 0)]
    assert torch.equal(rig.cells.tensors[0][FIRST], rig.home.tensors[0][6])
    assert rig.pending == {6} and rig.resident == set() and rig.outcomes == (0, 0, 0)
    rig.visit(6)
    assert rig.table.slot_of[6] == FIRST and rig.table.is_host.tolist() == [1, 0, 0, 0, 1], "it lends another one"
    assert rig.resident == {6} and rig.pending == set() and rig.slots.unused == {6}
    rig.slots.drop_prefetches([6])
    assert rig.outcomes == (1, 0, 0) and rig.slots.unused == set()
    rig.slots.drop_prefetches([6])
    assert rig.outcomes == (1, 0, 0), "it is said once"


def test_a_lane_goes_on_with_the_slot_that_it_got_in_exchange() -> None:
    rig = Rig()
    for number, expert_id in enumerate([4, 5, 6, 7, 4, 5, 6, 7]):
        rig.bring(expert_id)
        lent = rig.table.is_host.tolist()
        offer = rig.offers[0]
        assert offer == Offer(number + 1, expert_id, offer.slot_id) and lent[offer.slot_id]
        rig.visit(expert_id)
        rig.slots.drop_prefetches([expert_id])
    assert rig.outcomes == (8, 0, 0) and rig.table.totals[2] == 0, "the device has fetched nothing"
    for expert_id in rig.resident:
        slot_id = rig.table.slot_of[expert_id]
        assert torch.equal(rig.cells.tensors[0][slot_id], rig.home.tensors[0][expert_id])


def test_nothing_is_offered_before_its_copy_is_known_to_have_ended() -> None:
    rig = Rig(Lazy())
    rig.slots.prefetch([6], 1.0)
    rig.mover.feed()
    rig.slots.settle()
    assert rig.offers[0].sequence == 0 and rig.pending == {6}
    rig.land()
    assert rig.offers[0] == Offer(1, 6, FIRST)


def test_there_are_as_many_prefetches_as_lanes() -> None:
    rig = Rig()
    rig.visit(0)
    assert rig.slots.prefetch([0, 1, 1, 2, 3], 1.0) == 2, "one is there, one is asked for twice, one is too much"
    assert rig.pending == {1, 2}
    assert rig.slots.prefetch([1, 3], 1.0) == 0
    rig.land()
    assert rig.slots.prefetch([4], 1.0) == 0, "what is offered is not to be touched"
    rig.visit(0)
    assert rig.slots.prefetch([3], 1.0) == 1


def test_a_prefetch_joins_what_is_under_way() -> None:
    rig = Rig()
    rig.slots.prefetch([1, 2], 5.0, ["a"])
    assert rig.slots.prefetch([2], 1.0, ["b"]) == 0
    assert [fetch.expert_id for fetch in rig.mover.forget("a")] == [1], "the other one is wanted by somebody else"
    rig.land()
    assert [offer.expert_id for offer in rig.offers] == [0, 2]
    assert rig.slots.prefetch([2], 1.0) == 0, "the idle lane does not bring it once more"


def test_an_offer_that_comes_too_late_is_refused() -> None:
    rig = Rig()
    rig.bring(6)
    rig.table.slot_of[6], rig.table.expert_of[0], rig.mailbox.view[0] = 0, 6, 6  # the device was faster
    rig.visit(6)
    assert rig.table.is_host.tolist() == [0, 0, 0, 1, 1]
    rig.slots.settle()
    assert rig.outcomes == (0, 1, 0)
    rig.bring(7)
    assert rig.offers[0] == Offer(2, 7, FIRST), "the lane has got its slot back"


def test_what_the_device_needs_before_it_is_offered_is_late() -> None:
    rig = Rig()
    rig.slots.prefetch([6], 1.0)
    rig.visit(6)
    rig.slots.drop_prefetches([6])
    assert rig.outcomes == (0, 1, 0) and rig.slots.prefetch([7, 5], 1.0) == 2, "the lane is idle again"
    rig.land()
    assert [offer.expert_id for offer in rig.offers] == [7, 5]


def test_what_a_visit_needed_that_was_reported_before_its_answer_is_useful() -> None:
    rig = Rig()
    rig.bring(6)
    rig.slots.drop_prefetches([6])
    assert rig.outcomes == (0, 0, 0)
    rig.visit(6)
    rig.slots.settle()
    assert rig.outcomes == (1, 0, 0)


def test_what_was_not_needed_is_given_up() -> None:
    rig = Rig(Lazy())
    rig.slots.prefetch([6], 1.0)
    rig.mover.feed()
    rig.slots.drop_prefetches([0])
    assert rig.pending == {6}, "its copy may still be under way"
    rig.land()
    assert rig.offers[0].sequence == 0 and rig.pending == set() and rig.outcomes == (0, 0, 1)


def test_what_leaves_the_slots_before_it_was_needed_is_wasted() -> None:
    rig = Rig()
    rig.bring(6)
    rig.visit(0)
    rig.slots.drop_prefetches([0])
    assert rig.resident == {0, 6} and rig.outcomes == (0, 0, 0)
    for needed in ([1, 2, 3], [4, 5, 7]):
        rig.visit(*needed)
        rig.slots.drop_prefetches(needed)
    assert rig.resident == {4, 5, 7} and rig.outcomes == (0, 0, 1) and rig.slots.unused == set()


def test_what_is_brought_once_more_was_wasted_the_first_time() -> None:
    rig = Rig()
    rig.bring(6)
    for needed in ([0], [1, 2, 3], [4, 5, 7]):
        rig.visit(*needed)
    assert rig.slots.unused == {6} and rig.outcomes == (0, 0, 0)
    rig.bring(6)
    assert rig.slots.unused == {6} and rig.outcomes == (0, 0, 1)


def test_a_failing_bank_leaves_the_lane_idle() -> None:
    rig = Rig(is_staged=True)
    rig.bank.fails = True
    rig.slots.prefetch([6], 1.0)
    rig.land()
    assert rig.offers[0].sequence == 0 and rig.pending == set() and rig.outcomes == (0, 0, 1)
    assert rig.counters.values[rig.counters.bank_up["bank"]] == 0
    rig.bank.fails = False
    rig.bring(7)
    assert rig.offers[0] == Offer(1, 7, FIRST)


def test_sequences_begin_again_and_an_old_answer_is_none() -> None:
    rig = Rig()
    lane = rig.slots._lanes[0]
    lane.sequence = SEQUENCE_MAX - 1
    for sequence in (SEQUENCE_MAX, 1, 2):
        rig.bring(6)
        assert rig.offers[0].sequence == sequence
        before = unpack_answer(int(rig.mailbox.answers[0]))
        rig.slots.settle()
        assert rig.pending == {6}, f"{before} was given before"
        rig.visit(6)
        rig.slots.settle()
        assert rig.pending == set()
        for needed in ([0, 1, 2], [3, 4, 5]):
            rig.visit(*needed)
        rig.slots.drop_prefetches([])


def test_the_view_is_of_the_slots_that_a_forward_finds_its_experts_in() -> None:
    rig = Rig()
    view = rig.slots.view()
    assert (view.free_count, view.slot_count, rig.slots.slot_count) == (3, 3, 3) and not view.resident.any()
    rig.visit(1, 7)
    view = rig.slots.view()
    assert view.free_count == 1 and np.flatnonzero(view.resident).tolist() == [1, 7]


@pytest.mark.parametrize("lane_count", [0, 1, 2])
def test_slots_are_counted_by_their_state(lane_count: int) -> None:
    rig = Rig(lane_count=lane_count)
    assert rig.gauge == [5, 0, 0]
    rig.visit(0)
    for _ in range(1000):
        rig.slots.settle()  # nobody prefetches, and the gauge follows now and then
    assert rig.gauge == [4, 0, 1]
    assert not rig.slots.is_busy
    assert rig.slots.prefetch([6, 7], 1.0) == lane_count
    assert rig.gauge == [4 - lane_count, lane_count, 1] and rig.slots.is_busy == bool(lane_count)
    rig.land()
    assert rig.slots.is_busy == bool(lane_count), "what is offered is still under way"
    rig.visit(6)
    rig.slots.view()
    assert not rig.slots.is_busy
    rig.slots.drop_prefetches([6])
    rig.slots.prefetch([], 1.0)
    assert sum(rig.gauge) == 5 and rig.gauge[1] == 0


def test_a_prefetch_that_cannot_begin_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    rig = Rig()

    def refuse(*_: object) -> None:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(rig.mover, "start", refuse)
        with pytest.raises(MemoryError):
            rig.slots.prefetch([6], 1.0)
    assert rig.pending == set() and rig.slots.unused == set()
    rig.bring(6)
