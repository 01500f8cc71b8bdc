"""Residency against its oracle; `test_guards_bite` shows that the oracle would notice."""

import numpy as np
import pytest
from hypothesis import settings
from hypothesis.stateful import run_state_machine_as_test

from tests.property.residency_machine import ResidencyMachine
from vllm_moecxl.control.eviction import LeastRecentlyUsed
from vllm_moecxl.control.residency import Residency


def test_residency_does_what_the_oracle_says() -> None:
    run_state_machine_as_test(ResidencyMachine, settings=settings(max_examples=200, stateful_step_count=40))


def test_a_lease_ends_once() -> None:
    residency = Residency(2, 1, LeastRecentlyUsed(1))
    slot_id = residency.begin_fill(1, np.zeros(2, dtype=np.bool_))
    assert slot_id is not None
    residency.complete_fill(slot_id)
    lease = residency.lease(np.array([1], dtype=np.uint32))
    assert lease is not None
    residency.release(lease)
    with pytest.raises(KeyError):
        residency.release(lease)


@pytest.mark.parametrize("end", [Residency.complete_fill, Residency.abort_fill])
def test_only_a_fill_that_has_begun_can_end(end: object) -> None:
    residency = Residency(2, 1, LeastRecentlyUsed(1))
    with pytest.raises(AssertionError):
        end(residency, 0)  # type: ignore[operator]


def test_only_an_absent_expert_can_be_filled() -> None:
    residency = Residency(3, 2, LeastRecentlyUsed(2))
    keep = np.zeros(3, dtype=np.bool_)
    assert residency.begin_fill(1, keep) == 0
    with pytest.raises(AssertionError):
        residency.begin_fill(1, keep)
    residency.complete_fill(0)
    with pytest.raises(AssertionError):
        residency.begin_fill(1, keep)
