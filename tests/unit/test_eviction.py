"""The contract that every eviction policy keeps; `test_eviction_policies` has what each one promises on top."""

import numpy as np
import pytest

from vllm_moecxl.config import EVICTIONS
from vllm_moecxl.control.eviction import POLICIES, Belady, EvictionPolicy
from vllm_moecxl.control.residency import Residency
from vllm_moecxl.types import Lookup

SLOT_COUNT = 7
EXPERT_COUNT = 20
VISIT_COUNT = 300
NAMES = (*sorted(POLICIES), "belady")

History = list[np.ndarray]


def make_policy(name: str, slot_count: int = SLOT_COUNT, history: History | None = None) -> EvictionPolicy:
    if name != "belady":
        return POLICIES[name](slot_count, EXPERT_COUNT)
    widest = max((len(ids) for ids in history or []), default=1)
    padded = [np.resize(ids, widest) for ids in history or [np.zeros(1, dtype=np.uint32)] * VISIT_COUNT]
    return Belady(slot_count, EXPERT_COUNT, np.stack(padded))


@pytest.fixture(params=NAMES)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


def random_history(seed: int, width_max: int = SLOT_COUNT, visit_count: int = VISIT_COUNT) -> History:
    """What each visit needs, with repeats; a few experts are needed more often than others."""
    rng = np.random.default_rng(seed)
    odds = 0.7 * rng.dirichlet(np.full(EXPERT_COUNT, 0.3)) + 0.3 / EXPERT_COUNT
    return [
        rng.choice(EXPERT_COUNT, size=rng.integers(1, width_max + 1), p=odds).astype(np.uint32)
        for _ in range(visit_count)
    ]


def serve(residency: Residency, ids: np.ndarray, *, aborts: bool = False) -> list[int]:
    """One visit; the slots that it filled. With `aborts` every fetch fails once before it succeeds."""
    lease = residency.visit(ids)
    slot_ids = []
    if lease is None:
        keep = np.isin(np.arange(EXPERT_COUNT), ids)
        for expert_id in np.unique(ids).tolist():
            if residency.lookup(expert_id) is Lookup.MISS:
                for fails in (True, False) if aborts else (False,):
                    slot_id = residency.begin_fill(expert_id, keep)
                    assert slot_id is not None
                    (residency.abort_fill if fails else residency.complete_fill)(slot_id)
                slot_ids.append(slot_id)
        lease = residency.lease(ids)
    assert lease is not None, "what a visit needs stays until the visit has it all"
    residency.release(lease)
    residency.check()
    return slot_ids


def play(name: str, seed: int, slot_count: int = SLOT_COUNT, *, aborts: bool = False) -> list[list[int]]:
    history = random_history(seed, slot_count)
    residency = Residency(EXPERT_COUNT, slot_count, make_policy(name, slot_count, history))
    return [serve(residency, ids, aborts=aborts) for ids in history]


class Asked:
    """A policy with a past, and its slots' stamps."""

    def __init__(self, name: str) -> None:
        history = random_history(seed=9)
        self.policy = make_policy(name, history=history)
        self.residency = Residency(EXPERT_COUNT, SLOT_COUNT, self.policy)
        for ids in history:
            serve(self.residency, ids)
        self.last_read = np.arange(SLOT_COUNT, 0, -1, dtype=np.int64)

    def victim(self, *slot_ids: int) -> int:
        return self.policy.victim(np.isin(np.arange(SLOT_COUNT), slot_ids), self.last_read)


def test_every_policy_has_a_name_in_the_configuration() -> None:
    assert tuple(POLICIES) == EVICTIONS


@pytest.mark.parametrize("slot_count", [1, 2, SLOT_COUNT, EXPERT_COUNT - 1, EXPERT_COUNT])
def test_any_number_of_slots_is_served_and_the_same_history_gives_the_same_victims(name: str, slot_count: int) -> None:
    filled = play(name, 1, slot_count)
    assert filled == play(name, 1, slot_count)
    is_ever_evicting = sum(map(len, filled)) > slot_count
    assert is_ever_evicting == (slot_count < EXPERT_COUNT)


def test_failed_fetches_do_not_confuse_it(name: str) -> None:
    for seed in range(3):
        play(name, seed, aborts=True)


def test_a_policy_that_was_never_told_anything_names_the_least_recent(name: str) -> None:
    policy = make_policy(name)
    last_read = np.array([5, 4, 9, 3, 8, 3, 1], dtype=np.int64)
    if name == "belady":
        policy.record(np.zeros(1, dtype=np.uint32))
    assert policy.victim(np.isin(np.arange(SLOT_COUNT), [0, 2, 3, 5]), last_read) == 3


def test_slots_may_be_filled_before_the_first_visit(name: str) -> None:
    policy = make_policy(name)
    for slot_id in range(SLOT_COUNT):
        policy.admit(slot_id, EXPERT_COUNT - 1 - slot_id)
    policy.record(np.array([EXPERT_COUNT - 1], dtype=np.uint32))
    assert policy.victim(np.arange(SLOT_COUNT) > 4, np.zeros(SLOT_COUNT, dtype=np.int64)) in (5, 6)


def test_the_only_candidate_is_the_victim(name: str) -> None:
    asked = Asked(name)
    assert [asked.victim(slot_id) for slot_id in range(SLOT_COUNT)] == list(range(SLOT_COUNT))


def test_asking_for_a_victim_changes_nothing(name: str) -> None:
    asked = Asked(name)
    answers = [(asked.victim(0, 2, 4, 6), asked.victim(1, 3, 5), asked.victim(*range(SLOT_COUNT))) for _ in range(5)]
    assert len(set(answers)) == 1


def test_candidates_and_stamps_and_ids_are_left_alone(name: str) -> None:
    asked = Asked(name)
    candidates, last_read = np.arange(SLOT_COUNT) < 3, asked.last_read.copy()
    asked.policy.victim(candidates, asked.last_read)
    assert candidates.tolist() == [True] * 3 + [False] * 4 and np.array_equal(last_read, asked.last_read)


def test_the_ids_of_a_visit_stay_the_callers(name: str) -> None:
    """A forward's ids lie in a buffer that the next forward overwrites."""
    history = [ids for ids in random_history(3) if ids.size == 4][:30]
    one, other = (Residency(EXPERT_COUNT, SLOT_COUNT, make_policy(name, history=history)) for _ in range(2))
    buffer = np.zeros(4, dtype=np.uint32)
    for ids in history:
        buffer[:] = ids
        filled = serve(one, buffer)
        buffer[:] = EXPERT_COUNT - 1
        assert filled == serve(other, ids)


def test_repeats_and_shape_and_order_of_ids_mean_nothing(name: str) -> None:
    if name == "belady":
        pytest.skip("it reads the future, not the ids")
    one, other = make_policy(name), make_policy(name)
    for policy in (one, other):
        for slot_id in range(SLOT_COUNT):
            policy.admit(slot_id, slot_id)
    rng = np.random.default_rng(5)
    stamps = np.zeros(SLOT_COUNT, dtype=np.int64)
    for number in range(200):
        ids = np.unique(rng.integers(SLOT_COUNT, size=3).astype(np.uint32))
        one.record(ids)
        other.record(rng.permutation(np.repeat(ids, 2)).reshape(2, -1))
        stamps[ids] = number
        candidates = np.isin(np.arange(SLOT_COUNT), ids, invert=True)
        assert one.victim(candidates, stamps) == other.victim(candidates, stamps)


def test_without_a_candidate_there_is_no_victim(name: str) -> None:
    with pytest.raises(AssertionError, match="at least one candidate"):
        Asked(name).victim()


def test_thousands_of_visits_without_an_eviction_leave_it_fit(name: str) -> None:
    """Counters that grow are brought down again, and what waits to be counted does not pile up."""
    ids = np.array([1, 2], dtype=np.uint32)
    policy = make_policy(name, history=[ids] * 20_000)
    for slot_id in range(SLOT_COUNT):
        policy.admit(slot_id, slot_id)
    for _ in range(20_000):
        policy.record(ids)
    stamps = np.zeros(SLOT_COUNT, dtype=np.int64)
    stamps[[1, 2]] = 1
    assert policy.victim(np.ones(SLOT_COUNT, dtype=np.bool_), stamps) not in (1, 2) or name == "belady"


def test_prompts_that_need_every_expert_are_survived(name: str) -> None:
    history = [
        np.arange(EXPERT_COUNT, dtype=np.uint32) if n % 5 == 0 else ids for n, ids in enumerate(random_history(8))
    ]
    policy = make_policy(name, history=history)
    for slot_id in range(SLOT_COUNT):
        policy.admit(slot_id, slot_id)
    for number, ids in enumerate(history):
        policy.record(ids)
        victim = policy.victim(np.ones(SLOT_COUNT, dtype=np.bool_), np.zeros(SLOT_COUNT, dtype=np.int64))
        policy.admit(victim, number % EXPERT_COUNT)
