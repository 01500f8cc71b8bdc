"""What a forward costs each way, and deadlines in the order of layers."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_moecxl.control.cost import PASS_OVERHEAD_S, LayerCosts, Step
from vllm_moecxl.control.layer_order import LayerOrder
from vllm_moecxl.types import InPlaceMode

#: Seconds that a slab takes from its home and from a slot: a home three times as slow.
HOME_S, SLOT_S = 3.0, 1.0


def layer_costs(
    in_place: InPlaceMode = "auto",
    *,
    expert_count: int = 8,
    home_s: float = HOME_S,
    slot_s: float = SLOT_S,
    is_addressable: bool = True,
) -> LayerCosts:
    """Slabs of one byte, so that seconds are what a test names."""
    return LayerCosts(expert_count, 1, 1 / home_s, 1 / slot_s, in_place, is_addressable=is_addressable)


def experts(*expert_ids: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    return np.array(expert_ids, dtype=np.int64)


@pytest.mark.parametrize(
    ("in_place", "home_s", "expected"),
    [("always", 99.0, True), ("never", 0.5, False), ("auto", 0.9, True), ("auto", 1.0, True), ("auto", 1.1, False)],
)
def test_homes_as_fast_as_slots_and_the_users_word_need_no_decisions(
    in_place: InPlaceMode, home_s: float, *, expected: bool
) -> None:
    assert layer_costs(in_place, home_s=home_s).is_always_in_place is expected


def test_homes_that_the_kernel_cannot_read_are_copied_from_however_dear_that_is() -> None:
    costs = layer_costs(home_s=1e-9, is_addressable=False)
    assert not costs.is_always_in_place
    assert not any(costs.runs_in_place(0, experts(1), is_narrow=narrow) for narrow in (True, False) for _ in range(9))
    assert not layer_costs("never").runs_in_place(0, experts(1), is_narrow=True)
    with pytest.raises(AssertionError):
        layer_costs("always", is_addressable=False)


def decisions(costs: LayerCosts, count: int, *missing: int, hit_count: int = 0) -> list[bool]:
    return [costs.runs_in_place(hit_count, experts(*missing), is_narrow=True) for _ in range(count)]


def test_an_expert_is_copied_once_running_without_it_has_cost_as_much() -> None:
    """In place 3, copied 3 + 1 + 1: after one forward, which loses 2, both are 3."""
    costs = layer_costs()
    assert decisions(costs, 2, 5) == [True, False]
    # What was lost is made up for: after an eviction it begins anew, and other experts have lost nothing.
    assert decisions(costs, 2, 5) == [True, False]
    assert decisions(costs, 2, 6) == [True, False]


def test_losses_are_those_of_each_expert() -> None:
    costs = layer_costs(home_s=1.5)  # in place 1.5, copied 2.5 + 1, and 0.5 is lost each time
    assert decisions(costs, 3, 1) == [True] * 3
    assert decisions(costs, 1, 1, 2) == [True], "3 in place; 2 * 2.5 + 2 - 1.5 copied"
    assert decisions(costs, 1, 1) == [False], "expert 1 has lost 2 by now"
    assert decisions(costs, 4, 2) == [True] * 3 + [False]


def test_experts_in_slots_make_copying_cheaper() -> None:
    assert decisions(layer_costs(home_s=2.0), 1, 7) == [True], "2 in place; 3 + 1 copied"
    assert decisions(layer_costs(home_s=2.0), 1, 7, hit_count=3) == [False], "8 in place; 3 + 4 copied"


def test_losses_that_were_not_made_up_for_do_not_grow_without_end() -> None:
    costs = layer_costs(home_s=1.5)
    # Beside seven others that have lost nothing, one expert cannot pay for all copies, however much it has lost.
    for _ in range(3):
        decisions(costs, 1, 0)
    assert all(decisions(costs, 1, 0, other, hit_count=0) == [True] for other in range(1, 8))
    assert costs._regret_s.max() <= 1.5 + SLOT_S


@pytest.mark.parametrize(
    ("hit_count", "missing_count", "expected"),
    [(0, 8, True), (3, 5, True), (4, 4, False), (5, 3, False), (7, 1, False)],
)
def test_a_wide_forward_weighs_what_the_layer_buffer_takes_and_learns_nothing(
    hit_count: int, missing_count: int, *, expected: bool
) -> None:
    """Of 8 experts, 40 in place. In the layer buffer 6 for each that is missing, 2 for each from a slot, and 8."""
    costs = layer_costs(home_s=5.0)
    missing = np.arange(missing_count, dtype=np.int64)
    assert [costs.runs_in_place(hit_count, missing, is_narrow=False) for _ in range(3)] == [expected] * 3
    assert not costs._regret_s.any()


forwards = st.lists(st.sets(st.integers(0, 4), min_size=1, max_size=5), min_size=1, max_size=60)


@settings(deadline=None, derandomize=True, max_examples=300, database=None)
@given(forwards, st.sampled_from([1.01, 1.2, 1.5, 2.0, 3.0, 8.0]))
def test_neither_choice_costs_more_than_about_twice_the_better_one(forwards: list[set[int]], home_s: float) -> None:
    """With a slot for every expert, so that nothing is copied twice."""
    costs = layer_costs(expert_count=5, home_s=home_s)
    resident: set[int] = set()
    paid_s = in_place_s = copied_s = 0.0
    copied: set[int] = set()
    for needed in forwards:
        missing = needed - resident
        if missing and costs.runs_in_place(len(needed - missing), experts(*sorted(missing)), is_narrow=True):
            paid_s += len(needed) * home_s
        else:
            paid_s += len(missing) * (home_s + SLOT_S) + len(needed) * SLOT_S
            resident |= missing
        in_place_s += len(needed) * home_s
        copied_s += len(needed - copied) * (home_s + SLOT_S) + len(needed) * SLOT_S
        copied |= needed
    assert paid_s <= 2 * min(in_place_s, copied_s) + 1e-9


def test_a_kernel_takes_what_it_took_for_as_many_tokens_and_what_reading_takes_before_that_is_known() -> None:
    costs = layer_costs()
    assert costs.kernel_s(3, 4) == 4 * SLOT_S
    costs.observe_kernel(3, 2, 10.0)
    assert costs.kernel_s(2, 4) == costs.kernel_s(3, 4) == 20.0
    assert costs.kernel_s(1, 4) == costs.kernel_s(4, 4) == 4 * SLOT_S, "another power of two is another kind"
    costs.observe_kernel(2, 1, 6.0)
    assert costs.kernel_s(3, 1) == pytest.approx(5.1), "the latest weighs a tenth"


def test_passes_take_their_copies_their_kernels_and_an_overhead_each() -> None:
    costs = layer_costs()
    steps = [Step(1, 4, 3), Step(1, 2, 2)]
    serial_s = 3 * HOME_S + 4 * SLOT_S + 2 * HOME_S + 2 * SLOT_S + 2 * PASS_OVERHEAD_S
    assert costs.passes_s(steps, 4, overlaps=False) == pytest.approx(serial_s)
    assert costs.passes_s(steps, 4, overlaps=True) == pytest.approx(serial_s), "no slot is left to copy into"
    assert costs.passes_s(steps, 5, overlaps=True) == pytest.approx(serial_s - HOME_S), "one slab fits"
    assert costs.passes_s(steps, 9, overlaps=True) == pytest.approx(serial_s - 4 * SLOT_S), "as long as the kernel runs"
    assert costs.passes_s(steps[:1], 9, overlaps=True) == pytest.approx(3 * HOME_S + 4 * SLOT_S + PASS_OVERHEAD_S)


steps = st.lists(st.builds(Step, st.integers(1, 9), st.integers(1, 6), st.integers(0, 6)), min_size=1, max_size=5)


@settings(deadline=None, derandomize=True, database=None)
@given(steps, st.integers(6, 12))
def test_looking_ahead_never_makes_a_plan_dearer_nor_cheaper_than_its_kernels(steps: list[Step], slots: int) -> None:
    costs = layer_costs()
    alone_s, overlapped_s = (costs.passes_s(steps, slots, overlaps=overlaps) for overlaps in (False, True))
    kernels_s = sum(costs.kernel_s(step.token_count, step.expert_count) for step in steps)
    assert kernels_s + steps[0].fetch_count * HOME_S <= overlapped_s <= alone_s


visits = st.lists(st.lists(st.integers(0, 5), unique=True, max_size=6).map(sorted), max_size=8)


@settings(deadline=None, derandomize=True, database=None)
@given(visits)
def test_positions_follow_the_order_in_which_layers_are_come_to(forwards: list[list[int]]) -> None:
    """Layers that need nothing from anybody are not heard of."""
    order = LayerOrder(6)
    last = -1.0
    for layer_id in (layer_id for visited in forwards for layer_id in visited):
        expected = order.next_position(layer_id)
        position = order.arrive(layer_id)
        assert position == expected and position > last
        assert all(order.next_position(other) > position for other in range(6))
        last = position


def test_the_layer_that_comes_next_is_needed_first() -> None:
    order = LayerOrder(4)
    order.arrive(2)
    assert sorted(range(4), key=order.next_position) == [3, 0, 1, 2]
    order.arrive(3)
    assert sorted(range(4), key=order.next_position) == [0, 1, 2, 3]
