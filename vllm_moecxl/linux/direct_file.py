"""Read a file past the page cache, with several reads in flight."""

from __future__ import annotations

import ctypes
import mmap
import os
import stat
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from vllm_moecxl.errors import ConfigError, TransferError
from vllm_moecxl.linux.affinity import use_all_cpus
from vllm_moecxl.units import KIB, MIB

#: One read: long enough to reach the device's bandwidth, short enough that one slab keeps all readers busy.
#: Source: `moecxl profile` on a virtio disk, 2026-11-22.
CHUNK_BYTES = MIB
#: Reads in flight.
READER_COUNT = 4
#: Alignments of direct reads, of which a file system and its device accept one: that of a sector or of a page.
_ALIGNMENTS = (512, 4 * KIB)
_DROP = os.POSIX_FADV_DONTNEED


class DirectFile:
    """A file whose bytes reach the caller's memory without a second copy in the page cache.

    Reads are direct (`O_DIRECT`) where the file system has that. Where it has not (some network and memory file
    systems), they go through the page cache and the pages are dropped at once; `is_direct` says which.

    Args:
        path: a regular file.

    Raises:
        ConfigError: the file cannot be opened, or is no regular file.
    """

    def __init__(self, path: Path, reader_count: int = READER_COUNT) -> None:
        self.path = path
        self._buffered = _open_regular(path)
        self.byte_count = os.fstat(self._buffered).st_size
        self._direct = self._open_direct()
        self._align_bytes = self._alignment()
        if self._direct is None:
            # No reading ahead: it would bring back what another reader has just dropped.
            os.posix_fadvise(self._buffered, 0, 0, os.POSIX_FADV_RANDOM)
        self._scratch = threading.local()
        self._readers = ThreadPoolExecutor(reader_count, thread_name_prefix="moecxl-file", initializer=use_all_cpus)

    @property
    def is_direct(self) -> bool:
        """Whether reads go past the page cache."""
        return self._direct is not None

    def close(self) -> None:
        """Wait for reads in flight and close the file."""
        self._readers.shutdown()
        for file in {self._buffered, self._direct} - {None}:
            os.close(file)  # type: ignore[arg-type]

    def read(self, offset: int, byte_count: int) -> bytes:
        """A small part of the file, such as a header."""
        target = bytearray(byte_count)
        self.read_into([(offset, memoryview(target))])
        return bytes(target)

    def read_into(self, reads: Sequence[tuple[int, memoryview]]) -> None:
        """Fill each target from its offset on; returns when all of them are filled.

        Args:
            reads: (offset, contiguous writable bytes) pairs. Reads whose offset, address and size are multiples of the
                device's alignment go straight into the target, others through a small aligned buffer.

        Raises:
            TransferError: the device failed, or the file ends before a target is full.
        """
        chunks = [chunk for offset, target in reads for chunk in self._chunks(offset, target)]
        if len(chunks) == 1:
            self._read_chunk(*chunks[0])
            return
        # All have ended before any error is told: nothing may write into a target that its owner has given up.
        futures: list[Future[None]] = []
        try:
            for chunk in chunks:
                futures.append(self._readers.submit(self._read_chunk, *chunk))
        finally:
            errors = [error for future in futures if (error := future.exception()) is not None]
        if errors:
            raise errors[0]

    def _open_direct(self) -> int | None:
        try:
            return os.open(self.path, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECT)
        except OSError:  # this file system has no direct reads
            return None

    def _alignment(self) -> int:
        """The smallest alignment that the device takes, by trial; drops direct reading where it takes none."""
        page = memoryview(mmap.mmap(-1, 2 * _ALIGNMENTS[-1]))
        for align_bytes in _ALIGNMENTS:
            try:
                if self._direct is not None:
                    os.preadv(self._direct, [page[align_bytes : 2 * align_bytes]], 0)
                    return align_bytes
            except OSError:
                continue
        if self._direct is not None:
            os.close(self._direct)
            self._direct = None
        return 1

    def _chunks(self, offset: int, target: memoryview) -> Iterator[tuple[int, memoryview]]:
        target = target.cast("B")
        for start in range(0, target.nbytes, CHUNK_BYTES):
            yield offset + start, target[start : start + CHUNK_BYTES]

    def _read_chunk(self, offset: int, target: memoryview) -> None:
        align = self._align_bytes
        if self._direct is None:
            self._fill(self._buffered, offset, target)
            # Whole pages: what the kernel has only a part of it would keep.
            start, end = offset // mmap.PAGESIZE * mmap.PAGESIZE, offset + target.nbytes
            os.posix_fadvise(self._buffered, start, -(-end // mmap.PAGESIZE) * mmap.PAGESIZE - start, _DROP)
        elif offset % align == 0 and target.nbytes % align == 0 and _address_of(target) % align == 0:
            self._fill(self._direct, offset, target)
        else:
            start = offset // align * align
            end = -(-(offset + target.nbytes) // align) * align
            scratch = self._aligned_scratch()[: end - start]
            self._fill(self._direct, start, scratch, enough=offset + target.nbytes - start)
            target[:] = scratch[offset - start : offset - start + target.nbytes]

    def _aligned_scratch(self) -> memoryview:
        """This thread's page-aligned buffer, a chunk and its ragged ends."""
        if not hasattr(self._scratch, "buffer"):
            self._scratch.buffer = memoryview(mmap.mmap(-1, CHUNK_BYTES + 2 * _ALIGNMENTS[-1]))
        buffer: memoryview = self._scratch.buffer
        return buffer

    def _fill(self, file: int, offset: int, target: memoryview, enough: int | None = None) -> None:
        """Read until the target is full, or `enough` of it where the file may end inside it."""
        done = 0
        while done < (target.nbytes if enough is None else enough):
            try:
                count = os.preadv(file, [target[done:]], offset + done)
            except OSError as error:
                raise TransferError(
                    f"reading {target.nbytes} bytes at {offset} of {self.path} failed ({error.strerror}): see the "
                    "kernel's log, and pack the model again on a sound device"
                ) from error
            if not count:
                raise TransferError(
                    f"{self.path} ends at {offset + done} of the {self.byte_count} bytes that it had: it was cut short "
                    "while in use, pack the model again"
                )
            done += count


def _open_regular(path: Path) -> int:
    option = f'--moe-offload-config: banks="file:{path}"'
    try:
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # a pipe would have us wait for a writer
    except OSError as error:
        raise ConfigError(
            f"{option} cannot be opened ({error.strerror}): name a file that moecxl pack wrote"
        ) from error
    if not stat.S_ISREG(os.fstat(file).st_mode):
        os.close(file)
        raise ConfigError(f"{option} is no regular file: name a file that moecxl pack wrote")
    return file


def _address_of(view: memoryview) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(view))
