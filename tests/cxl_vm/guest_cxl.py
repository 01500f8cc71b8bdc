"""The guest's CXL memory through sysfs: regions up as nodes, memory offline, a region as devdax."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

_CXL = Path("/sys/bus/cxl")
_DEVICES = _CXL / "devices"
_DAX = Path("/sys/bus/dax")
_NODES = Path("/sys/devices/system/node")
_WAIT_S = 20


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
