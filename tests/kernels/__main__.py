"""`python -m tests.kernels`: what the compiled kernels need, as a table. Fails if one is not as it has to be."""

from __future__ import annotations

import json
import os
import subprocess
import sys

from tests.kernels.compiled import Report, reports_of

_COLUMNS = "{:<46}{:<9}{:>10}{:>9}{:>8}  {:<24}{:>14}"


def moved_per_needed() -> dict[str, float]:
    """Of the calls that move slabs: bytes moved / bytes of the slabs, counted under the interpreter."""
    command = [sys.executable, "-m", "tests.kernels.traffic"]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    run = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True)
    ratios: dict[str, float] = json.loads(run.stdout)
    return ratios


def show(reports: list[Report], ratios: dict[str, float]) -> None:
    """Print the table. Widths of the accesses: of the bulk, and in brackets of look-ups, tails and odd rows."""
    header = ("kernel", "for", "registers", "spilled", "shared", "bits of accesses", "moved/needed")
    print(_COLUMNS.format(*header))
    for report in reports:
        ratio = ratios.get(report.case)
        row = (report.case, report.arch, report.registers, report.spilled, report.shared_bytes, report.width())
        print(_COLUMNS.format(*row, "-" if ratio is None else f"{ratio:.3f}"))


def main() -> int:
    """Print the table and what is wrong; gives the exit status."""
    reports = reports_of("tests.kernels.cases")
    ratios = moved_per_needed()
    show(reports, ratios)
    faults = [f"{report.case}, {report.arch}: {fault}" for report in reports for fault in report.faults()]
    faults += [f"{case}: {ratio} of the needed bytes moved" for case, ratio in ratios.items() if ratio != 1]
    print("\n".join(faults), file=sys.stderr, end="\n" if faults else "")
    return int(bool(faults))


if __name__ == "__main__":
    sys.exit(main())
