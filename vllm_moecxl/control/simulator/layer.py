"""One layer in virtual time: the same steps as the engine's `runtime.dispatch`, with durations in place of kernels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from vllm_moecxl.control.cost import PASS_OVERHEAD_S, LayerCosts
from vllm_moecxl.control.forward import ForwardPlanner
from vllm_moecxl.control.layer_order import LayerOrder
from vllm_moecxl.control.passes import Pass, needed_later
from vllm_moecxl.control.simulator.layer_buffer import LayerBuffer
from vllm_moecxl.control.simulator.model import Compute
from vllm_moecxl.control.simulator.mover import Mover
from vllm_moecxl.control.simulator.slots import Slots
from vllm_moecxl.types import Cause, PassKind

Ids = npt.NDArray[np.int64]


@dataclass
class LayerCounts:
    """What one layer has counted.

    Attributes:
        hits, pending, misses: lookups.
        passes: kernel calls by kind.
        missing: [experts] lookups that were no hits.
    """

    missing: Ids
    hits: int = 0
    pending: int = 0
    misses: int = 0
    passes: dict[PassKind, int] = field(default_factory=lambda: dict.fromkeys(PassKind, 0))


class Layer:
    """Runs one layer's forwards; see the engine's `Dispatch`.

    Args:
        buffer: shared rows, one per expert; None where there are none.
        costs: what each way to run a forward costs; the planner's too.
        is_joined: whether the buffer is behind the slots in one tensor.
        overlaps: whether somebody copies beside the forward.
        miss_s: what a wait costs beside the fetches.

    Attributes:
        following: the layer that comes after this one.
    """

    def __init__(
        self,
        layer_id: int,
        slots: Slots,
        buffer: LayerBuffer | None,
        costs: LayerCosts,
        planner: ForwardPlanner,
        order: LayerOrder,
        compute: Compute,
        mover: Mover,
        *,
        is_joined: bool,
        overlaps: bool,
        miss_s: float,
    ) -> None:
        self.layer_id = layer_id
        self.slots = slots
        self.buffer = buffer
        self.following: Layer | None = None
        self.stall_s = 0.0
        self.counts = LayerCounts(np.zeros(slots.residency.expert_count, dtype=np.int64))
        self._costs = costs
        self._planner = planner
        self._order = order
        self._compute = compute
        self._mover = mover
        self._is_joined = is_joined
        self._overlaps = overlaps
        self._miss_s = miss_s
        self._needed_at = np.full(slots.residency.expert_count, -1.0)

    def visit(self, routes: npt.NDArray[np.uint32]) -> None:
        """One forward; time has passed when it returns.

        Args:
            routes: [tokens, k] expert ids.
        """
        position = self._order.arrive(self.layer_id)
        lease = self.slots.visit(routes)
        if lease is None:
            self._slow(routes, position)
            return
        self.counts.hits += lease.distinct_count
        self.counts.passes[PassKind.SINGLE] += 1
        self._run_kernel(len(routes), lease.distinct_count)
        self.slots.end(lease)

    @property
    def fetch_s(self) -> float:
        """Seconds that a slab takes from its home, by the profile."""
        return self._costs.fetch_s

    def bring_ahead(self, distinct_count: int) -> None:
        """Begin to fetch what a wide forward will find missing here."""
        assert self.buffer is not None
        if distinct_count > self.slots.residency.slot_count:
            absent = self.slots.absent()
            absent.sort(key=self._needed_at.__getitem__, reverse=True)
            self.buffer.claim(self.slots)
            self.buffer.bring(absent, Cause.PREFETCH, self._order.next_position(self.layer_id))

    def _slow(self, routes: npt.NDArray[np.uint32], position: float) -> None:
        distinct = np.unique(routes).astype(np.int64)
        resident, pending_count = self.slots.look_up(distinct)
        missing = distinct[~resident[distinct]]
        self.counts.hits += int(distinct.size - missing.size)
        self.counts.pending += pending_count
        self.counts.misses += int(missing.size) - pending_count
        self.counts.missing[missing] += 1
        kind, passes = self._planner.plan(
            routes.astype(np.int64),
            distinct,
            resident,
            overlaps=self._overlaps,
            is_buffered=self.buffer is not None and self.buffer.belongs_to(self.slots),
        )
        if kind is PassKind.LAYER_BUFFER:
            self._run_layer_buffer(routes, distinct, position)
            return
        self.counts.passes[kind] += len(passes)
        self._run_passes(routes, passes, position)

    def _run_passes(self, routes: npt.NDArray[np.uint32], passes: Sequence[Pass], position: float) -> None:
        for index, part in enumerate(passes):
            started_s = self._mover.now_s
            with self.slots.hold_resident(part.expert_ids, self._keep(passes, index), position):
                self._note_stall(started_s)
                self._look_ahead(passes, index + 1, position)
                mine = routes if part.token_ids is None else routes[part.token_ids]
                if len(passes) > 1 and part.token_ids is None:
                    # An expert pass: its kernel sees only ids that it has rows for.
                    mine = np.where(np.isin(routes, part.expert_ids), routes, np.uint32(part.expert_ids[0]))
                lease = self.slots.lease(mine)
                assert lease is not None, "a pass runs only once its experts are resident"
                kernel_s = self._run_kernel(len(mine), lease.distinct_count)
                self.slots.end(lease)
                self._costs.observe_kernel(len(mine), lease.distinct_count, kernel_s)
            if index:
                self._mover.advance(PASS_OVERHEAD_S)

    def _run_layer_buffer(self, routes: npt.NDArray[np.uint32], distinct: Ids, position: float) -> None:
        assert self.buffer is not None
        buffer = self.buffer
        buffer.claim(self.slots)
        self._fill_free_slots(routes, distinct, position)
        lease, cached = self.slots.lease_resident(distinct)
        absent = np.setdiff1d(distinct, cached).tolist()
        buffer.drop_all_but(absent)
        buffer.bring(absent, Cause.DEMAND, position)
        self._needed_at[distinct] = position
        self._bring_following(int(distinct.size))
        self.counts.passes[PassKind.LAYER_BUFFER] += 1
        if lease is not None and not self._is_joined:
            buffer.take(cached.tolist())
            self._mover.advance(self._compute.copy_s(int(cached.size)))
        started_s = self._mover.now_s
        buffer.wait(absent)
        self._note_stall(started_s)
        self._run_kernel(len(routes), int(distinct.size))
        if lease is not None:
            self.slots.end(lease)

    def _fill_free_slots(self, routes: npt.NDArray[np.uint32], distinct: Ids, position: float) -> None:
        if not (free_count := self.slots.free_count()):
            return
        missing = distinct[~self.slots.residency.resident_mask()[distinct]]
        wanted = self._planner.fillers(routes.astype(np.int64), missing, free_count)
        started_s = self._mover.now_s
        with self.slots.hold_resident(wanted, self._keep([Pass(distinct, None)], 0), position):
            self._note_stall(started_s)

    def _bring_following(self, distinct_count: int) -> None:
        following = self.following
        if following is None or not self._overlaps or following.buffer in (None, self.buffer):
            return
        if self._planner.expects_all(distinct_count):
            following.bring_ahead(distinct_count)

    def _keep(self, passes: Sequence[Pass], index: int) -> npt.NDArray[np.bool_]:
        return needed_later(passes, index, self.slots.residency.expert_count)

    def _look_ahead(self, passes: Sequence[Pass], index: int, position: float) -> None:
        if index < len(passes) and self._overlaps:
            deadline = position + index / (len(passes) + 1)
            self.slots.look_ahead(passes[index].expert_ids, self._keep(passes, index), deadline)

    def _run_kernel(self, token_count: int, expert_count: int) -> float:
        kernel_s = self._compute.experts_s(token_count, expert_count)
        self._mover.advance(kernel_s)
        return kernel_s

    def _note_stall(self, started_s: float) -> None:
        """Whoever has waited goes on a little later."""
        if self._mover.now_s > started_s:
            self._mover.advance(self._miss_s)
            self.stall_s += self._mover.now_s - started_s
