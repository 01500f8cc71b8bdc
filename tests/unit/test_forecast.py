"""The ensemble: what it answers, that it is calibrated, and whom it leaves out."""

import numpy as np
import numpy.typing as npt
import pytest

from vllm_moecxl.control.prediction import DEFAULT_PREDICTORS, PREDICTORS
from vllm_moecxl.control.prediction.base import Observation, Predictor, Probabilities, Step, Target
from vllm_moecxl.control.prediction.forecast import REQUEST_COUNT_MAX, Forecast
from vllm_moecxl.control.prediction.merit import GRACE_STEP_COUNT, PAUSE_STEP_COUNT, TRIAL_STEP_COUNT

LAYER_COUNT, EXPERT_COUNT, TOPK = 6, 16, 2
BASE_RATE = TOPK / EXPERT_COUNT

Routes = npt.NDArray[np.int64]


def default_predictors() -> dict[str, Predictor]:
    return {name: PREDICTORS[name](LAYER_COUNT, EXPERT_COUNT, TOPK) for name in DEFAULT_PREDICTORS}


def make(predictors: dict[str, Predictor] | None = None) -> Forecast:
    return Forecast(LAYER_COUNT, EXPERT_COUNT, TOPK, default_predictors() if predictors is None else predictors)


def step_of(token_ids: list[int], ids: tuple[str, ...] = ("r",), is_prompt: bool = False) -> Step:
    rows = np.arange(len(token_ids)) * len(ids) // len(token_ids)
    return Step(ids, rows, np.array(token_ids), np.full(len(ids), is_prompt))


def random_routes(rng: np.random.Generator, token_count: int = 1) -> Routes:
    """[layers, tokens, k], distinct experts in a layer."""
    return np.argsort(rng.random((LAYER_COUNT, token_count, EXPERT_COUNT)), axis=2)[:, :, :TOPK]


def play(forecast: Forecast, step: Step, routes: Routes) -> npt.NDArray[np.float32]:
    """A step; [layers, experts], the scores of each layer just before it is visited."""
    forecast.begin(step)
    scores = []
    for layer_id in range(LAYER_COUNT):
        scores.append(forecast.scores[layer_id].copy())
        forecast.observe(Observation(layer_id, routes[layer_id]))
    return np.array(scores)


def noisy_routes(rng: np.random.Generator, tables: Routes, token_id: int) -> Routes:
    """What the token says, but for one visit in five."""
    routes, noise = tables[token_id][:, None], random_routes(rng)
    return np.where(rng.random((LAYER_COUNT, 1, 1)) < 0.2, noise, routes)


def noisy_text(seed: int, count: int) -> list[tuple[int, Routes]]:
    rng = np.random.default_rng(seed)
    tables = np.stack([random_routes(rng)[:, 0] for _ in range(10)])
    return [(token_id, noisy_routes(rng, tables, token_id)) for token_id in rng.integers(10, size=count).tolist()]


class Scripted:
    """Says what it is told to, about every target."""

    def __init__(self) -> None:
        self.answer: Probabilities | None = None
        self.asked_count = 0

    def begin(self, step: Step) -> None:
        """Nothing to learn."""

    def observe(self, seen: Observation) -> None:
        """Nothing to learn."""

    def predict(self, target: Target) -> Probabilities | None:
        self.asked_count += 1
        return self.answer

    def forget(self, request_id: str) -> None:
        """Nothing is kept."""


def say(*expert_ids: int) -> Probabilities:
    answer = np.full((1, EXPERT_COUNT), 0.01, np.float32)
    answer[0, list(expert_ids)] = 0.9
    return answer


def test_targets_are_the_next_layers_through_the_end_of_the_step() -> None:
    forecast = make()
    routes = random_routes(np.random.default_rng(0))
    assert forecast.begin(step_of([1])) == (Target(0, 1, False), Target(1, 2, False))
    told = [forecast.observe(Observation(layer_id, routes[layer_id])) for layer_id in range(LAYER_COUNT)]
    assert told[0] == (Target(1, 1, False), Target(2, 2, False))
    assert told[-2] == (Target(LAYER_COUNT - 1, 1, False), Target(0, 2, True))
    assert told[-1] == (Target(0, 1, True), Target(1, 2, True))


@pytest.mark.parametrize("kind", ["prompt", "wide"])
def test_prompts_and_wide_steps_are_only_learned_from(kind: str) -> None:
    forecast = make()
    if kind == "prompt":
        step = step_of([1, 2, 3], is_prompt=True)
    else:
        count = REQUEST_COUNT_MAX + 1
        step = step_of([1] * count, tuple(f"r{index}" for index in range(count)))
    routes = random_routes(np.random.default_rng(0), len(step.rows))
    assert forecast.begin(step) == ()
    assert all(forecast.observe(Observation(layer_id, routes[layer_id])) == () for layer_id in range(LAYER_COUNT))


def test_random_routing_is_answered_with_the_base_rate_within_200_steps() -> None:
    forecast, rng = make(), np.random.default_rng(1)
    scores = [play(forecast, step_of([int(rng.integers(100))]), random_routes(rng)) for _ in range(300)]
    settled = np.array(scores[200:])
    assert abs(settled.mean() - BASE_RATE) < 0.01
    assert np.quantile(settled, 0.99) < 0.3 and settled.max() < 0.5


def test_nobody_is_asked_where_routing_is_random() -> None:
    predictors = default_predictors()
    predictors["scripted"] = scripted = Scripted()
    forecast, rng = make(predictors), np.random.default_rng(2)
    for _ in range(GRACE_STEP_COUNT + 2 * TRIAL_STEP_COUNT + 1):
        scripted.answer = say(*rng.integers(EXPERT_COUNT, size=2))
        play(forecast, step_of([int(rng.integers(100))]), random_routes(rng))
    assert not any(report.is_on for report in forecast.report().values())
    before = scripted.asked_count
    play(forecast, step_of([1]), random_routes(rng))
    assert scripted.asked_count == before > 0


def test_what_repeats_is_found_with_certainty() -> None:
    forecast = make()
    rng = np.random.default_rng(3)
    tables = np.stack([random_routes(rng)[:, 0] for _ in range(5)])
    for index in range(120):
        token_id = index % 5
        scores = play(forecast, step_of([token_id]), tables[token_id][:, None])
    used = np.zeros_like(scores)
    np.put_along_axis(used, tables[token_id], 1.0, axis=1)
    assert (scores[used == 1] > 0.9).all() and (scores[used == 0] < 0.1).all()


def test_probabilities_are_calibrated() -> None:
    forecast = make()
    said, used = [], []
    for token_id, routes in noisy_text(4, 600):
        said.append(play(forecast, step_of([token_id]), routes))
        used.append(np.zeros((LAYER_COUNT, EXPERT_COUNT)))
        np.put_along_axis(used[-1], routes[:, 0], 1.0, axis=1)
    p, y = np.array(said[200:]).ravel(), np.array(used[200:]).ravel()
    for low, high in ((0.0, 0.05), (0.05, 0.3), (0.6, 1.0)):
        inside = (p >= low) & (p < high)
        assert inside.sum() > 50
        assert abs(p[inside].mean() - y[inside].mean()) < 0.06, (low, high)


def test_scores_of_several_requests_are_those_of_any_of_them() -> None:
    scripted = Scripted()
    forecast = make({"scripted": scripted})
    rng = np.random.default_rng(5)
    for _ in range(30):  # until it is trusted
        routes = random_routes(rng)
        routes[:] = [3, 7]
        scripted.answer = say(3, 7)
        play(forecast, step_of([1]), routes)
    scripted.answer = np.concatenate([say(3, 7), say(4, 7), say(5, 7)])
    forecast.begin(step_of([1, 1, 1], ("r", "s", "t")))
    one = forecast.scores[0][3]
    assert one > 0.8
    assert forecast.scores[0][4] == pytest.approx(one, abs=1e-3)
    rest = 1 - forecast.scores[0][0]  # nobody named expert 0: three small chances
    assert rest == pytest.approx((1 - one) / (1 - forecast.scores[0][3]) * rest)
    assert forecast.scores[0][7] == pytest.approx(1 - (1 - one) ** 3 / rest**2, abs=2e-3)


def test_who_misleads_does_no_harm() -> None:
    liar = Scripted()
    alone, together = make(), make({**default_predictors(), "liar": liar})
    rng = np.random.default_rng(6)
    right = [0, 0]
    for index, (token_id, routes) in enumerate(noisy_text(7, 300)):
        liar.answer = say(*rng.integers(EXPERT_COUNT, size=2))
        for which, forecast in enumerate((alone, together)):
            scores = play(forecast, step_of([token_id]), routes)
            if index >= 100:
                picks = np.argsort(-scores, axis=1)[:, :TOPK]
                right[which] += int((picks[:, :, None] == routes[:, 0][:, None]).sum())
    assert right[1] > 0.97 * right[0] > 0


def test_who_helps_no_more_is_left_out_and_comes_back_when_it_would_win() -> None:
    scripted = Scripted()
    forecast, rng = make({"scripted": scripted}), np.random.default_rng(8)

    def steps(count: int, is_right: bool) -> None:
        for _ in range(count):
            experts = np.sort(rng.permutation(EXPERT_COUNT)[:TOPK])
            routes = np.broadcast_to(experts, (LAYER_COUNT, 1, TOPK)).copy()
            scripted.answer = say(*(experts if is_right else rng.integers(EXPERT_COUNT, size=2)))
            play(forecast, step_of([1]), routes)

    steps(GRACE_STEP_COUNT + TRIAL_STEP_COUNT, True)
    report = forecast.report()["scripted"]
    assert report.is_on and report.gain > 0.5 and report.solo_gain > 0.5 and report.precision > 0.95
    steps(8 * TRIAL_STEP_COUNT, False)
    assert not forecast.report()["scripted"].is_on
    steps(4 * PAUSE_STEP_COUNT, True)
    report = forecast.report()["scripted"]
    assert report.is_on and report.gain > 0.5


@pytest.mark.parametrize("ids", [("r",), ("s",), ("s", "t")])
def test_a_prediction_is_held_only_against_the_requests_it_was_made_for(ids: tuple[str, ...]) -> None:
    scripted = Scripted()
    forecast = make({"scripted": scripted})
    routes = np.broadcast_to(np.array([3, 7]), (LAYER_COUNT, 1, TOPK)).copy()
    scripted.answer = say(3, 7)
    for _ in range(20):
        play(forecast, step_of([1]), routes)
    weights = forecast._mixture.weights
    before = weights.copy()
    forecast.begin(step_of([1] * len(ids), ids))
    forecast.observe(Observation(0, np.array([[1, 2]] * len(ids))))
    is_changed = (weights != before).any(axis=1)
    # Kinds of targets, by threes: a later layer, the next step, a step's first layers; one layer ahead, then two.
    assert is_changed.tolist() == [False, False, True, False, ids == ("r",), False]


def test_of_several_tokens_of_a_request_the_last_one_counts() -> None:
    scripted = Scripted()
    forecast = make({"scripted": scripted})
    scripted.answer = say(3, 7)
    routes = np.broadcast_to(np.array([[1, 2], [3, 7]]), (LAYER_COUNT, 2, TOPK)).copy()
    for _ in range(GRACE_STEP_COUNT + 1):
        scores = play(forecast, step_of([1, 2], ("r",)), routes)
    assert (scores[:, [3, 7]] > 0.8).all() and forecast.report()["scripted"].precision > 0.95


def test_far_layers_score_what_recent_steps_used() -> None:
    forecast = make({})
    routes = np.broadcast_to(np.array([3, 7]), (LAYER_COUNT, 1, TOPK)).copy()
    for _ in range(100):
        play(forecast, step_of([1]), routes)
    assert (forecast.scores[3][[3, 7]] > 0.9).all() and forecast.scores[3][0] < 0.05


@pytest.mark.parametrize(("layer_count", "expert_count", "topk"), [(1, 8, 2), (2, 8, 8), (3, 2, 1), (2, 300, 1)])
def test_models_of_any_shape_are_predicted(layer_count: int, expert_count: int, topk: int) -> None:
    predictors = {name: PREDICTORS[name](layer_count, expert_count, topk) for name in DEFAULT_PREDICTORS}
    forecast, rng = Forecast(layer_count, expert_count, topk, predictors), np.random.default_rng(9)
    for _ in range(20):
        forecast.begin(step_of([int(rng.integers(5))]))
        for layer_id in range(layer_count):
            ahead = rng.normal(size=(layer_count - layer_id - 1, 1, expert_count)).astype(np.float32)
            expert_ids = rng.permutation(expert_count)[None, :topk]
            targets = forecast.observe(Observation(layer_id, expert_ids, ahead=ahead))
            assert len(targets) == min(2, layer_count)
        assert np.isfinite(forecast.scores).all()
        assert forecast.scores.min() >= 0 and forecast.scores.max() <= 1
    forecast.forget("r")
