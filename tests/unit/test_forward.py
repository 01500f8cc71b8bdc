"""How a forward is run: the plan that the engine and the simulator share."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from vllm_moecxl.control.cost import LayerCosts
from vllm_moecxl.control.forward import ForwardPlanner
from vllm_moecxl.control.passes import Pass
from vllm_moecxl.types import PassKind

EXPERT_COUNT, SLOT_COUNT = 8, 4
#: More experts than slots.
WIDE = [[0, 1], [2, 3], [4, 5]]


def planner(pass_kind: PassKind = PassKind.TOKEN, **options: Any) -> ForwardPlanner:
    """Slabs of one byte: two seconds from home, one from a slot."""
    known = {"has_buffer": False, "is_joined": False, **options}
    costs = LayerCosts(EXPERT_COUNT, 1, 0.5, 1.0, known.pop("in_place", "never"), is_addressable=True)
    return ForwardPlanner(costs, EXPERT_COUNT, SLOT_COUNT, pass_kind, **known)


def plan(
    planner: ForwardPlanner,
    routes: list[list[int]],
    resident: list[int],
    *,
    overlaps: bool = False,
    is_buffered: bool = False,
) -> tuple[PassKind, list[Pass]]:
    mask = np.zeros(EXPERT_COUNT, dtype=np.bool_)
    mask[resident] = True
    ids = np.array(routes, dtype=np.int32)
    distinct = np.unique(ids).astype(np.int64)
    kind, passes = planner.plan(ids, distinct, mask, overlaps=overlaps, is_buffered=is_buffered)
    return kind, list(passes)


def experts_of(passes: list[Pass]) -> list[list[int]]:
    return [part.expert_ids.tolist() for part in passes]


def tokens_of(passes: list[Pass]) -> list[list[int] | None]:
    return [None if part.token_ids is None else part.token_ids.tolist() for part in passes]


@pytest.mark.parametrize("pass_kind", [PassKind.TOKEN, PassKind.EXPERT, PassKind.LAYER_BUFFER])
@pytest.mark.parametrize("overlaps", [False, True])
def test_what_fits_the_slots_and_has_nothing_to_wait_beside_is_one_pass(pass_kind: PassKind, overlaps: bool) -> None:
    chosen = planner(pass_kind, has_buffer=True, is_joined=True)
    kind, passes = plan(chosen, [[3, 1]], [0], overlaps=overlaps)
    assert kind is PassKind.SINGLE and experts_of(passes) == [[1, 3]] and tokens_of(passes) == [None]


def test_tokens_whose_experts_are_there_compute_while_the_others_are_copied() -> None:
    routes = [[0, 1]] * 6 + [[2, 3]]
    alone, split = (plan(planner(), routes, [0, 1], overlaps=overlaps) for overlaps in (False, True))
    assert alone[0] is PassKind.SINGLE
    assert split[0] is PassKind.TOKEN and tokens_of(split[1]) == [[0, 1, 2, 3, 4, 5], [6]]


def test_a_kernel_that_must_not_be_cut_is_not() -> None:
    routes = [[0, 1]] * 6 + [[2, 3]]
    chosen = planner(PassKind.LAYER_BUFFER, has_buffer=True)
    assert plan(chosen, routes, [0, 1], overlaps=True)[0] is PassKind.SINGLE


def test_what_does_not_fit_is_cut_by_tokens_or_by_experts() -> None:
    kind, passes = plan(planner(), WIDE, [0, 1])
    assert kind is PassKind.TOKEN and len(passes) == 2
    assert sorted(token_id for part in tokens_of(passes) for token_id in part or []) == [0, 1, 2]
    kind, passes = plan(planner(PassKind.EXPERT), WIDE, [4, 5])
    assert kind is PassKind.EXPERT and experts_of(passes) == [[4, 5, 0, 1], [2, 3]]


@pytest.mark.parametrize(
    ("options", "is_buffered", "expected"),
    [
        ({"has_buffer": True}, False, PassKind.TOKEN),
        ({"has_buffer": True}, True, PassKind.LAYER_BUFFER),
        ({"has_buffer": True, "is_joined": True}, False, PassKind.LAYER_BUFFER),
        ({"is_joined": True}, True, PassKind.TOKEN),
    ],
)
def test_a_layer_buffer_is_preferred_where_it_costs_no_copy_or_has_been_filled(
    options: dict[str, bool], is_buffered: bool, expected: PassKind
) -> None:
    kind, passes = plan(planner(**options), WIDE, [], is_buffered=is_buffered)
    assert kind is expected and bool(passes) == (expected is PassKind.TOKEN)


def test_a_layer_buffer_is_taken_where_passes_would_copy_more() -> None:
    every_pair = [[one, other] for one in range(EXPERT_COUNT) for other in range(EXPERT_COUNT) if one != other]
    assert plan(planner(), every_pair, [])[0] is PassKind.TOKEN
    assert plan(planner(has_buffer=True), every_pair, [])[0] is PassKind.LAYER_BUFFER


def test_what_runs_in_place_needs_no_passes_and_is_learned_from() -> None:
    chosen = planner(in_place="auto")
    kinds = [plan(chosen, [[0, 1]], [])[0] for _ in range(3)]
    assert kinds == [PassKind.IN_PLACE, PassKind.IN_PLACE, PassKind.SINGLE]


def test_empty_slots_are_for_the_experts_that_most_routes_go_to() -> None:
    routes = np.array([[5, 6], [5, 2], [6, 5], [2, 7], [1, 5]])
    missing: npt.NDArray[np.int64] = np.array([1, 2, 6, 7])
    assert planner().fillers(routes, missing, 3).tolist() == [2, 6, 1]
    assert planner().fillers(routes, missing, 9).tolist() == [2, 6, 1, 7]


def test_a_forward_that_needs_three_quarters_of_a_layer_is_taken_to_need_all_of_the_next() -> None:
    assert [planner().expects_all(count) for count in (5, 6, 8)] == [False, True, True]


def test_a_kernel_that_cannot_be_cut_has_a_layer_buffer() -> None:
    with pytest.raises(AssertionError):
        planner(PassKind.LAYER_BUFFER)
