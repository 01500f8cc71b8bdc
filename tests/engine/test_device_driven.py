"""The device looks experts up and fetches them by itself: the modelled accelerator in a real engine, our kernels under
Triton's interpreter, and the tokens are those of the CPU engine's own slots.

The model's own kernels are vLLM's CPU kernels, which run when they are called.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from moecxl_kernels.tables import ADOPTED

from tests.engine.harness import SCENARIOS, Scenario, generate, generate_with_metrics
from tests.engine.test_equality import Equality, compare
from tests.support.prompt_backend import PromptBackend
from vllm_moecxl.runtime.runtime import LoadedLayer, OffloadRuntime

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("Triton interprets kernels only in a process of their own: run `make kernels`", allow_module_level=True)

#: A whole generation, alone; a batch whose tokens fit the slots together; a prompt that no slots can hold.
_SCENARIOS = (
    Scenario("whole generation", ("The quick brown fox",), 32),
    Scenario("two decodes", ("#include <stdio.h>\n", "def main(argv):\n    "), 8),
    SCENARIOS[2],
)


class Devices:
    """What was made for the engines of this module: backends and runtimes."""

    def __init__(self) -> None:
        self.backends: list[PromptBackend] = []
        self.runtimes: list[OffloadRuntime] = []


@pytest.fixture
def devices() -> Iterator[Devices]:
    """From now on engines have a device that looks up."""
    from vllm.config import CUDAGraphMode

    from vllm_moecxl.integration import worker
    from vllm_moecxl.integration.graphs import GraphPlan
    from vllm_moecxl.runtime.device_driven import layer as device_layer
    from vllm_moecxl.runtime.device_driven import side as device_side

    made = Devices()

    def make_backend(device: torch.device) -> PromptBackend:
        made.backends.append(PromptBackend())
        return made.backends[-1]

    install = OffloadRuntime.install

    def install_on_device(self: OffloadRuntime, layer: LoadedLayer) -> Any:
        kernel, backend = layer.kernel, made.backends[-1]
        if self not in made.runtimes:
            made.runtimes.append(self)

        def in_order(*arguments: torch.Tensor) -> torch.Tensor:
            backend.catch_up()
            return kernel(*arguments)

        layer.kernel = in_order
        return install(self, layer)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(device_layer, "GATHER_PROGRAM_COUNT", 2)  # they are interpreted one after the other
        patch.setattr(device_side, "_LANE_SHARE", 1 / 4)  # one of its few slots is lent
        patch.setattr(worker, "make_backend", make_backend)
        patch.setattr(worker, "plan_of", lambda _: GraphPlan("device", CUDAGraphMode.NONE, "this is a test"))
        patch.setattr(OffloadRuntime, "install", install_on_device)
        yield made


@pytest.fixture(scope="module")
def by_the_host(fixture_model: str) -> dict[str, Any]:
    return generate(
        _SCENARIOS, model=fixture_model, moe_offload="cxl", moe_offload_config={"slots": "50%", "prefetch": "off"}
    )


@pytest.mark.parametrize("prefetch", ["off", "auto"])
def test_tokens_are_those_of_the_host_driven_slots(
    fixture_model: str, equality: Equality, by_the_host: dict[str, Any], devices: Devices, prefetch: str
) -> None:
    scenarios = _SCENARIOS if prefetch == "off" else _SCENARIOS[:2]  # kernels are slow when they are interpreted
    outputs, metrics = generate_with_metrics(
        scenarios, model=fixture_model, moe_offload="cxl", moe_offload_config={"slots": "50%", "prefetch": prefetch}
    )
    expected = {one.name: by_the_host[one.name] for one in scenarios}
    compare(equality, f"device-driven on the modelled accelerator, prefetch {prefetch}", expected, outputs)
    (backend,) = devices.backends
    assert backend.violation is None
    assert {"look-up", "gather", "remap"} <= set(backend.names)
    assert min(metrics["lookups_total{hit}"], metrics["lookups_total{miss}"]) > 100
    assert metrics["fetch_bytes_total{dram,demand}"] > 0
    assert metrics["passes_total{layer_buffer}"] > 0, "the long prompt went through the layer buffer"
    (runtime,) = devices.runtimes
    totals = torch.stack([one.layer.table.totals for one in runtime.dispatches.values()]).sum(0)
    if prefetch == "auto":
        assert "gate" in backend.names and totals[ADOPTED] > 0, "what was prefetched was never adopted"
