"""NUMA nodes, CXL memory devices, regions and dax devices, as sysfs shows them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from vllm_moecxl.units import KIB

_MEMINFO = re.compile(r"Node \d+ (?P<field>\w+):\s+(?P<kib>\d+) kB")
_REGION = re.compile(r"region\d+")


@dataclass(frozen=True)
class NumaNode:
    """One online NUMA node.

    Attributes:
        node_id: its number.
        total_bytes, free_bytes: memory.
        cpulist: its CPUs as the kernel writes them, "" for none.
        is_cpuless: whether it has memory and no CPUs. That alone does not make it CXL.
        cxl_regions: CXL regions whose memory it is; only these prove CXL.
    """

    node_id: int
    total_bytes: int
    free_bytes: int
    cpulist: str
    is_cpuless: bool
    cxl_regions: tuple[str, ...]


@dataclass(frozen=True)
class CxlMemory:
    """One CXL memory device.

    Attributes:
        name: `memN`; changes between boots, the serial does not.
        serial: its serial number, None where the device has none.
        ram_bytes: its volatile capacity.
        numa_node: the node of its PCI slot, -1 where the firmware says none.
    """

    name: str
    serial: str | None
    ram_bytes: int
    numa_node: int


@dataclass(frozen=True)
class DaxDevice:
    """One dax device.

    Attributes:
        name: `daxX.Y`.
        size_bytes: its capacity.
        target_node: the node that it is, or would become, as system memory.
        driver: "kmem" for system memory, "device_dax" for /dev/daxX.Y, None for neither.
        region: the CXL region that it is made of, None where it is not CXL.
    """

    name: str
    size_bytes: int
    target_node: int
    driver: str | None
    region: str | None


@dataclass(frozen=True)
class Topology:
    """All memory that sysfs shows."""

    nodes: tuple[NumaNode, ...]
    memories: tuple[CxlMemory, ...]
    regions: tuple[str, ...]
    dax_devices: tuple[DaxDevice, ...]


def read_topology(sysfs: Path) -> Topology:
    """What is under `sysfs`, normally /sys; files that are missing read as "not there"."""
    cxl = sysfs / "bus" / "cxl" / "devices"
    dax_devices = tuple(_dax_device(path) for path in _numbered(sysfs / "bus" / "dax" / "devices", "dax"))
    return Topology(
        nodes=tuple(_node(path, dax_devices) for path in _numbered(sysfs / "devices" / "system" / "node", "node")),
        memories=tuple(_memory(path) for path in _numbered(cxl, "mem")),
        regions=tuple(path.name for path in _numbered(cxl, "region")),
        dax_devices=dax_devices,
    )


def _numbered(folder: Path, prefix: str) -> list[Path]:
    """Entries of `folder` that are `prefix` and a number (a dax device has two), by number."""
    if not folder.is_dir():
        return []
    pattern = re.compile(rf"{prefix}(\d+)(?:\.(\d+))?")
    matches = ((pattern.fullmatch(path.name), path) for path in folder.iterdir())
    found = [(int(match[1]), int(match[2] or 0), path) for match, path in matches if match]
    return [path for *_, path in sorted(found)]


def _text(path: Path) -> str:
    """The attribute's value; "" where it is missing or the device refuses to tell."""
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def _number(path: Path, default: int) -> int:
    """The attribute as an integer, decimal or with a 0x prefix."""
    try:
        return int(_text(path), 0)
    except ValueError:
        return default


def _node(path: Path, dax_devices: tuple[DaxDevice, ...]) -> NumaNode:
    node_id = int(path.name.removeprefix("node"))
    sizes = {m["field"]: int(m["kib"]) * KIB for m in _MEMINFO.finditer(_text(path / "meminfo"))}
    cpulist = _text(path / "cpulist")
    total_bytes = sizes.get("MemTotal", 0)
    regions = {d.region for d in dax_devices if d.region and d.target_node == node_id and d.driver == "kmem"}
    return NumaNode(
        node_id=node_id,
        total_bytes=total_bytes,
        free_bytes=sizes.get("MemFree", 0),
        cpulist=cpulist,
        is_cpuless=not cpulist and total_bytes > 0,
        cxl_regions=tuple(sorted(regions)),
    )


def _memory(path: Path) -> CxlMemory:
    return CxlMemory(
        name=path.name,
        serial=_text(path / "serial") or None,
        ram_bytes=_number(path / "ram" / "size", 0),
        numa_node=_number(path / "numa_node", -1),
    )


def _dax_device(path: Path) -> DaxDevice:
    # The bus has links; a device that is CXL lies below its region.
    region = next((part for part in reversed(path.resolve().parts) if _REGION.fullmatch(part)), None)
    driver = path / "driver"
    return DaxDevice(
        name=path.name,
        size_bytes=_number(path / "size", 0),
        target_node=_number(path / "target_node", -1),
        driver=driver.resolve().name if driver.exists() else None,
        region=region,
    )
