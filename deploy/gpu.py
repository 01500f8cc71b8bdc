"""`make gpu`: run all that needs a CUDA device, one step after the other, and write down what became of it.

`check` ends with exit code 2 where there is no device. `run` runs the steps, or those that are named, goes on whatever
fails, writes gpu-report.md and gpu-report.json, and ends with exit code 1 if anything failed or tested nothing. It
needs nothing but Python, and leaves whatever needs more to the steps.
"""

from __future__ import annotations

import argparse
import ctypes
import datetime
import json
import os
import platform
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
REPORT = ROOT / "gpu-report.md"
#: Whole outputs of the steps, and what benchmarks save.
DETAILS = ROOT / "gpu-report"
_TAIL_LINES = 40
_PACKAGES = ("vllm", "torch", "triton", "flashinfer-python", "transformers", "numpy", "vllm_moecxl")
#: What engines need in order to give the same tokens with other numbers of experts: one shape of the Triton kernels.
ENGINE_ENVIRONMENT = {"VLLM_BATCH_INVARIANT": "1", "VLLM_USE_BREAKABLE_CUDAGRAPH": "0"}


@dataclass(frozen=True)
class Step:
    """Something to run.

    Attributes:
        proves: what it shows when it passes.
        arguments: of Python; pytest writes its results where `Step.results` says.
        limit_s: after which it is ended, and has failed.
    """

    name: str
    proves: str
    arguments: tuple[str, ...]
    limit_s: float

    @property
    def is_tests(self) -> bool:
        return "pytest" in self.arguments

    @property
    def results(self) -> Path:
        """Where pytest writes what became of each test."""
        return DETAILS / f"{self.name}.xml"

    @property
    def command(self) -> list[str]:
        extra = ["--junitxml", str(self.results), "-rfEs"] if self.is_tests else ["--json"]
        return [sys.executable, *self.arguments, *extra]


def _tests(*arguments: str) -> tuple[str, ...]:
    # Warnings of a machine that nobody has seen are no failures.
    return ("-m", "pytest", "-W", "default", *arguments)


STEPS = (
    Step(
        "contract",
        "the backend contract, which the CPU and the modelled accelerator keep too, on CudaBackend",
        _tests("tests/unit/test_device_contract.py", "-k", "cuda and not stand"),
        600,
    ),
    Step(
        "backend",
        "what the backend takes for granted of the driver: addresses, registration, copies beside kernels",
        _tests("tests/gpu/test_cuda_backend.py"),
        600,
    ),
    Step(
        "kernels",
        "the kernels' property tests, compiled and not interpreted, on registered host memory",
        _tests("-p", "tests.gpu.ferry", "tests/kernels"),
        1800,
    ),
    Step(
        "graph",
        "look-up, gather and remap inside of a CUDA graph: each replay is what the reference makes of its input",
        _tests("tests/gpu/test_graph.py"),
        900,
    ),
    Step(
        "equality",
        "tokens and logprobs of unmodified vLLM, eager and under CUDA graphs, at 100, 50 and 25 % of the experts",
        _tests("tests/gpu/test_equality.py"),
        3 * 3600,
    ),
    Step("copy", "the copy engine against the gather kernel, by slab size", ("-m", "benchmarks", "copy"), 1800),
    Step("overlap", "how much of the copying hides behind computing", ("-m", "benchmarks", "overlap"), 3600),
    Step("interference", "what a long prefill does to others", ("-m", "benchmarks", "interference"), 3600),
)


@dataclass
class Outcome:
    """What became of a step.

    Attributes:
        problem: why it has not passed; empty where it has.
        counts: of tests, by what became of them; of a benchmark none.
        result: what a benchmark found.
        tail: the last lines that it printed, where it has not passed.
    """

    name: str
    proves: str
    problem: str = ""
    duration_s: float = 0.0
    counts: dict[str, int] = field(default_factory=dict)
    result: dict[str, Any] | None = None
    tail: str = ""

    @property
    def passed(self) -> bool:
        return not self.problem


def run_step(step: Step) -> Outcome:
    """Run one step to its end, or to its limit."""
    DETAILS.mkdir(exist_ok=True)
    step.results.unlink(missing_ok=True)
    log = DETAILS / f"{step.name}.log"
    environment = {**os.environ, "MOECXL_RESULTS": str(DETAILS), **({} if step.is_tests else ENGINE_ENVIRONMENT)}
    started_s = time.monotonic()
    with log.open("wb") as output:
        process = subprocess.Popen(
            step.command,
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=output,
            text=True,
            start_new_session=True,
        )
        try:
            printed, _ = process.communicate(timeout=step.limit_s)
            code: int | None = process.returncode
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            printed, _ = process.communicate()
            code = None
    with log.open("a") as output:
        output.write(f"\n----- standard output -----\n{printed}")
    outcome = Outcome(step.name, step.proves, duration_s=round(time.monotonic() - started_s, 1))
    outcome.problem = f"not done after {step.limit_s:.0f} s" if code is None else judge(step, outcome, code, printed)
    if outcome.problem:
        outcome.tail = "\n".join(log.read_text(errors="replace").splitlines()[-_TAIL_LINES:])
    return outcome


def judge(step: Step, outcome: Outcome, code: int, printed: str) -> str:
    """Note what a step that has ended found out; why it has not passed, or nothing."""
    if step.is_tests:
        outcome.counts = count_tests(step.results)
        if code:
            return f"pytest ended with exit code {code}"
        if not outcome.counts.get("passed"):
            return "not one test ran"
        if skipped := outcome.counts.get("skipped"):
            return f"{skipped} tests were skipped, so what they show is open"
        return ""
    if code:
        return f"it ended with exit code {code}"
    try:
        outcome.result = json.loads(printed.splitlines()[-1])
    except (IndexError, json.JSONDecodeError):
        return "it printed no result"
    return ""


def count_tests(results: Path) -> dict[str, int]:
    """Tests by what became of them: passed, skipped, failed."""
    if not results.exists():
        return {}
    counts: Counter[str] = Counter()
    for case in ElementTree.parse(results).iter("testcase"):
        kinds = {child.tag for child in case}
        counts["failed" if kinds & {"failure", "error"} else "skipped" if "skipped" in kinds else "passed"] += 1
    return dict(counts)


def describe_machine() -> dict[str, Any]:
    """Device, driver and versions that the report holds for; nothing that names the machine itself."""
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return {
        "devices": _ask_driver("name,memory.total,pcie.link.gen.max,pcie.link.width.max"),
        "driver": (_ask_driver("driver_version") or ["unknown"])[0],
        "kernel": platform.release().split("-")[0],
        "python": platform.python_version(),
        "versions": versions,
    }


def _ask_driver(fields: str) -> list[str]:
    """A line for each device, of what the driver's own tool says of it."""
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"]
    try:
        run = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return []
    return run.stdout.split("\n")[:-1]


def write_report(outcomes: Sequence[Outcome], machine: dict[str, Any], path: Path = REPORT) -> None:
    """Write the report, and the same as JSON beside it."""
    values = {
        "date": datetime.date.today().isoformat(),
        "passed": all(outcome.passed for outcome in outcomes),
        "machine": machine,
        "steps": [{**asdict(outcome), "passed": outcome.passed} for outcome in outcomes],
    }
    path.with_suffix(".json").write_text(json.dumps(values, indent=1) + "\n")
    path.write_text("\n".join(_lines(outcomes, values)) + "\n")


def _lines(outcomes: Sequence[Outcome], values: dict[str, Any]) -> list[str]:
    machine = values["machine"]
    failed = [outcome for outcome in outcomes if not outcome.passed]
    verdict = f"{len(failed)} of {len(outcomes)} steps failed" if failed else f"all {len(outcomes)} steps passed"
    lines = [f"# GPU report: {verdict}", ""]
    lines += [f"- date: {values['date']}"]
    lines += [f"- device: {device}" for device in machine["devices"]]
    lines += [f"- driver {machine['driver']}, Linux {machine['kernel']}, Python {machine['python']}"]
    lines += [f"- {', '.join(f'{name} {version}' for name, version in machine['versions'].items())}", ""]
    lines += ["| step | result | seconds | what it shows |", "|---|---|---|---|"]
    for outcome in outcomes:
        said = ", ".join(f"{count} {what}" for what, count in sorted(outcome.counts.items()))
        result = ("passed" if outcome.passed else f"FAILED: {outcome.problem}") + (f" ({said})" if said else "")
        lines.append(f"| {outcome.name} | {result} | {outcome.duration_s:.1f} | {outcome.proves} |")
    for outcome in failed:
        lines += ["", f"## {outcome.name}", "", "```text", outcome.tail.replace("```", "'''"), "```"]
    return lines


def device_count() -> int:
    """CUDA devices that the driver shows to this process; 0 where there is no driver."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0
    count = ctypes.c_int()
    if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)):
        return 0
    return count.value


def main(arguments: Sequence[str] | None = None) -> int:
    """See the module."""
    parser = argparse.ArgumentParser(prog="deploy/gpu.py", description=__doc__)
    parser.add_argument("action", choices=("check", "run"))
    names = [step.name for step in STEPS]
    parser.add_argument("steps", nargs="*", metavar="STEP", help=f"of {', '.join(names)}; all, where none is named")
    args = parser.parse_args(arguments)
    if unknown := set(args.steps) - set(names):
        parser.error(f"no step is called {', '.join(sorted(unknown))}: there are {', '.join(names)}")
    if not device_count():
        print(
            "make gpu: the driver shows no CUDA device here (libcuda.so.1), and there is nothing to do without one: "
            "nothing was downloaded",
            file=sys.stderr,
        )
        return 2
    if args.action == "check":
        return 0
    machine = describe_machine()
    outcomes = []
    for step in STEPS:
        if args.steps and step.name not in args.steps:
            continue
        print(f"{step.name}: {step.proves} ...", flush=True)
        outcome = run_step(step)
        outcomes.append(outcome)
        print(f"{step.name}: {outcome.problem or 'passed'} after {outcome.duration_s:.0f} s", flush=True)
        # After each, so that what is known is written if this is ended.
        write_report(outcomes, machine)
    print(f"report: {REPORT.name}, {REPORT.with_suffix('.json').name}; whole outputs in {DETAILS.name}/")
    return 0 if all(outcome.passed for outcome in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
