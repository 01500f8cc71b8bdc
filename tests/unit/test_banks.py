"""Banks: what each kind hands out, reads, refuses and says; which banks a machine has; what was measured of them."""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.support.homes import PROFILE, dram, random_bits, store
from tests.support.slabfiles import pack
from tests.support.sysfs_trees import SysfsTree, cxl_nodes, devdax, interleaved, one_socket, replay
from vllm_moecxl.config import BankSpec
from vllm_moecxl.control.device_model import DeviceModel, DeviceSpec
from vllm_moecxl.data import profiles
from vllm_moecxl.data.banks import emulated as emulated_bank
from vllm_moecxl.data.banks.base import BankProfile, RowCopy
from vllm_moecxl.data.banks.emulated import EmulatedBank
from vllm_moecxl.data.banks.file import FileBank
from vllm_moecxl.data.banks.make import auto_specs, bank_identity, make_banks, slab_file_path
from vllm_moecxl.data.banks.memory import DaxBank, DramBank, MemoryBank, MemoryRows, NumaBank
from vllm_moecxl.data.profiles import PUBLISHED, Profiles, load_profiles, machine_identity, save_profile
from vllm_moecxl.errors import CapacityError, ConfigError, IntegrityError
from vllm_moecxl.linux import memory, syscalls
from vllm_moecxl.linux.memory import Placement, UnreadablePageError
from vllm_moecxl.linux.topology import read_topology
from vllm_moecxl.units import GIB, KIB, MIB

ROOT = Path(__file__).parents[2]
PAGE_BYTES = mmap.PAGESIZE
NO_PROFILES = Profiles()


def copies_of(tensor: torch.Tensor, row_ids: range) -> tuple[list[RowCopy], list[torch.Tensor]]:
    rows = MemoryRows.of(tensor)
    targets = [torch.zeros(rows.row_bytes, dtype=torch.uint8) for _ in row_ids]
    return [RowCopy(rows, row_id, target) for row_id, target in zip(row_ids, targets, strict=True)], targets


def test_a_full_bank_refuses_with_its_name_and_counts_only_what_it_gave() -> None:
    bank = dram(capacity_bytes=100)
    bank.allocate((10, 5), torch.int16)
    with pytest.raises(CapacityError, match="bank dram holds 100 B, has 100 B in use and cannot take 1 B more: raise"):
        bank.allocate((1,), torch.uint8)
    assert bank.used_bytes == 100


def test_a_bank_without_a_limit_keeps_count() -> None:
    bank = dram()
    bank.allocate((1000, 3), torch.float64)
    assert bank.used_bytes == 24_000 and bank.tier == "dram" and bank.shares_host_memory
    assert bank.describe() == "bank dram: 23.44 KiB in use"


@pytest.mark.parametrize("reads_safely", [False, True])
def test_a_read_fills_each_target_with_its_row(*, reads_safely: bool) -> None:
    bank = dram()
    bank.reads_safely = reads_safely
    assert bank.reads_directly is not reads_safely
    tensor = bank.allocate((5, 777), torch.int16)
    tensor.copy_(random_bits((5, 777), torch.int16))
    copies, targets = copies_of(tensor, range(4, -1, -1))
    bank.read(copies)
    for row_id, target in zip(range(4, -1, -1), targets, strict=True):
        assert torch.equal(target.view(torch.int16), tensor[row_id])


def test_a_read_of_memory_that_is_kept_safe_goes_through_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    copied: list[int] = []
    monkeypatch.setattr(memory, "copy_safely", lambda source, target, byte_count: copied.append(byte_count))
    bank = dram()
    bank.reads_safely = True
    copies, _ = copies_of(bank.allocate((2, 5), torch.uint8), range(2))
    bank.read(copies)
    assert copied == [5, 5]


def lose_page(address: int) -> None:
    """Make a page of this process unreadable, as a poisoned one is to `process_vm_readv`."""
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.mprotect(ctypes.c_void_p(address), ctypes.c_size_t(PAGE_BYTES), 0) == 0


def test_a_page_that_is_gone_is_an_error_of_the_read_that_meets_it_and_of_no_other() -> None:
    bank = dram()
    bank.reads_safely = True
    home = store({"w": random_bits((3, 2 * PAGE_BYTES), torch.uint8)}, banks=[bank])
    assert home.tensors is not None and not home.is_direct
    lose_page(home.tensors[0][1].data_ptr() + PAGE_BYTES)
    target = torch.zeros(2 * PAGE_BYTES, dtype=torch.uint8)
    for expert_id in (0, 2):
        home.read(expert_id, [target])
    with pytest.raises(UnreadablePageError, match="cannot be read"):
        home.read(1, [target])


class VirtualTime:
    """A clock that a test owns.

    Args:
        copy_s: what the first look at the clock after a read began finds gone by: the time of the copy itself.
    """

    def __init__(self, copy_s: float = 0.0) -> None:
        self.now_s, self.copy_s, self.looks = 100.0, copy_s, 0

    def clock(self) -> float:
        self.looks += 1
        if self.looks % 3 == 2:  # a read looks when it begins, when it has copied, and when it ends
            self.now_s += self.copy_s
        return self.now_s

    def sleep(self, seconds: float) -> None:
        assert seconds > 0
        self.now_s += seconds


def emulated(time: VirtualTime, spec: DeviceSpec) -> tuple[EmulatedBank, torch.Tensor]:
    profile = BankProfile(spec.latency_s, spec.read_bytes_per_s, "emulated")
    bank = EmulatedBank("emulated:it", None, DeviceModel(spec, seed=1), profile, time.clock, time.sleep)
    tensor = bank.allocate((4, 100_000), torch.uint8)
    return bank, tensor.copy_(random_bits((4, 100_000), torch.uint8))


SLOW = DeviceSpec(latency_s=1e-6, read_bytes_per_s=1e8, write_bytes_per_s=1e8)  # 1 ms for a row


@pytest.mark.parametrize("row_count", [1, 3])
def test_an_emulated_read_takes_what_the_model_says_and_not_more(row_count: int) -> None:
    time = VirtualTime(copy_s=0.4e-3)
    bank, tensor = emulated(time, SLOW)
    assert bank.tier == "cxl" and not bank.reads_directly
    for _ in range(3):
        start_s = time.now_s
        copies, targets = copies_of(tensor, range(row_count))
        bank.read(copies)
        assert time.now_s - start_s == pytest.approx(1e-6 + row_count * 1e-3, abs=1e-8)
        assert all(torch.equal(target, tensor[i]) for i, target in enumerate(targets))
    assert bank.keeps_pace
    assert bank.describe().endswith("EMULATED: DRAM at the pace of a device of 1 us, 0.1 GB/s")


def test_reads_queue_at_an_emulated_device_as_they_would_at_a_real_one() -> None:
    time = VirtualTime()
    bank, tensor = emulated(time, SLOW)
    copies, _ = copies_of(tensor, range(1))
    start_s = time.now_s
    bank._model.submit(start_s, 1_000_000)  # another reader's 10 ms
    bank.read(copies)
    assert time.now_s - start_s == pytest.approx(1e-6 + 11e-3, abs=1e-8)


def test_a_machine_that_is_slower_than_the_device_says_so_once_enough_was_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(emulated_bank, "_PACE_BYTES_MIN", 200_000)
    time = VirtualTime(copy_s=1.2e-3)
    bank, tensor = emulated(time, SLOW)
    copies, _ = copies_of(tensor, range(1))
    bank.read(copies)
    assert bank.keeps_pace
    bank.read(copies)
    assert not bank.keeps_pace
    assert bank.describe().endswith("but this machine is too slow to keep the device's pace")


def make_device(folder: Path) -> Path:
    """A file in the place of a devdax device of 9 MiB."""
    path = folder / "dax0.0"
    path.write_bytes(bytes(9 * MIB))
    return path


@pytest.fixture
def device(tmp_path: Path) -> Path:
    return make_device(tmp_path)


def dax(path: Path, capacity_bytes: int, offset: int = 0) -> DaxBank:
    return DaxBank(path, "cxl:0x1", capacity_bytes, offset, PROFILE, is_file_allowed=True)


def test_a_dax_range_is_handed_out_in_whole_pages_to_its_last_byte(device: Path) -> None:
    bank = dax(device, 3 * MIB + 5, MIB)  # down to [0, 2 MiB)
    assert bank.capacity_bytes == 2 * MIB and bank.tier == "cxl" and not bank.shares_host_memory
    first = bank.allocate((3, 5), torch.float32).fill_(1)
    second = bank.allocate((7,), torch.uint8).fill_(2)
    assert bank.used_bytes == 2 * PAGE_BYTES
    assert first.data_ptr() % PAGE_BYTES == second.data_ptr() % PAGE_BYTES == 0
    with pytest.raises(CapacityError, match=r"bank dax:.*dax0.0 holds 2.00 MiB, has 8.00 KiB in use and cannot take"):
        bank.allocate((2 * MIB - 2 * PAGE_BYTES + 1,), torch.uint8)
    bank.allocate((2 * MIB - 2 * PAGE_BYTES - 1,), torch.uint8).fill_(3)
    assert bank.used_bytes == bank.capacity_bytes
    with pytest.raises(CapacityError):
        bank.allocate((1,), torch.uint8)
    assert (first == 1).all() and (second == 2).all()
    data = device.read_bytes()
    assert data[PAGE_BYTES : PAGE_BYTES + 8] == b"\2" * 7 + b"\0" and not any(data[2 * MIB :])


def test_a_home_in_a_dax_range_is_in_the_device(device: Path) -> None:
    original = random_bits((4, 5000), torch.uint8)
    home = store({"w": original.clone()}, banks=[dax(device, 4 * MIB, 2 * MIB)])
    assert home.is_direct and home.tensors is not None and torch.equal(home.tensors[0], original)
    assert device.read_bytes()[2 * MIB : 2 * MIB + 20_000] == original.numpy().tobytes()


@pytest.mark.parametrize("capacity_bytes", [0, 1, 2 * MIB - 1])
def test_a_dax_range_below_the_least_is_refused(device: Path, capacity_bytes: int) -> None:
    with pytest.raises(CapacityError, match=r"leaves a rank less than 2.00 MiB, .*: raise its size"):
        dax(device, capacity_bytes)


def test_a_dax_range_beyond_the_device_is_refused(device: Path) -> None:
    with pytest.raises(CapacityError, match=r"has 9.00 MiB and cannot give 10.00 MiB at 0 B: lower"):
        dax(device, 10 * MIB)


def test_no_two_banks_have_one_range_and_a_rank_beside_another_is_none_of_its_business(device: Path) -> None:
    bank = dax(device, 4 * MIB)
    for offset in (0, 2 * MIB):
        with pytest.raises(ConfigError, match=r"dax0.0\" is in use by another engine or model .*: give each a device"):
            dax(device, 4 * MIB, offset)
    neighbour = dax(device, 4 * MIB, 4 * MIB)
    bank.allocate((100,), torch.uint8).fill_(1)
    neighbour.allocate((100,), torch.uint8).fill_(2)
    data = device.read_bytes()
    assert data[0] == 1 and data[4 * MIB] == 2


_TAKE = """
import sys
from pathlib import Path
from tests.unit.test_banks import dax
from vllm_moecxl.errors import ConfigError
try:
    bank = dax(Path(sys.argv[1]), 4 << 20, int(sys.argv[2]))
    print("taken", flush=True)
    sys.stdin.read()
except ConfigError as error:
    print(error)
"""


def test_another_process_has_no_part_of_a_range_either_until_its_owner_is_gone(device: Path) -> None:
    command = [sys.executable, "-c", _TAKE, str(device), "0"]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout and owner.stdout.readline() == "taken\n"
        with pytest.raises(ConfigError, match="is in use by another engine"):
            dax(device, 2 * MIB, 2 * MIB)
        dax(device, 2 * MIB, 4 * MIB)
        owner.kill()
    dax(device, 2 * MIB, 2 * MIB)


@pytest.mark.parametrize("rank_count", [1, 2, 3, 4])
def test_ranks_share_a_device_in_ranges_that_do_not_meet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rank_count: int
) -> None:
    asked: list[tuple[int, int]] = []

    class Range(DaxBank):
        def __init__(self, path: Path, identity: str, capacity_bytes: int, offset: int, profile: BankProfile) -> None:
            path = tmp_path / path.name
            path.touch()
            os.truncate(path, 64 * GIB)
            super().__init__(path, identity, capacity_bytes, offset, profile, is_file_allowed=True)
            asked.append((offset - offset % (2 * MIB), self.capacity_bytes or 0))

    monkeypatch.setattr("vllm_moecxl.data.banks.make.DaxBank", Range)
    devdax(SysfsTree(tmp_path / "sys"))
    for size in (None, 1001 * MIB):
        asked.clear()
        specs = [BankSpec("dax", "/dev/dax0.0", size)]
        banks = [
            make_banks(specs, NO_PROFILES, sysfs=tmp_path / "sys", ranks=(rank, rank_count))
            for rank in range(rank_count)
        ]
        ends = [start + length for start, length in asked]
        assert [0, *ends[:-1]] <= [start for start, _ in asked] and ends[-1] <= (size or 64 * GIB)
        assert sum(length for _, length in asked) >= (size or 64 * GIB) - 4 * MIB * rank_count
        for (bank,) in banks:
            assert isinstance(bank, DaxBank) and bank.identity == "cxl:0xc0ffee0"
            os.close(bank._lock)


def numa(capacity_bytes: int | None = None, *, is_cxl: bool = False) -> NumaBank:
    return NumaBank(0, "numa:0", capacity_bytes, PROFILE, is_cxl=is_cxl)


def test_a_numa_bank_has_every_page_on_its_node() -> None:
    bank = numa(10 * MIB)
    original = random_bits((4, 1_000_001), torch.uint8)
    home = store({"w": original.clone()}, banks=[bank])
    assert home.is_direct and home.tensors is not None and torch.equal(home.tensors[0], original)
    assert bank.used_bytes == original.nbytes and bank.verify() == 0 == bank.astray_bytes
    assert bank.describe() == "bank numa:0: 3.81 MiB in use, every page on node 0"
    address = home.tensors[0].data_ptr()
    assert syscalls.policy_of(address) == (syscalls.MPOL_BIND, (0,))
    with pytest.raises(CapacityError, match=r"bank numa:0 holds 10.00 MiB"):
        bank.allocate((7 * MIB,), torch.uint8)


def test_a_numa_bank_shares_the_hosts_memory_unless_cxl_is_behind_it() -> None:
    assert (numa().tier, numa().shares_host_memory) == ("dram", True)
    assert (numa(is_cxl=True).tier, numa(is_cxl=True).shares_host_memory) == ("cxl", False)


def test_pages_that_are_elsewhere_are_counted_and_said(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    astray = Placement(node=0, bytes_by_node={0: 4 * KIB, 3: 12 * KIB}, unknown_bytes=8 * KIB)
    monkeypatch.setattr(memory, "place", lambda mapping, node, *, sysfs: astray)
    monkeypatch.setattr(memory, "verify", lambda mapping, node: astray)
    bank = numa()
    tensor = bank.allocate((24 * KIB,), torch.uint8)
    assert bank.astray_bytes == 20 * KIB and tensor.fill_(1)[5] == 1, "the bytes are right wherever they are"
    assert bank.describe() == "bank numa:0: 24.00 KiB in use, 20.00 KiB of it NOT on node 0"
    assert "MoE offload: bank numa:0: 4.00 KiB on node 0, 12.00 KiB on node 3" in caplog.text


def test_a_node_without_room_refuses_and_the_bank_counts_nothing() -> None:
    bank = numa()
    byte_count = memory.available_bytes(0)
    with pytest.raises(CapacityError, match=r'"numa:0" has .* available and cannot take .*: lower its size or add'):
        bank.allocate((byte_count,), torch.uint8)
    assert bank.used_bytes == 0


@pytest.mark.parametrize("make", [dram, numa])
def test_memory_that_the_kernel_does_not_promise_is_one_clear_error(make: Callable[[], MemoryBank]) -> None:
    bank = make()
    with pytest.raises(
        CapacityError, match=r"the kernel refuses 65536.00 TiB of memory \(Cannot allocate memory\): free"
    ):
        bank.allocate((1 << 56,), torch.uint8)
    assert bank.used_bytes == 0


def built(root: Path, *build: Callable[[SysfsTree], None]) -> Path:
    for one in build:
        one(SysfsTree(root))
    return root


def test_auto_is_cxl_nodes_first_and_dram(tmp_path: Path) -> None:
    for name, recording, expected in (
        ("a", "qemu_two_devices_kmem", ("numa:1", "numa:2", "dram")),
        ("b", "qemu_two_devices_interleaved", ("numa:1", "dram")),
        ("c", "qemu_two_devices_devdax", ("dram",)),
        ("d", "qemu_two_devices_no_region", ("dram",)),
    ):
        topology = read_topology(replay(recording, tmp_path / name))
        found = tuple(spec.name for spec in auto_specs(topology))
        cxl = tuple(f"numa:{node.node_id}" for node in topology.nodes if node.is_cxl)
        assert found == (*cxl, "dram"), recording
        assert found == expected or len(found) == len(expected), recording
    assert [spec.name for spec in auto_specs(read_topology(built(tmp_path / "e", one_socket)))] == ["dram"]


def test_auto_makes_banks_of_what_each_node_can_give(tmp_path: Path) -> None:
    sysfs = built(tmp_path, lambda tree: cxl_nodes(tree, 2))
    banks = make_banks(None, NO_PROFILES, sysfs=sysfs)
    assert [bank.name for bank in banks] == ["numa:2", "numa:3", "dram"]
    assert [bank.identity for bank in banks] == ["cxl:0xc0ffee0", "cxl:0xc0ffee1", "dram"]
    assert [bank.tier for bank in banks] == ["cxl", "cxl", "dram"]
    assert [bank.capacity_bytes for bank in banks] == [63 * GIB - memory.RESERVE_BYTES] * 2 + [None]
    assert [bank.profile for bank in banks] == [PUBLISHED["cxl"], PUBLISHED["cxl"], PUBLISHED["dram"]]


def test_a_named_size_limits_a_node_and_no_size_makes_it_larger(tmp_path: Path) -> None:
    sysfs = built(tmp_path, lambda tree: cxl_nodes(tree, 1))
    for size, expected in ((GIB, GIB), (1000 * GIB, 63 * GIB - memory.RESERVE_BYTES)):
        (bank,) = make_banks([BankSpec("numa", "2", size)], NO_PROFILES, sysfs=sysfs)
        assert bank.capacity_bytes == expected


def test_what_was_measured_counts_more_than_what_was_published(tmp_path: Path) -> None:
    sysfs = built(tmp_path, lambda tree: cxl_nodes(tree, 1))
    measured = BankProfile(1e-6, 7e9, "measured")
    specs = [BankSpec("numa", "2"), BankSpec("dram")]
    banks = make_banks(specs, Profiles({"cxl:0xc0ffee0": measured}), sysfs=sysfs)
    assert [bank.profile for bank in banks] == [measured, PUBLISHED["dram"]]


@pytest.mark.parametrize(
    ("spec", "told"),
    [
        ("numa:99", r'"numa:99" is no node of this machine'),
        ("dax:/dev/dax7.7", r"dax:/dev/dax7.7.* is no dax device of this machine: see moecxl topology"),
        ("dax:/missing/dax7.7=1GiB", r"dax:/missing/dax7.7\" cannot be opened \(No such file or directory\)"),
        ("emulated:cxl-z", r"emulated:cxl-z.* is not possible: name one of cxl-a"),
        ("emulated:300,2GB/s", r"emulated:300,2GB/s.* is not possible"),
        ("file:/missing/model.slabs", r'banks="file:/missing/model.slabs" cannot be opened'),
    ],
)
def test_a_bank_that_this_machine_has_not_got_is_refused_by_its_name(tmp_path: Path, spec: str, told: str) -> None:
    with pytest.raises(ConfigError, match=told) as refused:
        make_banks([BankSpec.parse(spec)], NO_PROFILES, sysfs=built(tmp_path, one_socket))
    assert str(refused.value).count(spec.partition("=")[0]) >= 1 and "\n" not in str(refused.value)


def test_an_emulated_bank_has_the_figures_of_its_device(tmp_path: Path) -> None:
    sysfs = built(tmp_path, one_socket)
    for text, capacity_bytes, latency_s, rate in (
        ("emulated:cxl-c", 16 * 10**9, 394e-9, 18e9),
        ("emulated:cxl-d=64GiB", 64 * GIB, 271e-9, 52e9),
        ("emulated:1us,500MB/s", None, 1e-6, 500e6),
    ):
        (bank,) = make_banks([BankSpec.parse(text)], NO_PROFILES, sysfs=sysfs)
        assert isinstance(bank, EmulatedBank) and isinstance(bank, DramBank) and bank.shares_host_memory
        assert bank.capacity_bytes == capacity_bytes
        assert bank.profile == BankProfile(pytest.approx(latency_s), rate, "emulated")


def test_identities_outlive_the_numbers_that_a_boot_gives(tmp_path: Path) -> None:
    topology = read_topology(built(tmp_path / "a", interleaved))
    assert bank_identity(BankSpec("numa", "1"), topology) == "cxl:0xc0ffee0+0xc0ffee1"
    assert bank_identity(BankSpec("numa", "0"), topology) == "numa:0"
    topology = read_topology(built(tmp_path / "b", devdax))
    assert bank_identity(BankSpec("dax", "/dev/dax0.0"), topology) == "cxl:0xc0ffee0"
    assert bank_identity(BankSpec("dax", "/dev/dax5.0"), topology) == "dax:/dev/dax5.0"
    assert bank_identity(BankSpec("dram"), topology) == "dram"
    mounted = bank_identity(BankSpec("file", str(tmp_path / "model.slabs")), topology)
    assert Path(mounted.removeprefix("file:")).is_mount()
    assert mounted == bank_identity(BankSpec("file", str(tmp_path / "other.slabs")), topology)


def test_two_places_of_one_device_are_told_apart_and_share_its_profile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Range(DaxBank):
        def __init__(self, path: Path, identity: str, capacity_bytes: int, offset: int, profile: BankProfile) -> None:
            super().__init__(
                make_device(tmp_path),
                identity,
                4 * MIB,
                4 * MIB * (path.name == "dax0.1"),
                profile,
                is_file_allowed=True,
            )
            self.name = f"dax:{path}"

    monkeypatch.setattr("vllm_moecxl.data.banks.make.DaxBank", Range)
    tree = SysfsTree(tmp_path / "sys")
    devdax(tree)
    region = tree.root / "devices/platform/ACPI0017:00/root0/decoder0.0/region0"
    below = str(region.relative_to(tree.root) / "dax_region0")
    tree.dax("dax0.1", size_bytes=GIB, target_node=1, driver="device_dax", below=below)
    measured = BankProfile(1e-6, 7e9, "measured")
    specs = [BankSpec("dax", "/dev/dax0.0"), BankSpec("dax", "/dev/dax0.1")]
    banks = make_banks(specs, Profiles({"cxl:0xc0ffee0": measured}), sysfs=tree.root)
    assert [bank.identity for bank in banks] == [f"cxl:0xc0ffee0 dax:/dev/dax0.{i}" for i in range(2)]
    assert [bank.profile for bank in banks] == [measured] * 2


@pytest.mark.parametrize(
    ("rank", "rank_count", "expected"),
    [(0, 1, "model.slabs"), (0, 2, "model.rank0of2.slabs"), (1, 2, "model.rank1of2.slabs")],
)
def test_each_rank_has_a_slab_file_of_its_own(tmp_path: Path, rank: int, rank_count: int, expected: str) -> None:
    path = tmp_path / "model.slabs"
    assert slab_file_path(path, rank, rank_count) == tmp_path / expected
    assert slab_file_path(tmp_path / "model", 0, 2).name == "model.rank0of2"
    pack(tmp_path / expected)
    (bank,) = make_banks(
        [BankSpec("file", str(path))], NO_PROFILES, sysfs=built(tmp_path / "s", one_socket), ranks=(rank, rank_count)
    )
    assert isinstance(bank, FileBank) and bank.name == f"file:{expected}"
    assert bank.tier == "file" and not bank.shares_host_memory and not bank.reads_directly
    how = "read past the page cache" if bank.slabs.file.is_direct else "read through the page cache, dropped after"
    assert bank.describe() == f"bank file:{expected}: 0 B in use, {how}"
    bank.slabs.close()


def test_a_slab_file_that_is_not_sound_is_refused_by_make_banks(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"nothing of the kind")
    with pytest.raises(IntegrityError, match="is not a sound slab file"):
        make_banks([BankSpec("file", str(tmp_path / "x"))], NO_PROFILES, sysfs=built(tmp_path / "s", one_socket))


MEASURED = {"summary": {"latency_s": 3e-7, "read_bytes_per_s": 2.5e10}, "details": [1, 2, 3]}


def test_a_profile_comes_back_for_its_machine_and_leaves_the_others_alone(tmp_path: Path) -> None:
    path = tmp_path / "new" / "profiles.json"
    save_profile("this", "cxl:1", MEASURED, path)
    save_profile("other", "cxl:1", {**MEASURED, "summary": {"latency_s": 1e-6, "read_bytes_per_s": 1e9}}, path)
    save_profile("this", "dram", MEASURED, path)
    expected = BankProfile(3e-7, 2.5e10, "measured")
    assert load_profiles("this", path) == Profiles({"cxl:1": expected, "dram": expected})
    assert load_profiles("other", path).of("cxl:1", "cxl") == BankProfile(1e-6, 1e9, "measured")
    assert load_profiles("this", path).of("numa:7", "cxl") == PUBLISHED["cxl"]
    assert load_profiles("unknown", path) == Profiles()
    assert json.loads(path.read_text())["this"]["dram"] == MEASURED
    assert [entry.name for entry in path.parent.iterdir()] == ["profiles.json"]


DAMAGED = [
    *("", "{", "[]", "7", "null", '{"this": []}', '{"this": 3}', '{"this": {"a": 5}}', '{"this": {"a": {}}}'),
    *('{"this": {"a": {"summary": []}}}', '{"this": {"a": {"summary": {"latency_s": "x", "read_bytes_per_s": 1}}}}'),
    *(
        f'{{"this": {{"a": {{"summary": {{"latency_s": {latency}, "read_bytes_per_s": {rate}}}}}}}}}'
        for latency, rate in (("-1", 1e9), (1, 1e9), ("NaN", 1e9), (0, 0), (0, "Infinity"), (0, -5), ("9" * 400, 1))
    ),
    "[" * 100_000,
    "9" * 5000,
]


@pytest.mark.parametrize("text", DAMAGED, ids=range(len(DAMAGED)))
def test_a_damaged_profile_is_no_reason_not_to_serve_and_is_replaced_by_the_next(tmp_path: Path, text: str) -> None:
    path = tmp_path / "profiles.json"
    path.write_text(text)
    assert load_profiles("this", path) == Profiles()
    save_profile("this", "a", MEASURED, path)
    assert load_profiles("this", path).of("a", "cxl").source == "measured"


def test_profiles_that_are_no_text_or_not_there_are_none(tmp_path: Path) -> None:
    (tmp_path / "profiles.json").write_bytes(b"\xff\xfe\x00")
    assert load_profiles("this", tmp_path / "profiles.json") == load_profiles("this", tmp_path) == Profiles()
    assert load_profiles("this", tmp_path / "missing") == Profiles()


def test_profiles_are_kept_in_the_users_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert profiles.default_path() == tmp_path / "vllm_moecxl" / "profiles.json"
    save_profile("this", "a", MEASURED)
    assert load_profiles("this").measured.keys() == {"a"}


def test_a_machine_is_known_by_its_processor_and_its_memory_and_not_by_its_name(tmp_path: Path) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("processor : 0\nmodel name : Xeon\nprocessor : 1\nmodel name : Xeon\n")
    sysfs = built(tmp_path / "a", lambda tree: cxl_nodes(tree, 1))
    identity = machine_identity(read_topology(sysfs), cpuinfo)
    assert identity == f"2 x Xeon; node 0; node 1; node 2 cxl; cxl 0xc0ffee0 {64 * GIB}"
    other = built(tmp_path / "b", lambda tree: cxl_nodes(tree, 2))
    assert machine_identity(read_topology(other), cpuinfo) != identity
    assert machine_identity(read_topology(sysfs), tmp_path / "missing").partition(";")[0]
