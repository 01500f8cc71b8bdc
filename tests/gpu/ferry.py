"""A plugin of pytest's that runs the kernels' tests on a device: `python -m pytest -p tests.gpu.ferry tests/kernels`.

The tests make their tensors on the host and look at them there. Here each kernel gets copies on the device instead, and
what it has written is copied back. What has addresses in it (the gather) works on the host's own memory, registered
meanwhile, as it does when it serves. What looks at the interpreter is left out.

`--ferry-to cpu` is a rehearsal for machines without a device: kernels are interpreted (TRITON_INTERPRET=1), and all
else is as it will be.
"""

from __future__ import annotations

import inspect
import mmap
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any

import pytest
import torch

#: What tests count the interpreter's accesses with.
_OF_THE_INTERPRETER = "traffic"
_DEVICE = pytest.StashKey[torch.device]()
_launch_count = [0]


class Ferry:
    """Copies of tensors on a device, for one call; tensors that share memory share it there too."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._storages: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def carry(self, value: Any, *, is_mapped: bool = False) -> Any:
        """The value, its tensors on the device, or in host memory that the device reaches."""
        from moecxl_kernels.tables import Mailbox

        if isinstance(value, torch.Tensor):
            return self._carry(value, is_mapped=is_mapped)
        if isinstance(value, tuple) and hasattr(value, "_fields"):
            is_mapped = isinstance(value, Mailbox)
            return type(value)(*(self.carry(one, is_mapped=is_mapped) for one in value))
        return value

    def carry_back(self) -> None:
        """Bring what the device has written back to where it came from."""
        synchronize(self._device)
        for here, there in self._storages.values():
            here.copy_(there)

    def _carry(self, tensor: torch.Tensor, *, is_mapped: bool) -> torch.Tensor:
        if tensor.device.type != "cpu" or self._device.type == tensor.device.type == "cuda":
            return tensor
        storage = tensor.untyped_storage()
        if not storage.nbytes():
            return torch.empty_like(tensor, device=self._device)
        if storage.data_ptr() not in self._storages:
            here = torch.empty(0, dtype=torch.uint8).set_(storage)
            there = here.clone() if is_mapped else here.to(self._device, copy=True)
            if is_mapped and self._device.type == "cuda":
                there = there.pin_memory()
            self._storages[storage.data_ptr()] = here, there
        _, there = self._storages[storage.data_ptr()]
        like = torch.empty(0, dtype=tensor.dtype, device=there.device).set_(there.untyped_storage())
        return like.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextmanager
def registered(ranges: Sequence[range], device: torch.device) -> Iterator[None]:
    """Within, the device reaches these addresses of the host's memory, and the pages that they are in."""
    page = mmap.PAGESIZE
    merged: list[list[int]] = []
    for start, stop in sorted((one.start // page * page, -(-one.stop // page) * page) for one in ranges if len(one)):
        if merged and start <= merged[-1][1]:
            merged[-1][1] = max(merged[-1][1], stop)
        else:
            merged.append([start, stop])
    if device.type != "cuda":
        yield
        return
    cuda: Any = torch.cuda
    cudart = cuda.cudart()
    done: list[int] = []
    try:
        for start, stop in merged:
            code = int(cudart.cudaHostRegister(start, stop - start, 0))
            assert not code, f"cudaHostRegister: error {code}"
            done.append(start)
        yield
    finally:
        synchronize(device)
        for start in done:
            cudart.cudaHostUnregister(start)


def touched_by_gather(copies: torch.Tensor, count: torch.Tensor, slabs: Any) -> list[range]:
    """Host addresses that a gather reads and writes."""
    sizes, strides, targets = slabs.sizes.tolist(), slabs.strides.tolist(), slabs.targets.tolist()
    ranges = []
    for expert_id, slot_id in copies[: int(count)].tolist():
        for source, target, stride, size in zip(
            slabs.sources[expert_id].tolist(), targets, strides, sizes, strict=True
        ):
            ranges += [range(source, source + size), range(target + slot_id * stride, target + slot_id * stride + size)]
    return ranges


def touched_by_cells(moves: torch.Tensor, count: torch.Tensor, slabs: Any) -> list[range]:
    """Host addresses that copying within slots reads and writes."""
    rows = zip(slabs.targets.tolist(), slabs.strides.tolist(), slabs.sizes.tolist(), strict=True)
    return [
        range(target + cell * stride, target + cell * stride + size)
        for target, stride, size in rows
        for cell in moves[: int(count)].flatten().tolist()
    ]


def ferried(kernel: Callable[..., Any], device: torch.device) -> Callable[..., Any]:
    """A kernel's entry point that takes tensors on the host and has the device do it."""
    touched = {"gather_slabs": touched_by_gather, "copy_cells": touched_by_cells}.get(kernel.__name__)

    @wraps(kernel)
    def call(*arguments: Any, **options: Any) -> Any:
        ferry = Ferry(device)
        carried = [ferry.carry(argument) for argument in arguments]
        carried_options = {name: ferry.carry(value) for name, value in options.items()}
        bound = inspect.signature(kernel).bind(*arguments, **options).arguments
        names = [*bound]
        with registered(touched(*(bound[name] for name in names[:3])) if touched else [], device):
            result = kernel(*carried, **carried_options)
            _launch_count[0] += 1
        ferry.carry_back()
        return _to_host(result)

    return call


def _to_host(result: Any) -> Any:
    if isinstance(result, torch.Tensor):
        return result.cpu()
    return tuple(map(_to_host, result)) if isinstance(result, tuple) else result


def entry_points() -> dict[Any, str]:
    """Kernels' entry points, and their names."""
    from moecxl_kernels.ensure import ensure_experts
    from moecxl_kernels.gate import gate_lookahead
    from moecxl_kernels.gather import copy_cells, gather_slabs
    from moecxl_kernels.remap import remap, remap_pass

    kernels = (ensure_experts, gate_lookahead, copy_cells, gather_slabs, remap, remap_pass)
    return {kernel: kernel.__name__ for kernel in kernels}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--ferry-to", default="cuda", choices=("cuda", "cpu"), help="where kernels run")


def pytest_configure(config: pytest.Config) -> None:
    device = torch.device(config.getoption("--ferry-to"))
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise pytest.UsageError("there is no CUDA device here to run the kernels' tests on")
        device = torch.device("cuda", torch.cuda.current_device())
    config.stash[_DEVICE] = device


@pytest.hookimpl(tryfirst=True)
def pytest_pycollect_makemodule(module_path: Path, parent: pytest.Collector) -> pytest.Module:
    # Before the folder's own, which skips what is not interpreted.
    return pytest.Module.from_parent(parent, path=module_path)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave tests of modules that call kernels, and have those call them on the device."""
    names = entry_points()
    modules = {item.module for item in items if isinstance(item, pytest.Function)}
    replaced: dict[Any, dict[str, Any]] = {}
    for module in modules:
        found = {name: value for name, value in vars(module).items() if inspect.isfunction(value) and value in names}
        if found:
            replaced[module] = found
    ferries = {kernel: ferried(kernel, config.stash[_DEVICE]) for kernel in names}
    kept: list[pytest.Item] = []
    left: list[pytest.Item] = []
    for item in items:
        is_ours = isinstance(item, pytest.Function) and item.module in replaced and not _counts_accesses(item.function)
        (kept if is_ours else left).append(item)
    for module, found in replaced.items():
        for name, kernel in found.items():
            setattr(module, name, ferries[kernel])
    config.hook.pytest_deselected(items=left)
    items[:] = kept


def _counts_accesses(function: Any) -> bool:
    """Whether a test looks at the interpreter's own accesses to memory."""
    if (handle := getattr(function, "hypothesis", None)) is not None:
        function = handle.inner_test
    return _OF_THE_INTERPRETER in function.__code__.co_names


def pytest_sessionfinish(session: pytest.Session) -> None:
    if not _launch_count[0] and session.testscollected and not session.config.option.collectonly:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    terminalreporter.line(f"{_launch_count[0]} calls of kernels on {config.stash[_DEVICE]}")
