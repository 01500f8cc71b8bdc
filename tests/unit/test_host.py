"""What Linux says about memory, and giving back the pages of a mapped file."""

import mmap
import resource
from pathlib import Path

import numpy as np
import pytest
import torch

from vllm_moecxl.data import host
from vllm_moecxl.data.host import FileMappings, anonymous_tensor, available_bytes, locked_limit_bytes, trim_heap
from vllm_moecxl.units import GIB, KIB, MIB

PAGE_BYTES = mmap.PAGESIZE


def tree(
    root: Path, *, limit: str | None, usage: int | None = None, stat: str | None = None, available_kib: int = 8 << 20
) -> tuple[Path, Path]:
    """A /proc with 8 GiB available, and a cgroup."""
    proc, cgroup = root / "proc", root / "cgroup"
    (proc / "self").mkdir(parents=True)
    (proc / "self" / "cgroup").write_text("0::/\n")
    cgroup.mkdir()
    (proc / "meminfo").write_text(
        f"MemTotal: 16777216 kB\nMemFree:     1024 kB\nMemAvailable: {available_kib} kB\nHugePages_Total:  0\n"
    )
    for name, text in (("memory.max", limit), ("memory.current", usage), ("memory.stat", stat)):
        if text is not None:
            (cgroup / name).write_text(f"{text}\n")
    return proc, cgroup


@pytest.mark.parametrize(
    ("limit", "usage", "stat", "expected"),
    [
        (None, None, None, 8 * GIB),
        ("max", GIB, "inactive_file 4096", 8 * GIB),
        (str(GIB), None, None, 8 * GIB),
        (str(4 * GIB), GIB, None, 3 * GIB),
        (str(4 * GIB), GIB, f"anon 1\ninactive_file {MIB}\nactive_file 7", 3 * GIB + MIB),
        (str(4 * GIB), GIB, "anon 1", 3 * GIB),
        (str(64 * GIB), GIB, None, 8 * GIB),
        (str(GIB), 2 * GIB, None, 0),
    ],
    ids=["no cgroup", "unlimited", "no usage", "limit", "page cache is free", "no file cache", "machine", "over"],
)
def test_available_memory_is_the_machines_or_the_containers_whichever_is_less(
    tmp_path: Path, limit: str | None, usage: int | None, stat: str | None, expected: int
) -> None:
    assert available_bytes(*tree(tmp_path, limit=limit, usage=usage, stat=stat)) == expected


def test_the_tightest_limit_above_the_process_counts(tmp_path: Path) -> None:
    proc, cgroup = tree(tmp_path, limit=None)
    (proc / "self" / "cgroup").write_text("0::/user.slice/engine.scope\n")
    for folder, limit in (("user.slice", 3 * GIB), ("user.slice/engine.scope", 5 * GIB)):
        (cgroup / folder).mkdir()
        (cgroup / folder / "memory.max").write_text(f"{limit}\n")
        (cgroup / folder / "memory.current").write_text(f"{GIB}\n")
    assert available_bytes(proc, cgroup) == 2 * GIB


def test_limits_of_cgroup_version_1_count(tmp_path: Path) -> None:
    proc, cgroup = tree(tmp_path, limit=None)
    (proc / "self" / "cgroup").write_text("5:cpu:/\n4:memory:/job\n0::/\n")
    folder = cgroup / "memory" / "job"
    folder.mkdir(parents=True)
    (folder / "memory.limit_in_bytes").write_text(f"{4 * GIB}\n")
    (folder / "memory.usage_in_bytes").write_text(f"{3 * GIB}\n")
    (folder / "memory.stat").write_text(f"cache 1\ntotal_inactive_file {GIB}\n")
    assert available_bytes(proc, cgroup) == 2 * GIB


def test_available_memory_of_this_machine_lies_between_nothing_and_all_of_it() -> None:
    total_kib = int(Path("/proc/meminfo").read_text().split()[1])
    assert 0 < available_bytes() < total_kib * KIB


@pytest.mark.parametrize(("soft", "expected"), [(resource.RLIM_INFINITY, None), (8 * MIB, 8 * MIB), (0, 0)])
def test_the_lock_limit_is_the_soft_one(monkeypatch: pytest.MonkeyPatch, soft: int, expected: int | None) -> None:
    asked: list[int] = []
    monkeypatch.setattr(resource, "getrlimit", lambda which: (asked.append(which), (soft, 99))[1])
    assert locked_limit_bytes() == expected
    assert asked == [resource.RLIMIT_MEMLOCK]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.float8_e4m3fn, torch.int64])
@pytest.mark.parametrize("shape", [(1,), (3, 5, 7), (1 << 21, 2)])
def test_an_anonymous_tensor_is_exact_and_zero_and_its_own(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    first, second = anonymous_tensor(shape, dtype), anonymous_tensor(shape, dtype)
    assert first.shape == shape and first.dtype == dtype and first.is_contiguous()
    assert first.data_ptr() % PAGE_BYTES == 0
    assert first.untyped_storage().nbytes() == first.numel() * dtype.itemsize
    first.view(torch.uint8).fill_(1)
    assert not second.view(torch.uint8).any()


def test_an_anonymous_tensor_takes_no_memory_until_it_is_touched() -> None:
    tensor = anonymous_tensor((64 * MIB,), torch.uint8)
    before = resident_bytes(tensor.data_ptr())  # of the tensor and of neighbours that Linux has merged with it
    tensor[::PAGE_BYTES] = 1
    assert resident_bytes(tensor.data_ptr()) - before == 64 * MIB


def test_a_kernel_without_huge_pages_gives_the_tensor_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    class Region(mmap.mmap):
        def madvise(self, *_: int) -> None:
            raise OSError(22, "Invalid argument")  # what Linux answers where huge pages are not built in

    monkeypatch.setattr(mmap, "mmap", Region)
    assert anonymous_tensor((4 * MIB,), torch.uint8).numel() == 4 * MIB


def test_a_heap_is_trimmed_where_the_c_library_can_and_left_alone_where_it_cannot(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    kept: list[int] = []

    class Glibc:
        malloc_trim = staticmethod(kept.append)

    monkeypatch.setattr(host, "_libc", Glibc())
    trim_heap()
    assert kept == [0]
    monkeypatch.setattr(host, "_libc", object())
    trim_heap()


def resident_bytes(address: int) -> int:
    """Resident memory of the mapping that starts at, or holds, `address`."""
    is_inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        key, *rest = line.split()
        if not key.endswith(":"):
            start, _, end = key.partition("-")
            is_inside = int(start, 16) <= address < int(end, 16)
        elif is_inside and key == "Rss:":
            return int(rest[0]) * KIB
    raise AssertionError("no mapping holds this address")


@pytest.fixture
def mapped(tmp_path: Path) -> np.ndarray:
    """16 pages of a file, mapped and read."""
    path = tmp_path / "shard.safetensors"
    np.arange(16 * PAGE_BYTES, dtype=np.uint32).astype(np.uint8).tofile(path)
    with path.open("rb") as file:
        region = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    data = np.frombuffer(region, dtype=np.uint8)
    assert data.sum() and resident_bytes(data.ctypes.data) == 16 * PAGE_BYTES
    return data


def test_dropping_a_mapped_file_gives_its_pages_back_and_keeps_its_bytes(mapped: np.ndarray) -> None:
    before = mapped.copy()
    assert FileMappings().drop(mapped.ctypes.data, mapped.nbytes)
    assert resident_bytes(mapped.ctypes.data) == 0
    assert np.array_equal(mapped, before)


def test_only_whole_pages_are_dropped(mapped: np.ndarray) -> None:
    address = mapped.ctypes.data
    mappings = FileMappings()
    assert mappings.drop(address + 1, 3 * PAGE_BYTES)
    assert resident_bytes(address) == 14 * PAGE_BYTES, "the first and the last page are shared with other tensors"
    assert not mappings.drop(address + 8 * PAGE_BYTES + 1, PAGE_BYTES)
    assert not mappings.drop(address + 8 * PAGE_BYTES, 0)
    assert resident_bytes(address) == 14 * PAGE_BYTES


def test_anonymous_memory_is_never_dropped() -> None:
    tensor = anonymous_tensor((8 * PAGE_BYTES,), torch.uint8).fill_(7)
    assert not FileMappings().drop(tensor.data_ptr(), tensor.nbytes)
    assert (tensor == 7).all()


def test_a_range_that_reaches_beyond_the_file_is_not_dropped(mapped: np.ndarray) -> None:
    assert not FileMappings().drop(mapped.ctypes.data - PAGE_BYTES, 2 * PAGE_BYTES)
    assert resident_bytes(mapped.ctypes.data) == 16 * PAGE_BYTES


def test_only_readable_mappings_of_files_count(tmp_path: Path, mapped: np.ndarray) -> None:
    start, end = mapped.ctypes.data, mapped.ctypes.data + mapped.nbytes
    for accepted, line in [
        (True, f"{start:x}-{end:x} r--p 00000000 fe:00 260386    /models/a b.safetensors"),
        (True, f"{start:x}-{end:x} rw-p 00000000 fe:00 260386    /models/a.safetensors"),
        (False, f"{start:x}-{end:x} ---p 00000000 fe:00 260386    /models/a.safetensors"),
        (False, f"{start:x}-{end:x} rw-p 00000000 00:00 0"),
        (False, f"{start:x}-{end:x} rw-p 00000000 00:00 0    [heap]"),
    ]:
        maps = tmp_path / "maps"
        maps.write_text(line + "\n")
        assert FileMappings(maps).drop(start, PAGE_BYTES) == accepted, line
