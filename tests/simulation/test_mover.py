"""Slabs on modelled links: who goes first, what joins, and what time it is."""

from __future__ import annotations

import pytest

from tests.simulation.world import SLAB_BYTES, make_bank, make_hardware
from vllm_moecxl.control.placement import Part
from vllm_moecxl.control.simulator.machine import Hardware
from vllm_moecxl.control.simulator.mover import Chunks, Mover
from vllm_moecxl.types import Cause

ROUTE = (Part(0, 1.0),)
RATE = 3e9
SLAB_S = SLAB_BYTES / RATE


def make_mover(hardware: Hardware | None = None) -> tuple[Mover, Chunks, Chunks]:
    """A mover, and a slab in the engine's chunks and in one."""
    mover = Mover(hardware or make_hardware(make_bank("cxl", RATE)), has_hands=True, seed=0)
    return mover, *mover.cut(ROUTE, SLAB_BYTES)


def test_a_demand_waits_for_the_chunks_in_flight_and_not_for_the_slabs_queued() -> None:
    mover, fine, whole = make_mover()
    ahead = [mover.start(fine, Cause.PREFETCH, 1.0) for _ in range(4)]
    demand = mover.start(whole, Cause.DEMAND, 0.0)
    mover.wait([demand])
    assert SLAB_S < mover.now_s < SLAB_S * (1 + 3 / len(fine)) + 1e-5
    assert not any(fetch.has_landed for fetch in ahead)
    mover.drain()
    assert all(fetch.has_landed for fetch in ahead) and mover.now_s == pytest.approx(5 * SLAB_S, rel=0.01)
    assert mover.traffic.by_cause == [SLAB_BYTES, 4 * SLAB_BYTES, 0] and mover.traffic.landed_count == 5


def test_a_prefetch_that_is_joined_is_a_demand_from_then_on() -> None:
    mover, fine, _ = make_mover()
    fetches = [mover.start(fine, Cause.PREFETCH, float(number)) for number in range(4)]
    assert mover.promote(fetches[3], Cause.DEMAND, 0.0)
    mover.wait([fetches[3]])
    assert not fetches[1].has_landed and mover.traffic.by_cause[Cause.DEMAND] == SLAB_BYTES


def test_what_is_given_up_leaves_only_what_was_in_flight_and_cannot_be_joined() -> None:
    mover, fine, _ = make_mover()
    first, second = (mover.start(fine, Cause.PREFETCH, 1.0) for _ in range(2))
    mover.cancel([first])
    assert first.is_over and not mover.promote(first, Cause.DEMAND, 0.0)
    mover.drain()
    assert second.has_landed and not first.has_landed
    assert SLAB_BYTES < mover.traffic.by_cause[Cause.PREFETCH] < 2 * SLAB_BYTES


def test_calls_are_made_in_time_but_not_in_the_middle_of_a_cancellation() -> None:
    mover, fine, _ = make_mover()
    made: list[float] = []
    fetch = mover.start(fine, Cause.PREFETCH, 1.0)
    mover.call_at(1e-9, lambda: made.append(mover.now_s))
    mover.call_at(1.0, lambda: made.append(mover.now_s))
    mover.cancel([fetch])
    assert mover.now_s > 1e-9 and not made
    cancelled_s = mover.now_s
    mover.advance(0.0)
    assert made == [cancelled_s]
    mover.advance(2.0)
    assert made == [cancelled_s, 1.0] and mover.now_s == cancelled_s + 2.0


def test_banks_share_the_link_to_the_device() -> None:
    banks = [make_bank(name, RATE) for name in "ab"]
    taken = []
    for link_bytes_per_s in (None, RATE):
        mover = Mover(Hardware("toy", make_hardware().device, tuple(banks), link_bytes_per_s), has_hands=True, seed=0)
        both = [mover.start(mover.cut((Part(index, 1.0),), SLAB_BYTES)[1], Cause.DEMAND, 0.0) for index in range(2)]
        mover.wait(both)
        taken.append(mover.now_s)
    assert taken == [pytest.approx(SLAB_S, rel=0.01), pytest.approx(2 * SLAB_S, rel=0.01)]


def test_a_stripe_is_read_from_all_its_banks_at_once() -> None:
    mover = Mover(make_hardware(*[make_bank(name, RATE) for name in "ab"]), has_hands=True, seed=0)
    fine, whole = mover.cut((Part(0, 0.5), Part(1, 0.5)), SLAB_BYTES)
    assert sum(byte_count for byte_count, _ in fine) == SLAB_BYTES and len(whole) == 2
    mover.wait([mover.start(whole, Cause.DEMAND, 0.0)])
    assert mover.now_s == pytest.approx(SLAB_S / 2, rel=0.01)
