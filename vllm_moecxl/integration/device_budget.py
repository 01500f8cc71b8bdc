"""How much of the compute device belongs to others than the experts."""

from __future__ import annotations

from typing import Any

import torch

from vllm_moecxl.units import GIB

#: Activations of a forward at vLLM's default batch limits, and what allocators keep: an estimate for "auto" and the
#: fit check only. Not yet measured on a GPU by us.
_ACTIVATION_BYTES = 2 * GIB

#: On the CPU engine, where the host's memory is the device's: gate and up projections and their product for each of a
#: token's experts, hidden states that are alive at a time, and logits as float32 with a copy.
#: Source: what the forward of vLLM 0.32's fused_moe and sampler allocate, read from its code.
_WIDE_ROWS = 3
_HIDDEN_STATES = 8
_LOGIT_BYTES = 8


def reserve_bytes(vllm_config: Any) -> int:
    """Free device memory that slots must leave alone: the KV cache that vLLM was asked for, and activations."""
    cache = vllm_config.cache_config
    kv_cache_bytes = cache.kv_cache_memory_bytes
    if vllm_config.device_config.device_type == "cpu":
        # Without a number the CPU engine sizes its KV cache after loading, from what is free then.
        return (kv_cache_bytes or 0) + _host_activation_bytes(vllm_config)
    total_bytes = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    spared_bytes = int((1 - cache.gpu_memory_utilization) * total_bytes)
    if kv_cache_bytes is None:
        kv_cache_bytes = _one_request_bytes(vllm_config)
    return spared_bytes + kv_cache_bytes + _ACTIVATION_BYTES


def _host_activation_bytes(vllm_config: Any) -> int:
    """What the largest forward takes on the CPU engine, about: rows of experts, a few hidden states, logits."""
    model, scheduler = vllm_config.model_config, vllm_config.scheduler_config
    config = model.hf_text_config
    element_bytes = torch.empty((), dtype=model.dtype).element_size()
    widths = getattr(config, "moe_intermediate_size", None) or getattr(config, "intermediate_size", 0)
    # Some models give a width for each layer.
    width = max(widths) if isinstance(widths, list | tuple) else widths
    width //= vllm_config.parallel_config.tensor_parallel_size
    per_token = _WIDE_ROWS * model.get_num_experts_per_tok() * width + _HIDDEN_STATES * model.get_hidden_size()
    logits = scheduler.max_num_seqs * model.get_vocab_size() * _LOGIT_BYTES
    return int(scheduler.max_num_batched_tokens * per_token * element_bytes + logits)


def _one_request_bytes(vllm_config: Any) -> int:
    """KV cache of one request of the longest length that is served: the least with which vLLM starts."""
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    element_bytes = torch.empty((), dtype=model.dtype).element_size()
    per_token = 2 * model.get_num_layers(parallel) * model.get_num_kv_heads(parallel) * model.get_head_size()
    return int(per_token * element_bytes * model.max_model_len)
