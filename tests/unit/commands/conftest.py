"""Trees of files in the place of sysfs, and installations that are not there."""

from __future__ import annotations

import os
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import pytest

from tests.support.sysfs_trees import SysfsTree
from vllm_moecxl.units import GIB


@pytest.fixture
def sysfs(tmp_path: Path) -> SysfsTree:
    """An empty tree."""
    return SysfsTree(tmp_path / "sys")


@pytest.fixture
def one_cxl_node(sysfs: SysfsTree) -> SysfsTree:
    """Node 0 with CPUs, and mem0 as CPU-less node 1."""
    sysfs.node(0, cpulist="0-7", distance="10 20")
    sysfs.node(1, cpulist="", free_bytes=63 * GIB, distance="20 10")
    sysfs.memory(0)
    sysfs.cxl(0, [0], target_node=1)
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
