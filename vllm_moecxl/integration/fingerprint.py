"""What a slab file is packed for: serving it with anything else would give wrong tokens."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
import vllm
from blake3 import blake3
from vllm.distributed.parallel_state import get_pp_group, get_tp_group
from vllm.model_executor.model_loader import get_model_loader
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

from vllm_moecxl.errors import UnsupportedModelError
from vllm_moecxl.units import KIB

#: A fine-tuned model has the shapes of its base and nearly none of its values: this many pieces of each weight file,
#: evenly spread, tell them apart without reading the checkpoint.
_SAMPLE_COUNT = 256
_SAMPLE_BYTES = 4 * KIB
_CONFIG = "config.json"


def fingerprint(vllm_config: Any) -> dict[str, str]:
    """Everything that the bytes of a slab depend on, on this rank, in words that an error message can use.

    Raises:
        UnsupportedModelError: the load format has no weight files to tell the model by.
    """
    model_config, tensor_parallel, pipeline = vllm_config.model_config, get_tp_group(), get_pp_group()
    folder, files = _weight_files(vllm_config.load_config, model_config)
    config_bytes = (folder / _CONFIG).read_bytes() if (folder / _CONFIG).exists() else b""
    overrides = repr((model_config.hf_overrides, model_config.quantization, str(model_config.dtype)))
    return {
        "weights": _digest_of_samples(files),
        "configuration": blake3(config_bytes + overrides.encode()).hexdigest()[:16],
        "quantisation": str(model_config.quantization),
        "vLLM": str(vllm.__version__),
        "instruction set": _instruction_set(vllm_config.device_config.device_type),
        "tensor-parallel rank": f"{tensor_parallel.rank_in_group} of {tensor_parallel.world_size}",
        "pipeline stage": f"{pipeline.rank_in_group} of {pipeline.world_size}",
    }


def _weight_files(load_config: Any, model_config: Any) -> tuple[Path, list[Path]]:
    """The checkpoint's folder and weight files, as vLLM's own loader finds them."""
    loader = get_model_loader(load_config)
    if not isinstance(loader, DefaultModelLoader):
        raise UnsupportedModelError(
            f"--load-format {load_config.load_format} has no weight files that a slab file could be told by: use auto "
            "with banks of kind file and with moecxl pack"
        )
    folder, files, *_ = loader._prepare_weights(
        model_config.model_weights or model_config.model,
        None,
        model_config.revision,
        fall_back_to_pt=True,
        allow_patterns_overrides=None,
    )
    return Path(folder), sorted(map(Path, files))


def _digest_of_samples(files: list[Path]) -> str:
    digest = blake3()
    for path in files:
        size = path.stat().st_size
        digest.update(f"{path.name}:{size};".encode())
        with path.open("rb", buffering=0) as file:
            for index in range(_SAMPLE_COUNT):
                offset = index * max(size - _SAMPLE_BYTES, 0) // (_SAMPLE_COUNT - 1)
                digest.update(os.pread(file.fileno(), _SAMPLE_BYTES, offset))
    return digest.hexdigest()[:16]


def _instruction_set(device_type: str) -> str:
    if device_type == "cpu":
        amx = " AMX" if torch.cpu._is_amx_tile_supported() else ""
        return f"{torch.backends.cpu.get_cpu_capability()}{amx}"
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    return f"{properties.name} sm_{properties.major}{properties.minor}"
