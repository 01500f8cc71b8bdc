"""What is read from sysfs, over recorded trees and trees of other machines' shapes."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support import sysfs_trees
from tests.support.sysfs_trees import SysfsTree, replay
from vllm_moecxl.commands.topology import find_compute, in_words
from vllm_moecxl.errors import ConfigError
from vllm_moecxl.linux.topology import (
    CxlMemory,
    CxlRegion,
    DaxDevice,
    Hints,
    NumaNode,
    Topology,
    cpu_node_ids,
    nearest_node,
    pci_node_id,
    read_topology,
)
from vllm_moecxl.units import GIB, KIB, MIB

_HINTS = Hints(16_000_000_000, 16_000_000_000, 202, 302)
_DRAM_HINTS = Hints(204_800_000_000, 204_800_000_000, 110, 110)


@pytest.fixture
def tree(tmp_path: Path) -> SysfsTree:
    return SysfsTree(tmp_path / "sys")


def test_missing_tree_has_no_nodes_and_no_cxl(tmp_path: Path) -> None:
    assert read_topology(tmp_path / "nothing") == Topology((), (), (), ())


def test_recorded_kmem_machine(tmp_path: Path) -> None:
    topology = read_topology(replay("qemu_two_devices_kmem", tmp_path))
    assert topology == Topology(
        nodes=(
            NumaNode(0, 917120 * KIB, 820260 * KIB, "0-1", False, (), {0: 10, 2: 20, 3: 20}, _DRAM_HINTS),
            NumaNode(2, 256 * MIB, 256 * MIB, "", True, ("region0",), {0: 20, 2: 10, 3: 20}, _HINTS),
            # The second host bridge has no generic port, so the kernel knows nothing.
            NumaNode(3, 256 * MIB, 256 * MIB, "", True, ("region1",), {0: 20, 2: 20, 3: 10}, Hints()),
        ),
        memories=(
            CxlMemory(
                "mem0",
                "0xabcd1234",
                "pci0000:0c/0000:0c:00.0/0000:0d:00.0",
                256 * MIB,
                -1,
                ("region0",),
                (2,),
                ("dax0.0",),
            ),
            CxlMemory(
                "mem1",
                "0xabcd5678",
                "pci0000:40/0000:40:00.0/0000:41:00.0",
                256 * MIB,
                -1,
                ("region1",),
                (3,),
                ("dax1.0",),
            ),
        ),
        regions=(
            CxlRegion("region0", 256 * MIB, 1, 256, ("mem0",), ("dax0.0",), "system-ram", 2, _HINTS),
            CxlRegion("region1", 256 * MIB, 1, 256, ("mem1",), ("dax1.0",), "system-ram", 3, Hints()),
        ),
        dax_devices=(
            DaxDevice("dax0.0", 256 * MIB, 2, "kmem", "region0"),
            DaxDevice("dax1.0", 256 * MIB, 3, "kmem", "region1"),
        ),
    )


def test_recorded_interleaved_region(tmp_path: Path) -> None:
    topology = read_topology(replay("qemu_two_devices_interleaved", tmp_path))
    (region,) = topology.regions
    assert (region.interleave_ways, region.memories, region.node_id) == (2, ("mem0", "mem1"), 4)
    assert [memory.node_ids for memory in topology.memories] == [(4,), (4,)]
    assert [node.distances for node in topology.nodes] == [{0: 10, 4: 20}, {0: 20, 4: 10}]


def test_recorded_devdax_machine_has_no_cxl_node(tmp_path: Path) -> None:
    topology = read_topology(replay("qemu_two_devices_devdax", tmp_path))
    assert [(region.mode, region.node_id, region.dax_devices) for region in topology.regions] == [
        ("devdax", None, ("dax0.0",)),
        ("devdax", None, ("dax1.0",)),
    ]
    assert [node.node_id for node in topology.nodes] == [0] and not topology.nodes[0].is_cxl


def test_recorded_devices_before_anyone_set_them_up(tmp_path: Path) -> None:
    topology = read_topology(replay("qemu_two_devices_no_region", tmp_path))
    assert [memory.regions for memory in topology.memories] == [(), ()]
    assert topology.regions == () and topology.dax_devices == ()


def test_recorded_memory_blocks_agree_with_the_dax_device(tmp_path: Path) -> None:
    """What is done for firmware's regions, which were not recorded, gives the right node where it is known."""
    replay("qemu_two_devices_interleaved", tmp_path)
    (tmp_path / "bus/dax/devices/dax2.0").unlink()
    (region,) = read_topology(tmp_path).regions
    assert (region.mode, region.node_id, region.dax_devices) == ("system-ram", 4, ())


def test_built_trees_are_laid_out_like_recorded_ones(tmp_path: Path) -> None:
    """Every file and link of a built tree has a counterpart in a recording that differs in numbers only."""

    def kinds(root: Path) -> set[tuple[str, bool]]:
        return {
            (re.sub(r"[0-9][0-9a-f]*", "N", str(path.relative_to(root))), path.is_symlink())
            for folder, subfolders, names in os.walk(root)
            for path in map(Path(folder).joinpath, subfolders + names)
            if path.is_symlink() or path.is_file()
        }

    recorded = [replay(path.stem, tmp_path / path.stem) for path in sysfs_trees.RECORDINGS.glob("*.json")]
    shapes = [sysfs_trees.interleaved, sysfs_trees.devdax, sysfs_trees.firmware_memory]
    for shape in shapes:
        tree = SysfsTree(tmp_path / shape.__name__)
        shape(tree)
        assert kinds(tree.root) <= set().union(*map(kinds, recorded))


def test_two_sockets_without_cxl(tree: SysfsTree) -> None:
    sysfs_trees.two_sockets(tree)
    topology = read_topology(tree.root)
    assert topology.nodes == (
        NumaNode(0, 64 * GIB, 32 * GIB, "0-7,16-23", False, (), {0: 10, 1: 21}, Hints()),
        NumaNode(1, 64 * GIB, 32 * GIB, "8-15,24-31", False, (), {0: 21, 1: 10}, Hints()),
    )
    assert not topology.memories and not topology.dax_devices


@pytest.mark.parametrize("count", [1, 2, 4])
def test_each_device_is_a_node(tree: SysfsTree, count: int) -> None:
    sysfs_trees.cxl_nodes(tree, count)
    topology = read_topology(tree.root)
    assert [memory.node_ids for memory in topology.memories] == [(2 + number,) for number in range(count)]
    assert [node.node_id for node in topology.nodes if node.is_cxl] == [2 + number for number in range(count)]
    assert all(node.is_cpuless and node.free_bytes == 63 * GIB for node in topology.nodes if node.is_cxl)


def test_members_are_in_interleave_order(tree: SysfsTree) -> None:
    sysfs_trees.interleaved(tree)
    assert read_topology(tree.root).regions[0].memories == ("mem1", "mem0")


def test_cpuless_node_without_region_is_not_cxl(tree: SysfsTree) -> None:
    sysfs_trees.high_bandwidth_memory(tree)
    node = read_topology(tree.root).nodes[1]
    assert node.is_cpuless and not node.is_cxl


def test_firmware_memory_is_found_by_its_addresses(tree: SysfsTree) -> None:
    sysfs_trees.firmware_memory(tree)
    topology = read_topology(tree.root)
    assert [node.is_cxl for node in topology.nodes] == [False, True]
    assert topology.memories[0].node_ids == (1,)


def test_two_regions_in_one_window_share_a_node(tree: SysfsTree) -> None:
    tree.node(1, cpulist="")
    for number in (0, 1):
        tree.memory(number)
        folder = tree.cxl(number, [number], target_node=1)
        tree.hints(f"{folder}/access0", megabytes_per_s=16_000, read_ns=202, write_ns=302)
    (node,) = read_topology(tree.root).nodes
    assert node.cxl_regions == ("region0", "region1")
    assert node.hints == Hints(), "one region's bandwidth is not that of both"


def test_persistent_memory_is_left_out(tree: SysfsTree) -> None:
    tree.memory(0)
    tree.write(f"{tree.region(0, [0])}/mode", "pmem")
    assert read_topology(tree.root).regions == ()


def test_region_whose_device_is_gone_has_no_member(tree: SysfsTree) -> None:
    tree.memory(0)
    folder = tree.cxl(0, [0, 1], target_node=1)
    tree.write(f"{folder}/target2", "")
    assert read_topology(tree.root).regions[0].memories == ("mem0",)


def test_devdax_mode_makes_no_node_cxl(tree: SysfsTree) -> None:
    sysfs_trees.devdax(tree)
    tree.node(1, cpulist="")
    topology = read_topology(tree.root)
    assert topology.dax_devices[0].driver == "device_dax"
    assert not any(node.is_cxl for node in topology.nodes)


def test_hints_of_6_12_stand_at_the_node_and_the_wrong_one_is_dropped(tree: SysfsTree) -> None:
    tree.node(1, cpulist="")
    tree.hints("devices/system/node/node1/access0/initiators", megabytes_per_s=16_000, read_ns=17_200, write_ns=302)
    assert read_topology(tree.root).nodes[0].hints == Hints(16_000_000_000, 16_000_000_000, None, 302)


def test_node_without_memory_is_not_cpuless_memory(tree: SysfsTree) -> None:
    tree.node(2, total_bytes=0, free_bytes=0, cpulist="")
    assert not read_topology(tree.root).nodes[0].is_cpuless


def test_names_are_ordered_by_number(tree: SysfsTree) -> None:
    for number in (10, 2, 0):
        tree.memory(number)
        tree.cxl(number, [number], target_node=1, driver=None)
    topology = read_topology(tree.root)
    assert [memory.name for memory in topology.memories] == ["mem0", "mem2", "mem10"]
    assert [region.name for region in topology.regions] == ["region0", "region2", "region10"]
    assert [device.name for device in topology.dax_devices] == ["dax0.0", "dax2.0", "dax10.0"]
    assert [device.driver for device in topology.dax_devices] == [None] * 3


def test_unreadable_values_are_defaults(tree: SysfsTree) -> None:
    tree.write("bus/cxl/devices/mem0/serial", "0x0")
    tree.write("bus/cxl/devices/mem0/ram/size", "not a number")
    assert read_topology(tree.root).memories == (CxlMemory("mem0", None, None, 0, -1, (), (), ()),)


@pytest.mark.parametrize("size", ["-9", "0x" + "f" * 17, "9" * 5000, "12 kB", ""])
def test_odd_sizes_are_none(tree: SysfsTree, size: str) -> None:
    tree.memory(0)
    tree.write("bus/cxl/devices/mem0/ram/size", size)
    assert read_topology(tree.root).memories[0].ram_bytes == 0


@pytest.mark.parametrize("target", ["", "../../../pci", "decoder10", "decoder99.0", "a\0b"])
def test_odd_targets_are_no_members(tree: SysfsTree, target: str) -> None:
    tree.memory(0)
    tree.write(f"{tree.region(0, [0])}/target0", target)
    assert read_topology(tree.root).regions[0].memories == ()


@pytest.mark.parametrize("cpulist", ["0-", "-1", "0,,1", "all"])
def test_odd_cpu_lists_are_none(tree: SysfsTree, cpulist: str) -> None:
    tree.node(0, cpulist=cpulist)
    topology = read_topology(tree.root)
    assert topology.nodes[0].cpulist == "" and cpu_node_ids(topology, {0, 1}) == ()


def test_region_without_an_address_is_on_no_node(tree: SysfsTree) -> None:
    sysfs_trees.firmware_memory(tree)
    region = tree.region(1, [0], size_bytes=256 * MIB)
    tree.write(f"{region}/resource", "")
    assert read_topology(tree.root).regions[1].node_id is None


def test_memory_blocks_of_no_size_are_none(tree: SysfsTree) -> None:
    sysfs_trees.firmware_memory(tree)
    tree.write("devices/system/memory/block_size_bytes", "0")
    assert read_topology(tree.root).regions[0].mode == "none"


def test_system_memory_without_a_node_number_is_on_no_node(tree: SysfsTree) -> None:
    tree.memory(0)
    tree.cxl(0, [0], target_node=-1)
    assert read_topology(tree.root).regions[0].node_id is None


def test_cpu_nodes_are_those_with_a_usable_cpu(tree: SysfsTree) -> None:
    sysfs_trees.two_sockets(tree)
    topology = read_topology(tree.root)
    assert cpu_node_ids(topology, {16}) == (0,)
    assert cpu_node_ids(topology, {7, 8}) == (0, 1)
    assert cpu_node_ids(topology, {32}) == ()


def test_a_cpu_list_that_is_too_long_to_count_costs_nothing(tree: SysfsTree) -> None:
    tree.node(0, cpulist="0-999999999")
    assert cpu_node_ids(read_topology(tree.root), {5}) == (0,)


@pytest.mark.parametrize("address", ["17:00.0", "0000:17:00.0", "00000000:17:00.0"])
def test_pci_device_is_found_however_its_address_is_written(tree: SysfsTree, address: str) -> None:
    sysfs_trees.two_sockets(tree)
    tree.write("bus/pci/devices/0000:17:00.0/numa_node", "1")
    assert pci_node_id(read_topology(tree.root), address, tree.root) == 1


def test_pci_device_without_a_node_is_on_the_only_one(tree: SysfsTree) -> None:
    sysfs_trees.high_bandwidth_memory(tree)
    tree.write("bus/pci/devices/0000:17:00.0/numa_node", "-1")
    assert pci_node_id(read_topology(tree.root), "17:00.0", tree.root) == 0


def test_pci_device_without_a_node_may_be_anywhere_on_two_sockets(tree: SysfsTree) -> None:
    sysfs_trees.two_sockets(tree)
    tree.write("bus/pci/devices/0000:17:00.0/numa_node", "-1")
    assert pci_node_id(read_topology(tree.root), "17:00.0", tree.root) is None


@pytest.mark.parametrize("address", ["18:00.0", "cuda:0", "../../../devices"])
def test_unknown_pci_device_is_refused(tree: SysfsTree, address: str) -> None:
    tree.write("bus/pci/devices/0000:17:00.0/numa_node", "1")
    with pytest.raises(ConfigError, match="lspci"):
        pci_node_id(read_topology(tree.root), address, tree.root)


@pytest.mark.parametrize(("from_ids", "nearest"), [([0], 2), ([1], 3), ([0, 1], 2), ([9], 2), ([], 2)])
def test_nearest_node_is_at_the_least_distance_then_the_lowest(
    tree: SysfsTree, from_ids: list[int], nearest: int
) -> None:
    sysfs_trees.cxl_nodes(tree, 4)
    topology = read_topology(tree.root)
    node = nearest_node((node for node in topology.nodes if node.is_cxl), topology, from_ids)
    assert node is not None and node.node_id == nearest


def test_nothing_is_nearest_among_none(tree: SysfsTree) -> None:
    assert nearest_node([], read_topology(tree.root), [0]) is None


_RECORDED = json.loads((sysfs_trees.RECORDINGS / "qemu_two_devices_interleaved.json").read_text())
_DAMAGE = st.one_of(
    st.binary(max_size=40),
    st.sampled_from(
        [b"-1", b"-9", b"0x" + b"f" * 5000, b"9" * 5000, b"1-", b"0-99999999999", b"../../..", b"decoder0.0"]
    ),
    st.sampled_from(["loop", "folder", "gone"]),
)


@settings(max_examples=60, deadline=None)
@given(st.dictionaries(st.sampled_from(sorted(_RECORDED)), _DAMAGE, min_size=1, max_size=8))
def test_no_damage_to_a_tree_is_a_crash(damage: dict[str, bytes | str]) -> None:
    with TemporaryDirectory() as folder:
        root = replay("qemu_two_devices_interleaved", Path(folder))
        for name, kind in damage.items():
            path = root / name
            path.unlink(missing_ok=True)
            match kind:
                case bytes():
                    path.write_bytes(kind)
                case "loop":
                    path.symlink_to(path.name)
                case "folder":
                    path.mkdir()
        topology = read_topology(root)
        json.dumps(topology.as_dict())
        assert list(in_words(topology, find_compute(topology, None, root)))
