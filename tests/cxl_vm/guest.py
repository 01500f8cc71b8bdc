"""What runs in the guest: each probe proves one thing with our own code, and reports on the console."""

from __future__ import annotations

import json
import mmap
import os
import re
import signal
import traceback
from array import array
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from tests.cxl_vm import guest_cxl
from vllm_moecxl.control.striping import cut
from vllm_moecxl.errors import CapacityError, ConfigError
from vllm_moecxl.linux import syscalls
from vllm_moecxl.linux.memory import Mapping, UnreadablePageError, bring_back, place, read_safely, verify
from vllm_moecxl.linux.topology import read_topology
from vllm_moecxl.units import MIB, format_bytes

REPORT = "PROBE "
_SYSFS = Path("/sys")
_DEVICE_BYTES = 256 * MIB
_PAGE_BYTES = mmap.PAGESIZE
_Error = TypeVar("_Error", bound=Exception)
#: A huge page for each unit of weight, which is how the kernel's own interleave deals them out.
_STRIPE_BYTES = 8 * MIB
_WEIGHTS = (3, 1)


def _cxl_nodes() -> tuple[int, int]:
    first, second = (node.node_id for node in read_topology(_SYSFS).nodes if node.cxl_regions)
    return first, second


def _pattern(byte_count: int) -> bytes:
    """Bytes that no other page of the pattern has: a page in the wrong place shows."""
    assert byte_count % _PAGE_BYTES == 0
    return b"".join(page.to_bytes(8, "little") * (_PAGE_BYTES // 8) for page in range(1, byte_count // _PAGE_BYTES + 1))


def _filled(byte_count: int, node: int) -> tuple[Mapping, bytes]:
    mapping = Mapping.anonymous(byte_count)
    placement = place(mapping, node)
    assert placement.is_achieved, placement.describe()
    data = _pattern(byte_count)
    mapping.buffer[:] = data
    return mapping, data


def _pages_by_node(mapping: Mapping) -> dict[int, int]:
    """The kernel's other account of the mapping: a witness for `verify`."""
    start = f"{mapping.address:x} "
    line = next(line for line in Path("/proc/self/numa_maps").read_text().splitlines() if line.startswith(start))
    return {int(node): int(count) for node, count in re.findall(r" N(\d+)=(\d+)", line)}


def _raised(kind: type[_Error], call: Callable[[], object]) -> _Error:
    """`pytest.raises`, which the guest has not got."""
    try:
        call()
    except kind as error:
        return error
    raise AssertionError(f"no {kind.__name__}")


def discovery() -> str:
    topology = read_topology(_SYSFS)
    dram, *cxl = (node for node in topology.nodes if node.total_bytes)
    assert not dram.is_cpuless and not dram.cxl_regions
    assert [node.total_bytes for node in cxl] == [_DEVICE_BYTES] * 2
    assert all(node.is_cpuless for node in cxl)
    assert sorted(r for node in cxl for r in node.cxl_regions) == sorted(r.name for r in topology.regions) != []
    assert {int(memory.serial or "0", 0) for memory in topology.memories} == {0xA11CE, 0xB0B}
    assert all(memory.ram_bytes == _DEVICE_BYTES for memory in topology.memories)
    assert {device.target_node for device in topology.dax_devices} == {node.node_id for node in cxl}
    assert all(device.driver == "kmem" for device in topology.dax_devices)
    return f"nodes {[node.node_id for node in cxl]} are CXL, by {', '.join(r.name for r in topology.regions)}"


def binding() -> str:
    elsewhere = Mapping.anonymous(4 * MIB)
    elsewhere.buffer[:] = bytes(4 * MIB)
    for node in _cxl_nodes():
        assert verify(elsewhere, node).bytes_by_node == {0: 4 * MIB}
        mapping, data = _filled(4 * MIB, node)
        assert verify(mapping, node).bytes_by_node == {node: 4 * MIB}
        assert _pages_by_node(mapping) == {node: 4 * MIB // _PAGE_BYTES}
        assert mapping.buffer[:] == data
    return f"on each CXL node: {verify(mapping, node).describe()}"


def refusals() -> str:
    node, _ = _cxl_nodes()
    mapping = Mapping.anonymous(_DEVICE_BYTES)
    full = _raised(CapacityError, lambda: place(mapping, node))
    assert verify(mapping, node).bytes_by_node == {}, "a refusal took memory"
    for absent in (1, 63):
        _raised(ConfigError, lambda absent=absent: place(Mapping.anonymous(_PAGE_BYTES), absent))
    return str(full)


def striping() -> str:
    nodes = _cxl_nodes()
    data = _pattern(_STRIPE_BYTES)
    pieces = [Mapping.anonymous(stop - start) for start, stop in cut(_STRIPE_BYTES, _WEIGHTS, 2 * MIB)]
    placements = [place(piece, node) for piece, node in zip(pieces, nodes, strict=True)]
    assert [p.bytes_by_node for p in placements] == [{nodes[0]: 6 * MIB}, {nodes[1]: 2 * MIB}]
    assert [_pages_by_node(piece) for piece in pieces] == [{nodes[0]: 1536}, {nodes[1]: 512}]
    joined = bytearray(_STRIPE_BYTES)
    start = 0
    for piece in pieces:
        stop = start + piece.byte_count
        piece.buffer[:] = data[start:stop]
        read_safely(piece.address, memoryview(joined)[start:stop])
        start = stop
    assert joined == data
    return f"3:1 over two nodes: {'; '.join(p.describe() for p in placements)}; read back right"


def weighted_interleave() -> str:
    """The kernel's own striping, which needs the weights of the whole machine to be set."""
    nodes = _cxl_nodes()
    for node, weight in zip(nodes, _WEIGHTS, strict=True):
        (_SYSFS / f"kernel/mm/mempolicy/weighted_interleave/node{node}").write_text(str(weight))
    mapping = Mapping.anonymous(_STRIPE_BYTES)
    syscalls.mbind(mapping.address, mapping.byte_count, syscalls.MPOL_WEIGHTED_INTERLEAVE, nodes)
    syscalls.madvise(mapping.address, mapping.byte_count, syscalls.MADV_POPULATE_WRITE)
    pages = array("Q", range(mapping.address, mapping.address + mapping.byte_count, _PAGE_BYTES))
    counts = Counter(syscalls.nodes_of(pages))
    sizes = [counts.pop(node) * _PAGE_BYTES for node in nodes]
    assert not counts and [round(size / sum(sizes) * 4) for size in sizes] == [*_WEIGHTS], sizes
    return f"MPOL_WEIGHTED_INTERLEAVE 3:1 gives {' and '.join(map(format_bytes, sizes))}"


def moved() -> str:
    """Pages that go elsewhere after they were bound, as somebody with `migratepages` could have them go."""
    node, other = _cxl_nodes()
    mapping, data = _filled(_STRIPE_BYTES, node)
    half = _STRIPE_BYTES // 2
    guest_cxl.move_pages(mapping.address + half, half, other)
    placement = verify(mapping, node)
    assert not placement.is_achieved and half <= placement.astray_bytes < _STRIPE_BYTES
    assert _pages_by_node(mapping) == {n: size // _PAGE_BYTES for n, size in placement.bytes_by_node.items()}
    parts = [verify(mapping, node, start, half).astray_bytes for start in (0, half)]
    assert sum(parts) == placement.astray_bytes and parts[1] == half
    assert mapping.buffer[:] == data
    return f"found by asking again: {placement.describe()}"


def pinned() -> str:
    """What registering memory with a device does to it: CXL memory is movable, and the kernel pins nothing there."""
    node, _ = _cxl_nodes()
    mapping, data = _filled(4 * MIB, node)
    with guest_cxl.pinning(mapping.address, mapping.byte_count):
        placement = verify(mapping, node)
        assert placement.bytes_by_node == {0: 4 * MIB} and placement.astray_bytes == 4 * MIB
        assert mapping.buffer[:] == data
        assert not bring_back(mapping, node).is_achieved, "what is pinned stays where it is"
    back = bring_back(mapping, node)
    assert back.is_achieved and mapping.buffer[:] == data
    return f"moved off movable memory, found by asking again, {placement.describe()}; back later, {back.describe()}"


def _signal_of(call: Callable[[], object]) -> int:
    """The signal that ends a child of this process that makes the call; 0 for none."""
    child = os.fork()
    if not child:
        try:
            call()
        finally:  # never back into the caller's code
            os._exit(0)
    _, status = os.waitpid(child, 0)
    return os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0


def poison() -> str:
    _, node = _cxl_nodes()
    mapping, data = _filled(4 * MIB, node)
    good = 700 * _PAGE_BYTES
    bad = mapping.address + good
    # In a child, which shares the page: Linux 7.3 ends who poisons a page of its own.
    _signal_of(lambda: syscalls.madvise(bad, _PAGE_BYTES, syscalls.MADV_HWPOISON))
    assert _signal_of(lambda: mapping.buffer[good]) == signal.SIGBUS, "the poison is not real"
    target = bytearray(mapping.byte_count)
    error = _raised(UnreadablePageError, lambda: read_safely(mapping.address, target))
    assert (error.address, error.good_byte_count) == (bad, good), str(error)
    assert target[:good] == data[:good]
    rest = bytearray(mapping.byte_count - good - _PAGE_BYTES)
    read_safely(bad + _PAGE_BYTES, rest)
    assert rest == data[-len(rest) :]
    placement = verify(mapping, node)
    assert placement.unknown_bytes == _PAGE_BYTES and not placement.is_achieved
    return f"survived, where a plain load ends the process with SIGBUS; {placement.describe()}"


def offline() -> str:
    node, _ = _cxl_nodes()
    mapping, data = _filled(4 * MIB, node)
    block_count = guest_cxl.take_offline(node)
    placement = verify(mapping, node)
    assert not placement.is_achieved and node not in placement.bytes_by_node
    assert sum(placement.bytes_by_node.values()) == 4 * MIB
    assert mapping.buffer[:] == data
    assert node not in {n.node_id for n in read_topology(_SYSFS).nodes if n.total_bytes}
    return f"{block_count} blocks taken offline under the data, which is intact: {placement.describe()}"


def devdax() -> str:
    """The region whose node has gone offline, as a device."""
    topology = read_topology(_SYSFS)
    nodes = {node.node_id for node in topology.nodes if node.total_bytes}
    (name,) = (device.name for device in topology.dax_devices if device.target_node not in nodes)
    path = guest_cxl.make_devdax(name)
    data = _pattern(4 * MIB)
    Mapping.dax(path, 4 * MIB, 2 * MIB).buffer[:] = data
    again = Mapping.dax(path, _DEVICE_BYTES)
    assert again.buffer[2 * MIB : 6 * MIB] == data
    target = bytearray(4 * MIB)
    read_safely(again.address + 2 * MIB, target)
    assert target == data
    _raised(CapacityError, lambda: Mapping.dax(path, _DEVICE_BYTES, 2 * MIB))
    _raised(ConfigError, lambda: Mapping.dax(path, MIB))
    (device,) = (device for device in read_topology(_SYSFS).dax_devices if device.driver == "device_dax")
    assert device.name == name
    return f"{path} of {format_bytes(device.size_bytes)} gives what was written when mapped again, by safe reads too"


#: In this order: the last ones take something away for good.
PROBES: dict[str, Callable[[], str]] = {
    probe.__name__: probe
    for probe in (discovery, binding, refusals, striping, weighted_interleave, moved, pinned, poison, offline, devdax)
}


def main() -> None:
    guest_cxl.bring_up_regions()
    for name, probe in PROBES.items():
        found, error = "", None
        try:
            found = probe()
        except Exception:  # noqa: BLE001  the report carries it to the test, which fails with it
            error = traceback.format_exc()
        print(REPORT + json.dumps({"name": name, "found": found, "error": error}), flush=True)


if __name__ == "__main__":
    main()
