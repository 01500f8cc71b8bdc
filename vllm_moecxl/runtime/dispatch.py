"""The hot path: once per layer and forward, from the router's expert ids to the kernel's output.

A full hit is one table look-up, one lease and one kernel call. All else, misses and wide forwards, is `_slow`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import torch

from vllm_moecxl.control.passes import Pass, expert_passes, needed_later, token_passes
from vllm_moecxl.control.residency import Lease, Residency
from vllm_moecxl.data.devices import DeviceBackend
from vllm_moecxl.data.slabs import Cells, Home
from vllm_moecxl.errors import IntegrityError, TransferError
from vllm_moecxl.runtime.counters import Counters
from vllm_moecxl.types import Lookup, PassKind, SlotState

#: Runs vLLM's kernel: (x, topk_weights, row ids into the bound cells) -> output.
Kernel = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
#: Per extent, [rows, ...] tensors.
Tensors = Sequence[torch.Tensor]
#: Makes the kernel read its weights from these rows.
Bind = Callable[[Tensors], None]


class Dispatch:
    """Runs one layer from its slots.

    Args:
        name: the layer's name, for messages.
        residency: its slot table.
        home: its slabs.
        slots: its cells; bound to the kernel except while the layer buffer is.
        layer_buffer: shared cells, one per expert; None where there is none.
        pass_kind: how to run what does not fit the slots: TOKEN, EXPERT, or LAYER_BUFFER for kernels whose result
            changes with either.
    """

    def __init__(
        self,
        name: str,
        residency: Residency,
        home: Home,
        slots: Cells,
        layer_buffer: Cells | None,
        backend: DeviceBackend,
        counters: Counters,
        kernel: Kernel,
        bind: Bind,
        pass_kind: PassKind,
    ) -> None:
        assert pass_kind is not PassKind.LAYER_BUFFER or layer_buffer is not None
        self.name = name
        self.residency = residency
        self.home = home
        self.slots = slots
        self.layer_buffer = layer_buffer
        self.pass_kind = pass_kind
        self._backend = backend
        self._counters = counters
        self._kernel = kernel
        self._bind = bind
        self._counted_slots = dict.fromkeys(SlotState, 0)
        self._count_slots()
        bind(slots.tensors)

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
        lease = self.residency.lease(routes)
        if lease is None:
            return self._slow(x, topk_weights, host_ids, routes)
        values = self._counters.values
        values[self._counters.hit] += lease.distinct_count
        values[self._counters.single_pass] += 1
        try:
            return self._kernel(x, topk_weights, self._slot_tensor(lease))
        finally:
            self.residency.release(lease)

    def rehearse(self, x: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor) -> torch.Tensor:
        """Compute a forward that no request asked for (memory profile, warm-up); nobody looks at the result.

        It is right where the kernel can read the home itself. Elsewhere the kernel runs on what the cells happen to
        hold: to fetch every expert once would make a start wait for the whole bank. Slots and counters stay as they
        are.
        """
        host_ids = self._backend.route_ids(topk_ids)
        if not host_ids.numel():
            return torch.empty_like(x)
        self.residency.require_known(np.unique(host_ids.numpy().view(np.uint32)))
        if self._backend.is_host and self.home.tensors is not None:
            return self._run_rows(self.home.tensors, x, topk_weights, host_ids)
        if self.layer_buffer is not None:
            return self._run_rows(self.layer_buffer.tensors, x, topk_weights, host_ids)
        return self._kernel(x, topk_weights, self._backend.to_device(host_ids % self.slots.cell_count))

    def preload(self, expert_ids: Sequence[int]) -> None:
        """Fetch experts that are likely to be needed first, as many as there are slots."""
        self._make_resident(
            Pass(np.array(expert_ids[: self.slots.cell_count], dtype=np.int64), None),
            np.zeros(self.residency.expert_count, dtype=np.bool_),
        )

    def _slot_tensor(self, lease: Lease) -> torch.Tensor:
        return self._backend.to_device(torch.from_numpy(lease.slot_ids))

    def _slow(
        self, x: torch.Tensor, topk_weights: torch.Tensor, host_ids: torch.Tensor, routes: npt.NDArray[np.uint32]
    ) -> torch.Tensor:
        """A forward with misses: fetch, and run it in as many passes as it needs."""
        distinct = np.unique(routes).astype(np.int64)
        resident = self.residency.resident_mask()
        hit_count = int(np.count_nonzero(resident[distinct]))
        self._counters.values[self._counters.hit] += hit_count
        self._counters.values[self._counters.lookup[Lookup.MISS]] += distinct.size - hit_count
        kind: PassKind
        passes: Sequence[Pass]
        if distinct.size <= self.slots.cell_count:
            kind, passes = PassKind.SINGLE, [Pass(distinct, None)]
        else:
            kind, passes = self._plan(host_ids, distinct, resident)
        if kind is PassKind.LAYER_BUFFER:
            return self._run_layer_buffer(x, topk_weights, host_ids, distinct)
        self._counters.values[self._counters.passes[kind]] += len(passes)
        if kind is PassKind.TOKEN:
            return self._run_token_passes(x, topk_weights, host_ids, passes)
        return self._run_expert_passes(x, topk_weights, host_ids, passes)

    def _plan(
        self, host_ids: torch.Tensor, distinct: npt.NDArray[np.int64], resident: npt.NDArray[np.bool_]
    ) -> tuple[PassKind, Sequence[Pass]]:
        """Passes for more experts than there are slots."""
        slot_count = self.slots.cell_count
        if self.pass_kind is PassKind.EXPERT:
            return PassKind.EXPERT, expert_passes(distinct, resident, slot_count)
        if self.pass_kind is PassKind.TOKEN:
            # The layer buffer copies every expert once: passes that would copy more are not worth their churn.
            limit = int(distinct.size) if self.layer_buffer is not None else host_ids.numel()
            passes = token_passes(host_ids.numpy(), resident, slot_count, limit)
            if passes is not None:
                return PassKind.TOKEN, passes
        return PassKind.LAYER_BUFFER, []

    def _run_token_passes(
        self, x: torch.Tensor, topk_weights: torch.Tensor, host_ids: torch.Tensor, passes: Sequence[Pass]
    ) -> torch.Tensor:
        output: torch.Tensor | None = None
        for index, part in enumerate(passes):
            self._make_resident(part, needed_later(passes, index, self.residency.expert_count))
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
        self, x: torch.Tensor, topk_weights: torch.Tensor, host_ids: torch.Tensor, passes: Sequence[Pass]
    ) -> torch.Tensor:
        total: torch.Tensor | None = None
        for index, part in enumerate(passes):
            self._make_resident(part, needed_later(passes, index, self.residency.expert_count))
            if len(passes) == 1:
                return self._run_resident(x, topk_weights, host_ids)
            # No kernel may see an id that it has no row for: a route of another pass becomes any expert of this one,
            # with weight zero.
            mine = torch.isin(host_ids, torch.from_numpy(part.expert_ids))
            ids = torch.where(mine, host_ids, int(part.expert_ids[0]))
            weights = torch.where(self._backend.to_device(mine), topk_weights, 0)
            result = self._run_resident(x, weights, ids).float()
            total = result if total is None else total.add_(result)
        assert total is not None
        return total.to(x.dtype)

    def _run_layer_buffer(
        self, x: torch.Tensor, topk_weights: torch.Tensor, host_ids: torch.Tensor, distinct: npt.NDArray[np.int64]
    ) -> torch.Tensor:
        """One exact pass from a row per expert; leaves the slots as they are."""
        buffer = self.layer_buffer
        assert buffer is not None
        resident = self.residency.resident_mask()
        cached = distinct[resident[distinct]].tolist()
        absent = distinct[~resident[distinct]].tolist()
        buffer.take(self.slots, [self.residency.resident_slot(expert_id) for expert_id in cached], cached)
        self._fetch(buffer, absent, absent)
        self._counters.values[self._counters.passes[PassKind.LAYER_BUFFER]] += 1
        return self._run_rows(buffer.tensors, x, topk_weights, host_ids)

    def _run_rows(
        self, rows: Tensors, x: torch.Tensor, topk_weights: torch.Tensor, host_ids: torch.Tensor
    ) -> torch.Tensor:
        """One kernel call on tensors that have a row for every expert, by its id."""
        self._bind(rows)
        try:
            return self._kernel(x, topk_weights, self._backend.to_device(host_ids))
        finally:
            self._bind(self.slots.tensors)

    def _run_resident(self, x: torch.Tensor, topk_weights: torch.Tensor, host_ids: torch.Tensor) -> torch.Tensor:
        """One kernel call whose experts are all in slots."""
        lease = self.residency.lease(host_ids.numpy().view(np.uint32))
        assert lease is not None, "a pass runs only once its experts are resident"
        try:
            return self._kernel(x, topk_weights, self._slot_tensor(lease))
        finally:
            self.residency.release(lease)

    def _make_resident(self, part: Pass, keep: npt.NDArray[np.bool_]) -> None:
        """Fetch what a pass lacks. All slots are taken before any copy, so that no fill evicts another."""
        resident = self.residency.resident_mask()[part.expert_ids]
        missing = part.expert_ids[~resident].tolist()
        if not missing:
            return
        cached = part.expert_ids[resident].astype(np.uint32)
        hold = self.residency.lease(cached) if cached.size else None
        slot_ids: list[int] = []
        try:
            for expert_id in missing:
                slot_id = self.residency.begin_fill(expert_id, keep)
                assert slot_id is not None, "a pass needs no more experts than there are slots"
                slot_ids.append(slot_id)
            self._fetch(self.slots, missing, slot_ids)
        except BaseException:
            for slot_id in slot_ids:
                self.residency.abort_fill(slot_id)
            raise
        else:
            for slot_id in slot_ids:
                self.residency.complete_fill(slot_id)
        finally:
            if hold is not None:
                self.residency.release(hold)
            self._count_slots()

    def _fetch(self, cells: Cells, expert_ids: list[int], cell_ids: list[int]) -> None:
        started_ns = time.perf_counter_ns()
        try:
            cells.fetch(self.home, expert_ids, cell_ids)
        except (TransferError, IntegrityError):
            for bank_name in self.home.bytes_by_bank(expert_ids):
                self._counters.values[self._counters.bank_up[bank_name]] = 0
            raise
        values = self._counters.values
        values[self._counters.stall_ns] += time.perf_counter_ns() - started_ns
        for bank_name, byte_count in self.home.bytes_by_bank(expert_ids).items():
            values[self._counters.fetch_bytes[bank_name]] += byte_count

    def _count_slots(self) -> None:
        """Move the gauge of slot states by what changed in this layer."""
        counts = self.residency.state_counts()
        for state in SlotState:
            self._counters.values[self._counters.slots[state]] += counts[state] - self._counted_slots[state]
        self._counted_slots = counts
