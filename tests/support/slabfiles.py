"""Slab files for tests: small ones, taken apart and put together again with whatever header."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from blake3 import blake3

from tests.support.homes import PROFILE, random_bits
from vllm_moecxl.config import Verify
from vllm_moecxl.control.placement import Part
from vllm_moecxl.data.banks.file import FileBank
from vllm_moecxl.data.slabfile import ALIGN_BYTES, DIGEST_BYTES
from vllm_moecxl.data.slabs import Home, HomeBuilder
from vllm_moecxl.data.slabwriter import SlabFileWriter

FINGERPRINT = {"model": "toy", "kernel": "ToyKernel"}
_LENGTH_BYTES = 8


@dataclass(frozen=True)
class Contents:
    """One layer, as a packer is given it."""

    tensors: Mapping[str, torch.Tensor]
    kernel_name: str = "ToyKernel"
    shared: Mapping[str, torch.Tensor] = field(default_factory=dict)
    check: Sequence[torch.Tensor] = ()


def toy_layer(expert_count: int = 3, seed: int = 0) -> Contents:
    """A layer with two tensors, one tensor that all experts share, and a self-check."""
    return Contents(
        {
            "w": random_bits((expert_count, 5, 7), torch.uint8, seed),
            "scale": random_bits((expert_count, 3), torch.bfloat16, seed + 1),
        },
        shared={"table": random_bits((4, 2), torch.int32, seed + 2)},
        check=(random_bits((2, 3), torch.float32, seed + 3),),
    )


def begin(path: Path, layers: Mapping[str, Contents]) -> SlabFileWriter:
    """A writer to which every layer has been added."""
    byte_count = sum(tensor.nbytes for layer in layers.values() for tensor in layer.tensors.values())
    writer = SlabFileWriter(path, FINGERPRINT, len(layers), byte_count)
    for name, layer in layers.items():
        writer.add_layer(name, layer.kernel_name, layer.tensors, layer.shared, layer.check)
    return writer


def pack(path: Path, layers: Mapping[str, Contents] | None = None) -> Path:
    """A finished slab file."""
    begin(path, {"layers.0": toy_layer()} if layers is None else layers).finish()
    return path


def split(path: Path) -> tuple[dict[str, Any], bytes]:
    """Header and data of a slab file."""
    raw = path.read_bytes()
    end = _LENGTH_BYTES + int.from_bytes(raw[:_LENGTH_BYTES], "little")
    return json.loads(raw[_LENGTH_BYTES:end]), raw[end:]


def join(header: bytes, data: bytes, tail_start: int | None) -> bytes:
    """A file with this header, as short as its alignment allows, and its seal made to fit from `tail_start` on.

    Args:
        tail_start: where the sealed part of the data starts; None leaves the seal as it is.
    """
    header = header.ljust(-(-(_LENGTH_BYTES + len(header)) // ALIGN_BYTES) * ALIGN_BYTES - _LENGTH_BYTES)
    header = len(header).to_bytes(_LENGTH_BYTES, "little") + header
    if tail_start is not None:
        tail = data[tail_start:-DIGEST_BYTES]
        data = data[:-DIGEST_BYTES] + blake3(header).update(tail).digest()
    return header + data


def home_of(path: Path, verify: Verify, name: str = "layers.0") -> tuple[FileBank, Home]:
    """A layer of a slab file, served from there."""
    bank = FileBank(path, "file", PROFILE)
    return bank, home_in(bank, verify, name)


def home_in(bank: FileBank, verify: Verify, name: str) -> Home:
    """A layer of an open slab file."""
    packed = bank.slabs.layers[name]
    return HomeBuilder([bank], verify).adopt(packed, bank, [(Part(0, 1.0),)] * packed.expert_count)


def read_slab(home: Home, expert_id: int) -> list[torch.Tensor]:
    """A slab's rows, as bytes."""
    target = [torch.zeros(extent.row_bytes, dtype=torch.uint8) for extent in home.layout.extents]
    home.read(expert_id, target)
    return target
