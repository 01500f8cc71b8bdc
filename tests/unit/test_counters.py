"""Counters: what one process writes, another reads, in units that metrics show."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from vllm_moecxl.integration import metrics
from vllm_moecxl.runtime.counters import (
    BANK_BYTES_KINDS,
    FETCH_SECONDS_LE,
    Counters,
    Metric,
    PrefetchOutcome,
    Row,
    by_label,
    read_rows,
    sum_rows,
)
from vllm_moecxl.types import Cause, Lookup, PassKind, SlotState

CAUSES = ("demand", "prefetch", "migration")

_READ_IN_ANOTHER_PROCESS = """
import sys
from pathlib import Path
from vllm_moecxl.runtime.counters import Metric, by_label, read_rows
assert "torch" not in sys.modules, "the API server reads counters without torch"
for _ in sys.stdin:
    print(by_label(read_rows(Path(sys.argv[1])), Metric.FETCH_BYTES, "bank")["dram"], flush=True)
"""


def filled(path: Path | None = None, bank_names: tuple[str, ...] = ("dram",)) -> Counters:
    """Counters whose every row has another value."""
    counters = Counters(list(bank_names), path)
    counters.values[:] = range(1, len(counters.values) + 1)
    return counters


def test_there_is_a_row_for_every_outcome_bank_pass_and_state() -> None:
    rows = Counters(["dram", "cxl"]).rows()
    labels = {(row.metric, *row.labels.values()) for row in rows}
    assert len(labels) == len(rows)
    assert labels == {
        *((Metric.LOOKUPS, outcome.value) for outcome in Lookup),
        *((Metric.FETCH_BYTES, bank, cause) for bank in ("dram", "cxl") for cause in CAUSES),
        *((Metric.FETCH_SECONDS_BUCKET, cause, le) for cause in CAUSES for le in FETCH_SECONDS_LE),
        *((Metric.FETCH_SECONDS_SUM, cause) for cause in CAUSES),
        *((Metric.LINK_BUSY_SECONDS, bank) for bank in ("dram", "cxl")),
        *((Metric.PREFETCH, outcome.value) for outcome in PrefetchOutcome),
        *((metric,) for metric in (Metric.STALL_SECONDS, Metric.PREFETCH_UP, Metric.SIDECAR_UP)),
        (Metric.SIDECAR_CPU_SECONDS,),
        *((Metric.PASSES, kind.value) for kind in PassKind),
        *((Metric.SLOTS, state.name.lower()) for state in SlotState),
        *((metric, bank) for metric in (Metric.BANK_UP, Metric.BANK_BANDWIDTH) for bank in ("dram", "cxl")),
        *((Metric.BANK_BYTES, bank, kind) for bank in ("dram", "cxl") for kind in BANK_BYTES_KINDS),
    }
    assert all(row.value == 0 for row in rows)


def test_the_indices_name_the_rows_that_they_say() -> None:
    counters = filled()
    by_index = dict(enumerate(counters.rows()))
    assert by_index[counters.hit].labels == {"outcome": "hit"}
    assert by_index[counters.lookup[Lookup.MISS]].labels == {"outcome": "miss"}
    for cause, name in zip(Cause, CAUSES, strict=True):
        assert by_index[counters.fetch_bytes["dram", cause]][:2] == (
            Metric.FETCH_BYTES,
            {"bank": "dram", "cause": name},
        )
        assert by_index[counters.fetch_ns[cause]][:2] == (Metric.FETCH_SECONDS_SUM, {"cause": name})
        for row, le in zip(counters.fetch_buckets[cause], FETCH_SECONDS_LE, strict=True):
            assert by_index[row][:2] == (Metric.FETCH_SECONDS_BUCKET, {"cause": name, "le": le})
    assert by_index[counters.link_busy_ns["dram"]][:2] == (Metric.LINK_BUSY_SECONDS, {"bank": "dram"})
    assert by_index[counters.prefetch[PrefetchOutcome.LATE]][:2] == (Metric.PREFETCH, {"outcome": "late"})
    assert by_index[counters.sidecar_up].metric is Metric.SIDECAR_UP
    assert by_index[counters.sidecar_cpu_ns].metric is Metric.SIDECAR_CPU_SECONDS
    assert by_index[counters.single_pass].labels == {"kind": "single"}
    assert by_index[counters.slots[SlotState.FILLING]].labels == {"state": "filling"}
    assert by_index[counters.bank_up["dram"]].metric is Metric.BANK_UP
    assert by_index[counters.bank_bandwidth["dram"]].metric is Metric.BANK_BANDWIDTH
    assert by_index[counters.bank_bytes["dram", "astray"]].labels == {"bank": "dram", "kind": "astray"}


def test_stalls_are_counted_in_nanoseconds_and_shown_in_seconds() -> None:
    counters = Counters(["dram"])
    counters.values[counters.stall_ns] = 1_500_000_000
    assert [row.value for row in counters.rows() if row.metric is Metric.STALL_SECONDS] == [1.5]


def test_what_moves_on_the_links_is_counted_by_bank_and_cause_in_bytes_slabs_and_seconds() -> None:
    counters = Counters(["dram", "cxl"])
    counters.values[counters.bank_up["cxl"]] = counters.values[counters.bank_up["dram"]] = 1
    counters.moved("cxl", 5, Cause.DEMAND)
    counters.moved("cxl", 7, Cause.PREFETCH)
    counters.moved("dram", 11, Cause.DEMAND)
    for duration_s in (0.25, 0.5, 3e-4, 0.0, 1e3):
        counters.landed(Cause.PREFETCH, duration_s)
    counters.was_busy("cxl", 1.5)
    counters.was_busy("cxl", 2.0)
    counters.failed("cxl")
    found = {(row.metric, *row.labels.values()): row.value for row in counters.rows() if row.value}
    assert found == {
        (Metric.FETCH_BYTES, "cxl", "demand"): 5,
        (Metric.FETCH_BYTES, "cxl", "prefetch"): 7,
        (Metric.FETCH_BYTES, "dram", "demand"): 11,
        **{(Metric.FETCH_SECONDS_BUCKET, "prefetch", le): 1 for le in ("0.0001", "0.0003", "0.3", "1.0", "+Inf")},
        (Metric.FETCH_SECONDS_SUM, "prefetch"): pytest.approx(1000.7503),
        (Metric.LINK_BUSY_SECONDS, "cxl"): 3.5,
        (Metric.BANK_UP, "dram"): 1,
    }


def test_what_several_threads_count_is_all_counted() -> None:
    counters = Counters(["dram"])
    values = counters.values

    class Guarded:
        """Values that are looked at and changed by one thread at a time."""

        def __getitem__(self, row: int) -> Any:
            assert counters._lock._is_owned(), "another thread may count between"  # type: ignore[attr-defined]
            return values[row]

        def __setitem__(self, row: int, value: Any) -> None:
            assert counters._lock._is_owned()  # type: ignore[attr-defined]
            values[row] = value

    counters.values = Guarded()  # type: ignore[assignment]
    counters.moved("dram", 3, Cause.DEMAND)
    counters.landed(Cause.DEMAND, 0.5)
    counters.was_busy("dram", 0.5)
    assert values[counters.fetch_bytes["dram", Cause.DEMAND]] == 3


def test_a_wait_is_counted_also_where_it_ends_in_an_error() -> None:
    counters = Counters(["dram"])
    with pytest.raises(KeyError), counters.stalling():
        raise KeyError
    assert counters.values[counters.stall_ns] > 0


def test_a_file_gives_back_the_rows_that_were_written(tmp_path: Path) -> None:
    path = tmp_path / "worker.counters"
    counters = filled(path, bank_names=("dram", "cxl"))
    assert read_rows(path) == counters.rows() == filled(bank_names=("dram", "cxl")).rows()
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name], "nothing half-written is left behind"


def test_values_are_aligned_words_so_that_no_read_is_torn(tmp_path: Path) -> None:
    for bank_count in range(1, 9):  # headers of several lengths
        path = tmp_path / str(bank_count)
        counters = filled(path, tuple("x" * i for i in range(1, bank_count + 1)))
        assert counters.values.ctypes.data % 8 == 0
        assert len(path.read_bytes()) % 8 == 0


def test_another_process_sees_a_live_writer(tmp_path: Path) -> None:
    path = tmp_path / "worker.counters"
    counters = Counters(["dram"], path)
    with subprocess.Popen(
        [sys.executable, "-c", _READ_IN_ANOTHER_PROCESS, str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as reader:
        assert reader.stdin and reader.stdout
        for fetched in (0, 7, 1 << 40):
            counters.values[counters.fetch_bytes["dram", Cause.DEMAND]] = fetched
            reader.stdin.write("\n")
            reader.stdin.flush()
            assert reader.stdout.readline() == f"{float(fetched)}\n"
        reader.stdin.close()
    assert reader.returncode == 0


def test_workers_are_added_up_by_metric_and_labels(tmp_path: Path) -> None:
    one, two = filled(tmp_path / "0"), filled(tmp_path / "1", ("dram", "cxl"))
    total = sum_rows(read_rows(tmp_path / name) for name in ("0", "1"))
    assert by_label(total, Metric.FETCH_BYTES, "bank") == {
        "dram": sum(of.values[of.fetch_bytes["dram", cause]] for of in (one, two) for cause in Cause),
        "cxl": sum(two.values[two.fetch_bytes["cxl", cause]] for cause in Cause),
    }
    assert by_label(total, Metric.LOOKUPS, "outcome")["hit"] == one.values[one.hit] + two.values[two.hit]
    assert len(total) == len(two.rows())
    assert sum_rows(iter(())) == []


def test_a_bank_is_up_where_it_is_up_for_every_worker_and_as_fast_as_the_fastest_found_it() -> None:
    workers = [Counters(["dram"]), Counters(["dram"])]
    for counters, is_up, bandwidth in zip(workers, (1, 0), (5, 7), strict=True):
        counters.values[counters.bank_up["dram"]] = is_up
        counters.values[counters.sidecar_up] = is_up
        counters.values[counters.bank_bandwidth["dram"]] = bandwidth
        counters.values[counters.bank_bytes["dram", "used"]] = 3
    total = sum_rows(counters.rows() for counters in workers)
    assert by_label(total, Metric.BANK_UP, "bank") == {"dram": 0.0}
    assert [row.value for row in total if row.metric is Metric.SIDECAR_UP] == [0.0]
    assert by_label(total, Metric.BANK_BANDWIDTH, "bank") == {"dram": 7.0}
    assert by_label(total, Metric.BANK_BYTES, "kind") == {"capacity": 0.0, "used": 6.0, "astray": 0.0}


def test_by_label_adds_up_all_other_labels() -> None:
    rows = [
        Row(Metric.FETCH_BYTES, {"bank": "dram", "cause": "demand"}, 3.0),
        Row(Metric.FETCH_BYTES, {"bank": "dram", "cause": "prefetch"}, 4.0),
        Row(Metric.FETCH_BYTES, {"bank": "cxl", "cause": "demand"}, 5.0),
        Row(Metric.PASSES, {"kind": "single"}, 6.0),
    ]
    assert by_label(rows, Metric.FETCH_BYTES, "bank") == {"dram": 7.0, "cxl": 5.0}


def test_metrics_are_named_for_prometheus() -> None:
    for metric in Metric:
        assert metric.full_name.startswith("vllm:moe_offload_")
        is_histogram = metric in (Metric.FETCH_SECONDS_BUCKET, Metric.FETCH_SECONDS_SUM)
        assert (metric.full_name.endswith("_total") or is_histogram) == metric.is_counter
        assert metric.documentation.endswith(".")


def test_fetch_times_are_shown_as_a_cumulative_histogram(monkeypatch: pytest.MonkeyPatch) -> None:
    counters = Counters(["dram"])
    for duration_s in (2e-4, 2e-4, 0.02, 100.0):
        counters.landed(Cause.DEMAND, duration_s)
    monkeypatch.setattr(metrics, "current_rows", counters.rows)
    registry = CollectorRegistry()
    registry.register(metrics.OffloadCollector())
    text = generate_latest(registry).decode()
    shown = dict(re.findall(r'vllm:moe_offload_fetch_seconds_bucket{cause="demand",le="([^"]+)"} (\S+)', text))
    assert list(shown) == list(FETCH_SECONDS_LE)
    assert [float(count) for count in shown.values()] == [0, 2, 2, 2, 2, 3, 3, 3, 3, 3, 4]
    assert re.search(r'vllm:moe_offload_fetch_seconds_count{cause="demand"} 4.0', text)
    assert re.search(r'vllm:moe_offload_fetch_seconds_sum{cause="demand"} 100.0204', text)
    assert re.search(r'vllm:moe_offload_fetch_seconds_count{cause="prefetch"} 0.0', text)
    assert "vllm:moe_offload_stall_seconds_total 0.0" in text
