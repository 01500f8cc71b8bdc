"""Counters that a worker writes and the API server reads, in a small file of shared memory.

File: 8 bytes little-endian header length, a JSON header (a list of [metric, labels]), then one int64 a row, 8-byte
aligned. One process writes, any number read; a torn read is impossible, since each value is one aligned word.
"""

from __future__ import annotations

import json
import mmap
import operator
import threading
import time
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import NamedTuple

import numpy as np

from vllm_moecxl.types import Cause, Lookup, PassKind, SlotState

_WORD_BYTES = 8

#: What the bytes of a bank are counted by.
BANK_BYTES_KINDS = ("capacity", "used", "astray")

#: Upper limits of the histogram of fetches, seconds: from a small slab out of DRAM to a large one off a slow disk.
_FETCH_SECONDS_LIMITS = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0, 3.0)
FETCH_SECONDS_LE = (*map(str, _FETCH_SECONDS_LIMITS), "+Inf")


class Metric(Enum):
    """Our metrics: name without the prefix, help text, whether it only grows, what one count stands for, and how the
    values of several ranks become one."""

    LOOKUPS = ("lookups_total", "Experts looked up, once per layer and forward.", True, 1.0)
    FETCH_BYTES = ("fetch_bytes_total", "Bytes copied from a bank into slots or the layer buffer.", True, 1.0)
    #: Two rows of one histogram: slabs by how long they took, not cumulative, and the sum.
    FETCH_SECONDS_BUCKET = ("fetch_seconds_bucket", "Slabs that arrived, by seconds from asking.", True, 1.0)
    FETCH_SECONDS_SUM = ("fetch_seconds_sum", "Seconds from asking for a slab to its arrival, added up.", True, 1e-9)
    LINK_BUSY_SECONDS = ("link_busy_seconds_total", "Seconds in which a bank had copies under way.", True, 1e-9)
    STALL_SECONDS = ("stall_seconds_total", "Seconds that forwards waited for fetches.", True, 1e-9)
    PASSES = ("passes_total", "Kernel calls, by the kind of pass.", True, 1.0)
    PREFETCH = (
        "prefetch_total",
        "Slabs that were fetched before anybody waited for them, by what came of it.",
        True,
        1.0,
    )
    PREFETCH_UP = (
        "prefetch_up",
        "Whether experts are prefetched into slots: not where that was found to make forwards no faster.",
        False,
        1.0,
        min,
    )
    SIDECAR_UP = (
        "sidecar_up",
        "Whether the sidecar lives: without it, fetches happen on demand only.",
        False,
        1.0,
        min,
    )
    SIDECAR_CPU_SECONDS = ("sidecar_cpu_seconds_total", "Processor time of the sidecar's thread.", True, 1e-9)
    SLOTS = ("slots", "Slots in each state.", False, 1.0)
    BANK_UP = ("bank_up", "Whether a bank keeps its promises: readable, and all bytes where asked.", False, 1.0, min)
    BANK_BYTES = ("bank_bytes", "Bytes of a bank: capacity, used, and astray (not where they were asked).", False, 1.0)
    BANK_BANDWIDTH = (
        *("bank_bandwidth_bytes_per_second", "Read bandwidth that placement counts on.", False, 1.0),
        max,
    )

    def __init__(
        self,
        suffix: str,
        documentation: str,
        is_counter: bool,
        scale: float,
        merge: Callable[[float, float], float] = operator.add,
    ) -> None:
        self.full_name = f"vllm:moe_offload_{suffix}"
        self.documentation = documentation
        self.is_counter = is_counter
        self.scale = scale
        self.merge = merge


class PrefetchOutcome(Enum):
    """What came of a prefetch.

    USEFUL: it was there when it was needed.
    LATE: it was needed, and waited for.
    WASTED: its cell was given to another before anybody needed it.
    """

    USEFUL = "useful"
    LATE = "late"
    WASTED = "wasted"


class Row(NamedTuple):
    """One labelled value of a metric, in its unit."""

    metric: Metric
    labels: dict[str, str]
    value: float


class Counters:
    """This worker's counters.

    Args:
        bank_names: banks that get a row each.
        path: the file to share them through; None keeps them in this process.

    Attributes:
        values: [rows] int64, indexed by the attributes below.
    """

    def __init__(self, bank_names: list[str], path: Path | None = None) -> None:
        self._rows: list[tuple[Metric, dict[str, str]]] = []
        self._lock = threading.RLock()  # the collector may run a destructor that counts
        self.lookup = {outcome: self._add(Metric.LOOKUPS, outcome=outcome.value) for outcome in Lookup}
        self.hit = self.lookup[Lookup.HIT]
        self.fetch_bytes = {
            (name, cause): self._add(Metric.FETCH_BYTES, bank=name, cause=cause.name.lower())
            for name in bank_names
            for cause in Cause
        }
        self.fetch_buckets = {
            cause: [self._add(Metric.FETCH_SECONDS_BUCKET, cause=cause.name.lower(), le=le) for le in FETCH_SECONDS_LE]
            for cause in Cause
        }
        self.fetch_ns = {cause: self._add(Metric.FETCH_SECONDS_SUM, cause=cause.name.lower()) for cause in Cause}
        self.link_busy_ns = {name: self._add(Metric.LINK_BUSY_SECONDS, bank=name) for name in bank_names}
        self.stall_ns = self._add(Metric.STALL_SECONDS)
        self.prefetch = {outcome: self._add(Metric.PREFETCH, outcome=outcome.value) for outcome in PrefetchOutcome}
        self.prefetch_up = self._add(Metric.PREFETCH_UP)
        self.sidecar_up = self._add(Metric.SIDECAR_UP)
        self.sidecar_cpu_ns = self._add(Metric.SIDECAR_CPU_SECONDS)
        self.passes = {kind: self._add(Metric.PASSES, kind=kind.value) for kind in PassKind}
        self.single_pass = self.passes[PassKind.SINGLE]
        self.slots = {state: self._add(Metric.SLOTS, state=state.name.lower()) for state in SlotState}
        self.bank_up = {name: self._add(Metric.BANK_UP, bank=name) for name in bank_names}
        self.bank_bytes = {
            (name, kind): self._add(Metric.BANK_BYTES, bank=name, kind=kind)
            for name in bank_names
            for kind in BANK_BYTES_KINDS
        }
        self.bank_bandwidth = {name: self._add(Metric.BANK_BANDWIDTH, bank=name) for name in bank_names}
        self.values = np.zeros(len(self._rows), dtype=np.int64) if path is None else self._map(path)

    def add(self, amounts: Mapping[int, int]) -> None:
        """Raise rows that several threads write; a row is written either here or by one thread alone."""
        with self._lock:
            for row, amount in amounts.items():
                self.values[row] += amount

    @contextmanager
    def stalling(self) -> Iterator[None]:
        """Count the time inside as waited by a forward."""
        started_ns = time.perf_counter_ns()
        try:
            yield
        finally:
            self.values[self.stall_ns] += time.perf_counter_ns() - started_ns

    def moved(self, bank_name: str, byte_count: int, cause: Cause) -> None:
        """See `data.mover.Observer`."""
        self.add({self.fetch_bytes[bank_name, cause]: byte_count})

    def was_busy(self, bank_name: str, duration_s: float) -> None:
        """See `data.mover.Observer`."""
        self.add({self.link_busy_ns[bank_name]: int(duration_s * 1e9)})

    def landed(self, cause: Cause, duration_s: float) -> None:
        """See `data.mover.Observer`."""
        bucket = bisect_left(_FETCH_SECONDS_LIMITS, duration_s)
        self.add({self.fetch_ns[cause]: int(duration_s * 1e9), self.fetch_buckets[cause][bucket]: 1})

    def failed(self, bank_name: str) -> None:
        """See `data.mover.Observer`."""
        self.values[self.bank_up[bank_name]] = 0

    def rows(self) -> list[Row]:
        """All values now."""
        return [Row(m, labels, int(v) * m.scale) for (m, labels), v in zip(self._rows, self.values, strict=True)]

    def _add(self, metric: Metric, **labels: str) -> int:
        self._rows.append((metric, labels))
        return len(self._rows) - 1

    def _map(self, path: Path) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
        header = json.dumps([[metric.name, labels] for metric, labels in self._rows]).encode()
        header += b" " * (-len(header) % _WORD_BYTES)
        start = _WORD_BYTES + len(header)
        # A reader must not see half a header: write aside, then rename.
        aside = path.with_name(f".{path.name}")
        aside.write_bytes(len(header).to_bytes(_WORD_BYTES, "little") + header + bytes(_WORD_BYTES * len(self._rows)))
        aside.rename(path)
        with path.open("r+b") as file:
            region = mmap.mmap(file.fileno(), 0)
        return np.frombuffer(region, dtype=np.int64, offset=start)


def read_rows(path: Path) -> list[Row]:
    """The rows of a counter file that another process writes."""
    data = path.read_bytes()
    start = _WORD_BYTES + int.from_bytes(data[:_WORD_BYTES], "little")
    values = np.frombuffer(data, dtype=np.int64, offset=start)
    names = json.loads(data[_WORD_BYTES:start])
    return [
        Row(metric := Metric[name], labels, int(value) * metric.scale)
        for (name, labels), value in zip(names, values, strict=True)
    ]


def sum_rows(groups: Iterator[list[Row]]) -> list[Row]:
    """Put together the rows of several workers that agree in metric and labels."""
    totals: dict[tuple[Metric, tuple[tuple[str, str], ...]], float] = {}
    for rows in groups:
        for metric, labels, value in rows:
            key = (metric, tuple(labels.items()))
            totals[key] = metric.merge(totals[key], value) if key in totals else value
    return [Row(metric, dict(labels), value) for (metric, labels), value in totals.items()]


def by_label(rows: list[Row], metric: Metric, label: str) -> Mapping[str, float]:
    """Values of one metric, summed over all labels but one."""
    result: dict[str, float] = {}
    for row in rows:
        if row.metric is metric:
            result[row.labels[label]] = result.get(row.labels[label], 0.0) + row.value
    return result
