"""What Linux says about this process' memory, with container limits counted."""

from __future__ import annotations

import ctypes
import math
import mmap
import resource
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from vllm_moecxl.linux.memory import Mapping, SharedPages
from vllm_moecxl.units import KIB

_MADV_DONTNEED = 4
_PROC = Path("/proc")
_CGROUP = Path("/sys/fs/cgroup")


def available_bytes(proc: Path = _PROC, cgroup: Path = _CGROUP) -> int:
    """Host memory that this process may still take: the machine's or the cgroup's, whichever is less."""
    meminfo = dict(line.split(":", 1) for line in (proc / "meminfo").read_text().splitlines())
    available = int(meminfo["MemAvailable"].split()[0]) * KIB
    return max(min([available, *_cgroup_rooms(proc, cgroup)]), 0)


def _cgroup_rooms(proc: Path, cgroup: Path) -> Iterator[int]:
    """What each memory limit above this process leaves, in cgroups of version 2 and 1; a parent's limit holds too."""
    for line in (proc / "self" / "cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers:
            root, limit_name, usage_name, cache_name = cgroup, "memory.max", "memory.current", "inactive_file"
        elif "memory" in controllers.split(","):
            root, limit_name = cgroup / "memory", "memory.limit_in_bytes"
            usage_name, cache_name = "memory.usage_in_bytes", "total_inactive_file"
        else:
            continue
        folder = root / path.lstrip("/")
        # Inside a container the path may be the host's: the container's own limit is then at the root.
        for level in (folder, *(parent for parent in folder.parents if parent.is_relative_to(root))):
            limit, usage = level / limit_name, level / usage_name
            if limit.exists() and usage.exists() and (text := limit.read_text().strip()) != "max":
                stat = level / "memory.stat"
                rows = dict(row.split(maxsplit=1) for row in stat.read_text().splitlines()) if stat.exists() else {}
                yield int(text) - int(usage.read_text()) + int(rows.get(cache_name, 0))


def locked_limit_bytes() -> int | None:
    """How much memory this process may lock or pin; None for no limit."""
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    return None if soft == resource.RLIM_INFINITY else soft


def as_tensor(mapping: Mapping, shape: Sequence[int], dtype: torch.dtype, offset: int = 0) -> torch.Tensor:
    """A tensor on part of a mapping, which it keeps alive."""
    element_count = math.prod(shape)
    assert element_count > 0
    return torch.frombuffer(mapping.buffer, dtype=dtype, count=element_count, offset=offset).view(*shape)


def anonymous_tensor(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """A host tensor in a mapping of its own: exact size, zeros, and no memory taken until it is touched."""
    return as_tensor(Mapping.anonymous(math.prod(shape) * dtype.itemsize), shape, dtype)


def tensor_before(row_count: int, tail_shape: Sequence[int], dtype: torch.dtype, tail: SharedPages) -> torch.Tensor:
    """A [rows + tail rows, ...] host tensor whose last rows are the same memory in all tensors made for one tail.

    Args:
        row_count: rows of its own.
        tail_shape: [tail rows, ...] of the shared rows, from the start of `tail` on.
    """
    own_bytes = row_count * math.prod(tail_shape[1:]) * dtype.itemsize
    # The shared part starts on a page, so the own part has to end with one.
    offset = -own_bytes % mmap.PAGESIZE
    mapping = Mapping.before(offset + own_bytes, tail)
    return as_tensor(mapping, (row_count + tail_shape[0], *tail_shape[1:]), dtype, offset)


def trim_heap() -> None:
    """Give free heap pages back to the machine, where the C library can (glibc).

    Tensors below glibc's mapping threshold (32 MB) leave holes in the heap that would otherwise stay resident: loading
    a checkpoint layer by layer would end with a third more memory than it needs.
    """
    if (trim := getattr(_libc, "malloc_trim", None)) is not None:
        trim(0)


class FileMappings:
    """The file-backed ranges of this process, to give their pages back.

    A checkpoint that is read through a mapping counts in the process' resident memory for as long as it is mapped.
    Once a tensor has been loaded its pages can go: whoever reads it again gets what the file has.
    """

    def __init__(self, maps: Path = _PROC / "self" / "maps") -> None:
        self._ranges: list[tuple[int, int]] = []
        for line in maps.read_text().splitlines():
            fields = line.split(maxsplit=5)
            if len(fields) == 6 and fields[5].startswith("/") and int(fields[4]) and fields[1].startswith("r"):
                start, _, end = fields[0].partition("-")
                self._ranges.append((int(start, 16), int(end, 16)))

    def drop(self, address: int, byte_count: int) -> bool:
        """Give back the whole pages within [address, address + byte_count) if a file backs them.

        Returns:
            Whether pages were given back.
        """
        start = -(-address // mmap.PAGESIZE) * mmap.PAGESIZE
        end = (address + byte_count) // mmap.PAGESIZE * mmap.PAGESIZE
        if end <= start or not any(low <= start and end <= high for low, high in self._ranges):
            return False
        return bool(_libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), _MADV_DONTNEED) == 0)


_libc = ctypes.CDLL(None, use_errno=True)
