"""Memory at a place of our choice: mappings, the contract for NUMA nodes, and reads that survive bad memory."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import re
import stat
import time
import weakref
from array import array
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from vllm_moecxl.errors import CapacityError, ConfigError, IntegrityError
from vllm_moecxl.linux import syscalls
from vllm_moecxl.units import GIB, KIB, MIB, format_bytes

#: What a node keeps free: below its watermarks the kernel kills processes that are bound to it rather than refuse.
RESERVE_BYTES = 64 * MIB
#: Mappings at least this large ask for huge pages: fewer TLB misses in long copies, rounding below 2 MiB.
_HUGE_PAGE_BYTES = 2 * MIB
#: Touched between two looks at the node's free memory, and between two chances to interrupt this process.
_TOUCH_BYTES = GIB
#: Pages of one query.
_QUERY_PAGE_COUNT = 1 << 16
#: A page in migration or freshly touched is a matter of microseconds.
_QUERY_ATTEMPTS = 4
_QUERY_PAUSE_S = 0.001
_AVAILABLE = re.compile(r"Node \d+ (?:MemFree|Inactive\(file\)):\s+(\d+) kB")


class UnreadablePageError(IntegrityError):
    """A page of this process cannot be read: poisoned, or not there.

    Attributes:
        address: the first page that cannot be read.
        good_byte_count: bytes before it that were copied.
    """

    def __init__(self, address: int, good_byte_count: int) -> None:
        super().__init__(
            f"--moe-offload-config banks: the page at {address:#x} cannot be read (poisoned or gone): take the memory "
            "device that holds it out of banks, and see the kernel's log"
        )
        self.address = address
        self.good_byte_count = good_byte_count


@dataclass(frozen=True)
class Mapping:
    """An address range of this process, there for as long as `buffer` is referred to.

    Attributes:
        buffer: the mapping; views and tensors are made from it.
        address: where it starts, on a page boundary.
        is_dax: whether its place is given by the device: such memory has no node to ask for.
    """

    buffer: mmap.mmap
    address: int
    is_dax: bool

    @property
    def byte_count(self) -> int:
        """Its size as asked for; the kernel rounds up to pages."""
        return len(self.buffer)

    @classmethod
    def anonymous(cls, byte_count: int) -> Mapping:
        """Zeros, in huge pages where that pays; no memory is taken until it is touched.

        Raises:
            CapacityError: the kernel does not promise that much (strict overcommit, or a limit of this process).
        """
        assert byte_count > 0
        try:
            buffer = mmap.mmap(-1, byte_count, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except OSError as error:
            raise CapacityError(
                f"the kernel refuses {format_bytes(byte_count)} of memory ({error.strerror}): free memory, or raise "
                "the limit on what it promises (ulimit -v, vm.overcommit_memory)"
            ) from error
        if byte_count >= _HUGE_PAGE_BYTES:
            # Advice only: a kernel built without huge pages refuses it.
            with suppress(OSError):
                buffer.madvise(mmap.MADV_HUGEPAGE)
        return cls(buffer, _address_of(buffer), is_dax=False)

    @classmethod
    def before(cls, byte_count: int, pages: SharedPages) -> Mapping:
        """Anonymous memory as `anonymous` gives it, and right behind it shared pages.

        Args:
            byte_count: of the anonymous part, in whole pages.

        Raises:
            CapacityError: see `anonymous`.
        """
        assert byte_count % mmap.PAGESIZE == 0
        mapping = cls.anonymous(byte_count + pages.byte_count)
        # What is mapped there goes with the rest of the range.
        syscalls.map_over(mapping.address + byte_count, pages.byte_count, pages.file)
        with suppress(OSError):  # a kernel without huge pages for shared memory
            mapping.buffer.madvise(mmap.MADV_HUGEPAGE)
        return mapping

    @classmethod
    def dax(
        cls, path: Path, byte_count: int, offset: int = 0, *, sysfs: Path = Path("/sys"), is_file_allowed: bool = False
    ) -> Mapping:
        """A range of a devdax device such as /dev/dax0.0, with what it holds.

        Args:
            byte_count, offset: multiples of the device's alignment, normally 2 MiB.
            is_file_allowed: whether a regular file will do, for tests on machines without a device.

        Raises:
            ConfigError: no such device, not a devdax device, not permitted, or no multiple of the alignment.
            CapacityError: the range ends beyond the device.
        """
        assert byte_count > 0 and offset >= 0
        option = f'--moe-offload-config banks: "dax:{path}"'
        try:
            file = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            raise ConfigError(
                f"{option} cannot be opened ({error.strerror}): name a device that exists and may be written"
            ) from error
        try:
            device_bytes, align_bytes = _dax_geometry(file, sysfs, is_file_allowed, option)
            if byte_count % align_bytes or offset % align_bytes:
                raise ConfigError(
                    f"{option}: {byte_count} bytes at {offset} are no multiples of the device's alignment, "
                    f"{format_bytes(align_bytes)}: round the bank's size"
                )
            if offset + byte_count > device_bytes:
                raise CapacityError(
                    f"{option} has {format_bytes(device_bytes)} and cannot give {format_bytes(byte_count)} at "
                    f"{format_bytes(offset)}: lower the bank's size"
                )
            buffer = mmap.mmap(file, byte_count, flags=mmap.MAP_SHARED, offset=offset)
        except OSError as error:
            raise ConfigError(
                f"{option} cannot be mapped ({error.strerror}): see the kernel's log, and whether it is in mode devdax"
            ) from error
        finally:
            os.close(file)
        return cls(buffer, _address_of(buffer), is_dax=True)


class SharedPages:
    """Memory without a place of its own, that may be mapped at several addresses. Zeros, taken when touched.

    Args:
        byte_count: rounded up to pages.

    Attributes:
        file: what it is mapped from.
    """

    def __init__(self, byte_count: int) -> None:
        assert byte_count > 0
        self.byte_count = -(-byte_count // mmap.PAGESIZE) * mmap.PAGESIZE
        self.file = os.memfd_create("moecxl", os.MFD_CLOEXEC)
        weakref.finalize(self, os.close, self.file)
        os.truncate(self.file, self.byte_count)

    def map(self) -> Mapping:
        """The pages at an address of their own."""
        buffer = mmap.mmap(self.file, self.byte_count)
        return Mapping(buffer, _address_of(buffer), is_dax=False)


def _address_of(buffer: mmap.mmap) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(buffer))


def _dax_geometry(file: int, sysfs: Path, is_file_allowed: bool, option: str) -> tuple[int, int]:
    """Size and alignment of the open device, in bytes."""
    status = os.fstat(file)
    if is_file_allowed and stat.S_ISREG(status.st_mode):
        return status.st_size, mmap.PAGESIZE
    device = sysfs / "dev" / "char" / f"{os.major(status.st_rdev)}:{os.minor(status.st_rdev)}"
    if not stat.S_ISCHR(status.st_mode) or (device / "subsystem").resolve().name != "dax":
        raise ConfigError(
            f"{option} is no devdax device: name /dev/daxX.Y, made by `daxctl reconfigure-device --mode=devdax daxX.Y`"
        )
    return int((device / "size").read_text()), int((device / "align").read_text())


@dataclass(frozen=True)
class Placement:
    """Where the pages of a mapping are.

    Attributes:
        node: the node that was asked for.
        bytes_by_node: whole pages by the node that has them.
        unknown_bytes: pages that the kernel says nothing about: in flight, poisoned or gone.
    """

    node: int
    bytes_by_node: dict[int, int]
    unknown_bytes: int = 0

    @property
    def is_achieved(self) -> bool:
        """Whether every page is known to be on the node."""
        return not self.unknown_bytes and self.bytes_by_node.keys() == {self.node}

    @property
    def astray_bytes(self) -> int:
        """Bytes that are on other nodes or at an unknown place."""
        return self.unknown_bytes + sum(size for node, size in self.bytes_by_node.items() if node != self.node)

    def describe(self) -> str:
        """One sentence for the log and the doctor."""
        found = [f"{format_bytes(size)} on node {node}" for node, size in sorted(self.bytes_by_node.items())]
        if self.unknown_bytes:
            found.append(f"{format_bytes(self.unknown_bytes)} at an unknown place")
        return f"{', '.join(found)}{', as asked' if self.is_achieved else f'; asked for node {self.node}'}"


def available_bytes(node: int, sysfs: Path = Path("/sys")) -> int:
    """Memory that a node can still give: what is free, and file cache that nobody used lately.

    Raises:
        ConfigError: there is no such node.
    """
    nodes = sysfs / "devices" / "system" / "node"
    try:
        meminfo = (nodes / f"node{node}" / "meminfo").read_text()
    except OSError as error:
        online = (nodes / "online").read_text().strip() if (nodes / "online").exists() else "none"
        raise ConfigError(
            f'--moe-offload-config banks: "numa:{node}" is no node of this machine: name one that is online ({online})'
        ) from error
    return sum(int(kib) for kib in _AVAILABLE.findall(meminfo)) * KIB


def place(mapping: Mapping, node: int, *, sysfs: Path = Path("/sys"), reserve_bytes: int = RESERVE_BYTES) -> Placement:
    """Bind a fresh mapping to a node, touch every page and ask the kernel where each of them is.

    Call it after vLLM's worker has bound itself to its CPUs' nodes, which moves what was there before. Where it fails
    the mapping is as it was when it was made: default policy, no memory taken, zeros.

    Returns:
        What was achieved: the caller decides what to do about pages elsewhere.

    Raises:
        ConfigError: no such node, no memory on it, or this process may not place memory.
        CapacityError: the node has not got that much memory to spare.
    """
    assert not mapping.is_dax, "the device gives the place"
    _require_room(mapping.byte_count, node, sysfs, reserve_bytes)
    try:
        syscalls.mbind(mapping.address, mapping.byte_count, syscalls.MPOL_BIND, [node])
    except OSError as error:
        raise ConfigError(_refusal(node, error)) from error
    try:
        for start in range(0, mapping.byte_count, _TOUCH_BYTES):
            # Again for each part: others take memory too, and beyond the node's own there is no error, only a kill.
            _require_room(mapping.byte_count - start, node, sysfs, reserve_bytes)
            _touch(mapping, start, min(_TOUCH_BYTES, mapping.byte_count - start))
        return verify(mapping, node)
    except BaseException as error:
        syscalls.madvise(mapping.address, mapping.byte_count, syscalls.MADV_DONTNEED)
        syscalls.mbind(mapping.address, mapping.byte_count, syscalls.MPOL_DEFAULT, [])
        if isinstance(error, OSError):
            raise ConfigError(_refusal(node, error)) from error
        raise


def verify(mapping: Mapping, node: int, start: int = 0, byte_count: int | None = None) -> Placement:
    """Where the mapping's pages are now, by asking about every one of them.

    Worth asking again after pinning, which moves pages off movable memory, and now and then while serving: a node that
    is taken offline hands its pages to another one and tells nobody.

    Args:
        start, byte_count: the part of it to ask about; `start` is on a page boundary.

    Raises:
        OSError: this process may not ask.
    """
    assert not mapping.is_dax, "the kernel knows no node of device memory"
    assert start % mmap.PAGESIZE == 0
    page_counts: Counter[int] = Counter()
    query_bytes = _QUERY_PAGE_COUNT * mmap.PAGESIZE
    stop = mapping.byte_count if byte_count is None else start + byte_count
    for query_start in range(start, stop, query_bytes):
        end = min(query_start + query_bytes, stop)
        pages = array("Q", range(mapping.address + query_start, mapping.address + end, mmap.PAGESIZE))
        for attempt in range(_QUERY_ATTEMPTS):
            if attempt:
                time.sleep(_QUERY_PAUSE_S)
            nodes = syscalls.nodes_of(pages)
            if nodes.count(node) == len(pages):
                break
        page_counts.update(nodes)
    return Placement(
        node=node,
        bytes_by_node={n: count * mmap.PAGESIZE for n, count in page_counts.items() if n >= 0},
        unknown_bytes=sum(count for n, count in page_counts.items() if n < 0) * mmap.PAGESIZE,
    )


def bring_back(mapping: Mapping, node: int) -> Placement:
    """Move the pages of a mapping to the node again, where nobody pins them and it has room.

    Raises:
        OSError: this process may not place memory.
    """
    syscalls.mbind(mapping.address, mapping.byte_count, syscalls.MPOL_BIND, [node], syscalls.MPOL_MF_MOVE)
    return verify(mapping, node)


def _require_room(byte_count: int, node: int, sysfs: Path, reserve_bytes: int) -> None:
    if byte_count + reserve_bytes > (available := available_bytes(node, sysfs)):
        raise CapacityError(
            f'--moe-offload-config banks: "numa:{node}" has {format_bytes(available)} available and cannot take '
            f"{format_bytes(byte_count)} with {format_bytes(reserve_bytes)} in reserve: lower its size or add a bank"
        )


def _touch(mapping: Mapping, start: int, byte_count: int) -> None:
    """Take the memory of a range, keeping what it holds."""
    try:
        syscalls.madvise(mapping.address + start, byte_count, syscalls.MADV_POPULATE_WRITE)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        # Linux before 5.14: by hand, where a failure is a signal instead of an error.
        for offset in range(start, start + byte_count, mmap.PAGESIZE):
            mapping.buffer[offset] = mapping.buffer[offset]


def _refusal(node: int, error: OSError) -> str:
    match error.errno:
        case errno.EPERM:
            remedy = 'allow it (docker: --cap-add SYS_NICE), or set banks to "dram"'
        case errno.EINVAL | errno.ENOSYS:
            remedy = "name a node with memory that this process' cpuset allows (/proc/self/status, Mems_allowed_list)"
        case _:
            remedy = "see the kernel's log"
    return f'--moe-offload-config banks: the kernel refuses memory on "numa:{node}" ({error.strerror}): {remedy}'


def copy(source: int, target: int, byte_count: int) -> None:
    """Copy within this process, in the calling thread, with the Global Interpreter Lock free meanwhile.

    The C library's own: as fast as torch's copy here (19 GB/s on a core for pieces of 256 KiB to 32 MiB, AMD EPYC,
    2026-11-22), which would start a team of compute threads of its own for each thread that copies. Where stores past
    the cache help, the C library uses them.

    Args:
        source, target: addresses of readable and writable memory of this process.
    """
    syscalls.copy_memory(target, source, byte_count)


def read_safely(address: int, target: memoryview | bytearray | mmap.mmap) -> None:
    """Fill `target` from `address`, as `copy_safely`."""
    view = memoryview(target)
    assert view.contiguous and not view.readonly
    if view.nbytes:
        copy_safely(address, ctypes.addressof(ctypes.c_char.from_buffer(target)), view.nbytes)


def copy_safely(source: int, target: int, byte_count: int) -> None:
    """Copy within this process so that a poisoned page is an error instead of the end of the process.

    Guards against pages that the kernel knows to be bad, and only in system memory: a bad page of device memory
    (`Mapping.dax`) is handed out again. The Global Interpreter Lock is free meanwhile.

    Args:
        source, target: addresses of readable and writable memory of this process.

    Raises:
        UnreadablePageError: a page of the source cannot be read; what comes before it was copied.
        OSError: `process_vm_readv` is not permitted here, or the target cannot be written.
    """
    done = 0
    while done < byte_count:
        try:
            # A short count says that the next page is bad, or that the kernel's limit for one call was reached.
            done += syscalls.read_own_memory(source + done, target + done, byte_count - done)
        except OSError as error:
            if error.errno != errno.EFAULT or _is_readable(source + done):
                raise
            raise UnreadablePageError((source + done) // mmap.PAGESIZE * mmap.PAGESIZE, done) from error


def _is_readable(address: int) -> bool:
    scratch = ctypes.c_char()
    try:
        return syscalls.read_own_memory(address, ctypes.addressof(scratch), 1) == 1
    except OSError:
        return False
