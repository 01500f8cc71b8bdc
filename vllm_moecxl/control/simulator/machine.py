"""What a simulated machine is made of: a compute device, the link to it, and banks. Profiles are JSON files."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vllm_moecxl.control.chunking import chunk_bytes_at, link_limits
from vllm_moecxl.control.device_model import DeviceSpec
from vllm_moecxl.control.links import LinkLimits
from vllm_moecxl.control.placement import BankView
from vllm_moecxl.errors import ConfigError
from vllm_moecxl.types import Tier
from vllm_moecxl.units import MIB

_FOLDER = Path(__file__).parent / "hardware"

#: What a file's readers ask for at a time, and how many there are. Source: `linux.direct_file`.
_FILE_CHUNK_BYTES = MIB
_READER_COUNTS: Mapping[Tier, int] = {"cxl": 1, "dram": 1, "file": 4}
_GPU_IN_FLIGHT_BYTES_MAX = 64 * MIB


@dataclass(frozen=True)
class Device:
    """A compute device, as far as the time of a forward goes.

    Attributes:
        is_host: whether it is the CPU: slots are in DRAM then, and threads carry the slabs.
        memory_bytes: of its memory; None where nobody says.
        memory_bytes_per_s: at which kernels read their weights.
        flops_per_s: dense, in the weights' usual format.
        achieved_share: part of both figures that kernels get.
        layer_s: beside reading and computing, for each layer: launches, normalisations, our own Python.
        step_s: the same for each forward.
        miss_s: beside the fetches themselves, for each wait of a layer: our Python, and a thread that wakes up.
        observe_s: from a layer's routing until the sidecar has made up its mind about it.
    """

    is_host: bool
    memory_bytes_per_s: float
    flops_per_s: float
    memory_bytes: int | None = None
    achieved_share: float = 1.0
    layer_s: float = 0.0
    step_s: float = 0.0
    miss_s: float = 0.0
    observe_s: float = 0.0

    @property
    def in_flight_bytes_max(self) -> int:
        """Bytes that may be queued to be copied to it."""
        return sys.maxsize if self.is_host else _GPU_IN_FLIGHT_BYTES_MAX


@dataclass(frozen=True)
class BankModel:
    """One bank.

    Attributes:
        name: its label and identity.
        tier: class of its memory.
        spec: how it answers.
        reader_count: threads that keep it busy; only a CPU device needs them.
        capacity_bytes: bytes that it may home; None for as many as there are.
    """

    name: str
    tier: Tier
    spec: DeviceSpec
    reader_count: int
    capacity_bytes: int | None = None

    @classmethod
    def of(cls, name: str, tier: Tier, spec: DeviceSpec, **options: Any) -> BankModel:
        """A bank with the readers that are usual for its tier."""
        return cls(name, tier, spec, **{"reader_count": _READER_COUNTS[tier], **options})

    @property
    def chunk_bytes(self) -> int:
        """What one copy from it moves."""
        return _FILE_CHUNK_BYTES if self.tier == "file" else chunk_bytes_at(self.spec.read_bytes_per_s)

    def limits(self, in_flight_bytes_max: int) -> LinkLimits:
        """Of its link."""
        return link_limits(
            self.spec.latency_s,
            self.spec.read_bytes_per_s,
            self.reader_count,
            self.chunk_bytes,
            in_flight_bytes_max,
        )

    def view(self, home_bytes: int) -> BankView:
        """What placement needs to know of it.

        Args:
            home_bytes: of all experts: what a bank without limits is taken to have.
        """
        return BankView(
            self.name,
            self.tier,
            home_bytes if self.capacity_bytes is None else self.capacity_bytes,
            self.spec.latency_s,
            self.spec.read_bytes_per_s,
        )


@dataclass(frozen=True)
class Hardware:
    """A machine.

    Attributes:
        name: of its profile.
        device: computes.
        link_bytes_per_s: what all banks together bring to the device; None where there is no such link.
        link_latency_s: beside the banks' own.
        banks: in order of preference.
    """

    name: str
    device: Device
    banks: tuple[BankModel, ...]
    link_bytes_per_s: float | None = None
    link_latency_s: float = 0.0

    def with_banks(self, banks: Sequence[BankModel]) -> Hardware:
        """The same machine with other banks."""
        assert banks
        return replace(self, banks=tuple(banks))

    def linked_banks(self) -> list[BankModel]:
        """The banks as the device sees them: behind the latency of the link."""
        if not self.link_latency_s:
            return list(self.banks)
        return [
            replace(bank, spec=replace(bank.spec, latency_s=bank.spec.latency_s + self.link_latency_s))
            for bank in self.banks
        ]


def names() -> list[str]:
    """The profiles that come with the package."""
    return sorted(path.stem for path in _FOLDER.glob("*.json"))


def load(text: str) -> Hardware:
    """A profile of the package by its name, or one from a file of the same form.

    Raises:
        ConfigError: there is no such profile, or it is not sound.
    """
    path = _FOLDER / f"{text}.json" if text in names() else Path(text)
    remedy = f"name one of {', '.join(names())}, or a JSON file of that form"
    try:
        raw = json.loads(path.read_text())
    except OSError as error:
        raise ConfigError(f"--hardware {text} is not possible: {error.strerror or error}; {remedy}") from error
    except ValueError as error:
        raise ConfigError(f"--hardware {text} is not possible: it is not JSON ({error}); {remedy}") from error
    try:
        return parse(raw, text)
    except (KeyError, TypeError, ValueError, AttributeError, AssertionError) as error:
        raise ConfigError(f"--hardware {text} is not possible: {_finding(error)}; {remedy}") from error


def parse(raw: Mapping[str, Any], name: str) -> Hardware:
    """A profile from JSON values.

    Raises:
        KeyError, TypeError, ValueError, AttributeError, AssertionError: something is missing, or not what it has to be.
    """
    link = raw.get("link") or {}
    hardware = Hardware(
        name=str(raw.get("name", name)),
        device=Device(**raw["device"]),
        banks=tuple(_bank(one) for one in raw["banks"]),
        link_bytes_per_s=float(link["bytes_per_s"]) if link else None,
        link_latency_s=float(link.get("latency_s", 0.0)),
    )
    device, rate = hardware.device, hardware.link_bytes_per_s
    assert device.memory_bytes_per_s > 0 and device.flops_per_s > 0 and 0 < device.achieved_share <= 1
    assert min(device.layer_s, device.step_s, device.miss_s, device.observe_s, hardware.link_latency_s) >= 0
    assert (rate is None or rate > 0) and hardware.banks
    assert len({bank.name for bank in hardware.banks}) == len(hardware.banks)
    return hardware


def _bank(raw: Mapping[str, Any]) -> BankModel:
    """A bank: `spec` is what `DeviceSpec.parse` takes."""
    try:
        spec = DeviceSpec.parse(raw["spec"])
    except ConfigError as error:
        raise ValueError(f"{raw['spec']!r} is no device, nor a latency and a bandwidth") from error
    tier: Tier = raw["tier"]
    options = {key: int(raw[key]) for key in ("reader_count", "capacity_bytes") if key in raw}
    return BankModel.of(raw["name"], tier, spec, **{"capacity_bytes": spec.capacity_bytes, **options})


def _finding(error: Exception) -> str:
    return f"it has no {error}" if isinstance(error, KeyError) else str(error) or "one of its figures is out of range"
