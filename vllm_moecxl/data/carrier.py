"""How the bytes of a slab get from a bank into a cell: one copy at a time, in the thread that asks for it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise

import torch

from vllm_moecxl.data.banks.memory import MemoryRows
from vllm_moecxl.data.devices.base import DeviceBackend, Event
from vllm_moecxl.data.fetch import Fetch
from vllm_moecxl.data.slabs import Piece
from vllm_moecxl.data.staging import StagingRing
from vllm_moecxl.linux import memory

#: Cells of the staging ring: one is read into while others are on their way, for each of a file's readers.
_STAGING_CELL_COUNT = 8


class Carrier:
    """Copies straight into host memory, from registered memory to a device, or through a staging ring. Any thread.

    Args:
        cell_bytes: the longest piece.
    """

    def __init__(self, backend: DeviceBackend, cell_bytes: int) -> None:
        self._backend = backend
        self._cell_bytes = cell_bytes
        self._lock = threading.Lock()
        self._ring: StagingRing | None = None

    def copy(self, fetch: Fetch, piece: Piece, source: int, link_id: int, *, is_registered: bool) -> Event | None:
        """Copy one piece of a slab from one of its places.

        Args:
            source: index of the place.
            link_id: the stream's, on a device.
            is_registered: whether the device reads that bank's memory by itself.

        Returns:
            On a device, an event behind the copy; elsewhere it is done.

        Raises:
            TransferError: the bank cannot be read.
        """
        home = fetch.home
        targets = [fetch.target[extent_id][start:stop] for extent_id, start, stop in piece.spans]
        if self._backend.is_host:
            home.read_piece(piece, source, targets)
            return None
        stream = self._backend.copy_stream(link_id)
        if fetch.after is not None:
            self._backend.wait(stream, fetch.after)
        if not is_registered:
            return self._copy_staged(fetch, link_id, targets, lambda cells: home.read_piece(piece, source, cells))
        shard_id, row_id = piece.places[source]
        for span, target in zip(piece.spans, targets, strict=True):
            rows, row_id, _, offset = home.shards[shard_id].copy_of(row_id, span, target)
            assert isinstance(rows, MemoryRows)
            self._backend.copy(rows.as_bytes[row_id, offset : offset + target.nbytes], target, stream)
        return self._backend.record(stream)

    def copy_whole(self, fetch: Fetch, link_id: int) -> Event:
        """Copy a whole slab: read and held against its digest on the host, then staged to the device.

        Raises:
            TransferError, IntegrityError: see `Home.read`.
        """
        slab = [torch.empty(extent.row_bytes, dtype=torch.uint8) for extent in fetch.home.layout.extents]
        fetch.home.read(fetch.expert_id, slab)
        event: Event | None = None
        if fetch.after is not None:
            self._backend.wait(self._backend.copy_stream(link_id), fetch.after)
        for row, target in zip(slab, fetch.target, strict=True):
            for start in range(0, row.nbytes, self._cell_bytes):
                part, to = row[start : start + self._cell_bytes], target[start : start + self._cell_bytes]

                def fill(cells: Sequence[torch.Tensor], part: torch.Tensor = part) -> None:
                    memory.copy(part.data_ptr(), cells[0].data_ptr(), part.nbytes)

                event = self._copy_staged(fetch, link_id, [to], fill)
        assert event is not None
        return event

    def _copy_staged(
        self,
        fetch: Fetch,
        link_id: int,
        targets: Sequence[torch.Tensor],
        fill: Callable[[Sequence[torch.Tensor]], None],
    ) -> Event:
        """Through a cell of the staging ring, which `fill` fills."""
        stream = self._backend.copy_stream(link_id)
        ring = self._staging()
        cell = ring.acquire()
        event: Event | None = None
        try:
            starts = list(accumulate((target.nbytes for target in targets), initial=0))
            parts = [cell[start:stop] for start, stop in pairwise(starts)]
            fill(parts)
            for part, target in zip(parts, targets, strict=True):
                self._backend.copy(part, target, stream)
            event = self._backend.record(stream)
        finally:
            # Where filling failed nothing reads the cell.
            ring.release_after(cell, event)
        assert event is not None
        return event

    def _staging(self) -> StagingRing:
        with self._lock:
            if self._ring is None:
                self._ring = StagingRing(self._backend, self._cell_bytes, _STAGING_CELL_COUNT)
            return self._ring
