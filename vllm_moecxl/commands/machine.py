"""Compute devices and memory of this machine, as far as this process may use them."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_moecxl.commands.findings import Finding
from vllm_moecxl.units import GIB, MIB, format_bytes

#: Instruction sets that decide which expert kernels vLLM's CPU engine has.
_ISA_FLAGS = ("avx512f", "avx512_bf16", "amx_tile")
#: vLLM's processes talk through shared memory: below the first it fails, below the second large models may.
_SHM_LEAST_BYTES = 64 * MIB
_SHM_AMPLE_BYTES = GIB
_SHARED_MEMORY = Path("/dev/shm")
_CPUINFO = Path("/proc/cpuinfo")
_PRELOADS = ("tcmalloc", "libiomp5")


@dataclass(frozen=True)
class CpuDevice:
    """The CPU: model, CPUs that this process may use, and the flags that matter."""

    kind: str
    name: str
    cpu_count: int
    isa: dict[str, bool]


@dataclass(frozen=True)
class CudaDevice:
    """One CUDA device that PyTorch sees."""

    kind: str
    name: str
    index: int
    total_bytes: int


Device = CpuDevice | CudaDevice


@dataclass(frozen=True)
class Memory:
    """Host memory for this process; None where it could not be found out, or for "no limit".

    Attributes:
        available_bytes: what it may still take, container limits counted.
        locked_limit_bytes: how much of it may be locked or pinned; None for no limit.
        shm_free_bytes: room in /dev/shm.
    """

    available_bytes: int | None
    locked_limit_bytes: int | None
    shm_free_bytes: int | None


def read_devices(cpuinfo: Path = _CPUINFO) -> list[Device]:
    """The CPU first, then CUDA devices in PyTorch's order."""
    return [_read_cpu(cpuinfo), *_read_cuda()]


def _read_cpu(cpuinfo: Path) -> CpuDevice:
    fields: dict[str, str] = {}
    if cpuinfo.exists():
        for line in cpuinfo.read_text().split("\n\n", 1)[0].splitlines():
            name, _, value = line.partition(":")
            fields[name.strip()] = value.strip()
    flags = set(fields.get("flags", fields.get("Features", "")).split())
    return CpuDevice(
        kind="cpu",
        name=fields.get("model name", "unknown"),
        cpu_count=len(os.sched_getaffinity(0)),
        isa={flag: flag in flags for flag in _ISA_FLAGS},
    )


def _read_cuda() -> Iterator[CudaDevice]:
    try:
        import torch
    except ImportError:  # reported as a finding of the engine
        return
    if not torch.cuda.is_available():
        return
    for index in range(torch.cuda.device_count()):
        properties: Any = torch.cuda.get_device_properties(index)
        yield CudaDevice("cuda", properties.name, index, properties.total_memory)


def read_memory(shared_memory: Path = _SHARED_MEMORY) -> Memory:
    """What the kernel gives this process."""
    available_bytes = locked_limit_bytes = None
    try:
        from vllm_moecxl.data import host
    except ImportError:  # without PyTorch there is no data plane; the engine's findings say so
        pass
    else:
        available_bytes, locked_limit_bytes = host.available_bytes(), host.locked_limit_bytes()
    shm_free_bytes = shutil.disk_usage(shared_memory).free if shared_memory.is_dir() else None
    return Memory(available_bytes, locked_limit_bytes, shm_free_bytes)


def judge_devices(devices: list[Device], engine_kind: str | None) -> Iterator[Finding]:
    """Findings about what computes."""
    for device in devices:
        if isinstance(device, CudaDevice):
            yield Finding(
                "ok", "devices", f"CUDA device {device.index}: {device.name}, {format_bytes(device.total_bytes)}"
            )
        else:
            flags = " ".join(flag for flag, is_there in device.isa.items() if is_there) or "none of " + ", ".join(
                _ISA_FLAGS
            )
            yield Finding("ok", "devices", f"CPU: {device.name}, {device.cpu_count} usable CPUs, {flags}")
    has_cuda = any(isinstance(device, CudaDevice) for device in devices)
    if engine_kind == "cuda" and not has_cuda:
        yield Finding(
            "problem",
            "devices",
            "vLLM's CUDA engine is installed but PyTorch sees no CUDA device: check the driver and "
            "CUDA_VISIBLE_DEVICES, or install the CPU engine",
        )
    if engine_kind == "cpu":
        yield from _judge_cpu_engine(devices, has_cuda=has_cuda)


def _judge_cpu_engine(devices: list[Device], *, has_cuda: bool) -> Iterator[Finding]:
    if has_cuda:
        yield Finding("note", "devices", "vLLM's CPU engine is installed and leaves the CUDA devices unused")
    if not any(device.isa["avx512f"] for device in devices if isinstance(device, CpuDevice)):
        yield Finding("note", "devices", "this CPU has no AVX-512: vLLM's CPU engine runs slower expert kernels")
    preload = os.environ.get("LD_PRELOAD", "")
    if missing := [library for library in _PRELOADS if library not in preload]:
        yield Finding(
            "note",
            "devices",
            f"vLLM's CPU engine is faster with {' and '.join(missing)} in LD_PRELOAD, which is not set so",
        )


def judge_memory(memory: Memory, engine_kind: str | None) -> Iterator[Finding]:
    """Findings about host memory."""
    if memory.available_bytes is not None:
        yield Finding("ok", "memory", f"{format_bytes(memory.available_bytes)} of host memory may still be taken")
        limit = memory.locked_limit_bytes
        if limit is not None and limit < memory.available_bytes:
            yield Finding(
                "note",
                "memory",
                f"at most {format_bytes(limit)} may be locked (RLIMIT_MEMLOCK): raise it with ulimit -l where experts "
                "are to be pinned for a GPU",
            )
    if memory.shm_free_bytes is None:
        yield Finding(
            "problem", "memory", "there is no /dev/shm, which vLLM's processes talk through: mount a tmpfs there"
        )
    elif memory.shm_free_bytes < _SHM_LEAST_BYTES:
        yield Finding(
            "problem",
            "memory",
            f"/dev/shm has {format_bytes(memory.shm_free_bytes)} free and vLLM's processes talk through it: make room, "
            "or give the container a larger --shm-size",
        )
    else:
        is_ample = memory.shm_free_bytes >= _SHM_AMPLE_BYTES
        yield Finding(
            "ok" if is_ample else "note", "memory", f"/dev/shm has {format_bytes(memory.shm_free_bytes)} free"
        )
    if engine_kind == "cpu":
        yield Finding(
            "note",
            "memory",
            "give --kv-cache-memory-bytes when offloading on the CPU engine: its own estimate takes homes for its own "
            "memory",
        )
