"""What is fetched ahead into slots: it displaces nothing that is kept, and each slab is judged once."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.property.test_dispatch import FetchFailure, break_fetches
from tests.property.test_layers import EXPERT_COUNT, TOPK, batch_of, drain
from tests.property.toy_moe import Served, ToyMoe
from vllm_moecxl.runtime.counters import PrefetchOutcome
from vllm_moecxl.types import PassKind, SlotState


@dataclass(frozen=True)
class Event:
    """What happens to one layer.

    Attributes:
        what: "visit" is a forward, "broken visit" one whose fetches fail; "feed" has copies done; "drop" says that a
            visit needed only these; "forget" that a request is gone.
        expert_ids: of all but "feed" and "forget".
        kept: of a prefetch, what it must not displace.
        wanter: of a prefetch, and the request that is gone.
    """

    what: Literal["visit", "broken visit", "prefetch", "feed", "drop", "forget"]
    expert_ids: tuple[int, ...] = ()
    kept: tuple[int, ...] = ()
    wanter: str = "a"


experts = st.integers(0, EXPERT_COUNT - 1)
events = st.builds(
    Event,
    st.sampled_from(["visit", "visit", "broken visit", "prefetch", "prefetch", "prefetch", "feed", "drop", "forget"]),
    st.lists(experts, min_size=TOPK, max_size=4, unique=True).map(tuple),
    st.lists(experts, max_size=4).map(tuple),
    st.sampled_from("ab"),
)


@dataclass(frozen=True)
class Tale:
    slot_count: int
    is_host: bool
    events: Sequence[Event]


tales = st.builds(Tale, st.integers(TOPK, EXPERT_COUNT), st.booleans(), st.lists(events, max_size=25))


class Layer:
    """One layer, and what was begun to be fetched ahead for it."""

    def __init__(self, slot_count: int, *, is_host: bool = True) -> None:
        self.served = Served(ToyMoe(EXPERT_COUNT, 0), slot_count, PassKind.TOKEN, is_host=is_host)
        self.slots = self.served.slots
        self.begun_count = 0

    @property
    def resident(self) -> set[int]:
        return set(np.flatnonzero(self.served.residency.resident_mask()).tolist())

    @property
    def on_their_way(self) -> set[int]:
        return set(self.slots._filling)

    def outcomes(self) -> dict[PrefetchOutcome, int]:
        counters = self.served.counters
        return {one: int(counters.values[row]) for one, row in counters.prefetch.items()}

    def act(self, event: Event) -> None:
        match event.what:
            case "visit":
                self.visit(event.expert_ids)
            case "broken visit":
                with pytest.MonkeyPatch.context() as monkeypatch:
                    break_fetches(monkeypatch, 1)
                    with suppress(FetchFailure):
                        self.visit(event.expert_ids)
            case "prefetch":
                self.prefetch(event)
            case "feed":
                self.served.mover.feed()
            case "drop":
                self.drop(event.expert_ids)
            case "forget":
                self.served.mover.forget(event.wanter)
                self.slots.settle()
        self.check()

    def visit(self, expert_ids: Sequence[int]) -> None:
        """A forward that fits the slots, so that there is one pass."""
        needed = expert_ids[: self.served.residency.slot_count // TOPK * TOPK]
        expected = self.slots.unused & set(needed)
        before = self.outcomes()
        batch = batch_of([list(needed[i : i + TOPK]) for i in range(0, len(needed) - TOPK + 1, TOPK)], 0)
        expected &= set(batch[2].ravel().tolist())
        output = self.served.dispatch(*batch)
        assert torch.equal(output, self.served.toy.direct(*batch))
        after = self.outcomes()
        judged = sum(after[one] - before[one] for one in (PrefetchOutcome.USEFUL, PrefetchOutcome.LATE))
        assert judged == len(expected), "what a forward needs is useful, or late"

    def prefetch(self, event: Event) -> None:
        keep = np.isin(np.arange(EXPERT_COUNT), event.kept)
        self.slots.settle()
        kept = self.resident & set(event.kept)
        there = self.resident | self.on_their_way
        begun_count = self.slots.prefetch(event.expert_ids, 1.0, [event.wanter], keep)
        assert kept <= self.resident, "displaced what was to be kept"
        assert begun_count <= len(set(event.expert_ids) - there)
        begun = self.on_their_way - there
        assert begun_count == len(begun) and begun <= self.slots.unused
        self.begun_count += begun_count

    def drop(self, needed: Sequence[int]) -> None:
        self.slots.settle()
        resident, unused = self.resident, set(self.slots.unused)
        self.slots.drop_prefetches(needed)
        assert self.resident == resident, "what has arrived stays"
        assert self.slots.unused == {one for one in unused if one in resident or one in needed}

    def check(self) -> None:
        slots = self.slots
        slots.settle()
        assert slots.unused <= self.resident | self.on_their_way, "what is gone has been judged"
        assert sum(self.outcomes().values()) + len(slots.unused) == self.begun_count, "each is judged once"
        self.served.check()


def check_tale(tale: Tale) -> None:
    layer = Layer(tale.slot_count, is_host=tale.is_host)
    for event in tale.events:
        layer.act(event)
    drain([layer.served])
    layer.check()
    # Whatever has not been judged by now is when it is needed, or when it is displaced.
    for expert_id in range(0, EXPERT_COUNT, TOPK):
        layer.act(Event("visit", tuple(range(expert_id, expert_id + TOPK))))
    assert not layer.slots.unused and sum(layer.outcomes().values()) == layer.begun_count


@settings(max_examples=200)
@given(tales)
def test_each_slab_that_is_fetched_ahead_is_judged_once_and_displaces_nothing_that_is_kept(tale: Tale) -> None:
    check_tale(tale)


def test_what_has_arrived_when_its_forward_comes_is_useful_and_what_has_not_is_late() -> None:
    check_outcomes()


def check_outcomes() -> None:
    layer = Layer(4)
    assert layer.slots.prefetch([0, 1], 1.0) == 2
    while not layer.served.mover.is_idle:
        layer.served.mover.feed()
    assert layer.slots.prefetch([2, 3], 1.0) == 2
    layer.begun_count = 4
    layer.visit([0, 2])
    expected = {PrefetchOutcome.USEFUL: 1, PrefetchOutcome.LATE: 1, PrefetchOutcome.WASTED: 0}
    assert layer.outcomes() == expected
    layer.drop([0, 2])
    assert layer.outcomes() == expected | {PrefetchOutcome.WASTED: 1} and layer.slots.unused == {1}
    assert layer.served.residency.state_counts()[SlotState.FILLING] == 0


def test_what_arrives_between_look_up_and_pass_is_useful() -> None:
    check_arrival_in_between()


def check_arrival_in_between() -> None:
    layer = Layer(4)
    layer.slots.prefetch([0], 1.0)
    look_up = layer.slots.look_up

    def arriving(distinct: np.ndarray) -> tuple[np.ndarray, int]:
        found = look_up(distinct)
        while not layer.served.mover.is_idle:
            layer.served.mover.feed()
        layer.slots.settle()
        return found

    layer.slots.look_up = arriving  # type: ignore[method-assign]
    layer.begun_count = 1
    layer.visit([0, 1])
    assert layer.outcomes()[PrefetchOutcome.USEFUL] == 1 and not layer.slots.unused


def test_what_a_forward_has_joined_is_not_dropped() -> None:
    check_joined_prefetch()


def check_joined_prefetch() -> None:
    """The sidecar says what the visit before needed while this one waits."""
    layer = Layer(4)
    layer.slots.prefetch([0, 1, 2], 1.0)
    wait = layer.served.mover.wait

    def interrupted(fetches: object) -> None:
        layer.slots.drop_prefetches([5])
        assert layer.on_their_way == {0, 1}, "only what nobody waits for"
        wait(fetches)  # type: ignore[arg-type]

    layer.served.mover.wait = interrupted  # type: ignore[method-assign, assignment]
    layer.begun_count = 3
    layer.visit([0, 1])
    layer.check()
    assert layer.outcomes()[PrefetchOutcome.WASTED] == 1


def test_a_request_that_ends_while_its_slab_is_being_copied_gives_the_slot_back_once_that_is_over() -> None:
    layer = Layer(4)
    layer.slots.prefetch([0], 1.0, ["gone"])
    transfer = layer.slots._filling[0].fetch.transfer
    mover = layer.served.mover
    taken = mover._scheduler.next(0, 0.0)
    assert taken is not None and transfer.in_flight_count == 1
    mover.forget("gone")
    layer.slots.settle()
    assert layer.on_their_way == {0}, "somebody still writes to it"
    mover._scheduler.complete(taken, 0.0)
    layer.slots.settle()
    assert not layer.on_their_way and layer.outcomes()[PrefetchOutcome.WASTED] == 1


def test_no_prefetch_displaces_another_of_the_same_call() -> None:
    layer = Layer(2)
    layer.served.dispatch.preload([0, 1])
    nothing = np.zeros(EXPERT_COUNT, np.bool_)
    assert layer.slots.prefetch([2, 3, 4, 5], 1.0, (), nothing) == 2
    assert layer.on_their_way == {2, 3}


def test_what_is_on_its_way_for_a_pass_is_not_given_up_for_the_rest_of_it() -> None:
    check_own_prefetch()


def check_own_prefetch() -> None:
    layer = Layer(2)
    layer.slots.prefetch([4], 1.0)
    layer.slots.prefetch([5], 9.0)
    fetch = layer.slots._filling[5].fetch
    layer.begun_count = 2
    layer.visit([0, 5])
    assert fetch.has_landed and layer.outcomes()[PrefetchOutcome.LATE] == 1
