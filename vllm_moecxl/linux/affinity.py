"""Which CPUs a thread of ours may run on, and how exactly it wakes up."""

from __future__ import annotations

import ctypes
import os
import re
from collections.abc import Collection, Iterator, Mapping
from functools import cache
from pathlib import Path

_PROC = Path("/proc")
_SYSFS = Path("/sys")

#: How vLLM's CPU engine tells the OpenMP library, Intel's, GNU's or another, where its compute threads go.
#: Source: vllm/utils/ompmultiprocessing.py of vLLM 0.32.
_BINDINGS = {
    "KMP_AFFINITY": re.compile(r".*\bproclist=\[([\d,:-]+)\].*"),
    "GOMP_CPU_AFFINITY": re.compile(r"([\d\s,:-]+)"),
    "OMP_PLACES": re.compile(r"\{([\d,]+)\}"),
}
#: "4", "0-3", or "0-14:2" for every other one.
_RANGE = re.compile(r"(\d{1,7})(?:-(\d{1,7})(?::(\d{1,7}))?)?")
_CPUS_ALLOWED = re.compile(r"^Cpus_allowed_list:\s+(\S+)$", re.MULTILINE)

_PR_SET_TIMERSLACK = 29
_TIMER_SLACK_NS = 1000

_libc = ctypes.CDLL(None, use_errno=True)


def use_all_cpus() -> None:
    """Let the calling thread run on every CPU that this process' container has.

    vLLM's CPU worker pins its main thread to one core and new threads inherit that: a copy thread would take turns with
    the kernels it is meant to run beside. The kernel itself takes CPUs off the mask that the container has not got.
    """
    os.sched_setaffinity(0, range(os.cpu_count() or 1))


def use_spare_cpus() -> frozenset[int]:
    """Let the calling thread run where the compute threads of vLLM's CPU engine never do.

    All threads of one process get the same CPUs, and the kernel picks an idle one.

    Returns:
        The CPUs; all that this process may use, where none is spare.
    """
    cpus = _own_spare_cpus()
    os.sched_setaffinity(0, cpus)
    return cpus


def use_cpus_near(pci_address: str, sysfs: Path = _SYSFS) -> frozenset[int]:
    """Let the calling thread run on the CPUs next to a PCI device such as a GPU, of those that it may use.

    Args:
        pci_address: such as `0000:17:00.0`.
        sysfs: where to look.

    Returns:
        The CPUs; all that it may use, where none is known to be near.
    """
    allowed = frozenset(os.sched_getaffinity(0))
    path = sysfs / "bus" / "pci" / "devices" / pci_address / "local_cpulist"
    near = allowed & (parse_cpus(path.read_text()) if path.exists() else frozenset())
    cpus = near or allowed
    os.sched_setaffinity(0, cpus)
    return cpus


def precise_sleep() -> None:
    """Let the calling thread's sleeps end on time.

    The kernel may wake a thread 50 us late, in order to wake several at once. With 1 us instead, `time.sleep` was late
    by 30 us instead of 76. Source: measured in a virtual machine on an AMD EPYC, 2026-11-22.
    """
    if _libc.prctl(_PR_SET_TIMERSLACK, ctypes.c_ulong(_TIMER_SLACK_NS), *[ctypes.c_ulong()] * 3):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), "prctl")


def parse_cpus(text: str) -> frozenset[int]:
    """CPUs of a list in the kernel's words or in those of OpenMP: `0-3,8`, `0 1 2`, `0-14:2`."""
    cpus: set[int] = set()
    for item in re.split(r"[\s,]+", text.strip()):
        if match := _RANGE.fullmatch(item):
            first, last, step = match.groups()
            cpus.update(range(int(first), int(last or first) + 1, int(step or 1) or 1))
    return frozenset(cpus)


def spare_cpus(
    environment: Mapping[str, str], proc: Path = _PROC, sysfs: Path = _SYSFS, parent_id: int | None = None
) -> frozenset[int]:
    """The CPUs that this process may use and that its compute threads do not.

    Args:
        environment: of this process: it says whether OpenMP binds the compute threads, and to which CPUs.
        proc, sysfs: where to look for the threads' masks, and for nodes.
        parent_id: the process that started this one.

    Returns:
        Spare CPUs on the compute threads' own nodes, or on others where there are none, or else all CPUs.
    """
    own = [*_masks(proc / "self")]
    allowed = frozenset().union(*own)
    bindings = [environment.get(name, "").strip() for name in _BINDINGS]
    if not any(bindings):
        # The compute threads may run anywhere, and so may ours.
        return allowed
    # A bound thread hands its mask on: what the user allowed, only the process above still knows.
    allowed = allowed.union(*_masks(proc / str(os.getppid() if parent_id is None else parent_id)))
    matches = [pattern.fullmatch(text) for pattern, text in zip(_BINDINGS.values(), bindings, strict=True)]
    taken = next((parse_cpus(match[1]) for match in matches if match), None)
    if taken is None:
        taken = frozenset().union(*(mask for mask in own if len(mask) == 1))
    spare = allowed - taken
    return _on_nodes_of(taken, spare, sysfs) or spare or allowed


@cache
def _own_spare_cpus() -> frozenset[int]:
    # Once and for all: threads that were sent there before would look like compute threads to the next one.
    return spare_cpus(os.environ)


def _masks(process: Path) -> Iterator[frozenset[int]]:
    """The CPUs that each thread of a process may use."""
    for status in sorted(process.glob("task/[0-9]*/status")):
        try:
            text = status.read_text()
        except OSError:  # the thread, or the process, has ended
            continue
        if match := _CPUS_ALLOWED.search(text):
            yield parse_cpus(match[1])


def _on_nodes_of(cpus: Collection[int], candidates: frozenset[int], sysfs: Path) -> frozenset[int]:
    """The candidates that share a NUMA node with any of `cpus`."""
    lists = (sysfs / "devices" / "system" / "node").glob("node[0-9]*/cpulist")
    nodes = [parse_cpus(path.read_text()) for path in lists]
    return frozenset().union(*(node & candidates for node in nodes if node & frozenset(cpus)))
