"""NUMA nodes and CXL memory of this machine, what is behind which, and how experts can be given a home there."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from vllm_moecxl.commands.findings import Finding
from vllm_moecxl.linux.topology import (
    SYSFS,
    CxlMemory,
    CxlRegion,
    DaxDevice,
    Hints,
    NumaNode,
    Topology,
    cpu_node_ids,
    nearest_node,
    pci_node_id,
    read_topology,
)
from vllm_moecxl.units import format_bytes


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `moecxl topology`."""
    parser.add_argument("--sysfs", type=Path, default=SYSFS, metavar="DIR", help="look here for nodes and CXL devices")
    parser.add_argument(
        "--device", metavar="PCI_ADDRESS", help="the compute device, such as 0000:17:00.0; the CPUs if not given"
    )


def run(args: argparse.Namespace) -> int:
    """Print what sysfs shows."""
    topology = read_topology(args.sysfs)
    compute = find_compute(topology, args.device, args.sysfs)
    if args.json:
        print(json.dumps({"compute": compute.as_dict(), **topology.as_dict()}))
    else:
        print("\n".join(in_words(topology, compute)))
    return 0


@dataclass(frozen=True)
class Compute:
    """Where the compute device is, and which memory is nearest to it.

    Attributes:
        pci_address: the device; None for the CPUs that this process may use.
        node_ids: its nodes; none where nobody knows.
        nearest: the nearest node with CPUs.
        nearest_cxl: the nearest node with CXL memory.
    """

    pci_address: str | None
    node_ids: tuple[int, ...]
    nearest: NumaNode | None
    nearest_cxl: NumaNode | None

    def as_dict(self) -> dict[str, object]:
        """Plain values for JSON."""
        return {
            "pci_address": self.pci_address,
            "node_ids": list(self.node_ids),
            "nearest_node_id": self.nearest and self.nearest.node_id,
            "nearest_cxl_node_id": self.nearest_cxl and self.nearest_cxl.node_id,
        }


def find_compute(topology: Topology, pci_address: str | None, sysfs: Path) -> Compute:
    """The compute device's place.

    Raises:
        ConfigError: There is no PCI device at that address.
    """
    if pci_address is None:
        node_ids = cpu_node_ids(topology, os.sched_getaffinity(0))
    else:
        node_id = pci_node_id(topology, pci_address, sysfs)
        node_ids = () if node_id is None else (node_id,)
    return Compute(
        pci_address,
        node_ids,
        nearest_node((node for node in topology.nodes if node.cpulist), topology, node_ids),
        nearest_node((node for node in topology.nodes if node.is_cxl), topology, node_ids),
    )


def judge_memory_device(memory: CxlMemory) -> Finding:
    """Whether someone has set the device up."""
    serial = f"serial {memory.serial}" if memory.serial else "no serial"
    place = f", PCI {memory.pci_path.rpartition('/')[2]}" if memory.pci_path else ""
    what = f"{memory.name}: {format_bytes(memory.ram_bytes)}, {serial}{place}"
    if memory.regions or not memory.ram_bytes:
        return Finding("ok", "cxl", what)
    return Finding(
        "note",
        "cxl",
        f"{what}; in no region, so it cannot be used yet: cxl create-region -t ram -m {memory.name}",
    )


def judge_region(region: CxlRegion, topology: Topology) -> Finding:
    """How the region is in use, and the bank spec for it."""
    size = format_bytes(region.size_bytes)
    spread = ""
    if region.interleave_ways > 1:
        granularity = format_bytes(region.interleave_granularity_bytes)
        spread = f", interleaved over {region.interleave_ways} devices by {granularity}"
    what = f"{region.name}: {size}{spread}"
    through = f" through {', '.join(region.dax_devices)}" if region.dax_devices else ""
    match region.mode:
        case "system-ram" if any(node.node_id == region.node_id for node in topology.nodes):
            text = f'{what}, system memory of node {region.node_id}{through}, bank spec "numa:{region.node_id}"'
            return Finding("ok", "cxl", text)
        case "system-ram":
            remedy = f"daxctl online-memory {' '.join(region.dax_devices)}"
            return Finding("note", "cxl", f"{what}, system memory{through}, but it is not online: {remedy}")
        case "devdax":
            specs = " ".join(f'"dax:/dev/{name}"' for name in region.dax_devices)
            return Finding("ok", "cxl", f"{what}, devdax{through}, bank spec {specs}")
        case "none" if region.dax_devices:
            remedy = f"daxctl reconfigure-device --mode=system-ram {' '.join(region.dax_devices)}"
            return Finding("note", "cxl", f"{what}{through}, bound to no driver: {remedy}")
        case "none":
            return Finding("note", "cxl", f"{what}, not in use: cxl enable-region {region.name}")


@dataclass(frozen=True)
class _Branch:
    """A line of the tree and what hangs below it."""

    text: str
    below: tuple[_Branch, ...] = ()


def in_words(topology: Topology, compute: Compute) -> Iterator[str]:
    """The tree, line by line."""
    yield _compute_in_words(compute)
    on_nodes = {name for node in topology.nodes for name in node.cxl_regions}
    branches = [_node_branch(node, topology) for node in topology.nodes]
    branches += [_region_branch(region, topology) for region in topology.regions if region.name not in on_nodes]
    branches += [_Branch(judge_memory_device(memory).text) for memory in topology.memories if not memory.regions]
    branches += [_Branch(_dax_in_words(device)) for device in topology.dax_devices if device.region is None]
    if not branches:
        branches = [_Branch("sysfs shows no NUMA nodes and no CXL memory")]
    yield from _draw(tuple(branches), "")


def _compute_in_words(compute: Compute) -> str:
    what = f"PCI device {compute.pci_address}" if compute.pci_address else "the CPUs that this process may use"
    place = f"on node {', '.join(map(str, compute.node_ids))}" if compute.node_ids else "on an unknown node"
    nearest = ""
    if compute.nearest and compute.nearest.node_id not in compute.node_ids:
        nearest = f"; nearest node with CPUs: {compute.nearest.node_id}"
    nearest_cxl = f"; nearest CXL memory: node {compute.nearest_cxl.node_id}" if compute.nearest_cxl else ""
    return f"Compute device: {what}, {place}{nearest}{nearest_cxl}"


def _node_branch(node: NumaNode, topology: Topology) -> _Branch:
    cpus = f"CPUs {node.cpulist}" if node.cpulist else "no CPUs"
    kind = ""
    if node.is_cxl:
        kind = ", CXL memory"
    elif node.is_cpuless:
        kind = ", not known to be CXL memory"
    size = f"{format_bytes(node.total_bytes)}, {format_bytes(node.free_bytes)} free"
    distances = ", ".join(f"{cost} to node {other}" for other, cost in node.distances.items() if other != node.node_id)
    below = [_Branch(f"distance {distances}")] if distances else []
    below += _hint_branches(node.hints)
    below += [_region_branch(region, topology, node) for region in topology.regions if region.name in node.cxl_regions]
    return _Branch(f"node {node.node_id}: {size}, {cpus}{kind}", tuple(below))


def _region_branch(region: CxlRegion, topology: Topology, node: NumaNode | None = None) -> _Branch:
    is_said = node is not None and node.hints == region.hints
    members = [
        _Branch(judge_memory_device(memory).text) for memory in topology.memories if region.name in memory.regions
    ]
    below = [*([] if is_said else _hint_branches(region.hints)), *members]
    return _Branch(judge_region(region, topology).text, tuple(below))


def _dax_in_words(device: DaxDevice) -> str:
    size = format_bytes(device.size_bytes)
    return f"{device.name}: {size}, driver {device.driver or 'none'}, not known to be CXL memory"


def _hint_branches(hints: Hints) -> list[_Branch]:
    """One line, none where the kernel has no hint."""

    def side(name: str, bytes_per_s: int | None, latency_ns: int | None) -> Iterator[str]:
        figures = []
        if bytes_per_s is not None:
            figures.append(f"{bytes_per_s / 1e9:.1f} GB/s")
        if latency_ns is not None:
            figures.append(f"{latency_ns} ns")
        if figures:
            yield f"{name} {' '.join(figures)}"

    sides = [
        *side("read", hints.read_bytes_per_s, hints.read_latency_ns),
        *side("write", hints.write_bytes_per_s, hints.write_latency_ns),
    ]
    return [_Branch(f"the kernel's hint, not measured: {', '.join(sides)}")] if sides else []


def _draw(branches: tuple[_Branch, ...], indent: str) -> Iterator[str]:
    for branch in branches:
        is_last = branch is branches[-1]
        yield f"{indent}{'└─' if is_last else '├─'} {branch.text}"
        yield from _draw(branch.below, indent + ("   " if is_last else "│  "))
