"""What cannot be served from slots, refused by name before the engine starts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from vllm_moecxl.errors import UnsupportedModelError
from vllm_moecxl.integration import WORKER_EXTENSION

#: Loaders that read or write `state_dict()` as it stands in memory, which is the slots and not the experts.
_REFUSED_LOAD_FORMATS = frozenset(
    {"sharded_state", "runai_streamer_sharded", "tensorizer", "ipc_cache", "modelexpress"}
)
#: Backends that keep the experts outside of the layer's parameters.
_REFUSED_MOE_BACKENDS = frozenset(
    {"deep_gemm_mega_moe", "aiter_mega_moe", "flashinfer_moe_ep_cutedsl", "flashinfer_moe_ep_mega_deep_gemm"}
)


def refuse_unsupported(vllm_config: Any, *, on_cpu: bool) -> None:
    """Check an engine's configuration.

    Args:
        vllm_config: vLLM's configuration, complete but for what platforms add.
        on_cpu: whether the engine is the CPU engine.

    Raises:
        UnsupportedModelError: one sentence that names the first feature found and what to do.
    """
    for feature, remedy in _unsupported(vllm_config, on_cpu):
        raise UnsupportedModelError(f"--moe-offload cxl cannot serve {feature}: {remedy}")


def _unsupported(config: Any, on_cpu: bool) -> Iterator[tuple[str, str]]:
    model, parallel = config.model_config, config.parallel_config
    if not model.is_moe:
        yield f"{model.model}, which has no experts (a dense model)", "drop --moe-offload"
    if parallel.enable_elastic_ep:
        yield "elastic expert parallelism", "drop --enable-elastic-ep"
    if parallel.enable_eplb:
        yield "EPLB, which rewrites the experts' rows", "drop --enable-eplb"
    if parallel.enable_expert_parallel:
        reason = "drop --enable-expert-parallel; tensor parallelism works"
        if on_cpu:
            reason += " (vLLM's CPU engine crashes with expert parallelism even without --moe-offload)"
        yield "expert parallelism", reason
    if parallel.data_parallel_size > 1:
        reason = "run one engine per replica instead"
        if on_cpu:
            reason += " (vLLM's CPU engine cannot run MoE models data-parallel even without --moe-offload)"
        yield f"data parallelism (--data-parallel-size {parallel.data_parallel_size})", reason
    if parallel.pipeline_parallel_size > 1 and on_cpu:
        yield (
            f"pipeline parallelism on the CPU engine (--pipeline-parallel-size {parallel.pipeline_parallel_size})",
            "use --tensor-parallel-size, vLLM's CPU engine fails with it even without --moe-offload",
        )
    if parallel.prefill_context_parallel_size > 1:
        yield "prefill context parallelism", "drop --prefill-context-parallel-size"
    if parallel.enable_dbo:
        yield "dual batch overlap, which runs two forwards at once", "drop --enable-dbo"
    if model.enable_sleep_mode:
        yield "sleep mode, which discards or copies the slots but not the experts", "drop --enable-sleep-mode"
    if config.lora_config is not None:
        yield "LoRA", "drop --enable-lora"
    if config.weight_transfer_config is not None:
        yield "weight transfer", "drop --weight-transfer-config, weights cannot be replaced while experts are at home"
    offload = config.offload_config
    if offload.uva.cpu_offload_gb > 0 or offload.prefetch.offload_group_size > 0:
        yield "vLLM's own weight offloading at the same time", "drop --cpu-offload-gb and --offload-group-size"
    if (load_format := str(config.load_config.load_format)) in _REFUSED_LOAD_FORMATS:
        yield f"--load-format {load_format}", "use --load-format auto"
    if (backend := str(config.kernel_config.moe_backend)) in _REFUSED_MOE_BACKENDS:
        yield f"--moe-backend {backend}", "use --moe-backend auto or triton"
    if parallel.worker_extension_cls not in ("", WORKER_EXTENSION):
        yield f"--worker-extension-cls {parallel.worker_extension_cls}", "drop it, offloading needs that place itself"
