"""The counters of all workers on vLLM's own /metrics.

Workers are other processes than the API server: each writes a counter file (`runtime.counters`), and a collector reads
all of them when somebody scrapes. The folder's name travels to child processes in the environment.
"""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
import weakref
from collections.abc import Iterable, Iterator
from itertools import accumulate
from pathlib import Path

from prometheus_client import REGISTRY, CollectorRegistry
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric as Family
from prometheus_client.registry import Collector

from vllm_moecxl.runtime.counters import FETCH_SECONDS_LE, Metric, Row, read_rows, sum_rows

_FOLDER_VARIABLE = "VLLM_MOECXL_COUNTERS"
_SUFFIX = ".counters"
_SHARED_MEMORY = Path("/dev/shm")


def counters_folder() -> Path:
    """The folder for this engine's counter files; the first process to ask makes it, and removes it when it ends."""
    if (known := os.environ.get(_FOLDER_VARIABLE)) and Path(known).is_dir():
        return Path(known)
    folder = Path(tempfile.mkdtemp(prefix="moecxl-", dir=_SHARED_MEMORY if _SHARED_MEMORY.is_dir() else None))
    os.environ[_FOLDER_VARIABLE] = str(folder)
    owner = os.getpid()

    def remove() -> None:
        if os.getpid() == owner:  # a forked child runs this too
            shutil.rmtree(folder, ignore_errors=True)

    atexit.register(remove)
    return folder


def counters_path(rank: int) -> Path:
    """A new counter file for a worker. Several models of one worker (a draft model) get a file each."""
    folder = counters_folder()
    return folder / f"{rank}-{os.getpid()}-{len(list(folder.iterdir()))}{_SUFFIX}"


def current_rows() -> list[Row]:
    """The counters of all workers, added up."""
    folder = os.environ.get(_FOLDER_VARIABLE)
    files = sorted(Path(folder).glob(f"[!.]*{_SUFFIX}")) if folder else []
    return sum_rows(_read_if_there(file) for file in files)


def _read_if_there(file: Path) -> list[Row]:
    try:
        return read_rows(file)
    except FileNotFoundError:  # its worker has ended since the folder was listed
        return []


class OffloadCollector(Collector):
    """Turns counter files into Prometheus families."""

    def describe(self) -> Iterable[Family]:
        return []  # nothing to read yet when this is registered

    def collect(self) -> Iterator[Family]:
        families: dict[Metric, CounterMetricFamily | GaugeMetricFamily] = {}
        rows = current_rows()
        if rows:
            yield _fetch_seconds(rows)
        for metric, labels, value in rows:
            if metric in (Metric.FETCH_SECONDS_BUCKET, Metric.FETCH_SECONDS_SUM):
                continue
            if metric not in families:
                make = CounterMetricFamily if metric.is_counter else GaugeMetricFamily
                families[metric] = make(metric.full_name, metric.documentation, labels=list(labels))
            families[metric].add_metric(list(labels.values()), value)
        yield from families.values()


def _fetch_seconds(rows: Iterable[Row]) -> HistogramMetricFamily:
    """The histogram that the rows of fetches are made for."""
    buckets: dict[str, dict[str, float]] = {}
    sums: dict[str, float] = {}
    for metric, labels, value in rows:
        if metric is Metric.FETCH_SECONDS_BUCKET:
            buckets.setdefault(labels["cause"], {})[labels["le"]] = value
        elif metric is Metric.FETCH_SECONDS_SUM:
            sums[labels["cause"]] = value
    name = Metric.FETCH_SECONDS_SUM.full_name.removesuffix("_sum")
    family = HistogramMetricFamily(name, Metric.FETCH_SECONDS_SUM.documentation, labels=["cause"])
    for cause, by_limit in buckets.items():
        counts = accumulate(by_limit[le] for le in FETCH_SECONDS_LE)
        family.add_metric([cause], list(zip(FETCH_SECONDS_LE, counts, strict=True)), sums[cause])
    return family


_COLLECTOR = OffloadCollector()
_registered: weakref.WeakSet[CollectorRegistry] = weakref.WeakSet()


def register_collector(registry: CollectorRegistry = REGISTRY) -> None:
    """Show the counters in a registry; once, however often it is asked."""
    if registry not in _registered:
        registry.register(_COLLECTOR)
        _registered.add(registry)
