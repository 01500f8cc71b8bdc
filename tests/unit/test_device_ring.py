"""What device-driven layers have left behind is read once, in order, and whole."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from moecxl_kernels.tables import (
    FLAG_UNKNOWN_IDS,
    HEADER_WORDS,
    NO_EXPERT,
    VISIT_MASK,
    Mailbox,
    make_mailbox,
    pack_word,
    row_of,
)

from tests.support.homes import store
from vllm_moecxl.control.layer_order import LayerOrder
from vllm_moecxl.errors import IntegrityError
from vllm_moecxl.runtime.counters import Counters
from vllm_moecxl.runtime.device_driven.layer import EarlyGate
from vllm_moecxl.runtime.device_driven.ring import DeviceRing
from vllm_moecxl.runtime.ring import Begun, RoutingRing, Sighting
from vllm_moecxl.types import Cause, Lookup

EXPERT_COUNT, TOPK, DEPTH, ROUTE_COUNT_MAX = 4, 2, 4, 6


class FakeLayer:
    """What `DeviceRing` reads of a layer, and the device that writes it."""

    def __init__(self) -> None:
        self.home = store({"weight": torch.zeros(EXPERT_COUNT, 10)})
        self.topk = TOPK
        self.mailbox: Mailbox = make_mailbox(4, 0, DEPTH, ROUTE_COUNT_MAX)
        self.early_gates: list[EarlyGate] = []
        self.visit = self.hits = self.misses = 0

    def visited(self, step: int, ids: list[int], *, hits: int = 0, misses: int = 0, flags: int = 0) -> None:
        self.visit += 1
        self.hits += hits
        self.misses += misses
        payloads = [self.hits, self.misses, flags, len(ids), step, *ids]
        assert len(payloads) == HEADER_WORDS + len(ids)
        row = self.mailbox.records[row_of(self.visit, DEPTH)]
        row[: len(payloads)] = torch.tensor([pack_word(self.visit, payload) for payload in payloads])

    def scored(self, visit: int, scores: torch.Tensor) -> None:
        """Write what the next gates say, [distances, tokens, experts]."""
        for gate, of_gate in zip(self.early_gates, scores, strict=True):
            words = (visit & VISIT_MASK) << 32 | of_gate.numpy().view(np.uint32).astype(np.int64)
            gate.words[row_of(visit, len(gate.words)), : words.size] = torch.from_numpy(words).ravel()


class Reader:
    def __init__(self, layer_count: int = 2) -> None:
        self.now_s = 0.0
        self.layers = [FakeLayer() for _ in range(layer_count)]
        self.counters = Counters(["dram"])
        self.order = LayerOrder(layer_count)
        self.ring = RoutingRing(keeps_inputs=True, keeps_weights=False)
        self.device_ring = DeviceRing(self.layers, self.order, self.counters, self.ring, clock=lambda: self.now_s)  # type: ignore[arg-type]

    def taken(self) -> list[tuple[int, list[list[int]]] | Begun]:
        self.device_ring.collect()
        found: list[tuple[int, list[list[int]]] | Begun] = []
        while (entry := self.ring.take()) is not None:
            assert isinstance(entry, Sighting | Begun)
            found.append(entry if isinstance(entry, Begun) else (entry.layer_id, entry.expert_ids.tolist()))
        return found

    def count(self, outcome: Lookup) -> int:
        return int(self.counters.values[self.counters.lookup[outcome]])


def early_gate(depth: int, token_count_max: int) -> EarlyGate:
    words = torch.zeros(depth, token_count_max * EXPERT_COUNT, dtype=torch.int64)
    return EarlyGate(torch.zeros(1, EXPERT_COUNT, 5), None, None, words, token_count_max)


def begun(time_s: float) -> Begun:
    return Begun(None, None, time_s)


def test_each_step_comes_with_what_is_in_it_and_its_layers_in_order() -> None:
    reader = Reader()
    reader.device_ring.begin(7, begun(1.0))
    reader.device_ring.begin(8, begun(2.0))
    for step in (7, 8):
        for layer in reader.layers:
            layer.visited(step, [step - 7, 3])
    assert reader.taken() == [begun(1.0), (0, [[0, 3]]), (1, [[0, 3]]), begun(2.0), (0, [[1, 3]]), (1, [[1, 3]])]
    assert reader.taken() == []


def test_deadlines_go_by_where_the_device_is() -> None:
    reader = Reader(3)
    for layer in reader.layers[:2]:
        layer.visited(1, [0, 3])
    reader.taken()
    assert [reader.order.next_position(layer_id) for layer_id in range(3)] == [3.0, 4.0, 2.0]


def test_a_step_that_nobody_announced_is_of_unknown_requests() -> None:
    reader = Reader()
    reader.device_ring.begin(6, begun(1.0))
    reader.now_s = 5.0
    reader.layers[0].visited(7, [0, 3])
    assert reader.taken() == [begun(5.0), (0, [[0, 3]])]


def test_totals_are_counted_once_and_by_what_they_grew() -> None:
    reader = Reader()
    reader.layers[0].visited(1, [0, 1], hits=1, misses=1)
    reader.taken()
    reader.layers[1].visited(1, [0, 1], hits=2)
    reader.layers[0].visited(2, [0, 1], misses=2)
    reader.taken()
    assert (reader.count(Lookup.HIT), reader.count(Lookup.MISS)) == (3, 3)
    assert reader.counters.values[reader.counters.fetch_bytes["dram", Cause.DEMAND]] == 3 * 40


def test_totals_that_wrap_around_go_on() -> None:
    reader = Reader(1)
    reader.layers[0].hits = 0xFFFF_FFFE
    reader.layers[0].visited(1, [0, 1])
    reader.device_ring.skip()
    reader.layers[0].visited(2, [0, 1], hits=3)
    reader.taken()
    assert reader.count(Lookup.HIT) == 3


def test_what_was_there_before_the_first_request_is_not_counted() -> None:
    reader = Reader()
    for layer in reader.layers:
        for _ in range(DEPTH + 2):
            layer.visited(0, [0, 1], hits=2)
    reader.device_ring.skip()
    assert reader.taken() == [] and not reader.count(Lookup.HIT)


def test_a_reader_that_the_ring_has_overtaken_keeps_the_totals() -> None:
    reader = Reader(1)
    for step in range(1, DEPTH + 4):
        reader.layers[0].visited(step, [0, 1], misses=2)
    reader.taken()
    assert reader.count(Lookup.MISS) == 2 * (DEPTH + 3)


def test_a_record_that_is_half_written_waits() -> None:
    reader = Reader(1)
    reader.layers[0].visited(1, [0, 1])
    word = reader.layers[0].mailbox.records[1, HEADER_WORDS].clone()
    reader.layers[0].mailbox.records[1, HEADER_WORDS] = 0
    assert reader.taken() == []
    reader.layers[0].mailbox.records[1, HEADER_WORDS] = word
    assert len(reader.taken()) == 2


def test_a_layer_that_a_forward_never_came_to_is_passed_over_after_a_while() -> None:
    reader = Reader(3)
    reader.layers[0].visited(1, [0, 1])
    reader.layers[0].visited(2, [2, 3])
    assert len(reader.taken()) == 2, "it may still come"
    reader.now_s = 1.0
    assert [entry for entry in reader.taken() if not isinstance(entry, Begun)] == [(0, [[2, 3]])]


def test_rows_of_padding_are_left_out() -> None:
    reader = Reader(1)
    reader.layers[0].visited(1, [2, 3, NO_EXPERT, NO_EXPERT])
    assert reader.taken()[1] == (0, [[2, 3]])


def test_of_a_forward_in_groups_the_first_is_shown() -> None:
    reader = Reader(1)
    reader.layers[0].visited(1, [2, 3])
    reader.layers[0].visited(1, [0, 1])
    assert [entry for entry in reader.taken() if not isinstance(entry, Begun)] == [(0, [[2, 3]])]


def test_nothing_is_shown_that_nobody_wants() -> None:
    reader = Reader(1)
    reader.ring.is_wanted = False
    reader.layers[0].visited(1, [2, 3], hits=2)
    assert [type(entry) for entry in reader.taken()] == [Begun]
    assert reader.count(Lookup.HIT) == 2


def test_an_id_that_no_layer_has_is_raised_where_the_forward_is() -> None:
    reader = Reader(1)
    reader.layers[0].visited(1, [NO_EXPERT, 3], flags=FLAG_UNKNOWN_IDS)
    reader.device_ring.raise_failure()
    reader.taken()
    with pytest.raises(IntegrityError, match="chose an expert that layer does not have, it has 4"):
        reader.device_ring.raise_failure()


def test_a_visit_is_shown_with_what_the_next_gates_say_and_waits_for_it() -> None:
    reader = Reader(1)
    layer, scores = reader.layers[0], torch.randn(2, 1, EXPERT_COUNT)
    layer.early_gates = [early_gate(DEPTH, 3), early_gate(DEPTH, 3)]
    layer.visited(1, [2, 3])
    reader.device_ring.collect()
    assert reader.ring.take() is None, "the scores are written after the record"
    layer.scored(1, scores)
    reader.device_ring.collect()
    entries = [reader.ring.take(), reader.ring.take()]
    seen = entries[1]
    assert isinstance(seen, Sighting) and seen.ahead is not None
    assert np.array_equal(seen.ahead, scores.numpy())


def test_scores_that_a_later_visit_has_overwritten_are_done_without() -> None:
    reader = Reader(1)
    layer = reader.layers[0]
    layer.early_gates = [early_gate(1, 1), early_gate(1, 1)]
    layer.visited(1, [2, 3])
    layer.visited(2, [2, 3])
    layer.scored(2, torch.randn(2, 1, EXPERT_COUNT))
    reader.device_ring.collect()
    entries = []
    while (entry := reader.ring.take()) is not None:
        entries.append(entry)
    assert [entry.ahead is None for entry in entries if isinstance(entry, Sighting)] == [True, False]
