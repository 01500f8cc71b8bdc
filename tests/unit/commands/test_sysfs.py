"""What is read from sysfs, over trees of files."""

from __future__ import annotations

from pathlib import Path

from tests.unit.commands.conftest import FakeSysfs
from vllm_moecxl.commands.sysfs import CxlMemory, DaxDevice, NumaNode, read_topology
from vllm_moecxl.units import GIB


def test_missing_tree_has_no_nodes_and_no_cxl(tmp_path: Path) -> None:
    topology = read_topology(tmp_path / "nothing")
    assert (topology.nodes, topology.memories, topology.regions, topology.dax_devices) == ((), (), (), ())


def test_two_sockets_without_cxl(two_sockets: FakeSysfs) -> None:
    topology = read_topology(two_sockets.root)
    assert topology.nodes == (
        NumaNode(0, 64 * GIB, 32 * GIB, "0-15", is_cpuless=False, cxl_regions=()),
        NumaNode(1, 64 * GIB, 60 * GIB, "16-31", is_cpuless=False, cxl_regions=()),
    )
    assert not topology.memories and not topology.dax_devices


def test_cpuless_node_is_cxl_by_its_region(one_cxl_node: FakeSysfs) -> None:
    topology = read_topology(one_cxl_node.root)
    assert topology.nodes[1] == NumaNode(1, 128 * GIB, 127 * GIB, "", is_cpuless=True, cxl_regions=("region0",))
    assert topology.memories == (CxlMemory("mem0", "0xc0ffee", 128 * GIB, -1),)
    assert topology.regions == ("region0",)
    assert topology.dax_devices == (DaxDevice("dax0.0", 128 * GIB, 1, "kmem", "region0"),)


def test_cpuless_node_without_region_is_not_cxl(sysfs: FakeSysfs) -> None:
    sysfs.node(0, total_gib=8, free_gib=4, cpulist="0")
    sysfs.node(1, total_gib=16, free_gib=16, cpulist="")
    node = read_topology(sysfs.root).nodes[1]
    assert node.is_cpuless and node.cxl_regions == ()


def test_devdax_mode_makes_no_node_cxl(sysfs: FakeSysfs) -> None:
    sysfs.node(1, total_gib=16, free_gib=16, cpulist="")
    sysfs.region("region3", "dax3.0", size_gib=16, target_node=1, driver="device_dax")
    topology = read_topology(sysfs.root)
    assert topology.dax_devices[0].driver == "device_dax"
    assert topology.nodes[0].cxl_regions == ()


def test_node_without_memory_is_not_cpuless_memory(sysfs: FakeSysfs) -> None:
    sysfs.node(2, total_gib=0, free_gib=0, cpulist="")
    assert not read_topology(sysfs.root).nodes[0].is_cpuless


def test_names_are_ordered_by_number(sysfs: FakeSysfs) -> None:
    for number in (10, 2, 0):
        sysfs.cxl_memory(f"mem{number}", ram_gib=1)
        sysfs.region(f"region{number}", f"dax{number}.0", size_gib=1, target_node=1, driver=None)
    topology = read_topology(sysfs.root)
    assert [memory.name for memory in topology.memories] == ["mem0", "mem2", "mem10"]
    assert [device.name for device in topology.dax_devices] == ["dax0.0", "dax2.0", "dax10.0"]
    assert [device.driver for device in topology.dax_devices] == [None] * 3


def test_unreadable_values_are_defaults(sysfs: FakeSysfs) -> None:
    sysfs.write("bus/cxl/devices/mem0/serial", "")
    sysfs.write("bus/cxl/devices/mem0/ram/size", "not a number")
    assert read_topology(sysfs.root).memories == (CxlMemory("mem0", None, 0, -1),)
