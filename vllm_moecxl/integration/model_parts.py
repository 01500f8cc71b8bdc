"""Parts of a model that predictors use: the routers of its MoE layers, and its token embeddings."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from vllm.model_executor.layers.fused_moe import GateLinear
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

from vllm_moecxl.runtime.lookahead import Gate

#: Unit vectors that a packed gate is shown at a time.
_UNIT_COUNT = 512
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


def find_embedding(
    model: torch.nn.Module,
) -> Callable[[npt.NDArray[np.int64]], npt.NDArray[np.float32]] | None:
    """[tokens] ids -> [tokens, hidden] the model's token embeddings; None where this rank does not have them all."""
    for module in model.modules():
        if isinstance(module, VocabParallelEmbedding) and not isinstance(module, ParallelLMHead):
            weight = module.weight.detach()
            if weight.shape[0] < module.org_vocab_size or not weight.is_floating_point():
                return None
            return lambda token_ids: weight[torch.from_numpy(token_ids).to(weight.device)].float().cpu().numpy()
    return None


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
    if gate is None:
        return None
    weight, bias = _weights(gate)
    scale = getattr(norm, "weight", None)
    if not isinstance(scale, torch.Tensor) or scale.shape != weight.shape[1:]:
        scale = None
    return Gate(weight, bias, None if scale is None else scale.detach())


@torch.inference_mode()
def _weights(gate: GateLinear) -> tuple[torch.Tensor, torch.Tensor | None]:
    """[experts, hidden] and [experts]: a linear layer's weights, asked for by what it makes of unit vectors where the
    engine has packed them into a form of its own (vLLM's CPU engine), or quantised them."""
    bias = getattr(gate, "bias", None)
    bias = None if bias is None else bias.detach()
    weight = getattr(gate, "weight", None)
    if isinstance(weight, torch.Tensor) and weight.dim() == 2 and weight.is_floating_point():
        return weight.detach(), bias
    dtype, device = gate.params_dtype, next(gate.parameters()).device

    def run(x: torch.Tensor) -> torch.Tensor:
        output = gate(x)
        logits: torch.Tensor = output[0] if isinstance(output, tuple) else output
        return logits.float()

    parts = []
    for start in range(0, gate.input_size, _UNIT_COUNT):
        units = torch.zeros(min(_UNIT_COUNT, gate.input_size - start), gate.input_size, dtype=dtype, device=device)
        units[torch.arange(len(units)), torch.arange(start, start + len(units))] = 1
        parts.append(run(units))
    constant = run(torch.zeros(1, gate.input_size, dtype=dtype, device=device))
    return (torch.cat(parts) - constant).T.to(dtype), constant[0] if bias is None and constant.any() else bias
