"""The sizes of a model, from the configuration that its checkpoint comes with, and what its forwards take."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_moecxl.control.simulator.machine import Device
from vllm_moecxl.errors import ConfigError

_FOLDER = Path(__file__).parent / "models"

#: Bytes of a weight, the scales of a group of 128 included.
WEIGHT_BYTES: Mapping[str, float] = {"float32": 4.0, "bfloat16": 2.0, "fp8": 1.0, "int4": 0.5 + 4 / 128}
_DTYPE_FORMATS = {"float32": "float32", "bfloat16": "bfloat16", "float16": "bfloat16"}

#: Under which names models keep what we ask for.
_EXPERT_COUNT = ("n_routed_experts", "num_local_experts", "num_experts")
_EXPERT_WIDTH = ("moe_intermediate_size", "intermediate_size")


@dataclass(frozen=True)
class ModelShape:
    """A model, as far as the time of its forwards goes.

    Attributes:
        name: for messages.
        layer_count: MoE layers.
        expert_count: experts of a layer.
        topk: experts of one token.
        expert_weight_count: weights of one expert.
        slab_bytes: of one expert.
        beside_bytes: of what every token reads in an MoE layer: attention, router, shared experts.
        beside_weight_count: the weights that these are.
        rest_bytes: of what comes once a step: dense layers, the head.
        rest_weight_count: the weights that these are.
    """

    name: str
    layer_count: int
    expert_count: int
    topk: int
    expert_weight_count: int
    slab_bytes: int
    beside_bytes: int
    beside_weight_count: int
    rest_bytes: int
    rest_weight_count: int

    @classmethod
    def of(cls, config: Mapping[str, Any], name: str, expert_format: str | None = None) -> ModelShape:
        """From a Hugging Face configuration.

        Args:
            expert_format: one of `WEIGHT_BYTES` for the experts' weights; None for the checkpoint's own.

        Raises:
            KeyError, TypeError, ValueError: something is missing, or not what it has to be.
        """
        dtype_format = _DTYPE_FORMATS[str(config.get("dtype") or config.get("torch_dtype") or "bfloat16")]
        other_bytes = WEIGHT_BYTES[dtype_format]
        expert_bytes = WEIGHT_BYTES[expert_format or _quantized_format(config) or dtype_format]
        hidden = int(config["hidden_size"])
        expert_count, topk = int(_first(config, _EXPERT_COUNT)), int(config["num_experts_per_tok"])
        expert_weight_count = 3 * hidden * int(_first(config, _EXPERT_WIDTH))
        all_count = int(config["num_hidden_layers"])
        dense_count = int(config.get("first_k_dense_replace") or 0)
        shared_count = int(config.get("n_shared_experts") or 0) * expert_weight_count
        attention_count = _attention_weight_count(config, hidden)
        beside_count = attention_count + hidden * expert_count + shared_count
        dense_weight_count = attention_count + 3 * hidden * int(config.get("intermediate_size") or 0)
        rest_count = dense_count * dense_weight_count + hidden * int(config["vocab_size"])
        if not (0 < topk <= expert_count and 0 <= dense_count < all_count and hidden > 0):
            raise ValueError("its sizes contradict each other")
        return cls(
            name,
            all_count - dense_count,
            expert_count,
            topk,
            expert_weight_count,
            round(expert_weight_count * expert_bytes),
            round(beside_count * other_bytes),
            beside_count,
            round(rest_count * other_bytes),
            rest_count,
        )


def names() -> list[str]:
    """The configurations that come with the package."""
    return sorted(path.stem for path in _FOLDER.glob("*.json"))


def load(text: str, expert_format: str | None = None) -> ModelShape:
    """A model by the name of a configuration of the package, or from a config.json or a folder that has one.

    Raises:
        ConfigError: there is none, or it is not one of an MoE model.
    """
    path = _FOLDER / f"{text}.json" if text in names() else Path(text)
    path = path / "config.json" if path.is_dir() else path
    remedy = f"name one of {', '.join(names())}, or the config.json of a Mixture-of-Experts model or its folder"
    try:
        config = json.loads(path.read_text())
        if not isinstance(config, dict):
            raise ValueError("it is not a JSON object")
        # Models of several parts keep the language model's own sizes apart.
        return ModelShape.of(config.get("text_config") or config, text, expert_format)
    except OSError as error:
        raise ConfigError(f"--model {text} is not possible: {error.strerror or error}; {remedy}") from error
    except KeyError as error:
        raise ConfigError(f"--model {text} is not possible: it has no {error.args[0]}; {remedy}") from error
    except (TypeError, ValueError) as error:
        raise ConfigError(f"--model {text} is not possible: {error}; {remedy}") from error


class Compute:
    """How long the kernels of a model take on a device: as long as it takes to read their weights, or to compute.

    Args:
        layer_s: what a one-token step takes on the resident engine, divided by its MoE layers; None to go by the
            device's figures alone. With it these say only how wider steps compare.
    """

    def __init__(self, model: ModelShape, device: Device, layer_s: float | None = None) -> None:
        assert layer_s is None or layer_s > 0
        self._model = model
        self._device = device
        self._bytes_per_s = device.memory_bytes_per_s * device.achieved_share
        self._flops_per_s = device.flops_per_s * device.achieved_share
        self._scale = 1.0
        if layer_s is not None:
            modelled_s = self.beside_s(1) + self.experts_s(1, model.topk) + self.rest_s(1) / model.layer_count
            self._scale = layer_s / modelled_s

    def beside_s(self, token_count: int) -> float:
        """An MoE layer without its routed experts."""
        model = self._model
        kernel_s = self._kernel_s(model.beside_bytes, token_count * model.beside_weight_count)
        return (kernel_s + self._device.layer_s) * self._scale

    def experts_s(self, token_count: int, expert_count: int) -> float:
        """The routed experts of some tokens, which are so many different ones."""
        weight_count = token_count * self._model.topk * self._model.expert_weight_count
        return self._kernel_s(expert_count * self._model.slab_bytes, weight_count) * self._scale

    def rest_s(self, token_count: int) -> float:
        """What a step takes outside of its MoE layers."""
        model = self._model
        kernel_s = self._kernel_s(model.rest_bytes, token_count * model.rest_weight_count)
        return (kernel_s + self._device.step_s) * self._scale

    def copy_s(self, expert_count: int) -> float:
        """Slabs from one place of the device's memory to another."""
        return 2 * expert_count * self._model.slab_bytes / self._bytes_per_s

    def _kernel_s(self, byte_count: float, weight_count: float) -> float:
        return max(byte_count / self._bytes_per_s, 2 * weight_count / self._flops_per_s)


def _first(config: Mapping[str, Any], keys: tuple[str, ...]) -> Any:
    for key in keys:
        if config.get(key) is not None:
            return config[key]
    raise KeyError(keys[0])


def _quantized_format(config: Mapping[str, Any]) -> str | None:
    quantization = config.get("quantization_config")
    if not quantization:
        return None
    method, bits = str(quantization.get("quant_method")), quantization.get("bits")
    if method == "fp8":
        return "fp8"
    if bits == 4 or method == "mxfp4":
        return "int4"
    raise ValueError(f"the size of its {method} weights is not known")


def _attention_weight_count(config: Mapping[str, Any], hidden: int) -> int:
    head_count = int(config["num_attention_heads"])
    if not config.get("kv_lora_rank"):
        head_dim = int(config.get("head_dim") or hidden // head_count)
        kv_count = int(config.get("num_key_value_heads") or head_count)
        return 2 * hidden * head_dim * (head_count + kv_count)
    # Latent attention, as DeepSeek's models have it.
    nope, rope, value = (int(config[key]) for key in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"))
    kv_rank, query_rank = int(config["kv_lora_rank"]), int(config.get("q_lora_rank") or 0)
    query_width = head_count * (nope + rope)
    query = query_rank * (hidden + query_width) if query_rank else hidden * query_width
    return query + hidden * (kv_rank + rope) + kv_rank * head_count * (nope + value) + head_count * value * hidden
