"""Gates applied early: the same on the device and beside it, and nothing where there is nothing to go by."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from vllm_moecxl.runtime.lookahead import Gate, GateLookahead

HIDDEN_SIZE, EXPERT_COUNT = 6, 4


def gate(
    seed: int,
    *,
    bias: bool = False,
    norm: bool = False,
    experts: int = EXPERT_COUNT,
    dtype: torch.dtype = torch.float32,
) -> Gate:
    generator = torch.Generator().manual_seed(seed)
    return Gate(
        torch.randn(experts, HIDDEN_SIZE, generator=generator).to(dtype),
        torch.randn(experts, generator=generator).to(dtype) if bias else None,
        (torch.rand(HIDDEN_SIZE, generator=generator) + 0.5).to(dtype) if norm else None,
    )


def inputs(token_count: int = 3, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(token_count, HIDDEN_SIZE, generator=torch.Generator().manual_seed(9)).to(dtype)


def both(lookahead: GateLookahead, layer_id: int, x: torch.Tensor) -> tuple[np.ndarray | None, np.ndarray | None]:
    return lookahead.on_host(layer_id, x.float().numpy()), lookahead.on_device(layer_id, x)


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("reach", [1, 2, 5])
def test_the_host_says_what_the_device_does_and_both_what_the_gates_do(reach: int, *, bias: bool, norm: bool) -> None:
    gates = [gate(seed, bias=bias, norm=norm) for seed in range(4)]
    lookahead = GateLookahead(gates, reach)
    x = inputs()
    for layer_id in range(3):
        expected = []
        for following in gates[layer_id + 1 : layer_id + 1 + reach]:
            scaled = x if not norm else x / gates[layer_id].norm * following.norm
            expected.append(torch.nn.functional.linear(scaled, following.weight, following.bias).numpy())
        for scores in both(lookahead, layer_id, x):
            assert scores is not None and scores.dtype == np.float32
            np.testing.assert_allclose(scores, np.array(expected), rtol=1e-4, atol=1e-5)


def test_in_half_precision_they_differ_by_rounding_alone() -> None:
    lookahead = GateLookahead([gate(seed, bias=True, norm=True, dtype=torch.bfloat16) for seed in range(3)], 2)
    on_host, on_device = both(lookahead, 0, inputs(dtype=torch.bfloat16))
    assert on_host is not None and on_device is not None
    np.testing.assert_allclose(on_host, on_device, atol=0.1)


def test_after_the_last_layer_there_is_nothing_to_see() -> None:
    lookahead = GateLookahead([gate(0), gate(1)], 2)
    assert [scores is None for scores in both(lookahead, 0, inputs())] == [False, False]
    assert both(lookahead, 1, inputs()) == (None, None)


@pytest.mark.parametrize("unknown", [0, 1, 2])
def test_a_gate_that_nobody_knows_shifts_no_other_one(unknown: int) -> None:
    gates: list[Gate | None] = [gate(seed, norm=True) for seed in range(3)]
    gates[unknown] = None
    for scores in both(GateLookahead(gates, 2), 0, inputs()):
        # Without the layer's own there is no scale to bring its input to.
        assert (scores is None) is (unknown > 0)


def test_gates_of_different_shapes_are_not_told_together() -> None:
    lookahead = GateLookahead([gate(0), gate(1), gate(2, experts=EXPERT_COUNT + 1)], 2)
    assert both(lookahead, 0, inputs()) == (None, None)
    for scores in both(lookahead, 1, inputs()):
        assert scores is not None and scores.shape == (1, 3, EXPERT_COUNT + 1)


def test_experts_that_see_less_than_their_gate_does_say_nothing_about_the_next() -> None:
    lookahead = GateLookahead([gate(0), gate(1)], 1)
    assert both(lookahead, 0, inputs()[:, :-1]) == (None, None)


def test_a_norm_of_another_width_is_left_out() -> None:
    here, following = gate(0, norm=True), gate(1, norm=True)
    lookahead = GateLookahead([Gate(here.weight, None, torch.ones(HIDDEN_SIZE + 1)), following], 1)
    for scores in both(lookahead, 0, inputs()):
        assert scores is not None
        np.testing.assert_allclose(scores[0], (inputs() @ following.weight.T).numpy(), rtol=1e-4, atol=1e-5)


def test_a_channel_that_is_scaled_to_nothing_here_says_nothing_about_the_next_layer() -> None:
    here, following = gate(0, norm=True), gate(1, norm=True)
    assert here.norm is not None and following.norm is not None
    here.norm[2] = 0.0
    x = inputs()
    x[:, 2] = 0.0
    expected = x / torch.where(here.norm == 0, 1, here.norm) * following.norm @ following.weight.T
    for scores in both(GateLookahead([here, following], 1), 0, x):
        assert scores is not None and np.isfinite(scores).all()
        np.testing.assert_allclose(scores[0], expected.numpy(), rtol=1e-4, atol=1e-5)


def test_a_model_without_gates_has_no_lookahead() -> None:
    assert both(GateLookahead([], 2), 0, inputs()) == (None, None)
    assert both(GateLookahead([None] * 3, 2), 0, inputs()) == (None, None)
