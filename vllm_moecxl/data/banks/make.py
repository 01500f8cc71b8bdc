"""From the user's bank specs, and from what the machine has, to banks."""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from vllm_moecxl.config import BankSpec
from vllm_moecxl.control.device_model import DeviceModel, DeviceSpec
from vllm_moecxl.data.banks.base import Bank, BankProfile
from vllm_moecxl.data.banks.emulated import EmulatedBank
from vllm_moecxl.data.banks.file import FileBank
from vllm_moecxl.data.banks.memory import DaxBank, DramBank, NumaBank
from vllm_moecxl.data.profiles import Profiles
from vllm_moecxl.data.slabfile import SlabFile
from vllm_moecxl.errors import ConfigError
from vllm_moecxl.linux import memory
from vllm_moecxl.linux.topology import Topology, read_topology

_SYSFS = Path("/sys")


def auto_specs(topology: Topology) -> tuple[BankSpec, ...]:
    """CXL nodes first, then DRAM. Devices in devdax mode may belong to another program: they have to be named."""
    nodes = [node for node in topology.nodes if node.is_cxl and node.total_bytes]
    return (*(BankSpec("numa", str(node.node_id)) for node in nodes), BankSpec("dram"))


def make_banks(
    specs: Sequence[BankSpec] | None, profiles: Profiles, *, sysfs: Path = _SYSFS, ranks: tuple[int, int] = (0, 1)
) -> list[Bank]:
    """The banks that the user named, or the machine's own for "auto".

    Args:
        specs: in order of preference; None for "auto".
        profiles: what `moecxl profile` measured here.
        ranks: which of how many workers this is; each rank has a slab file and a range of a dax device of its own.

    Raises:
        ConfigError: a bank that this machine has not got.
        IntegrityError: a slab file that is not sound.
    """
    topology = read_topology(sysfs)
    if specs is None:
        specs = auto_specs(topology)
    banks = [_make(spec, topology, profiles, sysfs, ranks) for spec in specs]
    counts = Counter(bank.identity for bank in banks)
    for bank in banks:
        if counts[bank.identity] > 1:  # two dax devices of one region: as fast as each other, and yet two places
            bank.identity = f"{bank.identity} {bank.name}"
    return banks


def require_banks(specs: Sequence[BankSpec] | None, rank_count: int, *, sysfs: Path = _SYSFS) -> None:
    """Say at once what each worker would find out after it has started: a bank that this machine has not got.

    Raises:
        ConfigError, IntegrityError: one sentence.
    """
    for spec in specs or ():
        match spec.kind:
            case "numa":
                memory.available_bytes(int(spec.locator), sysfs)
            case "dax" if not Path(spec.locator).exists():
                raise ConfigError(
                    f'--moe-offload-config: banks="{spec.name}" is no dax device of this machine: see moecxl topology'
                )
            case "file":
                for rank in range(rank_count):
                    SlabFile(slab_file_path(Path(spec.locator), rank, rank_count)).close()
            case "emulated":
                DeviceSpec.parse(spec.locator)


def bank_identity(spec: BankSpec, topology: Topology) -> str:
    """What stays the same of a bank when the machine boots again: serial numbers rather than numbers of nodes."""
    match spec.kind:
        case "numa":
            memories = [m for m in topology.memories if int(spec.locator) in m.node_ids]
        case "dax":
            memories = [m for m in topology.memories if Path(spec.locator).name in m.dax_devices]
        case "file":
            return f"file:{_mount_point(Path(spec.locator))}"
        case _:
            return spec.name
    known = [m.serial or m.pci_path for m in memories]
    return f"cxl:{'+'.join(map(str, known))}" if known and all(known) else spec.name


def _mount_point(path: Path) -> Path:
    """Where the file system of a path is mounted: how fast it is, is a matter of its disk."""
    absolute = path.absolute()
    return next((folder for folder in absolute.parents if folder.is_mount()), absolute)


def slab_file_path(path: Path, rank: int, rank_count: int) -> Path:
    """The slab file of one of the engine's ranks."""
    return path if rank_count == 1 else path.with_name(f"{path.stem}.rank{rank}of{rank_count}{path.suffix}")


def _make(spec: BankSpec, topology: Topology, profiles: Profiles, sysfs: Path, ranks: tuple[int, int]) -> Bank:
    identity = bank_identity(spec, topology)
    match spec.kind:
        case "dram":
            return DramBank(spec.name, identity, spec.capacity_bytes, profiles.of(identity, "dram"))
        case "numa":
            return _make_numa(spec, identity, topology, profiles, sysfs)
        case "dax":
            path = Path(spec.locator)
            sizes = [device.size_bytes for device in topology.dax_devices if device.name == path.name]
            capacity_bytes = spec.capacity_bytes or (sizes[0] if sizes else 0)
            if not capacity_bytes:
                raise ConfigError(
                    f'--moe-offload-config: banks="{spec.name}" is no dax device of this machine: see moecxl topology'
                )
            rank, rank_count = ranks
            share_bytes = capacity_bytes // rank_count
            return DaxBank(path, identity, share_bytes, rank * share_bytes, profiles.of(identity, "cxl"))
        case "file":
            return FileBank(slab_file_path(Path(spec.locator), *ranks), identity, profiles.of(identity, "file"))
        case _:
            device = DeviceSpec.parse(spec.locator)
            profile = BankProfile(device.latency_s, device.read_bytes_per_s, "emulated")
            return EmulatedBank(
                spec.name,
                spec.capacity_bytes or device.capacity_bytes,
                # Of the name, so that the tails of two devices do not strike in lockstep.
                DeviceModel(device, seed=zlib.crc32(spec.name.encode())),
                profile,
            )


def _make_numa(spec: BankSpec, identity: str, topology: Topology, profiles: Profiles, sysfs: Path) -> NumaBank:
    node_id = int(spec.locator)
    room_bytes = max(memory.available_bytes(node_id, sysfs) - memory.RESERVE_BYTES, 0)
    capacity_bytes = min(spec.capacity_bytes or room_bytes, room_bytes)
    is_cxl = any(node.node_id == node_id and node.is_cxl for node in topology.nodes)
    profile = profiles.of(identity, "cxl" if is_cxl else "dram")
    return NumaBank(node_id, identity, capacity_bytes, profile, is_cxl=is_cxl, sysfs=sysfs)
