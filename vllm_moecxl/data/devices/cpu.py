"""The backend of vLLM's CPU engine: slots are local DRAM."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence

import torch
from moecxl_kernels.host import copy_rows

from vllm_moecxl.data.devices.base import Event, HostWords, Stream, Touches, check_copy, to_int32
from vllm_moecxl.data.host import anonymous_tensor, as_tensor, available_bytes, tensor_before
from vllm_moecxl.linux import affinity, memory
from vllm_moecxl.linux.memory import SharedPages

#: Kernels and copies are done when their calls return: streams need no queues and events nothing to tell them apart.
_STREAM = Stream()
_DONE = Event()
#: vLLM's CPU kernels count a tensor's elements in 32 bits: beyond, `cpu_fused_moe` reads other rows or crashes.
#: Source: vLLM 0.32, rows of 4.2 M bf16 elements at 2.0e9 (right), 2.5e9 and 4.6e9 elements (wrong), 2026-11-22.
_KERNEL_ELEMENTS_MAX = (1 << 31) - 1


class CpuBackend(HostWords):
    """See `DeviceBackend`. Work is done in the thread that asks for it, before the call returns."""

    is_host = True
    #: Nothing is ever in flight.
    in_flight_bytes_max = sys.maxsize
    can_look_up = False

    def __init__(self) -> None:
        #: By address, what tails are mapped from.
        self._tails: dict[int, SharedPages] = {}

    def compute_stream(self) -> Stream:
        return _STREAM

    def copy_stream(self, link_id: int) -> Stream:
        return _STREAM

    def allocate(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        # A fresh anonymous mapping reads as zeros without being touched, so unused slots cost no memory.
        return anonymous_tensor(shape, dtype)

    def allocate_tail(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        pages = SharedPages(math.prod(shape) * dtype.itemsize)
        tail = as_tensor(pages.map(), shape, dtype)
        self._tails[tail.data_ptr()] = pages
        return tail

    def allocate_before(self, row_count: int, tail: torch.Tensor) -> torch.Tensor | None:
        if (row_count + len(tail)) * tail[0].numel() > _KERNEL_ELEMENTS_MAX:
            return None
        return tensor_before(row_count, tail.shape, tail.dtype, self._tails[tail.data_ptr()])

    def free_bytes(self) -> int:
        return available_bytes()

    def register(self, memory: torch.Tensor) -> bool:
        return True

    def unregister(self, memory: torch.Tensor) -> None:
        pass

    def stage(self, byte_count: int) -> torch.Tensor:
        return anonymous_tensor((byte_count,), torch.uint8)

    def copy(self, source: torch.Tensor, target: torch.Tensor, stream: Stream) -> None:
        # The C library's copy: one thread, the interpreter free meanwhile, and stores past the cache where the C
        # library knows that they help. torch's own may start a team of compute threads in each thread that copies.
        check_copy(source, target)
        memory.copy(source.data_ptr(), target.data_ptr(), source.nbytes)

    copy_rows = staticmethod(copy_rows)

    def run(self, name: str, work: Callable[[], None], touches: Callable[[], Touches]) -> None:
        work()

    def is_capturing(self) -> bool:
        return False

    def record(self, stream: Stream) -> Event:
        return _DONE

    def wait(self, stream: Stream, event: Event) -> None:
        pass

    def query(self, event: Event) -> bool:
        return True

    def synchronize(self, event: Event) -> None:
        pass

    def route_ids(self, topk_ids: torch.Tensor) -> torch.Tensor:
        if topk_ids.dtype is torch.int32 and topk_ids.is_contiguous():
            return topk_ids
        return to_int32(topk_ids).contiguous()

    def to_device(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor

    def adopt_thread(self) -> None:
        affinity.use_spare_cpus()
