"""Find every tensor of a layer that belongs to its experts, whatever the weight format.

A layer is served from slots only if each of its tensors is understood: one row per expert, or shared by all.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence

import torch
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts

from vllm_moecxl.errors import IntegrityError, UnsupportedModelError

#: Parameters that live on the layer but belong to the router.
_ROUTERS = frozenset({"e_score_correction_bias", "hash_indices_table"})
#: These, or one value for all experts.
_NOT_PER_EXPERT = _ROUTERS | {"w13_input_scale", "w2_input_scale"}


def per_expert_tensors(layer: RoutedExperts, expert_count: int) -> dict[str, list[torch.Tensor]]:
    """By name, the tensor objects that hold one row per expert, after the kernel has been built.

    A list has several objects where the kernel holds aliases of a parameter: all of them have to be rebound together.

    Args:
        layer: a `RoutedExperts` whose `quant_method.moe_kernel` exists.
        expert_count: its experts on this rank.

    Raises:
        UnsupportedModelError: a tensor whose layout is not understood, by name.
    """
    groups: dict[str, list[torch.Tensor]] = {}
    by_storage: dict[int, str] = {}
    for name, tensor in layer.named_parameters(remove_duplicate=True):
        if name in _NOT_PER_EXPERT:
            _require_shared(layer, name, tensor)
        elif _is_shared(tensor):
            continue
        elif tensor.shape[0] == expert_count and tensor.is_contiguous():
            storage = tensor.untyped_storage().data_ptr()
            if (twin := by_storage.get(storage)) is not None and _same_view(groups[twin][0], tensor):
                groups[twin].append(tensor)
            else:
                by_storage[storage] = name
                groups[name] = [tensor]
        else:
            raise _unknown(layer, name, tensor)
    for name, tensor in _kernel_tensors(layer):
        if any(tensor is known for group in groups.values() for known in group) or _is_shared(tensor):
            continue
        twin = by_storage.get(tensor.untyped_storage().data_ptr())
        if twin is not None and _same_view(groups[twin][0], tensor):
            groups[twin].append(tensor)
        elif twin is not None:
            raise _unknown(layer, f"{name}, a view of {twin}", tensor)
        elif tensor.shape[0] == expert_count and tensor.is_contiguous():
            groups[name] = [tensor]
        elif tensor.shape[0] % expert_count == 0:
            raise _unknown(layer, name, tensor)
    if not groups:
        raise UnsupportedModelError(f"--moe-offload: layer {layer.layer_name} has no per-expert weights to offload")
    return groups


def named_tensors(layer: RoutedExperts) -> dict[str, torch.Tensor]:
    """Every tensor of the layer and of its kernel that is not the router's, each object once, by the name that
    `per_expert_tensors` gives it."""
    found: dict[str, torch.Tensor] = {}
    for name, tensor in [*layer.named_parameters(remove_duplicate=True), *_kernel_tensors(layer)]:
        if name not in _ROUTERS and not any(tensor is known for known in found.values()):
            found[name] = tensor
    return found


def shared_tensors(layer: RoutedExperts, groups: Mapping[str, Sequence[torch.Tensor]]) -> dict[str, torch.Tensor]:
    """By name, what the kernel keeps beside the rows of experts: values that all experts share."""
    rows = [tensor for group in groups.values() for tensor in group]
    return {
        name: solid(tensor)
        for name, tensor in named_tensors(layer).items()
        if tensor.numel() and not any(tensor is row for row in rows)
    }


def tensors_by_name(layer: RoutedExperts, names: Sequence[str]) -> dict[str, list[torch.Tensor]]:
    """What `per_expert_tensors` finds, for a kernel whose tensors' names are known and whose rows are stand-ins.

    Raises:
        IntegrityError: the kernel has no tensor of such a name.
    """
    found = named_tensors(layer)
    if missing := [name for name in names if name not in found]:
        raise IntegrityError(
            f"--moe-offload-config: the slab file has {', '.join(missing)} for {layer.layer_name}, which this engine "
            "has not: run moecxl pack again with the engine's own options"
        )
    groups = {name: [found[name]] for name in names}
    for tensor in found.values():
        for group in groups.values():
            if tensor is not group[0] and _same_view(group[0], tensor):
                group.append(tensor)
    return groups


def solid(tensor: torch.Tensor) -> torch.Tensor:
    """The part of a broadcast tensor that has memory of its own."""
    for dim, stride in enumerate(tensor.stride()):
        if stride == 0 and tensor.shape[dim] > 1:
            tensor = tensor.narrow(dim, 0, 1)
    return tensor.detach()


def _kernel_tensors(layer: RoutedExperts) -> Iterator[tuple[str, torch.Tensor]]:
    """Tensors that are reachable from the layer or its kernel and need not be parameters."""
    method = layer.quant_method
    fused_experts = method.moe_kernel.fused_experts
    holders = {
        "layer": layer,
        "kernel": fused_experts,
        "quant_config": fused_experts.quant_config,
        "quant_method": method,
    }
    for holder_name, holder in holders.items():
        yield from _tensors_of(holder_name, holder)
    for field in ("_a1", "_a2", "_w1", "_w2"):
        if (description := getattr(fused_experts.quant_config, field, None)) is not None:
            yield from _tensors_of(f"quant_config.{field}", description)


def _tensors_of(name: str, holder: object) -> Iterator[tuple[str, torch.Tensor]]:
    attributes = (
        {f.name: getattr(holder, f.name) for f in dataclasses.fields(holder)}
        if dataclasses.is_dataclass(holder)
        else vars(holder)
    )
    for attribute, value in attributes.items():
        if attribute not in _NOT_PER_EXPERT and isinstance(value, torch.Tensor):
            yield f"{name}.{attribute}", value


def _is_shared(tensor: torch.Tensor) -> bool:
    """One value for all experts: a scalar, nothing at all, or a broadcast view."""
    return tensor.dim() == 0 or tensor.numel() <= 1 or tensor.stride(0) == 0


def _same_view(first: torch.Tensor, second: torch.Tensor) -> bool:
    return (
        first.data_ptr() == second.data_ptr()
        and first.shape == second.shape
        and first.dtype == second.dtype
        and first.stride() == second.stride()
    )


def _require_shared(layer: RoutedExperts, name: str, tensor: torch.Tensor) -> None:
    """Input scales may differ between experts in principle; then they would have to move with them."""
    if name.endswith("input_scale") and not _is_shared(tensor) and bool((tensor != tensor.flatten()[0]).any()):
        raise _unknown(layer, name, tensor)


def _unknown(layer: RoutedExperts, name: str, tensor: torch.Tensor) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"--moe-offload: tensor {name} {list(tensor.shape)} of {layer.layer_name} "
        f"({type(layer.quant_method).__name__}) is neither one row per expert nor shared by all, so its experts cannot "
        "be served from slots: use another quantisation or --moe-backend, or serve without --moe-offload"
    )
