"""Banks made of memory that this process can address: DRAM, a NUMA node, a devdax device."""

from __future__ import annotations

import fcntl
import logging
import math
import mmap
import os
import struct
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from vllm_moecxl.data.banks.base import BankProfile, RowCopy
from vllm_moecxl.data.host import as_tensor
from vllm_moecxl.data.layout import as_bytes
from vllm_moecxl.errors import CapacityError, ConfigError
from vllm_moecxl.linux import memory
from vllm_moecxl.linux.memory import Mapping
from vllm_moecxl.types import Tier
from vllm_moecxl.units import MIB, format_bytes

#: devdax devices are mapped in multiples of this.
_DAX_ALIGN_BYTES = 2 * MIB
#: Pages that are asked about at a time while serving: the list of them keeps the interpreter busy for some 60 us.
_LOOK_BYTES = 8 * MIB

logger = logging.getLogger("vllm.moecxl")


def misplaced(bank_name: str, where: str) -> ConfigError:
    """The refusal of a bank whose pages are not where they were asked to be."""
    return ConfigError(
        f"--moe-offload-config: strict_placement=True is not possible: bank {bank_name} has {where}; bring the node's "
        "memory online as not movable (daxctl online-memory --no-movable), free memory on it, or drop the option"
    )


@dataclass(frozen=True)
class MemoryRows:
    """Rows in addressable memory.

    Attributes:
        tensor: [rows, ...] host tensor, contiguous.
        as_bytes: the same memory as [rows, row bytes] uint8.
    """

    tensor: torch.Tensor
    as_bytes: torch.Tensor

    @classmethod
    def of(cls, tensor: torch.Tensor) -> MemoryRows:
        return cls(tensor, as_bytes(tensor))

    @property
    def row_bytes(self) -> int:
        return self.as_bytes.shape[1]

    def address(self, row_id: int) -> int:
        """Where a row starts."""
        assert 0 <= row_id < len(self.as_bytes)
        return self.as_bytes.data_ptr() + row_id * self.row_bytes


class MemoryBank(ABC):
    """What banks of addressable memory have in common; see `Bank`.

    Args:
        capacity_bytes: bytes that it may hand out; None for no limit but the machine's.
    """

    tier: Tier = "dram"
    shares_host_memory = True
    reader_count = 1

    def __init__(self, name: str, identity: str, capacity_bytes: int | None, profile: BankProfile) -> None:
        self.name = name
        self.identity = identity
        self.capacity_bytes = capacity_bytes
        self.profile = profile
        self.used_bytes = 0
        self.astray_bytes = 0
        #: Whether a poisoned page is to be an error of the read that meets it instead of the end of the process.
        self.reads_safely = False
        #: Whether a page that is not where it was asked to be is an error instead of a warning.
        self.strict_placement = False
        self._tensors: list[torch.Tensor] = []

    def allocate(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """A contiguous host tensor in this bank, exactly as large as asked (rounded up to pages), contents undefined.

        Raises:
            CapacityError: the bank is full.
            ConfigError: its memory is not where it was asked to be, and `strict_placement` forbids that.
        """
        byte_count = math.prod(shape) * dtype.itemsize
        if self.capacity_bytes is not None and self.used_bytes + byte_count > self.capacity_bytes:
            raise CapacityError(
                f"--moe-offload-config: bank {self.name} holds {format_bytes(self.capacity_bytes)}, has "
                f"{format_bytes(self.used_bytes)} in use and cannot take {format_bytes(byte_count)} more: "
                "raise its size"
            )
        mapping, offset, taken_bytes = self._take(byte_count)
        self.used_bytes += taken_bytes
        tensor = as_tensor(mapping, shape, dtype, offset)
        self._tensors.append(tensor)
        return tensor

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """All that was handed out, in order; each has its pages to itself."""
        return tuple(self._tensors)

    def verify(self) -> int:
        """Ask again where every page is; notes and returns the bytes that are not where they were asked to be."""
        return self.astray_bytes

    def verify_tensor(self, index: int) -> int:
        """The bytes of one of `tensors` that are not where they were asked to be."""
        return 0

    def bring_back(self) -> int:
        """Move what is astray to where it was asked to be; notes and returns the bytes that are still astray."""
        return self.astray_bytes

    @property
    def chunk_bytes(self) -> int:
        return self.profile.chunk_bytes

    @property
    def reads_directly(self) -> bool:
        return not self.reads_safely

    def read(self, copies: Sequence[RowCopy]) -> None:
        copy = memory.copy_safely if self.reads_safely else memory.copy
        for rows, row_id, target, offset in copies:
            assert isinstance(rows, MemoryRows) and offset + target.nbytes <= rows.row_bytes
            copy(rows.address(row_id) + offset, target.data_ptr(), target.nbytes)

    def describe(self) -> str:
        return f"bank {self.name}: {format_bytes(self.used_bytes)} in use"

    @abstractmethod
    def _take(self, byte_count: int) -> tuple[Mapping, int, int]:
        """Memory for a tensor: its mapping, the offset in there, and the bytes that it uses up."""


class DramBank(MemoryBank):
    """Anonymous memory of this process, mapped in exact sizes, wherever the process' own policy puts it."""

    def _take(self, byte_count: int) -> tuple[Mapping, int, int]:
        return Mapping.anonymous(byte_count), 0, byte_count


class NumaBank(MemoryBank):
    """Memory of one NUMA node, bound, touched and verified page by page.

    Args:
        node: its number.
        is_cxl: whether a CXL region is behind it.
    """

    def __init__(
        self,
        node: int,
        identity: str,
        capacity_bytes: int | None,
        profile: BankProfile,
        *,
        is_cxl: bool,
        sysfs: Path = Path("/sys"),
    ) -> None:
        super().__init__(f"numa:{node}", identity, capacity_bytes, profile)
        self.node = node
        self.tier = "cxl" if is_cxl else "dram"
        # A node without CXL is DRAM that the machine's own figures of free memory count.
        self.shares_host_memory = not is_cxl
        self._sysfs = sysfs
        self._mappings: list[Mapping] = []
        #: Where `verify_some` goes on, as (mapping, offset), and what it has found astray since it began at the first.
        self._next_look = (0, 0)
        self._found_bytes = 0

    def verify(self) -> int:
        """See `MemoryBank`.

        Pinning moves pages off movable memory, and a node that goes offline hands its pages on, both without a word.
        """
        placements = [memory.verify(mapping, self.node) for mapping in self._mappings]
        self.astray_bytes = sum(placement.astray_bytes for placement in placements)
        return self.astray_bytes

    def verify_tensor(self, index: int) -> int:
        return memory.verify(self._mappings[index], self.node).astray_bytes

    def bring_back(self) -> int:
        for mapping in self._mappings:
            memory.bring_back(mapping, self.node)
        return self.verify()

    def verify_some(self) -> int:
        """Like `verify`, about the next few pages: short enough to be asked again and again while serving.

        Returns:
            The bytes that are known to be elsewhere; fewer than before only once all pages were asked about again.
        """
        index, start = self._next_look
        if index < len(self._mappings):
            mapping = self._mappings[index]
            byte_count = min(_LOOK_BYTES, mapping.byte_count - start)
            self._found_bytes += memory.verify(mapping, self.node, start, byte_count).astray_bytes
            is_done = start + byte_count == mapping.byte_count
            self._next_look = (index + 1, 0) if is_done else (index, start + byte_count)
        self.astray_bytes = max(self.astray_bytes, self._found_bytes)
        if self._next_look[0] >= len(self._mappings):
            self.astray_bytes, self._found_bytes, self._next_look = self._found_bytes, 0, (0, 0)
        return self.astray_bytes

    def describe(self) -> str:
        if self.astray_bytes:
            return f"{super().describe()}, {format_bytes(self.astray_bytes)} of it NOT on node {self.node}"
        return f"{super().describe()}, every page on node {self.node}"

    def _take(self, byte_count: int) -> tuple[Mapping, int, int]:
        mapping = Mapping.anonymous(byte_count)
        placement = memory.place(mapping, self.node, sysfs=self._sysfs)
        if self.strict_placement and not placement.is_achieved:
            raise misplaced(self.name, placement.describe())
        self._mappings.append(mapping)
        if not placement.is_achieved:
            # The bytes are right wherever they are: serving goes on, slower, and says so.
            self.verify()
            logger.warning("MoE offload: bank %s: %s", self.name, placement.describe())
        return mapping, 0, byte_count


class DaxBank(MemoryBank):
    """A range of a devdax device such as /dev/dax0.0, handed out from its start; what it held is overwritten.

    Args:
        path: the device.
        capacity_bytes, offset: the range; both are rounded down to the device's alignment.

    Raises:
        ConfigError: it is no devdax device, or another bank has this range.
        CapacityError: the range ends beyond the device.
    """

    tier: Tier = "cxl"
    shares_host_memory = False

    def __init__(
        self,
        path: Path,
        identity: str,
        capacity_bytes: int,
        offset: int,
        profile: BankProfile,
        *,
        is_file_allowed: bool = False,
    ) -> None:
        capacity_bytes -= capacity_bytes % _DAX_ALIGN_BYTES
        offset -= offset % _DAX_ALIGN_BYTES
        super().__init__(f"dax:{path}", identity, capacity_bytes, profile)
        if not capacity_bytes:
            raise CapacityError(
                f'--moe-offload-config: banks="dax:{path}" leaves a rank less than {format_bytes(_DAX_ALIGN_BYTES)}, '
                "which is the least that can be mapped: raise its size"
            )
        self._region = Mapping.dax(path, capacity_bytes, offset, is_file_allowed=is_file_allowed)
        self._lock = _lock_range(path, offset, capacity_bytes)

    def _take(self, byte_count: int) -> tuple[Mapping, int, int]:
        # Rows of the next tensor start on a page of their own.
        return self._region, self.used_bytes, -(-byte_count // mmap.PAGESIZE) * mmap.PAGESIZE


def _lock_range(path: Path, offset: int, byte_count: int) -> int:
    """Keep other engines and other models off a range of a device; the kernel lets go when this process ends.

    Raises:
        ConfigError: somebody has it.
    """
    file = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        # Locks of an open file description, so that a second bank of this very process is refused too.
        fcntl.fcntl(file, fcntl.F_OFD_SETLK, struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, offset, byte_count, 0))
    except OSError as error:
        os.close(file)
        raise ConfigError(
            f'--moe-offload-config: banks="dax:{path}" is in use by another engine or model ({error.strerror}): give '
            "each a device of its own"
        ) from error
    return file
