"""Predictors that count: temporal reuse, token tables, layer-to-layer tables, and what they count with."""

import numpy as np
import numpy.typing as npt
import pytest

from vllm_moecxl.control.prediction import PREDICTORS
from vllm_moecxl.control.prediction import tokens as tokens_module
from vllm_moecxl.control.prediction.base import Observation, Predictor, Probabilities, Step, Target
from vllm_moecxl.control.prediction.requests import Backlog, PerRequest, last_token_of
from vllm_moecxl.control.prediction.states import PRIOR_COUNT, WINDOW_COUNT, StateRates
from vllm_moecxl.control.prediction.tokens import OCCURRENCE_COUNT, Tokens

LAYER_COUNT, EXPERT_COUNT, TOPK = 4, 16, 2
BASE_RATE = TOPK / EXPERT_COUNT

Routes = npt.NDArray[np.int64]


def make(name: str) -> Predictor:
    return PREDICTORS[name](LAYER_COUNT, EXPERT_COUNT, TOPK)


def random_routes(seed: int, token_count: int) -> Routes:
    """[tokens, layers, k], distinct experts in a layer."""
    rng = np.random.default_rng(seed)
    return np.argsort(rng.random((token_count, LAYER_COUNT, EXPERT_COUNT)), axis=2)[:, :, :TOPK]


def step_of(token_ids: list[int], request_ids: tuple[str, ...] = ("r",)) -> Step:
    rows = np.arange(len(token_ids)) * len(request_ids) // len(token_ids)
    return Step(request_ids, rows, np.array(token_ids), np.zeros(len(request_ids), np.bool_))


def answer(predictor: Predictor, target: Target) -> Probabilities:
    told = predictor.predict(target)
    assert told is not None
    return told.copy()


def play(predictor: Predictor, step: Step, routes: Routes, *, is_asked: bool = True) -> npt.NDArray[np.float32]:
    """A step of [tokens, layers, k]; [requests, layers, experts], what was said of each layer just before it."""
    predictor.begin(step)
    said = []
    for layer_id in range(LAYER_COUNT):
        if is_asked and (told := predictor.predict(Target(layer_id, 1, False))) is not None:
            said.append(told.copy())
        else:
            said.append(np.full((len(step.request_ids), EXPERT_COUNT), BASE_RATE, np.float32))
        predictor.observe(Observation(layer_id, routes[:, layer_id]))
    return np.array(said).transpose(1, 0, 2)


@pytest.mark.parametrize("name", ["temporal", "tokens", "transitions"])
def test_a_prompt_teaches_as_much_as_its_tokens_one_by_one(name: str) -> None:
    routes, token_ids = random_routes(0, 14), [1, 2, 1, 3, 1, 4, 5, 1, 2, 1, 1, 1, 1, 2]
    whole, single = make(name), make(name)
    for predictor in (whole, single):  # the second layer's tables are counted once they have been asked for
        play(predictor, step_of([9], ("other",)), random_routes(1, 1))
    play(whole, step_of(token_ids), routes, is_asked=False)
    for token, token_id in enumerate(token_ids):
        play(single, step_of([token_id]), routes[token : token + 1], is_asked=False)
    for predictor in (whole, single):
        predictor.begin(step_of([1]))
    layers = range(LAYER_COUNT)
    said = [[answer(predictor, Target(layer_id, 1, False)) for layer_id in layers] for predictor in (whole, single)]
    # Of a prompt, the pairs from one token's last layer to the next token's first one are not counted.
    first = 1 if name == "transitions" else 0
    # Everybody's habits are an average over time: a prompt is one moment of it.
    np.testing.assert_allclose(said[0][first:], said[1][first:], atol=1e-6 if name != "temporal" else 0.02)


def test_a_history_says_which_experts_come_again() -> None:
    predictor, rng = make("temporal"), np.random.default_rng(2)
    experts = rng.permutation(EXPERT_COUNT)
    for index in range(400):  # each pair of experts stays for four tokens
        routes = np.broadcast_to(experts[:TOPK], (1, LAYER_COUNT, TOPK))
        said = play(predictor, step_of([0]), routes)[0, 1]
        if index % 4 == 3:
            experts = rng.permutation(EXPERT_COUNT)
    assert (said[routes[0, 0]] > 0.7).all()
    again = answer(predictor, Target(1, LAYER_COUNT, True))[0]
    assert (again[routes[0, 0]] < 0.3).all(), "that these four tokens are over is in the history, too"


def test_habits_of_a_request_are_its_own() -> None:
    predictor = make("temporal")
    rng = np.random.default_rng(3)
    routes = np.empty((2, LAYER_COUNT, TOPK), np.int64)
    for _ in range(150):  # each request uses its own half of the experts, without an order
        routes[0] = [rng.permutation(8)[:TOPK] for _ in range(LAYER_COUNT)]
        routes[1] = [8 + rng.permutation(8)[:TOPK] for _ in range(LAYER_COUNT)]
        said = play(predictor, step_of([0, 0], ("a", "b")), routes)
    assert said[0, :, :8].mean() > 3 * said[0, :, 8:].mean()
    assert said[1, :, 8:].mean() > 3 * said[1, :, :8].mean()
    predictor.forget("a")
    fresh = play(predictor, step_of([0, 0], ("a", "b")), routes)
    assert fresh[0, :, :8].mean() < 2 * fresh[0, :, 8:].mean(), "a new request of the same name starts without habits"


def test_a_token_that_was_seen_is_known_at_the_start_of_its_step() -> None:
    predictor, tables = make("tokens"), random_routes(4, 6)
    for index in range(30):
        play(predictor, step_of([index % 6]), tables[index % 6][None])
    predictor.begin(step_of([2, 77, 5], ("a", "b", "c")))
    for layer_id in range(LAYER_COUNT):
        said = answer(predictor, Target(layer_id, 1, False))
        assert (said[0, tables[2, layer_id]] > 0.8).all() and (said[2, tables[5, layer_id]] > 0.8).all()
        assert said[1].max() < 0.3
    assert predictor.predict(Target(0, 1, True)) is None, "the next step's token is not known"


def test_a_token_table_keeps_the_latest_occurrences() -> None:
    predictor, routes = make("tokens"), random_routes(5, 3)
    for index in range(40):
        play(predictor, step_of([1]), routes[index // 20][None])
    said = play(predictor, step_of([1]), routes[:1])[0, 0]
    new = np.setdiff1d(routes[1, 0], routes[0, 0])
    old = np.setdiff1d(routes[0, 0], routes[1, 0])
    assert OCCURRENCE_COUNT < 20 and (said[new] > 0.8).all() and (said[old] < 0.2).all()


def test_a_full_token_table_makes_room_for_new_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens_module, "ROW_COUNT_MAX", 4)
    predictor, tables = Tokens(LAYER_COUNT, EXPERT_COUNT, TOPK), random_routes(6, 6)
    for index in range(40):  # three fit beside the row of unknown ones
        play(predictor, step_of([index % 3]), tables[index % 3][None])
    play(predictor, step_of([5]), tables[5][None])
    predictor.begin(step_of([1, 5], ("a", "b")))
    said = answer(predictor, Target(1, 1, False))
    assert (said[0, tables[1, 1]] > 0.8).all() and (said[1, tables[5, 1]] > 0.5).all()
    predictor.begin(step_of([0]))
    assert answer(predictor, Target(1, 1, False)).max() < 0.5, "the token that came first is forgotten"


def test_a_layer_follows_from_the_one_before() -> None:
    predictor, follower = make("transitions"), np.random.default_rng(7).permutation(EXPERT_COUNT)
    for seed in range(150):
        routes = random_routes(seed, 1)
        for layer_id in range(1, LAYER_COUNT):
            routes[0, layer_id] = follower[routes[0, layer_id - 1]]
        said = play(predictor, step_of([0]), routes)[0]
    for layer_id in range(1, LAYER_COUNT):
        # Half of the evidence comes from each of the two experts.
        assert (said[layer_id, routes[0, layer_id]] > 0.4).all() and said[layer_id].sum() == pytest.approx(TOPK)


def test_states_are_worth_what_followed_them_and_follow_a_change() -> None:
    rates = StateRates(np.full(3, 0.25))
    np.testing.assert_allclose(rates.rates, 0.25)
    rates.learn(np.array([0, 0, 0, 1]), np.array([0, 0, 0]))
    assert rates.rates[0] == pytest.approx((3 + 0.25 * PRIOR_COUNT) / (3 + PRIOR_COUNT))
    assert rates.rates[1] < 0.25 == rates.rates[2]
    many = np.zeros(int(WINDOW_COUNT), np.int64)
    for _ in range(4):
        rates.learn(many, many)
    assert rates.rates[0] > 0.95
    for _ in range(4):
        rates.learn(many, many[:0])
    assert rates.rates[0] < 0.1, "old observations count for less and less"


def test_rows_of_requests_are_kept_apart_grown_and_cleared() -> None:
    table = PerRequest((2,))
    ids = tuple(f"r{index}" for index in range(20))
    rows = table.rows(ids)
    table.values[rows] = np.arange(20)[:, None]
    np.testing.assert_array_equal(table.values[table.rows(("r3", "r19")), 0], [3, 19])
    table.forget("r3")
    table.forget("r3")
    row = table.rows(("new",))
    np.testing.assert_array_equal(table.values[row], [[0, 0]])
    assert len(set(table.rows((*ids[:3], *ids[4:], "new")).tolist())) == 20


def test_a_backlog_gives_layers_that_follow_each_other() -> None:
    backlog = Backlog()
    assert backlog.take() is None
    for layer_id in (0, 1):
        backlog.add(Observation(layer_id, np.array([[layer_id, 9]])))
    taken = backlog.take()
    assert taken is not None and taken[0] == slice(0, 2)
    np.testing.assert_array_equal(taken[1], [[[0, 9]], [[1, 9]]])
    backlog.add(Observation(2, np.array([[2, 9]])))
    backlog.add(Observation(0, np.array([[7, 9]])))  # a step was cut short
    taken = backlog.take()
    assert taken is not None and taken[0] == slice(0, 1) and taken[1].tolist() == [[[7, 9]]]


def test_the_last_token_of_each_request() -> None:
    rows = np.array([0, 0, 0, 1, 2, 2])
    step = Step(("a", "b", "c"), rows, np.arange(6), np.zeros(3, np.bool_))
    assert last_token_of(step).tolist() == [2, 3, 5]
