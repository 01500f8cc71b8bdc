"""Runs a kernel on memory right before, and right after, pages that may not be touched: whoever does is killed."""

from __future__ import annotations

import ctypes
import mmap
import sys

import torch
from moecxl_kernels.gate import gate_lookahead
from moecxl_kernels.gather import gather_slabs, slab_map
from moecxl_kernels.remap import remap

from tests.kernels.stage import int32

_PAGE = mmap.PAGESIZE
_PROT_NONE = 0


class Edge:
    """Some pages between two that may not be touched."""

    def __init__(self, page_count: int) -> None:
        self._map = mmap.mmap(-1, (page_count + 2) * _PAGE)
        whole = torch.frombuffer(self._map, dtype=torch.uint8)
        libc = ctypes.CDLL(None, use_errno=True)
        for address in (whole.data_ptr(), whole.data_ptr() + (page_count + 1) * _PAGE):
            if libc.mprotect(ctypes.c_void_p(address), ctypes.c_size_t(_PAGE), _PROT_NONE):
                raise OSError(ctypes.get_errno(), "mprotect")
        self.bytes = whole[_PAGE : (page_count + 1) * _PAGE]

    def last(self, byte_count: int) -> torch.Tensor:
        """[byte_count] uint8, up to the edge."""
        return self.bytes[len(self.bytes) - byte_count :]


def run_gather(beyond: int) -> None:
    """Sizes and alignments of both paths, at either edge."""
    for size in (1, 15, 16, 100, 4096, 16384 + 48, 16384 + 3):
        for is_last in (True, False):
            edges = [Edge(5), Edge(5)]
            source, target = (edge.last(size) if is_last else edge.bytes[:size] for edge in edges)
            source.fill_(size % 251)
            first = 0 if is_last else -beyond
            slabs = slab_map(
                [[source.data_ptr() + first]], [target.data_ptr() + first], [size + beyond], [size + beyond], "cpu"
            )
            gather_slabs(int32([0, 0], 1, 2), int32([1]), slabs, 2)
            assert torch.equal(source, target)


def run_remap(beyond: int) -> None:
    """Ids, slot table and result that end at the edge."""
    edges = [Edge(1) for _ in range(4)]
    ids = edges[0].last(15 * 4).view(torch.int32).view(5, 3)
    padding = edges[1].last(5).view(torch.bool)
    slot_of = edges[2].last(9 * 4).view(torch.int32)
    out = edges[3].last(15 * 4).view(torch.int32).view(5, 3)
    if beyond:
        ids = ids.as_strided((6, 3), (3, 1))
        padding, out = torch.zeros(6, dtype=torch.bool), torch.zeros((6, 3), dtype=torch.int32)
    remap(ids, padding, slot_of, out)


def run_gate(beyond: int) -> None:
    """Input, gates and result that end at the edge."""
    edges = [Edge(8) for _ in range(3)]
    x = edges[0].last(2 * 300 * 4).view(torch.float32).view(2, 300)
    weight = edges[1].last(18 * 300 * 4).view(torch.float32).view(1, 18, 300)
    out = edges[2].last(2 * 2 * 18 * 8).view(torch.int64).view(2, 36)
    if beyond:
        weight = weight.as_strided((1, 19, 300), weight.stride())
        out = torch.zeros((2, 38), dtype=torch.int64)
    gate_lookahead(x, weight, None, None, int32([1]), out, 2)


if __name__ == "__main__":
    {"gather": run_gather, "remap": run_remap, "gate": run_gate}[sys.argv[1]](int("--beyond" in sys.argv))
