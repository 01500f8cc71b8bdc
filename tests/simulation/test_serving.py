"""The whole control plane in virtual time: it replays, keeps its books, and prefetches where that helps."""

from __future__ import annotations

from typing import Any

import pytest

from tests.simulation.world import (
    SEEDS,
    SLAB_BYTES,
    Clairvoyant,
    Guesser,
    Watch,
    make_bank,
    make_hardware,
    make_simulator,
    make_trace,
)
from vllm_moecxl.control import trial
from vllm_moecxl.control.simulator.report import simulate
from vllm_moecxl.types import PassKind


@pytest.mark.parametrize("seed", SEEDS)
def test_a_seed_replays_to_the_last_digit(seed: int) -> None:
    def run() -> dict[str, Any]:
        trace = make_trace(seed, prompt_count=4)
        bank = make_bank("cxl", 3e9)
        predictors = {"clairvoyant": Clairvoyant(trace), "guesser": Guesser(trace.expert_count, seed)}
        simulator = make_simulator(trace, make_hardware(bank), predictors=predictors, batch_size=2, seed=seed)
        return simulate(simulator)

    assert run() == run()


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("prompt_count", [0, 9])
@pytest.mark.parametrize("is_host", [True, False], ids=["cpu", "gpu"])
@pytest.mark.parametrize("predictor", ["", "clairvoyant", "guesser"])
def test_the_books_balance(seed: int, batch_size: int, prompt_count: int, is_host: bool, predictor: str) -> None:
    trace = make_trace(seed, prompt_count=prompt_count)
    known = {"clairvoyant": Clairvoyant(trace), "guesser": Guesser(trace.expert_count, seed)}
    simulator = make_simulator(
        trace,
        make_hardware(is_host=is_host, observe_s=1e-4),
        predictors={predictor: known[predictor]} if predictor else {},
        batch_size=batch_size,
        seed=seed,
    )
    found = Watch(simulator).run()
    assert found["requests"] == trace.request_count
    if not predictor and not prompt_count and batch_size == 1:
        # Nothing is given up: each miss is a slab.
        assert found["demand_bytes"] == found["misses"] * SLAB_BYTES
        assert found["prefetch"]["issued"] == found["prefetch_bytes"] == 0


@pytest.mark.parametrize("seed", SEEDS)
def test_who_knows_the_future_hides_nearly_all_fetches(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial, "WARMUP_STEP_COUNT", 10**9)  # without it by turns, it hides less
    trace = make_trace(seed, request_count=4, token_count=60)
    plain = Watch(make_simulator(trace, make_hardware(make_bank("cxl", 12e9)))).run()
    simulator = make_simulator(
        trace, make_hardware(make_bank("cxl", 12e9)), predictors={"clairvoyant": Clairvoyant(trace)}
    )
    found = Watch(simulator).run()
    assert found["stall_s"] < plain["stall_s"] / 3
    assert found["prefetch"]["useful"] > 0.9 * found["prefetch"]["issued"] > 0


@pytest.mark.parametrize("seed", SEEDS)
def test_a_guesser_is_found_out_and_costs_next_to_nothing(seed: int) -> None:
    trace = make_trace(seed, request_count=6, token_count=60)
    plain = Watch(make_simulator(trace)).run()
    simulator = make_simulator(trace, predictors={"guesser": Guesser(trace.expert_count, seed)})
    found = Watch(simulator).run()
    assert found["duration_s"] < 1.02 * plain["duration_s"]


@pytest.mark.parametrize("seed", SEEDS)
def test_a_long_prompt_goes_through_the_layer_buffer_and_fills_the_empty_slots(seed: int) -> None:
    trace = make_trace(seed, request_count=1, token_count=60, prompt_count=60, evenness=9.0)
    simulator = make_simulator(trace, slot_counts=6)
    found = Watch(simulator).run()
    assert found["passes"][PassKind.LAYER_BUFFER.value] == trace.layer_count == sum(found["passes"].values())
    assert all(layer.slots.free_count() == 0 for layer in simulator.layers)
    assert found["layer_buffer_ahead"]["useful"] + found["layer_buffer_ahead"]["late"] > 0


def test_a_token_takes_as_long_as_its_layers_and_its_fetches() -> None:
    trace = make_trace(7, request_count=1, token_count=20)
    bank = make_bank("cxl", 3e9)
    simulator = make_simulator(trace, make_hardware(bank, step_s=0.5e-3))
    found = Watch(simulator).run()
    compute_s = simulator.step_count * (trace.layer_count * 1e-3 + 0.5e-3)
    assert found["duration_s"] - found["stall_s"] == pytest.approx(compute_s, rel=0.01)
    slab_s, latency_s = SLAB_BYTES / 3e9, 1e-6
    assert found["misses"] * slab_s < found["stall_s"] < found["misses"] * (slab_s + 2 * latency_s)
    sleepy = Watch(make_simulator(trace, make_hardware(bank, step_s=0.5e-3, miss_s=0.25e-3))).run()
    wait_count = (sleepy["stall_s"] - found["stall_s"]) / 0.25e-3
    assert found["misses"] / trace.topk_count <= round(wait_count) <= found["misses"]
    assert wait_count == pytest.approx(round(wait_count))


def test_measured_layers_take_the_place_of_modelled_ones() -> None:
    trace = make_trace(7, request_count=1, token_count=20)
    simulator = make_simulator(trace, slot_counts=16, layer_s=5e-3)
    found = Watch(simulator).run()
    assert found["duration_s"] - found["stall_s"] == pytest.approx(5e-3 * trace.layer_count * simulator.step_count)


def test_without_a_sidecar_whoever_waits_carries() -> None:
    trace = make_trace(7, prompt_count=12, evenness=9.0)
    with_hands, without = (Watch(make_simulator(trace, has_sidecar=has_sidecar)).run() for has_sidecar in (True, False))
    assert without["requests"] == trace.request_count
    assert without["duration_s"] > with_hands["duration_s"]
    assert without["layer_buffer_ahead"]["issued"] == 0 < with_hands["layer_buffer_ahead"]["issued"]


def test_layers_may_have_different_numbers_of_slots() -> None:
    trace = make_trace(7, prompt_count=12)
    simulator = make_simulator(trace, slot_counts=[2, 16, 5, 9])
    found = Watch(simulator).run()
    assert [layer.slots.residency.slot_count for layer in simulator.layers] == [2, 16, 5, 9]
    misses = [layer.counts.misses for layer in simulator.layers]
    assert found["misses"] == sum(misses) and misses[1] < misses[3] < misses[0]
