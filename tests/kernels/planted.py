"""Kernels that are wrong on purpose: what looks at compiled kernels has to find them out.

Imported only where kernels are compiled: it writes variants of our kernels' source into files, as Triton wants them.
"""

from __future__ import annotations

import atexit
import importlib.util
import tempfile
from functools import cache, partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import triton
import triton.language as tl
from moecxl_kernels import gather, remap

from tests.kernels.cases import Call, int32

_folder = tempfile.TemporaryDirectory()
atexit.register(_folder.cleanup)

_TILE = 128


@cache
def _variant(module: ModuleType, old: str, new: str) -> Any:
    """A module with some of its source replaced."""
    assert module.__file__ is not None
    source = Path(module.__file__).read_text()
    assert old in source, f"{module.__name__} has no {old!r}"
    path = Path(_folder.name, f"variant_{len(list(Path(_folder.name).iterdir()))}.py")
    path.write_text(source.replace(old, new))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    variant = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(variant)
    return variant


def _gather(old: str, new: str, *sizes: int) -> None:
    module = _variant(gather, old, new)
    zeros = [0] * len(sizes)
    slabs = module.slab_map([zeros] * 8, zeros, sizes, sizes, "cpu")
    module.gather_slabs(int32(4, 2), int32(1), slabs, 32)


def _remap(old: str, new: str, begin: int) -> None:
    ids = int32(4, 4, begin=begin)
    _variant(remap, old, new).remap(ids, None, int32(128), int32(4, 4))


@triton.jit
def _transpose(x, out, TILE: tl.constexpr):
    rows, columns = tl.arange(0, TILE)[:, None], tl.arange(0, TILE)[None, :]
    tile = tl.load(x + rows * TILE + columns)
    tl.store(out + columns * TILE + rows, tile + tl.cumsum(tile, axis=0))


def _much_shared() -> None:
    tile = torch.zeros((_TILE, _TILE))
    _transpose[(1,)](tile, tile.clone(), TILE=_TILE, num_warps=32)


def _cast(name: str) -> tuple[str, str]:
    cast = f"{name}.to(tl.pointer_type(tl.int32))"
    return f"tl.multiple_of({cast}, 16)", cast


#: Each is found out, on NVIDIA at least.
CALLS: dict[str, Call] = {
    "source of unknown alignment": partial(_gather, *_cast("source"), 1 << 20, 48),
    "target of unknown alignment": partial(_gather, *_cast("target"), 1 << 20, 48),
    "mask by bytes": partial(_gather, "words < size // 16 * 4", "words * 4 < size", 1 << 20, 48),
    "bytes only": partial(_gather, "if (source | target) % 16 == 0:", "if BLOCK_BYTES < 0:", 1 << 20, 48),
    "one access more": partial(
        _gather, "done = 0\n", "done = 0\n        stray = sizes + 1\n        tl.store(stray, 1)\n", 48
    ),
    "many registers": partial(_gather, "_LOADS = 8", "_LOADS = 32", 1 << 20, 48),
    "more than registers hold": partial(_gather, "_LOADS = 8", "_LOADS = 128", 1 << 20, 48),
    "much shared memory": _much_shared,
}

_COUNTS = 'do_not_specialize=["segment_count", "block_count"]'
_POINTERS = "do_not_specialize_on_alignment=_POINTERS"
#: Each takes more than one compilation.
ALIKE: dict[str, list[Call]] = {
    "a count is compiled in": [partial(_gather, _COUNTS, "do_not_specialize=[]", *[48] * count) for count in (1, 16)],
    "an alignment is compiled in": [
        partial(_remap, _POINTERS, "do_not_specialize_on_alignment=[]", begin) for begin in (0, 1)
    ],
}
