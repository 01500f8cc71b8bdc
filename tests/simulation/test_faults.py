"""Faults in virtual time: banks that become slow or stall, clients that go. Serving goes on, no invariant breaks."""

from __future__ import annotations

import random

import pytest

from tests.simulation.world import (
    SEEDS,
    Clairvoyant,
    Guesser,
    Watch,
    make_bank,
    make_hardware,
    make_simulator,
    make_trace,
    slower,
)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_bank_that_becomes_ten_times_slower_costs_what_its_slabs_cost_and_no_more(seed: int) -> None:
    trace = make_trace(seed)
    fast, slow = make_bank("a", 6e9), make_bank("b", 6e9)
    healthy = Watch(make_simulator(trace, make_hardware(fast, slow), stripe="never")).run()
    simulator = make_simulator(trace, make_hardware(fast, slow), stripe="never")
    simulator.mover.call_at(healthy["duration_s"] / 4, lambda: simulator.mover.slow_down(1, 0.1))
    found = Watch(simulator).run()
    always = Watch(make_simulator(trace, make_hardware(fast, slower(slow, 0.1)), stripe="never")).run()
    assert healthy["duration_s"] < found["duration_s"]
    assert found["misses"] == healthy["misses"], "what is slow changes no decision of a policy that knows no time"
    assert found["stall_s"] < 11 * healthy["stall_s"] and always["requests"] == found["requests"]


@pytest.mark.parametrize("seed", SEEDS)
def test_a_bank_that_stalls_holds_the_forward_up_for_as_long(seed: int) -> None:
    trace = make_trace(seed)
    healthy = Watch(make_simulator(trace)).run()
    simulator = make_simulator(trace)
    simulator.mover.call_at(healthy["duration_s"] / 3, lambda: simulator.mover.stall(0, 2.0))
    found = Watch(simulator).run()
    longer_s = found["duration_s"] - healthy["duration_s"]
    assert 1.9 < longer_s < 2.1 and found["misses"] == healthy["misses"]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("batch_size", [1, 3])
def test_whatever_happens_everybody_else_is_served(seed: int, batch_size: int) -> None:
    chance = random.Random(seed)
    trace = make_trace(seed, request_count=10, prompt_count=chance.choice([0, 5]))
    banks = [make_bank(name, chance.choice([1e9, 3e9, 9e9])) for name in "abc"]
    simulator = make_simulator(
        trace,
        make_hardware(*banks, is_host=chance.random() < 0.5, observe_s=chance.choice([0.0, 1e-3])),
        predictors={"clairvoyant": Clairvoyant(trace), "guesser": Guesser(trace.expert_count, seed)},
        batch_size=batch_size,
        stripe=chance.choice(["never", "all", "auto"]),
        slot_counts=chance.randint(2, 12),
        layer_buffer_count=chance.choice([0, 1, 2]),
        seed=seed,
    )
    cancelled = chance.sample(range(trace.request_count), 4)
    for number in cancelled:
        simulator.mover.call_at(chance.uniform(0, 1.0), lambda number=number: simulator.cancel(number))
    for _ in range(10):
        link_id, time_s = chance.randrange(3), chance.uniform(0, 1.0)
        if chance.random() < 0.5:
            factor = chance.choice([0.1, 0.5, 1.0])
            simulator.mover.call_at(time_s, lambda i=link_id, f=factor: simulator.mover.slow_down(i, f))
        else:
            duration_s = chance.uniform(0, 0.1)
            simulator.mover.call_at(time_s, lambda i=link_id, d=duration_s: simulator.mover.stall(i, d))
    found = Watch(simulator).run()
    ended = {request.number for request in simulator.replay.ended}
    assert ended.isdisjoint(simulator.replay.cancelled)
    assert ended | simulator.replay.cancelled == set(range(trace.request_count))
    assert found["requests"] == len(ended)


@pytest.mark.parametrize("seed", SEEDS)
def test_what_was_on_its_way_for_a_client_that_has_gone_is_given_up(seed: int) -> None:
    trace = make_trace(seed, request_count=2, token_count=200)
    simulator = make_simulator(
        trace, make_hardware(make_bank("cxl", 2e9)), predictors={"clairvoyant": Clairvoyant(trace)}
    )
    watch = Watch(simulator)
    simulator.mover.call_at(0.4, lambda: simulator.cancel(0))
    found = watch.run()
    assert simulator.replay.cancelled == {0} and found["requests"] == 1
