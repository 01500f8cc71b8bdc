"""What is worth fetching: expected gains against costs, and picks that have to prove themselves."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from vllm_moecxl.control.prefetch import (
    PROBABILITY_MAX,
    PROBABILITY_MIN,
    LayerView,
    Order,
    PrefetchPlanner,
    Timing,
)

EXPERT_COUNT = 8
#: The layer is far away, and the link idle.
IDLE = Timing(lead_s=1.0, fetch_s=1e-3, queue_s=0.0)
SURE = 0.95

Mask = npt.NDArray[np.bool_]


def mask(*expert_ids: int) -> Mask:
    return np.isin(np.arange(EXPERT_COUNT), expert_ids)


def view(resident: tuple[int, ...] = (), pending: tuple[int, ...] = (), slot_count: int = 4) -> LayerView:
    free_count = slot_count - len(resident) - len(pending)
    return LayerView(mask(*resident), mask(*pending), free_count, slot_count)


def scores(**by_expert: float) -> npt.NDArray[np.float32]:
    """`_3=0.9` gives expert 3 that probability; the others have next to none."""
    values = np.full(EXPERT_COUNT, 0.01, np.float32)
    for name, value in by_expert.items():
        values[int(name[1:])] = value
    return values


def prove(planner: PrefetchPlanner, distance: int = 1, *, right: bool = True, visit_count: int = 100) -> None:
    """Have picks of a distance judged on a layer of their own."""
    for _ in range(visit_count):
        planner.plan(1, distance, scores(_0=SURE), view(), IDLE)
        planner.judge(1, mask(0 if right else 1))


def proven(**options: Any) -> PrefetchPlanner:
    planner = PrefetchPlanner(2, **options)
    prove(planner)
    return planner


def ordered(order: Order | None) -> list[int]:
    return [] if order is None else list(order.expert_ids)


def test_picks_are_ordered_once_they_have_proved_right_and_not_before() -> None:
    planner = PrefetchPlanner(2)
    assert ordered(planner.plan(0, 1, scores(_3=SURE), view(), IDLE)) == [] and not planner.is_on(1)
    prove(planner)
    assert planner.is_on(1) and planner.precision(1) == pytest.approx(1.0)
    assert ordered(planner.plan(0, 1, scores(_3=SURE), view(), IDLE)) == [3]


def test_picks_that_lose_are_no_longer_ordered_and_are_again_when_they_would_win() -> None:
    planner = proven()
    prove(planner, right=False, visit_count=200)
    assert not planner.is_on(1) and ordered(planner.plan(0, 1, scores(_3=SURE), view(), IDLE)) == []
    prove(planner, visit_count=200)
    assert planner.is_on(1) and ordered(planner.plan(0, 1, scores(_3=SURE), view(), IDLE)) == [3]


def test_each_distance_proves_itself() -> None:
    planner = proven()
    prove(planner, distance=2, right=False)
    assert planner.is_on(1) and not planner.is_on(2) and not planner.is_on(3)
    assert planner.precision(1) > 0.9 and planner.precision(2) < 0.1 and planner.precision(3) == 0.0
    assert ordered(planner.plan(0, 2, scores(_3=SURE), view(), IDLE)) == []


def test_a_pick_is_judged_once() -> None:
    planner = proven()
    planner.plan(0, 1, scores(_3=SURE), view(), IDLE)
    planner.judge(0, mask(3))
    for _ in range(500):
        planner.judge(0, mask())
    assert planner.precision(1) == pytest.approx(1.0), "visits that nothing was picked for say nothing"


def test_only_the_latest_picks_of_a_distance_count() -> None:
    planner = proven()
    for _ in range(200):
        planner.plan(0, 1, scores(_3=SURE), view(), IDLE)
        planner.plan(0, 1, scores(_4=SURE), view(), IDLE)
        planner.judge(0, mask(4))
    assert planner.precision(1) == pytest.approx(1.0)


@pytest.mark.parametrize("probability", [0.0, PROBABILITY_MIN - 0.01, float("nan")])
def test_what_is_not_sure_is_not_picked_however_idle_the_link(probability: float) -> None:
    planner = proven()
    assert planner.plan(0, 1, scores(_3=probability), view(), IDLE) is None
    planner.judge(0, mask())
    assert planner.precision(1) == pytest.approx(1.0), "nor judged"


def test_what_is_here_or_on_its_way_is_not_picked() -> None:
    here = view(resident=(3,), pending=(5,))
    assert ordered(proven().plan(0, 1, scores(_3=SURE, _5=SURE, _6=SURE), here, IDLE)) == [6]


def test_the_surest_come_first() -> None:
    assert ordered(proven().plan(0, 1, scores(_1=0.7, _3=0.9, _6=0.8), view(), IDLE)) == [3, 6, 1]


def test_free_slots_are_filled_at_nobodys_cost() -> None:
    order = proven().plan(0, 1, scores(_1=0.9, _2=0.8, _6=0.99, _7=0.99), view(resident=(6, 7)), IDLE)
    assert order is not None and ordered(order) == [1, 2] and order.keep.all()


def test_what_is_needed_least_makes_room_and_nothing_else_may() -> None:
    here = view(resident=(4, 5, 6, 7))
    order = proven().plan(0, 1, scores(_1=0.9, _2=0.8, _4=0.3, _5=0.01, _6=0.02, _7=0.4), here, IDLE)
    assert order is not None and ordered(order) == [1, 2]
    assert np.flatnonzero(~order.keep).tolist() == [5, 6]


@pytest.mark.parametrize(("displaced", "is_worth_it"), [(0.3, True), (0.89, False), (0.9, False), (0.99, False)])
def test_what_is_likelier_or_nearly_as_likely_keeps_its_slot(displaced: float, *, is_worth_it: bool) -> None:
    here = view(resident=(4, 5), slot_count=2)
    order = proven().plan(0, 1, scores(_1=0.9, _4=displaced, _5=0.99), here, IDLE)
    assert ordered(order) == [1] * is_worth_it


def test_slots_that_are_all_filling_are_left_alone() -> None:
    here = view(pending=(4, 5, 6, 7))
    assert proven().plan(0, 1, scores(_1=SURE), here, IDLE) is None


def test_no_more_is_ordered_than_there_are_slots() -> None:
    sure = np.full(EXPERT_COUNT, SURE, np.float32)
    assert len(ordered(proven().plan(0, 1, sure, view(slot_count=3), IDLE))) == 3


@pytest.mark.parametrize(
    ("timing", "count"),
    [
        (Timing(lead_s=0.0, fetch_s=1e-3, queue_s=0.0), 0),
        (Timing(lead_s=-5.0, fetch_s=1e-3, queue_s=0.0), 0),
        (Timing(lead_s=1e-3, fetch_s=1e-3, queue_s=0.0), 1),
        (Timing(lead_s=2e-3, fetch_s=1e-3, queue_s=0.0), 2),
        (Timing(lead_s=2e-3, fetch_s=1e-3, queue_s=1e-3), 1),
        (Timing(lead_s=2e-3, fetch_s=1e-3, queue_s=9e-3), 0),
        (Timing(lead_s=1.0, fetch_s=1e-3, queue_s=0.0), 4),
    ],
)
def test_what_would_come_too_late_to_help_is_not_begun(timing: Timing, count: int) -> None:
    sure = scores(_0=SURE, _1=SURE, _2=SURE, _3=SURE)
    assert len(ordered(proven().plan(0, 1, sure, view(), timing))) == count


def test_a_slab_that_takes_no_time_is_nothing_to_fetch_ahead() -> None:
    planner = proven()
    here = view(resident=(4, 5), slot_count=2)
    assert planner.plan(0, 1, scores(_1=SURE, _4=0.1), here, Timing(1.0, 0.0, 0.0)) is None


def test_layers_are_judged_apart() -> None:
    planner = proven()
    planner.plan(0, 1, scores(_3=SURE), view(), IDLE)
    planner.judge(1, mask())
    assert planner.precision(1) == pytest.approx(1.0)
    before = planner.precision(1)
    planner.judge(0, mask())
    assert planner.precision(1) < before


def test_whoever_is_asked_for_surer_picks_picks_less() -> None:
    assert proven(probability_min=0.9).plan(0, 1, scores(_3=0.8), view(), IDLE) is None


def test_the_threshold_settles_where_most_picks_are_needed_and_never_leaves_its_limits() -> None:
    planner = PrefetchPlanner(1)
    rng = np.random.default_rng(5)
    everybody = LayerView(np.zeros(64, np.bool_), np.zeros(64, np.bool_), 64, 64)
    picked, needed_count = 0, 0
    for step in range(3000):
        scores = rng.uniform(0.3, 1.0, 64).astype(np.float32)
        needed = rng.random(64) < scores - 0.15  # less likely than they say
        planner.plan(0, 1, scores, everybody, Timing(1.0, 1e-3, 0.0))
        threshold = planner._record(1).threshold
        assert PROBABILITY_MIN <= threshold <= PROBABILITY_MAX
        if step > 1000:
            picks = scores >= threshold
            picked, needed_count = picked + int(picks.sum()), needed_count + int((picks & needed).sum())
        planner.judge(0, needed)
    # Where only the surest are picked, 0.9 on, four in five are needed: no threshold within the limits gets more.
    assert needed_count / picked == pytest.approx(0.8, abs=0.02)
    assert planner._record(1).threshold == pytest.approx(PROBABILITY_MAX, abs=0.02)
