"""Small random-weight Hugging Face checkpoints that stock vLLM serves on a CPU."""

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests.support.quantise import PACKED_FORMATS, quantise_experts

#: Sizes that every architecture shares: multiples of 128 (FP8 blocks) and of 32 (the CPU's grouped GEMM).
_BASE: dict[str, Any] = {
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": None,
    "tie_word_embeddings": False,
    "num_experts_per_tok": 2,
}
#: The CPU's MLA kernel accepts these head dimensions only.
_MLA: dict[str, Any] = {
    "kv_lora_rank": 512,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 32,
    "v_head_dim": 32,
    "q_lora_rank": 64,
    "num_key_value_heads": 4,
}
_QWEN3_MOE: dict[str, Any] = {
    "model_type": "qwen3_moe",
    "head_dim": 32,
    "intermediate_size": 256,
    "moe_intermediate_size": 128,
    "num_experts": 8,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
}

#: Name of an architecture -> the settings of its configuration (`model_type` picks the class).
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "mixtral": {"model_type": "mixtral", "head_dim": 32, "intermediate_size": 256, "num_local_experts": 8},
    "qwen3_moe": _QWEN3_MOE,
    "qwen3_moe_16x6": {**_QWEN3_MOE, "num_experts": 16, "num_experts_per_tok": 6, "num_hidden_layers": 3},
    "qwen2_moe": {
        "model_type": "qwen2_moe",
        "intermediate_size": 256,
        "moe_intermediate_size": 64,
        "shared_expert_intermediate_size": 128,
        "num_experts": 8,
        "decoder_sparse_step": 1,
    },
    "olmoe": {"model_type": "olmoe", "intermediate_size": 128, "num_experts": 8},
    "deepseek_v2": {
        **_MLA,
        "model_type": "deepseek_v2",
        "num_hidden_layers": 3,
        "intermediate_size": 256,
        "moe_intermediate_size": 64,
        "n_routed_experts": 8,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
        "topk_method": "group_limited_greedy",
        "n_group": 4,
        "topk_group": 2,
        "scoring_func": "softmax",
    },
    "deepseek_v3": {
        **_MLA,
        "model_type": "deepseek_v3",
        "num_hidden_layers": 3,
        "intermediate_size": 256,
        "moe_intermediate_size": 128,
        "n_routed_experts": 16,
        "n_shared_experts": 1,
        "num_experts_per_tok": 4,
        "first_k_dense_replace": 1,
        "topk_method": "noaux_tc",
        "n_group": 4,
        "topk_group": 2,
        "scoring_func": "sigmoid",
        "num_nextn_predict_layers": 0,
    },
    "glm4_moe": {
        "model_type": "glm4_moe",
        "head_dim": 32,
        "num_hidden_layers": 3,
        "intermediate_size": 256,
        "moe_intermediate_size": 64,
        "n_routed_experts": 8,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
        "use_qk_norm": True,
        "num_nextn_predict_layers": 0,
    },
    "gpt_oss": {
        "model_type": "gpt_oss",
        "head_dim": 32,
        "intermediate_size": 128,
        "num_local_experts": 8,
        "num_experts_per_tok": 4,
        "sliding_window": 128,
        "max_position_embeddings": 131072,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "granitemoe": {"model_type": "granitemoe", "intermediate_size": 64, "num_local_experts": 8},
    "lfm2_moe": {
        "model_type": "lfm2_moe",
        "intermediate_size": 256,
        "moe_intermediate_size": 64,
        "num_experts": 8,
        "num_dense_layers": 1,
        "num_hidden_layers": 3,
        "layer_types": ["conv", "full_attention", "conv"],
    },
    "qwen3_next": {
        "model_type": "qwen3_next",
        "head_dim": 64,
        "intermediate_size": 256,
        "moe_intermediate_size": 64,
        "shared_expert_intermediate_size": 64,
        "num_experts": 8,
        "linear_key_head_dim": 128,
        "linear_value_head_dim": 128,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "layer_types": ["linear_attention", "full_attention"],
    },
    "llama4_text": {
        "model_type": "llama4_text",
        "head_dim": 32,
        "intermediate_size": 64,
        "intermediate_size_mlp": 256,
        "num_local_experts": 8,
        "num_experts_per_tok": 1,
        "interleave_moe_layer_step": 1,
    },
    "phimoe": {"model_type": "phimoe", "intermediate_size": 64, "num_local_experts": 8},
    "jamba": {
        "model_type": "jamba",
        "intermediate_size": 64,
        "num_experts": 8,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "mamba_d_state": 16,
        "mamba_dt_rank": 16,
    },
    "granitemoehybrid": {
        "model_type": "granitemoehybrid",
        "intermediate_size": 64,
        "shared_intermediate_size": 64,
        "num_local_experts": 8,
        "layer_types": ["mamba", "attention"],
        "mamba_n_heads": 8,
        "mamba_d_head": 32,
        "mamba_d_state": 32,
    },
}

#: Arguments of `vllm.LLM` for every combination: in-process, eager, smallest cache.
ENGINE_KWARGS: dict[str, Any] = {
    "dtype": "bfloat16",
    "enforce_eager": True,
    "kv_cache_memory_bytes": 64 << 20,
    "max_model_len": 256,
    "max_num_seqs": 8,
}
#: Formats that vLLM makes while it loads a bf16 checkpoint.
FORMAT_ENGINE_KWARGS: dict[str, dict[str, Any]] = {
    "online_int8": {"quantization": "experts_int8"},
    "online_fp8_block": {"quantization": "online", "quantization_config": {"moe": "fp8_per_block"}},
}
FORMATS = ("bf16", *PACKED_FORMATS, *FORMAT_ENGINE_KWARGS)

#: (arch, format) that stock vLLM 0.32 refuses or cannot run on a CPU, `lift_amx_gate()` or not -> what it says.
#: Seen on a Zen 5 (AVX-512, no AMX); formats without a packer here were tried by hand.
UNAVAILABLE: dict[tuple[str, str], str] = {
    ("jamba", "bf16"): "mamba_mixer.forward_impl: IndexError: Dimension out of range (conv1d.weight.size(2))",
    ("phimoe", "bf16"): "ValueError: too many values to unpack (expected 3)",
    ("any", "fp8 per tensor, online"): "RuntimeError: _C::static_scaled_fp8_quant() expected at most 0 argument(s)",
    ("any", "fp8 per channel, online"): "RuntimeError: _C::dynamic_per_token_scaled_fp8_quant() expected at most 0 ...",
    ("any", "mxfp8"): "picks Mxfp8EmulationTritonExperts: module 'triton.language' has no attribute 'bfloat16'",
    ("any", "mxfp4, online"): "No MXFP4 MoE backend supports the deployment configuration (its quantiser needs Triton)",
    ("any", "mxfp4, compressed-tensors"): "picks MarlinExperts: '_C' object has no attribute 'gptq_marlin_repack'",
    ("any", "int4 group 32, compressed-tensors"): "No WNA16 MoE backend supports the deployment configuration",
    ("any", "nvfp4, online"): "nvfp4_per_token online quantization requires a Blackwell (SM100) GPU",
}

#: (arch, format) that stock vLLM serves, seen on a CPU with AVX-512 and without AMX.
COMBINATIONS: list[tuple[str, str]] = [(a, "bf16") for a in ARCHITECTURES if (a, "bf16") not in UNAVAILABLE]

#: (arch, format) whose kernels vLLM offers only where the CPU has AMX tiles. It refuses them elsewhere ("No WNA16 MoE
#: backend supports the deployment configuration" and the like), although the kernels need no more than AVX-512
#: with BF16 and VNNI: after `lift_amx_gate()` they run there too, and agree with the dequantised weights.
AMX_COMBINATIONS: list[tuple[str, str]] = [
    *(("mixtral", fmt) for fmt in FORMATS if fmt != "bf16"),
    *(("qwen3_moe_16x6", fmt) for fmt in ("fp8_block", "ct_int8", "ct_int4", "mxfp4")),
    ("deepseek_v3", "fp8_block"),
    ("gpt_oss", "mxfp4"),
]


def engine_kwargs(fmt: str) -> dict[str, Any]:
    """The arguments of `vllm.LLM` for a format, the model's path aside."""
    return {**ENGINE_KWARGS, **FORMAT_ENGINE_KWARGS.get(fmt, {})}


def lift_amx_gate() -> None:
    """Lets vLLM pick its quantised CPU experts in this process although the CPU has no AMX tiles.

    Only the capability check changes, for the experts: attention, linear layers and unquantised experts, which do
    issue AMX instructions, keep theirs.
    """
    from vllm.model_executor.layers.fused_moe.experts import cpu_moe

    for experts in (cpu_moe.CPUExpertsFp8, cpu_moe.CPUExpertsInt8, cpu_moe.CPUExpertsInt4, cpu_moe.CPUExpertsMxfp4):
        experts._supports_current_device = staticmethod(lambda: True)


def _initialise(model: torch.nn.Module, seed: int) -> None:
    """Overwrites `model`'s random weights with unit-gain ones, so that logits and routing vary with the token.

    Norms and recurrences keep their model's start values; biases and gates must not stay zero, or an error in them
    would not show.
    """
    for index, (name, tensor) in enumerate(sorted(model.state_dict().items())):
        generator = torch.Generator().manual_seed(seed * 1_000_003 + index)
        if "embed_tokens" in name:
            std = 0.2
        elif "bias" in name or "sinks" in name:
            std = 0.1
        elif tensor.ndim >= 2 and not (tensor.ndim == 3 and "conv" in name) and not name.endswith("A_log"):
            fan_in = tensor.shape[-1] if tensor.ndim == 2 else min(tensor.shape[-2:])
            std = 1.5 * fan_in**-0.5
        else:
            continue
        tensor.copy_(torch.randn(tensor.shape, generator=generator) * std)


def build(arch: str, fmt: str, out_dir: Path, tokenizer_dir: Path, seed: int = 0) -> Path:
    """Writes the checkpoint of `arch` in `fmt` into `out_dir` and returns `out_dir`; the same seed, the same bytes."""
    import transformers
    from tokenizers import Tokenizer

    if arch not in ARCHITECTURES or fmt not in FORMATS:
        raise KeyError(f"{arch=}, {fmt=}: known are {sorted(ARCHITECTURES)} and {sorted(FORMATS)}")
    out_dir.mkdir(parents=True, exist_ok=True)
    vocab_size = Tokenizer.from_file(str(tokenizer_dir / "tokenizer.json")).get_vocab_size()
    settings = {**_BASE, **ARCHITECTURES[arch], "vocab_size": -(-vocab_size // 64) * 64}
    config = transformers.AutoConfig.for_model(settings.pop("model_type"), **settings)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    with torch.no_grad():
        _initialise(model, seed)
    model.save_pretrained(out_dir)
    (out_dir / "generation_config.json").unlink(missing_ok=True)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(tokenizer_dir / name, out_dir / name)
    if fmt in PACKED_FORMATS:
        _quantise(out_dir, fmt)
    return out_dir


def _quantise(checkpoint_dir: Path, fmt: str) -> None:
    """Rewrites a bf16 checkpoint with its experts in `fmt`."""
    weights, quantization_config = quantise_experts(load_file(checkpoint_dir / "model.safetensors"), fmt)
    save_file(weights, checkpoint_dir / "model.safetensors", metadata={"format": "pt"})
    config_path = checkpoint_dir / "config.json"
    config = json.loads(config_path.read_text())
    config["quantization_config"] = quantization_config
    config_path.write_text(json.dumps(config, indent=2) + "\n")


#: Set before vLLM is imported: one process, one thread, no network.
ENGINE_ENV = {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
}
_PROMPTS = ("The quick brown fox", "import os\nimport sys")


def _describe_experts(model: torch.nn.Module) -> dict[str, Any]:
    """The experts class of `model`'s first MoE layer, its parameters, and expert tensors that only the kernel holds."""
    layer: Any = next(m for m in model.modules() if any(c.__name__ == "RoutedExperts" for c in type(m).__mro__))
    experts: Any = layer.quant_method.moe_kernel.fused_experts
    params = dict(layer.named_parameters(remove_duplicate=False))
    storages = {p.data_ptr() for p in params.values()}
    expert_count = params["w2_weight"].shape[0]
    held: dict[str, torch.Tensor] = {}
    for owner in (experts, *(getattr(experts.quant_config, f"_{side}", None) for side in ("a1", "a2", "w1", "w2"))):
        for name, value in vars(owner).items() if owner is not None else ():
            held_only_here = isinstance(value, torch.Tensor) and value.data_ptr() not in storages
            if held_only_here and value.ndim and value.shape[0] == expert_count:
                held[f"{type(owner).__name__}.{name}"] = value
    return {
        "method": type(layer.quant_method).__name__,
        "experts": type(experts).__name__,
        "params": {name: _text(p) for name, p in params.items()},
        "kernel_only": {name: _text(t) for name, t in held.items()},
    }


def _text(tensor: torch.Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"


def _probe(fmt: str, checkpoint_dir: Path) -> dict[str, Any]:
    """Serves one checkpoint with stock vLLM and reports what it used and generated."""
    from vllm import LLM, SamplingParams

    if fmt != "bf16":
        lift_amx_gate()
    llm = LLM(str(checkpoint_dir), **engine_kwargs(fmt))
    outputs = llm.generate(list(_PROMPTS), SamplingParams(temperature=0, max_tokens=8, ignore_eos=True), use_tqdm=False)
    return {
        **llm.apply_model(_describe_experts)[0],
        "tokens": [list(output.outputs[0].token_ids) for output in outputs],
    }


def _probe_all(combinations: list[tuple[str, str]], root: Path) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Probes in one child process for as long as it succeeds: after a failed `LLM()` a process cannot start another."""
    remaining = list(combinations)
    while remaining:
        child = subprocess.run(
            [sys.executable, "-m", __spec__.name, str(root), "--worker", *(f"{a}:{f}" for a, f in remaining)],
            env={**os.environ, **ENGINE_ENV},
            capture_output=True,
            text=True,
            check=False,
        )
        reports = [json.loads(line[7:]) for line in child.stdout.splitlines() if line.startswith("REPORT ")]
        if child.returncode != 0 and not (reports and "error" in reports[-1]):
            reports.append({"error": f"exit status {child.returncode}: {child.stderr.strip().splitlines()[-1:]}"})
        for (arch, fmt), report in zip(remaining, reports, strict=False):
            yield arch, fmt, report
        remaining = remaining[len(reports) :]


def _work(combinations: list[tuple[str, str]], root: Path) -> int:
    """The child's side of `_probe_all`: one line per combination, stops at the first failure."""
    for arch, fmt in combinations:
        try:
            report = _probe(fmt, root / f"{arch}-{fmt}")
        except Exception as error:  # noqa: BLE001 - the report is where it shows, whatever it is
            print("REPORT", json.dumps({"error": f"{type(error).__name__}: {error}"}), flush=True)
            return 1
        print("REPORT", json.dumps(report), flush=True)
    return 0


def main() -> int:
    """Builds combinations, serves each with stock vLLM and prints what it used."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("directory", type=Path, help="where the checkpoints go")
    parser.add_argument("--tokenizer-dir", type=Path, default=Path(__file__).parents[1] / "fixtures" / "mixtral-tiny")
    parser.add_argument("--only", nargs="*", metavar="ARCH:FMT", help="these instead of all")
    parser.add_argument("--worker", nargs="*", metavar="ARCH:FMT", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return _work([tuple(c.split(":")) for c in args.worker], args.directory)
    combinations = [tuple(c.split(":")) for c in args.only] if args.only else COMBINATIONS + AMX_COMBINATIONS
    for arch, fmt in combinations:
        build(arch, fmt, args.directory / f"{arch}-{fmt}", args.tokenizer_dir)
    failed = 0
    for arch, fmt, report in _probe_all(combinations, args.directory):
        if "error" in report:
            failed += 1
            print(f"{arch:18} {fmt:16} FAILED {report['error']}", flush=True)
            continue
        print(f"{arch:18} {fmt:16} {report['experts']} ({report['method']}) tokens {report['tokens']}")
        print(f"    params {report['params']}\n    kernel only {report['kernel_only']}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
