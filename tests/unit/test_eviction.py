"""The contract that every eviction policy keeps, and what each one promises on top."""

import numpy as np
import pytest

from vllm_moecxl.control.eviction import POLICIES

SLOT_COUNT = 7


@pytest.fixture(params=sorted(POLICIES))
def name(request: pytest.FixtureRequest) -> str:
    return request.param


class Slots:
    """A layer's slots as a policy sees them: told of each access, and given the stamps of the last ones."""

    def __init__(self, name: str) -> None:
        self.policy = POLICIES[name](SLOT_COUNT)
        self.epoch = 0
        self.last_read = np.zeros(SLOT_COUNT, dtype=np.int64)

    def read(self, *slot_ids: int) -> None:
        self.epoch += 1
        self.last_read[list(slot_ids)] = self.epoch
        self.policy.record(np.array(slot_ids, dtype=np.int32))

    def fill(self, slot_id: int, expert_id: int) -> None:
        self.last_read[slot_id] = self.epoch
        self.policy.admit(slot_id, expert_id)

    def victim(self, *slot_ids: int) -> int:
        return self.policy.victim(np.isin(np.arange(SLOT_COUNT), slot_ids), self.last_read)


def play(slots: Slots, seed: int, step_count: int = 200) -> list[int]:
    """Victims of a random history; each is a candidate."""
    rng = np.random.default_rng(seed)
    victims = []
    for expert_id in range(step_count):
        slots.read(*rng.integers(SLOT_COUNT, size=rng.integers(1, 2 * SLOT_COUNT)).tolist())
        candidates = rng.permutation(SLOT_COUNT)[: rng.integers(1, SLOT_COUNT + 1)].tolist()
        victims.append(slots.victim(*candidates))
        assert victims[-1] in candidates
        slots.fill(victims[-1], expert_id)
    return victims


def test_a_victim_is_a_candidate_and_the_same_history_gives_the_same_victims(name: str) -> None:
    for seed in range(5):
        assert play(Slots(name), seed) == play(Slots(name), seed)


def test_a_policy_that_has_seen_nothing_names_a_victim(name: str) -> None:
    assert Slots(name).victim(3, 5) in (3, 5)


def test_the_only_candidate_is_the_victim(name: str) -> None:
    slots = Slots(name)
    play(slots, seed=1)
    assert [slots.victim(slot_id) for slot_id in range(SLOT_COUNT)] == list(range(SLOT_COUNT))


def test_naming_a_victim_changes_nothing(name: str) -> None:
    slots = Slots(name)
    play(slots, seed=2)
    assert len({slots.victim(0, 2, 4, 6) for _ in range(5)}) == 1


def test_candidates_and_stamps_are_left_alone(name: str) -> None:
    slots = Slots(name)
    play(slots, seed=3)
    candidates, last_read = np.arange(SLOT_COUNT) < 3, slots.last_read.copy()
    slots.policy.victim(candidates, slots.last_read)
    assert candidates.tolist() == [True] * 3 + [False] * 4 and np.array_equal(last_read, slots.last_read)


def test_without_a_candidate_there_is_no_victim(name: str) -> None:
    with pytest.raises(AssertionError, match="at least one candidate"):
        Slots(name).victim()


def test_lru_evicts_in_the_order_of_last_reads() -> None:
    slots = Slots("lru")
    for slot_id in (4, 1, 6, 0, 5, 2, 3, 1):
        slots.read(slot_id)
    order: list[int] = []
    while len(order) < SLOT_COUNT:
        order.append(slots.victim(*(set(range(SLOT_COUNT)) - set(order))))
    assert order == [4, 6, 0, 5, 2, 3, 1]


def test_lru_takes_the_lower_slot_of_those_read_together() -> None:
    slots = Slots("lru")
    slots.read(6, 2, 4, 2)
    assert slots.victim(4, 2, 6) == 2
