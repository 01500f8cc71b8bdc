"""Device backends: memory for cells and copies into it, on the CPU engine and on CUDA."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from moecxl_kernels.host import copy_rows

from vllm_moecxl.data.host import anonymous_tensor, available_bytes


class DeviceBackend(Protocol):
    """What the runtime asks of a compute device.

    Copies are ordered with the kernels that the calling thread launches: a copy into a cell waits for the kernels
    launched before it, and kernels launched after it see its bytes. A lease may therefore end as soon as the kernel
    that reads its slots has been launched.

    Attributes:
        is_host: whether the device's memory is the host's.
    """

    is_host: bool

    def allocate(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """A zeroed tensor on the device: a cell that was never filled holds zeros, not somebody's bytes."""

    def copy_rows(
        self,
        sources: Sequence[torch.Tensor],
        source_ids: Sequence[int],
        targets: Sequence[torch.Tensor],
        target_ids: Sequence[int],
    ) -> None:
        """For each pair of tensors and ids: ``target[target_id] = source[source_id]``."""

    def route_ids(self, topk_ids: torch.Tensor) -> torch.Tensor:
        """The router's ids as a contiguous int32 host tensor."""

    def to_device(self, tensor: torch.Tensor) -> torch.Tensor:
        """A host tensor on the device."""

    def free_bytes(self) -> int:
        """Device memory that may still be allocated."""


class _HostDrivenCopies:
    """Copies that the calling thread issues one by one, in order with the kernels that it launches."""

    def copy_rows(
        self,
        sources: Sequence[torch.Tensor],
        source_ids: Sequence[int],
        targets: Sequence[torch.Tensor],
        target_ids: Sequence[int],
    ) -> None:
        copy_rows(sources, source_ids, targets, target_ids)


class CpuBackend(_HostDrivenCopies):
    """vLLM's CPU engine: slots are local DRAM, kernels and copies run in order in the calling thread."""

    is_host = True

    def allocate(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        # A fresh anonymous mapping reads as zeros without being touched, so unused slots cost no memory.
        return anonymous_tensor(shape, dtype)

    def route_ids(self, topk_ids: torch.Tensor) -> torch.Tensor:
        if topk_ids.dtype is torch.int32 and topk_ids.is_contiguous():
            return topk_ids
        return _to_int32(topk_ids).contiguous()

    def to_device(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor

    def free_bytes(self) -> int:
        return available_bytes()


class CudaBackend(_HostDrivenCopies):
    """Slots in device memory; copies run on the stream that the layer's kernels run on.

    Not run on a GPU by us yet.
    """

    is_host = False

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def allocate(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        return torch.zeros(tuple(shape), dtype=dtype, device=self._device)

    def route_ids(self, topk_ids: torch.Tensor) -> torch.Tensor:
        return _to_int32(topk_ids.to("cpu")).contiguous()

    def to_device(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(self._device)

    def free_bytes(self) -> int:
        return torch.cuda.mem_get_info(self._device)[0]


def _to_int32(ids: torch.Tensor) -> torch.Tensor:
    """Ids of any integer type as int32; one that is too wide stays out of every layer's range."""
    if ids.dtype is torch.int64:
        ids = ids.clamp(-1, torch.iinfo(torch.int32).max)
    return ids.to(torch.int32)


def make_backend(device: torch.device) -> DeviceBackend:
    """The backend of vLLM's compute device."""
    return CpuBackend() if device.type == "cpu" else CudaBackend(device)
