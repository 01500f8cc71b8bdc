"""What we rely on of the engine around the layers: its entry points, configuration, workers and models."""

from __future__ import annotations

from tests.seams.contract import Seam

_FUSED_MOE = "vllm.model_executor.layers.fused_moe"
_EMBEDDING = "vllm.model_executor.layers.vocab_parallel_embedding"

#: How vLLM finds us, and what our scripts ask of it.
_ENTRY = (
    Seam(
        "says",
        "vllm.plugins",
        "DEFAULT_PLUGINS_GROUP",
        "vllm.general_plugins",
        "pyproject.toml",
        "be loaded in every process",
    ),
    Seam(
        "says",
        "vllm.platforms",
        "cpu_platform_plugin",
        "vllm_version_matches_substr cpu",
        "deploy/vllm-alias/pyproject.toml",
        "have the CPU engine chosen by the version's name",
    ),
    Seam("value", "vllm.envs", "VLLM_ENABLE_V1_MULTIPROCESSING", "", "packing.py", "show the progress of packing"),
    Seam(
        "has",
        "vllm.entrypoints.openai.completion.protocol",
        "CompletionRequest",
        "return_token_ids",
        "deploy/demo.py",
        "compare tokens",
    ),
)

#: Options and configuration.
_CONFIGURATION = (
    Seam(
        "replace",
        "vllm.engine.arg_utils",
        "EngineArgs.add_cli_args",
        "parser",
        "patches.py packing.py",
        "add command-line options",
    ),
    Seam(
        "says",
        "vllm.engine.arg_utils",
        "EngineArgs.add_cli_args",
        "--model --additional-config",
        "options.py packing.py",
        "merge our options with --additional-config",
    ),
    Seam("class", "vllm.engine.arg_utils", "EngineArgs", "", "patches.py", "add keywords to its constructor"),
    Seam("class", "vllm.engine.arg_utils", "AsyncEngineArgs", "EngineArgs", "patches.py", "add keywords"),
    Seam(
        "says",
        "vllm.engine.arg_utils",
        "AsyncEngineArgs.add_cli_args",
        "load_general_plugins add_cli_args",
        "plugin.py",
        "be loaded before the options are parsed",
    ),
    Seam(
        "has",
        "vllm.engine.arg_utils",
        "EngineArgs",
        "additional_config load_format use_tqdm_on_load gpu_memory_utilization tensor_parallel_size "
        "pipeline_parallel_size",
        "options.py packing.py",
        "read and set engine arguments",
    ),
    Seam("call", "vllm.engine.arg_utils", "EngineArgs.from_cli_args", "args", "packing.py", "read engine arguments"),
    Seam("call", "vllm.engine.arg_utils", "EngineArgs.create_engine_config", "", "packing.py", "make a configuration"),
    Seam(
        "class",
        "vllm.utils.argparse_utils",
        "FlexibleArgumentParser",
        "",
        "packing.py",
        "read engine arguments",
    ),
    Seam("call", "vllm.v1.executor.abstract", "Executor.get_class", "vllm_config", "packing.py", "load a model"),
    Seam("call", "vllm.v1.executor.abstract", "Executor", "vllm_config", "packing.py", "load a model"),
    Seam("call", "vllm.v1.executor.abstract", "Executor.collective_rpc", "method", "packing.py", "finish packing"),
    Seam("call", "vllm.v1.executor.abstract", "Executor.shutdown", "", "packing.py", "end the workers"),
    Seam("value", "vllm.platforms", "current_platform", "", "patches.py", "find the platform in use"),
    *(
        Seam("replace", module, name, "vllm_config", "patches.py", "refuse or complete a configuration")
        for module, name in (
            ("vllm.platforms.cpu", "CpuPlatform.check_and_update_config"),
            ("vllm.platforms.cuda", "CudaPlatformBase.check_and_update_config"),
            ("vllm.platforms.rocm", "RocmPlatform.check_and_update_config"),
        )
    ),
    Seam(
        "says",
        "vllm.config.vllm",
        "VllmConfig.__post_init__",
        "current_platform check_and_update_config",
        "patches.py plugin.py",
        "be asked about every configuration",
    ),
    Seam(
        "has",
        "vllm.config",
        "VllmConfig",
        "additional_config cache_config compilation_config device_config kernel_config load_config lora_config "
        "model_config offload_config parallel_config scheduler_config weight_transfer_config",
        "checks.py plugin.py settings.py device_budget.py graphs.py",
        "read the configuration",
    ),
    Seam(
        "has",
        "vllm.config",
        "ModelConfig",
        "dtype enable_sleep_mode hf_overrides hf_text_config is_moe max_model_len model model_weights quantization "
        "revision",
        "checks.py device_budget.py fingerprint.py worker.py",
        "read what is served",
    ),
    *(
        Seam("call", "vllm.config", f"ModelConfig.{name}", wants, file, "estimate memory and check slot counts")
        for name, wants, file in (
            ("get_head_size", "", "device_budget.py"),
            ("get_hidden_size", "", "device_budget.py"),
            ("get_num_experts", "", "plugin.py"),
            ("get_num_experts_per_tok", "", "plugin.py device_budget.py"),
            ("get_num_kv_heads", "parallel_config", "device_budget.py"),
            ("get_num_layers", "parallel_config", "device_budget.py"),
            ("get_vocab_size", "", "device_budget.py"),
        )
    ),
    Seam(
        "has",
        "vllm.config",
        "ParallelConfig",
        "data_parallel_size enable_dbo enable_elastic_ep enable_eplb enable_expert_parallel pipeline_parallel_size "
        "prefill_context_parallel_size tensor_parallel_size worker_extension_cls world_size",
        "checks.py plugin.py worker.py device_budget.py",
        "refuse what cannot be served, and load our worker extension",
    ),
    Seam(
        "has", "vllm.config", "CacheConfig", "gpu_memory_utilization kv_cache_memory_bytes", "device_budget.py", "fit"
    ),
    Seam("has", "vllm.config", "SchedulerConfig", "max_num_batched_tokens max_num_seqs", "device_budget.py", "fit"),
    Seam("has", "vllm.config", "DeviceConfig", "device_type", "plugin.py worker.py", "tell the CPU engine"),
    Seam("has", "vllm.config", "LoadConfig", "load_format", "checks.py loading.py", "refuse load formats"),
    Seam("has", "vllm.config", "KernelConfig", "moe_backend", "checks.py", "refuse expert backends"),
    Seam(
        "says",
        "vllm.config.kernel",
        "MoEBackend",
        "triton deep_gemm_mega_moe aiter_mega_moe flashinfer_moe_ep_cutedsl flashinfer_moe_ep_mega_deep_gemm",
        "checks.py",
        "refuse backends that keep the experts to themselves",
    ),
    Seam("has", "vllm.config", "OffloadConfig", "uva prefetch", "checks.py", "refuse vLLM's own offloading"),
    Seam("has", "vllm.config.offload", "UVAOffloadConfig", "cpu_offload_gb", "checks.py", "refuse it"),
    Seam("has", "vllm.config.offload", "PrefetchOffloadConfig", "offload_group_size", "checks.py", "refuse it"),
    Seam("call", "vllm.config", "get_current_vllm_config", "", "loading.py", "tell a dummy load"),
    Seam("value", "vllm", "__version__", "", "plugin.py fingerprint.py", "refuse a vLLM that we do not know"),
    Seam(
        "call", "vllm.logger", "init_logger", "name", "plugin.py worker.py", "log below the logger that has a handler"
    ),
)

#: Workers, steps and models.
_WORKERS = (
    Seam(
        "replace",
        "vllm.v1.worker.worker_base",
        "WorkerWrapperBase.execute_model",
        "scheduler_output",
        "patches.py",
        "see every step before it runs",
    ),
    Seam("has", "vllm.v1.worker.worker_base", "WorkerWrapperBase", "worker", "patches.py", "reach the worker"),
    Seam(
        "says",
        "vllm.v1.worker.worker_base",
        "WorkerWrapperBase.init_worker",
        "worker_extension_cls __bases__",
        "plugin.py worker.py",
        "be loaded into the workers of an engine that offloads",
    ),
    Seam(
        "has", "vllm.v1.worker.gpu_worker", "Worker", "vllm_config model_runner", "patches.py worker.py", "reach them"
    ),
    *(
        Seam("has", "vllm.v1.worker.gpu_worker", "Worker", name, "patches.py", "refuse it while slots hold the experts")
        for name in (
            "reload_weights",
            "update_weights",
            "init_weight_transfer_engine",
            "save_sharded_state",
            "save_tensorized_model",
        )
    ),
    Seam("says", "vllm.v1.worker.cpu_worker", "CPUWorker", "Worker", "patches.py", "cover the CPU engine's workers"),
    Seam(
        "has",
        "vllm.v1.worker.gpu_model_runner",
        "GPUModelRunner",
        "model model_config input_batch",
        "steps.py worker.py",
        "see requests and tokens of a forward",
    ),
    Seam(
        "has", "vllm.v1.worker.gpu.model_runner", "GPUModelRunner", "model model_config", "worker.py", "find the model"
    ),
    Seam(
        "lacks",
        "vllm.v1.worker.gpu.model_runner",
        "GPUModelRunner",
        "input_batch",
        "steps.py",
        "know by its absence that this runner does not show the order of its requests",
    ),
    Seam(
        "has",
        "vllm.v1.worker.gpu_input_batch",
        "InputBatch",
        "req_ids token_ids_cpu num_computed_tokens_cpu num_prompt_tokens",
        "steps.py",
        "see requests and tokens of a forward",
    ),
    Seam(
        "has",
        "vllm.v1.core.sched.output",
        "SchedulerOutput",
        "finished_req_ids num_scheduled_tokens scheduled_cached_reqs scheduled_new_reqs scheduled_spec_decode_tokens "
        "total_num_scheduled_tokens",
        "steps.py worker.py",
        "see what the next forward holds",
    ),
    Seam(
        "has",
        "vllm.v1.core.sched.output",
        "CachedRequestData",
        "req_ids resumed_req_ids num_computed_tokens",
        "steps.py",
        "see what the next forward holds",
    ),
    *(
        Seam("call", "vllm.distributed.parallel_state", name, "", file, "tell the ranks apart")
        for name, file in (
            ("get_world_group", "worker.py"),
            ("get_tp_group", "fingerprint.py"),
            ("get_pp_group", "fingerprint.py"),
        )
    ),
    Seam(
        "has",
        "vllm.distributed.parallel_state",
        "GroupCoordinator",
        "rank rank_in_group world_size",
        "worker.py fingerprint.py",
        "tell the ranks apart",
    ),
    Seam("class", _FUSED_MOE, "GateLinear", "ReplicatedLinear", "model_parts.py", "find the routers of a model"),
    Seam("has", _FUSED_MOE, "GateLinear", "input_size params_dtype", "model_parts.py", "read a router's weights"),
    Seam("class", _EMBEDDING, "VocabParallelEmbedding", "", "model_parts.py", "find the token embeddings"),
    Seam("has", _EMBEDDING, "VocabParallelEmbedding", "org_vocab_size", "model_parts.py", "know that they are whole"),
    Seam("class", _EMBEDDING, "ParallelLMHead", "VocabParallelEmbedding", "model_parts.py", "pass the head over"),
    *(
        Seam("has", f"vllm.model_executor.models.{module}", owner, name, "model_parts.py", "find a layer's norm")
        for module, owner, name in (
            ("mixtral", "MixtralDecoderLayer", "post_attention_layernorm"),
            ("gemma4", "Gemma4DecoderLayer", "pre_feedforward_layernorm"),
            ("openpangu", "OpenPanguDecoderLayer", "pre_mlp_layernorm"),
            ("lfm2_moe", "Lfm2MoeAttentionDecoderLayer", "ffn_norm"),
        )
    ),
    Seam(
        "replace",
        "prometheus_client.multiprocess",
        "MultiProcessCollector.__init__",
        "registry, path=None",
        "patches.py",
        "show our counters with several API servers",
    ),
)

ENGINE_SEAMS = (*_ENTRY, *_CONFIGURATION, *_WORKERS)
