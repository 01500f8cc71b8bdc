"""Load experts layer by layer and take them home (or into a slab file), with vLLM's own loaders and post-processing.

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
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

from vllm_moecxl.data.host import FileMappings, trim_heap
from vllm_moecxl.integration.buffered import BufferedParameters
from vllm_moecxl.integration.described import describe_layer, need_of
from vllm_moecxl.integration.initial_values import InitialValues
from vllm_moecxl.runtime.device_driven.dispatch import AnyDispatch
from vllm_moecxl.runtime.packing import Packer
from vllm_moecxl.runtime.runtime import OffloadRuntime


def load_to_homes(
    method: FusedMoEMethodBase,
    layer: RoutedExperts,
    runtime: OffloadRuntime | Packer,
    register: Callable[[BufferedParameters], None],
    adopt: Callable[[AnyDispatch], None],
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
        runtime.declare(need_of(layer))

    @wraps(process_weights)
    def process_and_take_home(_: torch.nn.Module) -> None:
        nonlocal is_home
        if is_home:  # the loader's last step visits every layer again
            return
        buffered[0].close()
        _give_back_sources(layer)
        process_weights(layer)
        if (dispatch := runtime.install(describe_layer(layer, method))) is not None:
            adopt(dispatch)
        trim_heap()
        is_home = True

    replace_steps(method, create_on_meta, process_and_take_home)


def replace_steps(method: FusedMoEMethodBase, create: Callable[..., None], process: Callable[..., None]) -> None:
    """Let one method object create its weights on the meta device, and process them layer by layer, our way."""
    method.create_weights = create
    method.process_weights_after_loading = process
    method.uses_meta_device = True
    # Without this, vLLM would move our cells to the device and back around the processing step.
    method.requires_device_loading = False


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
