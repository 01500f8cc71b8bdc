"""From a checkpoint or a slab file with 2 GB of experts to weights that can serve: time and peak of host memory."""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from statistics import median

from benchmarks import page_cache
from benchmarks.common import Result, print_table, save, trained_model
from benchmarks.engines import call_in_child
from benchmarks.oversize import experts_bytes
from benchmarks.widen import widen
from vllm_moecxl.units import format_bytes

_EXPERTS_BYTES = 2 << 30
#: Kernels want the width in whole blocks.
_WIDTH_MULTIPLE = 128
#: Two loads of the same model differ by about this much.
_NOISE_S = 0.05
_LOADS = ("narrow", "stock", "stock_cached", "checkpoint_to_dram", "slab_file")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this benchmark."""
    default = trained_model()
    parser.add_argument(
        "--model", type=Path, default=default, help=f"narrow, trained Mixtral (default: {default.name})"
    )
    parser.add_argument("--slots", default="25%", help="slots of the offloading engines")
    parser.add_argument("--rounds", type=int, default=3, help="loads of each kind, in turn")


def run(args: argparse.Namespace) -> Result:
    """Measure, print and save."""
    config = json.loads((args.model / "config.json").read_text())
    width = _EXPERTS_BYTES // (experts_bytes(config) // config["intermediate_size"])
    width -= width % -_WIDTH_MULTIPLE
    wide_bytes = experts_bytes(config | {"intermediate_size": width})
    with tempfile.TemporaryDirectory(dir=Path.home()) as folder:
        wide, slabs = Path(folder, "wide"), Path(folder, "wide.slabs")
        widen(args.model, wide, width)
        packing = call_in_child("benchmarks.load", "pack_here", model=str(wide), slabs=str(slabs))
        loads: dict[str, list[Result]] = {name: [] for name in _LOADS}
        for _ in range(args.rounds):
            for name in _LOADS:
                # Dropped, both read the disk. A stock load that finds the whole checkpoint in memory is the best that
                # it can do: ours is compared with that, too.
                if name != "stock_cached":
                    page_cache.drop([wide, slabs])
                banks = [f"file:{slabs}"] if name == "slab_file" else None
                slots = args.slots if name in ("checkpoint_to_dram", "slab_file") else None
                model = str(args.model if name == "narrow" else wide)
                loads[name].append(call_in_child("benchmarks.memory", "load", model=model, slots=slots, banks=banks))
    seconds = {name: round(median(load["load_s"] for load in of_kind), 3) for name, of_kind in loads.items()}
    # What remains without experts (imports, building the model, garbage collection) is no part of loading them.
    weights_s = {name: round(seconds[name] - seconds["narrow"], 3) for name in _LOADS if name != "narrow"}
    baseline_bytes = max(load["peak_bytes"] for load in loads["narrow"]) - experts_bytes(config)
    peaks = {name: max(load["peak_bytes"] for load in of_kind) for name, of_kind in loads.items()}
    result = save(
        "load",
        "hardware",
        {
            "speedup": _ratio(weights_s["stock"], weights_s["slab_file"]),
            "speedup_over_cached": _ratio(weights_s["stock_cached"], weights_s["slab_file"]),
            "speedup_of_whole_load": _ratio(seconds["stock"], seconds["slab_file"]),
            "host_peak_ratio": round((peaks["slab_file"] - baseline_bytes) / wide_bytes, 4),
            "checkpoint_host_peak_ratio": round((peaks["checkpoint_to_dram"] - baseline_bytes) / wide_bytes, 4),
            "stock_host_peak_ratio": round((peaks["stock"] - baseline_bytes) / wide_bytes, 4),
            "pack_host_peak_ratio": round((packing["peak_bytes"] - baseline_bytes) / wide_bytes, 4),
            "pack_s": packing["pack_s"],
            "weights_s": weights_s,
            "load_s": seconds,
            "load_s_rounds": {name: [load["load_s"] for load in of_kind] for name, of_kind in loads.items()},
            "experts_bytes": wide_bytes,
            "baseline_bytes": baseline_bytes,
            "model": f"{args.model.name}, experts widened to {width}",
            "slots": args.slots,
        },
    )
    print_table(
        ["load", "seconds", "of it weights", "host peak"],
        [[name, seconds[name], weights_s.get(name, 0.0), format_bytes(peaks[name])] for name in _LOADS],
    )
    print(
        f"experts {format_bytes(wide_bytes)}; weights from a slab file are ready {result['speedup']}x faster than "
        "with stock vLLM "
        f"({result['speedup_over_cached']}x with the checkpoint in the page cache), packing took {packing['pack_s']} s"
    )
    return result


def _ratio(slow_s: float, fast_s: float) -> float:
    """How many times faster; a difference below the clock's noise counts as that."""
    return round(slow_s / max(fast_s, _NOISE_S), 2)


def pack_here(model: str, slabs: str) -> Result:
    """Pack a model in this fresh process."""
    from benchmarks.memory import peak_bytes
    from vllm_moecxl.integration.packing import pack

    started_s = time.perf_counter()
    pack(model, Path(slabs), [], replace=False)
    return {"pack_s": round(time.perf_counter() - started_s, 2), "peak_bytes": peak_bytes()}
