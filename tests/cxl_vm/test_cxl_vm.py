"""CXL memory on a real Linux kernel, in a virtual machine with two CXL devices."""

from __future__ import annotations

import json
import os
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

import vllm_moecxl
from tests.cxl_vm import boot, guest, initrd
from tests.cxl_vm.conftest import FINDINGS

_SKIP = 77
_BOOT_TIMEOUT_S = 120


@pytest.fixture(scope="module")
def root() -> Path:
    """QEMU, a kernel and Python, fetched once and kept outside the tree; without them the tests are skipped."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vllm_moecxl" / "cxl-vm"
    fetch = [str(Path(__file__).with_name("fetch.sh")), str(cache)]
    result = subprocess.run(fetch, capture_output=True, text=True, check=False)
    if result.returncode == _SKIP:
        pytest.skip(f"no virtual machine with CXL memory: {result.stderr.strip()}")
    assert result.returncode == 0, result.stderr
    return cache / "root"


@pytest.fixture(scope="module")
def console(root: Path, tmp_path_factory: pytest.TempPathFactory, pytestconfig: pytest.Config) -> str:
    """What the guest says in its one run."""
    archive = tmp_path_factory.mktemp("cxl_vm") / "initrd.gz"
    initrd.build(root, Path(vllm_moecxl.__file__).parent, archive)
    start = time.monotonic()
    text = boot.boot(root, archive, _BOOT_TIMEOUT_S)
    pytestconfig.stash.setdefault(FINDINGS, []).append(f"booted, probed and off in {time.monotonic() - start:.0f} s")
    return text


@pytest.mark.parametrize("name", guest.PROBES)
def test_probe(name: str, console: str, pytestconfig: pytest.Config) -> None:
    reports = [json.loads(line[len(guest.REPORT) :]) for line in console.splitlines() if line.startswith(guest.REPORT)]
    report: dict[str, Any] | None = next((report for report in reports if report["name"] == name), None)
    assert report is not None, f"the guest ended before the probe did:\n{console[-4000:]}"
    assert report["error"] is None, f"{report['error']}\n{console[-4000:]}"
    pytestconfig.stash[FINDINGS].append(f"{name}: {report['found']}")
