"""What is read from vLLM's model runner: a stand-in with its tables, as `GPUModelRunner` and `InputBatch` keep them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from vllm_moecxl.integration.steps import describe, describe_early
from vllm_moecxl.runtime.ring import Begun

LENGTH_MAX = 32


@dataclass
class Request:
    """One request as the runner knows it.

    Attributes:
        tokens: all that are known, those that were sampled and drafts included.
        prompt_count: how many of them are its prompt.
        computed_count: how many have been through the model.
    """

    id: str
    tokens: Sequence[int]
    prompt_count: int
    computed_count: int


def runner_with(*requests: Request) -> Any:
    """The runner's tables are longer than the batch, and hold what earlier requests have left."""
    token_ids = np.full((8, LENGTH_MAX), 999, dtype=np.int32)
    computed = np.full(8, 77, dtype=np.int32)
    prompts = np.full(8, 99, dtype=np.int32)
    for row, request in enumerate(requests):
        token_ids[row, : len(request.tokens)] = request.tokens
        computed[row], prompts[row] = request.computed_count, request.prompt_count
    batch = SimpleNamespace(
        req_ids=[request.id for request in requests],
        token_ids_cpu=token_ids,
        num_computed_tokens_cpu=computed,
        num_prompt_tokens=prompts,
    )
    return SimpleNamespace(input_batch=batch)


@dataclass
class Scheduled:
    """The part of vLLM's `SchedulerOutput` that is read."""

    num_scheduled_tokens: dict[str, int]
    cached: Sequence[Request] = ()
    scheduled_new_reqs: list[Any] = field(default_factory=list)
    scheduled_spec_decode_tokens: dict[str, list[int]] = field(default_factory=dict)
    finished_req_ids: set[str] = field(default_factory=set)
    resumed: set[str] = field(default_factory=set)

    @property
    def scheduled_cached_reqs(self) -> SimpleNamespace:
        return SimpleNamespace(
            req_ids=[request.id for request in self.cached],
            resumed_req_ids=self.resumed,
            num_computed_tokens=[request.computed_count for request in self.cached],
        )


def shown(begun: Begun | None) -> tuple[Any, ...]:
    assert begun is not None and begun.step is not None
    step = begun.step
    assert step.rows.dtype == step.token_ids.dtype == np.int64 and step.is_prompt.dtype == np.bool_
    positions = None if begun.positions is None else begun.positions.tolist()
    return step.request_ids, step.rows.tolist(), step.token_ids.tolist(), step.is_prompt.tolist(), positions


@pytest.mark.parametrize(
    ("path", "names"),
    [
        ("v1/core/sched/output.py", ["num_scheduled_tokens: ", "scheduled_cached_reqs: ", "scheduled_new_reqs: "]),
        ("v1/core/sched/output.py", ["scheduled_spec_decode_tokens: ", "finished_req_ids: "]),
        ("v1/core/sched/output.py", ["resumed_req_ids: set[str]", "num_computed_tokens: list[int]"]),
        ("v1/worker/gpu_input_batch.py", ["def req_ids(self)", "self.token_ids_cpu = ", "self.num_prompt_tokens = "]),
        ("v1/worker/gpu_input_batch.py", ["self.num_computed_tokens_cpu = "]),
        ("v1/worker/gpu_model_runner.py", ["self.input_batch = InputBatch("]),
    ],
)
def test_the_engine_has_what_is_read(path: str, names: list[str]) -> None:
    """By its source: to import it takes longer than all of these tests."""
    spec = find_spec("vllm")
    assert spec is not None and spec.origin is not None
    source = (Path(spec.origin).parent / path).read_text()
    assert [name for name in names if name not in source] == []


def test_a_decode_step_has_one_token_of_each_request_in_the_runners_order() -> None:
    requests = Request("b", [1, 2, 3, 4], 3, 3), Request("a", [5, 6, 7], 1, 2)
    begun = describe(runner_with(*requests), Scheduled({"a": 1, "b": 1}))
    assert shown(begun) == (("b", "a"), [0, 1], [4, 7], [False, False], [3, 2])


def test_a_chunk_of_a_prompt_is_where_the_chunk_before_has_ended() -> None:
    request = Request("a", range(20), 20, 8)
    begun = describe(runner_with(request), Scheduled({"a": 6}))
    assert shown(begun) == (("a",), [0] * 6, [8, 9, 10, 11, 12, 13], [True], [8])


def test_a_prompt_of_one_token_is_a_prompt() -> None:
    begun = describe(runner_with(Request("a", [7], 1, 0), Request("b", [1, 2], 1, 1)), Scheduled({"a": 1, "b": 1}))
    assert shown(begun) == (("a", "b"), [0, 1], [7, 2], [True, False], [0, 1])


def test_prompts_and_decodes_share_a_step() -> None:
    requests = Request("d", [1, 2, 3], 2, 2), Request("p", range(10, 15), 5, 0), Request("e", [8, 9], 1, 1)
    begun = describe(runner_with(*requests), Scheduled({"p": 5, "d": 1, "e": 1}))
    assert shown(begun) == (
        ("d", "p", "e"),
        [0, 1, 1, 1, 1, 1, 2],
        [3, 10, 11, 12, 13, 14, 9],
        [False, True, False],
        [2, 0, 1],
    )


def test_drafts_are_tokens_of_their_request_and_no_prompt() -> None:
    requests = Request("a", [1, 2, 3, 40, 41], 2, 2), Request("b", [5, 6], 1, 1)
    begun = describe(runner_with(*requests), Scheduled({"a": 3, "b": 1}))
    assert shown(begun) == (("a", "b"), [0, 0, 0, 1], [3, 40, 41, 6], [False, False], [2, 1])


def test_a_token_that_only_the_device_knows_is_unknown() -> None:
    begun = describe(runner_with(Request("a", [1, 2, -1], 2, 2)), Scheduled({"a": 1}))
    assert shown(begun) == (("a",), [0], [-1], [False], [2])


@pytest.mark.parametrize("runner", [SimpleNamespace(), SimpleNamespace(input_batch=None), runner_with()])
@pytest.mark.parametrize("count", [1, 5])
def test_of_a_runner_that_shows_nothing_a_single_request_is_known_without_its_tokens(runner: Any, count: int) -> None:
    begun = describe(runner, Scheduled({"a": count}))
    assert shown(begun) == (("a",), [0] * count, [-1] * count, [count > 1], None)


def test_nothing_is_known_where_the_runners_batch_is_another_one() -> None:
    runner = runner_with(Request("a", [1, 2], 1, 1))
    assert describe(runner, Scheduled({"a": 1, "b": 1})) is None
    assert describe(runner_with(), Scheduled({})) is None
    assert describe(SimpleNamespace(), Scheduled({"a": 1, "b": 1})) is None


def early(*requests: Request, batch: Sequence[Request] | None = None, **changes: Any) -> Begun | None:
    """A decode step of `requests`, as the scheduler announces it; the runner's tables are those of the step before."""
    before = [Request(one.id, one.tokens, one.prompt_count, one.computed_count - 1) for one in requests]
    scheduled = Scheduled(**({"num_scheduled_tokens": {one.id: 1 for one in requests}, "cached": requests} | changes))
    return describe_early(runner_with(*(before if batch is None else batch)), scheduled)


A, B = Request("a", [1, 2, 3, 4], 3, 3), Request("b", [5, 6, 7], 1, 2)


def test_a_step_like_the_one_before_is_known_before_the_runner_has_seen_it() -> None:
    assert shown(early(A, B)) == (("a", "b"), [0, 1], [4, 7], [False, False], [3, 2])


def test_the_runners_order_counts_and_not_the_schedulers() -> None:
    batch = [Request("b", B.tokens, 1, 1), Request("a", A.tokens, 3, 2)]
    assert shown(early(A, B, batch=batch)) == (("b", "a"), [0, 1], [7, 4], [False, False], [2, 3])


def test_early_and_late_say_the_same() -> None:
    late = describe(runner_with(A, B), Scheduled({"a": 1, "b": 1}))
    assert shown(early(A, B)) == shown(late)


@pytest.mark.parametrize(
    "changes",
    [
        {"finished_req_ids": {"c"}},
        {"scheduled_new_reqs": [object()]},
        {"scheduled_spec_decode_tokens": {"a": [1]}},
        {"resumed": {"a"}},
        {"num_scheduled_tokens": {"a": 1, "b": 2}},
        {"num_scheduled_tokens": {"a": 1, "c": 1}},
        {"cached": [A]},
        {"cached": []},
        {"batch": [A]},
        {"batch": [A, Request("c", [1, 2], 1, 1)]},
        {"batch": []},
    ],
    ids=str,
)
def test_a_step_that_may_be_another_than_the_one_before_is_not_told_early(changes: dict[str, Any]) -> None:
    assert early(A, B, **changes) is None


def test_a_runner_that_shows_nothing_is_not_asked_early() -> None:
    assert describe_early(SimpleNamespace(), Scheduled({"a": 1}, cached=[A])) is None
