"""Serve layers from a slab file: kernels are built around stand-ins, and no expert of the checkpoint is read.

vLLM builds a kernel from weights that have been loaded and processed. It gets zeros of the checkpoint's shapes, for one
expert where that is known to be enough, and processes them; the shapes that come out must be those of the slab file.
Then the rows of experts come from there, and so do the values that the kernel keeps beside them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import wraps
from typing import Any

import torch
from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.model_executor.model_loader.reload.layerwise import initialize_online_processing

from vllm_moecxl.data.host import trim_heap
from vllm_moecxl.data.slabfile import PackedLayer
from vllm_moecxl.errors import IntegrityError
from vllm_moecxl.integration.described import describe_layer, need_of
from vllm_moecxl.integration.initial_values import InitialValues
from vllm_moecxl.integration.kernels import is_built_from_one_expert
from vllm_moecxl.integration.loading import replace_steps
from vllm_moecxl.integration.scan import named_tensors, solid
from vllm_moecxl.runtime.device_driven.dispatch import AnyDispatch
from vllm_moecxl.runtime.runtime import OffloadRuntime

#: Whether the model that is being loaded has its experts from a slab file.
_PASSING_OVER: ContextVar[bool] = ContextVar("moe_offload_passing_over", default=False)
#: Names of experts' tensors in checkpoints: one expert's, or those of all in one tensor. Not those of shared experts,
#: and not a router's correction bias, which may lie beside them.
_EXPERT_TENSOR = re.compile(r"(^|\.)experts\.(\d+\.|gate_up_proj|down_proj|w13|w1|w2|w3|v1)")


def passes_over(weight_name: str) -> bool:
    """Whether a tensor of the checkpoint need not be read, since a slab file has what it would become.

    Names that it does not know are read, and then passed over by their loaders.
    """
    return _PASSING_OVER.get() and _EXPERT_TENSOR.search(weight_name) is not None


@contextmanager
def passing_over_experts() -> Iterator[None]:
    """Read no experts of checkpoints inside."""
    token = _PASSING_OVER.set(True)
    try:
        yield
    finally:
        _PASSING_OVER.reset(token)


def load_from_file(
    method: FusedMoEMethodBase,
    layer: RoutedExperts,
    runtime: OffloadRuntime,
    adopt: Callable[[AnyDispatch], None],
) -> None:
    """Change one quantisation method object so that its layer is served from the runtime's slab file.

    Args:
        adopt: called once with the layer's dispatch.
    """
    create_weights = method.create_weights
    process_weights = method.process_weights_after_loading
    created: list[str] = []
    is_home = False

    @wraps(create_weights)
    def create_on_meta(*args: Any, **kwargs: Any) -> None:
        before = set(layer._parameters)
        with InitialValues():
            create_weights(*args, **kwargs)
        created.extend(name for name, p in layer._parameters.items() if p is not None and name not in before)
        runtime.declare(need_of(layer))
        initialize_online_processing(layer)
        for name in created:
            layer.get_parameter(name).weight_loader = _pass_over

    @wraps(process_weights)
    def process_stand_ins(_: torch.nn.Module) -> None:
        nonlocal is_home
        if is_home:  # the loader's last step visits every layer again
            return
        packed = _packed_layer(runtime, layer)
        on_host = layer.get_parameter(created[0]).device.type == "cpu"
        one_is_enough = on_host and is_built_from_one_expert(type(method).__name__)
        for name in created:
            parameter = layer.get_parameter(name)
            # The full size was never touched, so it took no memory until now.
            if one_is_enough and parameter.shape[:1] == (layer.local_num_experts,):
                parameter.data = parameter.data.new_zeros((1, *parameter.shape[1:]))
            else:
                parameter.data.zero_()
        process_weights(layer)
        _restore_shared(layer, packed)
        adopt(runtime.install(describe_layer(layer, method, packed)))
        trim_heap()
        is_home = True

    replace_steps(method, create_on_meta, process_stand_ins)


def _pass_over(*args: Any, **kwargs: Any) -> bool:
    """A weight loader for what the slab file has."""
    return True


def _packed_layer(runtime: OffloadRuntime, layer: RoutedExperts) -> PackedLayer:
    assert runtime.slab_file is not None
    packed = runtime.slab_file.slabs.layers.get(layer.layer_name)
    if packed is None:
        raise IntegrityError(
            f"--moe-offload-config: bank {runtime.slab_file.name} has no layer {layer.layer_name}: pack this model "
            "with moecxl pack (a draft model's experts cannot be packed)"
        )
    return packed


def _restore_shared(layer: RoutedExperts, packed: PackedLayer) -> None:
    """Give the kernel the values that it kept beside the rows of experts when it was packed."""
    found = named_tensors(layer)
    for name, value in packed.shared.items():
        target = solid(found[name]) if name in found else None
        if target is None or target.shape != value.shape or target.dtype != value.dtype:
            raise IntegrityError(
                f"--moe-offload-config: the slab file has {name} {list(value.shape)} for {layer.layer_name}, which "
                "this engine has not: run moecxl pack again with the engine's own options"
            )
        target.copy_(value)
