"""A replay of what was foretold counts what demand fetches alone would, and what prefetches were good for."""

from __future__ import annotations

import numpy as np
import pytest

from tests.simulation.world import Clairvoyant, make_trace
from vllm_moecxl.control.eviction import EvictionPolicy, LeastRecentlyUsed
from vllm_moecxl.control.foretold import Foretold, foreseen, foretell, replay_foretold
from vllm_moecxl.control.prefetch import PrefetchPlanner
from vllm_moecxl.control.replay import replay

#: Picks before a planner orders any.
SHADOW_PICK_COUNT = 32


def lru(slot_count: int, expert_count: int, layer: int) -> EvictionPolicy:
    return LeastRecentlyUsed(slot_count)


@pytest.mark.parametrize("prompt_count", [0, 5])
def test_without_a_planner_it_is_the_replay_of_demand_fetches(prompt_count: int) -> None:
    trace = make_trace(3, prompt_count=prompt_count)
    hits = replay(trace, [5] * trace.layer_count, lru)
    found = replay_foretold(foreseen(trace), 5, lru, None)
    assert found.lookup_count == hits.lookup_count
    assert found.lookup_count - found.demand_count == hits.hit_count
    assert found.issued_count == 0 and found.precision is None


@pytest.mark.parametrize("slot_count", [2, 5])
def test_who_knows_the_future_removes_all_but_what_the_planner_only_watched(slot_count: int) -> None:
    trace = make_trace(3)
    foretold = foreseen(trace)
    assert foretold.recall(0) == 1
    found = replay_foretold(foretold, slot_count, lru, PrefetchPlanner(trace.layer_count))
    assert found.precision == 1
    # Both distances look on for as long; and nothing can be known of the very first layers before the first step.
    assert found.demand_count <= 2 * SHADOW_PICK_COUNT
    late = replay_foretold(foretold, slot_count, lru, PrefetchPlanner(trace.layer_count), from_step=30)
    assert late.demand_count == 0 < late.useful_count


def test_a_forecast_says_before_each_visit_what_its_predictors_say() -> None:
    trace = make_trace(3)
    foretold = foretell(trace, {"clairvoyant": Clairvoyant(trace)})
    assert foretold.recall(0) == 1
    known = foreseen(trace)
    likely = foretold.scores[30:-1] > 0.5
    # At the end of a request, the next one is not known.
    assert np.mean(likely == (known.scores[30:-1] > 0.5)) > 0.99


def test_prefetches_in_vain_are_counted_as_wasted() -> None:
    generator = np.random.default_rng(5)
    expert_ids = generator.integers(0, 4, (200, 1, 1)).astype(np.uint32)
    scores = np.zeros((200, 2, 2, 8), np.float32)
    scores[:100] = foreseen_of(expert_ids, scores.shape)[:100]
    scores[100:, :, :, 4:] = 0.9  # what nobody will use
    found = replay_foretold(Foretold(expert_ids, scores), 2, lru, PrefetchPlanner(1), from_step=100)
    assert found.useful_count == 0 < found.wasted_count
    assert found.precision == 0
    # It is found out: a hundred visits could have wasted twice as many.
    assert found.issued_count < 100


def foreseen_of(expert_ids: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Scores that know the next two visits of one layer."""
    scores = np.zeros(shape, np.float32)
    for step in range(len(expert_ids) - 2):
        for row in range(2):
            for distance in range(2):
                scores[step, row, distance, expert_ids[min(step + row + distance, len(expert_ids) - 1), 0]] = 1
    return scores
