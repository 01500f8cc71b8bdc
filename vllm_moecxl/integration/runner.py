"""Between the pieces of piecewise CUDA graphs, vLLM's `MoERunner` runs by an op that graphs are cut at.

vLLM's own op, `vllm::moe_forward`, is not one of those, and must not be: it returns a new tensor each time, and the
next piece would go on reading where that of its capture was. Ours writes to memory that the piece before allocates. It
holds all that vLLM's holds, gate and router and shared experts included: what vLLM does not compile stays uncompiled,
to the last bit, and no stream that a graph has forked is still open where the graph is cut.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from vllm.compilation.breakable_cudagraph import eager_break_during_capture
from vllm.config import get_current_vllm_config
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.fused_moe.runner.moe_runner import (
    MoERunner,
    _moe_forward_fake,
    _moe_forward_shared_fake,
)
from vllm.utils.torch_utils import direct_register_custom_op

from vllm_moecxl.errors import ConfigError
from vllm_moecxl.integration.graphs import SPLITTING_OP, is_split, plan_of


class SplitRunner(MoERunner):
    """A runner whose layer, if it is offloaded, runs between graphs where those are cut; otherwise vLLM's own."""

    def _select_forward(self) -> Callable[..., Any]:
        vllm_config = get_current_vllm_config()
        if getattr(self.routed_experts, "moe_offload_runtime", None) is None:
            return super()._select_forward()
        if not is_split(vllm_config.compilation_config):
            return super()._select_forward()
        if type(self).forward is MoERunner.forward:
            return self._forward_between_graphs
        # Its forward may hide ours in an op of its own. The device's kernels may be captured in that.
        if plan_of(vllm_config).lookup == "device":
            return super()._select_forward()
        mode = vllm_config.compilation_config.cudagraph_mode
        raise ConfigError(
            f"--compilation-config: cudagraph_mode={mode} is not possible where the host looks experts up and layers "
            f"run by {type(self).__name__}, as {self.layer_name} does: use cudagraph_mode NONE"
        )

    def _forward_between_graphs(
        self,
        hidden_states: torch.Tensor,
        router_logits: torch.Tensor,
        shared_experts_input: torch.Tensor | None,
        input_ids: torch.Tensor | None,
        layer_name: Any,
        hidden_dim_unpadded: int,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """What `vllm::moe_forward` and `vllm::moe_forward_shared` compute."""
        # vLLM's stand-ins allocate what its ops return.
        arguments = (
            hidden_states,
            router_logits,
            shared_experts_input,
            input_ids,
            layer_name,
            hidden_dim_unpadded,
        )
        shared_out: torch.Tensor | None = None
        if self._shared_experts is None:
            out = _moe_forward_fake(*arguments)
        else:
            shared_out, out = _moe_forward_shared_fake(*arguments)
        torch.ops.moecxl.moe_forward_out(
            hidden_states, router_logits, shared_experts_input, input_ids, out, shared_out, self.layer_name
        )
        return out if shared_out is None else (shared_out, out)


def _run(
    hidden_states: torch.Tensor,
    router_logits: torch.Tensor,
    shared_experts_input: torch.Tensor | None,
    input_ids: torch.Tensor | None,
    out: torch.Tensor,
    shared_out: torch.Tensor | None,
    layer_name: str,
) -> None:
    layer = get_forward_context().no_compile_layers[layer_name]
    result = layer._forward_impl(hidden_states, router_logits, shared_experts_input, input_ids)
    if shared_out is not None:
        shared, result = result
        shared_out.copy_(shared)
    out.copy_(result)


def _moe_forward_out(
    hidden_states: torch.Tensor,
    router_logits: torch.Tensor,
    shared_experts_input: torch.Tensor | None,
    input_ids: torch.Tensor | None,
    out: torch.Tensor,
    shared_out: torch.Tensor | None,
    layer_name: str,
) -> None:
    # Decorated now, not when it is defined: what it asks for is known once an engine is configured.
    eager_break_during_capture(_run)(
        hidden_states, router_logits, shared_experts_input, input_ids, out, shared_out, layer_name
    )


def _moe_forward_out_fake(
    hidden_states: torch.Tensor,
    router_logits: torch.Tensor,
    shared_experts_input: torch.Tensor | None,
    input_ids: torch.Tensor | None,
    out: torch.Tensor,
    shared_out: torch.Tensor | None,
    layer_name: str,
) -> None:
    return None


# The library owns the op: it lives as long as this module does.
_LIBRARY = torch.library.Library("moecxl", "FRAGMENT")  # type: ignore[no-untyped-call]
direct_register_custom_op(
    op_name=SPLITTING_OP.partition("::")[2],
    op_func=_moe_forward_out,
    mutates_args=["out", "shared_out"],
    fake_impl=_moe_forward_out_fake,
    target_lib=_LIBRARY,
)
