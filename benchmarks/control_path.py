"""What our Python adds to one layer at a full hit while the sidecar runs, beside the kernel: microseconds a call."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median

import numpy as np
import torch

from benchmarks.common import Result, quantile
from vllm_moecxl.config import OffloadConfig
from vllm_moecxl.control.cost import LayerCosts
from vllm_moecxl.control.eviction import POLICIES
from vllm_moecxl.control.layer_order import LayerOrder
from vllm_moecxl.control.placement import Part
from vllm_moecxl.control.residency import Residency
from vllm_moecxl.data.banks.memory import DramBank
from vllm_moecxl.data.devices.cpu import CpuBackend
from vllm_moecxl.data.mover import Mover
from vllm_moecxl.data.profiles import PUBLISHED
from vllm_moecxl.data.slabs import Cells, HomeBuilder
from vllm_moecxl.runtime.counters import Counters
from vllm_moecxl.runtime.dispatch import Dispatch
from vllm_moecxl.runtime.foresight import Foresight
from vllm_moecxl.runtime.ring import RoutingRing
from vllm_moecxl.runtime.sidecar import Sidecar
from vllm_moecxl.runtime.slots import SlotCache
from vllm_moecxl.types import PassKind

_SEED = 11
_HIDDEN_SIZE = 64
#: Different routings that the calls go through in turn.
_ROUTING_COUNT = 97
_WARMUP_COUNT = 2_000

Forward = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Case:
    """A layer and a batch."""

    expert_count: int
    topk: int
    token_count: int

    @property
    def name(self) -> str:
        return f"{self.expert_count} experts top-{self.topk}, {self.token_count} tokens"


CASES = tuple(Case(experts, topk, tokens) for experts, topk in ((8, 2), (256, 8)) for tokens in (1, 8, 64))


def _kernel(x: torch.Tensor, topk_weights: torch.Tensor, slot_ids: torch.Tensor) -> torch.Tensor:
    """A kernel that does nothing."""
    del topk_weights, slot_ids
    return x


@contextmanager
def full_hit_dispatch(case: Case, *, has_sidecar: bool = True) -> Iterator[Dispatch]:
    """A dispatch over tiny slabs whose experts are all resident.

    Args:
        has_sidecar: whether the sidecar's thread runs beside it, as in an engine, and takes in the routing.
    """
    bank = DramBank("dram", "dram", None, PUBLISHED["dram"])
    tensors = {"weight": torch.zeros(case.expert_count, 8)}
    home = HomeBuilder([bank], "load").store("layer", tensors, [(Part(0, 1.0),)] * case.expert_count)
    backend, counters = CpuBackend(), Counters(["dram"])
    mover = Mover([bank], backend, counters)
    sidecar = Sidecar(mover, [bank], backend, counters)
    policy = POLICIES[OffloadConfig().eviction](case.expert_count, case.expert_count)
    residency = Residency(case.expert_count, case.expert_count, policy)
    cells = Cells(home.layout, case.expert_count, backend)
    rate = PUBLISHED["dram"].read_bytes_per_s
    dispatch = Dispatch(
        "layer",
        0,
        SlotCache(residency, home, cells, backend, mover, counters),
        None,
        LayerCosts(case.expert_count, home.slab_bytes, rate, rate),
        LayerOrder(1),
        sidecar,
        backend,
        counters,
        _kernel,
        lambda _: None,
        PassKind.TOKEN,
    )
    dispatch.preload(range(case.expert_count))
    assert bool(residency.resident_mask().all())
    if has_sidecar:
        dispatch.ring = RoutingRing(keeps_inputs=True, keeps_weights=False)
        sidecar.foresight = Foresight(dispatch.ring, case.expert_count, None, None, None)
        sidecar.start()
    try:
        yield dispatch
        assert sidecar.watch() == has_sidecar
    finally:
        sidecar.stop()
        mover.close()


def _routings(case: Case) -> list[torch.Tensor]:
    """Different [tokens, k] int32 expert ids."""
    rng = np.random.default_rng(_SEED)
    shape = (case.token_count, case.expert_count)
    return [
        torch.from_numpy(np.ascontiguousarray(rng.random(shape).argsort(axis=1)[:, : case.topk].astype(np.int32)))
        for _ in range(_ROUTING_COUNT)
    ]


def _times_us(forward: Forward, case: Case, call_count: int) -> list[float]:
    """Duration of each call."""
    x = torch.zeros(case.token_count, _HIDDEN_SIZE)
    topk_weights = torch.full((case.token_count, case.topk), 1 / case.topk)
    routings = _routings(case)
    for index in range(_WARMUP_COUNT):
        forward(x, topk_weights, routings[index % _ROUTING_COUNT])
    clock = time.perf_counter_ns
    times = [0] * call_count
    gc.collect()
    gc.disable()
    try:
        for index in range(call_count):
            topk_ids = routings[index % _ROUTING_COUNT]
            started_ns = clock()
            forward(x, topk_weights, topk_ids)
            times[index] = clock() - started_ns
    finally:
        gc.enable()
    return [time_ns / 1e3 for time_ns in times]


def measure(case: Case, call_count: int) -> Result:
    """Microseconds that dispatch adds to the call of the kernel, over `call_count` calls, with the sidecar running.

    What it adds without the sidecar stands beside it.
    """
    call_us = median(_times_us(_kernel, case, call_count))
    with full_hit_dispatch(case) as dispatch:
        added_us = [time_us - call_us for time_us in _times_us(dispatch, case, call_count)]
    with full_hit_dispatch(case, has_sidecar=False) as dispatch:
        alone_us = median(_times_us(dispatch, case, call_count)) - call_us
    return {
        "experts": case.expert_count,
        "topk": case.topk,
        "tokens": case.token_count,
        "us_median": round(median(added_us), 2),
        "us_p99": round(quantile(added_us, 0.99), 2),
        "us_median_without_sidecar": round(alone_us, 2),
    }


def measure_all(call_count: int, round_count: int) -> list[Result]:
    """Each case in `round_count` short rounds; the quietest counts, since neighbours on the machine only ever add.

    The median of all rounds' medians stands beside it, as what a busy machine gives.
    """
    torch.set_num_threads(1)
    rounds = [[measure(case, call_count) for case in CASES] for _ in range(round_count)]
    return [
        {
            **min(results, key=lambda result: result["us_median"]),
            "us_median_of_rounds": round(median(result["us_median"] for result in results), 2),
        }
        for results in zip(*rounds, strict=True)
    ]
