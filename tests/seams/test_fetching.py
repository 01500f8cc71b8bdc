"""The CUDA wheels' sources are fetched once, wholly or not at all, whoever else is at it."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.seams.conftest import FETCH, UNAVAILABLE, fetched_source

_VERSION = "9.9.9"


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and a pip that knows no index but a folder; the place of the sources."""
    (tmp_path / "wheels").mkdir()
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    for name, value in {
        "PIP_CONFIG_FILE": os.devnull,
        "PIP_NO_INDEX": "1",
        "PIP_FIND_LINKS": str(tmp_path / "wheels"),
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
    }.items():
        monkeypatch.setenv(name, value)
    return tmp_path / "cache" / "vllm_moecxl" / "vllm-sources" / _VERSION


def _make_wheel(folder: Path) -> None:
    metadata = f"vllm-{_VERSION}.dist-info"
    with zipfile.ZipFile(folder / f"vllm-{_VERSION}-cp38-abi3-manylinux_2_28_x86_64.whl", "w") as wheel:
        wheel.writestr("vllm/__init__.py", "")
        wheel.writestr("vllm/_C.abi3.so", "not to be kept")
        wheel.writestr("vllm_flash/__init__.py", "not to be kept")
        wheel.writestr(f"{metadata}/METADATA", f"Metadata-Version: 2.1\nName: vllm\nVersion: {_VERSION}\n")
        wheel.writestr(f"{metadata}/WHEEL", "Wheel-Version: 1.0\nTag: cp38-abi3-manylinux_2_28_x86_64\n")
        wheel.writestr(f"{metadata}/RECORD", "")


def _fetch() -> subprocess.Popen[str]:
    command = [sys.executable, str(FETCH), _VERSION]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_only_the_python_files_are_kept_and_a_second_time_needs_no_wheel(tmp_path: Path, offline: Path) -> None:
    _make_wheel(tmp_path / "wheels")
    for _ in range(2):
        out, error = (process := _fetch()).communicate()
        assert (process.returncode, out) == (0, f"{offline}\n"), error
        assert [path.relative_to(offline) for path in offline.rglob("*") if path.is_file()] == [
            Path("vllm/__init__.py")
        ]
        assert list(offline.parent.iterdir()) == [offline], "the wheel or a scratch folder is left"
        for wheel in (tmp_path / "wheels").iterdir():
            wheel.unlink()


def test_two_at_once_both_find_it(tmp_path: Path, offline: Path) -> None:
    _make_wheel(tmp_path / "wheels")
    for process in [_fetch(), _fetch()]:
        out, error = process.communicate()
        assert (process.returncode, out) == (0, f"{offline}\n"), error
    assert list(offline.parent.iterdir()) == [offline]


def test_who_comes_second_takes_what_the_first_has_made(
    tmp_path: Path, offline: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    script = runpy.run_path(str(FETCH))

    def download_slowly(version: str, scratch: Path) -> str:
        for folder in (offline, scratch / "files"):
            (folder / "vllm").mkdir(parents=True)
        (offline / "vllm" / "__init__.py").write_text("the first")
        return ""

    script["main"].__globals__["_download"] = download_slowly
    assert script["main"](_VERSION) == 0
    assert capsys.readouterr().out == f"{offline}\n"
    assert (offline / "vllm" / "__init__.py").read_text() == "the first"


def test_where_pip_cannot_have_it_the_test_is_skipped_with_the_reason(offline: Path) -> None:
    _, error = (process := _fetch()).communicate()
    assert process.returncode == UNAVAILABLE
    assert error.startswith(f"vLLM {_VERSION} cannot be had: ERROR: No matching distribution found"), error
    assert list(offline.parent.iterdir()) == [], "a next time must try again"
    with pytest.raises(pytest.skip.Exception, match="cannot be had: ERROR: No matching distribution"):
        fetched_source(_VERSION)
