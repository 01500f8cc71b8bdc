"""`ensure_experts` does what its reference does, bit for bit, and what both do keeps the table sound."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from moecxl_kernels.ensure import blocks_of, ensure_experts, options_of
from moecxl_kernels.tables import (
    ADOPTED,
    EXPERTS_MAX,
    HEADER_WORDS,
    HITS,
    MISSES,
    NO_EXPERT,
    NONE,
    REFUSED,
    SEQUENCE_MAX,
    SLOTS_MAX,
    TOO_WIDE,
    UNKNOWN_IDS,
    VISIT_MASK,
    VISITS,
    Answer,
    Mailbox,
    Offer,
    SlotTable,
    make_mailbox,
    make_table,
    next_sequence,
    pack_answer,
    pack_offer,
    pack_word,
    read_record,
    row_of,
    unpack_answer,
    unpack_offer,
)

from tests.kernels.reference_ensure import ensure
from tests.support.traces import shared_traces
from vllm_moecxl.control.eviction import POLICIES
from vllm_moecxl.control.replay import Visit, replay_layer, replayable, visits_of
from vllm_moecxl.control.trace import RoutingTrace

#: Ids that no layer has; as int32, the last two would be experts 1 and 0.
UNKNOWN = (-1, -(2**31), 2**31 - 1, 2**31 + 1, 2**32 + 1, -(2**33))

#: Of hit rates of the reference and of `class-lru`: float32 may round a count into another class.
MARGIN = 5e-4


@dataclass
class Lane:
    """What the host knows of one lane: the slot that is its own, and whether it waits for an answer."""

    slot_id: int
    sequence: int = 0
    expert_id: int | None = None


class Layer:
    """One table served by the kernel, its twin served by the reference, and the host's side of the lanes."""

    def __init__(
        self, expert_count: int, slot_count: int, lane_count: int = 0, depth: int = 2, route_count_max: int = 16
    ) -> None:
        self.table, self._twin = (make_table(expert_count, slot_count, lane_count, "cpu") for _ in range(2))
        self.mailbox, self._twin_mailbox = (
            make_mailbox(slot_count, lane_count, depth, route_count_max) for _ in range(2)
        )
        self.lanes = [Lane(slot_count - lane_count + lane) for lane in range(lane_count)]
        self._copies = torch.full((slot_count, 2), NONE, dtype=torch.int32)
        self._copy_count = torch.full((1,), NONE, dtype=torch.int32)
        self._need_counts: list[int] = []

    def set(self, field: str, index: int, value: int) -> None:
        """Bring both tables to where only a long run would."""
        for table in (self.table, self._twin):
            getattr(table, field)[index] = value

    def total(self, index: int) -> int:
        return int(self.table.totals[index]) % 2**32

    def resident(self) -> set[int]:
        return {expert for expert, slot in enumerate(self.table.slot_of.tolist()) if slot != NONE}

    def offer(self, lane_id: int, expert_id: int) -> bool:
        """Offer an expert by a lane, unless it still waits for an answer."""
        lane = self.lanes[lane_id]
        if lane.expert_id is not None:
            return False
        lane.sequence, lane.expert_id = next_sequence(lane.sequence), expert_id
        for mailbox in (self.mailbox, self._twin_mailbox):
            mailbox.offers[lane_id] = pack_offer(Offer(lane.sequence, expert_id, lane.slot_id))
        return True

    def visit(
        self, rows: list[list[int]], dtype: torch.dtype = torch.int32, padding: list[bool] | None = None, k: int = 1
    ) -> list[tuple[int, int]]:
        """Serve a visit by both, compare all that they leave, and check the table; what is to be copied."""
        topk_ids = torch.tensor(rows, dtype=dtype).reshape(len(rows), -1 if rows else k)
        is_padding = None if padding is None else torch.tensor(padding, dtype=torch.bool)
        step = 3 * self.total(VISITS) + 5 & 0x7FFF_FFFF
        self.set("step", 0, step)
        before = [tensor.clone() for tensor in self.table]
        ensure_experts(topk_ids, is_padding, self.table, self.mailbox, self._copies, self._copy_count)
        copies = [(expert, slot) for expert, slot in self._copies[: int(self._copy_count)].tolist()]
        assert copies == ensure(topk_ids, is_padding, self._twin, self._twin_mailbox)
        fields = SlotTable._fields + Mailbox._fields
        twins = self._twin + self._twin_mailbox
        for field, ours, other in zip(fields, self.table + self.mailbox, twins, strict=True):
            assert torch.equal(ours, other), field
        routes = [
            NO_EXPERT if is_pad or not 0 <= expert < len(self.table.slot_of) else expert
            for row, is_pad in zip(rows, padding or [False] * len(rows), strict=True)
            for expert in row
        ]
        self._check(SlotTable(*before), copies, routes)
        record = read_record(self.mailbox.records, self.total(VISITS))
        assert record is not None and record.step == step
        return copies

    def _check(self, before: SlotTable, copies: list[tuple[int, int]], routes: list[int]) -> None:
        visit = self.total(VISITS)
        needed = set(routes) - {NO_EXPERT}
        slot_of, expert_of = self.table.slot_of.tolist(), self.table.expert_of.tolist()
        lent = set(self.table.is_host.nonzero().flatten().tolist())
        answers = self._hear()

        assert [expert for slot, expert in enumerate(expert_of) if expert != NONE and slot_of[expert] != slot] == []
        assert len(self.resident()) == sum(expert != NONE for expert in expert_of)
        assert {expert_of[slot] for slot in lent} <= {NONE} and lent == {lane.slot_id for lane in self.lanes}
        assert len(lent) == len(self.lanes)
        assert self.mailbox.view.tolist() == expert_of
        adopted = {offer.expert_id for answer, offer in answers if answer.is_adopted}
        for answer, offer in answers:
            was_there = int(before.slot_of[offer.expert_id]) != NONE
            # One lane may bring back what another has just driven out.
            assert answer.is_adopted or was_there or offer.expert_id in adopted
            assert answer.is_adopted == (answer.slot_id != offer.slot_id)

        record = read_record(self.mailbox.records, visit)
        assert record is not None
        is_listed = len(routes) <= self.mailbox.records.shape[1] - HEADER_WORDS
        assert record.expert_ids.tolist() == (routes if is_listed else [])
        assert (record.hits, record.misses) == (self.total(HITS), self.total(MISSES))
        gains = (self.table.totals - before.totals).tolist()
        assert gains[VISITS] == 1 and gains[TOO_WIDE] == record.is_too_wide and gains[7] == 0
        assert (gains[UNKNOWN_IDS] > 0) == record.has_unknown_ids
        assert gains[ADOPTED] == sum(answer.is_adopted for answer, _ in answers)
        assert gains[REFUSED] == len(answers) - gains[ADOPTED]

        if record.is_too_wide:
            assert copies == [] and gains[HITS] == gains[MISSES] == 0
            assert torch.equal(self.table.heat, before.heat) and needed - self.resident()
            room = len(expert_of) - len(lent)
            assert len(needed) > room
            return
        assert needed <= self.resident()
        assert gains[HITS] + gains[MISSES] == len(needed) and gains[MISSES] == len(copies)
        assert copies == [(expert, slot_of[expert]) for expert in sorted(expert for expert, _ in copies)]
        assert all(int(self.table.used_at[expert]) % 2**32 == visit for expert in needed)
        if not needed:
            assert torch.equal(self.table.heat, before.heat)

    def _hear(self) -> list[tuple[Answer, Offer]]:
        """Take the answers that came, as the host does, with the offers that they answer."""
        heard = []
        for lane_id, lane in enumerate(self.lanes):
            answer = unpack_answer(int(self.mailbox.answers[lane_id]))
            if lane.expert_id is not None and answer.sequence == lane.sequence:
                heard.append((answer, unpack_offer(int(self.mailbox.offers[lane_id]))))
                lane.slot_id, lane.expert_id = answer.slot_id, None
        return heard


@st.composite
def layers(draw: st.DrawFn) -> Layer:
    lane_count = draw(st.integers(0, 3))
    return Layer(
        expert_count=draw(st.integers(1, 40)),
        slot_count=draw(st.integers(lane_count + 1, 40)),
        lane_count=lane_count,
        depth=draw(st.integers(1, 4)),
        route_count_max=draw(st.sampled_from([0, 6, 24])),
    )


def draw_visit(data: st.DataObject, layer: Layer) -> None:
    """Some offers, then any visit: of few experts, of all of them, of none, with ids that are none."""
    expert_count = len(layer.table.slot_of)
    experts = st.integers(0, expert_count - 1)
    for lane_id in range(len(layer.lanes)):
        if data.draw(st.booleans()):
            layer.offer(lane_id, data.draw(experts))
    dtype = data.draw(st.sampled_from([torch.int32, torch.int64]))
    unknown = [expert_count, *(x for x in UNKNOWN if torch.iinfo(dtype).min <= x <= torch.iinfo(dtype).max)]
    k = data.draw(st.integers(1, 4))
    ids = data.draw(st.sampled_from([experts, experts, st.one_of(experts, st.sampled_from(unknown))]))
    rows = data.draw(st.lists(st.lists(ids, min_size=k, max_size=k), max_size=6))
    if data.draw(st.integers(0, 9)) == 0:
        rows, k = [[expert] for expert in range(expert_count)], 1
    paddings = st.lists(st.booleans(), min_size=len(rows), max_size=len(rows))
    layer.visit(rows, dtype, data.draw(st.one_of(st.none(), paddings)), k)


@settings(max_examples=60, deadline=None)
@given(layers(), st.integers(1, 12), st.data())
def test_any_visits_and_offers_leave_what_the_reference_leaves(
    layer: Layer, visit_count: int, data: st.DataObject
) -> None:
    for _ in range(visit_count):
        draw_visit(data, layer)


def test_an_offer_of_an_expert_that_is_there_gives_the_slot_back() -> None:
    layer = Layer(expert_count=4, slot_count=3, lane_count=1)
    layer.visit([[2]])
    layer.offer(0, 2)
    assert layer.visit([[2]]) == []
    assert layer.total(REFUSED) == 1 and layer.lanes[0].slot_id == 2


def test_an_adopted_expert_is_a_hit_of_the_same_visit() -> None:
    layer = Layer(expert_count=4, slot_count=3, lane_count=1)
    layer.offer(0, 3)
    assert layer.visit([[0, 3]]) == [(0, 1)]
    assert (layer.total(HITS), layer.total(MISSES), layer.total(ADOPTED)) == (1, 1, 1)
    assert int(layer.table.slot_of[3]) == 2 and layer.lanes[0].slot_id == 0


def test_an_offer_waits_while_every_slot_is_needed() -> None:
    layer = Layer(expert_count=4, slot_count=3, lane_count=1)
    layer.visit([[0, 1]])
    layer.offer(0, 2)
    for _ in range(2):
        layer.visit([[0, 1]])
        assert layer.total(ADOPTED) == 0 and layer.lanes[0].expert_id == 2
    layer.visit([[1]])
    assert layer.resident() == {1, 2} and layer.lanes[0].slot_id == 0


def test_what_was_just_adopted_is_not_lent_for_the_next_offer_but_makes_room_for_a_missing_expert() -> None:
    layer = Layer(expert_count=8, slot_count=4, lane_count=2)
    layer.visit([[0, 1]])
    layer.offer(0, 2)
    layer.offer(1, 3)
    layer.visit([[0]])
    assert layer.resident() == {0, 2} and layer.lanes[1].expert_id == 3
    layer = Layer(expert_count=8, slot_count=3, lane_count=1)
    layer.offer(0, 5)
    assert layer.visit([[0, 1]]) == [(0, 1), (1, 2)]


def test_an_expert_that_one_lane_drives_out_another_lane_brings_back() -> None:
    layer = Layer(expert_count=8, slot_count=5, lane_count=2)
    layer.visit([[0, 1, 2]])
    layer.offer(0, 4)
    layer.offer(1, 0)
    layer.visit([[2]])
    assert layer.total(ADOPTED) == 2 and layer.resident() == {0, 2, 4}


def test_an_empty_visit_answers_offers_and_writes_its_record() -> None:
    layer = Layer(expert_count=4, slot_count=3, lane_count=1)
    layer.visit([[2]])
    layer.offer(0, 1)
    layer.visit([])
    layer.visit([[0, 1]], padding=[True])
    assert (layer.total(VISITS), layer.total(ADOPTED), layer.total(HITS)) == (3, 1, 0)


def test_a_visit_that_is_too_wide_keeps_what_offers_changed() -> None:
    layer = Layer(expert_count=8, slot_count=4, lane_count=1)
    layer.visit([[0, 1]])
    layer.offer(0, 5)
    assert layer.visit([[0, 1, 2, 3]]) == []
    assert layer.total(TOO_WIDE) == 1 and layer.resident() == {0, 1, 5}
    layer = Layer(expert_count=8, slot_count=3, lane_count=1)
    layer.offer(0, 7)
    assert layer.visit([[0, 1, 7]]) == []
    assert layer.total(TOO_WIDE) == 1 and layer.resident() == {7}


def test_the_coldest_class_goes_first_and_in_it_the_least_recent() -> None:
    layer = Layer(expert_count=8, slot_count=3)
    for expert in (0, 0, 0, 1, 2):
        layer.visit([[expert]])
    assert layer.visit([[3]]) == [(3, 1)]
    assert layer.visit([[4]]) == [(4, 2)]
    assert 0 in layer.resident()


def test_unknown_ids_are_flagged_and_routes_that_are_too_many_are_not_listed() -> None:
    layer = Layer(expert_count=4, slot_count=4, route_count_max=2)
    layer.visit([[2**32 + 1, 1]], torch.int64)
    assert layer.total(UNKNOWN_IDS) == 1 and layer.resident() == {1}
    layer.visit([[0, 1, 2]])
    assert layer.resident() == {0, 1, 2}


@pytest.mark.parametrize("route_count", [256, 4096, 4104])
def test_long_visits_are_read_in_blocks(route_count: int) -> None:
    layer = Layer(expert_count=64, slot_count=64, route_count_max=4096)
    rng = np.random.default_rng(route_count)
    ids = rng.integers(-1, 60, size=(route_count // 8, 8))
    layer.visit(ids.tolist(), torch.int64, (rng.random(len(ids)) < 0.2).tolist())
    layer.visit([[63] * 8])


@pytest.mark.parametrize(
    ("expert_count", "slot_count", "lane_count"),
    [(EXPERTS_MAX, SLOTS_MAX, 3), (300, 130, 2), (64, 1024, 1), (1000, 9, 1)],
)
def test_large_tables(expert_count: int, slot_count: int, lane_count: int) -> None:
    layer = Layer(expert_count, slot_count, lane_count, route_count_max=0)
    rng = np.random.default_rng(expert_count)
    for step in range(6):
        for lane_id in range(lane_count):
            layer.offer(lane_id, int(rng.integers(expert_count)))
        layer.visit([rng.choice(expert_count, size=min(slot_count - lane_count, 50) - step, replace=False).tolist()])


@pytest.mark.parametrize("first", [0, VISIT_MASK - 10, 2**32 - 11])
def test_long_runs_wrap_around_and_keep_the_order_of_use(first: int) -> None:
    layer = Layer(expert_count=12, slot_count=7, lane_count=2, depth=3, route_count_max=4)
    signed = (first + 2**31) % 2**32 - 2**31
    for index in (VISITS, HITS, MISSES):
        layer.set("totals", index, signed)
    for expert in range(12):
        layer.set("used_at", expert, signed)
    for lane_id, lane in enumerate(layer.lanes):
        lane.sequence = SEQUENCE_MAX - 3
        layer.set("answered", lane_id, lane.sequence)
        for mailbox in (layer.mailbox, layer._twin_mailbox):
            mailbox.offers[lane_id] = lane.sequence << 48
    rng = np.random.default_rng(first)
    for _ in range(40):
        for lane_id in range(2):
            layer.offer(lane_id, int(rng.integers(12)))
        layer.visit(rng.permuted(np.arange(12))[None, :3].tolist())
    assert layer.total(VISITS) == (first + 40) % 2**32
    assert all(0 < lane.sequence < SEQUENCE_MAX - 3 for lane in layer.lanes)


def test_a_record_is_read_only_while_it_is_whole() -> None:
    layer = Layer(expert_count=4, slot_count=4, depth=2)
    layer.visit([[0, 1]])
    assert read_record(layer.mailbox.records, 2) is None
    layer.visit([[2, 3]])
    layer.visit([[1, 3], [0, 9]])
    assert read_record(layer.mailbox.records, 1) is None
    records = layer.mailbox.records
    record = read_record(records, 3)
    assert record is not None and record.has_unknown_ids and record.expert_ids.tolist() == [1, 3, 0, NO_EXPERT]
    for word in range(HEADER_WORDS + 4):
        torn = records.clone()
        torn[row_of(3, 2), word] = pack_word(1, 0)
        assert read_record(torn, 3) is None


@given(st.integers(1, SEQUENCE_MAX), st.integers(0, EXPERTS_MAX - 1), st.integers(0, SLOTS_MAX - 1), st.booleans())
def test_words_say_what_was_packed(sequence: int, expert_id: int, slot_id: int, is_adopted: bool) -> None:
    offer, answer = Offer(sequence, expert_id, slot_id), Answer(sequence, is_adopted, slot_id)
    assert unpack_offer(pack_offer(offer)) == offer and 0 < pack_offer(offer) < 2**63
    assert unpack_answer(pack_answer(answer)) == answer and 0 < pack_answer(answer) < 2**63
    assert 0 < next_sequence(sequence) <= SEQUENCE_MAX and next_sequence(sequence) != sequence


@pytest.mark.parametrize("count", [1, 64, 65, 256, 257, 1024])
def test_no_two_threads_read_the_same_offer(count: int) -> None:
    """Two that do may see different offers, and change the table differently."""
    assert blocks_of(count, 4, 3)["LANES"] >= 64 * options_of(count, 4)["num_warps"]
    assert blocks_of(4, count, 3)["LANES"] >= 64 * options_of(4, count)["num_warps"]


def hits_of(rows: list[Visit], expert_count: int, slot_count: int) -> int:
    """What the reference makes of decode visits; the tests above hold the kernel to it."""
    table, mailbox = make_table(expert_count, slot_count, 0, "cpu"), make_mailbox(slot_count, 0, 1, 0)
    for visit in rows:
        ensure(torch.from_numpy(visit.expert_ids[None].astype(np.int32)), None, table, mailbox)
    return int(table.totals[HITS])


def check_policy(rows: list[Visit], expert_count: int, slot_count: int) -> None:
    """Hits are those of `class-lru`, which is told the experts in the order in which misses are served."""
    expected = replay_layer(rows, expert_count, slot_count, POLICIES["class-lru"](slot_count, expert_count))
    hit_count = hits_of(rows, expert_count, slot_count)
    assert abs(hit_count - expected.hit_count) <= MARGIN * expected.lookup_count


@pytest.mark.parametrize("slot_count", [8, 16, 24])
def test_hits_are_those_of_the_policy_that_is_simulated(slot_count: int) -> None:
    rng = np.random.default_rng(3)
    popularity = rng.permutation(1.0 / np.arange(1, 33))
    draws = rng.exponential(size=(3000, 32)) / popularity
    rows = [Visit(np.sort(row).astype(np.uint32)) for row in draws.argsort(axis=1)[:, :4]]
    check_policy(rows, 32, slot_count)
    by_policy = {
        name: replay_layer(rows, 32, slot_count, POLICIES[name](slot_count, 32)) for name in ("class-lru", "lru")
    }
    # The margin tells policies apart.
    assert by_policy["class-lru"].hit_rate - by_policy["lru"].hit_rate > 10 * MARGIN


@pytest.mark.parametrize("share", [0.5, 0.75])
@pytest.mark.parametrize(
    "name",
    ["own/mixtral-mini_generated", "public/mixtral8x7b_speculative-moe", "public/deepseek-v2-lite_moe-beyond_sample"],
)
def test_hits_on_real_routing_are_those_of_the_policy_that_is_simulated(name: str, share: float) -> None:
    trace = replayable(RoutingTrace.load(shared_traces() / f"{name}.npz"))
    layer = trace.topk.shape[1] // 2
    rows = [Visit(np.sort(visit.expert_ids)) for visit, _ in zip(visits_of(trace, layer), range(3000), strict=False)]
    check_policy(rows, trace.expert_count, int(share * trace.expert_count))
