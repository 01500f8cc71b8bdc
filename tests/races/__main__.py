"""`python -m tests.races`: search the schedules of the modelled accelerator for races, or replay one."""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from functools import partial

import torch

from tests.races.cases import CASES, CASES_BY_NAME, run_named
from tests.races.search import (
    Case,
    Schedule,
    Tally,
    attempt,
    path_batches,
    run_batches,
    seed_batches,
)

_FINDINGS_SHOWN = 10


def search(cases: Sequence[Case], schedule_count: int, seed: int, job_count: int, *, checks_order: bool) -> int:
    """Search, print a table; gives the number of findings."""
    started = time.perf_counter()
    run = partial(run_named, checks_order=checks_order)
    tallies = {case.name: Tally() for case in cases}
    with ExitStack() as stack:
        executor = None
        if job_count > 1:
            spawn = multiprocessing.get_context("spawn")
            executor = stack.enter_context(ProcessPoolExecutor(job_count, spawn))
        for name, tally in run_batches(path_batches(cases, schedule_count), run, executor):
            tallies[name].add(tally)
        left = schedule_count - sum(tally.schedule_count for tally in tallies.values())
        for name, tally in run_batches(seed_batches(cases, left, seed), run, executor):
            tallies[name].add(tally)
    _print_table(tallies, time.perf_counter() - started)
    findings = [finding for tally in tallies.values() for finding in tally.findings]
    for finding in findings[:_FINDINGS_SHOWN]:
        print(f"\n{finding}")
    return len(findings)


def _print_table(tallies: dict[str, Tally], seconds: float) -> None:
    print(f"{'case':32} {'random':>8} {'bounded':>8} {'every way':>10} {'violations':>10} {'schedules/s':>11}")
    for name, tally in tallies.items():
        counts = tally.counts
        paths = f"{counts['path']}{'' if tally.is_exhausted else '+'}" if "path" in counts else "-"
        print(
            f"{name:32} {counts.get('random', 0):8} {counts.get('bounded', 0):8} {paths:>10} {len(tally.findings):10} "
            f"{tally.schedule_count / max(tally.seconds, 1e-9):11.0f}"
        )
    total = sum(tally.schedule_count for tally in tallies.values())
    count = sum(len(tally.findings) for tally in tallies.values())
    print(f"{total} schedules in {seconds:.1f} s, {count} violations")


def replay(case: Case, schedule: Schedule, *, checks_order: bool) -> int:
    """Run one schedule and print its steps; gives the number of findings."""
    trace: list[str] = []
    finding = attempt(case, schedule, checks_order=checks_order, trace=trace)
    print("\n".join(trace))
    print(f"\n{finding or f'{case.name}, schedule {schedule}: nothing is wrong'}")
    return int(finding is not None)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.races", description=__doc__)
    parser.add_argument("--schedules", type=int, default=10_000, help="how many, over all cases")
    parser.add_argument("--seed", type=int, default=0, help="the first seed")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument("--case", choices=sorted(CASES_BY_NAME), help="this one only")
    parser.add_argument("--only", metavar="PREFIX", default="", help="cases whose names begin like this")
    parser.add_argument("--replay", metavar="SCHEDULE", help="one schedule, such as random:17, step by step")
    parser.add_argument("--strikes-only", action="store_true", help="report no accesses that are merely unordered")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    checks_order = not arguments.strikes_only
    if arguments.replay is not None:
        if arguments.case is None:
            parser.error("--replay: name the case with --case")
        return replay(CASES_BY_NAME[arguments.case], Schedule.of(arguments.replay), checks_order=checks_order)
    cases = [CASES_BY_NAME[arguments.case]] if arguments.case else CASES
    cases = [case for case in cases if case.name.startswith(arguments.only)]
    if not cases:
        parser.error(f"--only: no case begins with {arguments.only}; there are {', '.join(CASES_BY_NAME)}")
    return int(search(cases, arguments.schedules, arguments.seed, arguments.jobs, checks_order=checks_order) > 0)


if __name__ == "__main__":
    sys.exit(main())
