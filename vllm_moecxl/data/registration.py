"""Making banks' memory readable by the device, and checking where it is afterwards.

Registering pins memory, and pinning moves pages off movable memory, which CXL memory is by default, without a word: a
bank would end up in DRAM, which need not have room for it.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from vllm_moecxl.data.banks.base import Bank
from vllm_moecxl.data.banks.memory import MemoryBank, misplaced
from vllm_moecxl.data.devices.base import DeviceBackend
from vllm_moecxl.units import format_bytes

logger = logging.getLogger("vllm.moecxl")


@dataclass(frozen=True)
class Registration:
    """How the device reads each bank.

    Attributes:
        registered: banks whose memory copies read by themselves.
        staged: banks that the host reads, for a device into a staging ring.
        lines: one for each bank that homes anything, for the log.
    """

    registered: tuple[Bank, ...]
    staged: tuple[Bank, ...]
    lines: tuple[str, ...]

    def release(self, backend: DeviceBackend) -> None:
        """Undo it, once no copy reads the banks any more."""
        _release(self.registered, backend)


def register_banks(banks: Sequence[Bank], backend: DeviceBackend, *, strict: bool) -> Registration:
    """Register what the banks home, all of a bank or nothing, and ask again where its pages are.

    A bank whose pages move when they are registered is read through a staging ring instead, and they are moved back.
    Pages that stay elsewhere are told of in the log and counted in the bank's `astray_bytes`; what they hold is right.

    Args:
        banks: with everything home.
        strict: whether pages that are not where they were asked to be are forbidden.

    Raises:
        ConfigError: there are such pages, or registering makes some, and `strict` forbids it. Nothing is registered
            then.
    """
    registered: list[Bank] = []
    staged: list[Bank] = []
    lines: list[str] = []
    try:
        for bank in banks:
            obstacle = _obstacle(bank)
            if isinstance(bank, MemoryBank):
                if not obstacle and not backend.is_host:
                    obstacle = _register(bank, backend, strict=strict)
                if obstacle or backend.is_host:
                    _check_placement(bank, strict=strict)
            (staged if obstacle else registered).append(bank)
            if bank.used_bytes:
                lines.append(f"bank {bank.name}: {format_bytes(bank.used_bytes)} {_manner(obstacle, backend.is_host)}")
    except BaseException:
        _release(registered, backend)
        raise
    return Registration(tuple(registered), tuple(staged), tuple(lines))


def _obstacle(bank: Bank) -> str:
    """Why nobody but the host can read a bank; "" if somebody can."""
    if not isinstance(bank, MemoryBank):
        return "it is a file"
    if bank.reads_safely:
        return "each read is to survive a failing page"
    if not bank.reads_directly:
        return "its reads are paced"
    return ""


def _register(bank: MemoryBank, backend: DeviceBackend, *, strict: bool) -> str:
    """Register all memory of a bank, or none; "" or why it is none."""
    known_bytes = bank.astray_bytes
    done: list[torch.Tensor] = []
    obstacle = ""
    try:
        for index, tensor in enumerate(bank.tensors):
            before = bank.verify_tensor(index) if known_bytes else 0
            if not backend.register(tensor):
                obstacle = "the device refuses to register it"
                break
            done.append(tensor)
            if bank.verify_tensor(index) > before:
                obstacle = "registering it moves its pages"
                break
    except BaseException:
        _unregister(done, backend)
        raise
    if obstacle:
        _unregister(done, backend)
        # Also where it was refused: by then it may have pinned, and moved, a part.
        if (moved_bytes := bank.verify() - known_bytes) > 0:
            _report_moved(bank, moved_bytes, strict=strict)
    return obstacle


def _release(banks: Sequence[Bank], backend: DeviceBackend) -> None:
    for bank in banks:
        assert isinstance(bank, MemoryBank)
        if not backend.is_host:
            _unregister(bank.tensors, backend)


def _unregister(tensors: Sequence[torch.Tensor], backend: DeviceBackend) -> None:
    for tensor in tensors:
        backend.unregister(tensor)


def _report_moved(bank: MemoryBank, moved_bytes: int, *, strict: bool) -> None:
    if strict:
        raise misplaced(bank.name, f"{format_bytes(moved_bytes)} that registering it with the device has moved")
    left_bytes = bank.bring_back()
    logger.warning(
        "MoE offload: bank %s: registering it with the device moves its pages elsewhere; %s were moved, and %s of it "
        "are elsewhere now. It is read through the staging ring instead, which takes longer: bring the node's memory "
        "online as not movable (daxctl online-memory --no-movable), or set strict_placement to refuse this",
        *(bank.name, format_bytes(moved_bytes), format_bytes(left_bytes)),
    )


def _check_placement(bank: MemoryBank, *, strict: bool) -> None:
    known_bytes = bank.astray_bytes
    if not bank.verify():
        return
    if strict:
        raise misplaced(bank.name, f"{format_bytes(bank.astray_bytes)} elsewhere")
    if bank.astray_bytes > known_bytes:
        logger.warning(
            "MoE offload: bank %s: %s of it have moved elsewhere: what they hold is right, but it is read at that "
            "memory's pace; set strict_placement to refuse this",
            *(bank.name, format_bytes(bank.astray_bytes - known_bytes)),
        )


def _manner(obstacle: str, is_host: bool) -> str:
    if is_host:
        return f"read by the host: {obstacle}" if obstacle else "in the device's own reach"
    return f"read through the staging ring: {obstacle}" if obstacle else "registered, the device reads it by itself"
