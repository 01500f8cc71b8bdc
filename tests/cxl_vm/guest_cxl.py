"""The guest's CXL memory: regions up as nodes, memory offline, a region as devdax, pages moved and pinned."""

from __future__ import annotations

import ctypes
import mmap
import os
import time
from array import array
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

_CXL = Path("/sys/bus/cxl")
_DEVICES = _CXL / "devices"
_DAX = Path("/sys/bus/dax")
_NODES = Path("/sys/devices/system/node")
_WAIT_S = 20

#: System calls of x86-64, which is what the guest is.
_MOVE_PAGES, _IO_URING_SETUP, _IO_URING_REGISTER = 279, 425, 427
_MPOL_MF_MOVE = 2
_IORING_REGISTER_BUFFERS, _IORING_UNREGISTER_BUFFERS = 0, 1
_IO_URING_PARAMS_BYTES = 120


def bring_up_regions() -> None:
    """One region for each device, in the window of its host bridge; the kernel makes each a NUMA node (kmem)."""
    # Movable memory is what daxctl makes by default, and what can go offline again.
    _write(Path("/sys/devices/system/memory/auto_online_blocks"), "online_movable")
    windows = sorted(_DEVICES.glob("decoder0.*"))
    _wait_for("an endpoint for each window", lambda: len(list(_DEVICES.glob("endpoint*"))) == len(windows))
    for window in windows:
        _bring_up_region(window, _endpoint_below(window))
    _wait_for("a dax device for each region", lambda: len(list((_DAX / "devices").iterdir())) == len(windows))
    for dax in (_DAX / "devices").iterdir():
        _wait_for(f"all memory of {dax.name}", lambda dax=dax: _node_bytes(dax) == int(_read(dax / "size")))


def _node_bytes(dax: Path) -> int:
    """Memory that is online of the node that a dax device has become."""
    meminfo = _NODES / f"node{_read(dax / 'target_node')}" / "meminfo"
    return int(_read(meminfo).splitlines()[0].split()[-2]) * 1024 if meminfo.exists() else 0


def _endpoint_below(window: Path) -> Path:
    """The endpoint of the device behind the window's host bridge."""
    bridge = (_DEVICES / "root0" / f"dport{_read(window / 'target_list')}").resolve()
    return next(path for path in _DEVICES.glob("endpoint*") if (path.resolve().parent / "uport").resolve() == bridge)


def _bring_up_region(window: Path, endpoint: Path) -> None:
    ram_bytes = int(_read(endpoint / "uport" / "ram" / "size"), 0)
    decoder = min(path for path in endpoint.iterdir() if path.name.startswith("decoder"))
    _write(decoder / "mode", "ram")
    _write(decoder / "dpa_size", hex(ram_bytes))
    name = _read(window / "create_ram_region")
    _write(window / "create_ram_region", name)
    region = _DEVICES / name
    _write(region / "interleave_granularity", _read(window / "interleave_granularity"))
    _write(region / "interleave_ways", "1")
    _write(region / "size", hex(ram_bytes))
    _write(region / "target0", decoder.name)
    _write(region / "commit", "1")
    _write(_CXL / "drivers" / "cxl_region" / "bind", name)


def take_offline(node: int) -> int:
    """Take all memory of a node offline, as an administrator does before pulling a device.

    Returns:
        How many blocks there were.
    """
    blocks = sorted((_NODES / f"node{node}").glob("memory[0-9]*"))
    for block in blocks:
        _write(block / "state", "offline")
    return len(blocks)


def make_devdax(dax: str) -> Path:
    """Turn a dax device whose memory is offline into /dev/daxX.Y, as `daxctl reconfigure-device` does."""
    drivers = _DAX / "drivers"
    _write(drivers / "kmem" / "unbind", dax)
    _write(drivers / "device_dax" / "new_id", dax)
    if not (_DAX / "devices" / dax / "driver").exists():
        _write(drivers / "device_dax" / "bind", dax)
    path = Path("/dev") / dax
    _wait_for(str(path), path.exists)
    return path


def move_pages(address: int, byte_count: int, node: int) -> None:
    """Move pages of this process to a node, against their policy."""
    pages = array("Q", range(address, address + byte_count, mmap.PAGESIZE))
    nodes, found = array("i", [node] * len(pages)), array("i", [0] * len(pages))
    lists = (one.buffer_info()[0] for one in (pages, nodes, found))
    _syscall(_MOVE_PAGES, 0, len(pages), *lists, _MPOL_MF_MOVE)


@contextmanager
def pinning(address: int, byte_count: int) -> Iterator[None]:
    """Memory of this process, pinned for as long as a device might want it: as a registered buffer of io_uring."""
    parameters = array("B", bytes(_IO_URING_PARAMS_BYTES))
    ring = _syscall(_IO_URING_SETUP, 1, parameters.buffer_info()[0])
    try:
        buffer = array("Q", [address, byte_count])
        _syscall(_IO_URING_REGISTER, ring, _IORING_REGISTER_BUFFERS, buffer.buffer_info()[0], 1)
        yield
        # Closing alone would let go of the pages some time later.
        _syscall(_IO_URING_REGISTER, ring, _IORING_UNREGISTER_BUFFERS, 0, 0)
    finally:
        os.close(ring)


def _syscall(number: int, *arguments: int) -> int:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.syscall.restype = ctypes.c_long
    result = libc.syscall(*map(ctypes.c_long, (number, *arguments)))
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), f"system call {number}")
    return int(result)


def _wait_for(what: str, is_there: Callable[[], bool]) -> None:
    """Wait for something that the kernel makes and gives no event for."""
    deadline = time.monotonic() + _WAIT_S
    while not is_there():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what}: not there after {_WAIT_S} s")
        time.sleep(0.02)


def _read(path: Path) -> str:
    return path.read_text().strip()


def _write(path: Path, text: str) -> None:
    # One write() for one value, whose failure names the file.
    file = os.open(path, os.O_WRONLY)
    try:
        os.write(file, text.encode())
    except OSError as error:
        raise OSError(error.errno, error.strerror, f"{path} <- {text}") from error
    finally:
        os.close(file)
