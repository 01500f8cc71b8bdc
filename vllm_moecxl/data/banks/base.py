"""What a bank is, whatever it is made of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

import torch

from vllm_moecxl.control.chunking import chunk_bytes_at
from vllm_moecxl.types import Tier

#: Where a profile's figures come from: measured by `moecxl profile`, the parameters of an emulated device, or figures
#: published for memory of this kind.
ProfileSource = Literal["measured", "emulated", "published"]


@dataclass(frozen=True)
class BankProfile:
    """What a bank can do.

    Attributes:
        latency_s: of a small read from the idle bank, seconds.
        read_bytes_per_s: of large reads by as many readers as it takes.
        source: where the figures come from.
    """

    latency_s: float
    read_bytes_per_s: float
    source: ProfileSource

    @property
    def chunk_bytes(self) -> int:
        """What one copy from the bank moves."""
        return chunk_bytes_at(self.read_bytes_per_s)


class Rows(Protocol):
    """Rows of one tensor, or the same part of each, in one bank."""

    @property
    def row_bytes(self) -> int:
        """Bytes of one row, or of its part."""


class RowCopy(NamedTuple):
    """One read from a bank: a row from `offset` on, and the 1-D uint8 host tensor that it fills."""

    rows: Rows
    row_id: int
    target: torch.Tensor
    offset: int = 0


class Bank(Protocol):
    """One place that homes slabs.

    Attributes:
        name: its label in logs and metrics.
        identity: the same for this place after a restart; placement and profiles are keyed on it.
        tier: class of its memory.
        capacity_bytes: bytes that it may home; None where nothing but the machine limits it.
        used_bytes: bytes handed out.
        astray_bytes: bytes that are not where they were asked to be; 0 in a bank that keeps its promise.
        profile: what it can do.
        shares_host_memory: whether what it homes comes out of the host's DRAM.
        chunk_bytes: what one copy from it moves.
        reader_count: threads that it takes to keep it busy.
        reads_directly: whether its rows are tensors that anyone may copy from, past `read`.
    """

    name: str
    identity: str
    tier: Tier
    capacity_bytes: int | None
    used_bytes: int
    astray_bytes: int
    profile: BankProfile
    shares_host_memory: bool
    reader_count: int

    @property
    def chunk_bytes(self) -> int: ...

    @property
    def reads_directly(self) -> bool: ...

    def read(self, copies: Sequence[RowCopy]) -> None:
        """Fill every target; returns when all of them are filled. Any number of threads.

        Raises:
            TransferError: the bank cannot be read.
            IntegrityError: what was read is not what was stored.
        """

    def describe(self) -> str:
        """What was achieved, in words, for the log."""
