"""Making banks' memory readable by the device, and checking where it is afterwards.

Registering pins memory, and pinning moves pages off movable memory, which CXL memory is by default, without a word.
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
        staged: banks that are read by the host, through a staging ring.
        lines: one for each bank that homes anything, for the log.
    """

    registered: tuple[Bank, ...]
    staged: tuple[Bank, ...]
    lines: tuple[str, ...]

    def release(self, backend: DeviceBackend) -> None:
        """Undo it, once no copy reads the banks any more."""
        for bank in self.registered:
            assert isinstance(bank, MemoryBank)
            for tensor in bank.tensors:
                backend.unregister(tensor)


def register_banks(banks: Sequence[Bank], backend: DeviceBackend, *, strict: bool) -> Registration:
    """Register what the banks home, all of a bank or nothing, and ask again where its pages are.

    Pages that are elsewhere are told of in the log and counted in the bank's `astray_bytes`; what they hold is right.

    Args:
        banks: with everything home.
        strict: whether pages that are not where they were asked to be are forbidden.

    Raises:
        ConfigError: there are such pages, and `strict` forbids them; then nothing is registered.
    """
    registered: list[Bank] = []
    staged: list[Bank] = []
    lines: list[str] = []
    for bank in banks:
        how = _obstacle(bank) or _register(bank, backend)
        (staged if how else registered).append(bank)
        if bank.used_bytes:
            lines.append(_describe(bank, how, is_host=backend.is_host))
    registration = Registration(tuple(registered), tuple(staged), tuple(lines))
    try:
        for bank in banks:
            if isinstance(bank, MemoryBank):
                _check_placement(bank, is_pinned=not backend.is_host and bank in registered, strict=strict)
    except BaseException:
        registration.release(backend)
        raise
    return registration


def _obstacle(bank: Bank) -> str:
    """Why the device cannot read a bank past its `read`; "" if it can."""
    if not isinstance(bank, MemoryBank):
        return "it is no memory"
    if bank.reads_safely:
        return "each read is to survive a failing page"
    if not bank.reads_directly:
        return "its reads are paced"
    return ""


def _register(bank: Bank, backend: DeviceBackend) -> str:
    """Register all memory of a bank, or none; "" or why it is none."""
    assert isinstance(bank, MemoryBank)
    done: list[torch.Tensor] = []
    for tensor in bank.tensors:
        if not backend.register(tensor):
            for earlier in done:
                backend.unregister(earlier)
            return "the device refuses to register it"
        done.append(tensor)
    return ""


def _describe(bank: Bank, obstacle: str, *, is_host: bool) -> str:
    how = f"read through the staging ring: {obstacle}" if obstacle else "registered, the device reads it by itself"
    if is_host:
        how = "read by the host" if obstacle else "in the device's own reach"
    return f"bank {bank.name}: {format_bytes(bank.used_bytes)} {how}"


def _check_placement(bank: MemoryBank, *, is_pinned: bool, strict: bool) -> None:
    before = bank.astray_bytes
    if not bank.verify():
        return
    if strict:
        raise misplaced(bank.name, f"{format_bytes(bank.astray_bytes)} elsewhere")
    if bank.astray_bytes > before:
        logger.warning(
            "MoE offload: bank %s: %s of its memory have moved elsewhere%s: what they hold is right, but it is read at "
            "that memory's pace; bring the node's memory online as not movable (daxctl online-memory --no-movable), or "
            "set strict_placement to refuse it",
            bank.name,
            format_bytes(bank.astray_bytes - before),
            " when they were registered" if is_pinned else "",
        )
