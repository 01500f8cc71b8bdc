"""The layers that take the place of vLLM's `RoutedExperts` and `MoERunner`, by vLLM's out-of-tree registry."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from vllm.forward_context import get_forward_context
from vllm.model_executor.custom_op import PluggableLayer, op_registry_oot
from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner
from vllm.utils.torch_utils import direct_register_custom_op

from vllm_moecxl.errors import UnsupportedModelError
from vllm_moecxl.integration.buffered import BufferedParameters
from vllm_moecxl.integration.graphs import padding_mask
from vllm_moecxl.integration.loading import load_to_homes
from vllm_moecxl.integration.packed import load_from_file
from vllm_moecxl.integration.runner import SplitRunner
from vllm_moecxl.runtime.device_driven.dispatch import DeviceDispatch
from vllm_moecxl.runtime.dispatch import Dispatch, over_padding
from vllm_moecxl.runtime.packing import Packer
from vllm_moecxl.runtime.runtime import OffloadRuntime


@dataclass
class ModelUnderConstruction:
    """What the MoE layers of one model have in common while it is built and loaded."""

    runtime: OffloadRuntime | Packer
    buffered: list[BufferedParameters] = field(default_factory=list)


#: The model that layers under construction belong to; None while an engine without offloading builds its model.
_BUILDING: ContextVar[ModelUnderConstruction | None] = ContextVar("moe_offload_model", default=None)


@contextmanager
def building(runtime: OffloadRuntime | Packer) -> Iterator[ModelUnderConstruction]:
    """Give every MoE layer that is constructed inside to `runtime`."""
    model = ModelUnderConstruction(runtime)
    token = _BUILDING.set(model)
    try:
        yield model
    finally:
        _BUILDING.reset(token)


class SlotExperts(RoutedExperts):
    """Routed experts that run from slots, if a runtime was there when they were built; otherwise vLLM's own."""

    moe_offload_runtime: OffloadRuntime | Packer | None = None
    moe_offload_dispatch: Dispatch | DeviceDispatch | None = None

    def _get_quant_method(self, prefix: str, quant_config: Any, moe_config: Any) -> FusedMoEMethodBase:
        model = _BUILDING.get()
        if model is None:
            return super()._get_quant_method(prefix, quant_config, moe_config)
        _refuse_layer_features(self, moe_config)
        # Kernels that route by themselves cannot be told which slot an expert is in: vLLM picks another class then.
        decomposed = (
            "require_decomposed_backend" if hasattr(moe_config, "require_decomposed_backend") else "has_hash_routing"
        )
        setattr(moe_config, decomposed, True)
        method = super()._get_quant_method(prefix, quant_config, moe_config)
        # Past nn.Module's own attribute handling: neither is a parameter, and the runtime is not copied with the layer.
        object.__setattr__(self, "moe_offload_runtime", model.runtime)

        def adopt(dispatch: Dispatch | DeviceDispatch) -> None:
            object.__setattr__(self, "moe_offload_dispatch", dispatch)

        if isinstance(model.runtime, OffloadRuntime) and model.runtime.slab_file is not None:
            load_from_file(method, self, model.runtime, adopt)
        else:
            load_to_homes(method, self, model.runtime, model.buffered.append, adopt)
        return method

    def forward_modular(
        self,
        x: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        shared_experts: Any = None,
        shared_experts_input: torch.Tensor | None = None,
    ) -> Any:
        if self.moe_offload_runtime is None:
            return super().forward_modular(x, topk_weights, topk_ids, shared_experts, shared_experts_input)
        if torch.compiler.is_compiling():
            # Dynamo may not trace into dispatch; the router stays outside the op, so that it fuses as without us.
            return torch.ops.moecxl.routed_experts(x, topk_weights, topk_ids, self.layer_name)
        return self.run_from_slots(x, topk_weights, topk_ids)

    def run_from_slots(self, x: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor) -> torch.Tensor:
        """Compute the layer, see `Dispatch.__call__` and `DeviceDispatch.__call__`."""
        dispatch = self.moe_offload_dispatch
        if dispatch is None:
            raise UnsupportedModelError(
                f"--moe-offload: the experts of {self.layer_name} were never loaded: this load format passes vLLM's "
                "weight processing by, use --load-format auto"
            )
        is_padding = padding_mask(x)
        is_rehearsal = get_forward_context().attn_metadata is None  # vLLM's own dummy runs
        if isinstance(dispatch, DeviceDispatch):
            # A graph replays what its capture launched, dummy inputs or not: the look-up has to be among it.
            if not is_rehearsal or dispatch.is_capturing():
                return dispatch(x, topk_weights, topk_ids, is_padding=is_padding)
            return dispatch.rehearse(x, topk_weights, over_padding(topk_ids, is_padding))
        topk_ids = over_padding(topk_ids, is_padding)
        return (dispatch.rehearse if is_rehearsal else dispatch)(x, topk_weights, topk_ids)


def register_layers() -> None:
    """Put our classes in the place of vLLM's and of each subclass that has been imported by now.

    The registry goes by class name and does not cover subclasses, so each gets a class of its own. That class keeps the
    name: compressed-tensors, for one, finds a layer's scheme by it.
    """
    for original, ours in ((RoutedExperts, SlotExperts), (MoERunner, SplitRunner)):
        for base in _with_subclasses(original):
            if not issubclass(base, ours):
                _register(base, ours, is_original=base is original)


def _register(base: type[Any], ours: type[Any], *, is_original: bool) -> None:
    taken = op_registry_oot.get(base.__name__)
    if taken is None:
        bases = (ours,) if is_original else (ours, base)
        PluggableLayer.register_oot(type(base.__name__, bases, {"__module__": __name__}), name=base.__name__)
    elif not issubclass(taken, ours):
        raise UnsupportedModelError(
            f"--moe-offload: {taken.__module__}.{taken.__name__} of another plugin already replaces vLLM's "
            f"{base.__name__}: deactivate that plugin with VLLM_PLUGINS"
        )


def _with_subclasses(base: type[Any]) -> Iterator[type[Any]]:
    yield base
    for subclass in base.__subclasses__():
        yield from _with_subclasses(subclass)


def _refuse_layer_features(layer: RoutedExperts, moe_config: Any) -> None:
    """Features of one layer that change what its rows of experts are.

    Raises:
        UnsupportedModelError: by the feature's name.
    """
    if super(SlotExperts, layer).forward_modular.__func__ is not RoutedExperts.forward_modular:
        raise UnsupportedModelError(
            f"--moe-offload: {type(layer).__name__} of {layer.layer_name} does more than run its experts, which slots "
            "would pass over: serve this model without --moe-offload"
        )
    features = {
        "expert parallelism (--enable-expert-parallel)": moe_config.moe_parallel_config.use_ep,
        "EPLB (--enable-eplb)": moe_config.moe_parallel_config.enable_eplb,
        "LoRA on experts (--enable-lora)": moe_config.is_lora_enabled,
        "shared experts fused into the routed ones": layer.expert_map_manager.num_fused_shared_experts > 0,
    }
    for feature, is_used in features.items():
        if is_used:
            raise UnsupportedModelError(
                f"--moe-offload: {layer.layer_name} uses {feature}, which cannot be served from slots: turn it off"
            )


def _routed_experts(
    x: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor, layer_name: str
) -> torch.Tensor:
    experts = get_forward_context().no_compile_layers[layer_name].routed_experts
    return experts.run_from_slots(x, topk_weights, topk_ids)


def _routed_experts_fake(
    x: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor, layer_name: str
) -> torch.Tensor:
    return torch.empty_like(x)


# The library owns the op: it lives as long as this module does.
_LIBRARY = torch.library.Library("moecxl", "FRAGMENT")  # type: ignore[no-untyped-call]
direct_register_custom_op(
    op_name="routed_experts",
    op_func=_routed_experts,
    fake_impl=_routed_experts_fake,
    target_lib=_LIBRARY,
)
