"""Small machines, models and traces to simulate, and what has to hold of every simulation."""

from __future__ import annotations

import os
import random
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from vllm_moecxl.control.device_model import DeviceSpec
from vllm_moecxl.control.prediction.base import Observation, Probabilities, Step, Target
from vllm_moecxl.control.simulator.machine import BankModel, Device, Hardware
from vllm_moecxl.control.simulator.model import ModelShape
from vllm_moecxl.control.simulator.replay import Request
from vllm_moecxl.control.simulator.report import report
from vllm_moecxl.control.simulator.simulator import Options, Simulator
from vllm_moecxl.control.trace import RoutingTrace
from vllm_moecxl.units import MIB

#: One that nobody has tried yet, unless it is said: a failure is repeated with `MOECXL_SEED=...`.
FRESH_SEED = int(os.environ.get("MOECXL_SEED", random.SystemRandom().randrange(1 << 32)))
#: Those of every run, and the fresh one; pytest prints them with the name of the test.
SEEDS = (1, 2, FRESH_SEED)

SLAB_BYTES = 3 * MIB


def make_model(layer_count: int = 4, expert_count: int = 16, topk: int = 2) -> ModelShape:
    """Experts of 3 MiB, and so little else that kernels take no time to speak of."""
    weight_count = SLAB_BYTES // 2
    return ModelShape("toy", layer_count, expert_count, topk, weight_count, SLAB_BYTES, 2048, 1024, 4096, 2048)


def make_trace(
    seed: int,
    *,
    request_count: int = 6,
    token_count: int = 24,
    prompt_count: int = 0,
    layer_count: int = 4,
    expert_count: int = 16,
    topk: int = 2,
    evenness: float = 0.3,
) -> RoutingTrace:
    """Requests of different lengths with favourite experts of their own: few, or with more evenness many."""
    generator = np.random.default_rng(seed)
    lengths = generator.integers(token_count // 2, token_count + 1, request_count)
    parts = []
    for length in lengths:
        weights = generator.dirichlet(np.full(expert_count, evenness), layer_count)
        noise = -np.log(generator.random((length, layer_count, expert_count)))
        parts.append(np.argsort(noise / (weights + 1e-6), axis=2)[:, :, :topk])
    return RoutingTrace(
        topk=np.concatenate(parts).astype(np.uint8),
        weights=None,
        lookahead=None,
        req=np.concatenate([[0], np.cumsum(lengths)]),
        prefill=np.minimum(np.full(request_count, prompt_count), lengths),
        token_ids=generator.integers(0, 50, int(lengths.sum())),
        layer_ids=np.arange(layer_count),
        meta={"model": "toy", "num_experts": expert_count},
    )


def make_hardware(*banks: BankModel, is_host: bool = True, layer_s: float = 1e-3, **device: Any) -> Hardware:
    """A device whose layers take a millisecond, and a bank that brings a slab in about as long."""
    chosen = banks or (make_bank("cxl", 3e9),)
    return Hardware("toy", Device(is_host, 1e12, 1e15, layer_s=layer_s, **device), tuple(chosen))


def make_bank(name: str, bytes_per_s: float, **options: Any) -> BankModel:
    """A CXL device without a tail."""
    return BankModel.of(name, "cxl", DeviceSpec(1e-6, bytes_per_s, bytes_per_s), **options)


def make_simulator(trace: RoutingTrace, hardware: Hardware | None = None, **options: Any) -> Simulator:
    """Of the trace's own model."""
    model = make_model(trace.layer_count, trace.expert_count, trace.topk_count)
    return Simulator(trace, model, hardware or make_hardware(), Options(**{"slot_counts": 6, **options}))


class Clairvoyant:
    """A predictor that has read the trace: it knows what every request needs next."""

    def __init__(self, trace: RoutingTrace) -> None:
        self._trace = trace
        self._positions: dict[str, int] = {}
        self._step: Step | None = None

    def begin(self, step: Step) -> None:
        """Every request comes one forward further."""
        self._step = step
        for row, request_id in enumerate(step.request_ids):
            count = int(np.count_nonzero(step.rows == row))
            start = int(self._trace.req[int(request_id.split()[1])])
            self._positions[request_id] = self._positions.get(request_id, start) + count

    def observe(self, seen: Observation) -> None:
        """It knows already."""

    def predict(self, target: Target) -> Probabilities | None:
        """Near certainty."""
        assert self._step is not None
        chances = np.full((len(self._step.request_ids), self._trace.expert_count), 0.01, dtype=np.float32)
        for row, request_id in enumerate(self._step.request_ids):
            token = self._positions[request_id] - (not target.is_next_step)
            if token < self._trace.token_count:
                chances[row, self._trace.topk[token, target.layer_id]] = 0.99
        return chances

    def forget(self, request_id: str) -> None:
        """It is gone."""
        self._positions.pop(request_id, None)


class Guesser:
    """A predictor that says something else every time, and is sure of it."""

    def __init__(self, expert_count: int, seed: int) -> None:
        self._generator = np.random.default_rng(seed)
        self._expert_count = expert_count
        self._count = 0

    def begin(self, step: Step) -> None:
        """A step begins."""
        self._count = len(step.request_ids)

    def observe(self, seen: Observation) -> None:
        """It does not learn."""

    def predict(self, target: Target) -> Probabilities | None:
        """Anything."""
        return self._generator.random((self._count, self._expert_count)).astype(np.float32)

    def forget(self, request_id: str) -> None:
        """It remembers nobody."""


class Watch:
    """Runs a simulation and checks it at every layer's visit."""

    def __init__(self, simulator: Simulator) -> None:
        self.simulator = simulator
        self.lookup_count = 0
        self._latest_s = 0.0
        simulator.visits = self._visit

    def run(self) -> dict[str, Any]:
        """Serve everything; the report."""
        requests = self.simulator.run()
        self.check(requests)
        return report(self.simulator, requests)

    def check(self, requests: list[Request]) -> None:
        """What has to hold at the end."""
        simulator = self.simulator
        found = report(simulator, requests)
        assert found["lookups"] == found["hits"] + found["pending"] + found["misses"] == self.lookup_count
        moved = sum(found["bank_bytes"].values())
        landed_bytes = simulator.mover.traffic.landed_count * SLAB_BYTES
        assert landed_bytes <= moved == sum(simulator.mover.traffic.by_cause)
        for counts in (found["prefetch"], found["layer_buffer_ahead"]):
            ended = counts["useful"] + counts["late"] + counts["wasted"] + counts["unknown"]
            assert counts["issued"] == ended, "every fetch ahead is accounted for"
        assert 0 <= found["stall_s"] <= found["duration_s"]
        assert abs(sum(found["tier_share"].values()) - 1) < 1e-9
        for request in requests:
            assert request.begun_s <= request.token_s[0] and request.token_s == sorted(request.token_s)

    def _visit(self, layer_id: int, expert_ids: npt.NDArray[np.int64]) -> None:
        assert self.simulator.mover.now_s >= self._latest_s, "time does not go back"
        self._latest_s = self.simulator.mover.now_s
        self.lookup_count += np.unique(expert_ids).size
        # All of them before a step; then the one that the others' work may have changed most.
        for layer in self.simulator.layers if layer_id == 0 else [self.simulator.layers[layer_id]]:
            layer.slots.check()
            residency = layer.slots.residency
            assert not any(residency.is_held(slot_id) for slot_id in range(residency.slot_count))


def slower(bank: BankModel, factor: float) -> BankModel:
    """The same bank at a part of its bandwidth."""
    return replace(bank, spec=replace(bank.spec, read_bytes_per_s=bank.spec.read_bytes_per_s * factor))
