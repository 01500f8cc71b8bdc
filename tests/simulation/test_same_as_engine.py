"""The simulator decides what the engine decides: the real dispatch beside it, forward by forward."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pytest
import torch

from tests.property.toy_moe import HIDDEN_SIZE, Served, ToyMoe
from tests.simulation.world import SEEDS, make_hardware, make_simulator, make_trace
from vllm_moecxl.control.device_model import DeviceModel, DeviceSpec
from vllm_moecxl.control.placement import Part
from vllm_moecxl.control.simulator.machine import BankModel
from vllm_moecxl.control.simulator.mover import Mover
from vllm_moecxl.control.simulator.replay import Batch
from vllm_moecxl.control.simulator.simulator import Simulator
from vllm_moecxl.data.banks.base import BankProfile
from vllm_moecxl.data.banks.emulated import EmulatedBank
from vllm_moecxl.data.mover import _limits
from vllm_moecxl.data.slabs import HomeBuilder
from vllm_moecxl.types import Lookup, PassKind
from vllm_moecxl.units import MIB

EXPERT_COUNT, TOPK = 8, 2
#: Whole slabs in the only bank.
ROUTE = (Part(0, 1.0),)

torch.set_num_threads(1)


class Engine:
    """The real layers of a toy model; whoever waits carries, and nothing is learned of how long kernels take.

    Args:
        has_helper: whether slabs are copied beside the forward: what passes are worth is weighed accordingly.
    """

    def __init__(
        self, slot_count: int, pass_kind: PassKind, layer_count: int, buffer_count: int, *, has_helper: bool
    ) -> None:
        self.layers: list[Served] = []
        for layer_id in range(layer_count):
            self.layers.append(
                Served(
                    ToyMoe(EXPERT_COUNT, seed=layer_id),
                    slot_count,
                    pass_kind,
                    has_buffer=buffer_count > 0,
                    buffer_count=buffer_count,
                    is_joined=True,
                    copies_are_slow=True,
                    beside=self.layers,
                    layer_count=layer_count,
                )
            )
        self.layers[0].helper.is_up = has_helper
        for index, one in enumerate(self.layers):
            one.dispatch.following = self.layers[(index + 1) % layer_count].dispatch

    def forward(self, routes: npt.NDArray[np.integer]) -> None:
        """One forward.

        Args:
            routes: [tokens, layers, k] expert ids.
        """
        for layer_id, layer in enumerate(self.layers):
            ids = torch.from_numpy(routes[:, layer_id].astype(np.int32))
            layer.dispatch(torch.ones(len(ids), HIDDEN_SIZE), torch.ones(ids.shape), ids)

    def counts(self) -> list[int]:
        """Hits, pending and misses."""
        counters = self.layers[0].counters
        return [int(counters.values[counters.lookup[outcome]]) for outcome in Lookup]

    def passes(self) -> dict[PassKind, int]:
        """Kernel calls by kind."""
        counters = self.layers[0].counters
        return {kind: int(counters.values[row]) for kind, row in counters.passes.items()}


def simulator_of(seed: int, slot_count: int, pass_kind: PassKind, buffer_count: int, has_helper: bool) -> Simulator:
    """A trace with prompts of all lengths."""
    trace = make_trace(seed, request_count=5, token_count=30, layer_count=3, expert_count=EXPERT_COUNT, evenness=1.0)
    prompts = np.minimum([0, 1, 3, 8, 20], np.diff(trace.req))
    simulator = make_simulator(
        replace(trace, prefill=prompts.astype(np.int32)),
        make_hardware(),
        slot_counts=slot_count,
        layer_buffer_count=buffer_count,
        pass_kind=pass_kind,
        has_sidecar=has_helper,
        eviction="lru",
    )
    for layer in simulator.layers:  # the same prices as the toy's, so that the same passes are the cheapest
        layer._costs.fetch_s, layer._costs._slot_s = 2.0, 1.0
        layer._costs.observe_kernel = lambda *_: None  # type: ignore[method-assign]
    return simulator


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(
    ("slot_count", "pass_kind", "buffer_count"),
    [
        (2, PassKind.TOKEN, 2),
        (3, PassKind.TOKEN, 1),
        (5, PassKind.TOKEN, 0),
        (5, PassKind.EXPERT, 0),
        (6, PassKind.LAYER_BUFFER, 2),
        (8, PassKind.TOKEN, 0),
    ],
)
@pytest.mark.parametrize("has_helper", [False, True])
def test_slots_hold_the_same_after_every_forward(
    seed: int, slot_count: int, pass_kind: PassKind, buffer_count: int, has_helper: bool
) -> None:
    simulator = simulator_of(seed, slot_count, pass_kind, buffer_count, has_helper)
    engine = Engine(slot_count, pass_kind, simulator.trace.layer_count, buffer_count, has_helper=has_helper)
    forward = simulator._forward

    def both(batch: Batch) -> None:
        forward(batch)
        engine.forward(simulator.trace.topk[batch.tokens])
        # With a helper, slabs that were asked for ahead arrive while the kernels run: nobody else carries the toy's.
        for simulated, real in zip(simulator.layers, engine.layers, strict=True):
            real.slots.settle()
            simulated.slots.settle()
            assert np.array_equal(simulated.slots.residency.resident_mask(), real.residency.resident_mask())

    simulator._forward = both  # type: ignore[method-assign]
    simulator.run()
    counts = [layer.counts for layer in simulator.layers]
    assert [sum(getattr(one, key) for one in counts) for key in ("hits", "pending", "misses")] == engine.counts()
    passes = {kind: sum(one.passes[kind] for one in counts) for kind in PassKind}
    assert passes == engine.passes() and sum(passes.values()) > 0


@pytest.mark.parametrize("bytes_per_s", [1e8, 2e9, 26e9, 52e9])
@pytest.mark.parametrize("slab_bytes", [1000, MIB, 17_301_504])
def test_links_and_chunks_are_those_of_the_engine(bytes_per_s: float, slab_bytes: int) -> None:
    spec = DeviceSpec(300e-9, bytes_per_s, bytes_per_s)
    profile = BankProfile(spec.latency_s, bytes_per_s, "emulated")
    real = EmulatedBank("cxl", None, DeviceModel(spec, seed=0), profile)
    simulated = BankModel.of("cxl", "cxl", spec, reader_count=real.reader_count)
    assert simulated.limits(64 * MIB) == _limits(real, 64 * MIB)
    home = HomeBuilder([real], "off").store("layer", {"weight": torch.zeros(1, slab_bytes, dtype=torch.uint8)}, [ROUTE])
    fine, whole = Mover(make_hardware(simulated), has_hands=True, seed=0).cut(ROUTE, slab_bytes)
    assert [byte_count for byte_count, _ in fine] == [piece.byte_count for piece in home.pieces(0)]
    assert [byte_count for byte_count, _ in whole] == [slab_bytes]
