"""What this machine has for serving experts from slots, and what is in the way.

Exit code 1 if there is a problem, else 0.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import re
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from vllm_moecxl.commands.findings import Finding
from vllm_moecxl.commands.installed import judge_engine, judge_plugin, read_engine, read_plugin
from vllm_moecxl.commands.machine import judge_devices, judge_memory, read_devices, read_memory
from vllm_moecxl.commands.topology import judge_memory_device, judge_region
from vllm_moecxl.linux import syscalls
from vllm_moecxl.linux.memory import Mapping
from vllm_moecxl.linux.topology import SYSFS, Topology, read_topology
from vllm_moecxl.units import format_bytes, format_rate, format_seconds

_TITLES = {
    "engine": "Engine",
    "plugin": "Plugin",
    "devices": "Compute devices",
    "memory": "Host memory",
    "numa": "NUMA nodes",
    "cxl": "CXL memory",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `moecxl doctor`."""
    parser.add_argument("--sysfs", type=Path, default=SYSFS, metavar="DIR", help="look here for nodes and CXL devices")


def run(args: argparse.Namespace) -> int:
    """Examine this machine and print what was found."""
    report = examine(args.sysfs)
    findings: list[Finding] = report["findings"]
    if args.json:
        print(json.dumps({**report, "findings": [asdict(finding) for finding in findings]}))
    else:
        print("\n".join(in_words(findings)))
    return int(any(finding.level == "problem" for finding in findings))


def examine(sysfs: Path) -> dict[str, Any]:
    """Everything about this machine: plain values for JSON, and the findings about them."""
    engine, plugin, devices, memory = read_engine(), read_plugin(), read_devices(), read_memory()
    topology = read_topology(sysfs)
    return {
        "findings": [
            *judge_engine(engine),
            *judge_plugin(plugin),
            *judge_devices(devices, engine.kind),
            *judge_memory(memory, engine.kind),
            *judge_nodes(topology, engine.kind),
            *judge_placement(try_placement()),
            *judge_cxl(topology),
            *judge_profiles(topology),
        ],
        "engine": asdict(engine),
        "plugin": {**asdict(plugin), "is_active": plugin.is_active},
        "devices": [asdict(device) for device in devices],
        "memory": asdict(memory),
        **topology.as_dict(),
    }


def judge_nodes(topology: Topology, engine_kind: str | None) -> Iterator[Finding]:
    """Findings about NUMA nodes."""
    if not topology.nodes:
        yield Finding("note", "numa", "sysfs shows no NUMA nodes: all memory is taken for one node")
    for node in topology.nodes:
        size = f"{format_bytes(node.total_bytes)}, {format_bytes(node.free_bytes)} free"
        if node.is_cxl:
            yield Finding("ok", "numa", f"node {node.node_id}: {size}, CXL memory of {', '.join(node.cxl_regions)}")
        elif node.is_cpuless:
            yield Finding(
                "note", "numa", f"node {node.node_id}: {size}, no CPUs, but no CXL region is known to be behind it"
            )
        else:
            yield Finding("ok", "numa", f"node {node.node_id}: {size}, CPUs {node.cpulist or 'none'}")
    with_cpus = ",".join(str(node.node_id) for node in topology.nodes if node.cpulist)
    is_cpuless = any(node.is_cpuless for node in topology.nodes)
    if engine_kind == "cpu" and is_cpuless and "CPU_VISIBLE_MEMORY_NODES" not in os.environ:
        yield Finding(
            "note",
            "numa",
            f"set CPU_VISIBLE_MEMORY_NODES={with_cpus}, or vLLM's CPU engine may place a rank on a node without CPUs",
        )


def judge_cxl(topology: Topology) -> Iterator[Finding]:
    """Findings about CXL memory."""
    if not topology.memories and not topology.regions:
        yield Finding("note", "cxl", "no CXL memory: homes are in DRAM")
    for memory in topology.memories:
        yield judge_memory_device(memory)
    for region in topology.regions:
        yield judge_region(region, topology)


def judge_placement(error: OSError | None) -> Iterator[Finding]:
    """Whether banks on NUMA nodes can be had at all, given what the kernel said to an attempt."""
    if error is None:
        yield Finding("ok", "numa", "this process may say on which node its memory lies")
    else:
        yield Finding(
            "note",
            "numa",
            f"this process may not say on which node its memory lies ({error.strerror}), so banks of kind numa are "
            "refused: allow mbind (docker: --cap-add SYS_NICE)",
        )


def try_placement(status: Path = Path("/proc/self/status")) -> OSError | None:
    """Bind a page to a node that this process may use; the error if the kernel refuses."""
    allowed = re.search(r"^Mems_allowed_list:\s*(\d+)", status.read_text(), re.M)
    mapping = Mapping.anonymous(mmap.PAGESIZE)
    try:
        nodes = [int(allowed[1]) if allowed else 0]
        syscalls.mbind(mapping.address, mapping.byte_count, syscalls.MPOL_BIND, nodes)
    except OSError as error:
        return error
    return None


def judge_profiles(topology: Topology) -> Iterator[Finding]:
    """Whether the banks that "auto" takes have been measured."""
    try:
        from vllm_moecxl.data.banks.make import auto_specs, bank_identity
        from vllm_moecxl.data.profiles import load_profiles, machine_identity
        from vllm_moecxl.data.profiling import measurement_dates
    except ImportError:  # without PyTorch there is no data plane; the engine's findings say so
        return
    machine = machine_identity(topology)
    measured, dates = load_profiles(machine).measured, measurement_dates(machine)
    for spec in auto_specs(topology):
        topic = "memory" if spec.kind == "dram" else "cxl"
        identity = bank_identity(spec, topology)
        if (figures := measured.get(identity)) is None:
            remedy = f"placement plans with published figures, run moecxl profile {spec.name}"
            yield Finding("note", topic, f"bank {spec.name}: not measured, {remedy}")
        else:
            what = f"{format_seconds(figures.latency_s)}, {format_rate(figures.read_bytes_per_s)}"
            when = dates.get(identity, "at an unknown time")
            yield Finding("ok", topic, f"bank {spec.name}: {what}, measured {when}")


def in_words(findings: list[Finding]) -> Iterator[str]:
    """The findings by section, and how many problems there are."""
    for topic, title in _TITLES.items():
        yield title
        for finding in findings:
            if finding.topic == topic:
                yield f"  {finding.level:<8} {finding.text}"
    count = sum(finding.level == "problem" for finding in findings)
    yield f"{count} problem{'' if count == 1 else 's'} found"
