"""The offline bound on the visits of a simulation: as good as the policy that knows the future, and never beaten."""

from __future__ import annotations

import numpy as np
import pytest

from tests.simulation.world import SEEDS, make_trace
from vllm_moecxl.control.eviction import Belady, EvictionPolicy, LeastRecentlyUsed
from vllm_moecxl.control.residency import Residency
from vllm_moecxl.control.simulator.bound import belady_hits

Visits = list[np.ndarray[tuple[int], np.dtype[np.int64]]]

EXPERT_COUNT = 16


def hits_of(policy: EvictionPolicy, visits: Visits, slot_count: int) -> int:
    """Of a layer that fetches on demand."""
    residency = Residency(EXPERT_COUNT, slot_count, policy)
    hit_count = 0
    for experts in visits:
        resident = residency.resident_mask()
        hit_count += int(resident[experts].sum())
        if (lease := residency.visit(experts.astype(np.uint32))) is None:
            keep = np.zeros(EXPERT_COUNT, dtype=np.bool_)
            keep[experts] = True
            for expert_id in experts[~resident[experts]].tolist():
                slot_id = residency.begin_fill(expert_id, keep)
                assert slot_id is not None
                residency.complete_fill(slot_id)
            lease = residency.lease(experts.astype(np.uint32))
        assert lease is not None
        residency.release(lease)
    return hit_count


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("slot_count", [3, 6, 12, 16])
def test_it_is_what_belady_hits_and_least_recently_used_does_not_reach(seed: int, slot_count: int) -> None:
    topk = make_trace(seed, expert_count=EXPERT_COUNT, topk=3).topk[:, 0].astype(np.int64)
    visits = list(np.sort(topk, axis=1))
    bound = belady_hits(visits, slot_count)
    assert bound == hits_of(Belady(slot_count, EXPERT_COUNT, topk), visits, slot_count)
    assert bound >= hits_of(LeastRecentlyUsed(slot_count), visits, slot_count)


def test_a_visit_of_more_experts_than_slots_leaves_what_is_needed_soonest() -> None:
    everything = np.arange(8)
    visits = [everything, np.array([5]), np.array([7]), np.array([1]), everything]
    # Of eight experts in two slots, 5 and 7 are kept; 1 takes the place of either, and two of the last eight are there.
    assert belady_hits(visits, 2) == 1 + 1 + 0 + 2


def test_what_passes_through_the_layer_buffer_pushes_nothing_out_that_is_needed_sooner() -> None:
    visits = [np.array([0, 1]), np.arange(8), np.array([0, 1]), np.array([0, 1])]
    assert belady_hits(visits, 2) == 0 + 2 + 2 + 2
