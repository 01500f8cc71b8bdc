"""A stand-in for `torch.cuda` on the host, so that CudaBackend's own code runs where there is no GPU.

It shows that the code does what it is meant to call, and nothing about a GPU: copies are done at once, and only events
take their time.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch

#: How often an event says that it is not complete.
QUERY_COUNT = 3


class FakeStream:
    """A queue of nothing."""

    def __init__(self, device: torch.device) -> None:
        self.waited_for: list[FakeEvent] = []
        self.synchronize_count = 0

    def wait_event(self, event: FakeEvent) -> None:
        self.waited_for.append(event)

    def synchronize(self) -> None:
        self.synchronize_count += 1


class FakeEvent:
    """Complete once somebody has waited for it, or has asked often enough."""

    def __init__(self) -> None:
        self.queries_left = QUERY_COUNT
        self.stream: FakeStream | None = None

    def record(self, stream: FakeStream) -> None:
        assert isinstance(stream, FakeStream)
        self.stream = stream

    def query(self) -> bool:
        self.queries_left -= 1
        return self.queries_left < 0

    def synchronize(self) -> None:
        self.queries_left = 0


class FakeCuda:
    """The functions of `torch.cuda` that CudaBackend calls.

    Attributes:
        refuses: error code of registrations; 0 for none.
        registered: byte counts by address.
        adopted: threads that have chosen the device.
    """

    Stream = FakeStream
    Event = FakeEvent

    def __init__(self) -> None:
        self.refuses = 0
        self.registered: dict[int, int] = {}
        self.adopted: list[int] = []
        self.current = self.default = FakeStream(torch.device("cpu"))

    @contextmanager
    def stream(self, stream: FakeStream) -> Iterator[None]:
        before, self.current = self.current, stream
        yield
        self.current = before

    @contextmanager
    def device(self, device: torch.device) -> Iterator[None]:
        yield

    def current_stream(self, device: torch.device) -> FakeStream:
        return self.current

    def is_current_stream_capturing(self) -> bool:
        return False

    def mem_get_info(self, device: torch.device) -> tuple[int, int]:
        return 1 << 30, 1 << 31

    def set_device(self, device: torch.device) -> None:
        assert device.index is not None
        self.adopted.append(threading.get_ident())

    def get_device_properties(self, device: torch.device) -> Any:
        return SimpleNamespace(pci_domain_id=0, pci_bus_id=0x17, pci_device_id=0)

    def synchronize(self, device: torch.device) -> None:
        pass

    def cudart(self) -> FakeCuda:
        return self

    def cudaHostRegister(self, address: int, byte_count: int, flags: int) -> int:
        if self.refuses or address in self.registered:
            return self.refuses or 712
        self.registered[address] = byte_count
        return 0

    def cudaHostUnregister(self, address: int) -> int:
        return 0 if self.registered.pop(address, 0) else 713
