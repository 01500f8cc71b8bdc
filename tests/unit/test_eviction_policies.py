"""What each eviction policy promises beyond the contract."""

from itertools import product

import numpy as np
import pytest

from vllm_moecxl.control.eviction import POLICIES, Belady, EvictionPolicy, LeastRecentlyUsed, NextUse
from vllm_moecxl.control.eviction.learned import HALF_LIVES, LearnedNextUse
from vllm_moecxl.control.replay import Hits, Visit, replay_layer

SLOT_COUNT = 4
EXPERT_COUNT = 12


def visits(*rows: tuple[int, ...]) -> list[Visit]:
    return [Visit(np.array(row, dtype=np.uint32)) for row in rows]


class Slots:
    """Slots that hold the experts 0, 1, 2, ... and are read one visit at a time."""

    def __init__(self, policy: EvictionPolicy, slot_count: int = SLOT_COUNT) -> None:
        self.policy = policy
        self.now = 0
        self.last_read = np.zeros(slot_count, dtype=np.int64)
        self.holds = list(range(slot_count))
        for slot_id in range(slot_count):
            policy.admit(slot_id, slot_id)

    def read(self, *expert_ids: int) -> None:
        self.now += 1
        self.policy.record(np.array(expert_ids, dtype=np.uint32))
        for expert_id in expert_ids:
            if expert_id in self.holds:
                self.last_read[self.holds.index(expert_id)] = self.now

    def put(self, slot_id: int, expert_id: int) -> None:
        self.holds[slot_id] = expert_id
        self.policy.admit(slot_id, expert_id)

    def victim(self, *expert_ids: int) -> int:
        """The expert that goes, of some of those held or of all."""
        candidates = np.isin(self.holds, expert_ids or self.holds)
        return self.holds[self.policy.victim(candidates, self.last_read)]


def make(name: str) -> Slots:
    return Slots(POLICIES[name](SLOT_COUNT, EXPERT_COUNT))


def rate(name: str, played: list[Visit], slot_count: int = SLOT_COUNT, expert_count: int = EXPERT_COUNT) -> float:
    return replay_layer(played, expert_count, slot_count, POLICIES[name](slot_count, expert_count)).hit_rate


def test_lru_evicts_in_the_order_of_last_reads_and_the_lower_slot_of_those_read_together() -> None:
    slots = make("lru")
    slots.read(3, 1)
    slots.read(0)
    slots.read(2)
    order: list[int] = []
    while len(order) < SLOT_COUNT:
        order.append(slots.victim(*(set(range(SLOT_COUNT)) - set(order))))
    assert order == [1, 3, 0, 2]


def test_lfu_evicts_what_was_needed_least_and_forgets_old_counts() -> None:
    slots = make("lfu")
    for expert_ids in [(0,)] * 500 + [(1,)] * 400:
        slots.read(*expert_ids)
    assert slots.victim(0, 1) == 0
    assert slots.victim(1, 2) == 2


def test_lfru_weighs_how_often_against_how_lately() -> None:
    slots = make("lfru")
    for expert_id in (0, 0, 0, 0, 1):
        slots.read(expert_id)
    assert slots.victim(0, 1) == 1
    for _ in range(60):
        slots.read(2)
    slots.read(1)
    assert slots.victim(0, 1) == 0


def test_class_lru_evicts_the_least_recent_of_the_lowest_power_of_two() -> None:
    slots = make("class-lru")
    for expert_id in (2, 2, 2, 2, 0, 0, 0, 0, 0, 1, 3):
        slots.read(expert_id)
    assert [slots.victim(), slots.victim(0, 2, 3), slots.victim(0, 2)] == [1, 3, 2]


def test_arc_keeps_what_came_back_through_a_scan() -> None:
    loop = visits(*([(0,), (1,), (0,), (1,)] + [(n,) for n in range(2, EXPERT_COUNT)]) * 30)
    assert rate("arc", loop) > rate("lru", loop) + 0.1


def test_arc_gives_more_slots_to_newcomers_when_their_ghosts_come_back() -> None:
    slots = make("arc")
    slots.read(0, 1)  # both are frequent now
    slots.put(2, 4)
    assert slots.victim(0, 4) == 4
    slots.put(3, 2)  # 2 was evicted a moment ago: slots for those seen once were too few
    assert slots.victim(0, 4) == 0


def test_second_touch_evicts_newcomers_first_until_they_are_needed_again() -> None:
    slots = make("second-touch")
    slots.read(0, 1)
    slots.read(0, 1)
    slots.read(2)
    slots.read(3)
    assert slots.victim() == 2
    slots.read(2)
    assert slots.victim() == 3
    slots.read(3)
    assert slots.victim() == 0


def test_second_touch_forgets_what_proved_itself_too_long_ago() -> None:
    slots = make("second-touch")
    slots.read(0)
    slots.read(0)
    for _ in range(100):
        slots.read(1)
    slots.read(2)
    assert slots.victim(0, 2) == 0


def test_next_use_goes_by_the_probabilities_that_somebody_keeps_up_to_date() -> None:
    probabilities = np.zeros(EXPERT_COUNT, dtype=np.float32)
    slots = Slots(NextUse(SLOT_COUNT, EXPERT_COUNT, probabilities))
    probabilities[:SLOT_COUNT] = 0.9, 0.2, 0.4, 0.6
    assert slots.victim() == 1
    probabilities[1] = 0.95
    assert slots.victim() == 2


def test_next_use_looks_beyond_the_next_visit() -> None:
    slots = Slots(NextUse(SLOT_COUNT, EXPERT_COUNT, np.zeros(EXPERT_COUNT, dtype=np.float32)))
    for _ in range(20):
        slots.read(0)
        slots.read(1, 0)
    assert slots.victim(0, 1) == 1


def test_next_use_without_a_predictor_goes_by_its_own_rates() -> None:
    played = visits(*[tuple(row) for row in np.random.default_rng(1).zipf(1.5, size=(500, 1)) % EXPERT_COUNT])
    assert rate("next-use", played) == rate("lfru", played)


def test_prompts_do_not_displace_what_decode_needs_from_a_protecting_policy() -> None:
    rng = np.random.default_rng(6)
    decode = [(0,), (1,), (2,), (3,), (4,), (5,)] * 8
    played = visits(*decode)
    for _ in range(20):
        for _ in range(3):
            played += [Visit(rng.permutation(np.arange(6, 40, dtype=np.uint32))[:4], is_counted=False)]
        played += visits(*decode)
    assert rate("lru", played, 8, 40) < 0.88
    # The first of the prompts has to take two of the six, the others take what the first one brought.
    assert rate("prefill-protecting", played, 8, 40) > 0.95


def test_what_a_prompt_brought_stays_if_decode_needs_it() -> None:
    slots = make("prefill-protecting")
    for _ in range(100):
        slots.read(0)
    slots.read(*range(EXPERT_COUNT))
    slots.put(0, 5)
    slots.put(1, 6)
    assert slots.victim() == 5
    slots.read(5)
    assert slots.victim() == 6
    assert slots.victim(5, 2) == 2


def test_a_batch_of_tokens_that_need_the_same_experts_is_no_prompt() -> None:
    slots = make("prefill-protecting")
    for _ in range(100):
        slots.read(0)
    slots.read(*[0, 5] * 30)
    slots.put(1, 5)
    slots.last_read[1] = slots.now
    assert slots.victim(5, 2) == 2


def test_a_batch_that_has_grown_is_no_prompt_for_long() -> None:
    slots = make("prefill-protecting")
    for expert_ids in [(0,)] * 100 + [(0, 1, 2, 3, 4, 5)] * 200:
        slots.read(*expert_ids)
    slots.put(3, 5)
    slots.read(0, 1, 2, 3, 4, 5)
    assert slots.victim(2, 5) == 2


def future(played: list[Visit]) -> np.ndarray:
    return np.stack([visit.expert_ids for visit in played])


def most_hits(played: list[Visit], slot_count: int) -> int:
    """By trying every victim of every miss."""
    states = {frozenset[int](): 0}
    for visit in played:
        needed = frozenset(visit.expert_ids.tolist())
        following: dict[frozenset[int], int] = {}
        for held, hit_count in states.items():
            others = sorted(held - needed)
            spare = slot_count - len(needed)
            for kept_flags in product((True, False), repeat=len(others)):
                kept = {e for e, is_kept in zip(others, kept_flags, strict=True) if is_kept}
                if len(kept) == min(spare, len(others)):
                    after = needed | kept
                    following[after] = max(following.get(after, 0), hit_count + len(held & needed))
        states = following
    return max(states.values())


@pytest.mark.parametrize("seed", range(12))
def test_no_choice_of_victims_hits_more_often_than_belady_also_with_several_experts_a_visit(seed: int) -> None:
    rng = np.random.default_rng(seed)
    topk = 1 + seed % 3
    played = visits(*[tuple(rng.permutation(7)[:topk].tolist()) for _ in range(40)])
    hits = replay_layer(played, 7, 4, Belady(4, 7, future(played)))
    assert hits == Hits(40 * topk, most_hits(played, 4))


def test_learning_finds_what_follows_what_where_recency_and_frequency_are_blind() -> None:
    """A loop longer than the slots: what was needed last and most is needed again last."""
    rng = np.random.default_rng(2)
    steps = rng.choice([1, 2], p=[0.9, 0.1], size=6000)
    played = visits(*[(place,) for place in (np.cumsum(steps) % EXPERT_COUNT).tolist()])
    assert rate("lru", played) < 0.02
    assert rate("learned", played) > 0.15


def test_learning_does_no_harm_where_there_is_nothing_to_learn() -> None:
    rng = np.random.default_rng(3)
    played = visits(*[tuple(rng.permutation(EXPERT_COUNT)[:2].tolist()) for _ in range(4000)])
    assert rate("learned", played) == pytest.approx(rate("lru", played), abs=0.02)


def test_learning_counts_every_visit_at_its_own_age_whether_evictions_ask_or_not() -> None:
    """Visits are counted in batches, from a history that goes round; a plain moving average does neither."""
    rng = np.random.default_rng(4)
    rows = [rng.permutation(EXPERT_COUNT)[:2] for _ in range(301)]
    never, asked = LearnedNextUse(SLOT_COUNT, EXPERT_COUNT), LearnedNextUse(SLOT_COUNT, EXPERT_COUNT)
    decays = 0.5 ** (1.0 / np.array(HALF_LIVES))[:, None]
    expected = np.full((len(HALF_LIVES), EXPERT_COUNT), 1.0 / EXPERT_COUNT)
    for number, row in enumerate(rows):
        expected = decays * expected + (1.0 - decays) * np.isin(np.arange(EXPERT_COUNT), row)
        for policy in (never, asked):
            policy.record(row.astype(np.uint32))
        if number % 7 == 3:
            asked.values()
    for policy in (never, asked):
        policy.values()
        np.testing.assert_allclose(policy._rates, expected, rtol=1e-4)


def weights_after(rows: list[tuple[int, ...]], asks: set[int]) -> np.ndarray:
    """What "learned" has learnt from visits, where evictions asked it at some of them."""
    policy = LearnedNextUse(SLOT_COUNT, EXPERT_COUNT)
    for number, row in enumerate(rows):
        policy.record(np.array(row, dtype=np.uint32))
        if number in asks:
            policy.victim(np.ones(SLOT_COUNT, dtype=np.bool_), np.zeros(SLOT_COUNT, dtype=np.int64))
    return policy._weights


def test_what_came_within_the_horizon_of_an_estimate_is_learnt_and_nothing_else() -> None:
    quiet = [(0, 1)] * 5
    learnt = weights_after([*quiet, (2, 3), (4, 5), (6, 7), (8, 9), (0, 1)], asks={5, 9})
    assert np.flatnonzero(learnt.any(axis=1)).tolist() == [2, 3]
    # Two visits fill four slots; what came after them did not come in time.
    assert np.flatnonzero(learnt[2] > 0).tolist() == [4, 5, 6, 7]


def test_an_estimate_that_is_too_old_to_be_checked_teaches_nothing() -> None:
    assert weights_after([(0, 1)] * 50, asks={5, 49}).any()
    assert not weights_after([(0, 1)] * 200, asks={5, 199}).any()


def test_a_visit_of_most_experts_teaches_nothing() -> None:
    wide = tuple(range(EXPERT_COUNT - 2))
    assert not weights_after([wide] * 40, asks=set(range(40))).any()


def test_lru_is_made_from_its_slots_alone() -> None:
    assert isinstance(POLICIES["lru"](3, 9), LeastRecentlyUsed)
