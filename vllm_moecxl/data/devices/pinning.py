"""Host memory that a device has been told of, piece by piece."""

from __future__ import annotations

import logging
import mmap
import threading
from bisect import bisect_right
from collections.abc import Callable, Iterator

import torch

from vllm_moecxl.units import GIB, format_bytes

#: A driver keeps a table for each registration, in one allocation of limited size: 512 GiB at once fail since NVIDIA's
#: R580. Pieces also tell how far it got. Source: https://github.com/LMCache/LMCache/pull/5177.
PIECE_BYTES = GIB

logger = logging.getLogger("vllm.moecxl")


class PinnedMemory:
    """Registers host memory with a device in pieces, keeps it alive meanwhile, and knows where the pieces meet.

    Any number of threads.

    Args:
        pin: registers [address, address + byte count), whole pages, and returns the device's error code, 0 for none.
        unpin: undoes that, given the address.
        piece_bytes: at most at once; whole pages.
    """

    def __init__(
        self,
        pin: Callable[[int, int], int],
        unpin: Callable[[int], object],
        piece_bytes: int = PIECE_BYTES,
    ) -> None:
        assert piece_bytes > 0 and piece_bytes % mmap.PAGESIZE == 0
        self.pinned_bytes = 0
        self._pin = pin
        self._unpin = unpin
        self._piece_bytes = piece_bytes
        self._lock = threading.Lock()
        #: By address: the tensor, which must not be freed while the device knows of it, and the pieces' ranges.
        self._entries: dict[int, tuple[torch.Tensor, list[range]]] = {}
        #: Addresses where one piece ends and the next begins.
        self._seams: tuple[int, ...] = ()

    def add(self, memory: torch.Tensor) -> bool:
        """Register a tensor's pages, all of them or none.

        Args:
            memory: contiguous; nobody else has a part of its pages.

        Returns:
            Whether it worked; the log says why it did not.
        """
        assert memory.is_contiguous() and memory.device.type == "cpu"
        if not memory.nbytes:
            return True
        pieces = [*self._pieces(memory)]
        with self._lock:
            assert memory.data_ptr() not in self._entries
            byte_count = pieces[-1].stop - pieces[0].start
            for index, piece in enumerate(pieces):
                if code := self._pin(piece.start, len(piece)):
                    for earlier in reversed(pieces[:index]):
                        self._unpin(earlier.start)
                    logger.warning(
                        "MoE offload: %s of host memory cannot be registered with the device, beside the %s that are: "
                        "piece %d of %d was refused (error %d). Copies go through a staging ring instead, which takes "
                        "longer",
                        *(format_bytes(byte_count), format_bytes(self.pinned_bytes), index + 1, len(pieces), code),
                    )
                    return False
            self._entries[memory.data_ptr()] = memory, pieces
            self.pinned_bytes += byte_count
            self._seams = self._find_seams()
        return True

    def remove(self, memory: torch.Tensor) -> None:
        """Undo `add`."""
        if not memory.nbytes:
            return
        with self._lock:
            _, pieces = self._entries.pop(memory.data_ptr())
            self.pinned_bytes -= pieces[-1].stop - pieces[0].start
            for piece in pieces:
                self._unpin(piece.start)
            self._seams = self._find_seams()

    def clear(self) -> None:
        """Undo every `add`."""
        for memory, _ in list(self._entries.values()):
            self.remove(memory)

    def parts(self, address: int, byte_count: int) -> Iterator[tuple[int, int]]:
        """The (start, stop) offsets at which a copy from there has to be cut, so that it reads one piece at a time.

        A copy that reads two registrations fails. Source: https://github.com/sgl-project/sglang/pull/36798.
        """
        start, seams = 0, self._seams
        for seam in seams[bisect_right(seams, address) :]:
            if seam >= address + byte_count:
                break
            yield start, seam - address
            start = seam - address
        yield start, byte_count

    def _pieces(self, memory: torch.Tensor) -> Iterator[range]:
        """The tensor's pages, cut."""
        page = mmap.PAGESIZE
        first = memory.data_ptr() // page * page
        end = -(-(memory.data_ptr() + memory.nbytes) // page) * page
        for start in range(first, end, self._piece_bytes):
            yield range(start, min(start + self._piece_bytes, end))

    def _find_seams(self) -> tuple[int, ...]:
        return tuple(sorted(piece.start for _, pieces in self._entries.values() for piece in pieces[1:]))
