"""Predictors that fit numbers: the gate applied early, the small learned model, and the mixture of all."""

import numpy as np
import numpy.typing as npt
import pytest

from vllm_moecxl.control.prediction.base import Observation, Step, Target
from vllm_moecxl.control.prediction.gate import Calibration, Gate, sigmoid
from vllm_moecxl.control.prediction.learned import HIDDEN_COUNT, LEARNED_COUNT_MAX, Learned
from vllm_moecxl.control.prediction.merit import (
    GRACE_STEP_COUNT,
    PAUSE_STEP_COUNT,
    TRIAL_STEP_COUNT,
    Merit,
    log_loss,
)
from vllm_moecxl.control.prediction.mixture import Mixture

LAYER_COUNT, EXPERT_COUNT, TOPK = 3, 16, 2
BASE_RATE = TOPK / EXPERT_COUNT

Floats = npt.NDArray[np.float32]


def step_of(count: int = 1) -> Step:
    rows = np.arange(count)
    return Step(tuple(f"r{row}" for row in rows), rows, np.zeros(count, np.int64), np.zeros(count, np.bool_))


def best(scores: Floats) -> npt.NDArray[np.int64]:
    return np.argsort(-scores, axis=-1)[..., :TOPK]


def test_a_gate_is_believed_as_far_as_it_is_right() -> None:
    rng = np.random.default_rng(0)
    said: dict[float, Floats] = {}
    for noise in (0.1, 100.0):
        gate = Gate(LAYER_COUNT, EXPERT_COUNT, TOPK)
        sums = np.zeros(3)
        for index in range(400):
            gate.begin(step_of())
            logits = rng.normal(size=(1, EXPERT_COUNT)).astype(np.float32)
            ahead = (logits + noise * rng.normal(size=logits.shape))[None].astype(np.float32)
            gate.observe(Observation(0, np.array([[0, 1]]), ahead=ahead))
            answer = gate.predict(Target(1, 1, False))
            assert answer is not None
            if index >= 200:
                picks = answer[0] > 0.5
                sums += picks.sum(), picks[best(logits[0])].sum(), answer.sum()
            gate.observe(Observation(1, best(logits)))
        assert sums[2] / 200 == pytest.approx(TOPK, rel=0.1)
        if noise < 1:
            assert sums[1] > 0.85 * sums[0] > 200
        else:
            assert sums[0] == 0 and np.abs(answer - BASE_RATE).max() < 0.15
        said[noise] = answer


def test_a_gate_has_no_say_where_it_was_not_applied() -> None:
    gate = Gate(LAYER_COUNT, EXPERT_COUNT, TOPK)
    gate.begin(step_of())
    assert gate.predict(Target(0, 1, False)) is None
    gate.observe(Observation(0, np.array([[0, 1]]), ahead=np.zeros((1, 1, EXPERT_COUNT), np.float32)))
    assert gate.predict(Target(1, 1, False)) is not None
    assert gate.predict(Target(2, 2, False)) is None, "it was applied for one layer only"
    assert gate.predict(Target(1, 1, True)) is None, "the next step's input is another one"
    gate.begin(step_of())
    assert gate.predict(Target(1, 1, False)) is None, "the step before is over"


def test_ranks_serve_as_scores() -> None:
    calibration = Calibration(TOPK)
    ranks = np.zeros((1, EXPERT_COUNT), np.float32)
    ranks[0, [5, 9]] = 2, 1
    margins = calibration.margins(ranks)
    assert margins[0, 5] > margins[0, 9] > 0 > margins[0, 0]
    for _ in range(200):
        calibration.learn(margins, np.array([[5, 9]]))
    p = sigmoid(calibration.logits(margins))[0]
    assert p[5] > p[9] > 0.8 and p[0] < 0.15


def run(model: Learned, visits: int, rng: np.random.Generator, kind: str, count: int = 1) -> float:
    """Share of layer 1's experts among the likeliest, over the last quarter; `kind` says what they follow from."""
    follower = np.random.default_rng(99).permutation(EXPERT_COUNT)
    router = np.random.default_rng(98).normal(size=(40, EXPERT_COUNT)).astype(np.float32)
    right = total = 0
    for index in range(visits):
        model.begin(step_of(count))
        first = np.argsort(rng.random((count, EXPERT_COUNT)))[:, :TOPK]
        hidden = rng.normal(size=(count, 40)).astype(np.float32)
        logits = hidden @ router
        truth = follower[first] if kind == "experts" else best(logits)
        ahead = None
        if kind in ("gate", "half a gate"):  # which is blind for half of the experts; the input says what it misses
            ahead = np.where(np.arange(EXPERT_COUNT) % 2, logits, 0)[None].astype(np.float32)
        given = hidden if kind in ("hidden", "gate") else None
        model.observe(Observation(0, first, ahead=ahead, hidden=given))
        answer = model.predict(Target(1, 1, False))
        assert answer is not None and answer.shape == (count, EXPERT_COUNT)
        if index >= visits * 3 // 4:
            right += int((best(answer)[:, :, None] == truth[:, None]).sum())
            total += truth.size
        model.observe(Observation(1, truth))
        model.observe(Observation(2, first))
    return right / total


def test_experts_are_learned_from_those_before_them() -> None:
    assert run(Learned(LAYER_COUNT, EXPERT_COUNT, TOPK), 200, np.random.default_rng(1), "experts") > 0.95


def visit(model: Learned, first: npt.NDArray[np.int64], second: npt.NDArray[np.int64]) -> Floats:
    """A step of some requests: what was said of layer 1 after `first`, before it used `second`, [requests, k] both."""
    model.begin(step_of(len(first)))
    model.observe(Observation(0, first))
    answer = model.predict(Target(1, 1, False))
    assert answer is not None
    model.observe(Observation(1, second))
    model.observe(Observation(2, first))
    return answer


def test_a_batch_is_learned_from_in_turns() -> None:
    model = Learned(LAYER_COUNT, EXPERT_COUNT, TOPK)
    count = LEARNED_COUNT_MAX + 1
    first = np.array([[0, 1]] * (count - 1) + [[14, 15]])
    second = np.array([[2, 3]] * (count - 1) + [[12, 13]])  # only the last request ever uses these
    for _ in range(40):
        answer = visit(model, first, second)
    assert (answer[0, [2, 3]] > 0.9).all() and (answer[-1, [12, 13]] > 0.7).all()


def test_every_request_of_a_batch_counts() -> None:
    said = []
    for count in (1, LEARNED_COUNT_MAX):
        model = Learned(LAYER_COUNT, EXPERT_COUNT, TOPK)
        first, second = np.array([[0, 1]] * count), np.array([[2, 3]] * count)
        visit(model, first, second)
        said.append(visit(model, first[:1], second[:1])[0, 2])
    assert BASE_RATE < said[0] < said[1] - 0.1


def test_a_prediction_is_not_learned_from_for_other_requests() -> None:
    model = Learned(LAYER_COUNT, EXPERT_COUNT, TOPK)
    visit(model, np.array([[0, 1]]), np.array([[2, 3]]))
    assert model.predict(Target(0, 2, True)) is not None
    model.begin(step_of(3))
    model.observe(Observation(0, np.array([[4, 5]] * 3)))
    model.begin(step_of())
    again = model.predict(Target(0, 2, True))
    assert again is not None
    np.testing.assert_allclose(again, BASE_RATE, atol=1e-6)


def test_a_layers_input_says_what_experts_do_not() -> None:
    rng = np.random.default_rng(3)
    blind = run(Learned(LAYER_COUNT, EXPERT_COUNT, TOPK), 1500, rng, "nothing")
    assert blind < 0.3 < 0.45 < run(Learned(LAYER_COUNT, EXPERT_COUNT, TOPK), 1500, rng, "hidden")


def test_what_a_gate_misses_is_learned() -> None:
    rng = np.random.default_rng(4)
    without_input = run(Learned(LAYER_COUNT, EXPERT_COUNT, TOPK), 1000, rng, "half a gate")
    assert run(Learned(LAYER_COUNT, EXPERT_COUNT, TOPK), 1000, rng, "gate") > without_input + 0.05
    assert without_input > 0.35


@pytest.mark.parametrize("width", [HIDDEN_COUNT - 6, HIDDEN_COUNT, HIDDEN_COUNT + 6, 8192])
def test_inputs_of_any_width_are_folded_so_that_likeness_stays(width: int) -> None:
    model, rng = Learned(LAYER_COUNT, EXPERT_COUNT, TOPK), np.random.default_rng(5)
    one, other = rng.normal(size=(2, width))
    hidden = np.array([one, one + 0.3 * other, other], np.float32)
    folded = model._fold(hidden)
    assert folded is not None and folded.shape == (3, min(width, HIDDEN_COUNT))
    lengths = np.linalg.norm(folded, axis=1)
    np.testing.assert_allclose(lengths, lengths[0], rtol=1e-4)
    cosines = folded @ folded[0] / lengths[0] ** 2
    assert cosines[1] > 0.85 and abs(cosines[2]) < 0.3


def test_numbers_without_bounds_do_not_spoil_what_was_learned() -> None:
    model, gate = Learned(LAYER_COUNT, EXPERT_COUNT, TOPK), Gate(LAYER_COUNT, EXPERT_COUNT, TOPK)
    scores = np.arange(EXPERT_COUNT, dtype=np.float32)
    for hidden in (np.inf, np.nan, 1.0):
        ruled_out = np.where(scores < 4, -np.inf, scores)[None, None].astype(np.float32)
        seen = Observation(0, np.array([[0, 1]]), ahead=ruled_out, hidden=np.full((1, 8), hidden, np.float32))
        for predictor in (model, gate):
            predictor.begin(step_of())
            predictor.observe(seen)
            answer = predictor.predict(Target(1, 1, False))
            assert answer is not None and np.isfinite(answer).all()
            predictor.observe(Observation(1, np.array([[14, 15]])))


def test_a_mixture_learns_whom_to_believe_and_how_far() -> None:
    rng = np.random.default_rng(6)
    mixture = Mixture(1, 3, BASE_RATE)
    base_logit = float(np.log(BASE_RATE / (1 - BASE_RATE)))
    weights = np.array([0.5, 0.0, 1.5])  # the first one exaggerates, the second one guesses, the third one is timid
    for _ in range(600):
        evidence = np.ones((1, 4, EXPERT_COUNT), np.float32)
        evidence[0, :3] = rng.normal(size=(3, EXPERT_COUNT))
        truth = 1 / (1 + np.exp(-(base_logit + weights @ evidence[0, :3])))
        _, p = mixture.mix([0], evidence)
        mixture.learn([0], evidence, p, (rng.random(EXPERT_COUNT) < truth).astype(np.float32))
    np.testing.assert_allclose(mixture.weights[0], [*weights, 0], atol=0.25)
    mixture.drop(2)
    assert mixture.weights[0, 2] == 0 != mixture.weights[0, 0]


def test_log_loss_is_that_of_the_probabilities() -> None:
    logits, used = np.array([[2.0, -1.0, 0.0]], np.float32), np.array([1.0, 0.0, 1.0], np.float32)
    p = 1 / (1 + np.exp(-logits[0]))
    expected = -np.log(p[0]) - np.log(1 - p[1]) - np.log(p[2])
    assert log_loss(logits, used)[0] == pytest.approx(expected, rel=1e-6)


def verdicts(merit: Merit, saved: float, step_count: int) -> list[bool]:
    is_on = []
    for _ in range(step_count):
        if merit.is_on:
            merit.score(1.0, saved, saved, 1, 1)
        merit.end_step()
        is_on.append(merit.is_on)
    return is_on


def test_a_predictor_that_does_not_help_is_tried_ever_more_rarely() -> None:
    merit = Merit()
    is_on = verdicts(merit, -0.1, 20 * PAUSE_STEP_COUNT)
    assert all(is_on[: GRACE_STEP_COUNT - 1]) and not is_on[GRACE_STEP_COUNT]
    edges = np.flatnonzero(np.diff(np.array(is_on, np.int8)))
    lengths = np.diff(edges)
    assert (lengths[1::2] == TRIAL_STEP_COUNT).all(), "trials"
    assert lengths[0] == PAUSE_STEP_COUNT and (lengths[2::2] == 2 * lengths[:-2:2]).all(), "pauses"


def test_a_predictor_that_helps_stays() -> None:
    merit = Merit()
    assert all(verdicts(merit, 0.1, 20 * PAUSE_STEP_COUNT))
    report = merit.report()
    assert report.gain == pytest.approx(0.1) and report.precision == 1.0


def test_a_predictor_that_was_never_asked_is_not_judged() -> None:
    merit = Merit()
    for _ in range(2 * GRACE_STEP_COUNT):
        merit.end_step()
    assert merit.is_on
