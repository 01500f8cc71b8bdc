"""The routing ring: what a forward leaves in it, what it does not wait for, and what is lost as a whole."""

from __future__ import annotations

import itertools
import threading
import time

import numpy as np
import pytest
import torch

from vllm_moecxl.control.prediction.base import Step
from vllm_moecxl.runtime import ring as ring_module
from vllm_moecxl.runtime.lookahead import Gate, GateLookahead
from vllm_moecxl.runtime.ring import Begun, Ended, RoutingRing, Sighting

HIDDEN_SIZE, EXPERT_COUNT, TOPK = 5, 4, 2
PATIENCE_S = 20.0


def make(
    *, keeps_inputs: bool = True, keeps_weights: bool = False, lookahead: GateLookahead | None = None
) -> RoutingRing:
    ticks = itertools.count()
    return RoutingRing(
        keeps_inputs=keeps_inputs, keeps_weights=keeps_weights, lookahead=lookahead, clock=lambda: float(next(ticks))
    )


def begun(token_id: int = 0, time_s: float = 0.0) -> Begun:
    step = Step(("r",), np.zeros(1, np.int64), np.array([token_id]), np.array([False]))
    return Begun(step, None, time_s)


def see(ring: RoutingRing, layer_id: int, token_count: int = 1, x: torch.Tensor | None = None) -> np.ndarray:
    routes = np.arange(token_count * TOPK, dtype=np.uint32).reshape(token_count, TOPK) % EXPERT_COUNT
    x = torch.ones(token_count, HIDDEN_SIZE, dtype=torch.bfloat16) if x is None else x
    ring.see(layer_id, routes, torch.full((token_count, TOPK), 0.5), x)
    return routes


def entries(ring: RoutingRing) -> list[Begun | Sighting | Ended]:
    return list(iter(ring.take, None))


def kinds(ring: RoutingRing) -> list[object]:
    return [one.layer_id if isinstance(one, Sighting) else type(one).__name__ for one in entries(ring)]


def test_a_forward_begins_where_the_order_of_layers_wraps() -> None:
    check_wrapping()


def check_wrapping() -> None:
    ring = make()
    for layer_id in (0, 1, 2, 0, 2, 2, 1):  # a model of one MoE layer has every forward in the same one
        see(ring, layer_id)
    assert kinds(ring) == ["Begun", 0, 1, 2, "Begun", 0, 2, "Begun", 2, "Begun", 1]


def test_a_forward_that_was_announced_does_not_begin_twice_also_if_the_one_before_broke_off() -> None:
    ring = make()
    ring.describe = lambda: pytest.fail("nobody has to be asked")
    for layer_ids in ((0, 1, 2), (0,), (0, 1, 2)):
        ring.begin(begun())
        for layer_id in layer_ids:
            see(ring, layer_id)
    assert kinds(ring) == ["Begun", 0, 1, 2, "Begun", 0, "Begun", 0, 1, 2]


def test_who_knows_the_engine_is_asked_once_a_forward_and_may_know_nothing() -> None:
    ring = make()
    known = begun(7)
    answers = iter([known, None])
    ring.describe = lambda: next(answers)
    for layer_id in (0, 1, 0, 1):
        see(ring, layer_id)
    first, _, _, second, _, _ = entries(ring)
    assert first is known
    assert isinstance(second, Begun) and second.step is None and second.positions is None


def test_what_is_in_it_is_a_copy() -> None:
    check_copies()


def check_copies() -> None:
    ring = make(keeps_weights=True)
    x = torch.rand(1, HIDDEN_SIZE)
    weights = torch.rand(1, TOPK)
    routes = np.array([[1, 3]], np.uint32)
    before = x.clone(), weights.clone(), routes.copy()
    ring.see(0, routes, weights, x)
    x.fill_(0), weights.fill_(0), routes.fill(0)
    _, seen = entries(ring)
    assert isinstance(seen, Sighting) and seen.hidden is not None and seen.weights is not None
    assert torch.equal(seen.hidden, before[0]) and seen.ahead is None
    assert np.array_equal(seen.weights, before[1].numpy()) and np.array_equal(seen.expert_ids, before[2])


@pytest.mark.parametrize(("token_count", "is_kept"), [(1, True), (32, True), (33, False), (500, False)])
def test_inputs_of_wide_forwards_are_not_copied(token_count: int, *, is_kept: bool) -> None:
    ring = make()
    see(ring, 0, token_count)
    _, seen = entries(ring)
    assert isinstance(seen, Sighting) and len(seen.expert_ids) == token_count
    assert (seen.hidden is not None) is is_kept and seen.weights is None


def test_nobody_who_predicts_no_inputs() -> None:
    ring = make(keeps_inputs=False, keeps_weights=True)
    see(ring, 0)
    _, seen = entries(ring)
    assert isinstance(seen, Sighting) and seen.hidden is None and seen.weights is not None


def test_on_a_device_the_gates_are_applied_there_and_the_input_stays() -> None:
    weight = torch.rand(EXPERT_COUNT, HIDDEN_SIZE)
    ring = make(lookahead=GateLookahead([None, Gate(weight, None, None)], 1))

    class OnDevice(torch.Tensor):
        """Says that it is not in host memory, as a device's tensors do."""

        is_cpu = False

    x = torch.rand(1, HIDDEN_SIZE)
    see(ring, 0, x=x.as_subclass(OnDevice))
    see(ring, 1, x=x.as_subclass(OnDevice))
    _, first, last = entries(ring)
    assert isinstance(first, Sighting) and isinstance(last, Sighting)
    assert first.hidden is None is last.hidden and last.ahead is None and first.ahead is not None
    np.testing.assert_allclose(first.ahead[0], (x @ weight.T).numpy(), rtol=1e-5)


def test_while_nobody_wants_layers_only_beginnings_and_ends_are_put_in() -> None:
    ring = make()
    ring.is_wanted = False
    see(ring, 0)
    see(ring, 1)
    see(ring, 0)
    ring.end(["r"])
    ring.is_wanted = True
    see(ring, 1)
    assert kinds(ring) == ["Begun", "Begun", "Ended", 1]


def test_what_does_not_fit_is_lost_up_to_the_next_step_and_no_end_of_a_request_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    check_losing(monkeypatch)


def check_losing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The reader stalls for two steps and comes back in the middle of the second: its last layers would pass for the
    first one's.
    """
    monkeypatch.setattr(ring_module, "_ENTRY_COUNT_MAX", 3)
    ring = make()
    for layer_id in (0, 1, 2):
        see(ring, layer_id)
    ring.end(["gone"])
    see(ring, 0)
    taken = [ring.take() for _ in range(3)]
    assert [type(one).__name__ for one in taken] == ["Begun", "Sighting", "Sighting"]
    see(ring, 1)
    see(ring, 2)
    see(ring, 0)
    see(ring, 1)
    assert kinds(ring) == ["Ended", "Begun", 0], "and what fits again is in it again"
    see(ring, 2)
    assert kinds(ring) == [], "layer 1 was lost"
    see(ring, 0)
    assert kinds(ring) == ["Begun", 0]


def test_a_reader_that_never_comes_costs_a_bounded_number_of_entries() -> None:
    ring = make()
    for _ in range(2):
        for layer_id in range(5000):
            see(ring, layer_id)
    assert len(entries(ring)) == 4096


def in_thread(*functions: object) -> list[threading.Thread]:
    threads = [threading.Thread(target=function) for function in functions]  # type: ignore[arg-type]
    for thread in threads:
        thread.start()
    return threads


def join(threads: list[threading.Thread]) -> None:
    for thread in threads:
        thread.join(PATIENCE_S)
        assert not thread.is_alive()


@pytest.mark.parametrize("what", ["see", "end", "begin", "wake"])
def test_a_reader_that_waits_is_woken_by_whatever_comes(what: str) -> None:
    ring = make()
    waiting = in_thread(lambda: ring.wait(2 * PATIENCE_S))
    while not ring._is_awaited:
        time.sleep(0)
    {"see": lambda: see(ring, 0), "end": lambda: ring.end(["r"]), "begin": lambda: ring.begin(begun())}.get(
        what, ring.wake
    )()
    join(waiting)


def test_a_reader_does_not_wait_where_there_is_something_and_not_for_ever_where_there_is_not() -> None:
    ring = make()
    ring.wait(0.001)
    ring.end(["r"])
    waiting = in_thread(lambda: ring.wait(2 * PATIENCE_S))
    join(waiting)
    assert kinds(ring) == ["Ended"]


def test_no_entry_is_missed_or_out_of_order_while_one_thread_waits_and_another_reads() -> None:
    ring = make()
    count = 3000
    read: list[str] = []
    lock = threading.Lock()
    is_over = threading.Event()

    def drain() -> None:
        with lock:
            while (entry := ring.take()) is not None:
                assert isinstance(entry, Ended)
                read.append(entry.request_ids[0])

    def reader() -> None:
        while len(read) < count:
            ring.wait(PATIENCE_S)
            drain()

    def other_reader() -> None:
        while not is_over.is_set():
            drain()

    threads = in_thread(reader)
    others = in_thread(other_reader)
    for number in range(count):
        ring.end([str(number)])
        if number % 64 == 0:
            time.sleep(0)
    is_over.set()
    ring.wake()
    join([*others, *threads])
    assert read == [str(number) for number in range(count)]
