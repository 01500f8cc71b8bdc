"""What `moecxl profile` measured, kept with the identity of the machine that it holds for."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vllm_moecxl.data.banks.base import BankProfile
from vllm_moecxl.linux.topology import Topology
from vllm_moecxl.types import Tier

#: What placement plans with until a bank has been measured; only the ratios matter.
#: Source: design notes on CXL (MoE-CXL paper's CXL-B, Melody ASPLOS'25), a DDR5 socket, a PCIe 4.0 NVMe drive.
PUBLISHED: Mapping[Tier, BankProfile] = {
    "cxl": BankProfile(239e-9, 26e9, "published"),
    "dram": BankProfile(110e-9, 100e9, "published"),
    "file": BankProfile(100e-6, 5e9, "published"),
}
_FILE_NAME = "profiles.json"


def default_path() -> Path:
    """Where profiles are kept: the user's cache folder."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "vllm_moecxl" / _FILE_NAME


def machine_identity(topology: Topology, cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """What a measurement holds for: processor, nodes and their sizes, CXL devices by serial. Nothing that names it."""
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    parts = [
        f"{len(models)} x {models[0]}" if models else platform.machine(),
        *(f"node {node.node_id}{' cxl' if node.is_cxl else ''}" for node in topology.nodes),
        *sorted(f"cxl {memory.serial or memory.pci_path} {memory.ram_bytes}" for memory in topology.memories),
    ]
    return "; ".join(parts)


@dataclass(frozen=True)
class Profiles:
    """Measured profiles of this machine's banks, by their identity."""

    measured: Mapping[str, BankProfile] = field(default_factory=dict)

    def of(self, identity: str, tier: Tier) -> BankProfile:
        """The bank's own figures, or those published for its tier."""
        return self.measured.get(identity, PUBLISHED[tier])


def load_profiles(machine: str, path: Path | None = None) -> Profiles:
    """The profiles of this machine; empty where there are none, or none that can be read.

    A profile only steers where experts are put: one that is damaged is no reason not to serve.
    """
    try:
        stored = json.loads((path or default_path()).read_text())
        banks = stored.get(machine, {}) if isinstance(stored, dict) else {}
        return Profiles({identity: _profile(value["summary"]) for identity, value in banks.items()})
    except (OSError, ArithmeticError, LookupError, TypeError, ValueError, AttributeError, RecursionError):
        return Profiles()


def save_profile(machine: str, identity: str, measured: dict[str, Any], path: Path | None = None) -> None:
    """Keep a measurement; those of other banks and other machines stay.

    Args:
        measured: its "summary" has `latency_s` and `read_bytes_per_s`, the rest is for people.
    """
    path = path or default_path()
    try:
        stored = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError):
        stored = {}
    if not isinstance(stored, dict):
        stored = {}
    if not isinstance(stored.get(machine), dict):
        stored[machine] = {}
    stored[machine][identity] = measured
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    aside.write_text(json.dumps(stored, indent=1) + "\n")
    aside.rename(path)


def _profile(summary: Mapping[str, Any]) -> BankProfile:
    latency_s, read_bytes_per_s = float(summary["latency_s"]), float(summary["read_bytes_per_s"])
    if not (0 <= latency_s < 1 and 0 < read_bytes_per_s < 1e15):
        raise ValueError("no plausible profile")
    return BankProfile(latency_s, read_bytes_per_s, "measured")
