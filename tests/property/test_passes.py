"""Cutting a wide forward into passes: each token once, experts that fit, no more fetches than allowed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_moecxl.control import passes as module
from vllm_moecxl.control.passes import Pass
from vllm_moecxl.control.residency import Residency

#: More fetches than any case has.
NO_LIMIT = 10**6


@dataclass(frozen=True)
class Case:
    """A forward, and the slots that it finds."""

    topk_ids: npt.NDArray[np.int32]
    resident: npt.NDArray[np.bool_]
    slot_count: int

    @property
    def distinct(self) -> npt.NDArray[np.int64]:
        return np.unique(self.topk_ids).astype(np.int64)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    expert_count = draw(st.integers(1, 10))
    slot_count = draw(st.integers(1, expert_count))
    topk = draw(st.integers(1, min(slot_count, 3)))
    token = st.lists(st.integers(0, expert_count - 1), min_size=topk, max_size=topk)
    ids = np.array(draw(st.lists(token, min_size=1, max_size=14)), dtype=np.int32)
    resident = draw(st.sets(st.integers(0, expert_count - 1), max_size=slot_count))
    return Case(ids, np.isin(np.arange(expert_count), list(resident)), slot_count)


class HighestExpertFirst:
    """Evicts as the plan assumes: it cannot know what a policy will choose among experts that are all still wanted."""

    def __init__(self, slot_count: int) -> None:
        self.expert_of = np.full(slot_count, -1)

    def record(self, slot_ids: npt.NDArray[np.integer]) -> None:
        pass

    def admit(self, slot_id: int, expert_id: int) -> None:
        self.expert_of[slot_id] = expert_id

    def victim(self, candidates: npt.NDArray[np.bool_], last_read: npt.NDArray[np.int64]) -> int:
        return int(np.where(candidates, self.expert_of, -1).argmax())


def replay(case: Case, passes: Sequence[Pass]) -> int:
    """Fetches that slots see when these passes run."""
    residency = Residency(case.resident.size, case.slot_count, HighestExpertFirst(case.slot_count))
    keep = np.zeros(case.resident.size, dtype=np.bool_)

    def fetch(expert_ids: list[int]) -> int:
        slot_ids = [residency.begin_fill(expert_id, keep) for expert_id in expert_ids]
        for slot_id in slot_ids:
            assert slot_id is not None
            residency.complete_fill(slot_id)
        return len(expert_ids)

    fetch(np.flatnonzero(case.resident).tolist())
    fetch_count = 0
    for index, part in enumerate(passes):
        keep = module.needed_later(passes, index, case.resident.size)
        here = residency.resident_mask()[part.expert_ids]
        cached = part.expert_ids[here].astype(np.uint32)
        hold = residency.lease(cached) if cached.size else None
        fetch_count += fetch(part.expert_ids[~here].tolist())
        if hold is not None:
            residency.release(hold)
        lease = residency.lease(part.expert_ids.astype(np.uint32))
        assert lease is not None, "a pass finds its experts"
        residency.release(lease)
    return fetch_count


def check_cover(case: Case) -> None:
    passes = module.token_passes(case.topk_ids, case.resident, case.slot_count, NO_LIMIT)
    assert passes is not None
    covered = np.concatenate([part.token_ids for part in passes if part.token_ids is not None])
    assert sorted(covered.tolist()) == list(range(len(case.topk_ids)))
    for part in passes:
        assert part.token_ids is not None and np.all(np.diff(part.token_ids) > 0)
        assert part.token_ids.size and 1 <= part.expert_ids.size <= case.slot_count
        assert np.all(np.diff(part.expert_ids) > 0)
        assert set(part.expert_ids.tolist()) == set(case.topk_ids[part.token_ids].flatten().tolist())


@settings(max_examples=300)
@given(cases())
def test_token_passes_cover_each_token_once_with_experts_that_fit(case: Case) -> None:
    check_cover(case)


def check_limit(case: Case) -> None:
    passes = module.token_passes(case.topk_ids, case.resident, case.slot_count, NO_LIMIT)
    assert passes is not None
    fetch_count = replay(case, passes)
    assert module.token_passes(case.topk_ids, case.resident, case.slot_count, fetch_count) is not None
    assert (
        module.token_passes(case.topk_ids, case.resident, case.slot_count, fetch_count - 1) is None or not fetch_count
    )


@settings(max_examples=400)
@given(cases())
def test_token_passes_give_up_rather_than_exceed_the_fetch_limit_and_only_then(case: Case) -> None:
    check_limit(case)


@settings(max_examples=300)
@given(cases())
def test_token_passes_never_give_up_with_as_many_fetches_as_routes(case: Case) -> None:
    assert module.token_passes(case.topk_ids, case.resident, case.slot_count, case.topk_ids.size) is not None


@given(cases())
def test_token_passes_leave_their_inputs_alone(case: Case) -> None:
    ids, resident = case.topk_ids.copy(), case.resident.copy()
    module.token_passes(case.topk_ids, case.resident, case.slot_count, NO_LIMIT)
    assert np.array_equal(ids, case.topk_ids) and np.array_equal(resident, case.resident)


@given(cases())
def test_a_forward_that_fits_is_one_pass(case: Case) -> None:
    passes = module.token_passes(case.topk_ids, case.resident, case.slot_count, NO_LIMIT)
    assert passes is not None and (len(passes) == 1) == (case.distinct.size <= case.slot_count)


def check_expert_passes(case: Case) -> None:
    distinct = np.random.default_rng(case.slot_count).permutation(case.distinct)
    passes = module.expert_passes(distinct, case.resident, case.slot_count)
    order = np.concatenate([part.expert_ids for part in passes])
    assert sorted(order.tolist()) == case.distinct.tolist(), "each expert exactly once"
    assert np.all(np.diff(case.resident[order].astype(int)) <= 0), "resident ones first"
    assert all(1 <= part.expert_ids.size <= case.slot_count and part.token_ids is None for part in passes)
    assert len(passes) == -(-distinct.size // case.slot_count)
    assert replay(case, passes) == np.count_nonzero(~case.resident[distinct]), "none is fetched twice"


@settings(max_examples=300)
@given(cases())
def test_expert_passes_repeat_no_expert_and_fetch_only_what_is_absent(case: Case) -> None:
    check_expert_passes(case)


@given(cases())
def test_needed_later_shrinks_to_the_last_pass(case: Case) -> None:
    passes = module.expert_passes(case.distinct, case.resident, case.slot_count)
    for index in range(len(passes)):
        needed = np.flatnonzero(module.needed_later(passes, index, case.resident.size))
        assert needed.tolist() == sorted(np.concatenate([part.expert_ids for part in passes[index:]]).tolist())


def check_split(case: Case) -> None:
    whole = Pass(case.distinct, None)
    passes = module.token_passes(case.topk_ids, case.resident, case.slot_count, NO_LIMIT)
    assert passes is not None
    for part in (whole, *passes):
        token_ids = np.arange(len(case.topk_ids)) if part.token_ids is None else part.token_ids
        is_ready = [set(row) <= set(np.flatnonzero(case.resident)) for row in case.topk_ids[token_ids].tolist()]
        two = module.split_resident(part, case.topk_ids, case.resident)
        if all(is_ready) or not any(is_ready):
            assert two is None, "nothing would run while nothing is copied"
            continue
        assert two is not None
        for found, wanted in zip(two, (True, False), strict=True):
            assert found.token_ids is not None
            assert found.token_ids.tolist() == [
                t for t, ready in zip(token_ids, is_ready, strict=True) if ready is wanted
            ]
            assert found.expert_ids.tolist() == np.unique(case.topk_ids[found.token_ids]).tolist()
            assert found.expert_ids.dtype == np.int64 and found.expert_ids.size <= part.expert_ids.size
        assert case.resident[two[0].expert_ids].all(), "the first part waits for nothing"


@settings(max_examples=300)
@given(cases())
def test_a_pass_is_split_into_what_can_run_at_once_and_the_rest(case: Case) -> None:
    check_split(case)


def check_fetch_counts(case: Case) -> None:
    passes = module.token_passes(case.topk_ids, case.resident, case.slot_count, NO_LIMIT)
    assert passes is not None
    plans = [passes, module.expert_passes(case.distinct, case.resident, case.slot_count)]
    if (two := module.split_resident(passes[0], case.topk_ids, case.resident)) is not None:
        plans.append([*two, *passes[1:]])
    for plan in plans:
        resident = case.resident.copy()
        counts = module.fetch_counts(plan, case.resident, case.slot_count)
        assert np.array_equal(resident, case.resident)
        assert len(counts) == len(plan) and sum(counts) == replay(case, plan)


@settings(max_examples=300)
@given(cases())
def test_the_fetches_of_each_pass_are_foretold(case: Case) -> None:
    check_fetch_counts(case)
