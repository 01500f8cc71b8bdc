"""Measuring a bank: its latency, what several readers get out of it, and how long a read of each size takes."""

from __future__ import annotations

import ctypes
import itertools
import json
import mmap
import random
import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from vllm_moecxl.data.banks.base import Bank, RowCopy, Rows
from vllm_moecxl.data.banks.file import FileBank, FileRows
from vllm_moecxl.data.banks.memory import MemoryBank, MemoryRows
from vllm_moecxl.data.host import anonymous_tensor, available_bytes
from vllm_moecxl.data.profiles import default_path
from vllm_moecxl.errors import CapacityError
from vllm_moecxl.linux.topology import SYSFS
from vllm_moecxl.units import KIB, MIB, format_bytes

Clock = Callable[[], float]

#: Sizes of the size curve: a page, then four times as much each.
READ_BYTES = tuple(4 * KIB << 2 * step for step in range(7))
assert READ_BYTES[-1] == 16 * MIB
SMALL_READ_BYTES = READ_BYTES[0]

#: Scratch at least this large, and this many times the last-level caches: what is measured is not to be a cache.
SCRATCH_BYTES_MIN = 256 * MIB
_SCRATCH_CACHES = 4
#: Each stream writes here in turn: two of the largest reads, about what stays in no core's own cache.
_TARGET_BYTES = 2 * READ_BYTES[-1]

#: A point of the size curve reads this much, but this many times at least and at most, and not for longer than that.
_POINT_BYTES = 64 * MIB
_POINT_READS_MIN, _POINT_READS_MAX = 5, 500
_POINT_S_MAX = 2.0
#: A round of streams is about this long for a stream that reads alone; the figure is the median of the rounds.
_ROUND_S = 0.03
_ROUND_READS_MAX = 64
_ROUND_COUNT = 5
_ROUNDS_S_MAX = 3.0

#: Dependent loads: walks over so many cache lines, in random order; lines come in pairs with some prefetchers.
_LINE_BYTES = 128
_LINE_COUNT_MAX = 1 << 20
_WALK_COUNT = 5

_CACHE_SIZE = re.compile(r"(\d+)K")


@dataclass(frozen=True)
class Measured:
    """What a bank did on this machine.

    Attributes:
        load_s: what a core waits for one cache line of this memory, from a walk in which each load gives the address
            of the next; None where the bank's bytes cannot be loaded (a file, an emulated device).
        read_s: by size in bytes, one read from the idle bank through `Bank.read` into local DRAM, the call included.
        read_bytes_per_s: by number of streams, all of them together; each is a thread with a target of its own.
        scratch_bytes: the range that was read from.
    """

    load_s: float | None
    read_s: dict[int, float]
    read_bytes_per_s: dict[int, float]
    scratch_bytes: int

    @property
    def latency_s(self) -> float:
        """Of a load where the bank can be loaded from, else of a small read: the call costs more than any memory."""
        return self.read_s[SMALL_READ_BYTES] if self.load_s is None else self.load_s

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON, in the form that `save_profile` keeps."""
        return {
            # Two digits: banks whose figures differ by the noise of a measurement would otherwise change sides at the
            # edge of a class of `control.placement`, and experts would move each time a machine is measured again.
            "summary": {
                "latency_s": _two_digits(self.latency_s),
                "read_bytes_per_s": _two_digits(max(self.read_bytes_per_s.values())),
            },
            "latency_of": "small read" if self.load_s is None else "dependent load",
            "load_s": self.load_s,
            "reads": [{"read_bytes": size, "read_s": read_s} for size, read_s in self.read_s.items()],
            "streams": [{"count": count, "read_bytes_per_s": rate} for count, rate in self.read_bytes_per_s.items()],
            "scratch_bytes": self.scratch_bytes,
        }


def measure(bank: Bank, scratch_bytes: int, stream_count: int, clock: Clock = time.perf_counter) -> Measured:
    """Measure a bank through its own `read`; a file all over, memory on scratch that is allocated in it.

    Args:
        scratch_bytes: of scratch; less where the bank has not got twice as much room.
        stream_count: bandwidth is measured for 1 .. this many streams.
        clock: seconds; virtual in tests.

    Raises:
        CapacityError: the bank has no room for scratch, or the kernel puts it elsewhere.
        TransferError: the bank cannot be read.
    """
    space = _Space.of_file(bank) if isinstance(bank, FileBank) else _Space.in_memory(bank, scratch_bytes)
    with _one_thread_per_copy():
        sizes = [size for size in READ_BYTES if size <= space.byte_count]
        targets = [anonymous_tensor((_TARGET_BYTES,), torch.uint8).fill_(1) for _ in range(stream_count)]
        read_s = {size: _read_s(bank, space.copies(size, targets[0]), clock) for size in sizes}
        streams = [space.copies(sizes[-1], target, seed) for seed, target in enumerate(targets)]
        read_count = min(max(round(_ROUND_S / read_s[sizes[-1]]), 1), _ROUND_READS_MAX)
        rates = {
            count: _together_bytes_per_s(bank, streams[:count], read_count, clock)
            for count in range(1, stream_count + 1)
        }
        # Last, since it writes its addresses into the scratch.
        load_s = None if space.tensor is None or not bank.reads_directly else dependent_load_s(space.tensor, clock)
    return Measured(load_s, read_s, rates, space.byte_count)


@dataclass(frozen=True)
class _Space:
    """What is read from: a file, or scratch.

    Attributes:
        byte_count: of it.
        tensor: [bytes] uint8 scratch; None for a file.
    """

    byte_count: int
    tensor: torch.Tensor | None

    @classmethod
    def of_file(cls, bank: FileBank) -> _Space:
        return cls(bank.slabs.file.byte_count, None)

    @classmethod
    def in_memory(cls, bank: Bank, wanted_bytes: int) -> _Space:
        assert isinstance(bank, MemoryBank)
        room_bytes = available_bytes() if bank.shares_host_memory or bank.capacity_bytes is None else 1 << 63
        if bank.capacity_bytes is not None:
            room_bytes = min(room_bytes, bank.capacity_bytes - bank.used_bytes)
        byte_count = min(wanted_bytes, room_bytes // 2) // mmap.PAGESIZE * mmap.PAGESIZE
        if byte_count < SMALL_READ_BYTES:
            raise CapacityError(f"bank {bank.name} has no room to be measured: free memory there, or raise its size")
        tensor = bank.allocate((byte_count,), torch.uint8)
        if bank.astray_bytes:
            raise CapacityError(
                f"bank {bank.name} cannot be measured: {format_bytes(bank.astray_bytes)} of the scratch are elsewhere, "
                "free memory there, or see moecxl topology"
            )
        return cls(byte_count, tensor.fill_(1))

    def copies(self, read_bytes: int, target: torch.Tensor, seed: int = 0) -> Iterator[RowCopy]:
        """Reads of one size for ever, all over the space in random order, into one part of the target after another."""
        row_count = self.byte_count // read_bytes
        rows: Rows = FileRows(0, read_bytes)
        if self.tensor is not None:
            rows = MemoryRows.of(self.tensor[: row_count * read_bytes].view(row_count, read_bytes))
        row_ids = random.Random(seed).sample(range(row_count), min(row_count, _POINT_READS_MAX))
        parts = target.view(-1, read_bytes)
        for index, row_id in enumerate(itertools.cycle(row_ids)):
            yield RowCopy(rows, row_id, parts[index % len(parts)])


def _read_s(bank: Bank, copies: Iterator[RowCopy], clock: Clock) -> float:
    """Seconds of one read, the median of many."""
    copy = next(copies)
    bank.read([copy])
    wanted = min(max(_POINT_BYTES // copy.target.nbytes, _POINT_READS_MIN), _POINT_READS_MAX)
    end_s = clock() + _POINT_S_MAX
    taken_s: list[float] = []
    while len(taken_s) < wanted and (not taken_s or clock() < end_s):
        one = [next(copies)]
        start_s = clock()
        bank.read(one)
        taken_s.append(clock() - start_s)
    return median(taken_s)


def _together_bytes_per_s(bank: Bank, streams: Sequence[Iterator[RowCopy]], read_count: int, clock: Clock) -> float:
    """Bytes per second of all streams together, the median of several rounds after one that does not count."""
    barrier = threading.Barrier(len(streams))

    def run(copies: list[RowCopy]) -> tuple[float, float]:
        barrier.wait()
        start_s = clock()
        for copy in copies:
            bank.read([copy])
        return start_s, clock()

    with ThreadPoolExecutor(len(streams)) as threads:

        def one_round() -> float:
            of_streams = [list(itertools.islice(copies, read_count)) for copies in streams]
            starts_s, ends_s = zip(*threads.map(run, of_streams), strict=True)
            byte_count = sum(copy.target.nbytes for copies in of_streams for copy in copies)
            return float(byte_count / (max(ends_s) - min(starts_s)))

        one_round()
        end_s = clock() + _ROUNDS_S_MAX
        rates = [one_round()]
        while len(rates) < _ROUND_COUNT and clock() < end_s:
            rates.append(one_round())
    return median(rates)


def dependent_load_s(scratch: torch.Tensor, clock: Clock = time.perf_counter) -> float:
    """Seconds of a load from memory that must wait for the one before it; overwrites the scratch.

    A loop in Python takes longer than any memory, so the loads are those of a loop in the C library: `tfind` walks a
    binary tree whose nodes are (key, left, right), and a tree in which both children are the next node is a list. Its
    own instructions (about 10 ns a node where everything is in a cache) run while the memory answers. Cache lines come
    in random order, so that nothing prefetches them.

    Args:
        scratch: [bytes] uint8 in addressable memory, contiguous, several times as large as the caches.
    """
    words = scratch[: scratch.nbytes // _LINE_BYTES * _LINE_BYTES].numpy().view(np.uint64)
    lines = np.random.default_rng(0).permutation(words.nbytes // _LINE_BYTES)[:_LINE_COUNT_MAX].astype(np.uint64)
    addresses = np.uint64(scratch.data_ptr()) + lines * np.uint64(_LINE_BYTES)
    first_words = lines * np.uint64(_LINE_BYTES // words.itemsize)
    wanted, other = ctypes.create_string_buffer(b"a"), ctypes.create_string_buffer(b"b")
    words[first_words] = ctypes.addressof(other)
    words[first_words[-1]] = ctypes.addressof(wanted)
    for child in (1, 2):
        words[first_words[:-1] + np.uint64(child)] = addresses[1:]
    root = ctypes.c_void_p(int(addresses[0]))
    walks_s = []
    for _ in range(1 + _WALK_COUNT):
        start_s = clock()
        found = _libc.tfind(wanted, ctypes.byref(root), _libc.strcmp)
        walks_s.append(clock() - start_s)
        assert found == int(addresses[-1]), "the C library's trees are not what we take them for"
    return median(walks_s[1:]) / len(lines)


_libc = ctypes.CDLL(None)
_libc.tfind.restype = ctypes.c_void_p


@contextmanager
def _one_thread_per_copy() -> Iterator[None]:
    """A stream is one thread: PyTorch would otherwise copy with as many as there are CPUs."""
    thread_count = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(thread_count)


def last_level_cache_bytes(sysfs: Path = SYSFS) -> int:
    """All caches of the highest level that this machine's CPUs have together; 0 where nobody says."""
    caches: dict[tuple[int, str], int] = {}
    for folder in sysfs.glob("devices/system/cpu/cpu[0-9]*/cache/index[0-9]*"):
        try:
            texts = [(folder / name).read_text().strip() for name in ("level", "shared_cpu_list", "size")]
        except OSError:
            continue
        if texts[0].isdecimal() and (size := _CACHE_SIZE.fullmatch(texts[2])):
            caches[int(texts[0]), texts[1]] = int(size[1]) * KIB
    highest = max((level for level, _ in caches), default=0)
    return sum(size for (level, _), size in caches.items() if level == highest)


def enough_scratch_bytes(sysfs: Path = SYSFS) -> int:
    """Scratch that is much larger than the caches."""
    return max(SCRATCH_BYTES_MIN, _SCRATCH_CACHES * last_level_cache_bytes(sysfs))


def measurement_dates(machine: str, path: Path | None = None) -> dict[str, str]:
    """When each of this machine's banks was measured, by identity; empty where nothing can be read, as `load_profiles`.

    Args:
        machine: see `profiles.machine_identity`.
    """
    try:
        banks = json.loads((path or default_path()).read_text()).get(machine, {})
        return {identity: str(value["date"]) for identity, value in banks.items()}
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return {}


def _two_digits(value: float) -> float:
    return float(f"{value:.2g}")
