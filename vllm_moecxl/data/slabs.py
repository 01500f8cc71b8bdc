"""Homes and slots of one layer: where its slabs lie, and the cells that they are copied to.

A *slab* is one expert's row of each per-expert tensor. A *shard* is what one bank homes of a layer: whole slabs, or the
same part of each of them where slabs are striped. Inside a shard every tensor has its experts in order.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from blake3 import blake3

from vllm_moecxl.config import Verify
from vllm_moecxl.control.placement import Route
from vllm_moecxl.control.striping import cut
from vllm_moecxl.data.banks.base import Bank, RowCopy, Rows
from vllm_moecxl.data.banks.file import FileBank
from vllm_moecxl.data.banks.memory import DramBank, MemoryBank, MemoryRows
from vllm_moecxl.data.devices.base import DeviceBackend
from vllm_moecxl.data.layout import SlabLayout, as_bytes
from vllm_moecxl.data.slabfile import PackedLayer
from vllm_moecxl.errors import IntegrityError
from vllm_moecxl.units import KIB

#: Stripes cut rows at pages, so that parts are as aligned as whole rows.
STRIPE_GRANULE_BYTES = 4 * KIB

#: Per extent, the [row bytes] uint8 tensor that one slab is read into.
SlabTarget = Sequence[torch.Tensor]


class Span(NamedTuple):
    """Bytes [start, stop) of a slab's row of one extent."""

    extent_id: int
    start: int
    stop: int


@dataclass(frozen=True)
class Shard:
    """What one bank has of one layer.

    Attributes:
        bank: who owns the bytes.
        rows: per extent; None where a row is too short for this bank to have a part of it.
        cuts: per extent, the [start, stop) bytes of each row that are here.
    """

    bank: Bank
    rows: tuple[Rows | None, ...]
    cuts: tuple[tuple[int, int], ...]

    def copy_of(self, row_id: int, span: Span, target: torch.Tensor) -> RowCopy:
        """The read of a span of one slab; `target` has its size."""
        rows = self.rows[span.extent_id]
        assert rows is not None
        return RowCopy(rows, row_id, target, span.start - self.cuts[span.extent_id][0])


class Place(NamedTuple):
    """Where a part of one slab may be read: a row of a shard."""

    shard_id: int
    row_id: int


class Piece(NamedTuple):
    """What one copy moves of a slab: bytes that lie in the same bank.

    Attributes:
        spans: of the slab, together not much more than the bank's chunk.
        byte_count: their sum.
        places: the home first, then replicas.
    """

    spans: tuple[Span, ...]
    byte_count: int
    places: tuple[Place, ...]


class Home:
    """All slabs of one layer.

    Args:
        layout: of a slab.
        shards: what the banks have.
        places: per expert, the places that its slab is made of.
        verify: when slabs are held against `digests`.
        digests: [experts] BLAKE3 digests; None where nothing is to be verified.
        replica: a shard that has every slab whole, in order of the experts, beside the homes.

    Attributes:
        tensors: per extent [experts, ...] host tensors with all experts in order, where one bank of addressable memory
            has the whole layer; else None.
        is_direct: whether `tensors` may be read by anyone, past the bank.
    """

    def __init__(
        self,
        name: str,
        layout: SlabLayout,
        shards: Sequence[Shard],
        places: Sequence[Sequence[Place]],
        verify: Verify,
        digests: Sequence[bytes] | None,
        replica: Shard | None = None,
    ) -> None:
        self.name = name
        self.layout = layout
        self.tensors = _whole_tensors(shards, len(places))
        self.is_direct = self.tensors is not None and shards[0].bank.reads_directly
        self.shards = (*shards, *([] if replica is None else [replica]))
        self._replica_id = None if replica is None else len(shards)
        self._places = places
        self._digests = digests if verify != "off" else None
        self._verifies_once = verify == "load"
        self._verified: set[int] = set()
        #: Cuts into pieces, by the shards that a slab is made of: the same for all experts of a route.
        self._cuts: dict[tuple[int, ...], list[tuple[int, tuple[Span, ...], int]]] = {}

    @property
    def slab_bytes(self) -> int:
        return self.layout.slab_bytes

    @property
    def expert_count(self) -> int:
        return len(self._places)

    def pieces(self, expert_id: int) -> list[Piece]:
        """A slab in the pieces that one copy each moves."""
        places = self._places[expert_id]
        key = tuple(place.shard_id for place in places)
        if key not in self._cuts:
            self._cuts[key] = [
                (index, spans, sum(span.stop - span.start for span in spans))
                for index, shard_id in enumerate(key)
                for spans in _chunks(self.shards[shard_id].cuts, self.shards[shard_id].bank.chunk_bytes)
            ]
        replicas = () if self._replica_id is None else (Place(self._replica_id, expert_id),)
        return [
            Piece(spans, byte_count, (places[index],) if places[index] in replicas else (places[index], *replicas))
            for index, spans, byte_count in self._cuts[key]
        ]

    def parts(self, expert_id: int) -> list[tuple[Shard, Place]]:
        """The shards that a slab's home is made of, and its place in each; without replicas."""
        return [(self.shards[place.shard_id], place) for place in self._places[expert_id]]

    def bytes_by_bank(self, expert_ids: Sequence[int]) -> Counter[str]:
        """Bytes of these experts in each bank that is their home, by name."""
        total: Counter[str] = Counter()
        for expert_id in expert_ids:
            for shard_id, _ in self._places[expert_id]:
                shard = self.shards[shard_id]
                if byte_count := sum(stop - start for start, stop in shard.cuts):
                    total[shard.bank.name] += byte_count
        return total

    def read(self, expert_id: int, target: SlabTarget) -> None:
        """Read a slab into host memory, part by part, in the calling thread.

        Raises:
            TransferError: a bank cannot be read.
            IntegrityError: the slab is not what was stored.
        """
        for piece in self.pieces(expert_id):
            self.read_piece(piece, 0, [target[extent_id][start:stop] for extent_id, start, stop in piece.spans])
        if self.needs_check(expert_id):
            self.check(expert_id, target)

    def read_piece(self, piece: Piece, source: int, targets: Sequence[torch.Tensor]) -> None:
        """Read one piece from one of its places into host memory, a target for each span.

        Raises:
            TransferError: the bank cannot be read.
        """
        shard_id, row_id = piece.places[source]
        shard = self.shards[shard_id]
        shard.bank.read(
            [shard.copy_of(row_id, span, target) for span, target in zip(piece.spans, targets, strict=True)]
        )

    def needs_check(self, expert_id: int) -> bool:
        """Whether a slab is to be held against its digest once it has been read."""
        return self._digests is not None and expert_id not in self._verified

    def check(self, expert_id: int, slab: SlabTarget) -> None:
        """Hold a slab that was read against its digest. Any thread.

        Raises:
            IntegrityError: it is not what was stored.
        """
        assert self._digests is not None
        if digest_of(slab) != self._digests[expert_id]:
            banks = ", ".join(self.bytes_by_bank([expert_id]))
            raise IntegrityError(
                f"expert {expert_id} of {self.name} is not what was stored in bank {banks}: the memory or the disk "
                "is failing or the file was changed, pack or load the model again on a sound device"
            )
        if self._verifies_once:
            self._verified.add(expert_id)


def _chunks(cuts: Sequence[tuple[int, int]], chunk_bytes: int) -> Iterator[tuple[Span, ...]]:
    """The bytes of a slab that a shard has, in copies of at most `chunk_bytes`.

    Each extent is cut at multiples of `chunk_bytes` from its own start, so that direct reads stay aligned; what is left
    of it shares a copy with the next extents where they fit.
    """
    spans: list[Span] = []
    room = chunk_bytes
    for extent_id, (start, stop) in enumerate(cuts):
        for span_start in range(start, stop, chunk_bytes):
            span = Span(extent_id, span_start, min(span_start + chunk_bytes, stop))
            byte_count = span.stop - span.start
            if byte_count > room:
                yield tuple(spans)
                spans, room = [], chunk_bytes
            spans.append(span)
            room -= byte_count
    if spans:
        yield tuple(spans)


def digest_of(slab: SlabTarget) -> bytes:
    """BLAKE3 over a slab's rows, its extents in order."""
    digest = blake3()
    for row in slab:
        digest.update(row.numpy().data)
    return digest.digest()


def _whole_tensors(shards: Sequence[Shard], expert_count: int) -> tuple[torch.Tensor, ...] | None:
    rows = shards[0].rows
    if len(shards) > 1 or not all(isinstance(one, MemoryRows) and len(one.tensor) == expert_count for one in rows):
        return None
    return tuple(one.tensor for one in rows if isinstance(one, MemoryRows))


class HomeBuilder:
    """Makes the homes of a model's layers in its banks.

    Args:
        banks: in the order that routes refer to.
        verify: when slabs are held against their digests.
    """

    def __init__(self, banks: Sequence[Bank], verify: Verify) -> None:
        self._banks = banks
        self._verify: Verify = verify

    def store(self, name: str, tensors: dict[str, torch.Tensor], routes: Sequence[Route]) -> Home:
        """Copy kernel-format tensors ([experts, ...], any device) home; empties `tensors`.

        Args:
            name: the layer's name.
            routes: per expert, where its slab is to lie.

        Raises:
            CapacityError: a bank is full.
        """
        layout = SlabLayout.of(tensors)
        plan = _Plan(self._banks, layout, routes)
        digests = [blake3() for _ in routes] if self._verify == "fetch" else None
        for extent_id, extent_name in enumerate(list(tensors)):
            source = tensors.pop(extent_name)
            for group in plan.groups:
                group.store(extent_id, source)
            if digests is not None:
                for digest, row in zip(digests, as_bytes(source), strict=True):
                    digest.update(row.cpu().numpy().data)
        sums = None if digests is None else [digest.digest() for digest in digests]
        return Home(name, layout, plan.shards, plan.places, self._verify, sums)

    def borrow(self, name: str, layout: SlabLayout, tensors: Sequence[torch.Tensor]) -> Home:
        """A home for a while, on host tensors that belong to somebody else; per extent [experts, ...]."""
        expert_count = tensors[0].shape[0]
        owner = DramBank(self._banks[0].name, "", None, self._banks[0].profile)
        shard = Shard(owner, tuple(map(MemoryRows.of, tensors)), _whole(layout))
        return Home(name, layout, [shard], [[Place(0, row)] for row in range(expert_count)], "off", None)

    def adopt(self, packed: PackedLayer, bank: FileBank, routes: Sequence[Route]) -> Home:
        """A home for a layer of a slab file: what is routed to the file stays there, the rest is read into its bank.

        Raises:
            CapacityError: a bank is full.
            IntegrityError: a slab that was read is not what was packed.
        """
        plan = _Plan(self._banks, packed.layout, routes, bank.rows(packed))
        file = Shard(bank, tuple(bank.rows(packed)), _whole(packed.layout))
        digests = packed.digests if self._verify != "off" else None
        in_file = [[Place(0, expert_id)] for expert_id in range(packed.expert_count)]
        source = Home(packed.name, packed.layout, [file], in_file, "fetch", digests)
        staging = [torch.empty(extent.row_bytes, dtype=torch.uint8) for extent in packed.layout.extents]
        for group in plan.groups:
            if group.is_filled:
                continue
            for index, expert_id in enumerate(group.expert_ids):
                source.read(expert_id, staging)
                group.fill(index, staging)
        # What has its home in memory can be read from the file as well, when the memory's link is busy.
        replica = None if all(group.is_filled for group in plan.groups) else file
        return Home(packed.name, packed.layout, plan.shards, plan.places, self._verify, digests, replica)


def _whole(layout: SlabLayout) -> tuple[tuple[int, int], ...]:
    return tuple((0, extent.row_bytes) for extent in layout.extents)


class _Group:
    """The experts of a layer that have one route: a shard in each bank of it."""

    def __init__(self, expert_ids: list[int], shards: list[Shard], *, is_filled: bool) -> None:
        self.expert_ids = expert_ids
        self.shards = shards
        self.is_filled = is_filled

    def store(self, extent_id: int, source: torch.Tensor) -> None:
        """Copy one tensor's rows of these experts from a [experts, ...] tensor on any device."""
        source_rows = as_bytes(source)
        for shard in self.shards:
            rows, (start, stop) = shard.rows[extent_id], shard.cuts[extent_id]
            if isinstance(rows, MemoryRows):
                if len(self.expert_ids) == len(source):
                    rows.as_bytes.copy_(source_rows[:, start:stop])
                    continue
                for index, expert_id in enumerate(self.expert_ids):
                    rows.as_bytes[index].copy_(source_rows[expert_id, start:stop])

    def fill(self, index: int, slab: SlabTarget) -> None:
        """Copy one whole slab into place."""
        for shard in self.shards:
            for rows, (start, stop), row in zip(shard.rows, shard.cuts, slab, strict=True):
                if isinstance(rows, MemoryRows):
                    rows.as_bytes[index].copy_(row[start:stop])


class _Plan:
    """Shards for the routes of a layer, allocated."""

    def __init__(
        self, banks: Sequence[Bank], layout: SlabLayout, routes: Sequence[Route], packed: Sequence[Rows] | None = None
    ) -> None:
        self.shards: list[Shard] = []
        self.groups: list[_Group] = []
        places: dict[int, list[Place]] = {}
        by_route: dict[Route, list[int]] = {}
        for expert_id, route in enumerate(routes):
            by_route.setdefault(route, []).append(expert_id)
        for route, expert_ids in by_route.items():
            bank = banks[route[0].bank_index]
            if isinstance(bank, FileBank):
                assert packed is not None and len(route) == 1, "a file has whole slabs, and was packed before"
                bank.used_bytes += len(expert_ids) * layout.slab_bytes
                group = _Group(expert_ids, [Shard(bank, tuple(packed), _whole(layout))], is_filled=True)
                rows = expert_ids
            else:
                group = _Group(expert_ids, _allocate(banks, layout, route, len(expert_ids)), is_filled=False)
                rows = list(range(len(expert_ids)))
            shard_ids = range(len(self.shards), len(self.shards) + len(group.shards))
            for expert_id, row_id in zip(expert_ids, rows, strict=True):
                places[expert_id] = [Place(shard_id, row_id) for shard_id in shard_ids]
            self.shards += group.shards
            self.groups.append(group)
        self.places = [places[expert_id] for expert_id in range(len(routes))]


def _allocate(banks: Sequence[Bank], layout: SlabLayout, route: Route, count: int) -> list[Shard]:
    """A shard in each bank of a route, with room for `count` slabs."""
    weights = [part.share for part in route]
    cuts = [cut(extent.row_bytes, weights, STRIPE_GRANULE_BYTES) for extent in layout.extents]
    shards = []
    for index, part in enumerate(route):
        bank = banks[part.bank_index]
        assert isinstance(bank, MemoryBank)
        rows: list[Rows | None] = []
        for extent, pieces in zip(layout.extents, cuts, strict=True):
            start, stop = pieces[index]
            if start == stop:
                rows.append(None)
            elif stop - start == extent.row_bytes:
                rows.append(MemoryRows.of(bank.allocate((count, *extent.row_shape), extent.dtype)))
            else:
                rows.append(MemoryRows.of(bank.allocate((count, stop - start), torch.uint8)))
        shards.append(Shard(bank, tuple(rows), tuple(pieces[index] for pieces in cuts)))
    return shards


class Cells:
    """Device memory for a number of slabs: the slots of a layer, or a layer buffer.

    Args:
        behind: a layer buffer that kernels shall reach through the tensors of these cells, where the device allows it.

    Attributes:
        tensors: per extent [cells, ...] tensors on the compute device; the rows of `behind` follow where they can be
            reached.
        behind_row: row of `tensors` at which those begin; None where they do not follow.
    """

    def __init__(
        self, layout: SlabLayout, cell_count: int, backend: DeviceBackend, *, behind: LayerCells | None = None
    ) -> None:
        self.cell_count = cell_count
        self._backend = backend
        joined = None if behind is None else behind.joined_to(cell_count)
        self.behind_row = None if joined is None else cell_count
        self.tensors = joined or self._allocate(layout)
        self._as_bytes = tuple(map(as_bytes, self.tensors))

    def _allocate(self, layout: SlabLayout) -> tuple[torch.Tensor, ...]:
        return tuple(
            self._backend.allocate((self.cell_count, *extent.row_shape), extent.dtype) for extent in layout.extents
        )

    def rows(self, cell_id: int) -> list[torch.Tensor]:
        """One cell, per extent as a [row bytes] uint8 tensor."""
        assert cell_id < self.cell_count
        return [rows[cell_id] for rows in self._as_bytes]

    def take(self, cells: Cells, from_ids: list[int], cell_ids: list[int]) -> None:
        """Copy slabs from other cells of the same layout, in order with the kernels of the calling thread."""
        self._backend.copy_rows(cells.tensors, from_ids, self.tensors, cell_ids)


class LayerCells(Cells):
    """The cells of a layer buffer, which several layers' slots may be joined to."""

    def _allocate(self, layout: SlabLayout) -> tuple[torch.Tensor, ...]:
        return tuple(
            self._backend.allocate_tail((self.cell_count, *extent.row_shape), extent.dtype) for extent in layout.extents
        )

    def joined_to(self, cell_count: int) -> tuple[torch.Tensor, ...] | None:
        """Per extent a [cells + rows of this buffer, ...] tensor that ends with this buffer's memory."""
        joined = [self._backend.allocate_before(cell_count, tensor) for tensor in self.tensors]
        found = tuple(tensor for tensor in joined if tensor is not None)
        return found if len(found) == len(joined) else None
