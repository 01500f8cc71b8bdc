"""Every tensor that belongs to an expert is found, and a layer with one that is not understood is refused by name."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from vllm_moecxl.errors import UnsupportedModelError

_EXPERT_COUNT = 4


def _layer(**parameters: torch.Tensor) -> Any:
    layer = torch.nn.Module()
    for name, tensor in parameters.items():
        layer.register_parameter(name, torch.nn.Parameter(tensor, requires_grad=False))
    layer.layer_name = "model.layers.0.experts"
    quant_config = SimpleNamespace()
    kernel = SimpleNamespace(fused_experts=SimpleNamespace(quant_config=quant_config))
    layer.quant_method = SimpleNamespace(moe_kernel=kernel)
    return layer


def _scan(layer: Any) -> dict[str, list[torch.Tensor]]:
    from vllm_moecxl.integration.scan import per_expert_tensors

    return per_expert_tensors(layer, _EXPERT_COUNT)


def _weights() -> dict[str, torch.Tensor]:
    return {"w13_weight": torch.ones(_EXPERT_COUNT, 6, 2), "w2_weight": torch.ones(_EXPERT_COUNT, 2, 3)}


def test_rows_of_the_router_and_shared_values_stay_where_they_are() -> None:
    layer = _layer(
        **_weights(),
        e_score_correction_bias=torch.arange(float(_EXPERT_COUNT)),
        w13_input_scale=torch.tensor(1.0).expand(_EXPERT_COUNT),
        w2_input_scale=torch.tensor(2.0),
    )
    assert set(_scan(layer)) == {"w13_weight", "w2_weight"}


def test_an_alias_that_the_kernel_holds_is_bound_together_with_its_parameter() -> None:
    layer = _layer(**_weights())
    alias = layer.w2_weight.data
    layer.quant_method.moe_kernel.fused_experts.w2 = alias
    assert any(tensor is alias for tensor in _scan(layer)["w2_weight"])


def test_a_tensor_that_only_the_kernel_holds_moves_with_its_expert() -> None:
    layer = _layer(**_weights())
    layer.quant_method.moe_kernel.fused_experts.alpha = alpha = torch.arange(float(_EXPERT_COUNT))
    assert _scan(layer)["kernel.alpha"] == [alpha]


def _hold_view(layer: Any) -> None:
    layer.quant_method.moe_kernel.fused_experts.half = layer.w13_weight.data[:, :3]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda layer: layer.register_parameter("w3", torch.nn.Parameter(torch.ones(5, 2))), r"w3 \[5, 2\]"),
        (
            lambda layer: layer.register_parameter(
                "w3", torch.nn.Parameter(torch.ones(3, _EXPERT_COUNT, 2).transpose(0, 1))
            ),
            r"w3 \[4, 3, 2\]",
        ),
        (_hold_view, "kernel.half, a view of w13_weight"),
        (
            lambda layer: setattr(layer.quant_method.moe_kernel.fused_experts, "flat", torch.ones(2 * _EXPERT_COUNT)),
            r"kernel.flat \[8\]",
        ),
        (
            lambda layer: layer.register_parameter(
                "w2_input_scale", torch.nn.Parameter(torch.arange(float(_EXPERT_COUNT)))
            ),
            r"w2_input_scale \[4\]",
        ),
    ],
    ids=["other rows", "strided rows", "a view", "several rows an expert", "different input scales"],
)
def test_a_layout_that_is_not_understood_is_refused_by_name(change: Callable[[Any], None], named: str) -> None:
    layer = _layer(**_weights())
    change(layer)
    with pytest.raises(UnsupportedModelError, match=f"tensor {named}.* of model.layers.0.experts"):
        _scan(layer)
