"""The contract that every predictor keeps, whatever it predicts from."""

import pickle
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import pytest

from vllm_moecxl.control.prediction import PREDICTORS
from vllm_moecxl.control.prediction.base import Observation, Predictor, Probabilities, Step, Target

LAYER_COUNT, EXPERT_COUNT, TOPK, HIDDEN = 4, 12, 3, 16

Routes = npt.NDArray[np.int64]


@pytest.fixture(params=sorted(PREDICTORS))
def name(request: pytest.FixtureRequest) -> str:
    return request.param


def make(name: str) -> Predictor:
    return PREDICTORS[name](LAYER_COUNT, EXPERT_COUNT, TOPK)


def random_routes(rng: np.random.Generator, token_count: int) -> Routes:
    """[tokens, layers, k], distinct experts in a layer."""
    return np.argsort(rng.random((token_count, LAYER_COUNT, EXPERT_COUNT)), axis=2)[:, :, :TOPK]


def step_of(request_ids: tuple[str, ...], counts: list[int], token_ids: Routes) -> Step:
    rows = np.repeat(np.arange(len(counts)), counts)
    return Step(request_ids, rows, token_ids, np.array([count > 1 for count in counts]))


def gates(routes: Routes, layer_id: int) -> npt.NDArray[np.float32] | None:
    """What next gates would say that know the next layers' routes, but for the last layer, which has none."""
    ahead = routes[:, layer_id + 1 : layer_id + 3].transpose(1, 0, 2)
    if not len(ahead):
        return None
    scores = np.zeros((*ahead.shape[:2], EXPERT_COUNT), np.float32)
    np.put_along_axis(scores, ahead, 4.0, axis=2)
    return scores


def targets(layer_id: int) -> Iterator[Target]:
    """What may be asked after a layer (-1: before the first one): the next two visits, and its own next one."""
    for distance in sorted({1, 2, LAYER_COUNT if layer_id >= 0 else 1}):
        visit = layer_id + distance
        yield Target(visit % LAYER_COUNT, distance, visit >= LAYER_COUNT)


def play(predictor: Predictor, step: Step, routes: Routes, *, is_asked: bool = True) -> list[Probabilities | None]:
    """A step, and all that can be asked in it."""
    predictor.begin(step)
    told = ask(predictor, -1) if is_asked else []
    for layer_id in range(LAYER_COUNT):
        predictor.observe(Observation(layer_id, routes[:, layer_id], ahead=gates(routes, layer_id)))
        told += ask(predictor, layer_id) if is_asked else []
    return told


def ask(predictor: Predictor, layer_id: int) -> list[Probabilities | None]:
    """All that can be asked after a layer. Copies: an answer may be a view of what the predictor goes on to change."""
    told = [predictor.predict(target) for target in targets(layer_id)]
    return [None if answer is None else answer.copy() for answer in told]


def request(
    predictor: Predictor, request_id: str, routes: Routes, token_ids: Routes, prompt: int = 0
) -> list[Probabilities | None]:
    """A request from its first to its last token, alone: a prompt in one step, then token by token."""
    told = []
    if prompt:
        play(predictor, step_of((request_id,), [prompt], token_ids[:prompt]), routes[:prompt], is_asked=False)
    for token in range(prompt, len(routes)):
        told += play(predictor, step_of((request_id,), [1], token_ids[token : token + 1]), routes[token : token + 1])
    predictor.forget(request_id)
    return told


def trained(name: str, request_count: int = 3) -> Predictor:
    """A predictor that has seen requests come and go."""
    predictor, rng = make(name), np.random.default_rng(0)
    for index in range(request_count):
        request(predictor, f"past-{index}", random_routes(rng, 14), rng.integers(50, size=14), prompt=10)
    return predictor


def assert_same(one: list[Probabilities | None], other: list[Probabilities | None]) -> None:
    assert len(one) == len(other)
    for a, b in zip(one, other, strict=True):
        assert (a is None) == (b is None)
        if a is not None and b is not None:
            np.testing.assert_array_equal(a, b)


def check(told: list[Probabilities | None], request_count: int) -> None:
    for probabilities in told:
        if probabilities is None:
            continue
        assert probabilities.shape == (request_count, EXPERT_COUNT) and probabilities.dtype == np.float32
        assert np.isfinite(probabilities).all() and probabilities.min() >= 0 and probabilities.max() <= 1


def test_answers_are_probabilities_by_request_and_expert(name: str) -> None:
    predictor, rng = trained(name), np.random.default_rng(1)
    for request_count in (1, 3, 2, 9):
        ids = tuple(f"r{index}" for index in range(request_count))
        for _ in range(6):
            step = step_of(ids, [1] * request_count, rng.integers(50, size=request_count))
            check(play(predictor, step, random_routes(rng, request_count)), request_count)


def test_probabilities_add_up_to_about_as_many_experts_as_a_token_uses(name: str) -> None:
    predictor, rng = trained(name), np.random.default_rng(2)
    told = request(predictor, "r", random_routes(rng, 80), rng.integers(50, size=80))
    sums = [float(probabilities.sum()) for probabilities in told if probabilities is not None]
    assert sums and 0.7 * TOPK < np.mean(sums) < 1.3 * TOPK


def test_a_new_predictor_can_be_asked_before_it_has_seen_anything(name: str) -> None:
    predictor = make(name)
    check(play(predictor, step_of(("a", "b"), [1, 1], np.array([3, 4])), random_routes(np.random.default_rng(3), 2)), 2)


def test_the_same_history_gives_the_same_answers(name: str) -> None:
    def answers() -> list[Probabilities | None]:
        rng = np.random.default_rng(4)
        return request(trained(name), "r", random_routes(rng, 20), rng.integers(50, size=20))

    assert_same(answers(), answers())


def test_answers_do_not_depend_on_what_comes_later(name: str) -> None:
    rng = np.random.default_rng(5)
    routes, token_ids = random_routes(rng, 30), rng.integers(50, size=30)
    later, later_ids = routes.copy(), token_ids.copy()
    later[20:], later_ids[20:] = random_routes(rng, 10), rng.integers(50, size=10)
    asked = LAYER_COUNT * 3 + 2
    one = request(trained(name), "r", routes, token_ids)[: 20 * asked]
    other = request(trained(name), "r", later, later_ids)[: 20 * asked]
    assert_same(one, other)


def test_asking_changes_neither_an_answer_nor_the_next_ones(name: str) -> None:
    predictor, rng = trained(name), np.random.default_rng(6)
    for token_id in range(5):
        routes = random_routes(rng, 1)
        predictor.begin(step_of(("r",), [1], np.array([token_id])))
        for layer_id in range(LAYER_COUNT):
            predictor.observe(Observation(layer_id, routes[:, layer_id], ahead=gates(routes, layer_id)))
            given = [predictor.predict(target) for target in targets(layer_id)]
            copies = [None if answer is None else answer.copy() for answer in given]
            assert_same(copies, ask(predictor, layer_id))
            assert_same(copies, given)


def test_inputs_are_left_alone(name: str) -> None:
    predictor, rng = trained(name), np.random.default_rng(8)
    for counts in ([5, 7], [1, 1]):
        token_ids, routes = rng.integers(50, size=sum(counts)), random_routes(rng, sum(counts))
        token_ids.setflags(write=False)
        routes.setflags(write=False)
        play(predictor, step_of(("a", "b"), counts, token_ids), routes)


def test_prompts_of_any_length_and_mixed_steps_are_taken_in(name: str) -> None:
    predictor, rng = make(name), np.random.default_rng(9)
    for counts in ([1, 1, 1], [1500, 1, 3], [1, 700, 1300], [1, 1, 1]):
        total = sum(counts)
        step = step_of(("a", "b", "c"), counts, rng.integers(-1, 5000, size=total))
        told = play(predictor, step, random_routes(rng, total), is_asked=max(counts) == 1)
        check(told, 3)


def test_a_step_with_several_tokens_of_a_request_is_answered_for_the_last_one(name: str) -> None:
    predictor, rng = trained(name), np.random.default_rng(10)
    told = play(predictor, step_of(("a", "b"), [2, 3], rng.integers(50, size=5)), random_routes(rng, 5))
    check(told, 2)


def test_unknown_tokens_are_no_obstacle(name: str) -> None:
    predictor, rng = make(name), np.random.default_rng(11)
    for index in range(3):
        check(request(predictor, f"r{index}", random_routes(rng, 20), np.full(20, -1), prompt=5), 1)


def test_requests_come_and_go_between_steps(name: str) -> None:
    predictor, rng = trained(name), np.random.default_rng(12)
    predictor.forget("never seen")
    for ids in (("a", "b"), ("b",), ("c", "b", "d"), ("a",)):
        for _ in range(10):
            step = step_of(ids, [1] * len(ids), rng.integers(50, size=len(ids)))
            check(play(predictor, step, random_routes(rng, len(ids))), len(ids))
        predictor.forget(ids[0])


def test_a_step_that_is_cut_short_does_no_harm(name: str) -> None:
    predictor, rng = trained(name), np.random.default_rng(13)
    predictor.begin(step_of(("r",), [1], np.array([1])))
    predictor.observe(Observation(0, random_routes(rng, 1)[:, 0]))
    check(request(predictor, "r", random_routes(rng, 5), rng.integers(50, size=5)), 1)


def test_memory_stays_bounded_as_requests_come_and_go(name: str) -> None:
    predictor, rng = make(name), np.random.default_rng(14)
    sizes = []
    for index in range(240):
        request(predictor, f"r{index}", random_routes(rng, 10), rng.integers(50, size=10), prompt=9)
        sizes.append(len(pickle.dumps(predictor)) if index % 80 == 79 else 0)
    assert sizes[-1] < 1.05 * sizes[-81] + 1024


def test_experts_that_are_always_used_are_found(name: str) -> None:
    predictor = trained(name)
    always = np.broadcast_to(
        np.arange(TOPK)[None, None] + np.arange(LAYER_COUNT)[None, :, None], (24, LAYER_COUNT, TOPK)
    )
    for index in range(4):
        told = request(predictor, f"r{index}", always, np.arange(24), prompt=10)
        check(told, 1)
    layers = [target.layer_id for layer_id in range(-1, LAYER_COUNT) for target in targets(layer_id)]
    for layer_id, answer in zip(layers, told[-len(layers) :], strict=True):
        if answer is not None:
            assert set(np.argsort(-answer[0])[:TOPK].tolist()) == set(always[0, layer_id].tolist())
    assert any(answer is not None for answer in told[-len(layers) :])
