"""The hot path: once per layer and forward, from the router's expert ids to the kernel's output.

A full hit is one table look-up, one lease and one kernel call. All else, misses and wide forwards, is `_slow`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from vllm_moecxl.control.cost import LayerCosts
from vllm_moecxl.control.forward import ForwardPlanner
from vllm_moecxl.control.layer_order import LayerOrder
from vllm_moecxl.control.passes import Pass, needed_later
from vllm_moecxl.control.residency import Lease
from vllm_moecxl.data.devices.base import DeviceBackend
from vllm_moecxl.data.slabs import Home
from vllm_moecxl.runtime.counters import Counters
from vllm_moecxl.runtime.layer_buffer import LayerBuffer
from vllm_moecxl.runtime.ring import RoutingRing
from vllm_moecxl.runtime.slots import SlotCache
from vllm_moecxl.types import Cause, Lookup, PassKind

#: Runs vLLM's kernel: (x, topk_weights, row ids into the bound cells) -> output.
Kernel = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
#: Per extent, [rows, ...] tensors.
Tensors = Sequence[torch.Tensor]
#: Makes the kernel read its weights from these rows.
Bind = Callable[[Tensors], None]


class Helper(Protocol):
    """Who copies while the forward computes.

    Attributes:
        is_up: whether it does; without it, the forward waits for each fetch.
    """

    is_up: bool


def over_padding(topk_ids: torch.Tensor, is_padding: torch.Tensor | None) -> torch.Tensor:
    """Expert ids [tokens, k] that exist in all rows: padding asks for the experts of the first row, and so for no more.

    Padding comes last, so the first row is only padding where all are.
    """
    if is_padding is None:
        return topk_ids
    return torch.where(is_padding[:, None], topk_ids[:1].clamp(min=0), topk_ids)


class Dispatch:
    """Runs one layer from its slots.

    Args:
        name: the layer's name, for messages.
        layer_id: its place among the MoE layers.
        slots: bound to the kernel except while other rows are.
        buffer: shared rows, one per expert; None where there are none.
        costs: what each way to run a forward costs.
        order: where the forward is.
        helper: copies beside the forward.
        pass_kind: how to run what does not fit the slots: TOKEN, EXPERT, or LAYER_BUFFER for kernels whose result
            changes with either.

    Attributes:
        following: the layer that comes after this one.
        ring: gets what the router has chosen; None where nobody wants it.
    """

    def __init__(
        self,
        name: str,
        layer_id: int,
        slots: SlotCache,
        buffer: LayerBuffer | None,
        costs: LayerCosts,
        order: LayerOrder,
        helper: Helper,
        backend: DeviceBackend,
        counters: Counters,
        kernel: Kernel,
        bind: Bind,
        pass_kind: PassKind,
    ) -> None:
        self.name = name
        self.layer_id = layer_id
        self.slots = slots
        self.buffer = buffer
        self.pass_kind = pass_kind
        self.following: Dispatch | None = None
        self.ring: RoutingRing | None = None
        self._costs = costs
        self._planner = ForwardPlanner(
            costs,
            slots.residency.expert_count,
            slots.cells.cell_count,
            pass_kind,
            has_buffer=buffer is not None,
            is_joined=slots.cells.behind_row is not None,
        )
        self._order = order
        self._helper = helper
        self._backend = backend
        self._counters = counters
        self._kernel = kernel
        self._bind = bind
        #: [experts] position of the last wide forward that needed each.
        self._needed_at = np.full(slots.residency.expert_count, -1.0)
        self._in_place_rows = self.home.tensors if costs.is_always_in_place else None
        bind(slots.cells.tensors if self._in_place_rows is None else self._in_place_rows)

    @property
    def is_always_in_place(self) -> bool:
        """Whether every forward runs straight from the homes: the slots stay empty then."""
        return self._in_place_rows is not None

    @property
    def fetch_s(self) -> float:
        """Seconds that a slab takes from its home, by the profile."""
        return self._costs.fetch_s

    @property
    def home(self) -> Home:
        """Its slabs."""
        return self.slots.home

    def __call__(self, x: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor) -> torch.Tensor:
        """Compute the layer.

        Args:
            x: [tokens, hidden] activations on the device.
            topk_weights: [tokens, k] router weights.
            topk_ids: [tokens, k] expert ids of this rank.

        Returns:
            The kernel's output for all tokens.

        Raises:
            IntegrityError: an id that the layer does not have.
        """
        host_ids = self._backend.route_ids(topk_ids)
        routes = host_ids.numpy().view(np.uint32)
        if not routes.size:
            return torch.empty_like(x)
        position = self._order.arrive(self.layer_id)
        values = self._counters.values
        if self._in_place_rows is not None:
            self.slots.residency.require_known(routes)
            self._show(routes, topk_weights, x)
            values[self._counters.passes[PassKind.IN_PLACE]] += 1
            return self._kernel(x, topk_weights, host_ids)
        lease = self.slots.visit(routes)
        self._show(routes, topk_weights, x)
        if lease is None:
            return self._slow(x, topk_weights, host_ids, routes, position)
        values[self._counters.hit] += lease.distinct_count
        values[self._counters.single_pass] += 1
        try:
            return self._kernel(x, topk_weights, self._slot_tensor(lease))
        finally:
            self.slots.end(lease)

    def _show(self, routes: npt.NDArray[np.uint32], topk_weights: torch.Tensor, x: torch.Tensor) -> None:
        """Leave the routing to the sidecar: as late as may be, since it wants the interpreter too from then on."""
        if self.ring is not None:
            self.ring.see(self.layer_id, routes, topk_weights, x)

    def rehearse(self, x: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor) -> torch.Tensor:
        """Compute a forward that no request asked for (memory profile, warm-up); nobody looks at the result.

        It is right where the kernel can read the home itself. Elsewhere the kernel runs on what the cells happen to
        hold: to fetch every expert once would make a start wait for the whole bank. Slots and counters stay as they
        are.
        """
        host_ids = self._backend.route_ids(topk_ids)
        if not host_ids.numel():
            return torch.empty_like(x)
        self.slots.residency.require_known(np.unique(host_ids.numpy().view(np.uint32)))
        if self._backend.is_host and self.home.tensors is not None:
            return self._run_rows(self.home.tensors, x, topk_weights, host_ids)
        if self.buffer is not None:
            return self._run_rows(self.buffer.cells.tensors, x, topk_weights, host_ids)
        return self._kernel(x, topk_weights, self._backend.to_device(host_ids % self.slots.cells.cell_count))

    def preload(self, expert_ids: Sequence[int]) -> None:
        """Fetch experts that are likely to be needed first, as many as there are slots."""
        wanted = np.array(expert_ids[: self.slots.cells.cell_count], dtype=np.int64)
        nothing = np.zeros(self.slots.residency.expert_count, dtype=np.bool_)
        if self._in_place_rows is None:
            with self.slots.hold_resident(wanted, nothing, 0.0):
                pass

    def _slot_tensor(self, lease: Lease) -> torch.Tensor:
        return self._backend.to_device(torch.from_numpy(lease.slot_ids))

    def _slow(
        self,
        x: torch.Tensor,
        topk_weights: torch.Tensor,
        host_ids: torch.Tensor,
        routes: npt.NDArray[np.uint32],
        position: float,
    ) -> torch.Tensor:
        """A forward with misses: fetch, and run it in as many passes as it needs."""
        distinct = np.unique(routes).astype(np.int64)
        resident, pending_count = self.slots.look_up(distinct)
        missing = distinct[~resident[distinct]]
        hit_count = int(distinct.size - missing.size)
        values = self._counters.values
        values[self._counters.hit] += hit_count
        values[self._counters.lookup[Lookup.PENDING]] += pending_count
        values[self._counters.lookup[Lookup.MISS]] += missing.size - pending_count
        kind, passes = self._planner.plan(
            host_ids.numpy(),
            distinct,
            resident,
            overlaps=self._helper.is_up,
            is_buffered=self.buffer is not None and self.buffer.belongs_to(self.home),
        )
        if kind is PassKind.IN_PLACE:
            assert self.home.tensors is not None
            values[self._counters.passes[PassKind.IN_PLACE]] += 1
            return self._run_rows(self.home.tensors, x, topk_weights, host_ids)
        if kind is PassKind.LAYER_BUFFER:
            return self._run_layer_buffer(x, topk_weights, host_ids, distinct, position)
        values[self._counters.passes[kind]] += len(passes)
        # A single pass takes all tokens, as an expert pass does.
        run = self._run_token_passes if kind is PassKind.TOKEN else self._run_expert_passes
        try:
            return run(x, topk_weights, host_ids, passes, position)
        finally:
            self.slots.relinquish()

    def _run_token_passes(
        self,
        x: torch.Tensor,
        topk_weights: torch.Tensor,
        host_ids: torch.Tensor,
        passes: Sequence[Pass],
        position: float,
    ) -> torch.Tensor:
        output: torch.Tensor | None = None
        for index, part in enumerate(passes):
            with self.slots.hold_resident(part.expert_ids, self._keep(passes, index), position):
                self._look_ahead(passes, index + 1, position)
                assert part.token_ids is not None
                host_rows = torch.from_numpy(part.token_ids)
                rows = self._backend.to_device(host_rows)
                result = self._run_resident(x[rows], topk_weights[rows], host_ids[host_rows])
            if output is None:
                output = result.new_empty((x.shape[0], *result.shape[1:]))
            output.index_copy_(0, rows, result)
        assert output is not None
        return output

    def _run_expert_passes(
        self,
        x: torch.Tensor,
        topk_weights: torch.Tensor,
        host_ids: torch.Tensor,
        passes: Sequence[Pass],
        position: float,
    ) -> torch.Tensor:
        total: torch.Tensor | None = None
        for index, part in enumerate(passes):
            with self.slots.hold_resident(part.expert_ids, self._keep(passes, index), position):
                self._look_ahead(passes, index + 1, position)
                if len(passes) == 1:
                    return self._run_resident(x, topk_weights, host_ids)
                # No kernel may see an id that it has no row for: a route of another pass becomes any expert of this
                # one, with weight zero.
                mine = torch.isin(host_ids, torch.from_numpy(part.expert_ids))
                ids = torch.where(mine, host_ids, int(part.expert_ids[0]))
                weights = torch.where(self._backend.to_device(mine), topk_weights, 0)
                result = self._run_resident(x, weights, ids).float()
            total = result if total is None else total.add_(result)
        assert total is not None
        return total.to(x.dtype)

    def _keep(self, passes: Sequence[Pass], index: int) -> npt.NDArray[np.bool_]:
        return needed_later(passes, index, self.slots.residency.expert_count)

    def _look_ahead(self, passes: Sequence[Pass], index: int, position: float) -> None:
        """Have the experts of a later pass copied while this one computes."""
        if index < len(passes) and self._helper.is_up:
            # Still before everything of the next layer.
            deadline = position + index / (len(passes) + 1)
            self.slots.look_ahead(passes[index].expert_ids, self._keep(passes, index), deadline)

    def _run_layer_buffer(
        self,
        x: torch.Tensor,
        topk_weights: torch.Tensor,
        host_ids: torch.Tensor,
        distinct: npt.NDArray[np.int64],
        position: float,
    ) -> torch.Tensor:
        """One exact pass from a row per expert; leaves the slots as they are, but for those that were never filled."""
        assert self.buffer is not None
        buffer = self.buffer
        buffer.claim(self.home)
        self._fill_free_slots(host_ids, distinct, position)
        lease, cached = self.slots.lease_resident(distinct)
        try:
            absent = np.setdiff1d(distinct, cached).tolist()
            buffer.drop_all_but(absent)
            buffer.bring(absent, Cause.DEMAND, position)
            self._needed_at[distinct] = position
            self._bring_following(int(distinct.size))
            self._counters.values[self._counters.passes[PassKind.LAYER_BUFFER]] += 1
            behind_row = self.slots.cells.behind_row
            if behind_row is not None:
                buffer.wait(absent)
                rows = np.arange(behind_row, behind_row + self.slots.residency.expert_count, dtype=np.int32)
                if lease is not None:
                    rows[cached] = lease.slot_ids
                return self._kernel(x, topk_weights, self._backend.to_device(torch.from_numpy(rows)[host_ids]))
            if lease is not None:
                buffer.take(self.slots.cells, lease.slot_ids.tolist(), cached.tolist())
            buffer.wait(absent)
            return self._run_rows(buffer.cells.tensors, x, topk_weights, host_ids)
        finally:
            buffer.was_read()
            if lease is not None:
                self.slots.end(lease)

    def _fill_free_slots(self, host_ids: torch.Tensor, distinct: npt.NDArray[np.int64], position: float) -> None:
        """Put the experts of a wide forward that most routes go to into slots that were never filled."""
        if not (free_count := self.slots.free_count()):
            return
        missing = distinct[~self.slots.residency.resident_mask()[distinct]]
        wanted = self._planner.fillers(host_ids.numpy(), missing, free_count)
        with self.slots.hold_resident(wanted, self._keep([Pass(distinct, None)], 0), position):
            pass

    def _bring_following(self, distinct_count: int) -> None:
        """Have the next layer's experts copied into the other buffer, if it will very likely need them all."""
        following = self.following
        if following is None or not self._helper.is_up or following.buffer in (None, self.buffer):
            return
        if self._planner.expects_all(distinct_count):
            following.bring_ahead(distinct_count)

    def bring_ahead(self, distinct_count: int) -> None:
        """Begin to fetch what a wide forward will find missing here.

        Args:
            distinct_count: experts that the layer before needs in this forward.
        """
        assert self.buffer is not None
        if distinct_count > self.slots.cells.cell_count:
            absent = self.slots.absent()
            # What was needed last is likeliest to be needed again, and copied first.
            absent.sort(key=self._needed_at.__getitem__, reverse=True)
            self.buffer.claim(self.home)
            self.buffer.bring(absent, Cause.PREFETCH, self._order.next_position(self.layer_id))

    def _run_rows(
        self, rows: Tensors, x: torch.Tensor, topk_weights: torch.Tensor, host_ids: torch.Tensor
    ) -> torch.Tensor:
        """One kernel call on tensors that have a row for every expert, by its id."""
        self._bind(rows)
        try:
            return self._kernel(x, topk_weights, self._backend.to_device(host_ids))
        finally:
            self._bind(self.slots.cells.tensors if self._in_place_rows is None else self._in_place_rows)

    def _run_resident(self, x: torch.Tensor, topk_weights: torch.Tensor, host_ids: torch.Tensor) -> torch.Tensor:
        """One kernel call whose experts are all in slots, and held."""
        lease = self.slots.lease(host_ids.numpy().view(np.uint32))
        assert lease is not None, "a pass runs only once its experts are resident"
        started_s = time.perf_counter()
        try:
            return self._kernel(x, topk_weights, self._slot_tensor(lease))
        finally:
            self.slots.end(lease)
            if self._backend.is_host:  # elsewhere the kernel has only been launched
                self._costs.observe_kernel(len(host_ids), lease.distinct_count, time.perf_counter() - started_s)
