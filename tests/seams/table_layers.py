"""What we rely on of expert layers: how they are made, loaded and run."""

from __future__ import annotations

from tests.seams.contract import Seam

_FUSED_MOE = "vllm.model_executor.layers.fused_moe"
_QUANTIZATION = "vllm.model_executor.layers.quantization"
_COMPRESSED = f"{_QUANTIZATION}.compressed_tensors.compressed_tensors_moe.compressed_tensors_moe"
_LOADER = "vllm.model_executor.model_loader"
_ROUTED = f"{_FUSED_MOE}.routed_experts"
_METHOD = f"{_FUSED_MOE}.fused_moe_method_base"
_KERNEL = f"{_FUSED_MOE}.modular_kernel"
_CPU_EXPERTS = f"{_FUSED_MOE}.experts.cpu_moe"
_RUNNER = f"{_FUSED_MOE}.runner.moe_runner"

#: The layer that we replace, its quantisation method and its kernel.
_LAYER = (
    Seam("class", "vllm.model_executor.custom_op", "PluggableLayer", "", "experts.py", "replace layers by class name"),
    Seam(
        "call",
        "vllm.model_executor.custom_op",
        "PluggableLayer.register_oot",
        "_decorated_layer_cls, *, name",
        "experts.py",
        "put SlotExperts in the place of RoutedExperts",
    ),
    Seam(
        "says",
        "vllm.model_executor.custom_op",
        "PluggableLayer.__new__",
        "__name__ op_registry_oot",
        "experts.py",
        "have each subclass of RoutedExperts replaced by its own name",
    ),
    Seam("value", "vllm.model_executor.custom_op", "op_registry_oot", "", "experts.py", "see what is replaced already"),
    Seam("class", _ROUTED, "RoutedExperts", "PluggableLayer", "experts.py worker.py", "find and replace expert layers"),
    Seam(
        "replace",
        _ROUTED,
        "RoutedExperts._get_quant_method",
        "prefix, quant_config, moe_config",
        "experts.py",
        "take hold of a layer before its weights are created",
    ),
    Seam(
        "replace",
        _ROUTED,
        "RoutedExperts.forward_modular",
        "x, topk_weights, topk_ids, shared_experts=None, shared_experts_input=None",
        "experts.py",
        "compute a layer from slots",
    ),
    Seam(
        "only",
        _ROUTED,
        "RoutedExperts.forward_modular",
        "SubstitutedRoutedExperts DeepseekV4HeterogeneousSharedRoutedExperts",
        "experts.py",
        "compute the whole of a layer: classes that do more than run the kernel are refused",
    ),
    Seam(
        "has",
        _ROUTED,
        "RoutedExperts",
        "layer_name local_num_experts top_k hidden_size moe_config quant_method expert_map_manager",
        "experts.py described.py scan.py",
        "describe a layer to the runtime",
    ),
    Seam(
        "says",
        _ROUTED,
        "RoutedExperts.get_expert_weights",
        "e_score_correction_bias hash_indices_table w13_input_scale w2_input_scale",
        "scan.py",
        "tell the router's parameters and shared scales from rows of experts",
    ),
    Seam(
        "has",
        f"{_FUSED_MOE}.expert_map_manager",
        "ExpertMapManager",
        "num_fused_shared_experts",
        "experts.py",
        "refuse shared experts among the routed ones",
    ),
    Seam(
        "has",
        f"{_FUSED_MOE}.config",
        "FusedMoEConfig",
        "require_decomposed_backend|has_hash_routing in_dtype is_lora_enabled moe_parallel_config",
        "experts.py described.py",
        "get a kernel that takes routed tokens, and refuse LoRA",
    ),
    Seam(
        "says",
        _KERNEL,
        "FusedMoEExperts.is_supported_config",
        "has_hash_routing is_monolithic",
        "experts.py",
        "keep vLLM from choosing a kernel that routes by itself",
    ),
    Seam(
        "has",
        f"{_FUSED_MOE}.config",
        "FusedMoEParallelConfig",
        "use_ep enable_eplb",
        "experts.py",
        "refuse expert parallelism",
    ),
    Seam("class", _METHOD, "FusedMoEMethodBase", "QuantizeMethodBase", "experts.py", "annotate quantisation methods"),
    Seam(
        "has",
        _METHOD,
        "FusedMoEMethodBase",
        "create_weights process_weights_after_loading uses_meta_device requires_device_loading moe_kernel "
        "is_monolithic",
        "loading.py packed.py described.py",
        "wrap how weights are created and processed",
    ),
    Seam(
        "call",
        _METHOD,
        "FusedMoEMethodBase.apply",
        "*, layer, x, topk_weights, topk_ids, shared_experts, shared_experts_input",
        "described.py",
        "run vLLM's kernel on slots",
    ),
    Seam("class", f"{_FUSED_MOE}.moe_output", "UnfinalizedMoEOutput", "", "described.py", "refuse a deferred sum"),
    Seam("has", _KERNEL, "FusedMoEKernel", "fused_experts is_monolithic", "described.py scan.py", "reach the kernel"),
    Seam("has", _KERNEL, "FusedMoEExperts", "quant_config", "scan.py", "find the tensors that a kernel keeps"),
    Seam(
        "has",
        f"{_FUSED_MOE}.config",
        "FusedMoEQuantConfig",
        "_a1 _a2 _w1 _w2",
        "scan.py",
        "find scales and zero points that a kernel keeps",
    ),
    Seam(
        "call",
        "vllm.utils.torch_utils",
        "direct_register_custom_op",
        "*, op_name, op_func, fake_impl, target_lib",
        "experts.py",
        "hide the look-up of experts from Dynamo",
    ),
    Seam("call", "vllm.forward_context", "get_forward_context", "", "experts.py", "find a layer inside of our op"),
    Seam(
        "has",
        "vllm.forward_context",
        "ForwardContext",
        "attn_metadata no_compile_layers is_padding",
        "experts.py graphs.py",
        "tell dummy runs and padding, and find a layer by its name",
    ),
)

#: Kernels and methods that we know by their class names.
_NAMED_CLASSES = (
    *(
        Seam("class", _CPU_EXPERTS, name, "FusedMoEExperts", "kernels.py", "cut its forwards into passes")
        for name in ("CPUUnquantizedExperts", "X86CPUUnquantizedExperts", "CPUExpertsInt4", "CPUExpertsInt8")
    ),
    *(
        Seam("class", module, name, "FusedMoEMethodBase", "kernels.py", "build its kernel from one expert's stand-in")
        for module, name in (
            (f"{_FUSED_MOE}.unquantized_fused_moe_method", "UnquantizedFusedMoEMethod"),
            (f"{_QUANTIZATION}.auto_awq", "AutoAWQMoEMethod"),
            (f"{_QUANTIZATION}.auto_gptq", "AutoGPTQMoEMethod"),
            (f"{_QUANTIZATION}.fp8", "Fp8MoEMethod"),
            (f"{_COMPRESSED}_w8a8_fp8", "CompressedTensorsW8A8Fp8MoEMethod"),
            (f"{_COMPRESSED}_w8a8_int8", "CompressedTensorsW8A8Int8MoEMethod"),
            (f"{_COMPRESSED}_wna16", "CompressedTensorsWNA16MoEMethod"),
        )
    ),
)

#: How checkpoints are loaded.
_LOADING = (
    Seam(
        "replace",
        f"{_LOADER}.base_loader",
        "BaseModelLoader.create_model",
        "vllm_config, model_config, prefix=''",
        "patches.py",
        "plan memory between a model's construction and its first weight",
    ),
    Seam(
        "says",
        f"{_LOADER}.base_loader",
        "BaseModelLoader.load_model",
        "create_model load_weights finalize_layerwise_processing process_weights_after_loading",
        "patches.py loading.py",
        "have layers processed one by one",
    ),
    Seam(
        "says",
        f"{_LOADER}.base_loader",
        "_has_online_quant",
        "uses_meta_device",
        "loading.py",
        "have layers that the checkpoint left incomplete processed at the end",
    ),
    Seam(
        "says",
        f"{_LOADER}.utils",
        "process_weights_after_loading",
        "requires_device_loading process_weights_after_loading",
        "loading.py",
        "keep vLLM from moving our rows around the processing step",
    ),
    Seam(
        "replace",
        f"{_LOADER}.weight_utils",
        "should_skip_weight",
        "weight_name, local_expert_ids",
        "patches.py",
        "pass over experts that a slab file has",
    ),
    Seam(
        "says",
        f"{_LOADER}.weight_utils",
        "safetensors_weights_iterator",
        "should_skip_weight",
        "patches.py",
        "be asked before a tensor is read",
    ),
    Seam(
        "call",
        f"{_LOADER}.reload.layerwise",
        "initialize_online_processing",
        "layer",
        "buffered.py packed.py",
        "buffer a layer's weights until it is complete",
    ),
    Seam(
        "call",
        f"{_LOADER}.reload.layerwise",
        "_get_original_loader",
        "tensor",
        "buffered.py",
        "wrap a parameter's own weight loader",
    ),
    Seam(
        "call",
        f"{_LOADER}.reload.layerwise",
        "get_layerwise_info",
        "layer",
        "loading.py",
        "let go of a layer's buffered tensors",
    ),
    Seam(
        "has",
        f"{_LOADER}.reload.types",
        "LayerReloadingInfo",
        "loaded_weights",
        "loading.py",
        "let go of a layer's buffered tensors",
    ),
    Seam(
        "says",
        f"{_LOADER}.reload.layerwise",
        "_get_weight_loader",
        "weight_loader",
        "buffered.py packed.py",
        "put loaders of our own on parameters",
    ),
    Seam("call", f"{_LOADER}.utils", "get_model_architecture", "model_config", "worker.py", "import a model's module"),
    Seam("call", _LOADER, "get_model_loader", "load_config", "fingerprint.py", "find a checkpoint's files"),
    Seam(
        "class", f"{_LOADER}.default_loader", "DefaultModelLoader", "BaseModelLoader", "fingerprint.py", "find weights"
    ),
    Seam(
        "call",
        f"{_LOADER}.default_loader",
        "DefaultModelLoader._prepare_weights",
        "model_name_or_path, subfolder, revision, *, fall_back_to_pt, allow_patterns_overrides",
        "fingerprint.py",
        "find a checkpoint's files as vLLM does",
    ),
    Seam(
        "says",
        _LOADER,
        "LoadFormats",
        "dummy sharded_state runai_streamer_sharded tensorizer ipc_cache modelexpress",
        "checks.py loading.py",
        "refuse formats that take slots for experts",
    ),
)

#: CUDA graphs, and the runner that is cut out of them.
_GRAPHS = (
    Seam(
        "has",
        "vllm.config",
        "CompilationConfig",
        "cudagraph_mode splitting_ops use_inductor_graph_partition cudagraph_capture_sizes max_cudagraph_capture_size",
        "graphs.py",
        "choose who looks experts up, and where graphs are cut for it",
    ),
    Seam(
        "call",
        "vllm.config",
        "CompilationConfig.set_splitting_ops_for_v1",
        "*, all2all_backend, data_parallel_size",
        "graphs.py",
        "have vLLM's own splitting ops before ours is added",
    ),
    Seam("has", "vllm.config", "ParallelConfig", "all2all_backend", "graphs.py", "have vLLM's own splitting ops"),
    Seam(
        "has",
        "vllm.config",
        "CUDAGraphMode",
        "PIECEWISE FULL_AND_PIECEWISE",
        "graphs.py",
        "leave a mode that can serve",
    ),
    *(
        Seam("call", "vllm.config", f"CUDAGraphMode.{name}", "", "graphs.py", "know what a mode captures")
        for name in ("has_full_cudagraphs", "has_piecewise_cudagraphs")
    ),
    Seam(
        "value", "vllm.envs", "VLLM_MOE_SKIP_PADDING", "", "graphs.py", "know whether padding rows are told from others"
    ),
    Seam(
        "call",
        "vllm.compilation.breakable_cudagraph",
        "is_breakable_cudagraph_enabled",
        "",
        "graphs.py",
        "know that graphs are cut by a decorator",
    ),
    Seam(
        "call",
        "vllm.compilation.breakable_cudagraph",
        "eager_break_during_capture",
        "fn",
        "runner.py",
        "cut graphs at our op",
    ),
    Seam("class", _RUNNER, "MoERunner", "PluggableLayer", "runner.py experts.py", "replace runners"),
    Seam("replace", _RUNNER, "MoERunner._select_forward", "", "runner.py", "run a layer between graphs"),
    Seam(
        "has",
        _RUNNER,
        "MoERunner",
        "routed_experts _shared_experts layer_name forward",
        "runner.py experts.py",
        "run a layer between graphs, and reach its experts by its name",
    ),
    Seam(
        "call",
        _RUNNER,
        "MoERunner._forward_impl",
        "hidden_states, router_logits, shared_experts_input, input_ids",
        "runner.py",
        "compute a layer between graphs",
    ),
    *(
        Seam(
            "replace",
            _RUNNER,
            name,
            "hidden_states, router_logits, shared_experts_input, input_ids, layer_name, hidden_dim_unpadded",
            "runner.py",
            "allocate what vLLM's own op returns, and be called like it",
        )
        for name in ("_moe_forward_fake", "_moe_forward_shared_fake")
    ),
)

LAYER_SEAMS = (*_LAYER, *_NAMED_CLASSES, *_LOADING, *_GRAPHS)
