"""A layer that the device serves by itself: tables in its memory, and kernels that look up, fetch and remap.

Nothing here waits for the device, and nothing reads what it has found out: that comes back by the mailbox.
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from moecxl_kernels.tables import SlotTable, make_mailbox, make_table

from vllm_moecxl.data.banks.memory import MemoryRows
from vllm_moecxl.data.devices.base import DeviceBackend, Rows, Touches
from vllm_moecxl.data.layout import as_bytes
from vllm_moecxl.data.slabs import Cells, Home, Place, Shard
from vllm_moecxl.errors import CapacityError

if TYPE_CHECKING:  # it needs Triton
    from moecxl_kernels.gather import SlabMap

#: Visits of a layer that the sidecar may be behind before it misses some.
RECORD_DEPTH = 16
#: Programs that gather: 16 KiB each in flight are four times what a PCIe 5.0 x16 link needs to stay busy, at 50 GB/s
#: and 5 us. By arithmetic, not measured: `python -m benchmarks copy` tries others.
GATHER_PROGRAM_COUNT = 64


class Kernels:
    """The kernels, imported when the first layer needs them: Triton is there where a device is."""

    def __init__(self) -> None:
        from moecxl_kernels.ensure import ensure_experts
        from moecxl_kernels.gate import gate_lookahead
        from moecxl_kernels.gather import gather_slabs
        from moecxl_kernels.remap import remap

        self.ensure_experts = ensure_experts
        self.gather_slabs = gather_slabs
        self.remap = remap
        self.gate_lookahead = gate_lookahead


@dataclass(frozen=True)
class EarlyGate:
    """The gate of a layer that follows, and where its scores go.

    Attributes:
        weight: [1, experts, hidden] on the device, the model's own parameter.
        scale: [1, hidden] float32, or None.
        bias: [1, experts] float32, or None.
        words: [depth, tokens x experts] int64 of host memory that the device writes.
        token_count_max: tokens that there are words for; of wider forwards nothing is predicted.
    """

    weight: torch.Tensor
    scale: torch.Tensor | None
    bias: torch.Tensor | None
    words: torch.Tensor
    token_count_max: int


class DeviceLayer:
    """See the module.

    Args:
        home: the slabs.
        cells: the slots' memory.
        topk: experts of a token.
        lane_count: slots that are lent to the host, for what it prefetches.
        backend: the device.
        device: where the kernels take their inputs.
        step: [1] int32 on the device, the number of the forward under way; of all layers.

    Attributes:
        table, mailbox: see `moecxl_kernels.tables`.
        own_count: slots that the device has for itself, at any time.
        token_count_max: tokens of one visit, at most, so that their experts fit whatever they are.
        early_gates: of the next layers, the nearest first; set where somebody wants to know what they will choose.
    """

    def __init__(
        self,
        home: Home,
        cells: Cells,
        topk: int,
        lane_count: int,
        backend: DeviceBackend,
        device: torch.device,
        step: torch.Tensor,
    ) -> None:
        slot_count = cells.cell_count
        assert slot_count - lane_count >= topk, "a token has to find room for its experts"
        self.home = home
        self.cells = cells
        self.topk = topk
        self.lane_count = lane_count
        self.own_count = slot_count - lane_count
        self.token_count_max = sys.maxsize if self.own_count >= home.expert_count else self.own_count // topk
        self.table: SlotTable = make_table(home.expert_count, slot_count, lane_count, device, step)
        self.mailbox = make_mailbox(
            slot_count, lane_count, RECORD_DEPTH, self.own_count, partial(staged_words, backend)
        )
        self.early_gates: Sequence[EarlyGate] = ()
        self._backend = backend
        self._device = device
        self._kernels = Kernels()
        self._slabs: SlabMap | None = None
        self._copies = torch.zeros((slot_count, 2), dtype=torch.int32, device=device)
        self._copy_count = torch.zeros(1, dtype=torch.int32, device=device)

    def connect(self, registered: Collection[str]) -> None:
        """Let the device find the slabs, in banks that are registered with it by now.

        Raises:
            CapacityError: one is not.
        """
        for name in self.home.bytes_by_bank(range(self.home.expert_count)):
            if name not in registered:
                raise CapacityError(
                    f"--moe-offload-config: the device cannot read bank {name} by itself, as it has to where it looks "
                    'experts up: the log says why the bank could not be registered; use lookup="host"'
                )
        self._slabs = map_slabs(self.home, self.cells, self._device)

    def admit(self, expert_ids: Sequence[int]) -> None:
        """Say that these are in the slots from 0 on; before the first visit."""
        count = len(expert_ids)
        assert count <= self.own_count
        ids = torch.tensor(expert_ids, dtype=torch.int32, device=self._device)
        self.table.expert_of[:count] = ids
        self.table.slot_of[ids.long()] = torch.arange(count, dtype=torch.int32, device=self._device)
        self.mailbox.view[:count] = torch.tensor(expert_ids, dtype=torch.int32)

    def look_up(self, topk_ids: torch.Tensor, is_padding: torch.Tensor | None) -> torch.Tensor:
        """Have every expert of these tokens in a slot when the kernels run that are queued from now on.

        Args:
            topk_ids: [tokens, k] int32 or int64 on the device; no more than `token_count_max` tokens.
            is_padding: [tokens] bool on the device, rows that nobody asked for; None where there are none.

        Returns:
            [tokens, k] int32 on the device, the slots.
        """
        assert len(topk_ids) <= self.token_count_max and self._slabs is not None
        slabs, kernels = self._slabs, self._kernels
        slot_ids = torch.empty_like(topk_ids, dtype=torch.int32)
        self._backend.run(
            f"look-up of {self.home.name}",
            lambda: kernels.ensure_experts(
                topk_ids, is_padding, self.table, self.mailbox, self._copies, self._copy_count
            ),
            self._looked_up,
        )
        self._backend.run(
            f"gather of {self.home.name}",
            lambda: kernels.gather_slabs(self._copies, self._copy_count, slabs, GATHER_PROGRAM_COUNT),
            self._gathered,
        )
        self._backend.run(
            f"remap of {self.home.name}",
            lambda: kernels.remap(topk_ids, is_padding, self.table.slot_of, slot_ids),
            _nothing,
        )
        return slot_ids

    def look_ahead(self, x: torch.Tensor) -> None:
        """Leave in the mailbox what the next gates make of this layer's input; after its `look_up`.

        Args:
            x: [tokens, hidden] on the device.
        """
        for gate in self.early_gates:
            if len(x) <= gate.token_count_max:
                self._backend.run(f"gate after {self.home.name}", partial(self._apply_early, gate, x), _nothing)

    def _apply_early(self, gate: EarlyGate, x: torch.Tensor) -> None:
        self._kernels.gate_lookahead(
            x, gate.weight, gate.scale, gate.bias, self.table.totals, gate.words, gate.token_count_max
        )

    def _looked_up(self) -> Touches:
        """Words that carry order: what the host did before an offer, and what ran before the answer."""
        lane_ids = range(self.lane_count)
        return [(self.mailbox.offers, lane_ids)], [(self.mailbox.answers, lane_ids)]

    def _gathered(self) -> Touches:
        """What the gather reads and writes, by the list that the device has made."""
        copies = self._copies[: int(self._copy_count)].tolist()
        reads: list[tuple[torch.Tensor, Iterable[int]]] = []
        for expert_id, _ in copies:
            for shard, place in self.home.parts(expert_id):
                reads += [(rows.tensor, [place.row_id]) for rows in shard.rows if isinstance(rows, MemoryRows)]
        slot_ids = [slot_id for _, slot_id in copies]
        return reads, [(tensor, slot_ids) for tensor in self.cells.tensors]


def map_slabs(home: Home, cells: Cells, device: torch.device) -> SlabMap:
    """Where the device finds each part of each slab, and where it puts it.

    A slab has a segment for each extent, and more where a stripe of any expert of the layer is cut.
    """
    targets, strides, sizes, sources = [], [], [], []
    parts = [home.parts(expert_id) for expert_id in range(home.expert_count)]
    for extent_id, tensor in enumerate(cells.tensors):
        rows = as_bytes(tensor)
        cuts = {bound for slab in parts for shard, _ in slab for bound in shard.cuts[extent_id]}
        bounds = sorted(cuts | {0, rows.shape[1]})
        for start, stop in pairwise(bounds):
            targets.append(rows.data_ptr() + start)
            strides.append(rows.shape[1])
            sizes.append(stop - start)
            sources.append([_address(slab, extent_id, start, stop) for slab in parts])
    from moecxl_kernels.gather import slab_map

    # By segment so far; the kernel looks them up by expert.
    return slab_map([list(column) for column in zip(*sources, strict=True)], targets, strides, sizes, device)


def _address(slab: Sequence[tuple[Shard, Place]], extent_id: int, start: int, stop: int) -> int:
    """Where bytes [start, stop) of a slab's extent lie; they are in one shard."""
    for shard, place in slab:
        first, last = shard.cuts[extent_id]
        rows = shard.rows[extent_id]
        if first <= start and stop <= last and isinstance(rows, MemoryRows):
            row = rows.as_bytes[place.row_id]
            return row.data_ptr() + start - first
    raise AssertionError("every byte of a slab is in one of its shards")


def staged_words(backend: DeviceBackend, count: int) -> torch.Tensor:
    """[count] int64 zeros of host memory that both the host and the device read and write."""
    # Memory of no bytes has no address that a device could be told.
    words = backend.stage(max(count, 1) * torch.int64.itemsize).view(torch.int64)
    return words.zero_()[:count]


def _nothing() -> Touches:
    """Only tables, which nobody touches but the compute stream, and words that order nothing."""
    nothing: Rows = ()
    return nothing, nothing
