"""Pinned host memory that slabs pass through on their way from banks that the device cannot read by itself."""

from __future__ import annotations

import threading
from collections import deque

import torch

from vllm_moecxl.data.devices.base import DeviceBackend, Event


class StagingRing:
    """A few cells that take turns: filled by the host, read by a copy, and filled again once that copy is complete.

    Any number of threads. Whoever has a cell gives it back, so that the others are not blocked for ever.

    Args:
        backend: gives the memory, and knows when copies are complete.
        cell_bytes: of each cell.

    Raises:
        CapacityError: see `DeviceBackend.stage`.
    """

    def __init__(self, backend: DeviceBackend, cell_bytes: int, cell_count: int) -> None:
        assert cell_bytes > 0 and cell_count > 0
        self.cell_bytes = cell_bytes
        self._backend = backend
        #: Cells that nobody has, with the event behind the last copy from each, in the order that they came back.
        self._idle: deque[tuple[torch.Tensor, Event | None]] = deque()
        self._taken: set[int] = set()
        self._returned = threading.Condition()
        for _ in range(cell_count):
            self._idle.append((backend.stage(cell_bytes), None))

    def acquire(self) -> torch.Tensor:
        """A cell that nobody else has and no copy reads; waits until there is one.

        Returns:
            [cell bytes] uint8, to be given back with `release_after`.
        """
        with self._returned:
            while not self._idle:
                self._returned.wait()
            cell, event = self._next()
            self._taken.add(cell.data_ptr())
        if event is not None:
            # Outside the lock: it takes as long as a copy does, and the others may find what they need meanwhile.
            try:
                self._backend.synchronize(event)
            except BaseException:
                self.release_after(cell, event)
                raise
        return cell

    def release_after(self, cell: torch.Tensor, event: Event | None) -> None:
        """Give a cell back.

        Args:
            cell: as `acquire` gave it.
            event: behind the last copy that reads it; None if none does.
        """
        with self._returned:
            assert cell.data_ptr() in self._taken, "nobody has this cell"
            self._taken.remove(cell.data_ptr())
            self._idle.append((cell, event))
            self._returned.notify()

    def _next(self) -> tuple[torch.Tensor, Event | None]:
        """Take the oldest cell whose copy is complete, else the oldest, with the event to wait for."""
        for index, (cell, event) in enumerate(self._idle):
            if event is None or self._backend.query(event):
                del self._idle[index]
                return cell, None
        return self._idle.popleft()
