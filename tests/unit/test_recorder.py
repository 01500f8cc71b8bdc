"""The recorder: whatever an engine does with its requests, every token comes out once, in its request, in order."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.support.traces import assert_same
from vllm_moecxl.control.prediction.base import Step
from vllm_moecxl.control.recorder import TraceRecorder
from vllm_moecxl.control.trace import RoutingTrace
from vllm_moecxl.errors import ConfigError

LAYERS, EXPERTS, TOPK = 3, 16, 2


def truth(request_count: int = 6, seed: int = 0, expert_count: int = EXPERTS) -> RoutingTrace:
    """What requests really route to; every token its own, so that a mix-up shows."""
    generator = np.random.default_rng(seed)
    prefill = generator.integers(1, 12, request_count)
    lengths = prefill + generator.integers(0, 9, request_count)
    shape = (int(lengths.sum()), LAYERS, TOPK)
    topk = generator.integers(0, expert_count, shape)
    lookahead = generator.integers(0, expert_count, shape)
    lookahead[:, 0] = topk[:, 0]
    return RoutingTrace(
        topk=topk,
        weights=generator.random(shape).astype(np.float16),
        lookahead=lookahead,
        req=np.concatenate([[0], np.cumsum(lengths)]),
        prefill=prefill,
        token_ids=generator.integers(0, 1000, shape[0]),
        layer_ids=np.arange(LAYERS),
        meta={"model": "toy", "num_experts": expert_count},
    )


def recorder(expert_count: int = EXPERTS, bytes_max: int = 1 << 20) -> TraceRecorder:
    return TraceRecorder(LAYERS, expert_count, TOPK, meta={"model": "toy"}, bytes_max=bytes_max)


class Engine:
    """Tells a recorder of steps over the requests of a trace, as an engine would compute them."""

    def __init__(self, trace: RoutingTrace, to: TraceRecorder, knows_positions: bool = True) -> None:
        self.trace, self.to, self.knows_positions = trace, to, knows_positions
        self.lengths = np.diff(trace.req).tolist()
        self.computed = [0] * trace.request_count
        self.preempted: dict[int, int] = {}  # tokens that a request had then, the latest not computed yet

    def step(self, counts: dict[int, int], layer_count: int = LAYERS, has_ahead: bool = True) -> None:
        """Compute so many tokens more of each of these requests; a step cut short is not counted as computed."""
        numbers = list(counts)
        starts = [self.computed[number] for number in numbers]
        tokens = np.concatenate(
            [
                np.arange(start, start + counts[number]) + self.trace.req[number]
                for number, start in zip(numbers, starts, strict=True)
            ]
        )
        step = Step(
            request_ids=tuple(map(str, numbers)),
            rows=np.repeat(np.arange(len(numbers)), list(counts.values())),
            token_ids=self.trace.token_ids[tokens].astype(np.int64),
            is_prompt=np.array([start < self.prompt(number) for number, start in zip(numbers, starts, strict=True)]),
        )
        self.to.begin(step, np.array(starts) if self.knows_positions else None)
        self.layers(tokens, range(layer_count), has_ahead)
        if layer_count == LAYERS:
            for number in numbers:
                self.computed[number] += counts[number]

    def layers(self, tokens: np.ndarray, layer_ids: Sequence[int], has_ahead: bool = True) -> None:
        trace = self.trace
        assert trace.weights is not None and trace.lookahead is not None
        for layer in layer_ids:
            ids, weights = trace.topk[tokens, layer].astype(np.int64), trace.weights[tokens, layer].astype(np.float32)
            is_last = layer + 1 == LAYERS
            ahead = None if is_last or not has_ahead else trace.lookahead[tokens, layer + 1].astype(np.int64)
            self.to.observe(layer, ids, weights, ahead)
            ids[:], weights[:] = -1, -1  # the engine's buffers are its own again

    def prompt(self, number: int) -> int:
        """Tokens that are computed as a prompt: after a preemption, what was generated is a part of it."""
        return max(int(self.trace.prefill[number]), self.preempted.get(number, 0))

    def preempt(self, number: int, cached: int = 0) -> None:
        """Its cache is gone, but for the first tokens; all that it has is computed again, as a prompt."""
        if self.computed[number] > self.trace.prefill[number]:
            known = min(self.computed[number] + 1, self.lengths[number])
            self.preempted[number] = max(self.preempted.get(number, 0), known)
        self.computed[number] = cached

    def left(self, number: int) -> int:
        return int(self.lengths[number]) - self.computed[number]


def run_to_end(engine: Engine, numbers: Sequence[int] | None = None) -> None:
    """Every request: the rest of the prompt in one step, then token by token, all of them side by side."""
    numbers = list(range(engine.trace.request_count)) if numbers is None else list(numbers)
    while open_ones := [number for number in numbers if engine.left(number)]:
        engine.step(
            {
                number: min(max(engine.prompt(number) - engine.computed[number], 1), engine.left(number))
                for number in open_ones
            }
        )


def test_interleaved_requests_come_out_one_after_another() -> None:
    run_to_end(engine := Engine(truth(), recorder()))
    assert_same(engine.to.trace(), engine.trace)


@pytest.mark.parametrize("knows_positions", [True, False])
@pytest.mark.parametrize("seed", range(20))
def test_whatever_the_engine_does_every_token_is_there_once(seed: int, knows_positions: bool) -> None:
    engine = Engine(truth(seed=seed), recorder(), knows_positions)
    generator = np.random.default_rng(seed)
    engine.step(dict.fromkeys(range(6), 1))  # the order of arrival
    while open_ones := [number for number in range(6) if engine.left(number)]:
        for number in open_ones:
            has_decoded = engine.computed[number] > engine.prompt(number)
            if generator.random() < 0.1 and (knows_positions or has_decoded):
                engine.preempt(number, int(generator.integers(engine.computed[number] + 1)) if knows_positions else 0)
        chosen = [number for number in open_ones if generator.random() < 0.6]
        counts = {}
        for number in chosen:
            is_prompt = engine.computed[number] < engine.prompt(number)
            counts[number] = int(generator.integers(1, engine.left(number) + 1)) if is_prompt else 1
            if is_prompt:
                counts[number] = min(counts[number], engine.prompt(number) - engine.computed[number])
        if counts:
            engine.step(counts, LAYERS if generator.random() < 0.8 else int(generator.integers(LAYERS)))
    assert_same(engine.to.trace(), engine.trace)


def test_a_step_cut_short_leaves_nothing_of_any_layer() -> None:
    engine = Engine(truth(2), recorder())
    engine.step({0: 1, 1: 1}, layer_count=LAYERS - 1)
    assert engine.to.trace().token_count == 0 and engine.to.byte_count == 0
    run_to_end(engine)
    assert_same(engine.to.trace(), engine.trace)


def test_a_prompt_that_comes_again_is_not_recorded_again() -> None:
    for knows_positions in (True, False):
        engine = Engine(truth(1), recorder(), knows_positions)
        engine.step({0: engine.prompt(0)})
        engine.step({0: 1})
        engine.preempt(0)
        run_to_end(engine)
        assert_same(engine.to.trace(), engine.trace)


def test_a_prompt_interrupted_in_its_middle_is_recorded_once() -> None:
    engine = Engine(truth(1), recorder())
    engine.step({0: 3})
    engine.preempt(0, cached=1)
    run_to_end(engine)
    assert_same(engine.to.trace(), engine.trace)


def test_rejected_drafts_give_way_to_what_was_generated() -> None:
    engine = Engine(truth(1), recorder())
    drafts = truth(1, seed=4)
    engine.step({0: engine.prompt(0)})
    accepted = engine.computed[0]
    engine.trace = replace(drafts.cut(tokens_per_request=3), req=np.array([0, 3]), prefill=np.array([0]))
    step = Step(("0",), np.zeros(3, np.int64), np.arange(3), np.array([False]))
    engine.to.begin(step, np.array([accepted]))
    engine.layers(np.arange(3), range(LAYERS))
    assert engine.to.trace().token_count == accepted + 3
    engine.trace = truth(1)
    run_to_end(engine)
    assert_same(engine.to.trace(), engine.trace)


def test_what_a_prefix_cache_had_is_missing_and_the_rest_is_there() -> None:
    engine = Engine(truth(1), recorder())
    engine.computed[0] = 2
    run_to_end(engine)
    trace = engine.to.trace()
    assert np.array_equal(trace.topk, engine.trace.topk[2:]) and trace.prefill[0] == engine.trace.prefill[0] - 2


def test_a_name_that_is_used_again_is_another_request() -> None:
    to = recorder()
    for _ in range(2):
        run_to_end(engine := Engine(truth(1), to))
        to.finish("0")
    assert_same(to.trace(), RoutingTrace.merge([engine.trace, engine.trace]))


def test_the_end_of_a_request_that_nobody_knows_is_no_matter() -> None:
    recorder().finish("never seen")


def test_requests_that_have_not_ended_are_saved_and_go_on(tmp_path: Path) -> None:
    engine = Engine(truth(2), recorder())
    engine.step({0: engine.prompt(0), 1: engine.prompt(1)})
    engine.to.save(path := tmp_path / "trace.npz")
    early = RoutingTrace.load(path)
    assert early.prefill.tolist() == np.diff(early.req).tolist() == engine.trace.prefill.tolist()
    run_to_end(engine)
    engine.to.save(path)
    assert_same(RoutingTrace.load(path), engine.trace)


def test_saving_within_a_step_takes_the_steps_before_it(tmp_path: Path) -> None:
    engine = Engine(truth(1), recorder())
    engine.step({0: 2})
    tokens = np.array([2])
    engine.to.begin(
        Step(("0",), np.zeros(1, np.int64), engine.trace.token_ids[tokens], np.array([True])), np.array([2])
    )
    engine.layers(tokens, range(LAYERS - 1))
    assert engine.to.trace().token_count == 2
    engine.layers(tokens, [LAYERS - 1])
    assert engine.to.trace().token_count == 3


def test_a_trace_that_cannot_be_saved_goes_on_being_recorded(tmp_path: Path) -> None:
    run_to_end(engine := Engine(truth(), recorder()))
    with pytest.raises(ConfigError, match="cannot be written"):
        engine.to.save(tmp_path / "absent" / "trace.npz")
    assert_same(engine.to.trace(), engine.trace)


def test_what_one_step_did_not_have_is_in_no_part_of_the_trace() -> None:
    engine = Engine(truth(), recorder())
    run_to_end(engine, [0, 1, 2])
    engine.to.begin(Step(("x",), np.zeros(1, np.int64), np.array([-1]), np.array([False])))
    for layer in range(LAYERS):
        engine.to.observe(layer, np.zeros((1, TOPK), np.int64))
    run_to_end(engine, [3, 4, 5])
    trace = engine.to.trace()
    assert trace.weights is None and trace.lookahead is None and trace.token_count == engine.trace.token_count + 1
    assert np.array_equal(np.delete(trace.topk, trace.req[3], axis=0), engine.trace.topk)


def test_prompts_do_without_lookahead_and_hold_the_routers_own_choice() -> None:
    engine = Engine(truth(1), recorder())
    prompt = engine.prompt(0)
    engine.step({0: prompt}, has_ahead=False)
    assert engine.to.trace().lookahead is None
    run_to_end(engine)
    lookahead, true = engine.to.trace().lookahead, engine.trace.lookahead
    assert lookahead is not None and true is not None
    assert np.array_equal(lookahead[:prompt], engine.trace.topk[:prompt])
    assert np.array_equal(lookahead[prompt:], true[prompt:]) and prompt < len(true)


def test_beyond_its_memory_it_stops_says_so_once_and_keeps_what_it_has(caplog: pytest.LogCaptureFixture) -> None:
    whole = Engine(truth(), recorder())
    run_to_end(whole)
    small = Engine(truth(), recorder(bytes_max=whole.to.byte_count - 100))
    with caplog.at_level(logging.WARNING, "vllm.moecxl"):
        run_to_end(small)
    assert [
        record.getMessage().startswith("MoE offload: the routing trace records no more") for record in caplog.records
    ] == [True]
    assert small.to.is_full and 0 < small.to.byte_count <= whole.to.byte_count - 100
    trace = small.to.trace()
    assert "ended early" in trace.meta["recording"] and trace.token_count < whole.trace.token_count
    for number, tokens in trace.requests():
        start = int(whole.trace.req[number])
        assert np.array_equal(trace.topk[tokens], whole.trace.topk[start : start + tokens.stop - tokens.start])


def test_it_takes_the_memory_that_it_says() -> None:
    engine = Engine(truth(), recorder())
    engine.step(dict.fromkeys(range(6), 1))
    engine.preempt(0)
    run_to_end(engine)
    # Ids of topk and lookahead, weights in two bytes; position and token id.
    assert engine.to.byte_count == engine.trace.token_count * (LAYERS * TOPK * (1 + 1 + 2) + 8 + 4)


def test_decode_that_begins_within_what_was_a_prompt_shortens_the_prompt() -> None:
    engine = Engine(truth(1), recorder())
    engine.step({0: engine.prompt(0)})
    engine.to.begin(Step(("0",), np.zeros(1, np.int64), engine.trace.token_ids[2:3], np.array([False])), np.array([2]))
    engine.layers(np.array([2]), range(LAYERS))
    trace = engine.to.trace()
    assert trace.prefill.tolist() == [2] and np.array_equal(trace.topk, engine.trace.topk[:3])


@pytest.mark.parametrize("expert_count", [255, 256, 300])
def test_experts_of_any_number_are_recorded(expert_count: int) -> None:
    run_to_end(engine := Engine(truth(expert_count=expert_count), recorder(expert_count)))
    assert_same(engine.to.trace(), engine.trace)


@pytest.mark.parametrize("expert_count", [EXPERTS, 255, 256])
@pytest.mark.parametrize("wrong", [-1, 1 << 8])
def test_an_expert_that_is_not_there_is_a_bug_of_the_caller(wrong: int, expert_count: int) -> None:
    to = TraceRecorder(1, expert_count, 1)
    to.begin(Step(("x",), np.zeros(1, np.int64), np.array([-1]), np.array([False])))
    with pytest.raises(AssertionError):
        to.observe(0, np.full((1, 1), wrong))


def test_a_step_without_tokens_is_no_matter() -> None:
    to = recorder()
    to.begin(Step((), np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0, bool)))
    for layer in range(LAYERS):
        to.observe(layer, np.zeros((0, TOPK), np.int64))
    assert to.trace().token_count == 0
