"""A state machine that drives `Residency` beside an oracle of plain sets and dicts."""

from __future__ import annotations

from copy import deepcopy

import numpy as np
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from vllm_moecxl.control.eviction import ExpertIds, LeastRecentlyUsed
from vllm_moecxl.control.residency import Lease, Residency
from vllm_moecxl.errors import IntegrityError
from vllm_moecxl.types import Lookup, SlotState

Draw = st.DataObject


class WatchedPolicy(LeastRecentlyUsed):
    """Remembers what it is told: other policies than this one live on it."""

    def __init__(self, slot_count: int) -> None:
        super().__init__(slot_count)
        self.told: list[tuple[int | str, ...]] = []

    def record(self, expert_ids: ExpertIds) -> None:
        self.told.append(("visit", *sorted(set(expert_ids.flatten().tolist()))))

    def admit(self, slot_id: int, expert_id: int) -> None:
        self.told.append((slot_id, expert_id))


class OpenLease:
    """A lease and when it was taken, as the oracle sees it."""

    def __init__(self, lease: Lease, time: int, slot_of: dict[int, int]) -> None:
        self.lease = lease
        self.time = time
        self.slot_of = slot_of


class ResidencyMachine(RuleBasedStateMachine):
    """Every call is answered by the oracle first; after each, the two agree about everything that can be seen."""

    @initialize(expert_count=st.integers(1, 6), data=st.data(), is_warm=st.booleans())
    def start(self, expert_count: int, data: Draw, *, is_warm: bool) -> None:
        slot_count = data.draw(st.integers(1, min(expert_count, 4)), "slots")
        self.policy = WatchedPolicy(slot_count)
        self.residency = Residency(expert_count, slot_count, self.policy)
        self.expert_ids = range(expert_count)
        self.slot_ids = range(slot_count)
        self.resident: dict[int, int] = {}  # expert -> slot
        self.filling: dict[int, int] = {}
        self.free = set(self.slot_ids)
        self.open: list[OpenLease] = []
        self.told: list[tuple[int | str, ...]] = []  # what the policy has to have been told
        self.time = 0  # leases so far
        self.read_at = dict.fromkeys(self.slot_ids, 0)  # slot -> last read or fetch
        self.leased_at = dict.fromkeys(self.slot_ids, 0)  # slot -> last lease of it
        for expert_id in self.slot_ids if is_warm else ():
            self.fill(expert_id, set())
            self.end(expert_id, arrives=True)

    def is_held(self, slot_id: int) -> bool:
        """A slot is held until every lease that is not younger than its last one has ended."""
        return any(held.time <= self.leased_at[slot_id] for held in self.open)

    def settled_time(self) -> int:
        """The newest lease such that it and all older ones have ended."""
        return min((held.time for held in self.open), default=self.time + 1) - 1

    # -- leases

    def take(self, ids: list[int], *, column: bool = False, is_visit: bool = False) -> None:
        request = np.array(ids, dtype=np.uint32)
        ask = self.residency.visit if is_visit else self.residency.lease
        lease = ask(request[:, None] if column else request)
        if is_visit:
            self.told.append(("visit", *sorted(set(ids))))
        if not set(ids) <= self.resident.keys():
            assert lease is None
            return
        assert lease is not None
        slots = {self.resident[expert_id] for expert_id in ids}
        assert lease.slot_ids.flatten().tolist() == [self.resident[expert_id] for expert_id in ids]
        assert lease.slot_ids.dtype == np.int32 and lease.slot_ids.ndim == 1 + column
        assert lease.distinct_count == len(slots)
        self.time += 1
        for slot_id in slots:
            self.read_at[slot_id] = self.leased_at[slot_id] = self.time
        self.open.append(OpenLease(lease, self.time, {expert_id: self.resident[expert_id] for expert_id in ids}))

    @rule(data=st.data(), is_visit=st.booleans())
    def lease_any(self, data: Draw, *, is_visit: bool) -> None:
        ids = data.draw(st.lists(st.sampled_from(self.expert_ids), min_size=1, max_size=6), "ids")
        self.take(ids, is_visit=is_visit)

    @precondition(lambda self: self.resident)
    @rule(data=st.data(), column=st.booleans(), is_visit=st.booleans())
    def lease_resident(self, data: Draw, *, column: bool, is_visit: bool) -> None:
        ids = data.draw(st.lists(st.sampled_from(sorted(self.resident)), min_size=1, max_size=6), "ids")
        self.take(ids, column=column, is_visit=is_visit)

    @rule(data=st.data(), wrong=st.integers(0, 40) | st.integers(-3, -1))
    def lease_an_expert_that_does_not_exist(self, data: Draw, wrong: int) -> None:
        wrong = wrong if wrong < 0 else len(self.expert_ids) + wrong
        ids = data.draw(st.lists(st.sampled_from(self.expert_ids), max_size=4), "ids")
        ids.insert(data.draw(st.integers(0, len(ids)), "place"), wrong)
        with pytest.raises(IntegrityError, match=f"chose expert {wrong} of a layer with {len(self.expert_ids)} "):
            self.residency.lease(np.array(ids, dtype=np.int32).view(np.uint32))
        with pytest.raises(IntegrityError):
            self.residency.visit(np.array(ids, dtype=np.int32).view(np.uint32))
        with pytest.raises(IntegrityError):
            self.residency.require_known(np.array(ids, dtype=np.int32).view(np.uint32))

    @precondition(lambda self: self.open)
    @rule(data=st.data())
    def release(self, data: Draw) -> None:
        ended = self.open.pop(data.draw(st.integers(0, len(self.open) - 1), "which"))
        self.residency.release(ended.lease)

    @precondition(lambda self: self.open)
    @rule()
    def release_all(self) -> None:
        while self.open:
            self.residency.release(self.open.pop().lease)
        assert not any(self.residency.is_held(slot_id) for slot_id in self.slot_ids), "everything is evictable again"

    # -- fills

    def absent(self) -> list[int]:
        return sorted(set(self.expert_ids) - self.resident.keys() - self.filling.keys())

    @precondition(lambda self: self.absent())
    @rule(data=st.data(), keep=st.sets(st.integers(0, 5)), is_urgent=st.booleans())
    def begin_fill(self, data: Draw, keep: set[int], *, is_urgent: bool) -> None:
        self.fill(data.draw(st.sampled_from(self.absent()), "expert"), keep, is_urgent=is_urgent)

    @precondition(lambda self: self.absent())
    @rule(data=st.data(), keep=st.sets(st.integers(0, 5)))
    def fetch(self, data: Draw, keep: set[int]) -> None:
        expert_id = data.draw(st.sampled_from(self.absent()), "expert")
        self.fill(expert_id, keep)
        if expert_id in self.filling:
            self.end(expert_id, arrives=True)

    @precondition(lambda self: self.filling)
    @rule(data=st.data(), arrives=st.booleans())
    def end_fill(self, data: Draw, *, arrives: bool) -> None:
        self.end(data.draw(st.sampled_from(sorted(self.filling)), "expert"), arrives=arrives)

    def fill(self, expert_id: int, keep: set[int], *, is_urgent: bool = True) -> None:
        mask = np.isin(np.arange(len(self.expert_ids)), list(keep))
        evictable = {e: s for e, s in self.resident.items() if not self.is_held(s)}
        dispensable = {e: s for e, s in evictable.items() if e not in keep}
        slot_id = self.residency.begin_fill(expert_id, mask, is_urgent=is_urgent)
        victims = dispensable or evictable if is_urgent else dispensable
        if self.free:
            assert slot_id in self.free
            self.free.remove(slot_id)
        elif not victims:
            assert slot_id is None
            return
        else:
            victim = min(victims, key=lambda e: (self.read_at[victims[e]], victims[e]))
            assert slot_id == victims[victim]
            del self.resident[victim]
        assert slot_id is not None
        self.filling[expert_id] = slot_id

    def end(self, expert_id: int, *, arrives: bool) -> None:
        slot_id = self.filling.pop(expert_id)
        if arrives:
            self.residency.complete_fill(slot_id)
            self.resident[expert_id] = slot_id
            self.read_at[slot_id] = self.settled_time()
            self.told.append((slot_id, expert_id))
        else:
            self.residency.abort_fill(slot_id)
            self.free.add(slot_id)

    # -- what always holds

    @invariant()
    def invariants_hold(self) -> None:
        self.residency.check()

    @invariant()
    def leased_slots_are_never_pulled_away(self) -> None:
        for held in self.open:
            for expert_id, slot_id in held.slot_of.items():
                assert self.residency.is_held(slot_id)
                assert self.residency.resident_slot(expert_id) == slot_id

    @invariant()
    def slots_would_be_given_away_in_the_order_of_their_last_reads(self) -> None:
        residency = deepcopy(self.residency)
        for held in self.open:
            residency.release(held.lease)
        keep = np.zeros(len(self.expert_ids), dtype=np.bool_)
        by_age = sorted(self.resident.values(), key=lambda slot_id: (self.read_at[slot_id], slot_id))
        for expert_id, slot_id in zip(self.absent(), sorted(self.free) + by_age, strict=False):
            assert residency.begin_fill(expert_id, keep) == slot_id

    @invariant()
    def the_policy_is_told_of_every_visit_and_fetch(self) -> None:
        assert self.policy.told == self.told

    @invariant()
    def oracle_agrees(self) -> None:
        for expert_id in self.expert_ids:
            outcome = Lookup.HIT if expert_id in self.resident else Lookup.MISS
            outcome = Lookup.PENDING if expert_id in self.filling else outcome
            assert self.residency.lookup(expert_id) is outcome
        assert np.flatnonzero(self.residency.resident_mask()).tolist() == sorted(self.resident)
        assert {e: self.residency.resident_slot(e) for e in self.resident} == self.resident
        assert self.residency.state_counts() == {
            SlotState.FREE: len(self.free),
            SlotState.FILLING: len(self.filling),
            SlotState.RESIDENT: len(self.resident),
        }
        assert [self.residency.is_held(s) for s in self.slot_ids] == [self.is_held(s) for s in self.slot_ids]
