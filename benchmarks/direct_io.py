"""What the disk gives to a reader that goes around the page cache."""

from __future__ import annotations

import mmap
import os
import time
from pathlib import Path

from vllm_moecxl.units import MIB

_BLOCK_BYTES = 8 * MIB


def read_bytes_per_s(path: Path, seconds_max: float = 2.0) -> float:
    """Bandwidth of sequential `O_DIRECT` reads of 8 MiB, one at a time.

    Raises:
        OSError: the file system has no direct I/O.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECT)
    try:
        with mmap.mmap(-1, _BLOCK_BYTES) as block:
            started, offset = time.perf_counter(), 0
            while (count := os.preadv(descriptor, [block], offset)) == _BLOCK_BYTES:
                offset += count
                if time.perf_counter() - started > seconds_max:
                    break
            return offset / (time.perf_counter() - started)
    finally:
        os.close(descriptor)
