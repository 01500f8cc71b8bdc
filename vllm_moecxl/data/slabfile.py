"""Slab files: the experts of one rank in the kernel's own format, packed once and served from.

A slab file is a valid safetensors file. Its data are, in this order:

- per layer and tensor the experts in order, `LAYER/TENSOR` [experts, ...], each tensor from a multiple of
  `ALIGN_BYTES` on (`pad/N` fills the gaps, since safetensors allows none), so that rows can be read directly;
- the *tail*: per layer the digests of its slabs, `LAYER/digests` [experts, 32], what the kernel keeps beside the rows
  of experts, `LAYER/shared/NAME`, and the outputs of a self-check, `LAYER/check/N`;
- `seal` [32], a BLAKE3 digest of the header and the tail.

The header's metadata say what it was packed for (`fingerprint`) and how the layers look (`layers`). The header is
written last, so that a file whose packing was interrupted has none.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from blake3 import blake3

from vllm_moecxl.data.layout import Extent, SlabLayout
from vllm_moecxl.errors import IntegrityError
from vllm_moecxl.linux.direct_file import DirectFile
from vllm_moecxl.units import KIB, MIB

FORMAT = "vllm_moecxl slabs 1"
ALIGN_BYTES = 4 * KIB
DIGEST_BYTES = 32
#: Dimensions of a tensor, and outputs of a self-check: more than any kernel has, so that no header is worth long sums.
_DIMENSION_COUNT_MAX = 8
_CHECK_COUNT_MAX = 64
#: safetensors' own limit.
_HEADER_BYTES_MAX = 100_000_000
#: The length of the header, in front of it.
LENGTH_BYTES = 8
#: Read or written at a time.
COPY_BYTES = 64 * MIB

TO_SAFETENSORS = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.int16: "I16",
    torch.int32: "I32",
    torch.int64: "I64",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float32: "F32",
    torch.float64: "F64",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.float8_e8m0fnu: "F8_E8M0",
}
_FROM_SAFETENSORS = {name: dtype for dtype, name in TO_SAFETENSORS.items()}


@dataclass(frozen=True)
class _Entry:
    """One tensor of the file; `start` counts from the beginning of the file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int

    @property
    def byte_count(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class PackedLayer:
    """What a slab file has of one layer.

    Attributes:
        name: the layer's name.
        expert_count: its experts.
        kernel_name: the kernel whose format this is.
        layout: its slabs.
        starts: per extent, where its first row is in the file; rows follow each other.
        digests: [experts] BLAKE3 digest of each slab, its extents in order.
        shared: what the kernel keeps beside the rows of experts.
        check: outputs of the resident layer for the batches of a self-check; empty where there was none.
    """

    name: str
    expert_count: int
    kernel_name: str
    layout: SlabLayout
    starts: tuple[int, ...]
    digests: tuple[bytes, ...]
    shared: Mapping[str, torch.Tensor]
    check: tuple[torch.Tensor, ...]


class SlabFile:
    """A slab file that is open for reading and whose header and tail have been found sound.

    Attributes:
        path: where it is.
        fingerprint: what it was packed for.
        layers: by name.
    """

    def __init__(self, path: Path) -> None:
        """Open and check everything but the slabs themselves.

        Raises:
            ConfigError: there is no such file.
            IntegrityError: it is not a slab file, or truncated, or changed since it was packed.
        """
        self.path = path
        self.file = DirectFile(path)
        try:
            self.fingerprint, self.layers = _read(self.file)
        except BaseException as error:
            self.file.close()
            if isinstance(error, _MalformedError):
                raise IntegrityError(
                    f'--moe-offload-config: banks="file:{path}" is not a sound slab file ({error}): name a file that '
                    "moecxl pack wrote, or pack the model again"
                ) from error
            raise

    def close(self) -> None:
        """Close the file."""
        self.file.close()

    def require_fingerprint(self, wanted: Mapping[str, str]) -> None:
        """Refuse to serve another model, or on another machine, than this file was packed for.

        Raises:
            IntegrityError: names each difference.
        """
        different = [
            f"{key} {self.fingerprint.get(key, 'unknown')} instead of {wanted.get(key, 'unknown')}"
            for key in sorted(wanted.keys() | self.fingerprint.keys())
            if self.fingerprint.get(key) != wanted.get(key)
        ]
        if different:
            raise IntegrityError(
                f'--moe-offload-config: banks="file:{self.path}" was packed for {", ".join(different)}: '
                "run moecxl pack for this model and this engine"
            )


class _MalformedError(Exception):
    """Something in a file is not as a packer writes it."""


def _require(condition: bool, sentence: str) -> None:
    if not condition:
        raise _MalformedError(sentence)


def _read(file: DirectFile) -> tuple[dict[str, str], dict[str, PackedLayer]]:
    """Fingerprint and layers of a file."""
    _require(file.byte_count >= LENGTH_BYTES, "it is too short for a header")
    length = int.from_bytes(file.read(0, LENGTH_BYTES), "little")
    _require(length > 0, "it has no header, so packing did not end")
    data_start = LENGTH_BYTES + length
    _require(length <= _HEADER_BYTES_MAX and data_start <= file.byte_count, "its header is longer than the file")
    header_bytes = file.read(0, data_start)
    header = _parse_json(header_bytes[LENGTH_BYTES:], "its header")
    _require(isinstance(header, dict), "its header is no JSON object")
    metadata = header.pop("__metadata__", None)
    _require(isinstance(metadata, dict) and metadata.get("format") == FORMAT, "it has another format")
    entries = {name: _entry(value, data_start) for name, value in header.items()}
    end = data_start
    for entry in sorted(entries.values(), key=lambda entry: (entry.start, entry.byte_count)):
        _require(entry.start == end, "its tensors overlap or leave gaps")
        end += entry.byte_count
    _require(end == file.byte_count, f"it has {file.byte_count} bytes and its header says {end}")
    _check_seal(file, header_bytes, entries, metadata)
    # The seal says that a packer wrote the header; it does not say that it was our packer.
    fingerprint = _parse_json(metadata.get("fingerprint"), "its fingerprint")
    _require(isinstance(fingerprint, dict) and _is_names([*fingerprint.values()]), "its fingerprint is damaged")
    layers = _parse_json(metadata.get("layers"), "its list of layers")
    _require(isinstance(layers, list) and len(layers) <= len(entries), "its list of layers is damaged")
    packed = [_packed_layer(file, _described(layer), entries) for layer in layers]
    by_name = {layer.name: layer for layer in packed}
    _require(len(by_name) == len(packed), "it has a layer twice")
    return fingerprint, by_name


def _parse_json(text: object, what: str) -> Any:
    try:
        if isinstance(text, str | bytes):
            return json.loads(text)
    except (ValueError, RecursionError):
        pass
    raise _MalformedError(f"{what} is no JSON")


def _entry(value: object, data_start: int) -> _Entry:
    _require(isinstance(value, dict), "its header describes a tensor by no object")
    assert isinstance(value, dict)
    type_name, shape, offsets = value.get("dtype"), value.get("shape"), value.get("data_offsets")
    dtype = _FROM_SAFETENSORS.get(type_name) if isinstance(type_name, str) else None
    is_described = dtype is not None and _is_sizes(shape, _DIMENSION_COUNT_MAX) and _is_sizes(offsets, 2)
    _require(is_described, "its header describes a tensor wrongly")
    assert dtype is not None and isinstance(shape, list) and isinstance(offsets, list)
    _require(len(offsets) == 2, "its header describes a tensor wrongly")
    entry = _Entry(dtype, tuple(shape), data_start + offsets[0])
    _require(entry.byte_count == offsets[1] - offsets[0], "its header gives a tensor another size than its shape")
    return entry


def _is_sizes(value: object, count_max: int) -> bool:
    return (
        isinstance(value, list)
        and len(value) <= count_max
        and all(type(size) is int and 0 <= size < 1 << 63 for size in value)
    )


def _is_names(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def _check_seal(file: DirectFile, header: bytes, entries: Mapping[str, _Entry], metadata: Mapping[str, Any]) -> None:
    seal = entries.get("seal")
    _require(seal is not None and seal.byte_count == DIGEST_BYTES, "it has no seal")
    assert seal is not None
    _require(seal.start + DIGEST_BYTES == file.byte_count, "its seal is not at its end")
    tail_start = metadata.get("tail_start", "")
    is_number = isinstance(tail_start, str) and tail_start.isdecimal() and len(tail_start) < 20
    _require(is_number, "it has no tail")
    start = len(header) + int(tail_start)
    _require(start <= seal.start, "its tail is longer than the file")
    digest = blake3(header)
    for offset in range(start, seal.start, COPY_BYTES):
        digest.update(file.read(offset, min(COPY_BYTES, seal.start - offset)))
    _require(digest.digest() == file.read(seal.start, DIGEST_BYTES), "its header or its tail has changed")


@dataclass
class DescribedLayer:
    """A layer as the header's metadata describe it."""

    name: str
    expert_count: int
    kernel_name: str
    extents: list[str]
    shared: list[str] = field(default_factory=list)
    check_count: int = 0


def _described(raw: object) -> DescribedLayer:
    """A layer's description, as far as it can be told sound without the tensors that it names."""
    _require(
        isinstance(raw, dict) and raw.keys() == {one.name for one in fields(DescribedLayer)}, "it describes no layer"
    )
    assert isinstance(raw, dict)
    layer = DescribedLayer(**raw)
    is_sound = (
        _is_names([layer.name, layer.kernel_name])
        and _is_sizes([layer.expert_count, layer.check_count], 2)
        and _is_names(layer.extents)
        and _is_names(layer.shared)
        and layer.expert_count > 0
        and layer.check_count <= _CHECK_COUNT_MAX
        and 0 < len(layer.extents) == len(set(layer.extents))
    )
    _require(is_sound, "it describes a layer wrongly")
    return layer


def _packed_layer(file: DirectFile, described: DescribedLayer, entries: Mapping[str, _Entry]) -> PackedLayer:
    name, expert_count = described.name, described.expert_count

    def entry_of(entry_name: str) -> _Entry:
        entry = entries.get(f"{name}/{entry_name}")
        _require(entry is not None and entry.byte_count > 0, "it lacks a tensor of a layer")
        assert entry is not None
        return entry

    def tensor(entry_name: str) -> torch.Tensor:
        entry = entry_of(entry_name)
        data = bytearray(file.read(entry.start, entry.byte_count))
        return torch.frombuffer(data, dtype=entry.dtype).view(entry.shape)

    rows = [entry_of(extent) for extent in described.extents]
    for entry in rows:
        is_aligned = entry.start % ALIGN_BYTES == 0
        _require(entry.shape[:1] == (expert_count,) and is_aligned, "it has a tensor that is not a row per expert")
    table = entry_of("digests")
    _require(table.shape == (expert_count, DIGEST_BYTES) and table.dtype == torch.uint8, "it lacks digests")
    digests = file.read(table.start, table.byte_count)
    return PackedLayer(
        name=name,
        expert_count=expert_count,
        kernel_name=described.kernel_name,
        layout=SlabLayout(
            tuple(
                Extent(extent, entry.shape[1:], entry.dtype)
                for extent, entry in zip(described.extents, rows, strict=True)
            )
        ),
        starts=tuple(entry.start for entry in rows),
        digests=tuple(digests[i : i + DIGEST_BYTES] for i in range(0, len(digests), DIGEST_BYTES)),
        shared={shared: tensor(f"shared/{shared}") for shared in described.shared},
        check=tuple(tensor(f"check/{index}") for index in range(described.check_count)),
    )
