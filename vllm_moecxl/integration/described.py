"""Describe one of vLLM's expert layers to the runtime."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase
from vllm.model_executor.layers.fused_moe.moe_output import UnfinalizedMoEOutput
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts

from vllm_moecxl.control.account import LayerNeed
from vllm_moecxl.data.slabfile import PackedLayer
from vllm_moecxl.errors import IntegrityError, UnsupportedModelError
from vllm_moecxl.integration.kernels import exact_pass_kind
from vllm_moecxl.integration.scan import per_expert_tensors, shared_tensors, tensors_by_name
from vllm_moecxl.runtime.runtime import LoadedLayer


def need_of(layer: RoutedExperts) -> LayerNeed:
    """What a layer is made of, as the checkpoint has it; its parameters have just been created."""
    expert_count = layer.local_num_experts
    layer_bytes = sum(p.nbytes for p in layer.parameters() if p.dim() > 0 and p.shape[0] == expert_count and p.is_meta)
    return LayerNeed(layer.layer_name, expert_count, layer.top_k, layer_bytes // expert_count)


def describe_layer(layer: RoutedExperts, method: FusedMoEMethodBase, packed: PackedLayer | None = None) -> LoadedLayer:
    """Describe a processed layer to the runtime.

    Args:
        packed: the layer in a slab file, if the layer itself has only stand-ins.

    Raises:
        UnsupportedModelError: the kernel or a tensor of it cannot work from slots.
        IntegrityError: the slab file is of another kernel.
    """
    if method.moe_kernel is None or method.is_monolithic:
        raise UnsupportedModelError(
            f"--moe-offload: {type(method).__name__} of {layer.layer_name} has no kernel that takes routed tokens "
            "(it routes by itself), so its experts cannot be served from slots: use --moe-backend triton or another"
        )
    kernel_name = type(method.moe_kernel.fused_experts).__name__
    groups = per_expert_tensors(layer, layer.local_num_experts) if packed is None else _packed_tensors(layer, packed)
    if packed is not None and packed.kernel_name != kernel_name:
        raise IntegrityError(
            f"--moe-offload-config: the slab file was packed for {packed.kernel_name} and this engine runs "
            f"{layer.layer_name} with {kernel_name}: run moecxl pack again with the engine's own options"
        )

    def run_kernel(x: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor) -> torch.Tensor:
        output = method.apply(
            layer=layer,
            x=x,
            topk_weights=topk_weights,
            topk_ids=topk_ids,
            shared_experts=None,
            shared_experts_input=None,
        )
        if isinstance(output, UnfinalizedMoEOutput):
            raise UnsupportedModelError(
                f"--moe-offload: {kernel_name} leaves the sum over experts to a later kernel, which cannot be done "
                "from slots: use another --moe-backend"
            )
        return output

    targets = tuple(groups.values())

    def bind(rows: Sequence[torch.Tensor]) -> None:
        for objects, tensor in zip(targets, rows, strict=True):
            for target in objects:
                target.data = tensor

    return LoadedLayer(
        name=layer.layer_name,
        expert_count=layer.local_num_experts,
        topk=layer.top_k,
        tensors={name: objects[0].data for name, objects in groups.items()},
        kernel=run_kernel,
        bind=bind,
        kernel_name=kernel_name,
        pass_kind=exact_pass_kind(kernel_name),
        hidden_size=layer.hidden_size,
        dtype=layer.moe_config.in_dtype,
        packed=packed,
        shared=shared_tensors(layer, groups),
    )


def _packed_tensors(layer: RoutedExperts, packed: PackedLayer) -> dict[str, list[torch.Tensor]]:
    """The kernel's tensors that rows of the slab file are to be bound to.

    Raises:
        IntegrityError: their rows look different.
    """
    groups = tensors_by_name(layer, [extent.name for extent in packed.layout.extents])
    for extent in packed.layout.extents:
        stand_in = groups[extent.name][0]
        if tuple(stand_in.shape[1:]) != extent.row_shape or stand_in.dtype != extent.dtype:
            raise IntegrityError(
                f"--moe-offload-config: the slab file's rows of {extent.name} of {layer.layer_name} are "
                f"{list(extent.row_shape)} {extent.dtype}, and this engine's {list(stand_in.shape[1:])} "
                f"{stand_in.dtype}: run moecxl pack again with the engine's own options"
            )
    return groups
