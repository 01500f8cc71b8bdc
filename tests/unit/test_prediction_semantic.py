"""What the text of a request says about its experts."""

import numpy as np
import numpy.typing as npt
import pytest

from vllm_moecxl.control.prediction.base import Observation, Step, Target
from vllm_moecxl.control.prediction.semantic import CLUSTER_COUNT, Semantic, hashed_embedding

LAYER_COUNT, EXPERT_COUNT, TOPK = 2, 12, 2

LOW, HIGH = range(0, 4), range(8, 12)
#: Token ids of two topics, and of words that all texts share.
TOPICS = {LOW: range(100, 160), HIGH: range(200, 260)}
SHARED = range(10)


def text(rng: np.random.Generator, tokens: range, count: int = 40) -> npt.NDArray[np.int64]:
    return np.where(rng.random(count) < 0.5, rng.choice(SHARED, count), rng.choice(tokens, count))


def read(semantic: Semantic, request_id: str, token_ids: npt.NDArray[np.int64]) -> None:
    """A prompt, up to before its first layer."""
    count = len(token_ids)
    semantic.begin(Step((request_id,), np.zeros(count, np.int64), token_ids, np.array([count > 1])))


def serve(semantic: Semantic, request_id: str, token_ids: npt.NDArray[np.int64], experts: range) -> None:
    """A request from its start to its end, which uses these experts."""
    rng = np.random.default_rng(len(token_ids))
    read(semantic, request_id, token_ids)
    for layer_id in range(LAYER_COUNT):
        chosen = np.argsort(rng.random((len(token_ids), len(experts))), axis=1)[:, :TOPK] + experts.start
        semantic.observe(Observation(layer_id, chosen))
    semantic.forget(request_id)


def share(semantic: Semantic, experts: range) -> float:
    answer = semantic.predict(Target(0, 1, False))
    assert answer is not None
    return float(answer[0, experts.start : experts.stop].sum() / answer.sum())


def taught(semantic: Semantic, count: int = 6) -> Semantic:
    rng = np.random.default_rng(0)
    for index in range(count):
        for experts, tokens in TOPICS.items():
            serve(semantic, f"{experts}-{index}", text(rng, tokens), experts)
    return semantic


@pytest.mark.parametrize("experts", [LOW, HIGH])
def test_a_text_is_expected_to_use_what_texts_of_its_words_used(experts: range) -> None:
    semantic = taught(Semantic(LAYER_COUNT, EXPERT_COUNT, TOPK))
    read(semantic, "new", text(np.random.default_rng(1), TOPICS[experts]))
    assert share(semantic, experts) > 0.7


def test_with_the_models_embeddings_other_words_of_the_topic_will_do() -> None:
    rng = np.random.default_rng(2)
    table = rng.standard_normal((300, 32)).astype(np.float32)
    for tokens in TOPICS.values():
        table[tokens.start : tokens.stop] += 3 * rng.standard_normal(32).astype(np.float32)
    fresh = {experts: range(tokens.start + 30, tokens.stop) for experts, tokens in TOPICS.items()}
    semantic = Semantic(LAYER_COUNT, EXPERT_COUNT, TOPK, embed=lambda token_ids: table[token_ids])
    for index in range(6):
        for experts, tokens in TOPICS.items():
            serve(semantic, f"{experts}-{index}", text(rng, range(tokens.start, tokens.start + 30)), experts)
    for experts, tokens in fresh.items():
        read(semantic, f"new-{experts}", text(rng, tokens))
        assert share(semantic, experts) > 0.7


def test_the_text_goes_on_counting_while_it_is_written() -> None:
    semantic, rng = taught(Semantic(LAYER_COUNT, EXPERT_COUNT, TOPK)), np.random.default_rng(3)
    read(semantic, "r", text(rng, TOPICS[LOW], count=12))
    before = share(semantic, HIGH)
    for token_id in rng.choice(TOPICS[HIGH], 40):
        read(semantic, "r", np.array([token_id]))
    assert share(semantic, HIGH) > before + 0.3


def test_a_request_is_not_mixed_up_with_one_that_had_its_name() -> None:
    semantic, rng = taught(Semantic(LAYER_COUNT, EXPERT_COUNT, TOPK)), np.random.default_rng(4)
    serve(semantic, "r", text(rng, TOPICS[LOW], count=200), LOW)
    read(semantic, "r", text(rng, TOPICS[HIGH]))
    assert share(semantic, HIGH) > 0.7


def test_without_embeddings_or_tokens_it_says_nothing() -> None:
    mute = taught(Semantic(LAYER_COUNT, EXPERT_COUNT, TOPK, embed=lambda token_ids: None))
    read(mute, "new", np.arange(20))
    assert mute.predict(Target(0, 1, False)) is None
    unknown = Semantic(LAYER_COUNT, EXPERT_COUNT, TOPK)
    serve(unknown, "old", np.full(40, -1), LOW)
    read(unknown, "new", np.full(20, -1))
    assert unknown.predict(Target(0, 1, False)) is None


def test_only_known_tokens_are_embedded() -> None:
    asked: list[int] = []

    def embed(token_ids: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        asked.extend(token_ids.tolist())
        return hashed_embedding(token_ids)

    read(Semantic(LAYER_COUNT, EXPERT_COUNT, TOPK, embed=embed), "r", np.array([-1, 5, -1, 7]))
    assert asked == [5, 7]


def test_a_request_of_a_few_tokens_teaches_nothing() -> None:
    for token_count, is_learned in ((8, True), (7, False)):
        semantic = Semantic(LAYER_COUNT, EXPERT_COUNT, TOPK)
        read(semantic, "other", np.arange(50, 90))  # what is common to all texts is known now
        serve(semantic, "r", np.arange(token_count), LOW)
        read(semantic, "new", np.arange(8))
        assert (semantic.predict(Target(0, 1, False)) is not None) == is_learned


def test_a_full_collection_merges_neighbours_and_keeps_a_rare_topic() -> None:
    semantic, rng = Semantic(LAYER_COUNT, EXPERT_COUNT, TOPK), np.random.default_rng(5)
    for index in range(2 * CLUSTER_COUNT):
        experts = HIGH if index == 10 else LOW
        serve(semantic, f"r{index}", text(rng, TOPICS[experts]), experts)
    read(semantic, "new-high", text(rng, TOPICS[HIGH]))
    assert share(semantic, HIGH) > 0.15
    read(semantic, "new-low", text(rng, TOPICS[LOW]))
    assert share(semantic, HIGH) < 0.02


def test_embeddings_by_hash_are_the_same_for_a_token_and_nearly_at_right_angles_otherwise() -> None:
    vectors = hashed_embedding(np.arange(500))
    np.testing.assert_array_equal(vectors[[7, 7, 400]], hashed_embedding(np.array([7, 7, 400])))
    cosines = vectors @ vectors.T / vectors.shape[1]
    np.fill_diagonal(cosines, 0)
    assert set(np.unique(vectors).tolist()) == {-1.0, 1.0}
    assert np.abs(cosines).max() < 0.35 and cosines.std() < 0.07
