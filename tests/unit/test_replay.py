"""The replay counts what a plain model of slots counts, and takes a trace's prompts as told."""

import numpy as np
import pytest

from vllm_moecxl.control.eviction import POLICIES, Belady, EvictionPolicy
from vllm_moecxl.control.replay import Hits, Visit, belady, replay, replay_layer, replayable, visits_of
from vllm_moecxl.control.residency import Residency
from vllm_moecxl.control.trace import RoutingTrace
from vllm_moecxl.types import Lookup

EXPERT_COUNT = 10


def make_trace(prefill: tuple[int, ...] = (3, 0, 5), lengths: tuple[int, ...] = (10, 20, 30)) -> RoutingTrace:
    rng = np.random.default_rng(7)
    token_count = sum(lengths)
    return RoutingTrace(
        topk=rng.random((token_count, 2, EXPERT_COUNT)).argsort(axis=2)[:, :, :3].astype(np.uint8),
        weights=None,
        lookahead=None,
        req=np.cumsum((0, *lengths)),
        prefill=np.array(prefill, dtype=np.int32),
        token_ids=np.full(token_count, -1, dtype=np.int32),
        layer_ids=np.arange(2, dtype=np.int32),
        meta={"num_experts": EXPERT_COUNT},
    )


def make(name: str, slot_count: int) -> EvictionPolicy:
    return POLICIES[name](slot_count, EXPERT_COUNT)


def lru(slot_count: int, expert_count: int, layer: int) -> EvictionPolicy:
    return POLICIES["lru"](slot_count, expert_count)


def hits_of_plain_lru(rows: np.ndarray, slot_count: int) -> int:
    """LRU on a list of slots, by last visit and then by slot."""
    slots: list[int | None] = [None] * slot_count
    read_at = [0] * slot_count
    hit_count = 0
    for now, row in enumerate(rows.tolist(), start=1):
        hit_count += sum(expert_id in slots for expert_id in row)
        for expert_id in row:
            if expert_id not in slots:
                free = [s for s, held in enumerate(slots) if held is None]
                others = [s for s, held in enumerate(slots) if held not in row]
                slots[free[0] if free else min(others, key=lambda s: (read_at[s], s))] = expert_id
        for slot_id, held in enumerate(slots):
            if held in row:
                read_at[slot_id] = now
    return hit_count


@pytest.mark.parametrize("slot_count", [3, 4, 7, 10])
def test_lru_hits_as_often_as_a_plain_list_of_slots_says(slot_count: int) -> None:
    trace = make_trace(prefill=(0, 0, 0))
    expected = sum(hits_of_plain_lru(trace.topk[:, layer], slot_count) for layer in range(2))
    assert replay(trace, [slot_count] * 2, lru) == Hits(60 * 2 * 3, expected)


def hits_of_residency(visits: list[Visit], slot_count: int, policy: EvictionPolicy) -> list[int]:
    """Hits of each visit, by the engine's slot table."""
    residency = Residency(EXPERT_COUNT, slot_count, policy)
    hits = []
    for visit in visits:
        ids = visit.expert_ids
        hits.append(int(np.count_nonzero(residency.resident_mask()[ids])))
        lease = residency.visit(ids)
        for first in range(0, len(ids), slot_count) if lease is None else ():
            part = ids[first : first + slot_count]
            for expert_id in part.tolist():
                if residency.lookup(expert_id) is Lookup.MISS:
                    slot_id = residency.begin_fill(expert_id, np.isin(np.arange(EXPERT_COUNT), part))
                    assert slot_id is not None
                    residency.complete_fill(slot_id)
            lease = residency.lease(part)
            assert lease is not None
            residency.release(lease)
            lease = None
        if lease is not None:
            residency.release(lease)
    return hits


@pytest.mark.parametrize("name", [*POLICIES, "belady"])
@pytest.mark.parametrize("slot_count", [3, 5, 8])
def test_it_hits_what_the_engines_slot_table_hits_with_every_policy(name: str, slot_count: int) -> None:
    trace = make_trace()
    visits = list(visits_of(trace, 1, with_prompts=name != "belady"))

    def policy() -> EvictionPolicy:
        return belady(trace)(slot_count, EXPERT_COUNT, 1) if name == "belady" else make(name, slot_count)

    expected = hits_of_residency(visits, slot_count, policy())
    for end in range(1, len(visits) + 1):
        assert replay_layer(visits[:end], EXPERT_COUNT, slot_count, policy()).hit_count == sum(
            hits for hits, visit in zip(expected[:end], visits[:end], strict=True) if visit.is_counted
        )


def test_layers_may_have_different_numbers_of_slots() -> None:
    trace = make_trace(prefill=(0, 0, 0))
    expected = hits_of_plain_lru(trace.topk[:, 0], 3) + hits_of_plain_lru(trace.topk[:, 1], 8)
    assert replay(trace, [3, 8], lru).hit_count == expected


def test_prompts_are_left_out_and_slots_are_kept_from_request_to_request() -> None:
    trace = make_trace()
    rows = trace.topk[trace.decode_mask()]
    assert len(rows) == 52
    assert replay(trace, [5, 5], lru) == Hits(
        52 * 2 * 3, sum(hits_of_plain_lru(rows[:, layer], 5) for layer in range(2))
    )


def test_a_prompt_that_is_let_in_is_one_visit_whose_hits_do_not_count() -> None:
    trace = make_trace()
    visits = list(visits_of(trace, 0, with_prompts=True))
    assert len(visits) == 52 + 2
    assert not visits[0].is_counted and visits[0].expert_ids.tolist() == sorted(set(trace.topk[:3, 0].ravel().tolist()))
    assert visits[1].is_counted and visits[1].expert_ids.tolist() == trace.topk[3, 0].tolist()
    assert replay(trace, [5, 5], lru, with_prompts=True).lookup_count == 52 * 2 * 3


def test_a_visit_wider_than_the_slots_is_brought_in_passes() -> None:
    wide = Visit(np.arange(EXPERT_COUNT, dtype=np.uint32))
    last = Visit(np.array([6, 7, 8, 9], dtype=np.uint32))
    assert replay_layer([wide, last], EXPERT_COUNT, 4, make("lru", 4)) == Hits(14, 4)


def test_a_trace_of_nothing_but_prompts_is_replayed_as_decode() -> None:
    whole = make_trace(prefill=(10, 20, 30))
    assert replay(replayable(whole), [5, 5], lru) == replay(make_trace(prefill=(0, 0, 0)), [5, 5], lru)
    partly = make_trace()
    assert replayable(partly) is partly


def test_belady_is_never_beaten() -> None:
    trace = make_trace()
    for slot_count in (3, 5, 8):
        bound = replay(trace, [slot_count] * 2, belady(trace)).hit_count
        for name in POLICIES:
            hits = replay(
                trace, [slot_count] * 2, lambda slots, experts, layer, name=name: POLICIES[name](slots, experts)
            )
            assert hits.hit_count <= bound


def test_where_a_token_fills_the_slots_every_policy_is_the_same() -> None:
    trace = make_trace(prefill=(0, 0, 0))
    visits = list(visits_of(trace, 0))
    policies = [make(name, 3) for name in POLICIES] + [Belady(3, EXPERT_COUNT, trace.topk[:, 0])]
    assert len({replay_layer(visits, EXPERT_COUNT, 3, policy) for policy in policies}) == 1


def test_rates_and_bytes_follow_from_the_counts() -> None:
    assert Hits(8, 6).hit_rate == 0.75 and Hits(8, 6).fetch_bytes(100) == 200
    assert Hits(0, 0).hit_rate == 0.0
