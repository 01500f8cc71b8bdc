"""Trials: what helps stays on, what does not goes off and is tried again, whatever the steps are like."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import cycle, pairwise, repeat

import numpy as np
import pytest

from vllm_moecxl.control.trial import PAUSE_STEP_COUNT, PAUSE_STEP_COUNT_MAX, TURN_STEP_COUNT, WARMUP_STEP_COUNT, Trial

TRIAL_STEP_COUNT = 4 * TURN_STEP_COUNT

#: (width, whether it is used) -> seconds.
Steps = Callable[[int, bool], float]


def play(trial: Trial, step_count: int, duration_s: Steps, widths: Iterator[int]) -> list[bool]:
    """Whether each step used it."""
    used = []
    for _ in range(step_count):
        width = next(widths)
        used.append(trial.is_on)
        if trial.is_on:
            trial.use()
        trial.observe(width, duration_s(width, trial.is_on))
    return used


def saving(share: float) -> Steps:
    return lambda width, is_on: width * (1 - share * is_on)


def test_it_is_used_until_the_first_trial_and_by_turns_in_it() -> None:
    used = play(Trial(), WARMUP_STEP_COUNT + TRIAL_STEP_COUNT, saving(0.0), repeat(1))
    turns = used[WARMUP_STEP_COUNT:]
    assert all(used[:WARMUP_STEP_COUNT])
    assert [turns[i : i + TURN_STEP_COUNT] for i in range(0, TRIAL_STEP_COUNT, TURN_STEP_COUNT)] == [
        [is_on] * TURN_STEP_COUNT for is_on in (True, False, False, True)
    ]


@pytest.mark.parametrize(("share", "stays"), [(0.3, True), (0.02, True), (0.0, False), (-0.3, False)])
def test_only_what_saves_time_stays_on(share: float, *, stays: bool) -> None:
    trial = Trial()
    play(trial, WARMUP_STEP_COUNT + TRIAL_STEP_COUNT, saving(share), repeat(1))
    assert trial.is_on is stays and trial.saved_share == pytest.approx(share)
    assert all(used is stays for used in play(trial, PAUSE_STEP_COUNT - 1, saving(share), repeat(1)))


def test_a_loser_is_off_after_200_steps_and_then_costs_less_than_2_percent() -> None:
    trial = Trial()
    play(trial, 200, saving(-0.5), repeat(1))
    assert not trial.is_on
    used = play(trial, 20_000, saving(-0.5), repeat(1))
    assert 0 < np.mean(used) * 0.5 < 0.02


def test_each_lost_trial_doubles_the_pause_and_one_that_is_won_ends_that() -> None:
    trial = Trial()
    losing = np.array(play(trial, 100_000, saving(-0.5), repeat(1)))
    begins = np.flatnonzero(losing[1:] & ~losing[:-1])
    pauses = np.diff(begins[1::2]) - TRIAL_STEP_COUNT
    assert pauses[0] == 4 * PAUSE_STEP_COUNT and pauses.max() == PAUSE_STEP_COUNT_MAX
    assert all(later in (2 * earlier, PAUSE_STEP_COUNT_MAX) for earlier, later in pairwise(pauses))
    play(trial, PAUSE_STEP_COUNT_MAX + TRIAL_STEP_COUNT, saving(0.5), repeat(1))
    assert trial.is_on, "it helps by now"
    play(trial, PAUSE_STEP_COUNT + TRIAL_STEP_COUNT, saving(-0.5), repeat(1))
    assert not trial.is_on, "and no longer does"


@pytest.mark.parametrize("widths", [[1, 2], [1] * 20 + [2] * 20, [3, 3, 3, 3, 4, 5], [1] * 7 + [8] * 50])
@pytest.mark.parametrize("share", [0.2, -0.2])
def test_widths_that_change_all_the_time_hide_nothing(widths: list[int], share: float) -> None:
    trial = Trial()
    step_count = WARMUP_STEP_COUNT + TRIAL_STEP_COUNT
    play(trial, step_count, saving(share), cycle(widths))
    assert trial.is_on is (share > 0) and trial.saved_share == pytest.approx(share)
    assert all(used is (share > 0) for used in play(trial, PAUSE_STEP_COUNT - 1, saving(share), cycle(widths)))


def test_wide_steps_with_it_are_not_held_against_narrow_ones_without() -> None:
    """It saves a fifth, but happens to be on while the batch is large."""
    trial = Trial()
    widths = iter([1] * WARMUP_STEP_COUNT + ([8] * 10 + [1] * 6) + [1] * 32 + ([8] * 10 + [1] * 6))
    play(trial, WARMUP_STEP_COUNT + TRIAL_STEP_COUNT, saving(0.2), widths)
    assert trial.saved_share is None and trial.is_on, "too few were alike to say anything"
    widths = iter([1] * PAUSE_STEP_COUNT + ([8] * 6 + [1] * 10) + [1] * 32 + ([8] * 6 + [1] * 10))
    play(trial, PAUSE_STEP_COUNT + TRIAL_STEP_COUNT, saving(0.2), widths)
    assert trial.saved_share == pytest.approx(0.2) and trial.is_on


def test_a_trial_that_says_nothing_leaves_the_verdict_as_it_was() -> None:
    trial = Trial()
    play(trial, WARMUP_STEP_COUNT + TRIAL_STEP_COUNT, saving(-0.2), repeat(1))
    never_the_same = iter(range(10, 100_000))
    used = play(trial, 20_000, saving(-0.2), never_the_same)
    assert not trial.is_on and np.mean(used) < 0.02


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("share", [0.3, -0.3])
def test_noise_does_not_hide_what_is_clear(seed: int, share: float) -> None:
    rng = np.random.default_rng(seed)

    def noisy(width: int, is_on: bool) -> float:
        return float(saving(share)(width, is_on) * rng.lognormal(0, 0.2) * (20 if rng.random() < 0.02 else 1))

    trial = Trial()
    play(trial, WARMUP_STEP_COUNT + TRIAL_STEP_COUNT, noisy, repeat(1))
    assert trial.is_on is (share > 0)


def test_a_drift_that_hits_both_alike_is_no_gain() -> None:
    trial = Trial()
    times = iter(np.linspace(1.0, 3.0, WARMUP_STEP_COUNT + TRIAL_STEP_COUNT).tolist())
    play(trial, WARMUP_STEP_COUNT + TRIAL_STEP_COUNT, lambda width, is_on: next(times), repeat(1))
    assert trial.saved_share == pytest.approx(0.0, abs=0.01)


def test_what_does_nothing_is_not_on_by_chance() -> None:
    trial = Trial()
    for _ in range(WARMUP_STEP_COUNT + TRIAL_STEP_COUNT):
        trial.observe(1, saving(0.3)(1, trial.is_on))
    assert not trial.is_on and trial.saved_share == 0.0


def test_steps_that_take_no_time_say_nothing() -> None:
    trial = Trial()
    play(trial, WARMUP_STEP_COUNT + TRIAL_STEP_COUNT, lambda width, is_on: 0.0, repeat(1))
    assert trial.is_on and trial.saved_share is None
