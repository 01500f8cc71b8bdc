"""On the GPU too a model says what it says in unmodified vLLM: every token, every logprob, in every mode of graphs.

Both engines have VLLM_BATCH_INVARIANT=1, with which vLLM's Triton experts have one shape, whatever the number of slots.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.gpu.engine import Answers, ask

_MODEL = Path(__file__).parent.parent / "fixtures" / "mixtral-tiny"
_MODES: dict[str, dict[str, Any]] = {
    "NONE": {"enforce_eager": True},
    "PIECEWISE": {"enforce_eager": False, "compilation_config": {"cudagraph_mode": "PIECEWISE"}},
    "FULL_AND_PIECEWISE": {"enforce_eager": False, "compilation_config": {"cudagraph_mode": "FULL_AND_PIECEWISE"}},
}
#: The backend that Hopper has by default; others choose kernels by the number of experts.
_ENGINE: dict[str, Any] = {"model": str(_MODEL), "moe_backend": "triton", "gpu_memory_utilization": 0.5}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("answers")


@pytest.fixture(scope="module", params=_MODES)
def mode(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def resident(mode: str, folder: Path) -> Answers:
    return ask(folder / f"{mode}.json", **_ENGINE, **_MODES[mode])


def test_resident_vllm_repeats_itself(mode: str, resident: Answers, folder: Path) -> None:
    """Without that no difference would mean anything."""
    assert ask(folder / f"{mode}-again.json", **_ENGINE, **_MODES[mode]).outputs == resident.outputs


@pytest.mark.parametrize("slots", ["100%", "50%", "25%"])
@pytest.mark.parametrize("lookup", ["host", "device"])
def test_tokens_and_logprobs_are_those_of_resident_vllm(
    mode: str, resident: Answers, folder: Path, lookup: str, slots: str
) -> None:
    offload = {"slots": slots, "lookup": lookup, "banks": ["dram"]}
    name = f"{mode}-{lookup}-{slots.rstrip('%')}.json"
    ours = ask(folder / name, moe_offload="cxl", moe_offload_config=offload, **_ENGINE, **_MODES[mode])
    assert ours.lookup == lookup
    is_lowered = lookup == "host" and mode == "FULL_AND_PIECEWISE"
    assert ours.graphs == ("PIECEWISE" if is_lowered else mode)
    assert ours.metrics["lookups_total{hit}"] > 0
    if slots != "100%":
        assert ours.metrics["lookups_total{miss}"] > 0
    different = [name for name, expected in resident.outputs.items() if ours.outputs[name] != expected]
    assert not different, f"other tokens or logprobs in {different}"


def test_auto_looks_up_on_the_device_where_graphs_hold_whole_forwards(folder: Path) -> None:
    ours = ask(
        folder / "auto.json",
        moe_offload="cxl",
        moe_offload_config={"slots": "50%", "banks": ["dram"]},
        **_ENGINE,
        **_MODES["FULL_AND_PIECEWISE"],
    )
    assert (ours.lookup, ours.graphs) == ("device", "FULL_AND_PIECEWISE")
