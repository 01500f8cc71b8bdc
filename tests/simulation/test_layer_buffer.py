"""A layer buffer in virtual time: what it counts of the slabs that were brought ahead."""

from __future__ import annotations

from tests.simulation.world import make_bank, make_hardware, make_simulator, make_trace
from vllm_moecxl.control.simulator.simulator import Simulator
from vllm_moecxl.types import Cause


def make_idle_simulator() -> Simulator:
    """One that serves nothing, over a link that takes a second for a slab."""
    return make_simulator(make_trace(1), make_hardware(make_bank("cxl", 3e6)))


def test_a_slab_that_was_given_up_and_is_brought_again_is_two_fetches() -> None:
    simulator = make_idle_simulator()
    layer, counts = simulator.layers[0], simulator.ahead_counts
    assert layer.buffer is not None
    layer.buffer.claim(layer.slots)
    layer.buffer.bring([0, 1, 2], Cause.PREFETCH, 1.0)
    layer.buffer.drop_all_but([0])
    layer.buffer.bring([2], Cause.PREFETCH, 1.0)
    assert (counts.issued, counts.wasted, layer.buffer.expected_count) == (4, 1, 3)
    layer.buffer.wait([0, 2])
    assert (counts.useful, counts.late, layer.buffer.expected_count) == (0, 2, 1)


def test_what_another_layer_leaves_behind_is_wasted_and_no_longer_brought() -> None:
    simulator = make_idle_simulator()
    first, third = simulator.layers[0], simulator.layers[2]
    assert first.buffer is not None and first.buffer is third.buffer
    first.buffer.claim(first.slots)
    first.buffer.bring([0, 1], Cause.PREFETCH, 1.0)
    first.buffer.claim(third.slots)
    assert (simulator.ahead_counts.wasted, first.buffer.expected_count) == (2, 0)
    simulator.mover.advance(100.0)
    assert simulator.mover.traffic.landed_count == 0 < simulator.mover.traffic.by_cause[Cause.PREFETCH]
