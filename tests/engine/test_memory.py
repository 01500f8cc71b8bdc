"""One copy: loading takes the experts' bytes, one layer's working set, and what vLLM needs without experts."""

from __future__ import annotations

from pathlib import Path

from benchmarks.engines import call_in_child
from benchmarks.memory import write_checkpoint

_LAYER_COUNT = 32


def _peak_bytes(model: Path, slots: str | None) -> int:
    peak_bytes: int = call_in_child("benchmarks.memory", "load", model=str(model), slots=slots)["peak_bytes"]
    return peak_bytes


def test_the_host_holds_one_copy_of_the_experts_while_loading(tmp_path: Path) -> None:
    narrow_bytes = write_checkpoint(tmp_path / "narrow", 32)
    expert_bytes = write_checkpoint(tmp_path / "wide", 640)
    without_experts = _peak_bytes(tmp_path / "narrow", None) - narrow_bytes
    # On the CPU engine the layer in work is in host memory too, and for a moment twice: before and after conversion.
    working_set = 2 * expert_bytes / _LAYER_COUNT
    assert _peak_bytes(tmp_path / "wide", "25%") - without_experts <= 1.05 * expert_bytes + working_set
