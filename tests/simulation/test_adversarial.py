"""Routing that nobody can predict: prefetching finds out soon, stops, and has cost next to nothing by then."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pytest

from tests.simulation.world import SEEDS, Guesser, Watch, make_simulator
from vllm_moecxl.control import prefetch, trial
from vllm_moecxl.control.prediction import DEFAULT_PREDICTORS, PREDICTORS
from vllm_moecxl.control.prediction.base import Observation, Predictor, Target
from vllm_moecxl.control.prediction.mixture import Mixture
from vllm_moecxl.control.trace import RoutingTrace

LAYER_COUNT = 4
STEP_COUNT = 400
#: By when it has to be off.
OFF_STEP_COUNT = 200
COST_MAX = 0.02
#: Experts and top-k; half of the experts have a slot.
SHAPES = [(8, 2), (64, 6), (128, 8)]


@dataclass
class Outcome:
    """What prefetching did on random routing.

    Attributes:
        late_issued_count: prefetches, once it has to be off.
        late_observed_count: layers that were predicted from then on.
        cost: share of the time without prefetching that it took longer.
    """

    late_issued_count: int
    late_observed_count: int
    cost: float


def make_uniform_trace(seed: int, expert_count: int, topk: int) -> RoutingTrace:
    """One long request; every choice is as likely as every other, tokens included."""
    generator = np.random.default_rng(seed)
    noise = generator.random((STEP_COUNT, LAYER_COUNT, expert_count))
    return RoutingTrace(
        topk=np.argsort(noise, axis=2)[:, :, :topk],
        weights=None,
        lookahead=None,
        req=np.array([0, STEP_COUNT]),
        prefill=np.zeros(1, dtype=np.int32),
        token_ids=generator.integers(0, 50, STEP_COUNT),
        layer_ids=np.arange(LAYER_COUNT),
        meta={"model": "toy", "num_experts": expert_count},
    )


def run(seed: int, expert_count: int, topk: int, *, guesses: bool = False) -> Outcome:
    """With the default predictors, or with one that guesses; and without any."""
    trace = make_uniform_trace(seed, expert_count, topk)
    predictors: dict[str, Predictor] = {"guesser": Guesser(expert_count, seed)}
    if not guesses:
        predictors = {name: PREDICTORS[name](LAYER_COUNT, expert_count, topk) for name in DEFAULT_PREDICTORS}
    plain = Watch(make_simulator(trace, slot_counts=expert_count // 2)).run()
    simulator = make_simulator(trace, slot_counts=expert_count // 2, predictors=predictors)
    prefetching = simulator.prefetching
    assert prefetching is not None
    observe, counts = prefetching.forecast.observe, simulator.prefetch_counts
    late_observed_count = early_issued_count = 0

    def note(seen: Observation) -> Sequence[Target]:
        nonlocal late_observed_count, early_issued_count
        if simulator.step_count >= OFF_STEP_COUNT:
            late_observed_count += 1
        else:
            early_issued_count = counts.issued
        return observe(seen)

    prefetching.forecast.observe = note  # type: ignore[method-assign, assignment]
    found = Watch(simulator).run()
    assert simulator.step_count == STEP_COUNT
    # What is ordered right after the last look before the limit is counted as late.
    return Outcome(
        counts.issued - early_issued_count, late_observed_count, found["duration_s"] / plain["duration_s"] - 1
    )


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("expert_count", "topk"), SHAPES)
@pytest.mark.parametrize("guesses", [False, True], ids=["default", "guesser"])
def test_on_random_routing_prefetching_is_off_soon_and_costs_next_to_nothing(
    seed: int, expert_count: int, topk: int, guesses: bool
) -> None:
    outcome = run(seed, expert_count, topk, guesses=guesses)
    assert outcome.late_observed_count == outcome.late_issued_count == 0
    assert outcome.cost < COST_MAX


@pytest.mark.parametrize(("expert_count", "topk"), SHAPES)
def test_without_trials_it_would_predict_for_ever(
    expert_count: int, topk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trial, "WARMUP_STEP_COUNT", 10**9)
    outcome = run(1, expert_count, topk)
    assert outcome.late_observed_count > 0
    assert outcome.cost < COST_MAX  # what is picked is judged all the same


def test_without_trials_calibration_and_judgement_guesses_would_cost(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of the three stops them; without any, the test above would see it."""

    def believe(self: Mixture, kinds: list[int], evidence: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        logits = evidence[:, 0] + self._base_logit
        return logits, 1 / (1 + np.exp(-logits))

    def late_issued_count() -> int:
        return run(1, 64, 6, guesses=True).late_issued_count

    monkeypatch.setattr(trial, "WARMUP_STEP_COUNT", 10**9)
    assert late_issued_count() == 0
    with monkeypatch.context() as only_judgement:
        only_judgement.setattr(Mixture, "mix", believe)
        assert late_issued_count() == 0
    monkeypatch.setattr(prefetch, "_PRECISION_ON", 0.0)
    monkeypatch.setattr(prefetch, "_PRECISION_OFF", 0.0)
    assert late_issued_count() == 0
    monkeypatch.setattr(Mixture, "mix", believe)
    outcome = run(1, 64, 6, guesses=True)
    assert outcome.late_issued_count > 100 and outcome.cost > COST_MAX
