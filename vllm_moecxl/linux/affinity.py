"""Which CPUs a thread of ours may run on."""

from __future__ import annotations

import os


def use_all_cpus() -> None:
    """Let the calling thread run on every CPU that this process' container has.

    vLLM's CPU worker pins its main thread to one core and new threads inherit that: a copy thread would take turns with
    the kernels it is meant to run beside. The kernel itself takes CPUs off the mask that the container has not got.
    """
    os.sched_setaffinity(0, range(os.cpu_count() or 1))
