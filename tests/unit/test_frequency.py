"""Activation frequencies: what an observation does, and which traces are refused."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from vllm_moecxl.control.frequency import ActivationFrequency
from vllm_moecxl.errors import ConfigError

LAYERS, EXPERTS = 2, 4
#: Two requests of two and one tokens.
TOPK = np.array([[[0, 1], [2, 3]], [[0, 2], [2, 0]], [[3, 1], [1, 0]]], dtype=np.uint8)
COUNTS = np.array([[[2, 1, 1, 0], [1, 0, 2, 1]], [[0, 1, 0, 1], [1, 1, 0, 0]]])


def write_trace(path: Path, *, meta: object = None, **changes: Any) -> Path:
    """A trace in the format of `shared/traces/README.md`; a change of None leaves a field out."""
    fields: dict[str, Any] = {
        "topk": TOPK,
        "weights": np.empty(0, dtype=np.float16),
        "req": np.array([0, 2, 3], dtype=np.int32),
        "prefill": np.zeros(2, dtype=np.int32),
        "token_ids": np.full(3, -1, dtype=np.int32),
        "layer_ids": np.arange(LAYERS, dtype=np.int32),
        "meta": np.array(json.dumps({"model": "toy", "num_experts": EXPERTS} if meta is None else meta)),
    }
    np.savez(path, **{name: value for name, value in (fields | changes).items() if value is not None})
    return path


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


@pytest.mark.parametrize("meta", [None, {"model": "one that does not say its experts"}])
def test_a_trace_is_replayed_request_by_request(tmp_path: Path, meta: object) -> None:
    expected = frequency()
    for counts in COUNTS:
        expected.observe(counts)
    path = write_trace(tmp_path / "trace.npz", meta=meta)
    assert np.array_equal(
        ActivationFrequency.from_trace(path, LAYERS, EXPERTS, half_life_requests=1).values, expected.values
    )


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"topk": TOPK[:, :1]}, "it has 1 MoE layers and the model has 2"),
        ({"meta": {"num_experts": 8}}, "its model has 8 experts a layer and this one has 4"),
        ({"topk": TOPK + 1}, "it routes to experts 1 to 4 and a layer has 4"),
        ({"topk": TOPK.astype(np.int8) - 1}, "it routes to experts -1 to 2 and a layer has 4"),
        ({"topk": TOPK[0]}, "its topk is not"),
        ({"topk": TOPK.astype(np.float32)}, "its topk is not"),
        ({"req": np.array([[0, 3]])}, "its topk is not"),
        ({"req": np.array([0.0, 3.0])}, "its topk is not"),
        ({"req": np.array([], dtype=np.int32)}, "its req does not divide its 3 tokens"),
        ({"req": np.array([1, 3])}, "its req does not divide its 3 tokens"),
        ({"req": np.array([0, 2])}, "its req does not divide its 3 tokens"),
        ({"req": np.array([0, 3, 2, 3])}, "its req does not divide its 3 tokens"),
        ({"topk": None}, "it is not a routing trace"),
        ({"req": None}, "it is not a routing trace"),
        ({"meta": [1]}, "it is not a routing trace"),
        ({"topk": np.array([{"an": "object"}])}, "it is not a routing trace"),
    ],
)
def test_a_trace_that_does_not_fit_the_model_is_refused(tmp_path: Path, changes: dict[str, Any], told: str) -> None:
    path = write_trace(tmp_path / "trace.npz", **changes)
    with pytest.raises(ConfigError, match=r"placement_trace='.*trace\.npz'") as refused:
        ActivationFrequency.from_trace(path, LAYERS, EXPERTS)
    assert told in str(refused.value) and "record one of this model" in str(refused.value)


@pytest.mark.parametrize("content", [b"", b"no archive at all", b"PK\x03\x04 cut short", b"\x80\x04N."])
def test_a_file_of_another_kind_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "trace.npz"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match="it is not a routing trace"):
        ActivationFrequency.from_trace(path, LAYERS, EXPERTS)


def test_a_single_array_is_refused(tmp_path: Path) -> None:
    np.save(path := tmp_path / "topk.npy", TOPK)
    with pytest.raises(ConfigError, match="it is not a routing trace"):
        ActivationFrequency.from_trace(path, LAYERS, EXPERTS)


def test_a_damaged_trace_is_refused_wherever_it_is_cut_short(tmp_path: Path) -> None:
    whole = write_trace(tmp_path / "whole.npz").read_bytes()
    path = tmp_path / "cut.npz"
    for size in range(0, len(whole), 97):
        path.write_bytes(whole[:size])
        with pytest.raises(ConfigError, match="it is not a routing trace"):
            ActivationFrequency.from_trace(path, LAYERS, EXPERTS)


def test_a_damaged_archive_is_refused_or_read_and_nothing_else(tmp_path: Path) -> None:
    whole = write_trace(tmp_path / "whole.npz").read_bytes()
    path = tmp_path / "damaged.npz"
    refused = 0
    start = whole.index(b"PK\x01\x02")  # the first entry of the archive's directory
    for place in range(start, start + 50):
        path.write_bytes(whole[:place] + b"c" + whole[place + 1 :])
        try:
            ActivationFrequency.from_trace(path, LAYERS, EXPERTS)
        except ConfigError:
            refused += 1
    assert refused > 20


def test_damaged_data_in_a_compressed_trace_is_refused(tmp_path: Path) -> None:
    with np.load(write_trace(tmp_path / "plain.npz")) as plain:
        np.savez_compressed(path := tmp_path / "trace.npz", **plain)
    assert ActivationFrequency.from_trace(path, LAYERS, EXPERTS)
    content = path.read_bytes()
    start = content.index(b"topk.npy") + len("topk.npy") + 30
    path.write_bytes(content[:start] + b"\xff" * 30 + content[start + 30 :])
    with pytest.raises(ConfigError, match="it is not a routing trace"):
        ActivationFrequency.from_trace(path, LAYERS, EXPERTS)


@pytest.mark.parametrize(("name", "told"), [("absent.npz", "No such file or directory"), ("", "Is a directory")])
def test_a_path_that_cannot_be_read_is_refused(tmp_path: Path, name: str, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        ActivationFrequency.from_trace(tmp_path / name, LAYERS, EXPERTS)


def test_the_shared_traces_are_read() -> None:
    folder = Path(__file__).parents[3] / "shared" / "traces"
    if not folder.is_dir():
        pytest.skip("no folder shared/traces beside the checkout")
    paths = sorted((folder / "own").glob("*.npz"))
    assert paths
    for path in paths:
        values = ActivationFrequency.from_trace(path, layer_count=8, expert_count=8).values
        assert np.allclose(values.sum(axis=1), 1) and values.max() > 1 / 8
