"""Which banks the device reads by itself, and what is said of pages that are not where they were asked to be."""

from __future__ import annotations

import logging
import mmap
from pathlib import Path

import pytest
import torch

from tests.support.homes import PROFILE, dram, random_bits, store
from tests.support.slabfiles import pack
from vllm_moecxl.control.device_model import DeviceModel, DeviceSpec
from vllm_moecxl.data.banks.base import Bank
from vllm_moecxl.data.banks.emulated import EmulatedBank
from vllm_moecxl.data.banks.file import FileBank
from vllm_moecxl.data.banks.memory import DaxBank, MemoryBank, NumaBank
from vllm_moecxl.data.devices.cpu import CpuBackend
from vllm_moecxl.data.registration import Registration, register_banks
from vllm_moecxl.errors import ConfigError
from vllm_moecxl.linux import memory
from vllm_moecxl.linux.memory import Mapping, Placement
from vllm_moecxl.units import MIB

PAGE = mmap.PAGESIZE


class Device(CpuBackend):
    """A device that reads registered memory only.

    Args:
        refuses_at: which registration it refuses.
    """

    is_host = False

    def __init__(self, refuses_at: int = 0) -> None:
        self.registered: list[torch.Tensor] = []
        self.attempt_count = 0
        self._refuses_at = refuses_at

    def register(self, memory: torch.Tensor) -> bool:
        self.attempt_count += 1
        if self.attempt_count == self._refuses_at:
            return False
        assert all(memory is not one for one in self.registered)
        self.registered.append(memory)
        return True

    def unregister(self, memory: torch.Tensor) -> None:
        count = len(self.registered)
        self.registered = [one for one in self.registered if one is not memory]
        assert len(self.registered) == count - 1


def numa() -> NumaBank:
    return NumaBank(0, "numa:0", None, PROFILE, is_cxl=True)


def filled(bank: MemoryBank, count: int = 3) -> MemoryBank:
    for index in range(count):
        bank.allocate((index + 1, PAGE + 5), torch.uint8).fill_(index)
    return bank


def emulated() -> EmulatedBank:
    return EmulatedBank("emulated:it", None, DeviceModel(DeviceSpec(1e-6, 1e9, 1e9), seed=1), PROFILE)


class Moving:
    """Movable memory, as the kernel treats it: what is registered goes to node 3, and comes back when it is told to.

    Attributes:
        comes_back: whether it does.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, device: Device) -> None:
        self.comes_back = True
        self.astray: set[int] = set()
        self._device = device
        self._verify = memory.verify
        monkeypatch.setattr(memory, "verify", self.verify)
        monkeypatch.setattr(memory, "bring_back", self.bring_back)

    def verify(self, mapping: Mapping, node: int, start: int = 0, byte_count: int | None = None) -> Placement:
        found = self._verify(mapping, node, start, byte_count)
        self.astray |= {tensor.data_ptr() for tensor in self._device.registered}
        if mapping.address not in self.astray:
            return found
        return Placement(node, {3: sum(found.bytes_by_node.values())}, found.unknown_bytes)

    def bring_back(self, mapping: Mapping, node: int) -> Placement:
        assert all(tensor.data_ptr() != mapping.address for tensor in self._device.registered), "it is still pinned"
        if self.comes_back:
            self.astray.discard(mapping.address)
        return self.verify(mapping, node)


def test_a_bank_names_all_memory_that_it_gave_and_nothing_else() -> None:
    bank = filled(dram())
    assert [tensor.shape for tensor in bank.tensors] == [(1, PAGE + 5), (2, PAGE + 5), (3, PAGE + 5)]
    home = store({"w": random_bits((4, 100), torch.uint8)}, banks=[bank])
    assert home.tensors is not None and bank.tensors[-1] is home.tensors[0]
    pages = [(tensor.data_ptr() // PAGE, -(-(tensor.data_ptr() + tensor.nbytes) // PAGE)) for tensor in bank.tensors]
    assert all(a[1] <= b[0] or b[1] <= a[0] for a in pages for b in pages if a is not b), "pages are shared"


def test_banks_of_memory_are_registered_and_others_are_staged_with_a_reason(tmp_path: Path) -> None:
    plain, node, paced, careful = filled(dram()), filled(numa()), filled(emulated()), filled(dram("safe"))
    careful.reads_safely = True
    path = tmp_path / "dax0.0"
    path.write_bytes(bytes(4 * MIB))
    dax = filled(DaxBank(path, "dax", 4 * MIB, 0, PROFILE, is_file_allowed=True))
    pack(tmp_path / "model.slabs")
    file = FileBank(tmp_path / "model.slabs", "file", PROFILE)
    file.used_bytes = 7
    banks: list[Bank] = [plain, node, paced, careful, dax, file]
    device = Device()
    result = register_banks(banks, device, strict=True)
    assert result.registered == (plain, node, dax) and result.staged == (paced, careful, file)
    ours = [tensor for bank in (plain, node, dax) for tensor in bank.tensors]
    assert len(device.registered) == len(ours) == 9
    assert all(a is b for a, b in zip(device.registered, ours, strict=True))
    size = "24.03 KiB"
    assert result.lines == (
        f"bank dram: {size} registered, the device reads it by itself",
        f"bank numa:0: {size} registered, the device reads it by itself",
        f"bank emulated:it: {size} read through the staging ring: its reads are paced",
        f"bank safe: {size} read through the staging ring: each read is to survive a failing page",
        f"bank dax:{path}: 36.00 KiB registered, the device reads it by itself",
        "bank file:model.slabs: 7 B read through the staging ring: it is a file",
    )
    result.release(device)
    assert not device.registered
    file.slabs.close()


def test_on_the_host_nothing_needs_registering_and_empty_banks_are_not_spoken_of() -> None:
    banks = [filled(dram()), emulated(), dram("empty")]
    result = register_banks(banks, CpuBackend(), strict=False)
    assert result == Registration(
        (banks[0], banks[2]), (banks[1],), ("bank dram: 24.03 KiB in the device's own reach",)
    )


@pytest.mark.parametrize("refused", [1, 2, 3])
def test_a_bank_is_registered_whole_or_not_at_all(refused: int) -> None:
    first, second, third = filled(dram("a")), filled(dram("b")), filled(dram("c"))
    device = Device(refuses_at=3 + refused)
    result = register_banks([first, second, third], device, strict=True)
    assert result.registered == (first, third) and result.staged == (second,)
    assert len(device.registered) == 6
    assert result.lines[1].endswith("read through the staging ring: the device refuses to register it")


@pytest.mark.parametrize(("comes_back", "left"), [(True, "0 B"), (False, "8.00 KiB")])
def test_a_bank_whose_pages_move_when_they_are_registered_is_staged_and_brought_back(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, comes_back: bool, left: str
) -> None:
    bank, other, device = filled(numa()), filled(dram()), Device()
    moving = Moving(monkeypatch, device)
    moving.comes_back = comes_back
    with caplog.at_level(logging.WARNING, "vllm.moecxl"):
        result = register_banks([bank, other], device, strict=False)
    assert result.staged == (bank,) and result.registered == (other,) and len(device.registered) == 3
    assert device.attempt_count == 4, "the first of its tensors tells: the others need not move"
    assert bank.astray_bytes == (0 if comes_back else 2 * PAGE)
    assert result.lines[0].endswith("read through the staging ring: registering it moves its pages")
    (line,) = caplog.messages
    assert line.startswith(
        "MoE offload: bank numa:0: registering it with the device moves its pages elsewhere; 8.00 KiB "
    )
    assert f" and {left} of it are elsewhere now" in line
    assert "strict_placement" in line and "daxctl online-memory --no-movable" in line


def test_pages_that_a_refused_registration_has_moved_are_found_too(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    bank, device = filled(numa()), Device(refuses_at=1)
    moving = Moving(monkeypatch, device)
    register = device.register

    def pin_a_part(memory: torch.Tensor) -> bool:
        moving.astray.add(memory.data_ptr())
        return register(memory)

    monkeypatch.setattr(device, "register", pin_a_part)
    with caplog.at_level(logging.WARNING, "vllm.moecxl"):
        result = register_banks([bank], device, strict=False)
    assert result.staged == (bank,) and not bank.astray_bytes and "8.00 KiB were moved" in caplog.text
    device.attempt_count = 0
    with pytest.raises(ConfigError, match=r"has 8.00 KiB that registering it with the device has moved; bring"):
        register_banks([bank], device, strict=True)


def test_pages_that_move_end_the_start_where_the_user_forbade_it(monkeypatch: pytest.MonkeyPatch) -> None:
    bank, device = filled(numa()), Device()
    Moving(monkeypatch, device)
    with pytest.raises(ConfigError) as refusal:
        register_banks([filled(dram()), bank], device, strict=True)
    assert str(refusal.value) == (
        "--moe-offload-config: strict_placement=True is not possible: bank numa:0 has 8.00 KiB that registering it "
        "with the device has moved; bring the node's memory online as not movable (daxctl online-memory --no-movable), "
        "free memory on it, or drop the option"
    )
    assert not device.registered, "a refusal leaves nothing registered"


def test_what_was_astray_from_the_first_is_no_reason_not_to_register_a_bank(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    bank, device = filled(numa()), Device()
    moving = Moving(monkeypatch, device)
    moving.astray |= {tensor.data_ptr() for tensor in bank.tensors}
    assert bank.verify() == 9 * PAGE
    with caplog.at_level(logging.WARNING, "vllm.moecxl"):
        assert register_banks([bank], device, strict=False).registered == (bank,)
    assert bank.astray_bytes == 9 * PAGE and not caplog.messages


@pytest.mark.parametrize("reads_safely", [True, False])
def test_pages_that_have_moved_since_they_were_placed_are_found_in_banks_that_nobody_registers(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, reads_safely: bool
) -> None:
    bank, device = filled(numa()), Device()
    device.is_host = not reads_safely
    bank.reads_safely = reads_safely
    moving = Moving(monkeypatch, device)
    moving.astray.add(bank.tensors[1].data_ptr())
    with pytest.raises(ConfigError, match=r"strict_placement=True .*: bank numa:0 has 12.00 KiB elsewhere; bring"):
        register_banks([bank], device, strict=True)
    bank.astray_bytes = 0
    with caplog.at_level(logging.WARNING, "vllm.moecxl"):
        register_banks([bank], device, strict=False)
        register_banks([bank], device, strict=False)
    (line,) = caplog.messages
    assert "bank numa:0: 12.00 KiB of it have moved elsewhere" in line and bank.astray_bytes == 3 * PAGE
    assert not device.attempt_count


def test_a_kernel_that_does_not_tell_where_pages_are_leaves_nothing_registered(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bank, device = filled(numa()), Device()

    def refuse(*_: object) -> Placement:
        raise PermissionError("move_pages")

    monkeypatch.setattr(memory, "verify", refuse)
    with pytest.raises(PermissionError):
        register_banks([bank], device, strict=False)
    assert not device.registered


def test_a_strict_bank_refuses_memory_that_it_did_not_get_where_it_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        memory, "place", lambda mapping, node, *, sysfs: Placement(node, {0: PAGE, 3: 2 * PAGE}, unknown_bytes=PAGE)
    )
    bank = numa()
    bank.strict_placement = True
    with pytest.raises(
        ConfigError, match=r"strict_placement=True is not possible: bank numa:0 has 4.00 KiB on node 0, "
    ):
        bank.allocate((4 * PAGE,), torch.uint8)
    assert not bank.used_bytes and not bank.tensors and not bank.verify()


def test_a_strict_bank_that_gets_what_it_asked_for_is_like_any_other() -> None:
    bank = numa()
    bank.strict_placement = True
    assert register_banks([filled(bank)], Device(), strict=True).registered == (bank,)


def test_pages_are_asked_about_a_few_at_a_time_until_all_of_them_were(monkeypatch: pytest.MonkeyPatch) -> None:
    bank = numa()
    for byte_count in (20 * MIB, PAGE, 8 * MIB + 1):
        bank.allocate((byte_count,), torch.uint8)
    starts = [tensor.data_ptr() for tensor in bank.tensors]
    looks: list[tuple[int, int, int]] = []
    astray: set[int] = set()

    def verify(mapping: Mapping, node: int, start: int = 0, byte_count: int | None = None) -> Placement:
        assert byte_count is not None
        looks.append((starts.index(mapping.address), start // MIB, byte_count))
        return Placement(node, {3 if len(looks) in astray else 0: byte_count})

    monkeypatch.setattr(memory, "verify", verify)
    for _ in range(6):
        assert bank.verify_some() == 0
    assert looks == [(0, 0, 8 * MIB), (0, 8, 8 * MIB), (0, 16, 4 * MIB), (1, 0, PAGE), (2, 0, 8 * MIB), (2, 8, 1)]
    astray |= {7, 9}  # the first and the third look of the next round
    assert [bank.verify_some() for _ in range(6)] == [8 * MIB, 8 * MIB] + [12 * MIB] * 4
    # They have come back, which only a whole round shows.
    assert [bank.verify_some() for _ in range(6)] == [12 * MIB] * 5 + [0]
    assert bank.astray_bytes == 0


def test_pages_of_a_real_bank_are_all_found_where_they_are() -> None:
    bank = filled(numa())
    assert [bank.verify_some() for _ in range(7)] == [0] * 7
    assert numa().verify_some() == 0, "a bank that has nothing yet"
