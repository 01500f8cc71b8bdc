"""The system calls for memory placement that Python does not have; a failure is an `OSError`."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import platform
from array import array
from collections.abc import Iterable

MPOL_DEFAULT = 0
MPOL_BIND = 2
MPOL_WEIGHTED_INTERLEAVE = 6  # Linux 6.9
MPOL_MF_MOVE = 2

MADV_DONTNEED = 4
MADV_POPULATE_WRITE = 23  # Linux 5.14
MADV_HWPOISON = 100

_MPOL_F_ADDR = 2
#: Nodes of the largest kernels (CONFIG_NODES_SHIFT = 10); a mask that is too small is refused.
_NODE_COUNT_MAX = 1024
_WORD_BITS = 64
_NodeMask = ctypes.c_uint64 * (_NODE_COUNT_MAX // _WORD_BITS)

#: Calls that only libnuma has wrappers for. No call has number -1: elsewhere the kernel itself answers ENOSYS.
_NUMBERS = {
    "x86_64": {"mbind": 237, "get_mempolicy": 239, "move_pages": 279},
    "aarch64": {"mbind": 235, "get_mempolicy": 236, "move_pages": 239},
}.get(platform.machine(), {})


class _Range(ctypes.Structure):
    """`struct iovec`."""

    _fields_ = (("address", ctypes.c_void_p), ("byte_count", ctypes.c_size_t))


_libc = ctypes.CDLL(None, use_errno=True)

#: memmove(target, source, byte_count); ctypes lets go of the Global Interpreter Lock while it runs.
copy_memory = _libc.memmove
copy_memory.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
copy_memory.restype = None
_libc.syscall.restype = ctypes.c_long
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_libc.process_vm_readv.argtypes = (
    *(ctypes.c_int, ctypes.POINTER(_Range), ctypes.c_ulong),
    *(ctypes.POINTER(_Range), ctypes.c_ulong, ctypes.c_ulong),
)
_libc.process_vm_readv.restype = ctypes.c_ssize_t


_libc.mmap.argtypes = (
    *(ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int),
    *(ctypes.c_int, ctypes.c_int, ctypes.c_long),
)
_libc.mmap.restype = ctypes.c_void_p
_MAP_FAILED = ctypes.c_void_p(-1).value
_MAP_FIXED = 0x10


def _checked(result: int, call: str) -> int:
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), call)
    return result


def _syscall(call: str, *arguments: int) -> None:
    # A register each: pointers and integers alike.
    _checked(_libc.syscall(*map(ctypes.c_long, (_NUMBERS.get(call, -1), *arguments))), call)


def mbind(address: int, byte_count: int, mode: int, nodes: Iterable[int], flags: int = 0) -> None:
    """Set the policy of whole pages; those that are there already stay where they are, or go with `MPOL_MF_MOVE`."""
    mask = _NodeMask()
    for node in nodes:
        if not 0 <= node < _NODE_COUNT_MAX:
            raise OSError(errno.EINVAL, f"mbind: there is no node {node}")
        mask[node // _WORD_BITS] |= 1 << node % _WORD_BITS
    # The kernel takes one bit less than it is told.
    _syscall("mbind", address, byte_count, mode, ctypes.addressof(mask), _NODE_COUNT_MAX + 1, flags)


def map_over(address: int, byte_count: int, file: int) -> None:
    """Put a file's first bytes, shared and writable, in the place of whole pages that this process has mapped."""
    flags = mmap.MAP_SHARED | _MAP_FIXED
    if _libc.mmap(address, byte_count, mmap.PROT_READ | mmap.PROT_WRITE, flags, file, 0) == _MAP_FAILED:
        _checked(-1, "mmap")


def policy_of(address: int) -> tuple[int, tuple[int, ...]]:
    """The policy that holds for the page at `address` (its mapping's, else this thread's): the mode and its nodes."""
    mode, mask = ctypes.c_int(), _NodeMask()
    _syscall(
        "get_mempolicy",
        *(ctypes.addressof(mode), ctypes.addressof(mask), _NODE_COUNT_MAX + 1, address, _MPOL_F_ADDR),
    )
    return mode.value, tuple(n for n in range(_NODE_COUNT_MAX) if mask[n // _WORD_BITS] >> n % _WORD_BITS & 1)


def nodes_of(pages: array[int]) -> array[int]:
    """The node of each page, given by addresses (`array("Q")`); a negative errno where the kernel cannot tell."""
    assert pages.itemsize == ctypes.sizeof(ctypes.c_void_p)
    nodes = array("i", bytes(len(pages) * ctypes.sizeof(ctypes.c_int)))
    _syscall("move_pages", 0, len(pages), pages.buffer_info()[0], 0, nodes.buffer_info()[0], 0)
    return nodes


def madvise(address: int, byte_count: int, advice: int) -> None:
    """`madvise`, for the advice that the mmap module does not name and ranges that are no mapping of it."""
    _checked(_libc.madvise(address, byte_count, advice), "madvise")


def read_own_memory(source: int, target: int, byte_count: int) -> int:
    """Copy within this process through the kernel, which returns EFAULT where a load would end in a signal.

    Returns:
        Bytes copied: fewer than asked where a page after the first cannot be read, and never over 2 GiB in one call.
    """
    to, of = _Range(target, byte_count), _Range(source, byte_count)
    copied = _libc.process_vm_readv(os.getpid(), ctypes.byref(to), 1, ctypes.byref(of), 1, 0)
    return _checked(copied, "process_vm_readv")
