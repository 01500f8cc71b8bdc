"""How much of the compute device belongs to others than the experts."""

from __future__ import annotations

from typing import Any

import torch

from vllm_moecxl.units import GIB

#: Activations of a forward at vLLM's default batch limits, and what allocators keep: an estimate for "auto" and the
#: fit check only. Not yet measured on a GPU by us.
_ACTIVATION_BYTES = 2 * GIB


def reserve_bytes(vllm_config: Any) -> int:
    """Free device memory that slots must leave alone: the KV cache that vLLM was asked for, and activations."""
    cache = vllm_config.cache_config
    kv_cache_bytes = cache.kv_cache_memory_bytes
    if vllm_config.device_config.device_type == "cpu":
        # Without a number the CPU engine sizes its KV cache after loading, from what is free then.
        return kv_cache_bytes or 0
    total_bytes = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    spared_bytes = int((1 - cache.gpu_memory_utilization) * total_bytes)
    if kv_cache_bytes is None:
        kv_cache_bytes = _one_request_bytes(vllm_config)
    return spared_bytes + kv_cache_bytes + _ACTIVATION_BYTES


def _one_request_bytes(vllm_config: Any) -> int:
    """KV cache of one request of the longest length that is served: the least with which vLLM starts."""
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    element_bytes = torch.empty((), dtype=model.dtype).element_size()
    per_token = 2 * model.get_num_layers(parallel) * model.get_num_kv_heads(parallel) * model.get_head_size()
    return int(per_token * element_bytes * model.max_model_len)
