"""Counters: what one process writes, another reads, in units that metrics show."""

import subprocess
import sys
from pathlib import Path

from vllm_moecxl.runtime.counters import BANK_BYTES_KINDS, Counters, Metric, Row, by_label, read_rows, sum_rows
from vllm_moecxl.types import Lookup, PassKind, SlotState

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
        *((Metric.FETCH_BYTES, bank, "demand") for bank in ("dram", "cxl")),
        (Metric.STALL_SECONDS,),
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
    assert by_index[counters.fetch_bytes["dram"]].metric is Metric.FETCH_BYTES
    assert by_index[counters.single_pass].labels == {"kind": "single"}
    assert by_index[counters.slots[SlotState.FILLING]].labels == {"state": "filling"}
    assert by_index[counters.bank_up["dram"]].metric is Metric.BANK_UP
    assert by_index[counters.bank_bandwidth["dram"]].metric is Metric.BANK_BANDWIDTH
    assert by_index[counters.bank_bytes["dram", "astray"]].labels == {"bank": "dram", "kind": "astray"}


def test_stalls_are_counted_in_nanoseconds_and_shown_in_seconds() -> None:
    counters = Counters(["dram"])
    counters.values[counters.stall_ns] = 1_500_000_000
    assert [row.value for row in counters.rows() if row.metric is Metric.STALL_SECONDS] == [1.5]


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
            counters.values[counters.fetch_bytes["dram"]] = fetched
            reader.stdin.write("\n")
            reader.stdin.flush()
            assert reader.stdout.readline() == f"{float(fetched)}\n"
        reader.stdin.close()
    assert reader.returncode == 0


def test_workers_are_added_up_by_metric_and_labels(tmp_path: Path) -> None:
    one, two = filled(tmp_path / "0"), filled(tmp_path / "1", ("dram", "cxl"))
    total = sum_rows(read_rows(tmp_path / name) for name in ("0", "1"))
    assert by_label(total, Metric.FETCH_BYTES, "bank") == {
        "dram": one.values[one.fetch_bytes["dram"]] + two.values[two.fetch_bytes["dram"]],
        "cxl": two.values[two.fetch_bytes["cxl"]],
    }
    assert by_label(total, Metric.LOOKUPS, "outcome")["hit"] == one.values[one.hit] + two.values[two.hit]
    assert len(total) == len(two.rows())
    assert sum_rows(iter(())) == []


def test_a_bank_is_up_where_it_is_up_for_every_worker_and_as_fast_as_the_fastest_found_it() -> None:
    workers = [Counters(["dram"]), Counters(["dram"])]
    for counters, is_up, bandwidth in zip(workers, (1, 0), (5, 7), strict=True):
        counters.values[counters.bank_up["dram"]] = is_up
        counters.values[counters.bank_bandwidth["dram"]] = bandwidth
        counters.values[counters.bank_bytes["dram", "used"]] = 3
    total = sum_rows(counters.rows() for counters in workers)
    assert by_label(total, Metric.BANK_UP, "bank") == {"dram": 0.0}
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
        assert metric.full_name.endswith("_total") == metric.is_counter
        assert metric.documentation.endswith(".")
