"""Load experts one layer at a time and take them home, with vLLM's own loaders and post-processing.

vLLM's layerwise processing (made for online quantisation) does the work: parameters are created on the meta device,
loaders are buffered until a layer is complete, then that one layer is materialised on the device, loaded, converted to
the kernel's format by the quantisation method itself, and handed to us.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from vllm.config import get_current_vllm_config
from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase
from vllm.model_executor.layers.fused_moe.moe_output import UnfinalizedMoEOutput
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

from vllm_moecxl.control.account import LayerNeed
from vllm_moecxl.data.host import FileMappings, trim_heap
from vllm_moecxl.data.slabs import Cells, Home
from vllm_moecxl.errors import UnsupportedModelError
from vllm_moecxl.integration.buffered import BufferedParameters
from vllm_moecxl.integration.initial_values import InitialValues
from vllm_moecxl.integration.kernels import exact_pass_kind
from vllm_moecxl.integration.scan import per_expert_tensors
from vllm_moecxl.runtime.dispatch import Dispatch
from vllm_moecxl.runtime.runtime import LoadedLayer, OffloadRuntime


def load_to_homes(
    method: FusedMoEMethodBase,
    layer: RoutedExperts,
    runtime: OffloadRuntime,
    register: Callable[[BufferedParameters], None],
    adopt: Callable[[Dispatch], None],
) -> None:
    """Change one quantisation method object so that its layer's experts end up at home.

    Methods are wrapped on the instance: vLLM's loaders look at the class name of the method, so it may not change.

    Args:
        register: called once with the layer's parameters, when they have been created.
        adopt: called once with the layer's dispatch, when its experts are home.
    """
    create_weights = method.create_weights
    process_weights = method.process_weights_after_loading
    is_dummy = get_current_vllm_config().load_config.load_format == "dummy"
    buffered: list[BufferedParameters] = []
    is_home = False

    @wraps(create_weights)
    def create_on_meta(*args: Any, **kwargs: Any) -> None:
        # The router's parameters may be on the layer already; they are loaded with the router.
        before = set(layer._parameters)
        with InitialValues() as initial:
            create_weights(*args, **kwargs)
        names = [name for name, p in layer._parameters.items() if p is not None and name not in before]
        buffered.append(BufferedParameters(layer, names, initial, is_dummy=is_dummy))
        register(buffered[0])
        runtime.declare(_need(layer))

    @wraps(process_weights)
    def process_and_take_home(_: torch.nn.Module) -> None:
        nonlocal is_home
        if is_home:  # the loader's last step visits every layer again
            return
        buffered[0].close()
        _give_back_sources(layer)
        process_weights(layer)
        adopt(runtime.install(_loaded_layer(layer, method)))
        trim_heap()
        is_home = True

    method.create_weights = create_on_meta
    method.process_weights_after_loading = process_and_take_home
    method.uses_meta_device = True
    # Without this, vLLM would move our cells to the device and back around the processing step.
    method.requires_device_loading = False


def _need(layer: RoutedExperts) -> LayerNeed:
    expert_count = layer.local_num_experts
    layer_bytes = sum(p.nbytes for p in layer.parameters() if p.dim() > 0 and p.shape[0] == expert_count and p.is_meta)
    return LayerNeed(layer.layer_name, expert_count, layer.top_k, layer_bytes // expert_count)


def _loaded_layer(layer: RoutedExperts, method: FusedMoEMethodBase) -> LoadedLayer:
    """Describe a processed layer to the runtime.

    Raises:
        UnsupportedModelError: the kernel or a tensor of it cannot work from slots.
    """
    if method.moe_kernel is None or method.is_monolithic:
        raise UnsupportedModelError(
            f"--moe-offload: {type(method).__name__} of {layer.layer_name} has no kernel that takes routed tokens "
            "(it routes by itself), so its experts cannot be served from slots: use --moe-backend triton or another"
        )
    kernel_name = type(method.moe_kernel.fused_experts).__name__
    groups = per_expert_tensors(layer, layer.local_num_experts)

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

    def bind(rows: Cells | Home) -> None:
        for objects, tensor in zip(targets, rows.tensors, strict=True):
            for target in objects:
                target.data = tensor

    return LoadedLayer(
        name=layer.layer_name,
        topk=layer.top_k,
        tensors={name: objects[0].data for name, objects in groups.items()},
        kernel=run_kernel,
        bind=bind,
        kernel_name=kernel_name,
        pass_kind=exact_pass_kind(kernel_name),
        hidden_size=layer.hidden_size,
        dtype=layer.moe_config.in_dtype,
    )


def _give_back_sources(layer: RoutedExperts) -> None:
    """Let go of the checkpoint tensors of a layer that has their contents by now, and drop their mapped pages.

    The buffered calls also hold the parameters as loaded, of which processing is about to make others.
    """
    buffered = get_layerwise_info(layer).loaded_weights
    mappings = FileMappings()
    for _, bound in buffered:
        for value in bound.arguments.values():
            if isinstance(value, torch.Tensor) and value.device.type == "cpu" and value.is_contiguous():
                mappings.drop(value.data_ptr(), value.nbytes)
    buffered.clear()
