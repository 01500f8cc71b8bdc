"""Says on the terminal what each probe found, under its label."""

from __future__ import annotations

import pytest

#: Every figure and finding from the virtual machine carries it: QEMU shows that something works, never how fast.
LABEL = "qemu-functional"
FINDINGS = pytest.StashKey[list[str]]()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if findings := config.stash.get(FINDINGS, []):
        terminalreporter.section(f"CXL in a virtual machine: {LABEL}")
        for finding in findings:
            terminalreporter.write_line(f"{LABEL}: {finding}")
