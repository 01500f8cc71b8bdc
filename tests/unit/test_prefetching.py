"""From what layers have shown to fetches: what is asked for, when, for whom, and when nothing is."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from vllm_moecxl.control.eviction import LeastRecentlyUsed
from vllm_moecxl.control.layer_order import LayerOrder
from vllm_moecxl.control.prediction import DEFAULT_PREDICTORS, PREDICTORS
from vllm_moecxl.control.prediction.base import Observation, Step, Target
from vllm_moecxl.control.prediction.forecast import Forecast
from vllm_moecxl.control.prefetch import LayerView, PrefetchPlanner, Timing
from vllm_moecxl.control.prefetching import Prefetching
from vllm_moecxl.control.residency import Residency
from vllm_moecxl.control.trial import WARMUP_STEP_COUNT
from vllm_moecxl.types import SlotState

LAYER_COUNT, EXPERT_COUNT, TOPK = 4, 16, 2
LAYER_S, HEAD_S, TAIL_S, FETCH_S = 4e-3, 2e-3, 1e-3, 1e-3

Mask = npt.NDArray[np.bool_]


class ToySlots:
    """The slots of one layer; what is asked for is there at once."""

    def __init__(self, slot_count: int) -> None:
        self.residency = Residency(EXPERT_COUNT, slot_count, LeastRecentlyUsed(slot_count))
        self.calls: list[tuple[list[int], float, Collection[str]]] = []
        self.dropped_but: list[list[int]] = []
        self.miss_count = 0

    @property
    def slot_count(self) -> int:
        return self.residency.slot_count

    def view(self) -> LayerView:
        free_count = self.residency.state_counts()[SlotState.FREE]
        nothing = np.zeros(EXPERT_COUNT, np.bool_)
        return LayerView(self.residency.resident_mask(), nothing, free_count, self.residency.slot_count)

    def prefetch(
        self, expert_ids: Collection[int], deadline: float, wanters: Collection[str] = (), keep: Mask | None = None
    ) -> int:
        assert keep is not None
        self.calls.append((list(expert_ids), deadline, wanters))
        for expert_id in expert_ids:
            slot_id = self.residency.begin_fill(expert_id, keep, is_urgent=False)
            assert slot_id is not None, "more was asked for than may be displaced"
            self.residency.complete_fill(slot_id)
        return len(expert_ids)

    def drop_prefetches(self, needed: Collection[int]) -> None:
        self.dropped_but.append(sorted(needed))

    def visit(self, expert_ids: Sequence[int]) -> None:
        """A forward needs these."""
        needed = np.isin(np.arange(EXPERT_COUNT), expert_ids)
        for expert_id in np.flatnonzero(needed & ~self.residency.resident_mask()).tolist():
            self.miss_count += 1
            slot_id = self.residency.begin_fill(expert_id, needed)
            assert slot_id is not None
            self.residency.complete_fill(slot_id)


class NotingPlanner(PrefetchPlanner):
    """Notes what it is asked."""

    def __init__(self, layer_count: int) -> None:
        super().__init__(layer_count)
        self.asked: list[tuple[int, int, Timing]] = []

    def plan(self, layer_id: int, distance: int, scores: Any, view: LayerView, timing: Timing) -> Any:
        self.asked.append((layer_id, distance, timing))
        return super().plan(layer_id, distance, scores, view, timing)


class Rig:
    """An engine of four layers whose experts follow from the token."""

    def __init__(self, *, slot_count: int = 6, without_slots: Collection[int] = ()) -> None:
        self.slots = [None if i in without_slots else ToySlots(slot_count) for i in range(LAYER_COUNT)]
        predictors = {name: PREDICTORS[name](LAYER_COUNT, EXPERT_COUNT, TOPK) for name in DEFAULT_PREDICTORS}
        self.planner = NotingPlanner(LAYER_COUNT)
        self.order = LayerOrder(LAYER_COUNT)
        self.prefetching = Prefetching(
            Forecast(LAYER_COUNT, EXPERT_COUNT, TOPK, predictors),
            self.planner,
            self.slots,
            self.order,
            lambda layer_id: layer_id * 1e-6,
            [FETCH_S] * LAYER_COUNT,
        )
        self.now_s = 100.0
        rng = np.random.default_rng(3)
        self._experts = np.argsort(rng.random((LAYER_COUNT, 10, EXPERT_COUNT)), axis=2)[:, :, :TOPK]

    @property
    def calls(self) -> list[tuple[list[int], float, Collection[str]]]:
        return [call for slots in self.slots if slots is not None for call in slots.calls]

    @property
    def miss_count(self) -> int:
        return sum(slots.miss_count for slots in self.slots if slots is not None)

    def run(self, step: Step, *, is_told: bool = True) -> list[Sequence[Target]]:
        """A step; the targets that it gave."""
        prefetching = self.prefetching
        found = [prefetching.begin(step if is_told else None, self.now_s)]
        self._fetch(found[-1])
        self.now_s += HEAD_S
        for layer_id, slots in enumerate(self.slots):
            self.order.arrive(layer_id)
            expert_ids = self._experts[layer_id, step.token_ids % 10]
            if slots is not None:
                slots.visit(np.unique(expert_ids).tolist())
            found.append(prefetching.observe(Observation(layer_id, expert_ids), self.now_s))
            self._fetch(found[-1])
            self.now_s += LAYER_S if layer_id < LAYER_COUNT - 1 else TAIL_S
        return found

    def _fetch(self, targets: Sequence[Target]) -> None:
        if targets:
            self.prefetching.fetch(targets, self.now_s)

    def decode(self, step_count: int, ids: tuple[str, ...] = ("r",)) -> None:
        for number in range(step_count):
            self.run(step_of([number * 3 + i for i in range(len(ids))], ids))


def step_of(token_ids: Sequence[int], ids: tuple[str, ...] = ("r",), prompts: Collection[str] = ()) -> Step:
    """Tokens shared out evenly among requests."""
    rows = np.arange(len(token_ids)) * len(ids) // len(token_ids)
    return Step(ids, rows, np.array(token_ids), np.array([one in prompts for one in ids]))


def test_what_can_be_learned_is_fetched_before_it_is_asked_for() -> None:
    rig = Rig()
    rig.decode(WARMUP_STEP_COUNT)
    before = rig.miss_count
    rig.decode(16)  # the first turn of a trial: with it
    assert rig.prefetching.is_on and rig.miss_count - before < 0.2 * 16 * LAYER_COUNT * TOPK
    assert rig.calls and all(len(expert_ids) <= 6 for expert_ids, _, _ in rig.calls)


def test_a_fetch_has_the_deadline_of_the_next_forward_of_its_layer_and_the_requests_that_want_it() -> None:
    rig = Rig()
    rig.decode(WARMUP_STEP_COUNT)
    for layer_id, slots in enumerate(rig.slots):
        assert slots is not None and slots.calls
        assert all(deadline % LAYER_COUNT == layer_id for _, deadline, _ in slots.calls)
        assert {tuple(wanters) for _, _, wanters in slots.calls} == {("r",)}
        deadlines = [deadline for _, deadline, _ in slots.calls]
        assert deadlines == sorted(deadlines) and deadlines[-1] <= WARMUP_STEP_COUNT * LAYER_COUNT + layer_id


@pytest.mark.parametrize(("request_count", "are_named"), [(8, True), (9, False)])
def test_fetches_of_large_batches_are_nobodys_in_particular(request_count: int, *, are_named: bool) -> None:
    rig = Rig(slot_count=8)
    rig.prefetching.trial.pin()
    ids = tuple(f"r{i}" for i in range(request_count))
    for number in range(150):
        rig.run(step_of([number] * request_count, ids))
    assert rig.calls and {tuple(wanters) for _, _, wanters in rig.calls} == {ids if are_named else ()}


def test_what_does_not_fit_the_slots_anyway_is_not_brought_into_them() -> None:
    rig = Rig(slot_count=TOPK)
    rig.decode(WARMUP_STEP_COUNT, ids=("a", "b", "c", "d"))
    assert not rig.calls
    rig.decode(WARMUP_STEP_COUNT, ids=("a",))
    assert rig.calls, "one token always fits"


def test_layers_without_slots_get_nothing() -> None:
    rig = Rig(without_slots=[0, 2])
    rig.decode(WARMUP_STEP_COUNT)
    assert rig.calls and {layer_id for layer_id, _, _ in rig.planner.asked} == {1, 3}


def test_a_layer_says_what_is_no_longer_worth_bringing() -> None:
    rig = Rig()
    step = step_of([5])
    rig.run(step)
    for layer_id, slots in enumerate(rig.slots):
        assert slots is not None
        assert slots.dropped_but == [sorted(rig._experts[layer_id, 5].tolist())]


def test_nothing_is_predicted_in_steps_that_nobody_knows_and_what_comes_after_is() -> None:
    rig = Rig()
    rig.decode(WARMUP_STEP_COUNT // 2)
    for is_told in (False, True):
        assert all(bool(targets) is is_told for targets in rig.run(step_of([1]), is_told=is_told))


@pytest.mark.parametrize(
    "step",
    [
        step_of(range(40), prompts=["r"]),
        step_of([1], prompts=["r"]),
        step_of([1, 2], ("a", "b"), prompts=["b"]),
        step_of(range(40), tuple(f"r{i}" for i in range(40))),
    ],
    ids=["a prompt", "its last token", "beside a decode", "more than is predicted"],
)
def test_prompts_and_wide_steps_are_learned_from_and_not_predicted(step: Step) -> None:
    rig = Rig(slot_count=EXPERT_COUNT)
    rig.decode(4)
    assert not any(rig.run(step)) and all(rig.run(step_of([1])))


def test_steps_of_several_tokens_a_request_are_predicted_too() -> None:
    rig = Rig()
    rig.prefetching.trial.pin()
    for number in range(150):
        drafts = 1 + number % 3
        assert all(rig.run(step_of([number + i for i in range(2 * drafts)], ("a", "b"))))
    assert rig.calls


def test_a_step_with_missing_layers_and_one_that_broke_off_are_followed_by_others() -> None:
    rig = Rig()
    for number in range(40):
        prefetching = rig.prefetching
        prefetching.begin(step_of([number]), rig.now_s)
        for layer_id in ([0, 1], [2, 3], [3], [0, 3], [])[number % 5]:
            rig.now_s += LAYER_S
            targets = prefetching.observe(Observation(layer_id, rig._experts[layer_id, [number % 10]]), rig.now_s)
            prefetching.fetch(targets, rig.now_s)
    assert all(rig.run(step_of([1])))


def leads(rig: Rig) -> dict[tuple[int, int], float]:
    """By layer and distance, the time that the planner believes there is."""
    return {(layer_id, distance): timing.lead_s for layer_id, distance, timing in rig.planner.asked[-10:]}


#: Seconds from when a layer is told of to the layers after it; the first two from the beginning of a step.
LEADS_S = {
    (0, 1): TAIL_S + HEAD_S,
    (1, 1): LAYER_S,
    (2, 1): LAYER_S,
    (3, 1): LAYER_S,
    (0, 2): LAYER_S + TAIL_S + HEAD_S,
    (2, 2): 2 * LAYER_S,
    (3, 2): 2 * LAYER_S,
    (1, 2): TAIL_S + HEAD_S + LAYER_S,
}


def test_the_time_until_a_layer_is_learned() -> None:
    rig = Rig()
    rig.decode(60)
    assert leads(rig) == pytest.approx(LEADS_S)
    first, second = rig.planner.asked[-10:-8]
    assert (first[:2], second[:2]) == ((0, 1), (1, 2)), "asked as a step begins"
    assert first[2].lead_s == pytest.approx(HEAD_S, rel=0.02)
    assert second[2].lead_s == pytest.approx(HEAD_S + LAYER_S, rel=0.02)
    assert all(timing.fetch_s == FETCH_S for _, _, timing in rig.planner.asked)
    assert all(timing.queue_s == layer_id * 1e-6 for layer_id, _, timing in rig.planner.asked)


@pytest.mark.parametrize("jump_s", [-50.0, -1e-3, 0.6, 3600.0])
def test_a_pause_or_a_clock_that_jumps_teaches_nothing(jump_s: float) -> None:
    rig = Rig()
    rig.decode(60)
    rig.now_s += jump_s
    rig.decode(1)
    assert leads(rig) == pytest.approx(LEADS_S, rel=0.1)
    if jump_s < 0:
        saved_share = rig.prefetching.trial.saved_share
        assert saved_share is None or abs(saved_share) < 0.05


def test_time_that_has_passed_since_the_layer_is_no_lead_any_more() -> None:
    rig = Rig()
    rig.decode(60)
    prefetching = rig.prefetching
    prefetching.begin(step_of([1]), rig.now_s)
    targets = prefetching.observe(Observation(0, rig._experts[0, [1]]), rig.now_s)
    prefetching.fetch(targets, rig.now_s + 3e-3)
    assert leads(rig)[1, 1] == pytest.approx(LAYER_S - 3e-3)


def test_while_it_is_off_nothing_is_asked_and_when_it_is_on_again_all_is() -> None:
    rig = Rig()
    rig.decode(WARMUP_STEP_COUNT // 2)
    rig.prefetching.trial.is_on = False
    before = len(rig.planner.asked)
    dropped = [len(slots.dropped_but) for slots in rig.slots if slots is not None]
    assert not any(rig.prefetching.observe(Observation(0, rig._experts[0, [1]]), rig.now_s) for _ in range(3))
    assert not rig.prefetching.begin(step_of([1]), rig.now_s)
    assert len(rig.planner.asked) == before
    assert [len(slots.dropped_but) for slots in rig.slots if slots is not None] == dropped
    rig.prefetching.trial.is_on = True
    assert all(rig.run(step_of([2])))


def test_routing_that_nothing_follows_from_is_not_fetched_for() -> None:
    rig = Rig()
    rng = np.random.default_rng(0)
    for number in range(300):
        rig._experts = np.argsort(rng.random((LAYER_COUNT, 10, EXPERT_COUNT)), axis=2)[:, :, :TOPK]
        rig.run(step_of([number]))
    assert sum(len(expert_ids) for expert_ids, _, _ in rig.calls) < 0.02 * 300 * LAYER_COUNT * TOPK
