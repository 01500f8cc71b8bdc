"""Measuring banks: the figures are those of the device, in virtual time, and what is kept steers the runtime."""

import threading
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from vllm_moecxl.config import BankSpec
from vllm_moecxl.control.device_model import DeviceModel, DeviceSpec
from vllm_moecxl.data import profiling
from vllm_moecxl.data.banks.base import BankProfile, RowCopy
from vllm_moecxl.data.banks.emulated import EmulatedBank
from vllm_moecxl.data.banks.make import make_banks
from vllm_moecxl.data.banks.memory import DramBank, MemoryRows
from vllm_moecxl.data.profiles import PUBLISHED, load_profiles, save_profile
from vllm_moecxl.data.profiling import (
    READ_BYTES,
    Measured,
    dependent_load_s,
    enough_scratch_bytes,
    last_level_cache_bytes,
    measure,
    measurement_dates,
)
from vllm_moecxl.errors import CapacityError
from vllm_moecxl.units import KIB, MIB


@pytest.fixture(autouse=True)
def _few_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    """In virtual time one read says as much as a hundred."""
    monkeypatch.setattr(profiling, "_POINT_BYTES", 2 * MIB)
    monkeypatch.setattr(profiling, "_ROUND_READS_MAX", 2)
    monkeypatch.setattr(profiling, "_ROUND_COUNT", 2)


class ThreadTime:
    """A clock for each thread, which moves only when that thread sleeps.

    The main thread is as late as the latest; a thread that waited for it goes on where it was when it last looked.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._local = threading.local()
        self._latest_s = self._start_s = 0.0

    def __call__(self) -> float:
        with self._lock:
            if threading.current_thread() is threading.main_thread():
                self._local.now_s = self._start_s = self._latest_s
            return max(getattr(self._local, "now_s", 0.0), self._start_s)

    def sleep(self, duration_s: float) -> None:
        now_s = self() + duration_s
        with self._lock:
            self._local.now_s = now_s
            self._latest_s = max(self._latest_s, now_s)


def emulated(spec: DeviceSpec, time: ThreadTime, capacity_bytes: int | None = None) -> EmulatedBank:
    profile = BankProfile(spec.latency_s, spec.read_bytes_per_s, "emulated")
    return EmulatedBank("emulated:x", capacity_bytes, DeviceModel(spec, seed=1), profile, time, time.sleep)


def dram(capacity_bytes: int | None = None) -> DramBank:
    return DramBank("dram", "dram", capacity_bytes, PUBLISHED["dram"])


@pytest.mark.parametrize(("latency_s", "bytes_per_s"), [(1e-3, 5e8), (200e-6, 2e9)])
def test_an_emulated_bank_measures_as_its_model_says(latency_s: float, bytes_per_s: float) -> None:
    time = ThreadTime()
    measured = measure(emulated(DeviceSpec(latency_s, bytes_per_s, bytes_per_s), time), 64 * MIB, 3, time)
    assert measured.load_s is None, "loads would be those of the DRAM below"
    assert tuple(measured.read_s) == READ_BYTES
    for size, read_s in measured.read_s.items():
        assert read_s == pytest.approx(latency_s + size / bytes_per_s)
    assert measured.latency_s == pytest.approx(latency_s + 4 * KIB / bytes_per_s)
    # One stream waits for the latency of each read; with several, one moves bytes while another waits.
    alone = READ_BYTES[-1] / (latency_s + READ_BYTES[-1] / bytes_per_s)
    assert measured.read_bytes_per_s[1] == pytest.approx(alone, rel=1e-3)
    for count in (2, 3):
        assert alone < measured.read_bytes_per_s[count] == pytest.approx(bytes_per_s, rel=0.1)


def test_a_tail_moves_no_median() -> None:
    time = ThreadTime()
    spec = DeviceSpec(1e-6, 1e9, 1e9, tail_share=0.05, tail_s_mean=1.0)
    measured = measure(emulated(spec, time), 64 * MIB, 1, time)
    assert measured.read_s[4 * KIB] == pytest.approx(1e-6 + 4 * KIB / 1e9)


def test_scratch_stays_within_half_of_the_banks_room() -> None:
    time = ThreadTime()
    bank = emulated(DeviceSpec(1e-3, 1e9, 1e9), time, capacity_bytes=2 * MIB + 5)
    measured = measure(bank, 64 * MIB, 1, time)
    assert measured.scratch_bytes == bank.used_bytes == MIB
    assert max(measured.read_s) == MIB
    with pytest.raises(CapacityError, match=r"emulated:x has no room"):
        measure(emulated(DeviceSpec(1e-3, 1e9, 1e9), time, capacity_bytes=4 * KIB), 64 * MIB, 1, time)


def test_scratch_that_lies_elsewhere_is_not_measured() -> None:
    bank = dram()
    bank.astray_bytes = 4 * KIB
    with pytest.raises(CapacityError, match="elsewhere"):
        measure(bank, MIB, 1)


class _Recording(DramBank):
    """Notes every read and who asked for it."""

    def __init__(self) -> None:
        super().__init__("dram", "dram", None, PUBLISHED["dram"])
        self.copies: list[tuple[int, RowCopy]] = []

    def read(self, copies: Sequence[RowCopy]) -> None:
        self.copies += [(threading.get_ident(), copy) for copy in copies]
        super().read(copies)


def test_reads_go_all_over_the_scratch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profiling, "_POINT_BYTES", 64 * MIB)
    bank = _Recording()
    measure(bank, 32 * MIB, 1)
    for size in READ_BYTES:
        row_ids = {copy.row_id for _, copy in bank.copies if copy.target.nbytes == size}
        row_count = 32 * MIB // size
        # All of them, or as many as are read.
        assert len(row_ids) >= min(row_count, 64)
        assert max(row_ids) >= row_count * 3 // 4 and min(row_ids) <= row_count // 4
    assert all(isinstance(copy.rows, MemoryRows) for _, copy in bank.copies)


def test_streams_are_threads_with_targets_of_their_own() -> None:
    bank = _Recording()
    measure(bank, 32 * MIB, 3)
    by_thread: dict[int, set[int]] = {}
    for thread, copy in bank.copies:
        by_thread.setdefault(thread, set()).add(copy.target.data_ptr())
    del by_thread[threading.get_ident()]
    # One thread reads alone, then two together, then three: the targets of any round are apart.
    assert len(set.union(*by_thread.values())) == 3 * 2


def test_a_walk_loads_every_line_once_and_then_ends() -> None:
    """The C library's tree search finds the key only at the list's end: otherwise the assertion in there fails."""
    scratch = torch.ones(MIB, dtype=torch.uint8)
    ticks = iter(range(100))
    per_load_s = dependent_load_s(scratch, lambda: float(next(ticks)))
    assert per_load_s == pytest.approx(1 / (MIB // 128))
    assert not torch.equal(scratch, torch.ones_like(scratch))


def test_measuring_leaves_pytorchs_threads_as_they_were() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        measure(dram(), MIB, 1)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def test_memory_is_loaded_from_only_where_anyone_may() -> None:
    bank = dram()
    measured = measure(bank, MIB, 1)
    assert measured.load_s is not None and measured.latency_s == measured.load_s
    bank.reads_safely = True
    assert measure(bank, MIB, 1).load_s is None


def _measured(load_s: float, bytes_per_s: float) -> Measured:
    return Measured(load_s, {4 * KIB: 2e-6}, {1: bytes_per_s / 2, 2: bytes_per_s}, MIB)


def test_what_placement_uses_has_two_digits() -> None:
    summary = _measured(123.4e-9, 19.51e9).as_dict()["summary"]
    assert summary == {"latency_s": 120e-9, "read_bytes_per_s": 20e9}


def test_a_kept_measurement_steers_the_banks_of_this_machine_only(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "profiles.json"
    specs = (BankSpec("dram"),)
    save_profile("this", "dram", {**_measured(100e-9, 10e9).as_dict(), "date": "2026-11-22"}, path)
    assert make_banks(specs, load_profiles("this", path))[0].profile == BankProfile(100e-9, 10e9, "measured")
    assert make_banks(specs, load_profiles("other", path))[0].profile == PUBLISHED["dram"]
    assert measurement_dates("this", path) == {"dram": "2026-11-22"}
    assert measurement_dates("other", path) == {}


@pytest.mark.parametrize(
    "text", ["", "[]", "[" * 100_000, '{"this": []}', '{"this": {"dram": {}}}', '{"this": {"dram": 5}}']
)
def test_a_damaged_file_has_no_dates(tmp_path: Path, text: str) -> None:
    path = tmp_path / "profiles.json"
    path.write_text(text)
    assert measurement_dates("this", path) == {}


def _cache(sysfs: Path, cpu: int, index: int, level: int, cpus: str, size: str) -> None:
    folder = sysfs / f"devices/system/cpu/cpu{cpu}/cache/index{index}"
    folder.mkdir(parents=True)
    for name, text in (("level", str(level)), ("shared_cpu_list", cpus), ("size", size)):
        (folder / name).write_text(text + "\n")


def test_scratch_outgrows_all_last_level_caches_together(tmp_path: Path) -> None:
    assert enough_scratch_bytes(tmp_path) == 256 * MIB
    for cpu in range(4):
        _cache(tmp_path, cpu, 2, 2, str(cpu), "1024K")
        _cache(tmp_path, cpu, 3, 3, "0-1" if cpu < 2 else "2-3", "98304K")
    assert last_level_cache_bytes(tmp_path) == 2 * 96 * MIB
    assert enough_scratch_bytes(tmp_path) == 4 * 2 * 96 * MIB
