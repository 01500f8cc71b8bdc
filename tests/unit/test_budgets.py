"""Slots shared out over layers: the curves agree with a replay, and the split with trying all of them."""

from itertools import product

import numpy as np
import pytest

from vllm_moecxl.control.budgets import budgets, miss_curves
from vllm_moecxl.control.eviction import POLICIES
from vllm_moecxl.control.replay import Visit, replay_layer
from vllm_moecxl.control.trace import RoutingTrace


def skewed_visits(seed: int, expert_count: int, topk: int, visit_count: int = 400) -> np.ndarray:
    """[visits, k] experts by a skewed choice that drifts."""
    rng = np.random.default_rng(seed)
    tastes = rng.gumbel(size=(visit_count, expert_count)) + 3 * np.sin(
        np.arange(expert_count) + np.arange(visit_count)[:, None] / 50
    )
    return np.argsort(-tastes, axis=1)[:, :topk]


def curve_of(visits: np.ndarray, expert_count: int) -> np.ndarray:
    """[experts + 1] misses of the only layer of a trace."""
    trace = RoutingTrace(
        topk=visits[:, None].astype(np.uint8),
        weights=None,
        lookahead=None,
        req=np.array([0, len(visits)]),
        prefill=np.zeros(1, np.int32),
        token_ids=np.full(len(visits), -1, np.int32),
        layer_ids=np.zeros(1, np.int32),
        domain=None,
        meta={"num_experts": expert_count},
    )
    return miss_curves(trace)[0]


@pytest.mark.parametrize("seed", range(3))
def test_the_curve_of_one_expert_a_visit_is_what_lru_does_at_every_size(seed: int) -> None:
    visits = skewed_visits(seed, expert_count=9, topk=1)
    curve = curve_of(visits, 9)
    assert curve[0] == visits.size and len(curve) == 10
    for slot_count in range(1, 10):
        policy = POLICIES["lru"](slot_count, 9)
        hits = replay_layer([Visit(row.astype(np.uint32)) for row in visits], 9, slot_count, policy)
        assert hits.lookup_count - hits.hit_count == curve[slot_count]


def test_the_curve_of_several_experts_a_visit_is_close_to_what_lru_does() -> None:
    visits = skewed_visits(4, expert_count=16, topk=3)
    curve = curve_of(visits, 16)
    for slot_count in (4, 8, 12, 16):
        policy = POLICIES["lru"](slot_count, 16)
        hits = replay_layer([Visit(row.astype(np.uint32)) for row in visits], 16, slot_count, policy)
        assert hits.lookup_count - hits.hit_count == pytest.approx(curve[slot_count], rel=0.03)


@pytest.mark.parametrize("seed", range(20))
def test_no_other_split_has_fewer_misses(seed: int) -> None:
    rng = np.random.default_rng(seed)
    curves = [np.sort(rng.integers(0, 100, size=rng.integers(4, 7)))[::-1] for _ in range(3)]
    total = int(rng.integers(6, sum(len(curve) - 1 for curve in curves) + 1))
    splits = [s for s in product(*(range(2, len(curve)) for curve in curves)) if sum(s) == total]
    split = budgets(curves, total, least_slot_count=2)

    def misses(slots: tuple[int, ...]) -> int:
        return sum(int(curve[count]) for curve, count in zip(curves, slots, strict=True))

    assert tuple(split) in splits
    assert misses(tuple(split)) == min(map(misses, splits))


def test_slots_go_where_they_remove_misses_and_a_step_in_a_curve_is_seen_past() -> None:
    flat = np.array([90, 90, 90, 90, 90])
    late = np.array([90, 90, 90, 0, 0])  # nothing at first, all at once: a greedy split would stop before it
    early = np.array([90, 80, 70, 65, 64])
    assert budgets([flat, late, early], 6, least_slot_count=1).tolist() == [1, 3, 2]


def test_more_slots_than_experts_are_not_given_out() -> None:
    curve = np.array([9, 5, 1])
    assert budgets([curve, curve], 100, least_slot_count=1).tolist() == [2, 2]


def test_fewer_slots_than_every_token_needs_are_refused() -> None:
    with pytest.raises(AssertionError, match="as many slots as a token"):
        budgets([np.array([9, 5, 1])] * 2, 3, least_slot_count=2)
