"""Engines for measurements: vLLM in a child process of our own, on the CPU, without what adds noise."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.common import Result

#: One process and one compute thread: a second thread would wait for whoever else uses its core.
ENGINE_ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
}
KV_CACHE_BYTES = 64 << 20

_CALL = """
import importlib, json, sys
module, function, arguments, path = sys.argv[1:]
result = getattr(importlib.import_module(module), function)(**json.loads(arguments))
open(path, "w").write(json.dumps(result))
"""


def call_in_child(module: str, function: str, **arguments: Any) -> Result:
    """Call a function in a fresh process with `ENGINE_ENVIRONMENT`; its output goes to our standard error.

    Args:
        arguments: its keywords, of JSON types.

    Raises:
        CalledProcessError: the child failed.
    """
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        subprocess.run(
            [sys.executable, "-c", _CALL, module, function, json.dumps(arguments), file.name],
            env=os.environ | ENGINE_ENVIRONMENT,
            cwd=Path(__file__).parent.parent,
            stdout=sys.stderr,
            check=True,
        )
        result: Result = json.loads(Path(file.name).read_text())
    return result


def make_engine(
    model: Path,
    *,
    slots: str | None,
    banks: list[str] | None = None,
    moe_offload: Result | None = None,
    max_model_len: int = 1024,
    **options: Any,
) -> Any:
    """A `vllm.LLM`: plain vLLM, or offloading with `slots`. Only in a child of `call_in_child`.

    Args:
        banks: homes of the experts; None for "auto".
        moe_offload: more options of the offload.
        options: more arguments of the engine.
    """
    from vllm import LLM

    if slots is not None:
        offload = {"mode": "cxl", "slots": slots, "banks": banks or "auto", **(moe_offload or {})}
        options["additional_config"] = {"moe_offload": offload}
    return LLM(
        str(model),
        enforce_eager=True,
        kv_cache_memory_bytes=KV_CACHE_BYTES,
        max_model_len=max_model_len,
        enable_prefix_caching=False,
        **options,
    )


def offload_stats(llm: Any) -> dict[str, float]:
    """Our counters of an engine with one worker, summed (`passes_total`) and by label (`passes_total.single`)."""
    stats: dict[str, float] = {}
    for full_name, labels, value in llm.collective_rpc("moe_offload_stats")[0]:
        name = full_name.removeprefix("vllm:moe_offload_")
        keys = [name, ".".join([name, *labels.values()])] if labels else [name]
        for key in keys:
            stats[key] = stats.get(key, 0.0) + value
    return stats


def offload_stats_since(llm: Any, before: dict[str, float]) -> dict[str, float]:
    """What the counters have grown by since `before`."""
    return {key: value - before[key] for key, value in offload_stats(llm).items()}


def offload_figures(growth: dict[str, float]) -> Result:
    """What a growth of the counters says: hits, bytes, waits and passes."""
    looked_up = growth["lookups_total"]

    def by_last_label(name: str) -> dict[str, int]:
        totals: dict[str, int] = {}
        for key, value in growth.items():
            if key.startswith(f"{name}."):
                label = key.rpartition(".")[2]
                totals[label] = totals.get(label, 0) + round(value)
        return totals

    return {
        "hit_rate": round(growth["lookups_total.hit"] / looked_up, 4) if looked_up else None,
        "fetch_bytes": round(growth["fetch_bytes_total"]),
        "fetch_bytes_by_cause": by_last_label("fetch_bytes_total"),
        "prefetches": by_last_label("prefetch_total"),
        "stall_s": round(growth["stall_seconds_total"], 3),
        "passes": by_last_label("passes_total"),
    }
