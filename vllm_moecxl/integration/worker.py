"""What runs in the workers of an engine that offloads: vLLM imports this module there, and only there.

It comes in as vLLM's worker extension class, so nothing of this costs an engine that does not offload.
"""

from __future__ import annotations

import atexit
import sys
import weakref
from collections.abc import Callable
from functools import partial, wraps
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from vllm.distributed.parallel_state import get_world_group
from vllm.logger import init_logger
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.model_executor.model_loader.utils import get_model_architecture

from vllm_moecxl.config import OffloadConfig
from vllm_moecxl.data.banks.make import make_banks, slab_file_path
from vllm_moecxl.data.devices.make import make_backend
from vllm_moecxl.data.profiles import load_profiles, machine_identity
from vllm_moecxl.errors import UnsupportedModelError
from vllm_moecxl.integration import patches
from vllm_moecxl.integration.buffered import catching_direct_writes
from vllm_moecxl.integration.device_budget import reserve_bytes
from vllm_moecxl.integration.experts import ModelUnderConstruction, SlotExperts, building, register_layers
from vllm_moecxl.integration.fingerprint import fingerprint
from vllm_moecxl.integration.graphs import limit_captures, plan_of
from vllm_moecxl.integration.metrics import counters_path
from vllm_moecxl.integration.model_parts import find_embedding, find_gates
from vllm_moecxl.integration.packed import passes_over, passing_over_experts
from vllm_moecxl.integration.settings import active_config
from vllm_moecxl.integration.steps import describe, describe_early
from vllm_moecxl.linux.topology import read_topology
from vllm_moecxl.runtime.packing import Packer
from vllm_moecxl.runtime.runtime import OffloadRuntime

# Only loggers below "vllm" have a handler.
logger = init_logger("vllm.moecxl")

_RUNTIME_ATTRIBUTE = "moe_offload_runtime"

#: Those of this process that live: one for each model of an engine.
_runtimes: weakref.WeakSet[OffloadRuntime] = weakref.WeakSet()


class MoeOffloadWorker:
    """Methods that `collective_rpc` can call on each worker."""

    def moe_offload_stats(self) -> list[tuple[str, dict[str, str], float]]:
        """This worker's counters: (metric, labels, value); none where it has no experts."""
        model = self.model_runner.model  # type: ignore[attr-defined]
        runtime: OffloadRuntime | Packer | None = getattr(model, _RUNTIME_ATTRIBUTE, None)
        if not isinstance(runtime, OffloadRuntime):
            return []
        return [(row.metric.full_name, row.labels, row.value) for row in runtime.counters.rows()]

    def moe_offload_finish_packing(self) -> tuple[str, int]:
        """Complete this worker's slab file; its path and size in bytes."""
        packer: Packer = getattr(self.model_runner.model, _RUNTIME_ATTRIBUTE)  # type: ignore[attr-defined]
        return str(packer.path), packer.finish()


def _build(create: Callable[[], Any], vllm_config: Any, model_config: Any) -> Any:
    """Build a model; give its MoE layers to a runtime of their own if this engine offloads."""
    config = active_config(vllm_config)
    if config is None:
        return create()
    # Importing the model's module is what makes its own subclasses of RoutedExperts known.
    get_model_architecture(model_config)
    register_layers()
    is_main = model_config is vllm_config.model_config
    runtime = (
        _make_packer(config.pack_to, vllm_config)
        if config.pack_to
        else _make_runtime(config, vllm_config, is_main=is_main)
    )
    with building(runtime) as under_construction:
        model = create()
    # A pipeline stage, or a draft model, may well have no experts.
    is_whole = is_main and vllm_config.parallel_config.pipeline_parallel_size == 1
    _require_offloaded(model, runtime, has_experts=is_whole)
    if runtime.layer_count:
        if isinstance(runtime, Packer):
            runtime.begin()
        else:
            runtime.plan(vllm_config.cache_config.kv_cache_memory_bytes, reserve_bytes(vllm_config))
        object.__setattr__(model, _RUNTIME_ATTRIBUTE, runtime)
        _prepare_loading(model, under_construction)
        if isinstance(runtime, OffloadRuntime):
            # It is the model that keeps the runtime.
            runtime.prepare = partial(_complete, weakref.ref(model), vllm_config, model_config.model)
    return model


def _prepare_loading(model: torch.nn.Module, under_construction: ModelUnderConstruction) -> None:
    """Put what `integration.buffered` and `integration.packed` need around the loading of weights."""
    load_weights: Callable[..., Any] = model.load_weights  # type: ignore[assignment]

    @wraps(load_weights)
    def load(*args: Any, **kwargs: Any) -> Any:
        runtime = under_construction.runtime
        if not (isinstance(runtime, OffloadRuntime) and runtime.slab_file is not None):
            with catching_direct_writes(under_construction.buffered):
                return load_weights(*args, **kwargs)
        with passing_over_experts():
            loaded = load_weights(*args, **kwargs)
        # vLLM checks that nothing was left out: the experts were not.
        return loaded if loaded is None else set(loaded) | _names_of_experts(model)

    object.__setattr__(model, "load_weights", load)


def _names_of_experts(model: torch.nn.Module) -> set[str]:
    return {
        f"{module_name}.{name}"
        for module_name, module in model.named_modules()
        if isinstance(module, SlotExperts)
        for name, _ in module.named_parameters(recurse=False)
    }


def _device(vllm_config: Any) -> torch.device:
    device = torch.device(vllm_config.device_config.device_type)
    return device if device.type == "cpu" else torch.device(device.type, torch.accelerator.current_device_index())


def _make_runtime(config: OffloadConfig, vllm_config: Any, *, is_main: bool) -> OffloadRuntime:
    device, world = _device(vllm_config), get_world_group()
    may_record = is_main and world.rank_in_group == 0  # all ranks see the same routing
    profiles = load_profiles(machine_identity(read_topology()))
    banks = make_banks(config.banks, profiles, ranks=(world.rank_in_group, world.world_size))
    path = counters_path(world.rank)
    slot_bytes_per_s = profiles.of("dram", "dram").read_bytes_per_s
    plan = plan_of(vllm_config)
    logger.info("MoE offload: %s", plan)
    runtime = OffloadRuntime(
        *(config, make_backend(device), device, logger, banks, path, slot_bytes_per_s),
        lookup=plan.lookup,
        may_record=may_record,
    )
    _runtimes.add(runtime)
    # An engine that is gone must not be counted among those of a later one in the same process.
    weakref.finalize(runtime, path.unlink, missing_ok=True)
    if runtime.slab_file is not None:
        runtime.slab_file.slabs.require_fingerprint(fingerprint(vllm_config))
    return runtime


def _make_packer(pack_to: str, vllm_config: Any) -> Packer:
    rank, rank_count = get_world_group().rank_in_group, get_world_group().world_size
    path = slab_file_path(Path(pack_to), rank, rank_count)
    bar = tqdm(desc=f"Packing {path.name}", unit="B", unit_scale=True, disable=rank > 0, file=sys.stderr)

    def progress(done: int, total: int, layer_bytes: int) -> None:
        bar.total = bar.n + layer_bytes * (total - done + 1)
        bar.update(layer_bytes)
        bar.set_postfix_str(f"layer {done}/{total}")
        if done == total:
            bar.close()

    packer = Packer(path, fingerprint(vllm_config), _device(vllm_config), logger, progress)
    weakref.finalize(packer, bar.close)
    atexit.register(packer.abandon)
    return packer


def _require_offloaded(model: torch.nn.Module, runtime: OffloadRuntime | Packer, *, has_experts: bool) -> None:
    """Loud: asked for, so active, or the engine does not start."""
    for name, module in model.named_modules():
        if isinstance(module, RoutedExperts) and not isinstance(module, SlotExperts):
            raise UnsupportedModelError(
                f"--moe-offload: {type(module).__name__} at {name} was defined too late to be replaced, so its experts "
                "would stay on the device: please report this model"
            )
    if has_experts and not runtime.layer_count:
        raise UnsupportedModelError(
            f"--moe-offload cxl: no layer of {type(model).__name__} runs its experts through vLLM's RoutedExperts, so "
            "there is nothing to offload: drop --moe-offload"
        )


def _refuse_weight_access(vllm_config: Any, method: str) -> None:
    if active_config(vllm_config) is not None:
        raise UnsupportedModelError(
            f"--moe-offload: {method} would read or write slots instead of experts: restart the engine with the new "
            "weights, or serve without --moe-offload"
        )


def _complete(held_weakly: weakref.ref[torch.nn.Module], vllm_config: Any, model_name: str) -> None:
    """What is due once, when the model is complete and no graph has been captured."""
    model = held_weakly()
    runtime: OffloadRuntime | Packer | None = getattr(model, _RUNTIME_ATTRIBUTE, None)
    if model is None or not isinstance(runtime, OffloadRuntime) or runtime.is_foreseeing:
        return
    runtime.foresee(find_gates(model, runtime.dispatches), model_name, find_embedding(model))
    if (token_count_max := runtime.device_token_count_max) is not None:
        limit_captures(vllm_config.compilation_config, token_count_max)


def _before_step(worker: Any, scheduled: Any) -> None:
    for runtime in list(_runtimes):
        runtime.watch()
        if scheduled.finished_req_ids:
            runtime.forget(scheduled.finished_req_ids)
    runner = worker.model_runner
    mine: OffloadRuntime | Packer | None = getattr(runner.model, _RUNTIME_ATTRIBUTE, None)
    if not isinstance(mine, OffloadRuntime) or not scheduled.total_num_scheduled_tokens:
        return
    mine.prepare()
    if (ring := mine.ring) is not None:
        # The sidecar's thread holds the ring: an engine that it held too could never be dropped.
        held_weakly = weakref.ref(runner)
        ring.describe = lambda: describe(one, scheduled) if (one := held_weakly()) is not None else None
    mine.begin(describe_early(runner, scheduled) if ring is not None else None)


patches.patch_model_creation(_build)
patches.patch_steps(_before_step)
patches.patch_weight_access(_refuse_weight_access)
patches.patch_checkpoint_reading(passes_over)
