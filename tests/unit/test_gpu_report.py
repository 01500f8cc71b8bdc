"""`make gpu`: it refuses without a device, runs every step whatever fails, and passes only where all of it has run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from deploy import gpu
from deploy.gpu import Outcome, Step

ROOT = Path(__file__).parent.parent.parent
MACHINE: dict[str, Any] = {
    "devices": ["NVIDIA H100 80GB HBM3, 81559 MiB, 5, 16"],
    "driver": "580.1",
    "kernel": "6.8.0",
    "python": "3.12.1",
    "versions": {"vllm": "0.33.0", "torch": "2.14.0"},
}

without_device = pytest.mark.skipif(gpu.device_count() > 0, reason="there is a CUDA device here")


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Steps run here, on a machine that says it has a device, and report here."""
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    monkeypatch.setattr(gpu, "REPORT", tmp_path / "gpu-report.md")
    monkeypatch.setattr(gpu, "DETAILS", tmp_path / "gpu-report")
    monkeypatch.setattr(gpu, "device_count", lambda: 1)
    monkeypatch.setattr(gpu, "write_report", lambda *a: write_report(*a, tmp_path / "gpu-report.md"))
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    (tmp_path / "conftest.py").write_text("")
    return tmp_path


write_report = gpu.write_report


def suite(place: Path, name: str, source: str) -> Step:
    (place / f"test_{name}.py").write_text(source)
    return Step(name, "something", ("-m", "pytest", "-p", "no:cacheprovider", f"test_{name}.py"), 60)


def benchmark(name: str, source: str, limit_s: float = 60) -> Step:
    return Step(name, "a figure", ("-c", source), limit_s)


@without_device
@pytest.mark.parametrize("command", [["make", "--no-print-directory", "gpu"], ["deploy/gpu.sh"]])
def test_without_a_device_one_sentence_and_nothing_else(command: list[str], tmp_path: Path) -> None:
    # A make that this runs under would have its say.
    ours = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")}
    environment = {**ours, "VENV_GPU": str(tmp_path / "venv"), "PIP_INDEX_URL": "http://127.0.0.1:9/simple"}
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 2 and not run.stdout
    said = [line for line in run.stderr.splitlines() if not line.startswith("make: ***")]
    assert len(said) == 1 and said[0].startswith("make gpu: the driver shows no CUDA device here")
    assert not list(tmp_path.iterdir())


@without_device
def test_the_steps_are_not_run_without_a_device(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main(["run"]) == 2
    assert capsys.readouterr().out == ""


def test_a_failure_ends_nothing_but_its_own_step(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = (
        suite(place, "bad", "def test_one(): pass\ndef test_two():\n    print('the reason'); assert 0\n"),
        benchmark("figure", "print('a table'); print('{\"rate\": 3}')"),
        suite(place, "good", "def test_one(): pass\n"),
    )
    monkeypatch.setattr(gpu, "STEPS", steps)
    assert gpu.main(["run"]) == 1
    report = (place / "gpu-report.md").read_text()
    assert "# GPU report: 1 of 3 steps failed" in report
    assert "| bad | FAILED: pytest ended with exit code 1 (1 failed, 1 passed) |" in report
    assert "| good | passed (1 passed) |" in report and "| figure | passed |" in report
    assert "the reason" in report.partition("## bad")[2]
    values = json.loads((place / "gpu-report.json").read_text())
    assert [step["passed"] for step in values["steps"]] == [False, True, True] and not values["passed"]
    assert values["steps"][1]["result"] == {"rate": 3}
    assert "a table" in (place / "gpu-report" / "figure.log").read_text()


def test_all_passed_is_exit_code_0_and_named_steps_are_run_alone(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = (
        suite(place, "good", "def test_one(): pass\n"),
        suite(place, "bad", "def test_one(): assert 0\n"),
    )
    monkeypatch.setattr(gpu, "STEPS", steps)
    assert gpu.main(["run", "good"]) == 0
    assert "all 1 steps passed" in (place / "gpu-report.md").read_text()
    assert gpu.main(["run"]) == 1
    with pytest.raises(SystemExit):
        gpu.main(["run", "godo"])


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        ("", "pytest ended with exit code 5"),
        ("import pytest\ndef test_one(): pytest.skip('no')\n", "not one test ran"),
        ("import pytest\npytest.skip('no', allow_module_level=True)\n", "pytest ended with exit code 5"),
        (
            "import pytest\ndef test_one(): pass\ndef test_two(): pytest.skip('no')\n",
            "1 tests were skipped, so what they show is open",
        ),
        ("import nothing_of_that_name\n", "pytest ended with exit code 2"),
    ],
)
def test_a_step_that_tests_nothing_has_failed(place: Path, source: str, problem: str) -> None:
    outcome = gpu.run_step(suite(place, "empty", source))
    assert outcome.problem == problem and not outcome.passed


@pytest.mark.parametrize(
    ("source", "limit_s", "problem"),
    [
        ("pass", 60, "it printed no result"),
        ("print('no result')", 60, "it printed no result"),
        ("raise SystemExit(2)", 60, "it ended with exit code 2"),
        ("import time\nprint('begun', flush=True)\ntime.sleep(60)", 1, "not done after 1 s"),
    ],
)
def test_a_benchmark_without_a_result_has_failed(place: Path, source: str, limit_s: float, problem: str) -> None:
    outcome = gpu.run_step(benchmark("figure", source, limit_s))
    assert outcome.problem == problem
    assert limit_s > 1 or "begun" in outcome.tail


def test_what_an_earlier_run_left_behind_does_not_count(place: Path) -> None:
    assert gpu.run_step(suite(place, "step", "def test_one(): pass\n")).passed
    killed = "import os\ndef test_one(): os._exit(0)\n"
    assert gpu.run_step(suite(place, "step", killed)).problem == "not one test ran"


def test_the_report_says_on_what_it_holds(tmp_path: Path) -> None:
    outcomes = [
        Outcome("kernels", "they copy", duration_s=12.34, counts={"passed": 3}),
        Outcome("copy", "how fast", problem="it printed no result", duration_s=1.0, tail="Traceback\n```\nKeyError"),
    ]
    write_report(outcomes, MACHINE, tmp_path / "report.md")
    lines = (tmp_path / "report.md").read_text().splitlines()
    assert lines[0] == "# GPU report: 1 of 2 steps failed"
    assert "- device: NVIDIA H100 80GB HBM3, 81559 MiB, 5, 16" in lines
    assert "- driver 580.1, Linux 6.8.0, Python 3.12.1" in lines and "- vllm 0.33.0, torch 2.14.0" in lines
    assert "| kernels | passed (3 passed) | 12.3 | they copy |" in lines
    assert lines[-5:] == ["```text", "Traceback", "'''", "KeyError", "```"]
    values = json.loads((tmp_path / "report.json").read_text())
    assert values["machine"] == MACHINE and values["steps"][1]["problem"] == "it printed no result"


def test_every_step_names_what_is_there() -> None:
    for step in gpu.STEPS:
        for argument in step.arguments:
            assert not argument.startswith("tests/") or (ROOT / argument).exists(), argument
        if not step.is_tests:
            assert (ROOT / "benchmarks" / f"{step.arguments[-1]}.py").exists()
    assert set(gpu.describe_machine()) == set(MACHINE)


def test_the_contract_step_asks_the_device_and_no_stand_in() -> None:
    (contract,) = (step for step in gpu.STEPS if step.name == "contract")
    command = [sys.executable, *contract.arguments, "--collect-only", "-q"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    names = [line for line in run.stdout.splitlines() if "::" in line]
    assert len(names) > 20 and all("cuda" in name.rpartition("[")[2] and "stand" not in name for name in names)
