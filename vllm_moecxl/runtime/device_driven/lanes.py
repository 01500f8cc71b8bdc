"""The host's side of a layer that the device serves: a few slots are lent to the host, which fills them with experts
that are likely to be needed and offers them to the device.

The device alone knows what is in its slots, and changes it without asking. So that the two never fight over a slot each
slot has one owner, and changes hands by two words of the mailbox only:

1. A *lane* has one slot, which is the host's. The host has a slab brought there.
2. Once the host knows that the copies have ended, and not before, it writes an offer: this expert is in this slot.
   From then on it leaves the slot alone.
3. The next visit of the layer answers. Either it adopts the expert, takes the slot and lends another one in exchange,
   which holds nothing that the visit needs; or it refuses, since it has fetched the expert itself meanwhile, and gives
   the slot back.
4. The answer says which slot is the lane's from now on. Kernels that read it were queued before the visit that answers,
   on the same stream: they have ended, and the host may write it at once.

Offers are numbered, so that neither side takes an old word for a new one.
"""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterable

import numpy as np
import numpy.typing as npt
from moecxl_kernels.tables import Mailbox, Offer, next_sequence, pack_offer, unpack_answer

from vllm_moecxl.control.prefetch import LayerView
from vllm_moecxl.data.devices.base import DeviceBackend
from vllm_moecxl.data.fetch import Fetch
from vllm_moecxl.data.mover import Mover
from vllm_moecxl.data.slabs import Cells, Home
from vllm_moecxl.runtime.counters import Counters, PrefetchOutcome
from vllm_moecxl.types import Cause, SlotState

#: Calls of `settle` that have nothing to do, until one of them counts what the device has in its slots: the sidecar
#: calls it for each layer, some thousand times a second.
_COUNT_PERIOD = 256


class _Lane:
    """A slot that is lent to the host, and what becomes of it.

    It is idle, or filling (`fetch`), or offered (`is_offered`).

    Attributes:
        expert_id: what is, or will be, in the slot; None while it is idle.
        sequence: of the last offer, 0 before the first.
        was_needed: a visit needed the expert since it was offered.
    """

    __slots__ = ("expert_id", "fetch", "is_offered", "sequence", "slot_id", "was_needed")

    def __init__(self, slot_id: int) -> None:
        self.slot_id = slot_id
        self.expert_id: int | None = None
        self.fetch: Fetch | None = None
        self.is_offered = False
        self.sequence = 0
        self.was_needed = False

    def rest(self) -> None:
        """Be idle."""
        self.expert_id = self.fetch = None
        self.is_offered = self.was_needed = False


class DeviceSlots:
    """See the module. Any thread; the forward needs nothing of it.

    What becomes of a prefetch is counted as far as the host can know. It is late if the layer was visited before the
    offer, or if the device refuses it; useful if it was adopted and a visit needed it that has been reported since
    the offer; wasted if it was not brought to an end, or has left the device's slots before such a visit. The view and
    the reports of visits may be a visit or more behind: so a few that were useful count as wasted, and the other way
    round.

    Args:
        home: the slabs.
        cells: the slots' memory, those of the lanes too.
        mailbox: the words that both sides read and write.
        lane_count: slots that are lent to the host: to begin with, the last ones.

    Attributes:
        slot_count: slots that the device has for itself, in which a forward finds its experts.
        unused: experts that were prefetched, and not needed since. Each leaves it once, useful, late or wasted.
        is_busy: whether a lane has something under way, so that `settle` may move it on.
    """

    def __init__(
        self,
        home: Home,
        cells: Cells,
        mailbox: Mailbox,
        backend: DeviceBackend,
        mover: Mover,
        counters: Counters,
        lane_count: int,
    ) -> None:
        assert len(mailbox.offers) == len(mailbox.answers) == lane_count < len(mailbox.view) == cells.cell_count
        self.home = home
        self.cells = cells
        self._mailbox = mailbox
        self._backend = backend
        self._mover = mover
        self._counters = counters
        self._lock = threading.Lock()
        self.slot_count = cells.cell_count - lane_count
        self._lanes = [_Lane(self.slot_count + lane_id) for lane_id in range(lane_count)]
        self.unused: set[int] = set()
        self.is_busy = False
        self._settle_count = 0
        self._counted = dict.fromkeys(SlotState, 0)
        self._count(self._resident())

    def view(self) -> LayerView:
        """What is here, for whoever plans prefetches; of the device's slots as its latest visit left them."""
        with self._lock:
            self._settle()
            resident = self._resident()
            pending = np.zeros(self.home.expert_count, dtype=np.bool_)
            pending[self._pending()] = True
            return LayerView(resident, pending, self._free_count(resident), self.slot_count)

    def prefetch(
        self,
        expert_ids: Collection[int],
        deadline: float,
        wanters: Collection[str] = (),
        keep: npt.NDArray[np.bool_] | None = None,
    ) -> int:
        """Begin to fetch experts that a later forward may need, as many as there are idle lanes, and join those under
        way.

        Args:
            expert_ids: most valuable first.
            deadline: position of the layer's next forward.
            wanters: requests that they are for.
            keep: has no effect. What is evicted for an adopted expert is the device's own affair.

        Returns:
            How many fetches were begun.
        """
        del keep
        begun_count = 0
        with self._lock:
            self._settle()
            for lane in self._lanes:
                if lane.fetch is not None and lane.expert_id in expert_ids:
                    self._mover.promote(lane.fetch, Cause.PREFETCH, deadline, wanters)
            resident = self._resident()
            idle = [lane for lane in self._lanes if lane.expert_id is None]
            pending = self._pending()
            absent = [one for one in dict.fromkeys(expert_ids) if not resident[one] and one not in pending]
            for lane, expert_id in zip(idle, absent, strict=False):
                rows = self.cells.rows(lane.slot_id)
                lane.fetch = self._mover.start(self.home, expert_id, rows, Cause.PREFETCH, deadline, wanters)
                lane.expert_id = expert_id
                self.is_busy = True
                self._judge([expert_id], PrefetchOutcome.WASTED)  # it was here before, and has left
                self.unused.add(expert_id)
                begun_count += 1
            self._count(resident)
        return begun_count

    def drop_prefetches(self, needed: Collection[int]) -> None:
        """The layer has been visited: stop bringing what was expected there. What was needed of it the device has
        fetched by itself."""
        if not self.unused:  # the sidecar alone adds to them, and calls this
            return
        with self._lock:
            for lane in self._lanes:
                if lane.fetch is not None:
                    self._judge({lane.fetch.expert_id}.intersection(needed), PrefetchOutcome.LATE)
                    self._mover.give_up(lane.fetch)
                elif lane.expert_id in needed:
                    lane.was_needed = True
            self._settle()
            resident = self._resident()
            adopted = self.unused.difference(self._pending())
            used = adopted.intersection(needed)
            self._judge(used, PrefetchOutcome.USEFUL)
            self._judge([one for one in adopted - used if not resident[one]], PrefetchOutcome.WASTED)
            self._count(resident)

    def settle(self) -> None:
        """Offer what has arrived, and see what was answered. Any thread, now and then."""
        with self._lock:
            self._settle_count += 1
            if self._settle() or self._settle_count % _COUNT_PERIOD == 0:
                self._count(self._resident())

    def _settle(self) -> bool:
        """Move the lanes on as far as they can be; whether one has moved."""
        busy = [(lane_id, lane) for lane_id, lane in enumerate(self._lanes) if lane.expert_id is not None]
        has_moved = False
        if any(lane.is_offered for _, lane in busy):
            answers = self._backend.read_words(self._mailbox.answers)
            for lane_id, lane in busy:
                has_moved |= lane.is_offered and self._take_answer(lane, int(answers[lane_id]))
        if any(lane.fetch is not None for _, lane in busy):
            self._mover.poll()
        for lane_id, lane in busy:
            if lane.fetch is None:
                continue
            if lane.fetch.has_landed:  # which the mover says when it has seen the event behind each of its copies
                self._offer(lane_id, lane)
                has_moved = True
            elif lane.fetch.is_over:
                self._abandon(lane)
                has_moved = True
        self.is_busy = any(lane.expert_id is not None for _, lane in busy)
        return has_moved

    def _offer(self, lane_id: int, lane: _Lane) -> None:
        assert lane.expert_id is not None
        lane.sequence = next_sequence(lane.sequence)
        word = pack_offer(Offer(lane.sequence, lane.expert_id, lane.slot_id))
        self._backend.write_word(self._mailbox.offers, lane_id, word)
        lane.fetch = None
        lane.is_offered = True

    def _take_answer(self, lane: _Lane, word: int) -> bool:
        """Whether a word answers the lane's offer, and then what it says. It may be an older one."""
        answer = unpack_answer(word)
        if answer.sequence != lane.sequence:
            return False
        assert lane.expert_id is not None
        if not answer.is_adopted:
            self._judge([lane.expert_id], PrefetchOutcome.LATE)
        elif lane.was_needed:
            self._judge([lane.expert_id], PrefetchOutcome.USEFUL)
        lane.slot_id = answer.slot_id
        lane.rest()
        return True

    def _abandon(self, lane: _Lane) -> None:
        """A fetch has failed or was given up, and nothing writes to the slot any more."""
        assert lane.expert_id is not None
        self._judge([lane.expert_id], PrefetchOutcome.WASTED)
        lane.rest()

    def _judge(self, expert_ids: Iterable[int], outcome: PrefetchOutcome) -> None:
        """Say what came of prefetches, of those of which it was not said before."""
        if judged := self.unused.intersection(expert_ids):
            self.unused -= judged
            self._counters.add({self._counters.prefetch[outcome]: len(judged)})

    def _pending(self) -> list[int]:
        """Experts that lanes are filling with, or have offered."""
        return [lane.expert_id for lane in self._lanes if lane.expert_id is not None]

    def _resident(self) -> npt.NDArray[np.bool_]:
        """[experts] bool, what was in the device's slots after its latest visit."""
        expert_of = self._backend.read_words(self._mailbox.view)
        resident = np.zeros(self.home.expert_count, dtype=np.bool_)
        resident[expert_of[expert_of >= 0]] = True
        return resident

    def _free_count(self, resident: npt.NDArray[np.bool_]) -> int:
        # The device may be at the view: it need not add up.
        return max(self.slot_count - int(np.count_nonzero(resident)), 0)

    def _count(self, resident: npt.NDArray[np.bool_]) -> None:
        """Move the gauge of slot states by what changed in this layer."""
        filling_count = len(self._pending())
        free_count = self._free_count(resident)
        counts = {
            SlotState.FREE: free_count + len(self._lanes) - filling_count,
            SlotState.FILLING: filling_count,
            SlotState.RESIDENT: self.slot_count - free_count,
        }
        amounts = {self._counters.slots[state]: counts[state] - self._counted[state] for state in counts}
        self._counted = counts
        if any(amounts.values()):
            self._counters.add(amounts)
