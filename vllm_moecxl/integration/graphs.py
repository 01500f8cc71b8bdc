"""CUDA graphs: who looks experts up under each of vLLM's modes, where graphs are cut for it, what rows are padding.

vLLM changes its mode many times. After its platform hook, in which `settle` runs, it may only take graphs away, and the
model runner may still turn full graphs into piecewise ones, which a look-up on the device does not mind. So the host
may be chosen early, and `plan_of` decides in the worker, where no change is left that would make a choice wrong.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

import torch
import vllm.envs as envs
from vllm.compilation.breakable_cudagraph import is_breakable_cudagraph_enabled
from vllm.config import CUDAGraphMode
from vllm.forward_context import get_forward_context
from vllm.logger import init_logger

from vllm_moecxl.config import DEVICE_EVICTIONS, OffloadConfig
from vllm_moecxl.errors import ConfigError
from vllm_moecxl.integration.settings import active_config
from vllm_moecxl.types import LookupSide

logger = init_logger("vllm.moecxl")

#: The op at which piecewise graphs are cut; `integration.runner` defines it.
SPLITTING_OP = "moecxl::moe_forward_out"


class GraphPlan(NamedTuple):
    """How the layers of an engine are served.

    Attributes:
        lookup: who looks experts up.
        mode: vLLM's mode of CUDA graphs.
        reason: why this one looks them up.
    """

    lookup: Literal["host", "device"]
    mode: CUDAGraphMode
    reason: str

    def __str__(self) -> str:
        return f"experts are looked up by the {self.lookup}, with cudagraph_mode {self.mode}: {self.reason}"


def choose(mode: CUDAGraphMode, lookup: LookupSide, obstacles: Sequence[str]) -> GraphPlan:
    """Decide who looks experts up.

    Args:
        mode: as vLLM has resolved it.
        lookup: the user's option.
        obstacles: what keeps the device from it, each a clause.

    Returns:
        The plan. Its mode differs from `mode` only where the default, FULL_AND_PIECEWISE, is not possible.

    Raises:
        ConfigError: what was asked for is not possible.
    """
    if lookup == "device":
        if obstacles:
            raise ConfigError(
                f"--moe-offload-config: lookup='device' is not possible: {' and '.join(obstacles)}: use \"auto\""
            )
        return GraphPlan("device", mode, 'lookup is "device"')
    if not mode.has_full_cudagraphs():
        return GraphPlan("host", mode, 'lookup is "host"' if lookup == "host" else "no graph holds a whole forward")
    why_not = ['lookup is "host"'] if lookup == "host" else obstacles
    if not why_not:
        return GraphPlan("device", mode, "graphs of whole forwards leave the host no place to do it")
    if mode is CUDAGraphMode.FULL_AND_PIECEWISE:
        return GraphPlan("host", CUDAGraphMode.PIECEWISE, " and ".join(why_not))
    raise ConfigError(
        f"--compilation-config: cudagraph_mode={mode} captures whole forwards, in which only the device could look "
        f"experts up, but {' and '.join(why_not)}: use cudagraph_mode PIECEWISE or NONE"
    )


def obstacles_to_device(config: OffloadConfig, device_type: str) -> Iterator[str]:
    """What keeps the device from looking experts up and fetching them itself, each as a clause."""
    if device_type == "cpu":
        yield "on the CPU engine the host is the device"
    for spec in config.banks or ():
        if spec.kind in ("file", "emulated"):
            yield f'no kernel can read the bank "{spec.name}"'
    has_file = any(spec.kind == "file" for spec in config.banks or ())
    if config.verify == "fetch" or (config.verify == "load" and has_file):
        yield f'verify is "{config.verify}" and slabs are checked on the host'
    if config.trace is not None:
        yield "a trace is recorded by the host"
    if config.eviction not in DEVICE_EVICTIONS:
        yield f'eviction is "{config.eviction}", and the device has class-lru alone'


def settle(vllm_config: Any, config: OffloadConfig) -> None:
    """Set an engine's graphs so that offloading can serve them; called at the end of vLLM's platform hook.

    Raises:
        ConfigError: see `choose`.
    """
    compilation, parallel = vllm_config.compilation_config, vllm_config.parallel_config
    if vllm_config.device_config.device_type != "cpu":
        # vLLM does this later, and may change the mode in it. The second time finds nothing to change.
        compilation.set_splitting_ops_for_v1(
            all2all_backend=parallel.all2all_backend, data_parallel_size=parallel.data_parallel_size
        )
    mode = compilation.cudagraph_mode
    plan = _choose_for(vllm_config, config)
    if plan.mode is not mode:
        logger.warning(
            "MoE offload: cudagraph_mode %s becomes %s, experts are looked up on the host between graphs: %s",
            mode,
            plan.mode,
            plan.reason,
        )
        compilation.cudagraph_mode = plan.mode
    if plan.mode.has_piecewise_cudagraphs() and not is_split(compilation):
        _split(compilation, plan)


def plan_of(vllm_config: Any) -> GraphPlan:
    """The plan of an engine that offloads, in its workers.

    Raises:
        ConfigError: its graphs are none that `settle` leaves: something has changed them since.
    """
    config = active_config(vllm_config)
    assert config is not None
    compilation = vllm_config.compilation_config
    plan = _choose_for(vllm_config, config)
    needs_split = plan.lookup == "host" and plan.mode.has_piecewise_cudagraphs()
    if plan.mode is not compilation.cudagraph_mode or (needs_split and not is_split(compilation)):
        raise ConfigError(
            f"--compilation-config: cudagraph_mode={compilation.cudagraph_mode} with "
            f"splitting_ops={compilation.splitting_ops} was set after --moe-offload cxl had been: "
            "use cudagraph_mode NONE"
        )
    return plan


def limit_captures(compilation: Any, token_count_max: int) -> None:
    """Capture no graph for more tokens than the device's slots hold the experts of, whatever those are.

    Wider forwards go through the layer buffer, which the host fills. Called in a worker before vLLM looks at the sizes.
    """
    sizes = compilation.cudagraph_capture_sizes
    if compilation.cudagraph_mode is CUDAGraphMode.NONE or not sizes or max(sizes) <= token_count_max:
        return
    kept = [size for size in sizes if size <= token_count_max]
    if not kept:
        raise ConfigError(
            f"--compilation-config: cudagraph_capture_sizes={sizes} are all too wide for the slots, which hold the "
            f"experts of {token_count_max} tokens: ask for more slots, name smaller sizes, or use cudagraph_mode NONE"
        )
    logger.warning(
        "MoE offload: graphs are captured for up to %d tokens, not %d: the slots hold the experts of so many, "
        "whatever they are. More slots allow wider graphs",
        *(max(kept), max(sizes)),
    )
    compilation.cudagraph_capture_sizes = kept
    compilation.max_cudagraph_capture_size = max(kept)


def is_split(compilation: Any) -> bool:
    """Whether piecewise graphs leave the MoE layers to be run between them."""
    if is_breakable_cudagraph_enabled():  # the op ends the capture by itself
        return bool(compilation.cudagraph_mode.has_piecewise_cudagraphs())
    return SPLITTING_OP in (compilation.splitting_ops or ()) and not compilation.use_inductor_graph_partition


def padding_mask(x: torch.Tensor) -> torch.Tensor | None:
    """[tokens] bool on the device: the rows of `x` [tokens, hidden] that a graph pads its batch with, or all of a run
    that no request asked for; None where nobody says.

    The memory is the same in every forward, so a graph may read it. vLLM's routers give such rows the expert -1.
    """
    # The CPU engine pads nothing. Without the switch, the newer model runner leaves the mask as the capture left it.
    if x.is_cpu or not envs.VLLM_MOE_SKIP_PADDING:
        return None
    mask = get_forward_context().is_padding
    return None if mask is None else mask[: len(x)]


def _choose_for(vllm_config: Any, config: OffloadConfig) -> GraphPlan:
    obstacles = list(obstacles_to_device(config, vllm_config.device_config.device_type))
    return choose(vllm_config.compilation_config.cudagraph_mode, config.lookup, obstacles)


def _split(compilation: Any, plan: GraphPlan) -> None:
    if compilation.use_inductor_graph_partition:
        if plan.lookup == "device":  # its kernels may be captured with all the rest
            return
        raise ConfigError(
            "--compilation-config: use_inductor_graph_partition=True is not possible where the host looks experts up "
            f"between graphs ({plan.reason}): drop it, or use cudagraph_mode NONE"
        )
    compilation.splitting_ops = [*compilation.splitting_ops, SPLITTING_OP]
    logger.info("MoE offload: %s is added to splitting_ops: the MoE layers run between graphs", SPLITTING_OP)
