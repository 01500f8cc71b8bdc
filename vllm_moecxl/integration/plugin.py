"""The entry point of vLLM's general plugins: runs once in every vLLM process, so it does next to nothing."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from vllm_moecxl.config import SUPPORTED_VLLM, OffloadConfig, is_supported_vllm
from vllm_moecxl.errors import ConfigError, UnsupportedModelError
from vllm_moecxl.integration import WORKER_EXTENSION, patches, settings
from vllm_moecxl.integration.checks import refuse_unsupported


def register() -> None:
    """Make the options known to vLLM, and look at each configuration that is made."""
    from vllm_moecxl.integration.options import add_options, rewrite_keywords

    patches.patch_arguments(add_options)
    patches.patch_keywords(rewrite_keywords)
    patches.patch_configuration(check_configuration)


def check_configuration(vllm_config: Any) -> None:
    """Read, check and complete our options in a finished `VllmConfig`; nothing at all where they are absent or off.

    Raises:
        MoeOffloadError: one sentence; the engine does not start.
    """
    options = settings.options_of(vllm_config)
    if options is None or settings.is_stamped(options):
        return
    config = OffloadConfig.parse(options)
    if config.mode == "off":
        settings.drop(vllm_config)
        return
    _require_supported_vllm()
    if vllm_config.model_config is None:
        return
    on_cpu = vllm_config.device_config.device_type == "cpu"
    refuse_unsupported(vllm_config, on_cpu=on_cpu)
    _require_possible_slots(config, vllm_config.model_config)
    _require_files(config, vllm_config.parallel_config.world_size)
    vllm_config.parallel_config.worker_extension_cls = WORKER_EXTENSION
    _settle_graphs(vllm_config, config)
    _show_metrics()
    settings.stamp(vllm_config)


def _require_possible_slots(config: OffloadConfig, model_config: Any) -> None:
    """Say now what a worker would find out after minutes: a count that no layer of this model can have."""
    if not config.slots.is_auto and config.slots.total_bytes is None:
        config.slots.count_for(
            model_config.get_num_experts(), model_config.get_num_experts_per_tok(), config.slots_text
        )


def _require_files(config: OffloadConfig, rank_count: int) -> None:
    from vllm_moecxl.data.banks.make import require_banks

    require_banks(config.banks, rank_count)
    if config.placement_trace is not None and not Path(config.placement_trace).is_file():
        raise ConfigError(
            f"--moe-offload-config: placement_trace={config.placement_trace!r} is no file: name a routing trace "
            "(.npz), or drop the option"
        )
    if config.trace is not None and (finding := _why_not_written(Path(config.trace))):
        raise ConfigError(
            f"--moe-offload-config: trace={config.trace!r} cannot be written: {finding}; name a file to record to in a "
            "folder that is there, or drop the option"
        )


def _why_not_written(path: Path) -> str | None:
    """What keeps a file from being put at this path, None if nothing does. It is written aside and then renamed."""
    if not path.parent.is_dir():
        return f"{str(path.parent)!r} is no folder"
    if path.exists() and not path.is_file():
        return "it is there and not a file"
    if not os.access(path.parent, os.W_OK | os.X_OK):
        return f"nobody may write in {str(path.parent)!r}"
    return None


def _require_supported_vllm() -> None:
    import vllm

    version = vllm.__version__
    if not is_supported_vllm(version):
        raise UnsupportedModelError(
            f"--moe-offload cxl does not know vLLM {version}: install vLLM {' or '.join(SUPPORTED_VLLM)}, or a newer "
            "vllm_moecxl"
        )


def _settle_graphs(vllm_config: Any, config: OffloadConfig) -> None:
    from vllm_moecxl.integration.graphs import settle

    settle(vllm_config, config)


def _show_metrics() -> None:
    from vllm_moecxl.integration import metrics

    metrics.counters_folder()
    metrics.register_collector()
    patches.patch_multiprocess_metrics(metrics.register_collector)
