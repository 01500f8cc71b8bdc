"""Kernels as compiled for devices: wide accesses, nothing spilled, few registers, one compilation for every step."""

from __future__ import annotations

import pytest

from tests.kernels.compiled import ARCHITECTURES, Report, compilations_of, reports_of

_NVIDIA = [arch for arch in ARCHITECTURES if arch.startswith("sm_")]


@pytest.fixture(scope="module")
def reports() -> list[Report]:
    return reports_of("tests.kernels.cases")


@pytest.fixture(scope="module")
def planted() -> dict[tuple[str, str], Report]:
    return {(report.case, report.arch): report for report in reports_of("tests.kernels.planted")}


def test_every_kernel_is_compiled_for_every_architecture(reports: list[Report]) -> None:
    kernels = {"_gather_slabs", "_remap", "_gate_lookahead", "ensure_experts_kernel"}
    assert {(report.kernel, report.arch) for report in reports} == {
        (k, arch) for k in kernels for arch in ARCHITECTURES
    }


def test_compiled_kernels_have_no_faults(reports: list[Report]) -> None:
    faults = [f"{report.case}, {report.arch}: {fault}" for report in reports for fault in report.faults()]
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize(
    ("case", "fault", "architectures"),
    [
        ("source of unknown alignment", "_copy_words: reader loads 32 bits", ARCHITECTURES),
        ("target of unknown alignment", "_copy_words: writer stores 32 bits", ARCHITECTURES),
        ("mask by bytes", "_copy_words: reader loads 32 bits", ARCHITECTURES),
        ("bytes only", "no access _copy_words: reader", ARCHITECTURES),
        ("one access more", "_gather_slabs: stray stores", ARCHITECTURES),
        ("many registers", "registers a thread", _NVIDIA),
        ("more than registers hold", "spilled", _NVIDIA),
        ("much shared memory", "bytes of shared memory", ARCHITECTURES),
    ],
)
def test_a_planted_fault_is_found(
    planted: dict[tuple[str, str], Report], case: str, fault: str, architectures: list[str]
) -> None:
    for arch in architectures:
        faults = planted[case, arch].faults()
        assert any(fault in found for found in faults), f"{arch}: {faults}"


def test_one_compilation_serves_every_step_and_layer() -> None:
    compilations = compilations_of("tests.kernels.cases")
    assert compilations == dict.fromkeys(compilations, 1) and compilations


def test_what_takes_several_compilations_is_found() -> None:
    compilations = compilations_of("tests.kernels.planted")
    assert all(count > 1 for count in compilations.values()) and compilations
