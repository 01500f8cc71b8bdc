"""Activation frequencies: what an observation does, and which traces are refused."""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from tests.support.traces import EXPERTS, LAYERS, META, TOPK, shared_traces, write_trace
from vllm_moecxl.control.frequency import ActivationFrequency
from vllm_moecxl.errors import ConfigError

#: Activations of the small trace, by request.
COUNTS = np.array([[[2, 1, 1, 0], [1, 0, 2, 1]], [[0, 1, 0, 1], [1, 1, 0, 0]]])


def frequency(half_life_requests: float = 1.0) -> ActivationFrequency:
    return ActivationFrequency(LAYERS, EXPERTS, half_life_requests=half_life_requests)


def only(expert_id: int, count: int = 1) -> npt.NDArray[np.int64]:
    counts = np.zeros((LAYERS, EXPERTS), dtype=np.int64)
    counts[:, expert_id] = count
    return counts


def test_all_experts_are_equal_before_the_first_request() -> None:
    assert np.array_equal(frequency().values, np.full((LAYERS, EXPERTS), 0.25))


def test_an_observation_counts_half_after_the_half_life() -> None:
    average = frequency(half_life_requests=3)
    for _ in range(3):
        average.observe(only(1))
    assert np.allclose(average.values, [[0.125, 0.625, 0.125, 0.125]] * LAYERS)


def test_a_long_request_counts_as_much_as_a_short_one() -> None:
    short, long = frequency(), frequency()
    short.observe(only(2))
    long.observe(only(2, count=10**6))
    assert np.array_equal(short.values, long.values) and short.values[0, 2] == 0.625


def test_a_layer_without_activations_keeps_its_average() -> None:
    average = frequency()
    counts = only(0)
    counts[1] = 0
    average.observe(counts)
    assert average.values[0, 0] == 0.625 and np.array_equal(average.values[1], np.full(EXPERTS, 0.25))


def test_values_that_were_handed_out_stay_as_they_are() -> None:
    average = frequency()
    before = average.values
    average.observe(only(0))
    before[:] = 7
    assert average.values.max() < 1


@pytest.mark.parametrize("counts", [np.ones((LAYERS, EXPERTS + 1), dtype=int), only(0, count=-1)])
def test_counts_of_another_shape_or_below_zero_are_a_bug_of_the_caller(counts: npt.NDArray[np.int64]) -> None:
    with pytest.raises(AssertionError):
        frequency().observe(counts)


@pytest.mark.parametrize("meta", [META, {"model": "one that does not say its experts"}])
def test_a_trace_is_replayed_request_by_request(tmp_path: Path, meta: object) -> None:
    expected = frequency()
    for counts in COUNTS:
        expected.observe(counts)
    path = write_trace(tmp_path / "trace.npz", meta=meta)
    assert np.array_equal(
        ActivationFrequency.from_trace(path, LAYERS, EXPERTS, half_life_requests=1).values, expected.values
    )


def test_a_trace_that_does_not_say_its_experts_may_leave_some_unused(tmp_path: Path) -> None:
    path = write_trace(tmp_path / "trace.npz", meta={})
    values = ActivationFrequency.from_trace(path, LAYERS, EXPERTS + 2).values
    assert values.shape == (LAYERS, EXPERTS + 2) and values[:, EXPERTS:].max() < values[:, :EXPERTS].min()


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"topk": TOPK[:, :1], "layer_ids": np.arange(1)}, "it has 1 MoE layers and the model has 2"),
        ({"meta": {"num_experts": 8}}, "its model has 8 experts a layer and this one has 4"),
        ({"topk": TOPK + 1, "meta": {}}, "it routes to expert 4 and a layer has 4"),
        ({"topk": TOPK + 1}, "its topk routes to experts 1 to 4 and a layer has 4"),
        ({"req": np.array([0, 2])}, "its req does not divide its 3 tokens"),
        ({"topk": None}, "it is not a routing trace"),
    ],
)
def test_a_trace_that_does_not_fit_the_model_is_refused(tmp_path: Path, changes: dict[str, Any], told: str) -> None:
    path = write_trace(tmp_path / "trace.npz", **changes)
    with pytest.raises(ConfigError, match=r"placement_trace='.*trace\.npz'") as refused:
        ActivationFrequency.from_trace(path, LAYERS, EXPERTS)
    assert told in str(refused.value) and "record one of this model" in str(refused.value)


def test_a_trace_that_is_not_there_is_refused_with_the_option_that_names_it(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"placement_trace='.*absent\.npz' is not possible: No such file or directory;"
    ):
        ActivationFrequency.from_trace(tmp_path / "absent.npz", LAYERS, EXPERTS)


def test_the_shared_traces_are_read() -> None:
    paths = sorted((shared_traces() / "own").glob("*.npz"))
    assert paths
    for path in paths:
        values = ActivationFrequency.from_trace(path, layer_count=8, expert_count=8).values
        assert np.allclose(values.sum(axis=1), 1) and values.max() > 1 / 8
