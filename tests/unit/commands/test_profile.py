"""`moecxl profile`: what it measures is kept where the engine looks, and a mistake keeps nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from vllm_moecxl.commands.doctor import examine
from vllm_moecxl.commands.main import EXIT_USAGE, main
from vllm_moecxl.data import profiling
from vllm_moecxl.data.banks.make import make_banks
from vllm_moecxl.data.profiles import default_path, load_profiles, machine_identity
from vllm_moecxl.data.slabwriter import SlabFileWriter
from vllm_moecxl.errors import TransferError
from vllm_moecxl.linux.topology import read_topology
from vllm_moecxl.units import MIB

_QUICK = ["--size", "16MiB", "--streams", "2"]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody's real profiles are touched, and few reads are enough."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(profiling, "_POINT_READS_MAX", 5)
    monkeypatch.setattr(profiling, "_ROUND_READS_MAX", 1)
    monkeypatch.setattr(profiling, "_ROUND_COUNT", 1)


def _profile(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, object]:
    assert main(["profile", "--json", *_QUICK, *arguments]) == 0
    result: dict[str, object] = json.loads(capsys.readouterr().out)
    return result


def test_the_engine_loads_what_was_measured(capsys: pytest.CaptureFixture[str]) -> None:
    result = _profile(capsys)
    (bank,) = [bank for bank in result["banks"] if bank["bank"] == "dram"]  # type: ignore[attr-defined]
    assert result["stored_in"] == str(default_path()) and bank["label"] == "hardware"
    assert [stream["count"] for stream in bank["streams"]] == [1, 2]
    profiles = load_profiles(machine_identity(read_topology()))
    made = next(bank for bank in make_banks(None, profiles) if bank.name == "dram")
    assert made.profile.source == "measured"
    assert made.profile.latency_s == bank["summary"]["latency_s"]
    assert made.profile.read_bytes_per_s == bank["summary"]["read_bytes_per_s"]


def test_an_emulated_bank_is_labelled_and_not_kept(capsys: pytest.CaptureFixture[str]) -> None:
    result = _profile(capsys, "emulated:300ns,2GB/s")
    (bank,) = result["banks"]  # type: ignore[misc]
    assert bank["label"] == "emulated-paced"
    assert bank["summary"] == {"latency_s": 300e-9, "read_bytes_per_s": 2e9}
    assert result["stored_in"] is None and not default_path().exists()


def test_a_slab_file_is_measured_where_it_lies(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "model.slabs"
    writer = SlabFileWriter(path, {}, 1, MIB)
    writer.add_layer("layer", "kernel", {"w": torch.zeros(4, MIB, dtype=torch.uint8)}, {}, ())
    writer.finish()
    (bank,) = _profile(capsys, f"file:{path}")["banks"]  # type: ignore[misc]
    assert bank["latency_of"] == "small read" and bank["load_s"] is None
    assert bank["reads"][-1]["read_bytes"] == 4 * MIB, "the largest that the file has"
    assert bank["identity"] in load_profiles(machine_identity(read_topology())).measured


def test_people_get_a_table_that_says_what_a_figure_means(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["profile", *_QUICK, "dram", "emulated:cxl-a"]) == 0
    output = capsys.readouterr().out
    for part in ("bank dram (hardware)", "a load that waits for the one before it", "our call included", "16.00 MiB"):
        assert part in output
    assert "give more --size" in output or "caches" not in output
    assert "bank emulated:cxl-a (emulated-paced)" in output and "not kept: 214 ns, 32 GB/s" in output
    assert "outside of the engine" in output and str(default_path()) in output


def test_output_names_another_place(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "mine.json"
    assert _profile(capsys, "dram", "--output", str(path))["stored_in"] == str(path)
    assert path.is_file() and not default_path().exists()


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["nonsense"], "nonsense"),
        (["dram", "numa:999"], "numa:999"),
        (["dram", "dram"], "once"),
        (["dram", "file:/nowhere/model.slabs"], "moecxl pack MODEL /nowhere/model.slabs first"),
        (["dram", "file:/"], "moecxl pack MODEL / first"),
        (["dram", "emulated:warp"], "emulated:warp"),
        (["dram", "--size", "3"], "--size 3"),
        (["dram", "--size", "4KiB"], "--size 4KiB"),
        (["dram", "--streams", "0"], "--streams 0"),
        (["dram", "--output", "/"], "--output /"),
        (["dram", *_QUICK, "--output", "/proc/nowhere/profiles.json"], "--output /proc/nowhere/profiles.json"),
    ],
)
def test_a_mistake_is_one_sentence_and_nothing_is_kept(
    arguments: list[str], part: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["profile", *arguments]) == EXIT_USAGE
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.count("\n") == 1 and output.err.startswith("moecxl profile: ") and part in output.err
    assert not default_path().exists()


def test_a_bank_that_fails_leaves_what_was_kept(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    _profile(capsys, "dram")
    before = default_path().read_text()
    real = profiling.measure

    def fail_second(bank: object, *arguments: object) -> object:
        if getattr(bank, "name", "").startswith("numa"):
            raise TransferError("the device is gone")
        return real(bank, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(profiling, "measure", fail_second)
    assert main(["profile", *_QUICK, "dram", "numa:0"]) == EXIT_USAGE
    assert default_path().read_text() == before


def test_the_doctor_says_whether_and_when(capsys: pytest.CaptureFixture[str]) -> None:
    def about_dram() -> list[tuple[str, str]]:
        findings = examine(Path("/sys"))["findings"]
        return [(finding.level, finding.text) for finding in findings if finding.text.startswith("bank dram")]

    ((level, text),) = about_dram()
    assert level == "note" and "moecxl profile dram" in text
    (bank,) = _profile(capsys, "dram")["banks"]  # type: ignore[misc]
    ((level, text),) = about_dram()
    assert level == "ok" and bank["date"] in text
