"""Pack a model's experts: vLLM loads it as it would to serve it, and the workers write slab files instead."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vllm_moecxl.data.slabfile import SlabFile
from vllm_moecxl.errors import ConfigError, MoeOffloadError
from vllm_moecxl.integration import settings

#: One process for one rank: it shows the progress and dies with the command.
_ENVIRONMENT = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
#: There is no KV cache, so vLLM need not find the usual share of the device free.
_MEMORY_SHARE = 0.01


def pack(model: str, target: Path, engine_arguments: Sequence[str], *, replace: bool) -> list[tuple[str, int]]:
    """Write the slab files of a model, one for each rank.

    Args:
        model: what `vllm serve` would be given.
        target: the file, or the pattern of the ranks' files.
        engine_arguments: further arguments of `vllm serve`: what changes the weights' format (quantisation, dtype,
            tensor parallel size) has to be the same here.
        replace: whether slab files that are there may be replaced.

    Returns:
        (path, bytes) of each file.

    Raises:
        MoeOffloadError: one sentence; nothing is left behind.
    """
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    from vllm.engine.arg_utils import EngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser
    from vllm.v1.executor.abstract import Executor

    parser = EngineArgs.add_cli_args(FlexibleArgumentParser(prog="moecxl pack MODEL OUT"))
    arguments = EngineArgs.from_cli_args(parser.parse_args(["--model", model, *engine_arguments]))
    if arguments.load_format == "dummy":
        raise ConfigError("moecxl pack: --load-format dummy has no weights to pack: name a model that has")
    require_replaceable(target, arguments.tensor_parallel_size * arguments.pipeline_parallel_size, replace=replace)
    options = {"mode": "cxl", "pack_to": str(target.absolute())}
    arguments.additional_config = settings.merge(arguments.additional_config, **options)
    arguments.use_tqdm_on_load = False  # there is a bar of our own
    arguments.gpu_memory_utilization = _MEMORY_SHARE
    executor: Any = None
    try:
        vllm_config = arguments.create_engine_config()
        executor = Executor.get_class(vllm_config)(vllm_config)
        results: list[tuple[str, int]] = executor.collective_rpc("moe_offload_finish_packing")
    except (ValueError, OSError, RuntimeError) as error:
        raise ConfigError(f"moecxl pack: vLLM cannot load {model}: {error}") from error
    finally:
        if executor is not None:
            executor.shutdown()
    return results


def require_replaceable(target: Path, rank_count: int, *, replace: bool) -> None:
    """Never overwrite what we did not make, nor what we made without being told to."""
    from vllm_moecxl.data.banks.make import slab_file_path

    for rank in range(rank_count):
        path = slab_file_path(target, rank, rank_count)
        if not path.exists():
            continue
        if not replace:
            raise ConfigError(f"moecxl pack: {path} is there already: name another file, or add --replace")
        try:
            SlabFile(path).close()
        except MoeOffloadError as error:
            raise ConfigError(
                f"moecxl pack: {path} is no slab file, so --replace does not replace it: name another file, or "
                "remove it"
            ) from error
