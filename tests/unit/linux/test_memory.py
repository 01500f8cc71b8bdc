"""Placing memory on nodes and reading it safely, on this machine's own kernel, which has a node 0."""

from __future__ import annotations

import ctypes
import errno
import mmap
from array import array
from collections.abc import Callable
from pathlib import Path

import pytest

from vllm_moecxl.errors import CapacityError, ConfigError
from vllm_moecxl.linux import memory, syscalls
from vllm_moecxl.linux.memory import (
    RESERVE_BYTES,
    Mapping,
    Placement,
    UnreadablePageError,
    available_bytes,
    bring_back,
    copy_safely,
    place,
    read_safely,
    verify,
)
from vllm_moecxl.units import KIB, MIB

PAGE_BYTES = mmap.PAGESIZE
PROT_NONE = 0


def sysfs_with_node(root: Path, node: int, *, free_kib: int, inactive_file_kib: int = 0) -> Path:
    folder = root / "devices" / "system" / "node" / f"node{node}"
    folder.mkdir(parents=True)
    (folder.parent / "online").write_text(f"0,{node}\n")
    (folder / "meminfo").write_text(
        f"Node {node} MemTotal:       99999999 kB\nNode {node} MemFree:        {free_kib} kB\n"
        f"Node {node} Inactive(anon): 99999 kB\nNode {node} Inactive(file): {inactive_file_kib} kB\n"
    )
    return root


def is_untouched(mapping: Mapping) -> bool:
    """Whether no page of the mapping takes memory."""
    pages = array("Q", range(mapping.address, mapping.address + mapping.byte_count, PAGE_BYTES))
    return set(syscalls.nodes_of(pages)) <= {-errno.ENOENT, -errno.EFAULT}


def refuse(call: str, code: int) -> Callable[..., None]:
    def refused(*_: object) -> None:
        raise OSError(code, "as the test wants", call)

    return refused


@pytest.mark.parametrize("byte_count", [1, PAGE_BYTES, 2 * MIB, 5 * MIB + 1])
def test_every_page_of_a_placed_mapping_is_on_the_node(byte_count: int) -> None:
    mapping = Mapping.anonymous(byte_count)
    assert mapping.byte_count == byte_count and is_untouched(mapping)
    placement = place(mapping, 0)
    page_bytes = -(-byte_count // PAGE_BYTES) * PAGE_BYTES
    assert placement == Placement(node=0, bytes_by_node={0: page_bytes}) == verify(mapping, 0)
    assert placement.is_achieved
    assert syscalls.policy_of(mapping.address) == (2, (0,)), "not MPOL_BIND, as linux/mempolicy.h numbers it"
    assert mapping.buffer[:] == bytes(byte_count)


def test_a_mapping_and_its_buffer_are_the_same_memory() -> None:
    mapping = Mapping.anonymous(PAGE_BYTES)
    mapping.buffer[5:8] = b"abc"
    copy = bytearray(3)
    read_safely(mapping.address + 5, copy)
    assert copy == b"abc"


def test_it_is_touched_in_parts_with_a_look_at_free_memory_before_each(monkeypatch: pytest.MonkeyPatch) -> None:
    rooms = [8 * MIB + RESERVE_BYTES, 8 * MIB + RESERVE_BYTES, 4 * MIB + RESERVE_BYTES - 1]
    monkeypatch.setattr(memory, "_TOUCH_BYTES", 4 * MIB)
    monkeypatch.setattr(memory, "available_bytes", lambda node, sysfs: rooms.pop(0))
    mapping = Mapping.anonymous(8 * MIB)
    with pytest.raises(CapacityError, match=r'"numa:0" has 68.00 MiB available and cannot take 4.00 MiB'):
        place(mapping, 0)
    assert not rooms and is_untouched(mapping)
    assert syscalls.policy_of(mapping.address) == (syscalls.MPOL_DEFAULT, ())


def test_a_node_that_does_not_exist_is_refused_and_nothing_changes() -> None:
    mapping = Mapping.anonymous(PAGE_BYTES)
    with pytest.raises(ConfigError, match=r'banks: "numa:99" is no node of this machine: name one .*online \(0\)'):
        place(mapping, 99)
    assert is_untouched(mapping) and syscalls.policy_of(mapping.address)[0] == syscalls.MPOL_DEFAULT


def test_a_node_that_only_sysfs_has_is_refused_by_the_kernel_and_nothing_changes(tmp_path: Path) -> None:
    sysfs = sysfs_with_node(tmp_path, 99, free_kib=1 << 20)
    mapping = Mapping.anonymous(PAGE_BYTES)
    with pytest.raises(ConfigError, match=r'"numa:99" \(Invalid argument\): name a node with memory'):
        place(mapping, 99, sysfs=sysfs)
    assert is_untouched(mapping) and syscalls.policy_of(mapping.address)[0] == syscalls.MPOL_DEFAULT


@pytest.mark.parametrize(("call", "code", "remedy"), [("mbind", errno.EPERM, "SYS_NICE"), ("nodes_of", 5, "log")])
def test_a_refused_system_call_is_one_clear_error(
    monkeypatch: pytest.MonkeyPatch, call: str, code: int, remedy: str
) -> None:
    monkeypatch.setattr(syscalls, call, refuse(call, code))
    with pytest.raises(ConfigError, match=rf'banks: .*"numa:0" \(as the test wants\): .*{remedy}'):
        place(Mapping.anonymous(PAGE_BYTES), 0)


@pytest.mark.parametrize("missing_kib", [0, 1])
def test_free_memory_has_to_hold_the_mapping_and_the_reserve(tmp_path: Path, missing_kib: int) -> None:
    need_kib = (4 * MIB + RESERVE_BYTES) // KIB
    sysfs = sysfs_with_node(tmp_path, 0, free_kib=need_kib - 100, inactive_file_kib=100 - missing_kib)
    assert available_bytes(0, sysfs) == (need_kib - missing_kib) * KIB
    mapping = Mapping.anonymous(4 * MIB)
    if not missing_kib:
        assert place(mapping, 0, sysfs=sysfs).is_achieved
        return
    with pytest.raises(CapacityError, match=r'"numa:0" has .* cannot take 4.00 MiB with 64.00 MiB in reserve: lower'):
        place(mapping, 0, sysfs=sysfs)
    assert is_untouched(mapping)


def test_what_the_kernel_cannot_populate_is_touched_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    mapping = Mapping.anonymous(3 * PAGE_BYTES)
    real = syscalls.madvise

    def without_populate(address: int, byte_count: int, advice: int) -> None:
        if advice == syscalls.MADV_POPULATE_WRITE:
            raise OSError(errno.EINVAL, "before Linux 5.14")
        real(address, byte_count, advice)

    monkeypatch.setattr(syscalls, "madvise", without_populate)
    assert place(mapping, 0).bytes_by_node == {0: 3 * PAGE_BYTES}


def test_verify_counts_pages_that_are_not_there_as_unknown() -> None:
    mapping = Mapping.anonymous(4 * PAGE_BYTES)
    mapping.buffer[PAGE_BYTES] = 1
    placement = verify(mapping, 0)
    assert placement == Placement(node=0, bytes_by_node={0: PAGE_BYTES}, unknown_bytes=3 * PAGE_BYTES)
    assert not placement.is_achieved


def test_verify_asks_again_where_a_page_was_busy(monkeypatch: pytest.MonkeyPatch) -> None:
    mapping = Mapping.anonymous(2 * PAGE_BYTES)
    place(mapping, 0)
    answers = [array("i", [0, -errno.EBUSY]), array("i", [3, 0])]
    real = syscalls.nodes_of
    monkeypatch.setattr(syscalls, "nodes_of", lambda pages: answers.pop(0) if answers else real(pages))
    assert verify(mapping, 0).is_achieved and not answers


def test_verify_gives_up_on_a_page_that_stays_busy(monkeypatch: pytest.MonkeyPatch) -> None:
    mapping = Mapping.anonymous(2 * PAGE_BYTES)
    monkeypatch.setattr(syscalls, "nodes_of", lambda pages: array("i", [0, -errno.EBUSY]))
    assert verify(mapping, 0) == Placement(node=0, bytes_by_node={0: PAGE_BYTES}, unknown_bytes=PAGE_BYTES)


def test_verify_asks_about_every_page_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    real = syscalls.nodes_of
    monkeypatch.setattr(memory, "_QUERY_PAGE_COUNT", 3)
    monkeypatch.setattr(syscalls, "nodes_of", lambda pages: (asked.extend(pages), real(pages))[1])
    mapping = Mapping.anonymous(8 * PAGE_BYTES)
    assert place(mapping, 0).bytes_by_node == {0: 8 * PAGE_BYTES}
    assert asked == list(range(mapping.address, mapping.address + 8 * PAGE_BYTES, PAGE_BYTES))


@pytest.mark.parametrize(
    ("placement", "text"),
    [
        (Placement(2, {2: 3 * MIB}), "3.00 MiB on node 2, as asked"),
        (Placement(2, {2: MIB, 0: 2 * MIB}), "2.00 MiB on node 0, 1.00 MiB on node 2; asked for node 2"),
        (Placement(2, {2: MIB}, 4096), "1.00 MiB on node 2, 4.00 KiB at an unknown place; asked for node 2"),
    ],
)
def test_a_placement_describes_what_was_achieved(placement: Placement, text: str) -> None:
    assert placement.describe() == text
    assert placement.is_achieved == text.endswith("as asked")


def with_bad_page(page: int, *, page_count: int) -> Mapping:
    """Pages numbered by their contents, of which one cannot be read."""
    mapping = Mapping.anonymous(page_count * PAGE_BYTES)
    mapping.buffer[:] = b"".join(bytes([i % 251 + 1]) * PAGE_BYTES for i in range(page_count))
    bad = ctypes.c_void_p(mapping.address + page * PAGE_BYTES)
    assert ctypes.CDLL(None).mprotect(bad, ctypes.c_size_t(PAGE_BYTES), PROT_NONE) == 0
    return mapping


@pytest.mark.parametrize("bad_page", [0, 1, 17, 49])
def test_a_page_that_cannot_be_read_is_an_error_that_names_it(bad_page: int) -> None:
    mapping = with_bad_page(bad_page, page_count=50)
    start = 100
    target = bytearray(50 * PAGE_BYTES - start)
    with pytest.raises(UnreadablePageError, match="cannot be read") as raised:
        read_safely(mapping.address + start, target)
    assert raised.value.address == mapping.address + bad_page * PAGE_BYTES
    assert raised.value.good_byte_count == max(bad_page * PAGE_BYTES - start, 0)
    good = bytes(target[: raised.value.good_byte_count])
    assert good == mapping.buffer[start : start + len(good)]
    # What lies behind the bad page can still be read.
    rest = bytearray((49 - bad_page) * PAGE_BYTES)
    read_safely(mapping.address + (bad_page + 1) * PAGE_BYTES, rest)
    assert bytes(rest) == mapping.buffer[(bad_page + 1) * PAGE_BYTES :]


def test_memory_that_is_not_mapped_is_an_error_too() -> None:
    with pytest.raises(UnreadablePageError):
        read_safely(PAGE_BYTES, bytearray(1))


def test_a_target_that_cannot_be_written_is_not_blamed_on_the_source() -> None:
    source, target = Mapping.anonymous(PAGE_BYTES), with_bad_page(0, page_count=1)
    with pytest.raises(OSError, match="process_vm_readv") as raised:
        copy_safely(source.address, target.address, PAGE_BYTES)
    assert raised.value.errno == errno.EFAULT


def test_a_short_read_is_continued(monkeypatch: pytest.MonkeyPatch) -> None:
    source = Mapping.anonymous(3 * PAGE_BYTES)
    source.buffer[:] = bytes(range(256)) * (3 * PAGE_BYTES // 256)
    real = syscalls.read_own_memory
    monkeypatch.setattr(syscalls, "read_own_memory", lambda of, to, count: real(of, to, min(count, 1000)))
    target = memoryview(bytearray(3 * PAGE_BYTES))
    read_safely(source.address, target)
    assert target == source.buffer[:]


def test_nothing_is_read_where_nothing_is_asked_for() -> None:
    read_safely(0, bytearray())


@pytest.fixture
def dax_file(tmp_path: Path) -> Path:
    path = tmp_path / "dax0.0"
    path.write_bytes(bytes(4 * PAGE_BYTES))
    return path


def test_what_is_written_to_a_dax_mapping_is_there_when_it_is_mapped_again(dax_file: Path) -> None:
    Mapping.dax(dax_file, 2 * PAGE_BYTES, PAGE_BYTES, is_file_allowed=True).buffer[:3] = b"abc"
    again = Mapping.dax(dax_file, 4 * PAGE_BYTES, is_file_allowed=True)
    assert again.is_dax and again.buffer[PAGE_BYTES : PAGE_BYTES + 4] == b"abc\0"


def test_a_dax_mapping_has_no_node(dax_file: Path) -> None:
    mapping = Mapping.dax(dax_file, PAGE_BYTES, is_file_allowed=True)
    with pytest.raises(AssertionError):
        verify(mapping, 0)
    with pytest.raises(AssertionError):
        place(mapping, 0)


@pytest.mark.parametrize(
    ("byte_count", "offset", "error", "text"),
    [
        (5 * PAGE_BYTES, 0, CapacityError, "has 16.00 KiB and cannot give 20.00 KiB at 0 B: lower"),
        (PAGE_BYTES, 4 * PAGE_BYTES, CapacityError, "cannot give 4.00 KiB at 16.00 KiB"),
        (100, 0, ConfigError, "100 bytes at 0 are no multiples of the device's alignment, 4.00 KiB: round"),
        (PAGE_BYTES, 100, ConfigError, "4096 bytes at 100 are no multiples"),
    ],
)
def test_a_dax_range_has_to_fit_the_device(
    dax_file: Path, byte_count: int, offset: int, error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=text):
        Mapping.dax(dax_file, byte_count, offset, is_file_allowed=True)


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("/dev/dax99.0", r'banks: "dax:/dev/dax99.0" cannot be opened \(No such file or directory\)'),
        ("/dev/null", r'banks: "dax:/dev/null" is no devdax device: name /dev/daxX.Y'),
        (__file__, "is no devdax device"),
    ],
)
def test_what_is_no_devdax_device_is_refused(path: str, text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        Mapping.dax(Path(path), 2 * MIB)


def test_a_devdax_device_tells_its_size_and_alignment(tmp_path: Path) -> None:
    """/dev/zero stands for the device: a character device that can be mapped, with a tree that calls it dax."""
    device = tmp_path / "dev" / "char" / "1:5"
    device.mkdir(parents=True)
    (tmp_path / "dax").mkdir()
    (device / "subsystem").symlink_to(tmp_path / "dax")
    (device / "size").write_text(f"{4 * MIB}\n")
    (device / "align").write_text(f"{2 * MIB}\n")
    assert Mapping.dax(Path("/dev/zero"), 2 * MIB, 2 * MIB, sysfs=tmp_path).byte_count == 2 * MIB
    with pytest.raises(CapacityError, match=r"has 4.00 MiB"):
        Mapping.dax(Path("/dev/zero"), 4 * MIB, 2 * MIB, sysfs=tmp_path)
    with pytest.raises(ConfigError, match=r"2.00 MiB: round"):
        Mapping.dax(Path("/dev/zero"), MIB, sysfs=tmp_path)


def test_a_part_of_a_mapping_is_verified_by_itself() -> None:
    mapping = Mapping.anonymous(10 * PAGE_BYTES)
    mapping.buffer[4 * PAGE_BYTES] = 1
    whole = verify(mapping, 0)
    assert whole.bytes_by_node == {0: PAGE_BYTES} and whole.unknown_bytes == whole.astray_bytes == 9 * PAGE_BYTES
    for start, byte_count, expected in ((0, 4, 4), (4, 1, 0), (3, 3, 2), (5, 5, 5)):
        part = verify(mapping, 0, start * PAGE_BYTES, byte_count * PAGE_BYTES)
        assert part.astray_bytes == expected * PAGE_BYTES


def test_pages_on_other_nodes_are_astray() -> None:
    assert Placement(1, {0: 3, 1: 5, 2: 7}, unknown_bytes=11).astray_bytes == 21
    assert Placement(1, {1: 5}).astray_bytes == 0


def test_pages_that_are_brought_back_keep_what_they_hold() -> None:
    """A real move needs a second node: the virtual machine shows one."""
    mapping = Mapping.anonymous(3 * PAGE_BYTES)
    mapping.buffer[:] = bytes(range(256)) * (3 * PAGE_BYTES // 256)
    data = mapping.buffer[:]
    assert bring_back(mapping, 0).is_achieved and mapping.buffer[:] == data
    assert syscalls.policy_of(mapping.address) == (syscalls.MPOL_BIND, (0,))
