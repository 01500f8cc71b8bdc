"""What matching with past stretches of requests finds, and what its collection keeps."""

import numpy as np
import numpy.typing as npt
import pytest

from vllm_moecxl.control.prediction import history as module
from vllm_moecxl.control.prediction.base import Observation, Step, Target
from vllm_moecxl.control.prediction.history import MAP_COUNT, STRETCH_TOKENS, BaseRate, History

LAYER_COUNT, EXPERT_COUNT, TOPK = 3, 16, 2


@pytest.fixture
def history() -> History:
    return History(LAYER_COUNT, EXPERT_COUNT, TOPK)


def routes(rng: np.random.Generator, token_count: int, experts: range) -> npt.NDArray[np.int64]:
    """[tokens, layers, k] of these experts only."""
    chosen = np.argsort(rng.random((token_count, LAYER_COUNT, len(experts))), axis=2)[:, :, :TOPK]
    return chosen + experts.start


def step(request_id: str, token_count: int = 1) -> Step:
    return Step((request_id,), np.zeros(token_count, np.int64), np.full(token_count, -1), np.array([token_count > 1]))


def decode(history: History, request_id: str, tokens: npt.NDArray[np.int64], layer_count: int = LAYER_COUNT) -> None:
    for token in tokens:
        history.begin(step(request_id))
        for layer_id in range(layer_count):
            history.observe(Observation(layer_id, token[None, layer_id]))


def prefill(history: History, request_id: str, tokens: npt.NDArray[np.int64]) -> None:
    history.begin(step(request_id, len(tokens)))
    for layer_id in range(LAYER_COUNT):
        history.observe(Observation(layer_id, tokens[:, layer_id]))


def share(history: History, layer_id: int, experts: range, *, is_next_step: bool = False) -> float:
    """Of the activations that are expected in a layer, those of these experts."""
    answer = history.predict(Target(layer_id, 1, is_next_step))
    assert answer is not None
    return float(answer[0, experts.start : experts.stop].sum() / answer.sum())


LOW, HIGH = range(0, 6), range(10, 16)


def test_a_new_request_is_taken_for_one_that_routed_alike(history: History) -> None:
    rng = np.random.default_rng(0)
    for index in range(6):
        decode(history, f"past-{index}", routes(rng, 20, (LOW, HIGH)[index % 2]))
        history.forget(f"past-{index}")
    for name, experts in (("low", LOW), ("high", HIGH)):
        decode(history, name, routes(rng, 1, experts), layer_count=1)
        assert share(history, 2, experts) > 0.65


def test_without_past_requests_a_request_is_taken_for_what_it_was_lately(history: History) -> None:
    rng = np.random.default_rng(1)
    decode(history, "r", routes(rng, STRETCH_TOKENS // 2, LOW))
    before = share(history, 0, HIGH, is_next_step=True)
    decode(history, "r", routes(rng, STRETCH_TOKENS // 2 - 1, HIGH))
    assert share(history, 0, HIGH, is_next_step=True) > before + 0.3


def test_a_prompt_counts_like_its_tokens_one_by_one() -> None:
    rng = np.random.default_rng(2)
    tokens = routes(rng, STRETCH_TOKENS - 1, range(EXPERT_COUNT))
    answers = []
    for show in (prefill, decode):
        history = History(LAYER_COUNT, EXPERT_COUNT, TOPK)
        show(history, "r", tokens)
        answers.append(history.predict(Target(1, 1, True)))
    # Not to the last bit: the base rate that is taken off is the one of the time.
    np.testing.assert_allclose(answers[0], answers[1], atol=0.02)


def test_a_long_request_learns_from_its_own_past_while_it_runs(history: History) -> None:
    rng = np.random.default_rng(3)
    decode(history, "r", routes(rng, 3 * STRETCH_TOKENS, LOW))
    decode(history, "other", routes(rng, 1, LOW), layer_count=1)
    decode(history, "far", routes(rng, 1, HIGH), layer_count=1)
    assert share(history, 1, LOW) > 0.5  # nothing but low ones is known of layer 1
    assert history.predict(Target(2, 2, False)) is not None


def test_a_full_collection_keeps_what_is_rare(history: History) -> None:
    rng = np.random.default_rng(4)
    for index in range(2 * MAP_COUNT):
        prefill(history, f"r{index}", routes(rng, 20, HIGH if index == 10 else LOW))
        history.forget(f"r{index}")
    decode(history, "new", routes(rng, 1, HIGH), layer_count=1)
    assert share(history, 2, HIGH) > 0.3
    decode(history, "usual", routes(rng, 1, LOW), layer_count=1)
    assert share(history, 2, HIGH) < 0.1


def test_running_products_and_lengths_equal_those_computed_anew(
    history: History, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "STRETCH_TOKENS", 4)
    rng = np.random.default_rng(5)
    for index in range(40):
        decode(history, "long", routes(rng, 7, range(EXPERT_COUNT)))
        prefill(history, f"r{index}", routes(rng, int(rng.integers(1, 30)), range(EXPERT_COUNT)))
        if index % 3:
            history.forget(f"r{index}")
    recent = history._recent.values
    anew = np.einsum("rle,len->rn", recent, history._maps)
    np.testing.assert_allclose(history._products.values, anew, atol=1e-3)
    np.testing.assert_allclose(history._squares.values, (recent**2).sum(axis=(1, 2)), atol=1e-3)


def test_the_base_rate_is_the_mean_and_follows_a_change() -> None:
    base, rng = BaseRate(1, EXPERT_COUNT, TOPK), np.random.default_rng(6)
    for experts in (LOW, HIGH):
        for _ in range(20):
            base.observe(0, routes(rng, 1000, experts)[:, 0])
        np.testing.assert_allclose(base.values.sum(), TOPK, rtol=1e-4)
        np.testing.assert_allclose(base.values[0, experts.start : experts.stop], TOPK / len(experts), atol=0.05)


def test_what_was_rare_when_it_was_learned_stays_a_probability_when_it_is_common(history: History) -> None:
    rng = np.random.default_rng(7)
    prefill(history, "before", routes(rng, 400, LOW))
    always = np.broadcast_to(np.array(HIGH[:TOPK]), (8000, LAYER_COUNT, TOPK))
    for index in range(4):
        decode(history, f"r{index}", always[:STRETCH_TOKENS])
        history.forget(f"r{index}")
    prefill(history, "long", always)
    decode(history, "new", always[:3])
    answer = history.predict(Target(0, 1, True))
    assert answer is not None and answer.min() >= 0 and answer.max() <= 1
