"""Which expert is in which slot of one layer, and who holds it: lookups, fills, leases, evictions.

Leases are counted in epochs rather than per slot: a lease stamps its slots with a fresh number, and a slot is held
while its stamp is newer than the newest number up to which all leases have ended. Taking a lease is one vectorised
store and ending it is O(1), which is what the hot path can afford. A slot may stay held a little longer than its own
lease (until older ones end too), never shorter.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from vllm_moecxl.control.eviction import EvictionPolicy
from vllm_moecxl.errors import IntegrityError
from vllm_moecxl.types import Lookup, SlotState

ABSENT = -1

#: An attribute of an enum costs more than a micro-second to look up, and a miss looks up several.
_FREE, _FILLING, _RESIDENT = (int(state) for state in (SlotState.FREE, SlotState.FILLING, SlotState.RESIDENT))
_HIT, _PENDING, _MISS = Lookup.HIT, Lookup.PENDING, Lookup.MISS

ExpertIds = npt.NDArray[np.integer]
SlotIds = npt.NDArray[np.int32]


class Lease:
    """A hold on slots that forbids their eviction until `Residency.release`.

    Attributes:
        epoch: its stamp.
        slot_ids: int32 in the shape of the request, a slot for each of its expert ids.
        distinct_count: how many different slots these are.
    """

    __slots__ = ("distinct_count", "epoch", "slot_ids")

    def __init__(self, epoch: int, slot_ids: SlotIds, distinct_count: int) -> None:
        self.epoch = epoch
        self.slot_ids = slot_ids
        self.distinct_count = distinct_count


class Residency:
    """The slot table of one layer. Not thread-safe: the thread that runs the forward owns it.

    Args:
        expert_count: experts of the layer on this rank.
        slot_count: slots of the layer, at most `expert_count`.
        policy: names the victims.
    """

    def __init__(self, expert_count: int, slot_count: int, policy: EvictionPolicy) -> None:
        assert 1 <= slot_count <= expert_count
        self.expert_count = expert_count
        self.slot_count = slot_count
        self.policy = policy
        self._state = np.full(slot_count, SlotState.FREE, dtype=np.uint8)
        self._expert_of = np.full(slot_count, ABSENT, dtype=np.int32)
        #: Slot of an expert that may be read, and of one that is filling; the first is what the hot path indexes.
        self._resident_slot_of = np.full(expert_count, ABSENT, dtype=np.int32)
        self._filling_slot_of = np.full(expert_count, ABSENT, dtype=np.int32)
        self._stamp = np.zeros(slot_count, dtype=np.int64)
        self._epoch = 0
        self._ended_epoch = 0
        self._open_epochs: dict[int, None] = {}
        self._free_count = slot_count

    def lookup(self, expert_id: int) -> Lookup:
        """HIT, PENDING or MISS for one expert."""
        if self._resident_slot_of[expert_id] != ABSENT:
            return _HIT
        return _PENDING if self._filling_slot_of[expert_id] != ABSENT else _MISS

    def resident_mask(self) -> npt.NDArray[np.bool_]:
        """[experts] bool, which experts may be read."""
        mask: npt.NDArray[np.bool_] = self._resident_slot_of != ABSENT
        return mask

    def resident_slot(self, expert_id: int) -> int:
        """Slot of a resident expert."""
        slot_id = int(self._resident_slot_of[expert_id])
        assert slot_id != ABSENT
        return slot_id

    def state_counts(self) -> dict[SlotState, int]:
        """Number of slots in each state."""
        counts = np.bincount(self._state, minlength=len(SlotState))
        return {state: int(counts[state]) for state in SlotState}

    def lease(self, expert_ids: npt.NDArray[np.uint32]) -> Lease | None:
        """Hold the slots of `expert_ids`, or None (and nothing changed) unless every one of them is resident.

        Args:
            expert_ids: uint32 of any shape, repeats allowed, at least one. Unsigned, so that a negative id cannot wrap
                around to a valid row.

        Raises:
            IntegrityError: an id that this layer does not have.
        """
        try:
            slot_ids = self._resident_slot_of.take(expert_ids)
        except IndexError:
            self.require_known(expert_ids)
            raise
        # argmin with an item costs a fraction of min, which goes through the ufunc machinery.
        if slot_ids.item(slot_ids.argmin()) < 0:
            return None
        self._epoch = epoch = self._epoch + 1
        self._open_epochs[epoch] = None
        self._stamp[slot_ids] = epoch
        return Lease(epoch, slot_ids, int(np.count_nonzero(self._stamp == epoch)))

    def visit(self, expert_ids: npt.NDArray[np.uint32]) -> Lease | None:
        """A forward arrives and needs these experts: tell the policy, and hold them as `lease` does.

        Called once by each forward, before anything else. What it leases later on is the same visit.

        Raises:
            IntegrityError: an id that this layer does not have.
        """
        lease = self.lease(expert_ids)
        self.policy.record(expert_ids)
        return lease

    def require_known(self, expert_ids: npt.NDArray[np.uint32]) -> None:
        """Check ids before a kernel reads rows by them; unsigned, as for `lease`.

        Raises:
            IntegrityError: an id that this layer does not have.
        """
        if (worst := int(expert_ids.max())) >= self.expert_count:
            shown = worst - (1 << 32) if worst >= 1 << 31 else worst
            raise IntegrityError(
                f"the router chose expert {shown} of a layer with {self.expert_count} experts: "
                "the request is refused before a kernel reads outside its weights"
            )

    def release(self, lease: Lease) -> None:
        """End a lease, once the device has finished reading its slots. A lease ends once."""
        del self._open_epochs[lease.epoch]
        self._ended_epoch = next(iter(self._open_epochs)) - 1 if self._open_epochs else self._epoch

    def is_held(self, slot_id: int) -> bool:
        """Whether a lease forbids the eviction of a slot."""
        return bool(self._stamp[slot_id] > self._ended_epoch)

    def begin_fill(self, expert_id: int, keep: npt.NDArray[np.bool_], *, is_urgent: bool = True) -> int | None:
        """Take a slot for an absent expert: a FREE one, else a victim's.

        Args:
            expert_id: an expert that is neither resident nor filling.
            keep: [experts] bool, experts that the current forward still needs: evicted only where every other slot is
                held, filling, or of that kind too, and only if this is urgent.
            is_urgent: whether the forward cannot go on without this expert.

        Returns:
            The slot, now FILLING; None where no slot may be evicted, and then nothing has changed.
        """
        assert self.lookup(expert_id) is _MISS
        if self._free_count:
            slot_id = int((self._state == _FREE).argmax())
            self._free_count -= 1
        else:
            evictable = (self._state == _RESIDENT) & (self._stamp <= self._ended_epoch)
            dispensable = evictable & ~keep[self._expert_of]
            if np.count_nonzero(dispensable) or not is_urgent:
                evictable = dispensable
            if not np.count_nonzero(evictable):
                return None
            slot_id = self.policy.victim(evictable, self._stamp)
            assert evictable[slot_id], "an eviction policy named a slot that is held"
            self._resident_slot_of[self._expert_of[slot_id]] = ABSENT
        self._state[slot_id] = _FILLING
        self._expert_of[slot_id] = expert_id
        self._filling_slot_of[expert_id] = slot_id
        return slot_id

    def complete_fill(self, slot_id: int) -> None:
        """The bytes of a FILLING slot have arrived: its expert may be read."""
        expert_id = self._end_fill(slot_id)
        self._state[slot_id] = _RESIDENT
        self._resident_slot_of[expert_id] = slot_id
        self._stamp[slot_id] = self._ended_epoch  # as recent as can be without being held
        self.policy.admit(slot_id, expert_id)

    def abort_fill(self, slot_id: int) -> None:
        """The copy into a FILLING slot failed: the slot is FREE again and its expert absent."""
        self._end_fill(slot_id)
        self._state[slot_id] = _FREE
        self._expert_of[slot_id] = ABSENT
        self._free_count += 1

    def check(self) -> None:
        """Assert every invariant; for tests."""
        for slot_id in range(self.slot_count):
            expert_id = int(self._expert_of[slot_id])
            match SlotState(self._state[slot_id]):
                case SlotState.FREE:
                    assert expert_id == ABSENT and not self.is_held(slot_id)
                case SlotState.FILLING:
                    assert self._filling_slot_of[expert_id] == slot_id and not self.is_held(slot_id)
                case SlotState.RESIDENT:
                    assert self._resident_slot_of[expert_id] == slot_id
        assert self._free_count == np.count_nonzero(self._state == SlotState.FREE)
        owned = np.count_nonzero(self._resident_slot_of != ABSENT) + np.count_nonzero(self._filling_slot_of != ABSENT)
        assert owned == np.count_nonzero(self._state != SlotState.FREE)
        assert not np.any((self._resident_slot_of != ABSENT) & (self._filling_slot_of != ABSENT))

    def _end_fill(self, slot_id: int) -> int:
        assert self._state[slot_id] == _FILLING
        expert_id = int(self._expert_of[slot_id])
        self._filling_slot_of[expert_id] = ABSENT
        return expert_id
