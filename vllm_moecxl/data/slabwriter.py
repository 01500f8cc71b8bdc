"""Write slab files; `data.slabfile` says what they hold and reads them."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from blake3 import blake3

from vllm_moecxl.data.layout import as_bytes
from vllm_moecxl.data.slabfile import (
    ALIGN_BYTES,
    COPY_BYTES,
    DIGEST_BYTES,
    FORMAT,
    LENGTH_BYTES,
    TO_SAFETENSORS,
    DescribedLayer,
)
from vllm_moecxl.errors import CapacityError, ConfigError
from vllm_moecxl.units import KIB, format_bytes

#: Room that is kept for the header while its size is not known; a layer takes less than 2 KiB of it.
_HEADER_BYTES_BASE = 64 * KIB
_HEADER_BYTES_PER_LAYER = 16 * KIB


class SlabFileWriter:
    """Writes a slab file layer by layer, beside its final place; nothing is there until `finish`.

    Args:
        path: the file to make.
        fingerprint: what it is packed for.
        layer_count: layers that will be added.
        data_bytes: what they will take, about; checked against the free space of the file system.

    Raises:
        ConfigError: the folder is not there or not writable, or another packer is writing this file.
        CapacityError: the file system has too little room.
    """

    def __init__(self, path: Path, fingerprint: Mapping[str, str], layer_count: int, data_bytes: int) -> None:
        self.path = path
        self._fingerprint = dict(fingerprint)
        self._aside = path.with_name(f".{path.name}.partial")
        self._header_bytes = _round_up(_HEADER_BYTES_BASE + _HEADER_BYTES_PER_LAYER * layer_count)
        self._entries: dict[str, dict[str, object]] = {}
        self._layers: list[DescribedLayer] = []
        self._tail: list[tuple[str, torch.Tensor]] = []
        self._end = 0
        self._pad_count = 0
        self._file = self._open()
        try:
            self._require_room(data_bytes)
        except BaseException:
            self.abandon()
            raise

    def add_layer(
        self,
        name: str,
        kernel_name: str,
        tensors: Mapping[str, torch.Tensor],
        shared: Mapping[str, torch.Tensor],
        check: Sequence[torch.Tensor],
    ) -> None:
        """Append a layer.

        Args:
            tensors: per extent [experts, ...], contiguous, any device.
            shared: what the kernel keeps beside the rows of experts, nothing empty.
            check: outputs of the resident layer in a self-check.

        Raises:
            CapacityError: the disk is full.
        """
        expert_count = next(iter(tensors.values())).shape[0]
        described = DescribedLayer(name, expert_count, kernel_name, list(tensors))
        digests = [blake3() for _ in range(expert_count)]
        for extent, tensor in tensors.items():
            self._pad()
            self._enter(f"{name}/{extent}", tensor)
            rows = as_bytes(tensor)
            for digest, row in zip(digests, rows, strict=True):
                data = row.cpu().numpy().data
                digest.update(data)
                self._write(data)
        digest_bytes = b"".join(digest.digest() for digest in digests)
        table = torch.frombuffer(bytearray(digest_bytes), dtype=torch.uint8).view(expert_count, DIGEST_BYTES)
        self._tail.append((f"{name}/digests", table))
        for shared_name, tensor in shared.items():
            described.shared.append(shared_name)
            self._tail.append((f"{name}/shared/{shared_name}", tensor.cpu().contiguous().clone()))
        described.check_count = len(check)
        self._tail += [(f"{name}/check/{index}", output.cpu().contiguous()) for index, output in enumerate(check)]
        self._layers.append(described)

    def finish(self) -> int:
        """Write the tail and the header, and put the file in its place.

        Returns:
            Its size in bytes.

        Raises:
            CapacityError: the disk is full.
        """
        tail_start = self._end
        tail = blake3()
        parts = []
        for name, tensor in self._tail:
            self._enter(name, tensor)
            parts.append(as_bytes(tensor.reshape(1, *tensor.shape)).numpy().tobytes())
        self._enter("seal", torch.empty(DIGEST_BYTES, dtype=torch.uint8))
        header = self._header(tail_start)
        tail.update(header)
        for part in parts:
            tail.update(part)
            self._write(memoryview(part))
        self._write(memoryview(tail.digest()))
        # The slabs first, the header when they are on the disk: what has a header is whole.
        self._sync()
        self._write_at(0, memoryview(header))
        self._sync()
        size = os.fstat(self._file).st_size
        try:
            self._aside.rename(self.path)
        except OSError as error:
            raise ConfigError(f"moecxl pack: {self.path} cannot be put in place ({error.strerror})") from error
        os.close(self._file)
        folder = os.open(self.path.parent, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)
        return size

    def abandon(self) -> None:
        """Remove what has been written."""
        self._aside.unlink(missing_ok=True)
        os.close(self._file)

    def _open(self) -> int:
        try:
            file = os.open(self._aside, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise ConfigError(
                f"moecxl pack: {self.path} cannot be written ({error.strerror}): name a file in a folder that is there "
                "and writable"
            ) from error
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(file)
            raise self._busy_error() from error
        # Between opening and locking, the other one may have put this very file in its place.
        if not (self._aside.exists() and os.path.samestat(os.fstat(file), self._aside.stat())):
            os.close(file)
            raise self._busy_error()
        os.ftruncate(file, 0)
        return file

    def _busy_error(self) -> ConfigError:
        return ConfigError(f"moecxl pack: another process is packing {self.path}: wait for it")

    def _require_room(self, data_bytes: int) -> None:
        disk = os.statvfs(self._aside)
        free_bytes = disk.f_bavail * disk.f_frsize
        if data_bytes + self._header_bytes > free_bytes:
            raise CapacityError(
                f"moecxl pack: {self.path} takes about {format_bytes(data_bytes + self._header_bytes)} and its file "
                f"system has {format_bytes(free_bytes)} free: make room, or name a file elsewhere"
            )

    def _pad(self) -> None:
        gap = -(self._header_bytes + self._end) % ALIGN_BYTES
        if gap:
            self._enter(f"pad/{self._pad_count}", torch.empty(gap, dtype=torch.uint8))
            self._write(memoryview(bytes(gap)))
            self._pad_count += 1

    def _enter(self, name: str, tensor: torch.Tensor) -> None:
        """Note where a tensor lies; its bytes are written right after this."""
        assert name not in self._entries
        end = self._entry_end() + tensor.nbytes
        self._entries[name] = {
            "dtype": TO_SAFETENSORS[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [end - tensor.nbytes, end],
        }

    def _entry_end(self) -> int:
        if not self._entries:
            return 0
        offsets = next(reversed(self._entries.values()))["data_offsets"]
        assert isinstance(offsets, list)
        return int(offsets[1])

    def _header(self, tail_start: int) -> bytes:
        metadata = {
            "format": FORMAT,
            "fingerprint": json.dumps(self._fingerprint),
            "layers": json.dumps([asdict(layer) for layer in self._layers]),
            "tail_start": str(tail_start),
        }
        text = json.dumps({"__metadata__": metadata, **self._entries}).encode()
        length = self._header_bytes - LENGTH_BYTES
        assert len(text) <= length, "the header outgrew the room that was kept for it"
        return length.to_bytes(LENGTH_BYTES, "little") + text.ljust(length)

    def _write(self, data: memoryview) -> None:
        data = data.cast("B")
        self._write_at(self._header_bytes + self._end, data)
        self._end += data.nbytes

    def _write_at(self, offset: int, data: memoryview) -> None:
        try:
            while data.nbytes:
                count = os.pwrite(self._file, data[:COPY_BYTES], offset)
                data, offset = data[count:], offset + count
        except OSError as error:
            raise self._write_error(error) from error

    def _sync(self) -> None:
        try:
            os.fsync(self._file)
        except OSError as error:
            raise self._write_error(error) from error

    def _write_error(self, error: OSError) -> CapacityError:
        return CapacityError(f"moecxl pack: writing {self.path} failed ({error.strerror}): make room on its disk")


def _round_up(byte_count: int) -> int:
    return -(-byte_count // ALIGN_BYTES) * ALIGN_BYTES
