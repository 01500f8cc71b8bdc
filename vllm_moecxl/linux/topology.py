"""NUMA nodes, CXL memory devices, regions and dax devices, as sysfs shows them.

What is missing, unreadable or odd reads as "not there": sysfs differs between kernels, and devices may go at any time.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Collection, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from vllm_moecxl.errors import ConfigError
from vllm_moecxl.units import KIB

SYSFS = Path("/sys")

Mode = Literal["system-ram", "devdax", "none"]

_NODE = re.compile(r"node([0-9]+)")
_MEMORY = re.compile(r"mem([0-9]+)")
_REGION = re.compile(r"region([0-9]+)")
_DAX = re.compile(r"dax([0-9]+)\.([0-9]+)")
_TARGET = re.compile(r"target([0-9]+)")
_DECODER = re.compile(r"decoder[0-9]+\.[0-9]+")
_CPULIST = re.compile(r"[0-9]{1,9}(-[0-9]{1,9})?(,[0-9]{1,9}(-[0-9]{1,9})?)*")
_MEMINFO = re.compile(r"Node [0-9]+ (?P<field>\w+):\s+(?P<kib>[0-9]{1,15}) kB")
_PCI_PART = re.compile(r"pci[0-9a-f]{4,}:[0-9a-f]{2}|[0-9a-f]{4,}:[0-9a-f]{2}:[0-9a-f]{2}\.[0-7]")
_PCI_ADDRESS = re.compile(r"(?:([0-9a-f]{4,8}):)?([0-9a-f]{2}:[0-9a-f]{2}\.[0-7])")

#: Outside these a hint is a mistake: Linux 6.12 gave 17200 ns where 202 was meant, while the slowest published CXL
#: memory has 410 ns and 18 GB/s, and no memory is faster than a CPU's cache.
_PLAUSIBLE_NS = (10, 5_000)
_PLAUSIBLE_MB_PER_S = (100, 10_000_000)


@dataclass(frozen=True)
class Hints:
    """What the kernel was told about a memory's speed, not what it is: measure before relying on it.

    None where the kernel does not say, or says what cannot be.
    """

    read_bytes_per_s: int | None = None
    write_bytes_per_s: int | None = None
    read_latency_ns: int | None = None
    write_latency_ns: int | None = None


@dataclass(frozen=True)
class NumaNode:
    """One online NUMA node.

    Attributes:
        node_id: its number.
        total_bytes, free_bytes: memory.
        cpulist: its CPUs as the kernel writes them, "" for none.
        is_cpuless: whether it has memory and no CPUs. That alone does not make it CXL.
        cxl_regions: CXL regions whose memory it is; only these prove CXL.
        distances: relative cost of memory on other nodes from here, by node; 10 is the node itself.
        hints: its memory, seen from the nearest CPUs.
    """

    node_id: int
    total_bytes: int
    free_bytes: int
    cpulist: str
    is_cpuless: bool
    cxl_regions: tuple[str, ...]
    distances: dict[int, int]
    hints: Hints

    @property
    def is_cxl(self) -> bool:
        """Whether its memory is known to be CXL memory."""
        return bool(self.cxl_regions)


@dataclass(frozen=True)
class CxlMemory:
    """One CXL memory device.

    Attributes:
        name: `memN`; changes between boots, serial and PCI path do not.
        serial: its serial number, None where the device has none.
        pci_path: its place, from the host bridge down; None where it is not a PCI device.
        ram_bytes: its volatile capacity.
        numa_node: the node of its PCI slot, -1 where the firmware says none.
        regions: CXL regions with memory of it; none until someone sets it up.
        node_ids, dax_devices: what these regions are to the system.
    """

    name: str
    serial: str | None
    pci_path: str | None
    ram_bytes: int
    numa_node: int
    regions: tuple[str, ...]
    node_ids: tuple[int, ...]
    dax_devices: tuple[str, ...]


@dataclass(frozen=True)
class CxlRegion:
    """One region of volatile CXL memory: a range of addresses, made of one device or interleaved over several.

    Attributes:
        name: `regionN`.
        size_bytes: its capacity.
        interleave_ways: devices it is spread over; 0 where the kernel does not say.
        interleave_granularity_bytes: bytes in a row on one device; 0 where the kernel does not say.
        memories: those devices, in interleave order; without those that are gone.
        dax_devices: dax devices made of it; empty too if the firmware gave its memory to Linux as ordinary memory.
        mode: "system-ram" if it is memory of a NUMA node, "devdax" if it is /dev/daxX.Y, "none" if it is not in use.
        node_id: the NUMA node that has its memory, None unless it is system memory.
        hints: its memory, seen from the nearest CPUs.
    """

    name: str
    size_bytes: int
    interleave_ways: int
    interleave_granularity_bytes: int
    memories: tuple[str, ...]
    dax_devices: tuple[str, ...]
    mode: Mode
    node_id: int | None
    hints: Hints


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
    regions: tuple[CxlRegion, ...]
    dax_devices: tuple[DaxDevice, ...]

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "numa_nodes": [{**asdict(node), "is_cxl": node.is_cxl} for node in self.nodes],
            "cxl": {
                "memories": [asdict(memory) for memory in self.memories],
                "regions": [asdict(region) for region in self.regions],
                "dax_devices": [asdict(device) for device in self.dax_devices],
            },
        }


def read_topology(sysfs: Path = SYSFS) -> Topology:
    """What is under `sysfs`."""
    cxl = sysfs / "bus" / "cxl" / "devices"
    node_paths = _numbered(sysfs / "devices" / "system" / "node", _NODE)
    dax_devices = tuple(_dax_device(path) for path in _numbered(sysfs / "bus" / "dax" / "devices", _DAX))
    regions = tuple(
        _region(path, sysfs, node_paths, dax_devices)
        for path in _numbered(cxl, _REGION)
        if _text(path / "mode") != "pmem"  # persistent memory homes nothing
    )
    return Topology(
        nodes=tuple(_node(path, node_paths, regions) for path in node_paths),
        memories=tuple(_memory(path, regions) for path in _numbered(cxl, _MEMORY)),
        regions=regions,
        dax_devices=dax_devices,
    )


def cpu_node_ids(topology: Topology, cpus: Collection[int]) -> tuple[int, ...]:
    """The nodes that have any of `cpus`."""
    return tuple(
        node.node_id for node in topology.nodes if any(cpu in cpu_range for cpu_range in _cpus(node) for cpu in cpus)
    )


def pci_node_id(topology: Topology, address: str, sysfs: Path = SYSFS) -> int | None:
    """The node of a PCI device such as a GPU; None where the firmware does not say and there are several.

    Args:
        topology: what `sysfs` shows.
        address: as lspci, nvidia-smi or PyTorch write it: `17:00.0`, `0000:17:00.0`, `00000000:17:00.0`.
        sysfs: where to look.

    Raises:
        ConfigError: There is no such device.
    """
    match = _PCI_ADDRESS.fullmatch(address.lower())
    path = match and sysfs / "bus" / "pci" / "devices" / f"{int(match[1] or '0', 16):04x}:{match[2]}"
    if not path or not os.path.lexists(path):
        raise ConfigError(f"there is no PCI device {address!r}: give an address that lspci -D shows")
    node_id = _number(path / "numa_node", -1)
    if node_id >= 0:
        return node_id
    with_cpus = [node.node_id for node in topology.nodes if node.cpulist]
    return with_cpus[0] if len(with_cpus) == 1 else None


def nearest_node(candidates: Iterable[NumaNode], topology: Topology, from_ids: Collection[int]) -> NumaNode | None:
    """The candidate at the least distance from any of the nodes `from_ids`; the lowest number among equals."""
    rows = [node.distances for node in topology.nodes if node.node_id in from_ids]

    def rank(node: NumaNode) -> tuple[float, int]:
        return min((row.get(node.node_id, math.inf) for row in rows), default=math.inf), node.node_id

    return min(candidates, key=rank, default=None)


def _cpus(node: NumaNode) -> list[range]:
    """Ranges, since a CPU list may name more CPUs than anyone wants to count."""
    ends = (part.split("-") for part in node.cpulist.split(",") if part)
    return [range(int(end[0]), int(end[-1]) + 1) for end in ends]


def _node(path: Path, node_paths: list[Path], regions: tuple[CxlRegion, ...]) -> NumaNode:
    node_id = _node_id(path)
    sizes = {m["field"]: int(m["kib"]) * KIB for m in _MEMINFO.finditer(_text(path / "meminfo"))}
    cpulist = _text(path / "cpulist")
    total_bytes = sizes.get("MemTotal", 0)
    behind = [region for region in regions if region.node_id == node_id]
    # Since 7.3 what the kernel derives from CXL stands at the region; several regions have no common figure.
    fallback = behind[0].hints if len(behind) == 1 else Hints()
    return NumaNode(
        node_id=node_id,
        total_bytes=total_bytes,
        free_bytes=sizes.get("MemFree", 0),
        cpulist=cpulist if _CPULIST.fullmatch(cpulist) else "",
        is_cpuless=not cpulist and total_bytes > 0,
        cxl_regions=tuple(region.name for region in behind),
        distances=_distances(path, [_node_id(other) for other in node_paths]),
        hints=_hints(path / "access0" / "initiators", fallback),
    )


def _node_id(path: Path) -> int:
    return int(path.name.removeprefix("node"))


def _distances(path: Path, online_ids: list[int]) -> dict[int, int]:
    """By node: the file has no numbers of nodes, only one figure per online node, in order."""
    figures = _text(path / "distance").split()
    if len(figures) != len(online_ids) or not all(re.fullmatch(r"[0-9]{1,9}", figure) for figure in figures):
        return {}
    return dict(zip(online_ids, map(int, figures), strict=True))


def _hints(folder: Path, fallback: Hints) -> Hints:
    """The figures in `folder`, each one that is missing or implausible from `fallback`."""

    def figure(name: str, plausible: tuple[int, int], scale: int, otherwise: int | None) -> int | None:
        value = _number(folder / name, 0)
        return value * scale if plausible[0] <= value <= plausible[1] else otherwise

    return Hints(
        read_bytes_per_s=figure("read_bandwidth", _PLAUSIBLE_MB_PER_S, 10**6, fallback.read_bytes_per_s),
        write_bytes_per_s=figure("write_bandwidth", _PLAUSIBLE_MB_PER_S, 10**6, fallback.write_bytes_per_s),
        read_latency_ns=figure("read_latency", _PLAUSIBLE_NS, 1, fallback.read_latency_ns),
        write_latency_ns=figure("write_latency", _PLAUSIBLE_NS, 1, fallback.write_latency_ns),
    )


def _memory(path: Path, regions: tuple[CxlRegion, ...]) -> CxlMemory:
    mine = [region for region in regions if path.name in region.memories]
    return CxlMemory(
        name=path.name,
        # A PCI device without the capability reads as serial number 0.
        serial=_text(path / "serial") if _number(path / "serial", 0) else None,
        pci_path="/".join(part for part in _real(path).parts if _PCI_PART.fullmatch(part)) or None,
        ram_bytes=_number(path / "ram" / "size", 0),
        numa_node=_number(path / "numa_node", -1),
        regions=tuple(region.name for region in mine),
        node_ids=tuple(sorted({region.node_id for region in mine if region.node_id is not None})),
        dax_devices=tuple(name for region in mine for name in region.dax_devices),
    )


def _region(path: Path, sysfs: Path, node_paths: list[Path], dax_devices: tuple[DaxDevice, ...]) -> CxlRegion:
    size_bytes = _number(path / "size", 0)
    mine = [device for device in dax_devices if device.region == path.name]
    by_driver = {device.driver: device for device in mine}
    mode: Mode = "none"
    node_id = None
    if kmem := by_driver.get("kmem"):
        mode, node_id = "system-ram", kmem.target_node if kmem.target_node >= 0 else None
    elif "device_dax" in by_driver:
        mode = "devdax"
    elif (node_id := _node_with_blocks(path, size_bytes, sysfs, node_paths)) is not None:
        mode = "system-ram"
    members = (_memory_of_decoder(path.parent, _text(target)) for target in _numbered(path, _TARGET))
    return CxlRegion(
        name=path.name,
        size_bytes=size_bytes,
        interleave_ways=_number(path / "interleave_ways", 0),
        interleave_granularity_bytes=_number(path / "interleave_granularity", 0),
        memories=tuple(member for member in members if member),
        dax_devices=tuple(device.name for device in mine),
        mode=mode,
        node_id=node_id,
        hints=_hints(path / "access0", Hints()),
    )


def _memory_of_decoder(cxl: Path, decoder: str) -> str | None:
    """The device of an endpoint decoder.

    A decoder has the number of its endpoint, and an endpoint's number is not its device's: only the links tell.
    """
    if not _DECODER.fullmatch(decoder):
        return None
    name = _real(_real(cxl / decoder).parent / "uport").name
    return name if _MEMORY.fullmatch(name) else None


def _node_with_blocks(region: Path, size_bytes: int, sysfs: Path, node_paths: list[Path]) -> int | None:
    """The node with the region's addresses; firmware may hand CXL memory over as ordinary memory, without a dax device.

    The middle is asked for, since the ends need not be whole memory blocks.
    """
    start = _number(region / "resource", 0)
    try:
        block_bytes = int(_text(sysfs / "devices" / "system" / "memory" / "block_size_bytes"), 16)
    except ValueError:
        return None
    if not start or block_bytes <= 0:
        return None
    block = f"memory{(start + size_bytes // 2) // block_bytes}"
    return next((_node_id(path) for path in node_paths if os.path.lexists(path / block)), None)


def _dax_device(path: Path) -> DaxDevice:
    # The bus has links; a device that is CXL lies below its region.
    region = next((part for part in reversed(_real(path).parts) if _REGION.fullmatch(part)), None)
    driver = path / "driver"
    return DaxDevice(
        name=path.name,
        size_bytes=_number(path / "size", 0),
        target_node=_number(path / "target_node", -1),
        driver=_real(driver).name if os.path.lexists(driver) else None,
        region=region,
    )


def _numbered(folder: Path, pattern: re.Pattern[str]) -> list[Path]:
    """Entries of `folder` whose whole name matches, by their numbers."""
    try:
        names = os.listdir(folder)
    except OSError:
        return []
    matches = [match for match in map(pattern.fullmatch, names) if match]
    return [folder / match[0] for match in sorted(matches, key=lambda match: [int(n) for n in match.groups()])]


def _real(path: Path) -> Path:
    """Where links lead; unlike `Path.resolve` it gives an answer for a loop."""
    return Path(os.path.realpath(path))


def _text(path: Path) -> str:
    """The attribute's value; "" where it is missing or the device refuses to tell."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""


def _number(path: Path, least: int) -> int:
    """The attribute, decimal or with a 0x prefix; `least` where it is none, below that or beyond 64 bits."""
    try:
        value = int(_text(path), 0)
    except ValueError:
        return least
    return value if least <= value < 1 << 64 else least
