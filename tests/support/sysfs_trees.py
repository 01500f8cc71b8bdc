"""Trees of files in the place of /sys: recorded ones, and the shapes of machines that nobody recorded.

The builder lays files and links out as the recordings in `tests/fixtures/sysfs` have them; a test compares the two.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from vllm_moecxl.units import GIB, KIB, MIB

RECORDINGS = Path(__file__).parents[1] / "fixtures" / "sysfs"

_ROOT = "devices/platform/ACPI0017:00/root0"
_BLOCK_BYTES = 128 * MIB


def replay(recording: str, root: Path) -> Path:
    """Writes a recording out below `root` and returns `root`."""
    for path, value in json.loads((RECORDINGS / f"{recording}.json").read_text()).items():
        target = root / path
        target.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(value, str):
            target.write_text(value + "\n")
        else:
            target.symlink_to(value["link"])
    return root


class SysfsTree:
    """Builds what the kernel would show below `root`."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def write(self, path: str, text: str) -> None:
        """A file, and the folders above it."""
        target = self.root / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text + "\n")

    def link(self, path: str, target: str) -> None:
        """A relative link, as sysfs has them."""
        link = self.root / path
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(self.root / target, link.parent))

    def node(
        self, node_id: int, *, cpulist: str, total_bytes: int = 64 * GIB, free_bytes: int = 32 * GIB, distance: str = ""
    ) -> None:
        """A NUMA node; `distance` has one figure for each online node."""
        folder = f"devices/system/node/node{node_id}"
        self.write(f"{folder}/cpulist", cpulist)
        self.write(f"{folder}/distance", distance)
        self.write(
            f"{folder}/meminfo",
            f"Node {node_id} MemTotal:       {total_bytes // KIB} kB\n"
            f"Node {node_id} MemFree:        {free_bytes // KIB} kB\n"
            f"Node {node_id} Active(anon):   17 kB",
        )

    def hints(self, folder: str, *, megabytes_per_s: int, read_ns: int, write_ns: int) -> None:
        """The kernel's figures, in a node's `access0/initiators` or a region's `access0`."""
        for side, latency_ns in (("read", read_ns), ("write", write_ns)):
            self.write(f"{folder}/{side}_bandwidth", str(megabytes_per_s))
            self.write(f"{folder}/{side}_latency", str(latency_ns))

    def memory(self, number: int, *, ram_bytes: int = 64 * GIB, serial: str | None = None, numa_node: int = -1) -> None:
        """CXL device `memN` at bus 0x0d + N, with an endpoint of another number."""
        endpoint = 10 + number
        bus = f"{0x0D + number:02x}"
        folder = f"devices/pci0000:0c/0000:0c:{number:02x}.0/0000:{bus}:00.0/mem{number}"
        port = f"{_ROOT}/port1/endpoint{endpoint}"
        self.write(f"{folder}/serial", serial or f"0xc0ffee{number}")
        self.write(f"{folder}/ram/size", hex(ram_bytes))
        self.write(f"{folder}/numa_node", str(numa_node))
        self.link(f"bus/cxl/devices/mem{number}", folder)
        self.link(f"{port}/uport", folder)
        self.write(f"{port}/decoder{endpoint}.0/region", "")
        self.link(f"bus/cxl/devices/endpoint{endpoint}", port)
        self.link(f"bus/cxl/devices/decoder{endpoint}.0", f"{port}/decoder{endpoint}.0")

    def region(self, number: int, members: list[int], *, size_bytes: int = 64 * GIB) -> str:
        """Region `regionN` over `members`; returns its folder."""
        folder = f"{_ROOT}/decoder0.{number}/region{number}"
        for position, member in enumerate(members):
            self.write(f"{folder}/target{position}", f"decoder{10 + member}.0")
        self.write(f"{folder}/size", hex(size_bytes))
        self.write(f"{folder}/mode", "ram")
        self.write(f"{folder}/resource", hex((number + 1) << 40))
        self.write(f"{folder}/interleave_ways", str(len(members)))
        self.write(f"{folder}/interleave_granularity", "256")
        self.link(f"bus/cxl/devices/region{number}", folder)
        return folder

    def dax(self, name: str, *, size_bytes: int, target_node: int, driver: str | None, below: str) -> None:
        """A dax device in a folder such as a region's."""
        folder = f"{below}/{name}"
        self.write(f"{folder}/size", str(size_bytes))
        self.write(f"{folder}/target_node", str(target_node))
        if driver is not None:
            (self.root / f"bus/dax/drivers/{driver}").mkdir(parents=True, exist_ok=True)
            self.link(f"{folder}/driver", f"bus/dax/drivers/{driver}")
        self.link(f"bus/dax/devices/{name}", folder)

    def cxl(self, number: int, members: list[int], *, target_node: int, driver: str | None = "kmem") -> str:
        """A region with a dax device of its size; returns the region's folder."""
        size_bytes = 64 * GIB * len(members)
        folder = self.region(number, members, size_bytes=size_bytes)
        below = f"{folder}/dax_region{number}"
        self.dax(f"dax{number}.0", size_bytes=size_bytes, target_node=target_node, driver=driver, below=below)
        return folder

    def blocks(self, node_id: int, start: int, size_bytes: int) -> None:
        """Memory blocks of a node."""
        self.write("devices/system/memory/block_size_bytes", f"{_BLOCK_BYTES:x}")
        for block in range(start // _BLOCK_BYTES, (start + size_bytes) // _BLOCK_BYTES):
            self.link(f"devices/system/node/node{node_id}/memory{block}", f"devices/system/memory/memory{block}")


def one_socket(tree: SysfsTree) -> None:
    """One node, no CXL."""
    tree.node(0, cpulist="0-7", distance="10")


def two_sockets(tree: SysfsTree) -> None:
    """Two nodes with CPUs, no CXL."""
    tree.node(0, cpulist="0-7,16-23", distance="10 21")
    tree.node(1, cpulist="8-15,24-31", distance="21 10")


def cxl_nodes(tree: SysfsTree, count: int) -> None:
    """Two sockets and `count` CXL devices, each a node of its own, by turns near the first and the second socket."""
    node_ids = range(2 + count)

    def row(node_id: int) -> str:
        socket = node_id % 2
        return " ".join("10" if other == node_id else "14" if other % 2 == socket else "24" for other in node_ids)

    tree.node(0, cpulist="0-15", distance=row(0))
    tree.node(1, cpulist="16-31", distance=row(1))
    for number in range(count):
        node_id = 2 + number
        tree.node(node_id, cpulist="", free_bytes=63 * GIB, distance=row(node_id))
        tree.memory(number, numa_node=node_id % 2)
        tree.cxl(number, [number], target_node=node_id)


def interleaved(tree: SysfsTree) -> None:
    """One socket and one region over two devices as node 1."""
    tree.node(0, cpulist="0-7", distance="10 20")
    tree.node(1, cpulist="", total_bytes=128 * GIB, free_bytes=128 * GIB, distance="20 10")
    tree.memory(0)
    tree.memory(1)
    tree.cxl(0, [1, 0], target_node=1)


def devdax(tree: SysfsTree) -> None:
    """One socket and one CXL device in devdax mode."""
    one_socket(tree)
    tree.memory(0)
    tree.cxl(0, [0], target_node=1, driver="device_dax")


def high_bandwidth_memory(tree: SysfsTree) -> None:
    """One socket with high-bandwidth memory as a node without CPUs, which is not CXL."""
    tree.node(0, cpulist="0-7", distance="10 13")
    tree.node(1, cpulist="", total_bytes=16 * GIB, free_bytes=16 * GIB, distance="13 10")


def no_region(tree: SysfsTree) -> None:
    """One socket and a CXL device that nobody has set up."""
    one_socket(tree)
    tree.memory(0)


def firmware_memory(tree: SysfsTree) -> None:
    """One socket and a CXL device that the firmware has set up as ordinary memory: a region without a dax device."""
    tree.node(0, cpulist="0-7", distance="10 20")
    tree.node(1, cpulist="", distance="20 10")
    tree.memory(0)
    tree.region(0, [0])
    tree.blocks(0, 0, GIB)
    tree.blocks(1, 1 << 40, 64 * GIB)
