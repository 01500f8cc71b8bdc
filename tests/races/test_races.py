"""The search for races: it finds nothing in the data plane, and every bug that is planted there."""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import ModuleType

import pytest

from tests.races import __main__ as command
from tests.races import miniature
from tests.races.cases import CASES, CASES_BY_NAME
from tests.races.choosers import RandomChooser, every_path
from tests.races.crew import Crew, Ended, Stuck
from tests.races.planted import PLANTS, Plant
from tests.races.search import Case, Schedule, Strategy, World, attempt, run_paths, run_seeds
from vllm_moecxl.data.devices.modelled import Chooser

#: `make races` runs many more.
_SCHEDULE_COUNT = 100
#: Within so many schedules a bug has to be found.
_FOUND_WITHIN = 10_000


def by_name(case: Case) -> str:
    return case.name


@pytest.mark.parametrize("strategy", ["random", "bounded"])
@pytest.mark.parametrize("case", CASES, ids=by_name)
def test_nothing_goes_wrong_in_any_schedule(case: Case, strategy: Strategy) -> None:
    tally = run_seeds(case, strategy, range(_SCHEDULE_COUNT))
    assert not tally.findings, tally.findings[0]


@pytest.mark.parametrize("case", [case for case in CASES if case.is_small], ids=by_name)
def test_nothing_goes_wrong_in_small_cases_whatever_the_order(case: Case) -> None:
    tally = run_paths(case, 4 * _SCHEDULE_COUNT)
    assert not tally.findings, tally.findings[0]
    assert tally.is_exhausted or tally.schedule_count == 4 * _SCHEDULE_COUNT


@pytest.mark.parametrize("checks_order", [True, False], ids=["unordered", "strikes"])
@pytest.mark.parametrize("plant", PLANTS, ids=lambda plant: plant.name)
def test_a_planted_bug_is_found_and_replays(plant: Plant, checks_order: bool) -> None:
    tally = plant.search("random", _FOUND_WITHIN, checks_order=checks_order)
    assert tally.findings, f"not found within {_FOUND_WITHIN} schedules"
    found = tally.findings[0]
    case, schedule = CASES_BY_NAME[plant.case_name], Schedule.of(str(found.schedule))
    with plant.planted():
        assert attempt(case, schedule, checks_order=checks_order) == found
    assert attempt(case, schedule, checks_order=checks_order) is None, "without the bug nothing is wrong"


@pytest.mark.parametrize("checks_order", [True, False], ids=["unordered", "strikes"])
@pytest.mark.parametrize(
    ("name", "bug"), [(name, bug) for name, (_, bugs) in miniature.PROGRAMS.items() for bug in bugs]
)
def test_a_bug_in_miniature_is_found_by_each_strategy(name: str, bug: miniature.Bug, checks_order: bool) -> None:
    case = miniature.case(name, bug)
    for tally in (
        run_seeds(case, "random", range(_FOUND_WITHIN), checks_order=checks_order),
        run_seeds(case, "bounded", range(_FOUND_WITHIN), checks_order=checks_order),
        run_paths(case, _FOUND_WITHIN, checks_order=checks_order),
    ):
        assert tally.findings
        found = tally.findings[0]
        assert attempt(case, Schedule.of(str(found.schedule)), checks_order=checks_order) == found
        assert f"--replay {found.schedule}" in str(found)


@pytest.mark.parametrize("strategy", ["random", "bounded"])
def test_a_seed_decides_every_step(strategy: Strategy) -> None:
    def trace(seed: int) -> list[str]:
        steps: list[str] = []
        attempt(CASES_BY_NAME["striped"], Schedule(strategy, seed), trace=steps)
        return steps

    traces = [trace(seed) for seed in range(20)]
    assert traces == [trace(seed) for seed in range(20)]
    assert len(set(map(tuple, traces))) == 20
    assert any("thread: sidecar" in steps for steps in traces)
    assert any("thread: moecxl-bank 1-0" in steps for steps in traces), "the real hands take part"


def crews(run: Callable[[Crew, list[str]], None]) -> list[tuple[list[str], BaseException | None]]:
    """What a program logs, and what ended it, for every order of its threads."""
    module = ModuleType("threaded")
    seen = []

    def once(chooser: Chooser) -> None:
        log: list[str] = []
        crew = Crew(chooser, World(chooser, 0, checks_order=True).rng, 1.0)
        try:
            with crew.replacing(module):
                run(crew, log)
        except Ended:
            pass
        seen.append((log, crew.error))
        assert module.__dict__["threading"] is threading

    for _ in every_path(once):
        pass
    return seen


def test_threads_interleave_in_every_way() -> None:
    def run(crew: Crew, log: list[str]) -> None:
        def work(name: str) -> None:
            log.append(name)
            crew.pause()
            log.append(name)

        threads = [crew.Thread(work, (name,)) for name in "ab"]
        for thread in threads:
            thread.start()
        crew.join()

    logs = ["".join(log) for log, error in crews(run) if error is None]
    assert sorted(set(logs)) == ["aabb", "abab", "abba", "baab", "baba", "bbaa"]


def test_a_lock_keeps_others_out_and_a_condition_lets_them_in() -> None:
    def run(crew: Crew, log: list[str]) -> None:
        condition = crew.Condition()
        is_ready: list[bool] = []

        def work() -> None:
            with condition:
                while not is_ready:
                    condition.wait()
                log.append("seen")

        crew.Thread(work).start()
        with condition:
            crew.pause()
            with condition:  # it is reentrant
                is_ready.append(True)
            log.append("set")
            crew.pause()
            log.append("left")
            condition.notify_all()
        crew.join()

    found = crews(run)
    assert len(found) > 1
    assert all(log == ["set", "left", "seen"] and error is None for log, error in found)


def test_a_wake_up_that_nobody_gives_is_found() -> None:
    def run(crew: Crew, log: list[str]) -> None:
        condition = crew.Condition()

        def work() -> None:
            with condition:
                condition.wait(timeout=10)

        crew.Thread(work, name="waiter").start()
        with condition:
            condition.notify()  # too early in some orders
        crew.join()
        log.append("ended")

    found = crews(run)
    assert {type(error) for _, error in found} == {type(None), Stuck}
    assert all((error is None) == (log == ["ended"]) for log, error in found)
    assert any("waiter for a condition" in str(error) for _, error in found)


def test_a_deadlock_is_found() -> None:
    def run(crew: Crew, log: list[str]) -> None:
        first, second = crew.Lock(), crew.Lock()

        def work() -> None:
            with second, first:
                log.append("other")

        crew.Thread(work).start()
        with first, second:
            log.append("main")
        crew.join()

    found = crews(run)
    assert {type(error) for _, error in found} == {type(None), Stuck}
    assert all(sorted(log) == ["main", "other"] for log, error in found if error is None)


def test_what_ends_a_thread_ends_the_schedule() -> None:
    def run(crew: Crew, log: list[str]) -> None:
        def work() -> None:
            raise KeyError("work")

        crew.Thread(work).start()
        crew.join()
        log.append("never")

    assert all(isinstance(error, KeyError) and not log for log, error in crews(run))


@pytest.mark.parametrize("text", ["random:17", "bounded:3", "path:0,1,12", "path:"])
def test_a_schedule_is_what_it_prints(text: str) -> None:
    assert str(Schedule.of(text)) == text
    assert isinstance(Schedule.of("random:17").chooser(), RandomChooser)


def test_a_schedule_that_there_is_not_is_refused() -> None:
    with pytest.raises(ValueError, match="try random:SEED"):
        Schedule.of("17")


def test_the_command_searches_replays_and_tells_what_it_found(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(*arguments: str) -> tuple[int, str]:
        monkeypatch.setattr("sys.argv", ["races", *arguments])
        return command.main(), capsys.readouterr().out

    code, text = run("--schedules", "200", "--case", "miniature-ring")
    assert code == 0 and "200 schedules in" in text and "0 violations" in text
    code, text = run("--case", "miniature-ring", "--replay", "random:1")
    assert code == 0 and "start: copy (number 1 on the link 0 stream)" in text and "nothing is wrong" in text
    code, text = run("--schedules", "60", "--case", "miniature-ring", "--jobs", "2")
    assert code == 0 and "60 schedules in" in text and "0 violations" in text
    code, text = run("--schedules", "40", "--only", "miniature")
    assert code == 0 and "40 schedules in" in text
    assert {line.split()[0] for line in text.splitlines()[1:-1]} == {"miniature-" + name for name in miniature.PROGRAMS}
    with pytest.raises(SystemExit, match="2"):
        run("--only", "minature")
    assert "no case begins with minature; there are miniature-double-buffer" in capsys.readouterr().err
    wrong = miniature.case("ring", "ring wrapped early")
    monkeypatch.setitem(CASES_BY_NAME, wrong.name, wrong)
    code, text = run("--schedules", "200", "--case", wrong.name)
    assert code == 1 and "replay: python -m tests.races --case miniature-ring --replay path:" in text
    code, text = run("--case", wrong.name, "--replay", "random:1")
    assert code == 1 and "was overwritten by the host" in text
