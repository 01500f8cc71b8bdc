"""What the associative memory goes by: routes, context, token, hidden state; and what it forgets."""

import numpy as np
import numpy.typing as npt
import pytest

from vllm_moecxl.control.prediction.attention import POSITION_COUNT, Attention
from vllm_moecxl.control.prediction.base import Observation, Step, Target

LAYER_COUNT, EXPERT_COUNT, TOPK = 4, 16, 2
#: A path is the experts of each layer of a token, [layers, k].
Path = npt.NDArray[np.int64]


def path(*firsts: int) -> Path:
    """Experts 2f and 2f + 1 of each layer, by layer."""
    return np.array([[2 * first, 2 * first + 1] for first in firsts])


A, B = path(0, 1, 2, 3), path(4, 5, 6, 7)


@pytest.fixture
def attention() -> Attention:
    return Attention(LAYER_COUNT, EXPERT_COUNT, TOPK)


def begin(attention: Attention, request_id: str = "r", token_id: int = -1) -> None:
    attention.begin(Step((request_id,), np.zeros(1, np.int64), np.array([token_id]), np.array([False])))


def walk(
    attention: Attention,
    *paths: Path,
    request_id: str = "r",
    token_id: int = -1,
    hidden: npt.NDArray[np.float32] | None = None,
    layer_count: int = LAYER_COUNT,
) -> None:
    """Tokens along these paths; `layer_count` layers of each."""
    for one in paths:
        begin(attention, request_id, token_id)
        for layer_id in range(layer_count):
            attention.observe(Observation(layer_id, one[layer_id][None], hidden=hidden))


def prompt(attention: Attention, paths: npt.NDArray[np.int64], request_id: str) -> None:
    """[tokens, layers, k] in one step."""
    count = len(paths)
    attention.begin(Step((request_id,), np.zeros(count, np.int64), np.full(count, -1), np.array([True])))
    for layer_id in range(LAYER_COUNT):
        attention.observe(Observation(layer_id, paths[:, layer_id]))


def best(attention: Attention, layer_id: int, *, is_next_step: bool = False, row: int = 0) -> list[int]:
    answer = attention.predict(Target(layer_id, 1, is_next_step))
    assert answer is not None
    return sorted(np.argsort(-answer[row])[:TOPK].tolist())


def test_there_is_nothing_to_go_by_at_the_first_token(attention: Attention) -> None:
    walk(attention, A)
    assert attention.predict(Target(0, 1, True)) is None


@pytest.mark.parametrize("layer_id", [1, 2, 3])
def test_a_token_goes_on_like_the_one_that_came_the_same_way(attention: Attention, layer_id: int) -> None:
    walk(attention, A, B, A, B)
    walk(attention, A, layer_count=1)
    assert best(attention, layer_id) == A[layer_id].tolist()
    walk(attention, B, layer_count=1)
    assert best(attention, layer_id) == B[layer_id].tolist()


def test_other_requests_are_remembered_after_they_have_ended(attention: Attention) -> None:
    walk(attention, A, B, request_id="gone")
    attention.forget("gone")
    walk(attention, A, request_id="new", layer_count=1)
    assert best(attention, 1) == A[1].tolist()


def test_prompts_are_remembered(attention: Attention) -> None:
    prompt(attention, np.array([A, B, A]), "r")
    walk(attention, B, request_id="new", layer_count=1)
    assert best(attention, 2) == B[2].tolist()


def test_the_next_token_is_what_followed_last_time(attention: Attention) -> None:
    c = path(2, 3, 4, 5)
    walk(attention, A, B, c, A, B, c, A)
    assert best(attention, 0, is_next_step=True) == B[0].tolist()
    walk(attention, B)
    assert best(attention, 3, is_next_step=True) == c[3].tolist()


def test_a_prompt_is_followed_within_and_into_what_is_generated(attention: Attention) -> None:
    c, d = path(2, 3, 4, 5), path(6, 6, 6, 6)
    prompt(attention, np.array([c, A, d]), "r")
    walk(attention, B, d, c)
    for one, other in ((c, A), (A, d), (d, B)):
        walk(attention, one, request_id="s")
        assert best(attention, 1, is_next_step=True) == other[1].tolist()
        attention.forget("s")


def test_what_follows_a_position_is_of_its_request_and_ended_requests_leave_nothing(attention: Attention) -> None:
    rng = np.random.default_rng(0)
    for index in range(25):
        prompt(attention, rng.integers(EXPERT_COUNT, size=(int(rng.integers(1, 700)), LAYER_COUNT, TOPK)), f"p{index}")
        walk(attention, *[A, B][: rng.integers(3)], request_id="r")
        walk(attention, *[A, B][: rng.integers(3)], request_id=f"p{index // 2}")
        attention.forget(f"p{index // 2}")
        successors = attention._successors
        followed = np.flatnonzero(successors >= 0)
        assert len(followed)
        np.testing.assert_array_equal(attention._owners[followed], attention._owners[successors[followed]])
        assert len(attention._latest_of) == len(attention._owner_of)


def test_requests_of_a_step_are_not_taken_for_each_others_successors(attention: Attention) -> None:
    step = Step(("a", "b"), np.arange(2), np.full(2, -1), np.zeros(2, np.bool_))
    for _ in range(4):
        attention.begin(step)
        for layer_id in range(LAYER_COUNT):
            attention.observe(Observation(layer_id, np.stack([A[layer_id], B[layer_id]])))
    assert best(attention, 0, is_next_step=True, row=0) == A[0].tolist()
    assert best(attention, 0, is_next_step=True, row=1) == B[0].tolist()


def test_the_token_before_tells_look_alikes_apart(attention: Attention) -> None:
    one, other = path(2, 3, 4, 0), path(2, 3, 4, 7)  # alike up to the last layer
    walk(attention, *[A, one, B, other] * 3)
    walk(attention, A)
    walk(attention, one, layer_count=3)
    assert best(attention, 3) == one[3].tolist()


def test_before_the_first_layer_the_token_says_which_position_is_alike(attention: Attention) -> None:
    walk(attention, A, token_id=11)
    walk(attention, B, token_id=12)
    begin(attention, token_id=11)
    assert best(attention, 0) == A[0].tolist()


def test_unknown_tokens_are_not_alike(attention: Attention) -> None:
    walk(attention, A, token_id=-1)
    walk(attention, B, token_id=12)
    begin(attention, token_id=-1)
    assert best(attention, 0) == B[0].tolist()  # the latest one


def test_hidden_states_tell_look_alikes_apart(attention: Attention) -> None:
    one, other = path(2, 0, 0, 0), path(2, 7, 7, 7)
    rng = np.random.default_rng(0)
    states = rng.standard_normal((2, 1, 100)) + 30 * rng.standard_normal(100)  # most of it is common to all
    states = states.astype(np.float32)
    for _ in range(3):
        walk(attention, one, hidden=states[0])
        walk(attention, other, hidden=states[1])
    for which, expected in ((0, one), (1, other)):
        begin(attention)
        attention.observe(Observation(0, one[0][None], hidden=states[which]))
        assert best(attention, 1) == expected[1].tolist()


def test_an_unlike_past_says_little(attention: Attention) -> None:
    walk(attention, A, A, B)
    walk(attention, path(7, 7, 7, 7), request_id="new", layer_count=2)
    weak = attention.predict(Target(2, 1, False))
    walk(attention, A, request_id="new", layer_count=2)
    strong = attention.predict(Target(2, 1, False))
    assert weak is not None and strong is not None
    assert weak.max() < 0.3 < 0.6 < strong.max()


def test_the_memory_is_bounded_and_the_oldest_goes_first(attention: Attention) -> None:
    walk(attention, *[A] * 5, request_id="old")
    rest = np.broadcast_to(path(6, 6, 6, 6), (POSITION_COUNT - 5, LAYER_COUNT, TOPK))
    prompt(attention, rest, "prompt")
    walk(attention, A, request_id="new", layer_count=3)
    assert best(attention, 3) == A[3].tolist()
    attention.observe(Observation(3, np.array([[12, 13]])))
    prompt(attention, rest[:10], "prompt")
    walk(attention, A, request_id="new", layer_count=3)
    assert best(attention, 3) == [12, 13]
