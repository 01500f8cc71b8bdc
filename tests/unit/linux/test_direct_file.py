"""Reading past the page cache: the bytes of the file, errors that say what happened, and nothing left in the cache."""

from __future__ import annotations

import ctypes
import mmap
import os
import random
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from vllm_moecxl.errors import ConfigError, TransferError
from vllm_moecxl.linux import direct_file
from vllm_moecxl.linux.direct_file import CHUNK_BYTES, DirectFile
from vllm_moecxl.units import KIB, MIB

BYTE_COUNT = 5 * MIB + 777

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mincore.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p)


@pytest.fixture(scope="module")
def data() -> bytes:
    return random.Random(1).randbytes(BYTE_COUNT)


@pytest.fixture
def path(tmp_path: Path, data: bytes) -> Path:
    path = tmp_path / "data"
    path.write_bytes(data)
    return path


@pytest.fixture(params=["direct", "buffered"])
def file(request: pytest.FixtureRequest, path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[DirectFile]:
    """The file with direct reads, and as on a file system that has none."""
    if request.param == "buffered":
        refuse_direct(monkeypatch)
    file = DirectFile(path)
    if request.param == "direct" and not file.is_direct:
        pytest.skip("this file system has no direct reads")
    assert file.is_direct == (request.param == "direct")
    yield file
    file.close()


def refuse_direct(monkeypatch: pytest.MonkeyPatch) -> None:
    """As network and memory file systems answer."""
    real = os.open

    def opened(path: object, flags: int, *rest: int) -> int:
        if flags & os.O_DIRECT:
            raise OSError(22, "Invalid argument")
        return real(path, flags, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "open", opened)


def aligned(byte_count: int, skew: int = 0) -> memoryview:
    """Page-aligned memory, or `skew` bytes beside it."""
    return memoryview(mmap.mmap(-1, byte_count + skew or 1))[skew : skew + byte_count]


SIZES = (0, 1, 511, 512, 513, 4095, 4096, 4097, MIB - 1, MIB, MIB + 1, 3 * MIB, 3 * MIB + 5)
OFFSETS = (0, 1, 511, 512, 4096, 4097, MIB, MIB + 1, 2 * MIB - 3)


@pytest.mark.parametrize("skew", [0, 1, 8, 512])
@pytest.mark.parametrize("offset", OFFSETS)
def test_any_range_into_any_memory_is_what_the_file_has(file: DirectFile, data: bytes, offset: int, skew: int) -> None:
    for size in SIZES:
        target = aligned(size, skew)
        file.read_into([(offset, target)])
        assert target == data[offset : offset + size], size
    assert file.read(offset, 100) == data[offset : offset + 100]


def test_the_ragged_end_of_the_file_is_read_and_no_byte_beyond_it(file: DirectFile, data: bytes) -> None:
    assert file.byte_count == BYTE_COUNT
    for size in (1, 777, 778, 4096, 2 * MIB + 1):
        assert file.read(BYTE_COUNT - size, size) == data[-size:]
        with pytest.raises(TransferError, match=f"ends at {BYTE_COUNT} of the {BYTE_COUNT} bytes"):
            file.read(BYTE_COUNT - size, size + 1)
    with pytest.raises(TransferError):
        file.read(BYTE_COUNT + 5 * MIB, 1)


def test_many_reads_at_once_each_fill_their_own_target(file: DirectFile, data: bytes) -> None:
    rng = random.Random(2)
    reads = []
    for _ in range(60):
        size = rng.choice([1, 100, 4096, 70_000, MIB + 3])
        reads.append((rng.randrange(BYTE_COUNT - size), aligned(size, rng.choice([0, 0, 3]))))
    file.read_into(reads)
    for offset, target in reads:
        assert target == data[offset : offset + target.nbytes]


def test_memory_around_a_target_is_left_alone(file: DirectFile) -> None:
    memory = bytearray(b"\xaa" * 10_000)
    file.read_into([(3, memoryview(memory)[1000:6000])])
    assert memory[:1000] == b"\xaa" * 1000 and memory[6000:] == b"\xaa" * 4000


@pytest.mark.parametrize("new_size", [0, 100, 4096, MIB, 2 * MIB + 5])
@pytest.mark.parametrize("offset", [0, 1, 4096])
def test_a_file_that_shrinks_while_it_is_open_is_a_transfer_error(file: DirectFile, new_size: int, offset: int) -> None:
    os.truncate(file.path, new_size)
    with pytest.raises(TransferError, match=rf"data ends at \d+ of the {BYTE_COUNT} bytes that it had: it was cut"):
        file.read_into([(offset, aligned(3 * MIB))])
    if new_size > 4200:
        file.read_into([(offset, aligned(100))])


def check_a_file_that_ends_early(tmp_path: Path) -> None:
    """Bounded: a reader that never gives up would hang the test that takes its guard out."""
    path = tmp_path / "short"
    path.write_bytes(bytes(100))
    file = DirectFile(path)
    tries = iter(range(5))
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(os, "preadv", lambda *_: next(tries) and 0)
        with pytest.raises(TransferError):
            file.read(0, 200)
    file.close()


def test_a_device_that_fails_is_a_transfer_error_that_is_told_when_all_reads_have_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "data"
    path.write_bytes(bytes(3 * MIB))
    file = DirectFile(path)
    failed, may_end, told = threading.Event(), threading.Event(), threading.Event()
    preadv = os.preadv

    def failing(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        if offset == MIB:
            failed.set()
            raise OSError(5, "Input/output error")
        if offset == 2 * MIB:
            assert may_end.wait(10)
        return preadv(descriptor, buffers, offset)

    monkeypatch.setattr(os, "preadv", failing)
    caught: list[TransferError] = []

    def read() -> None:
        try:
            file.read_into([(0, aligned(3 * MIB))])
        except TransferError as error:
            caught.append(error)
        told.set()

    reader = threading.Thread(target=read)
    reader.start()
    try:
        assert failed.wait(10)
        assert not told.wait(0.2), "another read was still writing into the target"
    finally:
        may_end.set()
        reader.join(10)
        file.close()
    assert "reading 1048576 bytes at 1048576" in str(caught[0]) and "(Input/output error)" in str(caught[0])


def test_reads_that_the_kernel_cuts_short_go_on(file: DirectFile, data: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    preadv = os.preadv
    monkeypatch.setattr(os, "preadv", lambda descriptor, buffers, at: preadv(descriptor, [buffers[0][: 8 * KIB]], at))
    target = aligned(MIB + 5 * KIB)
    file.read_into([(4096, target)])
    assert target == data[4096 : 4096 + target.nbytes]


def test_a_device_that_takes_no_alignment_of_ours_is_read_through_the_cache(
    path: Path, data: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    preadv, opened = os.preadv, []

    def picky(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        if not opened:
            raise OSError(22, "Invalid argument")
        return preadv(descriptor, buffers, offset)

    monkeypatch.setattr(os, "preadv", picky)
    file = DirectFile(path)
    opened.append(True)
    assert not file.is_direct
    assert file.read(5, 1000) == data[5:1005]
    file.close()


@pytest.mark.parametrize("kind", ["folder", "pipe", "missing", "device"])
def test_only_regular_files_are_opened(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "it"
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path = Path("/dev/zero")
    told = r"cannot be opened \(No such file" if kind == "missing" else "is no regular file"
    before = os.listdir("/proc/self/fd")
    with pytest.raises(ConfigError, match=f'banks="file:{path}" {told}.*: name a file that moecxl pack wrote'):
        DirectFile(path)
    assert os.listdir("/proc/self/fd") == before


def test_a_file_that_is_only_opened_has_no_threads_and_a_closed_one_no_descriptors(path: Path) -> None:
    def count() -> tuple[int, int]:
        return len(os.listdir("/proc/self/fd")), threading.active_count()

    before = count()
    file = DirectFile(path)
    file.read(0, 100)
    assert count()[1] == before[1]
    file.read(0, 3 * CHUNK_BYTES)
    assert count()[1] > before[1]
    file.close()
    assert count() == before


def cached_page_count(path: Path) -> int:
    """Pages of the file in the page cache."""
    with path.open("r+b") as opened:
        region = mmap.mmap(opened.fileno(), 0)
    page_count = -(-len(region) // mmap.PAGESIZE)
    present = (ctypes.c_ubyte * page_count)()
    address = ctypes.addressof(ctypes.c_char.from_buffer(region))
    if _libc.mincore(address, len(region), ctypes.addressof(present)):
        pytest.skip(f"this kernel does not tell what is cached ({os.strerror(ctypes.get_errno())})")
    return sum(one & 1 for one in present)


def test_what_was_read_does_not_stay_in_the_page_cache(file: DirectFile) -> None:
    descriptor = os.open(file.path, os.O_RDWR)
    os.fsync(descriptor)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)
    if cached_page_count(file.path):
        pytest.skip("this file system keeps its files in the page cache")
    assert file.path.read_bytes() and cached_page_count(file.path), "the measurement sees nothing"
    os.posix_fadvise(file._buffered, 0, 0, os.POSIX_FADV_DONTNEED)
    assert not cached_page_count(file.path)
    file.read_into([(0, aligned(4 * MIB)), (4 * MIB + 1, aligned(1000)), (5 * MIB - 100, aligned(300, 3))])
    assert not cached_page_count(file.path)


def test_alignments_are_tried_smallest_first() -> None:
    assert sorted(direct_file._ALIGNMENTS) == list(direct_file._ALIGNMENTS)
