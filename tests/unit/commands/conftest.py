"""Trees of files in the place of sysfs, and installations that are not there."""

from __future__ import annotations

import os
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import pytest

from vllm_moecxl.units import GIB, KIB


class FakeSysfs:
    """Builds what the kernel would show."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def write(self, path: str, text: str) -> None:
        target = self.root / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text + "\n")

    def link(self, path: str, target: str) -> None:
        link = self.root / path
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(self.root / target)

    def node(self, node_id: int, *, total_gib: int, free_gib: int, cpulist: str) -> None:
        folder = f"devices/system/node/node{node_id}"
        self.write(f"{folder}/cpulist", cpulist)
        self.write(
            f"{folder}/meminfo",
            f"Node {node_id} MemTotal:       {total_gib * GIB // KIB} kB\n"
            f"Node {node_id} MemFree:        {free_gib * GIB // KIB} kB\n"
            f"Node {node_id} Active(anon):   17 kB",
        )

    def cxl_memory(self, name: str, *, ram_gib: int, serial: str = "0xc0ffee", numa_node: int = -1) -> None:
        folder = f"devices/pci0000:0c/{name}"
        self.write(f"{folder}/serial", serial)
        self.write(f"{folder}/ram/size", hex(ram_gib * GIB))
        self.write(f"{folder}/numa_node", str(numa_node))
        self.link(f"bus/cxl/devices/{name}", folder)

    def region(self, name: str, dax: str, *, size_gib: int, target_node: int, driver: str | None) -> None:
        region = f"devices/platform/ACPI0017:00/root0/decoder0.0/{name}"
        folder = f"{region}/dax_{name}/{dax}"
        self.write(f"{folder}/size", str(size_gib * GIB))
        self.write(f"{folder}/target_node", str(target_node))
        if driver is not None:
            self.write(f"bus/dax/drivers/{driver}/uevent", "")
            self.link(f"{folder}/driver", f"bus/dax/drivers/{driver}")
        self.link(f"bus/cxl/devices/{name}", region)
        self.link(f"bus/dax/devices/{dax}", folder)


@pytest.fixture
def sysfs(tmp_path: Path) -> FakeSysfs:
    """An empty tree."""
    return FakeSysfs(tmp_path / "sys")


@pytest.fixture
def one_cxl_node(sysfs: FakeSysfs) -> FakeSysfs:
    """Node 0 with CPUs, and mem0 as CPU-less node 1."""
    sysfs.node(0, total_gib=64, free_gib=32, cpulist="0-7")
    sysfs.node(1, total_gib=128, free_gib=127, cpulist="")
    sysfs.cxl_memory("mem0", ram_gib=128)
    sysfs.region("region0", "dax0.0", size_gib=128, target_node=1, driver="kmem")
    return sysfs


@pytest.fixture
def two_sockets(sysfs: FakeSysfs) -> FakeSysfs:
    """Two nodes with CPUs and no CXL."""
    sysfs.node(0, total_gib=64, free_gib=32, cpulist="0-15")
    sysfs.node(1, total_gib=64, free_gib=60, cpulist="16-31")
    return sysfs


class FakeDistribution(metadata.Distribution):
    """What `importlib.metadata` would know of a distribution."""

    def __init__(self, files: dict[str, str], folder: str) -> None:
        self._files = files
        self._folder = folder

    def read_text(self, filename: str) -> str | None:
        return self._files.get(filename)

    def locate_file(self, path: str | os.PathLike[str]) -> metadata.SimplePath:
        return Path(self._folder) / path


Install = Callable[..., None]


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Install:
    """Replaces everything that is installed by nothing; each call then installs one distribution."""
    found: list[FakeDistribution] = []
    monkeypatch.setattr("importlib.metadata.distributions", lambda **_: iter(found))

    def add(
        name: str, version: str, requires: list[str] | None = None, folder: str = "site", has_record: bool = True
    ) -> None:
        needs = "".join(f"Requires-Dist: {need}\n" for need in requires or [])
        files = {"METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{needs}"}
        found.append(FakeDistribution(files | ({"RECORD": ""} if has_record else {}), folder))

    return add
