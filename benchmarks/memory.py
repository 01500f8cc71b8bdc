"""Peak of host memory while a checkpoint with 2 GB of experts is loaded into homes, against vLLM without experts."""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator
from functools import wraps
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from benchmarks.common import FIXTURE_MODEL, Result, print_table, save
from benchmarks.engines import call_in_child, make_engine
from vllm_moecxl.units import KIB, MIB, format_bytes

_LAYER_COUNT = 32
_EXPERT_COUNT = 8
_HIDDEN_SIZE = 512
_HEAD_COUNT = 8
_INTERMEDIATE_SIZE = 2752
#: What remains of the experts in the model that stands for "no experts".
_NARROW_SIZE = 32
_VOCABULARY_SIZE = 2048
_SHARD_BYTES = 512 * MIB
_SAMPLE_PERIOD_S = 0.005
_FIELDS = ("RssAnon", "RssFile", "RssShmem")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this benchmark."""
    parser.add_argument("--slots", default="25%", help="slots of the offloading engine")


def run(args: argparse.Namespace) -> Result:
    """Measure, print and save."""
    with tempfile.TemporaryDirectory() as folder:
        narrow, wide = Path(folder, "narrow"), Path(folder, "wide")
        narrow_bytes = write_checkpoint(narrow, _NARROW_SIZE)
        experts_bytes = write_checkpoint(wide, _INTERMEDIATE_SIZE)
        baseline = call_in_child("benchmarks.memory", "load", model=str(narrow), slots=None)
        offloaded = call_in_child("benchmarks.memory", "load", model=str(wide), slots=args.slots)
        plain = call_in_child("benchmarks.memory", "load", model=str(wide), slots=None)
    baseline_bytes = baseline["peak_bytes"] - narrow_bytes
    anonymous_baseline_bytes = baseline["anonymous_peak_bytes"] - narrow_bytes

    def ratios(load: Result) -> Result:
        return {
            "peak": round((load["peak_bytes"] - baseline_bytes) / experts_bytes, 4),
            "anonymous_peak": round((load["anonymous_peak_bytes"] - anonymous_baseline_bytes) / experts_bytes, 4),
        }

    result = save(
        "memory",
        "hardware",
        {
            "experts_bytes": experts_bytes,
            "host_peak_bytes": offloaded["peak_bytes"],
            "baseline_bytes": baseline_bytes,
            "host_peak_ratio": ratios(offloaded)["peak"],
            "anonymous_peak_ratio": ratios(offloaded)["anonymous_peak"],
            "plain_peak_ratio": ratios(plain)["peak"],
            "slots": args.slots,
            "model": f"Mixtral, {_LAYER_COUNT} layers x {_EXPERT_COUNT} experts, random weights",
            "loads": {"baseline": baseline, "offloaded": offloaded, "plain": plain},
        },
    )
    print_table(
        ["load", *baseline],
        [[name, *map(_in_words, load.values())] for name, load in result["loads"].items()],
    )
    print(f"experts {format_bytes(experts_bytes)}, (peak - baseline) / experts = {result['host_peak_ratio']}")
    return result


def _in_words(value: Any) -> str:
    return format_bytes(value) if isinstance(value, int) else str(value)


def write_checkpoint(folder: Path, intermediate_size: int) -> int:
    """A Mixtral checkpoint of random weights, in shards that cut through layers as those on the hub do.

    Returns:
        Bytes of its experts.
    """
    folder.mkdir()
    for path in FIXTURE_MODEL.iterdir():
        if path.name.startswith(("tokenizer", "generation_config")):
            shutil.copyfile(path, folder / path.name)
    config = json.loads((FIXTURE_MODEL / "config.json").read_text()) | {
        "hidden_size": _HIDDEN_SIZE,
        "intermediate_size": intermediate_size,
        "num_hidden_layers": _LAYER_COUNT,
        "num_local_experts": _EXPERT_COUNT,
        "num_attention_heads": _HEAD_COUNT,
        "num_key_value_heads": _HEAD_COUNT,
        "head_dim": _HIDDEN_SIZE // _HEAD_COUNT,
        "vocab_size": _VOCABULARY_SIZE,
    }
    (folder / "config.json").write_text(json.dumps(config))
    shapes = dict(_shapes(intermediate_size))
    block = torch.randn(1 << 22, generator=torch.Generator().manual_seed(3)).mul_(0.02).bfloat16()
    shards: list[dict[str, torch.Tensor]] = [{}]
    shard_bytes = 0
    for index, (name, shape) in enumerate(shapes.items()):
        start = (index * 8191) % (block.numel() // 2)
        tensor = block[start : start + shape.numel()].clone().view(shape)
        if shard_bytes + tensor.nbytes > _SHARD_BYTES:
            _write_shard(folder, len(shards), shards[-1])
            shards.append({})
            shard_bytes = 0
        shards[-1][name] = tensor
        shard_bytes += tensor.nbytes
    _write_shard(folder, len(shards), shards[-1])
    weight_map = {name: _shard_name(number) for number, shard in enumerate(shards, 1) for name in shard}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return sum(2 * shape.numel() for name, shape in shapes.items() if ".experts." in name)


def _shard_name(number: int) -> str:
    return f"model-{number:05}.safetensors"


def _write_shard(folder: Path, number: int, tensors: dict[str, torch.Tensor]) -> None:
    save_file(tensors, folder / _shard_name(number), metadata={"format": "pt"})
    for name in tensors:
        tensors[name] = torch.empty(0)


def _shapes(intermediate_size: int) -> Iterator[tuple[str, torch.Size]]:
    hidden = _HIDDEN_SIZE
    yield "model.embed_tokens.weight", torch.Size((_VOCABULARY_SIZE, hidden))
    for layer in range(_LAYER_COUNT):
        prefix = f"model.layers.{layer}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            yield f"{prefix}.{norm}.weight", torch.Size((hidden,))
        for matrix in "qkvo":
            yield f"{prefix}.self_attn.{matrix}_proj.weight", torch.Size((hidden, hidden))
        yield f"{prefix}.block_sparse_moe.gate.weight", torch.Size((_EXPERT_COUNT, hidden))
        for expert in range(_EXPERT_COUNT):
            for matrix in ("w1", "w3", "w2"):
                shape = (hidden, intermediate_size) if matrix == "w2" else (intermediate_size, hidden)
                yield f"{prefix}.block_sparse_moe.experts.{expert}.{matrix}.weight", torch.Size(shape)
    yield "model.norm.weight", torch.Size((hidden,))
    yield "lm_head.weight", torch.Size((_VOCABULARY_SIZE, hidden))


def load(model: str, slots: str | None, banks: list[str] | None = None) -> Result:
    """Load a model in this fresh process, serve a little, and say what it took.

    Args:
        slots: None for plain vLLM.
        banks: homes, where they are not "auto".

    Slots are the device's memory. On the CPU engine they too come out of the host's, once they are touched: the peak is
    therefore read when the weights are loaded, and again when the slots have been in use.
    """
    from vllm import SamplingParams
    from vllm.model_executor.model_loader.base_loader import BaseModelLoader

    result: Result = {}
    sampler = _Sampler()
    load_model = BaseModelLoader.load_model

    @wraps(load_model)
    def measured_load(*args: Any, **kwargs: Any) -> Any:
        result["before_load_bytes"] = _status_bytes("VmRSS")
        started_s = time.perf_counter()
        loaded = load_model(*args, **kwargs)
        result["load_s"] = round(time.perf_counter() - started_s, 3)
        result["peak_bytes"] = peak_bytes()
        result["anonymous_peak_bytes"] = sampler.peak_anonymous_bytes
        result["peak_split"] = {name: bytes_ // MIB for name, bytes_ in sampler.at_peak.items()}
        result["after_load_bytes"] = _status_bytes("VmRSS")
        return loaded

    BaseModelLoader.load_model = measured_load
    with sampler:
        llm = make_engine(Path(model), slots=slots, banks=banks, max_model_len=512)
        prompts = [{"prompt_token_ids": list(range(start, start + 128))} for start in range(1, 1000, 100)]
        llm.generate(prompts, SamplingParams(temperature=0, max_tokens=8, ignore_eos=True), use_tqdm=False)
    result["serving_peak_bytes"] = peak_bytes()
    return result


def peak_bytes() -> int:
    """The most memory that this process has had."""
    return _status_bytes("VmHWM")


def _status_bytes(field: str) -> int:
    return _status()[field]


def _status() -> dict[str, int]:
    rows = (line.partition(":") for line in Path("/proc/self/status").read_text().splitlines())
    return {name: int(value.split()[0]) * KIB for name, _, value in rows if value.endswith(" kB")}


class _Sampler:
    """Watches this process' resident memory from a thread.

    Attributes:
        peak_anonymous_bytes: the most that was anonymous or shared memory.
        at_peak: what resident memory was made of when the most of it was seen.
    """

    def __init__(self) -> None:
        self.peak_anonymous_bytes = 0
        self.at_peak: dict[str, int] = dict.fromkeys(_FIELDS, 0)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(_SAMPLE_PERIOD_S):
            status = _status()
            now = {name: status[name] for name in _FIELDS}
            self.peak_anonymous_bytes = max(self.peak_anonymous_bytes, now["RssAnon"] + now["RssShmem"])
            if sum(now.values()) > sum(self.at_peak.values()):
                self.at_peak = now
