"""The routers of a model's MoE layers, found beside their experts."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from vllm.model_executor.layers.fused_moe import GateLinear
from vllm.model_executor.layers.layernorm import GemmaRMSNorm

from vllm_moecxl.runtime.lookahead import Gate

#: Names under which decoder layers keep the norm in front of their MoE block.
_NORM_NAMES = ("post_attention_layernorm", "pre_feedforward_layernorm", "pre_mlp_layernorm", "ffn_norm")


def find_gates(model: torch.nn.Module, layer_names: Iterable[str]) -> list[Gate | None]:
    """The gate of each MoE layer, None where it is not of the common kind.

    Args:
        model: the loaded model.
        layer_names: of its layers of routed experts.
    """
    modules = dict(model.named_modules())
    return [_find_gate(modules, name) for name in layer_names]


def _find_gate(modules: dict[str, Any], layer_name: str) -> Gate | None:
    path = layer_name.split(".")
    gate = norm = None
    for length in range(len(path) - 1, 0, -1):
        parent = ".".join(path[:length])
        if gate is None:
            children = dict(modules[parent].named_children()) if parent in modules else {}
            gate = next((child for child in children.values() if isinstance(child, GateLinear)), None)
        norm = next((modules[f"{parent}.{name}"] for name in _NORM_NAMES if f"{parent}.{name}" in modules), None)
        if norm is not None:
            break
    weight = getattr(gate, "weight", None)
    if not isinstance(weight, torch.Tensor) or not weight.is_floating_point() or weight.dim() != 2:
        return None
    scale = getattr(norm, "weight", None)
    if not isinstance(scale, torch.Tensor) or scale.shape != weight.shape[1:]:
        scale = None
    elif isinstance(norm, GemmaRMSNorm):  # scales by one more than its weight
        scale = scale.float() + 1
    bias = getattr(gate, "bias", None)
    return Gate(weight.detach(), None if bias is None else bias.detach(), None if scale is None else scale.detach())
