"""How slabs get into slots, from host memory and from the device's own: copy engine against our kernel (needs a GPU).

Slabs of two extents, in registered host memory or on the device, many more than any cache holds. Each way is queued
behind a kernel that spins, so `device_us` is the device's time alone, which is all that counts inside of a CUDA graph;
`host_us` is what queueing takes the host. All ways of a case take turns, and ratios are between neighbours.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import geometric_mean, median
from typing import Any

import torch

from benchmarks.common import Result, print_table, save
from vllm_moecxl.control.chunking import CHUNK_BYTES_MAX
from vllm_moecxl.data.devices.cuda import CudaBackend, CudaStream
from vllm_moecxl.data.host import anonymous_tensor
from vllm_moecxl.units import KIB, MIB, format_bytes, parse_bytes

_SLAB_BYTES_MIN = 4 * KIB
SLAB_BYTES = tuple(_SLAB_BYTES_MIN << shift for shift in range(14))
SLAB_COUNTS = (1, 4, 16, 64)
PROGRAM_COUNTS = (8, 16, 32, 64, 128, 256)
#: Source memory that the rounds of a case wander over, so that no cache of the host's serves them.
_POOL_BYTES = 512 * MIB
#: Of a slab, gate-and-up and down projections; each a multiple of what the kernel moves at once.
_FIRST_SHARE = 2 / 3
_ALIGNMENT = 16
#: About a millisecond; doubled wherever the host was not done with queueing by then.
_SPIN_CYCLES = 2_000_000
_SPIN_CYCLES_MAX = 1 << 32
#: Ways of the copy engine: as the mover cuts slabs, an event behind each chunk; and one copy for each extent.
_MOVER, _EXTENTS = "mover", "extents"
COPIES = (_MOVER, _EXTENTS)
#: Where slabs come from: homes, and a layer buffer.
MEMORIES = ("host", "device")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this benchmark."""
    parser.add_argument("--slab-bytes", type=_byte_count, nargs="+", default=SLAB_BYTES, metavar="BYTES")
    parser.add_argument("--slabs", type=_positive, nargs="+", default=SLAB_COUNTS, metavar="N", help="copied at once")
    parser.add_argument("--programs", type=_positive, nargs="+", default=PROGRAM_COUNTS, metavar="N", help="kernel's")
    parser.add_argument("--rounds", type=_positive, default=7, help="measurements of each way, in turn")


def run(args: argparse.Namespace) -> Result:
    """Measure, print and save."""
    require_device()
    values = {}
    for memory in MEMORIES:
        values[memory] = summarise(_sweep(memory, args))
        print(f"from {memory} memory")
        _print(values[memory])
    properties = torch.cuda.get_device_properties(0)
    device = {"name": properties.name, "memory_bytes": properties.total_memory, "cuda": torch.version.cuda}
    return save("copy", "hardware", {**values, "device": device, "rounds": args.rounds})


def require_device() -> None:
    """End the process, with exit code 2 and one sentence, where nothing can be measured."""
    if not torch.cuda.is_available():
        print(
            f"copy: torch {torch.__version__} finds no CUDA device here, and this benchmark measures nothing else: run "
            "it where a GPU is, with the CUDA build of torch (`make gpu` installs it)",
            file=sys.stderr,
        )
        raise SystemExit(2)


def _sweep(memory: str, args: argparse.Namespace) -> list[Case]:
    torch.cuda.empty_cache()  # of the sweep before
    bench = Bench(memory, max(args.slab_bytes), max(args.slabs))
    return [
        measure(bench, slab_bytes, slab_count, args.programs, args.rounds)
        for slab_bytes in sorted(set(args.slab_bytes))
        for slab_count in sorted(set(args.slabs))
    ]


def _positive(text: str) -> int:
    try:
        count = int(text)
    except ValueError:
        count = 0
    if count < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")
    return count


def _byte_count(text: str) -> int:
    byte_count = parse_bytes(text)
    if byte_count is None or byte_count < _SLAB_BYTES_MIN or byte_count % _ALIGNMENT:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a size such as 64KiB, a multiple of {_ALIGNMENT} of at least {_SLAB_BYTES_MIN}"
        )
    return byte_count


@dataclass
class Case:
    """What was measured for one size and count of slabs.

    Attributes:
        device_us, host_us: by way (a name in `COPIES`, or a program count of the kernel's), of each round, for all
            slabs together.
    """

    slab_bytes: int
    slab_count: int
    device_us: dict[str | int, list[float]] = field(default_factory=dict)
    host_us: dict[str | int, list[float]] = field(default_factory=dict)

    def device_ratio(self, way: str | int, other: str | int) -> float:
        """The device's time of one way in that of another, the median of the rounds' ratios."""
        return _median_ratio(self.device_us[way], self.device_us[other])

    def served_ratio(self, way: str | int, other: str | int) -> float:
        """The same of the time until the slabs are there, where the host queues while the device works."""
        return _median_ratio(self._served_us(way), self._served_us(other))

    def figures(self, way: str | int) -> Result:
        """Of one way, per slab."""
        device_us = median(self.device_us[way])
        return {
            "device_us": round(device_us / self.slab_count, 3),
            "host_us": round(median(self.host_us[way]) / self.slab_count, 3),
            "bytes_per_s": round(self.slab_bytes * self.slab_count / device_us * 1e6),
        }

    def _served_us(self, way: str | int) -> list[float]:
        return list(map(max, self.device_us[way], self.host_us[way]))


def _median_ratio(values: Sequence[float], others: Sequence[float]) -> float:
    return median(value / other for value, other in zip(values, others, strict=True))


def threshold_bytes(ratios: Mapping[int, float]) -> int | None:
    """The slab size from which on the copy engine should copy; what is smaller goes by the kernel.

    Args:
        ratios: by slab size, the kernel's time in the copy engine's.

    Returns:
        The measured size at which the time that is lost on both sides of it, in logarithms of the ratios, is least; 0
        means that the kernel should not copy any. None: it should copy all of them.
    """
    assert ratios

    def loss(cut: float) -> float:
        return sum(max(math.log(ratio) if size < cut else -math.log(ratio), 0.0) for size, ratio in ratios.items())

    best = min([*sorted(ratios), math.inf], key=loss)
    if best == min(ratios):
        return 0
    return None if best == math.inf else int(best)


def summarise(cases: Sequence[Case]) -> Result:
    """What all cases say together: the program count that does best over all, and the thresholds with it."""
    programs = sorted(way for way in cases[0].device_us if isinstance(way, int))
    rates = {count: geometric_mean(case.figures(count)["bytes_per_s"] for case in cases) for count in programs}
    best = max(programs, key=rates.__getitem__)
    by_count: dict[int, list[Case]] = {}
    for case in cases:
        by_count.setdefault(case.slab_count, []).append(case)
    return {
        "program_count": best,
        "bytes_per_s_by_programs": {str(count): round(rate) for count, rate in rates.items()},
        "threshold_bytes": {
            str(count): {
                way: threshold_bytes({case.slab_bytes: case.device_ratio(best, way) for case in group})
                for way in COPIES
            }
            for count, group in by_count.items()
        },
        "threshold_bytes_host_driven": {
            str(count): {
                way: threshold_bytes({case.slab_bytes: case.served_ratio(best, way) for case in group})
                for way in COPIES
            }
            for count, group in by_count.items()
        },
        "cases": [
            {
                "slab_bytes": case.slab_bytes,
                "slab_count": case.slab_count,
                "ways": {str(way): case.figures(way) for way in case.device_us},
                "kernel_to_copy": {way: round(case.device_ratio(best, way), 4) for way in COPIES},
                "kernel_to_copy_host_driven": {way: round(case.served_ratio(best, way), 4) for way in COPIES},
            }
            for case in cases
        ],
    }


def _print(values: Result) -> None:
    best = str(values["program_count"])
    ways = (best, *COPIES)
    print_table(
        ["slab", "slabs", *(f"{way} {unit}" for way in ("kernel", *COPIES) for unit in ("GB/s", "us", "host us"))],
        [
            [format_bytes(case["slab_bytes"]), case["slab_count"], *_columns([case["ways"][way] for way in ways])]
            for case in values["cases"]
        ],
    )
    others = ", ".join(values["bytes_per_s_by_programs"])
    print(f"GB/s, and us per slab; the kernel with {best} programs, over all cases the best of {others}")
    for title, name in (
        ("inside of a graph", "threshold_bytes"),
        ("queued by the host", "threshold_bytes_host_driven"),
    ):
        for count, thresholds in values[name].items():
            said = ", ".join(f"{way}: {_below(cut)}" for way, cut in thresholds.items())
            print(f"{title}, {count} slabs at once: the kernel wins against {said}")


def _columns(figures: Sequence[Result]) -> Iterator[float]:
    for one in figures:
        yield from (one["bytes_per_s"] / 1e9, one["device_us"], one["host_us"])


def _below(cut: int | None) -> str:
    if cut is None:
        return "always"
    return f"below {format_bytes(cut)}" if cut else "never"


class Bench:
    """Memory that slabs come from and slots that all cases share, and the backend.

    Args:
        memory: one of `MEMORIES`.
        slab_bytes_max, slab_count_max: what the slots have to hold.
    """

    def __init__(self, memory: str, slab_bytes_max: int, slab_count_max: int) -> None:
        self.device = torch.device("cuda", torch.cuda.current_device())
        self.backend = CudaBackend(self.device)
        slots_bytes = slab_bytes_max * slab_count_max
        shape = (max(_POOL_BYTES, slots_bytes),)
        if memory == "host":
            self.pool = anonymous_tensor(shape, torch.uint8)
            if not self.backend.register(self.pool):
                raise SystemExit(f"copy: the driver does not register {format_bytes(self.pool.nbytes)} of host memory")
        else:
            self.pool = self.backend.allocate(shape, torch.uint8)
        words = self.pool.view(torch.int32)
        words.copy_(torch.arange(len(words), dtype=torch.int32, device=words.device))
        self.slots = self.backend.allocate((slots_bytes,), torch.uint8)
        stream = self.backend.copy_stream(0)
        assert isinstance(stream, CudaStream)
        self.stream = stream
        self._spin_cycles = _SPIN_CYCLES

    def time(self, work: Callable[[], None]) -> tuple[float, float]:
        """(microseconds of the device, microseconds of the host that queues) of work on `stream`.

        Raises:
            RuntimeError: the device's queue is too short for the work.
        """
        cuda: Any = torch.cuda
        while True:
            start, end = (cuda.Event(enable_timing=True) for _ in range(2))
            with cuda.stream(self.stream.stream):
                cuda._sleep(self._spin_cycles)
                start.record()
                started_ns = time.perf_counter_ns()
                work()
                host_us = (time.perf_counter_ns() - started_ns) / 1e3
                was_ahead = not start.query()
                end.record()
            end.synchronize()
            if was_ahead:
                return start.elapsed_time(end) * 1e3, host_us
            if self._spin_cycles > _SPIN_CYCLES_MAX:
                raise RuntimeError("copy: the host cannot queue all copies ahead: name fewer --slabs")
            self._spin_cycles *= 2


class Layer:
    """Slabs of one size in the bench's memory, and slots for some of them.

    Attributes:
        homes, cells: per extent, [slabs, bytes] and [slots, bytes] uint8.
    """

    def __init__(self, bench: Bench, slab_bytes: int, slab_count: int) -> None:
        from moecxl_kernels.gather import slab_map

        self._bench = bench
        self.slab_count = slab_count
        first_bytes = int(slab_bytes * _FIRST_SHARE) // _ALIGNMENT * _ALIGNMENT
        self.extents = (first_bytes, slab_bytes - first_bytes)
        self.home_count = max(_POOL_BYTES // slab_bytes, slab_count)
        self.homes = _rows(bench.pool, self.home_count, self.extents)
        self.cells = _rows(bench.slots, slab_count, self.extents)
        self.slabs = slab_map(
            [[rows.data_ptr() + slab_id * rows.shape[1] for rows in self.homes] for slab_id in range(self.home_count)],
            [rows.data_ptr() for rows in self.cells],
            self.extents,
            self.extents,
            bench.device,
        )

    def copies(self, turn: int) -> list[tuple[int, int]]:
        """(slab, slot) of one measurement: others in each."""
        first = turn * self.slab_count
        return [((first + index) % self.home_count, index) for index in range(self.slab_count)]

    def work(self, way: str | int, copies: Sequence[tuple[int, int]]) -> Callable[[], None]:
        """What queues these copies."""
        if isinstance(way, int):
            from moecxl_kernels.gather import gather_slabs

            listed = torch.tensor(copies, dtype=torch.int32, device=self._bench.device)
            count = torch.tensor([len(copies)], dtype=torch.int32, device=self._bench.device)
            torch.cuda.synchronize()
            return lambda: gather_slabs(listed, count, self.slabs, way)
        return lambda: self._copy(copies, has_chunks=way == _MOVER)

    def _copy(self, copies: Sequence[tuple[int, int]], *, has_chunks: bool) -> None:
        """By the copy engine; in chunks, with an event behind each, as the mover does."""
        backend, stream = self._bench.backend, self._bench.stream
        chunk_bytes = CHUNK_BYTES_MAX if has_chunks else max(self.extents)
        for slab_id, slot_id in copies:
            room = chunk_bytes
            for homes, cells in zip(self.homes, self.cells, strict=True):
                for start in range(0, homes.shape[1], chunk_bytes):
                    target = cells[slot_id, start : start + chunk_bytes]
                    backend.copy(homes[slab_id, start : start + chunk_bytes], target, stream)
                    room -= target.nbytes
                    if has_chunks and room <= 0:
                        backend.record(stream)
                        room = chunk_bytes
            if has_chunks and room < chunk_bytes:
                backend.record(stream)

    def check(self, copies: Sequence[tuple[int, int]], way: str | int) -> None:
        """Raises: RuntimeError: a slab has not arrived."""
        for homes, cells in zip(self.homes, self.cells, strict=True):
            for slab_id, slot_id in copies:
                if not torch.equal(cells[slot_id].cpu(), homes[slab_id].cpu()):
                    raise RuntimeError(f"copy: {way}: slab {slab_id} of {homes.shape[1]} B is not what its home holds")


def _rows(memory: torch.Tensor, count: int, extents: Sequence[int]) -> list[torch.Tensor]:
    """Per extent [count, bytes] of a flat memory, one behind the other."""
    bounds = [0]
    for byte_count in extents:
        bounds.append(bounds[-1] + count * byte_count)
    return [memory[start:stop].view(count, -1) for start, stop in pairwise(bounds)]


def measure(bench: Bench, slab_bytes: int, slab_count: int, programs: Sequence[int], round_count: int) -> Case:
    """All ways of one case, in turn: A B C, C B A, ..."""
    case, layer = Case(slab_bytes, slab_count), Layer(bench, slab_bytes, slab_count)
    ways: list[str | int] = [*COPIES, *sorted(set(programs))]
    for turn in range(1 + round_count):
        copies = layer.copies(turn)
        for way in ways[:: 1 if turn % 2 else -1]:
            work = layer.work(way, copies)
            if not turn:  # warms up, and shows that it copies
                bench.slots.zero_()
                torch.cuda.synchronize()
            device_us, host_us = bench.time(work)
            if not turn:
                layer.check(copies, way)
                continue
            case.device_us.setdefault(way, []).append(device_us)
            case.host_us.setdefault(way, []).append(host_us)
    return case
