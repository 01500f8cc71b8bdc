"""Where copy threads run: beside the compute threads of vLLM's CPU engine, and near a GPU."""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from vllm_moecxl.linux import affinity
from vllm_moecxl.linux.affinity import parse_cpus, precise_sleep, spare_cpus, use_cpus_near, use_spare_cpus

_PR_GET_TIMERSLACK = 30


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0", {0}),
        ("0-3,8\n", {0, 1, 2, 3, 8}),
        ("0 1 2", {0, 1, 2}),
        ("0-14:7 3", {0, 7, 14, 3}),
        ("", set()),
        ("all", set()),
        ("3-1", set()),
    ],
)
def test_cpu_lists_are_read_in_the_words_of_the_kernel_and_of_openmp(text: str, expected: set[int]) -> None:
    assert parse_cpus(text) == expected


class Machine:
    """/proc and /sys of a process and the one that started it."""

    PARENT = 77

    def __init__(self, root: Path) -> None:
        self.proc, self.sysfs = root / "proc", root / "sys"

    def threads(self, process: str, *masks: str) -> Machine:
        for index, mask in enumerate(masks):
            folder = self.proc / process / "task" / str(100 + index)
            folder.mkdir(parents=True)
            (folder / "status").write_text(f"Name:\tpython\nCpus_allowed:\tff\nCpus_allowed_list:\t{mask}\nMems:\t0\n")
        return self

    def nodes(self, *cpulists: str) -> Machine:
        for index, cpulist in enumerate(cpulists):
            folder = self.sysfs / "devices" / "system" / "node" / f"node{index}"
            folder.mkdir(parents=True)
            (folder / "cpulist").write_text(f"{cpulist}\n")
        return self

    def spare(self, **environment: str) -> set[int]:
        return set(spare_cpus(environment, self.proc, self.sysfs, self.PARENT))


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def test_where_nothing_is_bound_every_cpu_of_the_process_will_do(machine: Machine) -> None:
    machine.threads("self", "0-3", "0-3").threads("77", "0-7")
    assert machine.spare(OMP_NUM_THREADS="1") == {0, 1, 2, 3}


@pytest.mark.parametrize(
    "environment",
    [
        {"GOMP_CPU_AFFINITY": "0 1 2"},
        {"GOMP_CPU_AFFINITY": "0-2"},
        {"KMP_AFFINITY": "granularity=fine,explicit,proclist=[0,1,2]"},
        {"OMP_PLACES": "{0,1,2}", "OMP_PROC_BIND": "true"},
    ],
    ids=" ".join,
)
def test_the_compute_threads_cpus_are_left_out_of_what_the_user_allowed(
    machine: Machine, environment: dict[str, str]
) -> None:
    """In a worker all threads have inherited a bound thread's mask; the process above still has the user's."""
    machine.threads("self", "0", "0", "0").threads("77", "0-3").nodes("0-15")
    assert machine.spare(**environment) == {3}


def test_spare_cpus_of_the_compute_threads_node_come_first(machine: Machine) -> None:
    machine.threads("self", "8").threads("77", "0-15").nodes("0-7", "8-15", "")
    assert machine.spare(GOMP_CPU_AFFINITY="8 9 10 11 12 13 14") == {15}
    assert machine.spare(GOMP_CPU_AFFINITY="8-15") == set(range(8)), "no other node has a spare one"


def test_without_nodes_in_sysfs_any_spare_cpu_will_do(machine: Machine) -> None:
    machine.threads("self", "0").threads("77", "0-3")
    assert machine.spare(GOMP_CPU_AFFINITY="0 1") == {2, 3}


def test_where_none_is_spare_all_are_used(machine: Machine) -> None:
    machine.threads("self", "0").threads("77", "0-1").nodes("0-1")
    assert machine.spare(GOMP_CPU_AFFINITY="0 1") == {0, 1}


def test_a_binding_in_other_words_is_read_off_the_threads(machine: Machine) -> None:
    machine.threads("self", "0", "1", "0-3").threads("77", "0-3").nodes("0-3")
    assert machine.spare(OMP_PLACES="cores") == {2, 3}
    assert machine.spare(KMP_AFFINITY="compact") == {2, 3}


def test_a_parent_that_is_gone_leaves_what_the_process_has(machine: Machine) -> None:
    machine.threads("self", "0", "0-1")
    assert machine.spare(GOMP_CPU_AFFINITY="0") == {1}


def test_this_process_may_use_what_the_kernel_says_it_may() -> None:
    assert spare_cpus({}) >= os.sched_getaffinity(0)


_WORKER = """
import json, os, threading
os.sched_setaffinity(0, {cpu})
from vllm_moecxl.linux.affinity import use_spare_cpus
masks = []
def work():
    before = sorted(os.sched_getaffinity(0))
    told = sorted(use_spare_cpus())
    masks.append((before, told, sorted(os.sched_getaffinity(0))))
for _ in range(2):
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
print(json.dumps((masks, sorted(os.sched_getaffinity(0)))))
"""


def test_threads_of_a_bound_process_leave_its_cpu_and_the_next_one_follows_the_first() -> None:
    """As in vLLM's CPU worker: started with the variable that its OpenMP library reads, and bound by it."""
    cpus = sorted(os.sched_getaffinity(0))
    if len(cpus) < 2:
        pytest.skip("there is one CPU only")
    run = subprocess.run(
        [sys.executable, "-c", _WORKER.replace("{cpu}", f"{{{cpus[0]}}}")],
        env={**os.environ, "GOMP_CPU_AFFINITY": str(cpus[0])},
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[3],
    )
    masks, of_main = json.loads(run.stdout)
    for before, told, after in masks:
        assert before == [cpus[0]] and told == after and set(after) <= set(cpus[1:])
    assert masks[0] == masks[1] and of_main == [cpus[0]], "the compute thread stays where it is"


def in_thread(work: Callable[[], object]) -> object:
    results: list[object] = []
    thread = threading.Thread(target=lambda: results.append(work()))
    thread.start()
    thread.join()
    (result,) = results
    return result


def test_the_process_is_looked_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    first = in_thread(use_spare_cpus)
    monkeypatch.setattr(affinity, "spare_cpus", lambda _: pytest.fail("asked again"))
    assert in_thread(use_spare_cpus) == first


def test_threads_go_near_a_pci_device_within_what_they_may_use(tmp_path: Path) -> None:
    own = os.sched_getaffinity(0)
    folder = tmp_path / "bus" / "pci" / "devices" / "0000:17:00.0"
    folder.mkdir(parents=True)
    for near, expected in ((f"{max(own)},9998-9999", {max(own)}), ("9998-9999", own), ("", own)):
        (folder / "local_cpulist").write_text(f"{near}\n")
        assert in_thread(lambda: (use_cpus_near("0000:17:00.0", tmp_path), os.sched_getaffinity(0))) == (
            expected,
            expected,
        )
    assert in_thread(lambda: use_cpus_near("0000:18:00.0", tmp_path)) == own
    assert os.sched_getaffinity(0) == own


def test_a_threads_sleep_gets_exact_and_no_other_threads() -> None:
    libc = ctypes.CDLL(None)

    def slack() -> int:
        return int(libc.prctl(_PR_GET_TIMERSLACK, 0, 0, 0, 0))

    before = slack()
    assert in_thread(lambda: (precise_sleep(), slack())[1]) == 1000
    assert slack() == before != 1000
