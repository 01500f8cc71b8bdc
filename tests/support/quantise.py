"""Packs the bf16 expert weights of a checkpoint into the quantised formats that vLLM reads."""

import re
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

Weights = dict[str, torch.Tensor]
#: Packs one expert matrix `[out, in]` into its checkpoint tensors, by name suffix.
Packer = Callable[[torch.Tensor], Weights]

FP8_BLOCK = 128
#: Inputs that share an INT4 scale; vLLM's CPU backend takes 32 for GPTQ and AWQ, but not for compressed-tensors.
INT4_GROUP = 64
#: Inputs that share a scale in the MX formats, by their definition.
MX_GROUP = 32
#: AWQ stores nibble i of an int32 at this place.
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
#: Magnitudes of FP4 E2M1, by code.
_FP4_VALUES = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
_EXPERT_WEIGHT = re.compile(r"(?P<prefix>.*\.experts\.\d+\.\w+)\.weight")


def _grouped(weight: torch.Tensor, size: int) -> torch.Tensor:
    """`[..., in]` as float32 `[..., in / size, size]`."""
    return weight.float().reshape(*weight.shape[:-1], -1, size)


def _nibbles(codes: torch.Tensor) -> torch.Tensor:
    """Packs 4-bit codes along the last dimension, lowest nibble first, 8 to an int32."""
    shifts = torch.arange(0, 32, 4, dtype=torch.int64)
    words = (codes.to(torch.int64).unflatten(-1, (-1, 8)) << shifts).sum(-1)
    return words.to(torch.uint32).view(torch.int32).contiguous()


def _int4_symmetric(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes 0..15 with zero point 8 `[out, in]`, and bf16 scales `[out, groups]`."""
    groups = _grouped(weight, INT4_GROUP)
    scale = (groups.abs().amax(-1, keepdim=True) / 7).clamp_min(1e-6).bfloat16()
    codes = (groups / scale.float()).round().clamp(-8, 7) + 8
    return codes.flatten(-2), scale.squeeze(-1)


def pack_fp8_block(weight: torch.Tensor) -> Weights:
    """FP8 E4M3 with one float32 scale per 128 x 128 block."""
    rows, columns = weight.shape
    padded = F.pad(weight.float(), (0, -columns % FP8_BLOCK, 0, -rows % FP8_BLOCK))
    blocks = padded.unflatten(0, (-1, FP8_BLOCK)).unflatten(-1, (-1, FP8_BLOCK))
    scale = (blocks.abs().amax((1, 3), keepdim=True) / 448).clamp_min(1e-12)
    values = (blocks / scale).to(torch.float8_e4m3fn).flatten(2, 3).flatten(0, 1)
    return {"weight": values[:rows, :columns].contiguous(), "weight_scale_inv": scale[:, 0, :, 0].contiguous()}


def pack_fp8_block_compressed(weight: torch.Tensor) -> Weights:
    """The same under compressed-tensors' names."""
    packed = pack_fp8_block(weight)
    return {"weight": packed["weight"], "weight_scale": packed["weight_scale_inv"]}


def pack_int8_channel(weight: torch.Tensor) -> Weights:
    """INT8 with one float32 scale per output channel."""
    scale = (weight.float().abs().amax(1, keepdim=True) / 127).clamp_min(1e-12)
    return {"weight": (weight.float() / scale).round().to(torch.int8), "weight_scale": scale}


def pack_gptq_int4(weight: torch.Tensor) -> Weights:
    """GPTQ: codes packed along the input dimension, zero points stored minus one."""
    codes, scale = _int4_symmetric(weight)
    zeros = torch.full((scale.shape[1], scale.shape[0]), 7)
    return {
        "qweight": _nibbles(codes).T.contiguous(),
        "qzeros": _nibbles(zeros),
        "scales": scale.T.contiguous(),
        "g_idx": torch.arange(weight.shape[1], dtype=torch.int32) // INT4_GROUP,
    }


def pack_awq_int4(weight: torch.Tensor) -> Weights:
    """AWQ "gemm": asymmetric codes, transposed, packed along the output dimension in AWQ's nibble order."""
    groups = _grouped(weight, INT4_GROUP)
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    scale = ((high - low) / 15).clamp_min(1e-6).bfloat16()
    zero = (-low / scale.float()).round().clamp(0, 15)
    codes = ((groups / scale.float()).round() + zero).clamp(0, 15).flatten(-2)

    def pack(values: torch.Tensor) -> torch.Tensor:
        return _nibbles(values.T.unflatten(-1, (-1, 8))[..., _AWQ_ORDER].flatten(-2))

    return {"qweight": pack(codes), "qzeros": pack(zero.squeeze(-1)), "scales": scale.squeeze(-1).T.contiguous()}


def pack_compressed_int4(weight: torch.Tensor) -> Weights:
    """compressed-tensors "pack-quantized": codes packed along the input dimension."""
    codes, scale = _int4_symmetric(weight)
    return {"weight_packed": _nibbles(codes), "weight_scale": scale, "weight_shape": torch.tensor(weight.shape)}


def mxfp4(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """FP4 E2M1 in groups of 32 along the last dimension: bytes `[..., in / 2]`, E8M0 scales `[..., in / 32]`."""
    groups = _grouped(weight, MX_GROUP)
    exponent = torch.floor(torch.log2(groups.abs().amax(-1, keepdim=True).clamp_min(2.0**-120))) - 2
    scaled = groups / exponent.exp2()
    codes = (scaled.abs().unsqueeze(-1) - _FP4_VALUES).abs().argmin(-1) | (scaled < 0).long() << 3
    low_high = codes.flatten(-2).unflatten(-1, (-1, 2))
    packed = (low_high[..., 0] | low_high[..., 1] << 4).to(torch.uint8)
    return packed.contiguous(), (exponent.squeeze(-1) + 127).to(torch.uint8)


def pack_mxfp4(weight: torch.Tensor) -> Weights:
    """MXFP4 with one tensor per expert, as `quant_method: mxfp4` reads it."""
    packed, scale = mxfp4(weight)
    return {"weight": packed, "weight_scale": scale}


def pack_gpt_oss_mxfp4(weights: Weights) -> Weights:
    """gpt-oss: the layer's transposed 3-D experts become `_blocks` and `_scales`; biases stay bf16."""
    packed: Weights = {}
    for name, tensor in weights.items():
        if name.endswith(("gate_up_proj", "down_proj")) and tensor.ndim == 3:
            codes, scale = mxfp4(tensor.transpose(1, 2))
            packed |= {f"{name}_blocks": codes.unflatten(-1, (-1, 16)), f"{name}_scales": scale}
        else:
            packed[name] = tensor
    return packed


def pack_experts(weights: Weights, packer: Packer) -> Weights:
    """Applies `packer` to every expert matrix and keeps the rest."""
    packed: Weights = {}
    for name, tensor in weights.items():
        if match := _EXPERT_WEIGHT.fullmatch(name):
            packed |= {f"{match['prefix']}.{suffix}": value for suffix, value in packer(tensor).items()}
        else:
            packed[name] = tensor
    return packed


def _other_modules(weights: Weights) -> list[str]:
    """Names of the modules that stay bf16: every matrix that is not an expert's."""
    names = (n.removesuffix(".weight") for n, t in weights.items() if t.ndim == 2 and n.endswith(".weight"))
    return sorted(name for name in names if ".experts." not in name and "embed" not in name)


def _compressed(weights: Weights, form: str, scheme: dict[str, Any], inputs: dict[str, Any] | None) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": scheme, "input_activations": inputs, "output_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "format": form,
        "config_groups": {"group_0": {**group, "format": form}},
        "ignore": _other_modules(weights),
    }


_STATIC = {"symmetric": True, "dynamic": False}
_DYNAMIC = {"symmetric": True, "dynamic": True}


def _int8(strategy: str) -> dict[str, Any]:
    return {"num_bits": 8, "type": "int", "strategy": strategy}


#: Formats whose experts `quantise_experts` packs.
PACKED_FORMATS = ("fp8_block", "ct_fp8_block", "ct_int8", "gptq_int4", "awq_int4", "ct_int4", "mxfp4")


def quantise_experts(weights: Weights, fmt: str) -> tuple[Weights, dict[str, Any]]:
    """Returns the checkpoint `weights` with experts in `fmt`, and its `quantization_config`."""
    group = {**_STATIC, "strategy": "group"}
    keep = _other_modules(weights)
    block = [FP8_BLOCK, FP8_BLOCK]
    float8_block = {**_STATIC, "num_bits": 8, "type": "float", "strategy": "block", "block_structure": block}
    float8_token = {**_DYNAMIC, "num_bits": 8, "type": "float", "strategy": "group", "group_size": FP8_BLOCK}
    config: dict[str, Any]
    match fmt:
        case "fp8_block":
            packer = pack_fp8_block
            config = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": block}
            config["modules_to_not_convert"] = keep
        case "ct_fp8_block":
            packer = pack_fp8_block_compressed
            config = _compressed(weights, "float-quantized", float8_block, float8_token)
        case "ct_int8":
            packer = pack_int8_channel
            config = _compressed(
                weights, "int-quantized", {**_STATIC, **_int8("channel")}, {**_DYNAMIC, **_int8("token")}
            )
        case "gptq_int4":
            packer = pack_gptq_int4
            config = {"quant_method": "gptq", "bits": 4, "group_size": INT4_GROUP, "desc_act": False, "sym": True}
            config |= {"lm_head": False, "dynamic": {f"-:{re.escape(name)}": {} for name in keep}}
            config["dynamic"][r"-:.*self_attn"] = {}
        case "awq_int4":
            packer = pack_awq_int4
            config = {"quant_method": "awq", "bits": 4, "group_size": INT4_GROUP, "zero_point": True}
            config |= {"version": "gemm", "modules_to_not_convert": keep}
        case "ct_int4":
            packer = pack_compressed_int4
            config = _compressed(
                weights, "pack-quantized", {**group, "group_size": INT4_GROUP, "num_bits": 4, "type": "int"}, None
            )
        case "mxfp4":
            packer = pack_mxfp4
            config = {"quant_method": "mxfp4", "modules_to_not_convert": keep}
        case _:
            raise KeyError(fmt)
    if any(name.endswith("experts.gate_up_proj") for name in weights):
        if fmt != "mxfp4":
            raise KeyError(f"{fmt}: gpt-oss checkpoints come in bf16 or mxfp4")
        return pack_gpt_oss_mxfp4(weights), config
    return pack_experts(weights, packer), config
