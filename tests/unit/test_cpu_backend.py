"""What the CPU backend promises beyond the contract: copies outside the interpreter, threads beside the kernels."""

from __future__ import annotations

import os
import sys
import threading
import time

import pytest
import torch

from vllm_moecxl.data.devices.cpu import CpuBackend
from vllm_moecxl.data.host import anonymous_tensor
from vllm_moecxl.linux import affinity
from vllm_moecxl.units import MIB


def test_the_interpreter_runs_on_while_a_copy_is_made() -> None:
    backend = CpuBackend()
    source, target = (anonymous_tensor((64 * MIB,), torch.uint8).fill_(1) for _ in range(2))
    counts, is_over = [0], threading.Event()

    def count() -> None:
        while not is_over.is_set():
            counts[0] += 1
            time.sleep(0)  # hands the interpreter back

    thread = threading.Thread(target=count)
    thread.start()
    interval_s = sys.getswitchinterval()
    try:
        sys.setswitchinterval(1000)  # nobody is made to let go: only a copy that does by itself lets the other count
        for _ in range(200):
            before = counts[0]
            backend.copy(source, target, backend.copy_stream(0))
            if counts[0] != before:
                break
        else:
            raise AssertionError("nothing else ran")
    finally:
        sys.setswitchinterval(interval_s)
        is_over.set()
        thread.join()


def test_an_adopted_thread_runs_where_the_compute_threads_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = max(os.sched_getaffinity(0))
    monkeypatch.setattr(affinity, "_own_spare_cpus", lambda: frozenset({cpu}))
    masks: list[set[int]] = []

    def work() -> None:
        CpuBackend().adopt_thread()
        masks.append(os.sched_getaffinity(0))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert masks == [{cpu}]
