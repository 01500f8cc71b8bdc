"""A slab file as a bank: every expert has a home in it, and reads go past the page cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vllm_moecxl.data.banks.base import BankProfile, RowCopy
from vllm_moecxl.data.slabfile import PackedLayer, SlabFile
from vllm_moecxl.linux.direct_file import CHUNK_BYTES, READER_COUNT
from vllm_moecxl.types import Tier
from vllm_moecxl.units import format_bytes


@dataclass(frozen=True)
class FileRows:
    """Rows of one tensor in a slab file, one after the other.

    Attributes:
        start: offset of row 0.
        row_bytes: bytes of a row.
    """

    start: int
    row_bytes: int


class FileBank:
    """See `Bank`. It is read only: what it homes was packed before.

    Raises:
        ConfigError, IntegrityError: the file cannot be opened or is no sound slab file.
    """

    tier: Tier = "file"
    shares_host_memory = False
    reads_directly = False
    chunk_bytes = CHUNK_BYTES
    reader_count = READER_COUNT

    def __init__(self, path: Path, identity: str, profile: BankProfile) -> None:
        self.slabs = SlabFile(path)
        self.name = f"file:{path.name}"
        self.identity = identity
        self.capacity_bytes: int | None = None
        self.profile = profile
        self.used_bytes = 0
        self.astray_bytes = 0

    def rows(self, layer: PackedLayer) -> list[FileRows]:
        """The rows of a layer's experts, per extent."""
        return [
            FileRows(start, extent.row_bytes) for start, extent in zip(layer.starts, layer.layout.extents, strict=True)
        ]

    def read(self, copies: Sequence[RowCopy]) -> None:
        reads = []
        for rows, row_id, target, offset in copies:
            assert isinstance(rows, FileRows)
            reads.append((rows.start + row_id * rows.row_bytes + offset, target.numpy().data))
        self.slabs.file.read_into(reads)

    def describe(self) -> str:
        how = "read past the page cache" if self.slabs.file.is_direct else "read through the page cache, dropped after"
        return f"bank {self.name}: {format_bytes(self.used_bytes)} in use, {how}"
