"""What `moecxl topology` draws, and its JSON."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support import sysfs_trees
from tests.support.sysfs_trees import SysfsTree, replay
from vllm_moecxl.commands.main import EXIT_USAGE, main

Draw = Callable[..., list[str]]


@pytest.fixture
def draw(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Draw:
    """Runs the command as a process on CPU 0 and returns its lines."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0})

    def run(root: Path, *options: str) -> list[str]:
        assert main(["topology", "--sysfs", str(root), *options]) == 0
        return capsys.readouterr().out.splitlines()

    return run


def test_recorded_machine_is_drawn_as_a_tree(tmp_path: Path, draw: Draw) -> None:
    assert draw(replay("qemu_two_devices_kmem", tmp_path)) == [
        "Compute device: the CPUs that this process may use, on node 0; nearest CXL memory: node 2",
        "├─ node 0: 895.62 MiB, 801.04 MiB free, CPUs 0-1",
        "│  ├─ distance 20 to node 2, 20 to node 3",
        "│  └─ the kernel's hint, not measured: read 204.8 GB/s 110 ns, write 204.8 GB/s 110 ns",
        "├─ node 2: 256.00 MiB, 256.00 MiB free, no CPUs, CXL memory",
        "│  ├─ distance 20 to node 0, 20 to node 3",
        "│  ├─ the kernel's hint, not measured: read 16.0 GB/s 202 ns, write 16.0 GB/s 302 ns",
        '│  └─ region0: 256.00 MiB, system memory of node 2 through dax0.0, bank spec "numa:2"',
        "│     └─ mem0: 256.00 MiB, serial 0xabcd1234, PCI 0000:0d:00.0",
        "└─ node 3: 256.00 MiB, 256.00 MiB free, no CPUs, CXL memory",
        "   ├─ distance 20 to node 0, 20 to node 2",
        '   └─ region1: 256.00 MiB, system memory of node 3 through dax1.0, bank spec "numa:3"',
        "      └─ mem1: 256.00 MiB, serial 0xabcd5678, PCI 0000:41:00.0",
    ]


def test_interleaved_region_has_both_devices_below_it(sysfs: SysfsTree, draw: Draw) -> None:
    sysfs_trees.interleaved(sysfs)
    lines = draw(sysfs.root)
    assert any("interleaved over 2 devices by 256 B" in line for line in lines)
    assert [line.split()[1] for line in lines[-2:]] == ["mem0:", "mem1:"]


def test_devdax_region_stands_beside_the_nodes(sysfs: SysfsTree, draw: Draw) -> None:
    sysfs_trees.devdax(sysfs)
    assert '└─ region0: 64.00 GiB, devdax through dax0.0, bank spec "dax:/dev/dax0.0"' in draw(sysfs.root)


def test_device_that_is_not_set_up_has_a_remedy(sysfs: SysfsTree, draw: Draw) -> None:
    sysfs_trees.no_region(sysfs)
    assert draw(sysfs.root)[-1].endswith("cxl create-region -t ram -m mem0")


def test_region_of_a_node_that_is_offline_has_a_remedy(sysfs: SysfsTree, draw: Draw) -> None:
    sysfs_trees.one_socket(sysfs)
    sysfs.memory(0)
    sysfs.cxl(0, [0], target_node=1)
    assert any(line.startswith("└─ region0") and "daxctl online-memory dax0.0" in line for line in draw(sysfs.root))


def test_region_without_a_dax_device_has_a_remedy(sysfs: SysfsTree, draw: Draw) -> None:
    sysfs.memory(0)
    sysfs.region(0, [0])
    assert any("not in use: cxl enable-region region0" in line for line in draw(sysfs.root))


def test_other_memory_is_not_called_cxl(sysfs: SysfsTree, draw: Draw) -> None:
    sysfs_trees.high_bandwidth_memory(sysfs)
    sysfs.dax("dax5.0", size_bytes=1 << 30, target_node=3, driver=None, below="devices/platform/hmem.0")
    lines = draw(sysfs.root)
    assert any("node 1" in line and "not known to be CXL" in line for line in lines)
    assert any("dax5.0" in line and "not known to be CXL" in line for line in lines)


def test_empty_sysfs_is_said_and_no_error(sysfs: SysfsTree, draw: Draw) -> None:
    assert draw(sysfs.root)[-1] == "└─ sysfs shows no NUMA nodes and no CXL memory"


def test_json_is_one_object_with_stable_keys(sysfs: SysfsTree, draw: Draw) -> None:
    sysfs_trees.cxl_nodes(sysfs, 2)
    (line,) = draw(sysfs.root, "--json")
    report = json.loads(line)
    assert set(report) == {"compute", "numa_nodes", "cxl"}
    assert report["compute"] == {"pci_address": None, "node_ids": [0], "nearest_node_id": 0, "nearest_cxl_node_id": 2}
    assert [node["is_cxl"] for node in report["numa_nodes"]] == [False, False, True, True]
    assert report["numa_nodes"][2]["hints"]["read_latency_ns"] is None
    assert set(report["cxl"]) == {"memories", "regions", "dax_devices"}
    assert report["cxl"]["memories"][1]["node_ids"] == [3]
    assert report["cxl"]["regions"][1]["memories"] == ["mem1"]


def test_device_option_asks_for_another_compute_device(sysfs: SysfsTree, draw: Draw) -> None:
    sysfs_trees.cxl_nodes(sysfs, 2)
    sysfs.write("bus/pci/devices/0000:17:00.0/numa_node", "1")
    first = draw(sysfs.root, "--device", "17:00.0")[0]
    assert first == "Compute device: PCI device 17:00.0, on node 1; nearest CXL memory: node 3"


def test_unknown_device_is_one_sentence(sysfs: SysfsTree, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["topology", "--sysfs", str(sysfs.root), "--device", "17:00.0"]) == EXIT_USAGE
    assert "lspci" in capsys.readouterr().err
