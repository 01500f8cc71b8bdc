"""Serves a trace in virtual time: same residency, scheduler, predictors and placement as the engine."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from vllm_moecxl.control.account import LayerNeed
from vllm_moecxl.control.cost import LayerCosts
from vllm_moecxl.control.eviction import POLICIES
from vllm_moecxl.control.forward import ForwardPlanner
from vllm_moecxl.control.layer_order import LayerOrder
from vllm_moecxl.control.placement import Placement, place
from vllm_moecxl.control.prediction.base import Observation, Predictor, Target
from vllm_moecxl.control.prediction.forecast import Forecast
from vllm_moecxl.control.prefetch import PrefetchPlanner
from vllm_moecxl.control.prefetching import Prefetching
from vllm_moecxl.control.residency import Residency
from vllm_moecxl.control.simulator.layer import Layer
from vllm_moecxl.control.simulator.layer_buffer import LayerBuffer
from vllm_moecxl.control.simulator.machine import Hardware
from vllm_moecxl.control.simulator.model import Compute, ModelShape
from vllm_moecxl.control.simulator.mover import Mover
from vllm_moecxl.control.simulator.replay import Batch, Replay, Request
from vllm_moecxl.control.simulator.slots import PrefetchCounts, Slots
from vllm_moecxl.control.trace import RoutingTrace
from vllm_moecxl.types import PassKind, StripeMode

_T = TypeVar("_T")


@dataclass(frozen=True)
class Options:
    """How to serve.

    Attributes:
        slot_counts: slots of each layer; one number for all of them.
        eviction: name of a policy.
        predictors: by name, for prefetch; empty for none.
        batch_size: requests side by side.
        stripe: see `StripeMode`.
        layer_buffer_count: none, one, or two that take turns.
        pass_kind: how wide forwards may be cut, where they do not go through the layer buffer.
        has_sidecar: whether anybody copies beside the forward.
        layer_s: what a one-token step takes on the resident engine, divided by its layers; None for the model of it.
        seed: of the tails of the banks' latencies.
    """

    slot_counts: int | Sequence[int]
    eviction: str = "lru"
    predictors: Mapping[str, Predictor] = field(default_factory=dict)
    batch_size: int = 1
    stripe: StripeMode = "auto"
    layer_buffer_count: int = 2
    pass_kind: PassKind = PassKind.TOKEN
    has_sidecar: bool = True
    layer_s: float | None = None
    seed: int = 0

    def slot_count(self, layer_id: int) -> int:
        """Slots of a layer."""
        return self.slot_counts if isinstance(self.slot_counts, int) else self.slot_counts[layer_id]


class Simulator:
    """See the module.

    Args:
        trace: what is asked for; of the model.
        model: its sizes.
        hardware: what it runs on.

    Attributes:
        mover: holds the clock; faults are put into it.
        visits: called before each layer's forward with its number and [tokens, k] expert ids.

    Raises:
        CapacityError: the banks are too small.
    """

    def __init__(self, trace: RoutingTrace, model: ModelShape, hardware: Hardware, options: Options) -> None:
        assert (trace.layer_count, trace.topk_count) == (model.layer_count, model.topk)
        assert trace.expert_count <= model.expert_count
        self.trace = trace
        self.model = model
        self.hardware = hardware
        self.options = options
        self.mover = Mover(hardware, has_hands=options.has_sidecar, seed=options.seed)
        self.prefetch_counts = PrefetchCounts()
        self.ahead_counts = PrefetchCounts()
        self.visits: Callable[[int, npt.NDArray[np.int64]], None] | None = None
        self.replay = Replay(trace, options.batch_size)
        self.step_count = 0
        self._to_cancel: list[int] = []
        self.placement = self._place()
        self._compute = Compute(model, hardware.device, options.layer_s)
        self._order = LayerOrder(model.layer_count)
        is_cut = any(options.slot_count(layer_id) < model.expert_count for layer_id in range(model.layer_count))
        self._buffers = deque(
            LayerBuffer(self.mover, self.ahead_counts) for _ in range(options.layer_buffer_count if is_cut else 0)
        )
        self.layers = [self._layer(layer_id) for layer_id in range(model.layer_count)]
        for index, layer in enumerate(self.layers):
            following = self.layers[(index + 1) % len(self.layers)]
            layer.following = following if following is not layer else None
        self.prefetching = self._make_prefetching() if options.predictors and options.has_sidecar else None

    @property
    def buffers(self) -> Sequence[LayerBuffer]:
        """The layer buffers."""
        return tuple(self._buffers)

    def run(self) -> list[Request]:
        """Serve every request to its end; those that were served."""
        for batch in self.replay.batches(self._end_cancelled):
            begun_s = self.mover.now_s
            self._forward(batch)
            self.step_count += 1
            for request in self.replay.finish(batch, begun_s, self.mover.now_s):
                self._forget(request.id)
        return self.replay.ended

    def cancel(self, number: int) -> None:
        """A client cancels its request: it ends between two forwards."""
        self._to_cancel.append(number)

    def _end_cancelled(self) -> None:
        while self._to_cancel:
            if (request_id := self.replay.cancel(self._to_cancel.pop())) is not None:
                self._forget(request_id)

    def _forget(self, request_id: str) -> None:
        if self.prefetching is not None:
            self.mover.forget(request_id)
            for layer in self.layers:
                layer.slots.settle()
            self._tell_sidecar(partial(self.prefetching.forecast.forget, request_id))

    def _forward(self, batch: Batch) -> None:
        mover = self.mover
        topk = self.trace.topk[batch.tokens].astype(np.int64)
        token_count = len(topk)
        beside_s = self._compute.beside_s(token_count)
        if self.prefetching is not None:
            self._tell_sidecar(partial(self._fetch_after, self.prefetching.begin, batch.step, mover.now_s))
        for layer in self.layers:
            mover.advance(beside_s)
            expert_ids = topk[:, layer.layer_id]
            if self.visits is not None:
                self.visits(layer.layer_id, expert_ids)
            if self.prefetching is not None:
                seen = self._observation(batch, layer.layer_id, expert_ids)
                self._tell_sidecar(partial(self._fetch_after, self.prefetching.observe, seen, mover.now_s))
            layer.visit(expert_ids.astype(np.uint32))
        mover.advance(self._compute.rest_s(token_count))

    def _tell_sidecar(self, call: Callable[[], None]) -> None:
        """It takes up what it is told a little later, in order."""
        self.mover.call_at(self.mover.now_s + self.hardware.device.observe_s, call)

    def _fetch_after(self, learn: Callable[[_T, float], Sequence[Target]], what: _T, time_s: float) -> None:
        assert self.prefetching is not None
        if targets := learn(what, time_s):
            self.prefetching.fetch(targets, self.mover.now_s)

    def _observation(self, batch: Batch, layer_id: int, expert_ids: npt.NDArray[np.int64]) -> Observation:
        weights = None
        if self.trace.weights is not None:
            weights = self.trace.weights[batch.tokens, layer_id].astype(np.float32)
        return Observation(layer_id, expert_ids, weights, self._lookahead(batch, layer_id))

    def _lookahead(self, batch: Batch, layer_id: int) -> npt.NDArray[np.float32] | None:
        """What the next layer's gate makes of this layer's input, where the trace has it: its choice alone."""
        lookahead = self.trace.lookahead
        if lookahead is None or layer_id + 1 >= self.model.layer_count or batch.step.is_prompt.any():
            return None
        chosen = lookahead[batch.tokens, layer_id + 1].astype(np.int64)
        scores = np.zeros((1, len(chosen), self.model.expert_count), dtype=np.float32)
        np.put_along_axis(scores[0], chosen, 1.0, axis=1)
        return scores

    def _make_prefetching(self) -> Prefetching:
        model, layers = self.model, self.layers
        forecast = Forecast(model.layer_count, model.expert_count, model.topk, self.options.predictors)
        links = [sorted({link_id for _, whole in layer.slots.chunks for _, (link_id, *_) in whole}) for layer in layers]
        return Prefetching(
            forecast,
            PrefetchPlanner(model.layer_count),
            [layer.slots for layer in layers],
            self._order,
            lambda layer_id: self.mover.queue_s(links[layer_id]),
            [layer.fetch_s for layer in layers],
        )

    def _place(self) -> Placement:
        model = self.model
        needs = [
            LayerNeed(f"layers.{layer_id}", model.expert_count, model.topk, model.slab_bytes)
            for layer_id in range(model.layer_count)
        ]
        home_bytes = sum(need.home_bytes for need in needs)
        views = [bank.view(home_bytes) for bank in self.hardware.linked_banks()]
        return place(needs, None, views, self.options.stripe)

    def _layer(self, layer_id: int) -> Layer:
        model, options, device = self.model, self.options, self.hardware.device
        route_ids = self.placement.route_ids[layer_id]
        cuts = [self.mover.cut(route, model.slab_bytes) for route in self.placement.routes]
        slot_count = options.slot_count(layer_id)
        policy = POLICIES[options.eviction](slot_count, model.expert_count)
        residency = Residency(model.expert_count, slot_count, policy)
        slots = Slots(residency, [cuts[route_id] for route_id in route_ids], self.mover, self.prefetch_counts)
        costs = LayerCosts(
            model.expert_count,
            model.slab_bytes,
            self._home_bytes_per_s(layer_id),
            device.memory_bytes_per_s * device.achieved_share,
        )
        self._buffers.rotate()
        buffer = self._buffers[0] if self._buffers else None
        planner = ForwardPlanner(
            costs,
            model.expert_count,
            slot_count,
            options.pass_kind,
            has_buffer=buffer is not None,
            is_joined=device.is_host and buffer is not None,
        )
        return Layer(
            layer_id,
            slots,
            buffer,
            costs,
            planner,
            self._order,
            self._compute,
            self.mover,
            is_joined=device.is_host,
            overlaps=options.has_sidecar,
            miss_s=device.miss_s,
        )

    def _home_bytes_per_s(self, layer_id: int) -> float:
        """At which a layer is read, all banks beside each other: the one that takes longest decides."""
        shares = np.zeros(len(self.hardware.banks))
        for route_id in self.placement.route_ids[layer_id].tolist():
            for part in self.placement.routes[route_id]:
                shares[part.bank_index] += part.share
        rates = np.array([bank.spec.read_bytes_per_s for bank in self.hardware.banks])
        together = float(shares.sum() / (shares / rates).max())
        return min(together, self.hardware.link_bytes_per_s or together)
