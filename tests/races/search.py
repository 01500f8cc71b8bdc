"""The search for races: which schedules a case is run in, and how one is named and found again."""

from __future__ import annotations

import gc
import itertools
import random
import shlex
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from tests.races.choosers import BoundedChooser, PathChooser, RandomChooser, path_after
from vllm_moecxl.data.devices.modelled import Chooser, ModelledBackend, Violation

Strategy = Literal["random", "bounded", "path"]
Backend = TypeVar("Backend", bound=ModelledBackend)

_SEEDED: tuple[Strategy, ...] = ("random", "bounded")
#: Schedules that one process runs at a time.
_BATCH_COUNT = 500


@dataclass(frozen=True)
class Schedule:
    """What decides a run, to the last step.

    Attributes:
        strategy: how the order is chosen.
        seed: of the order and of the case's own choices.
        path: decisions of a `path`.
    """

    strategy: Strategy
    seed: int = 0
    path: tuple[int, ...] = ()

    def __str__(self) -> str:
        return f"path:{','.join(map(str, self.path))}" if self.strategy == "path" else f"{self.strategy}:{self.seed}"

    @classmethod
    def of(cls, text: str) -> Schedule:
        """The schedule that prints like this."""
        strategy, _, rest = text.partition(":")
        match strategy:
            case "random" | "bounded":
                return cls(strategy, int(rest))
            case "path":
                return cls("path", path=tuple(int(choice) for choice in rest.split(",") if choice))
            case _:
                raise ValueError(f"no schedule is called {text!r}: try random:SEED, bounded:SEED or path:0,1,2")

    def chooser(self) -> Chooser:
        match self.strategy:
            case "random":
                return RandomChooser(self.seed)
            case "bounded":
                return BoundedChooser(self.seed)
            case "path":
                return PathChooser(self.path)


class World:
    """What a case runs in.

    Attributes:
        chooser: of the order.
        rng: for the case's own choices.
        backend: the accelerator, once it has been made.
        trace: gets a line for each step; None where nobody wants to know.
    """

    def __init__(self, chooser: Chooser, seed: int, *, checks_order: bool, trace: list[str] | None = None) -> None:
        self.rng = random.Random(seed)
        self.backend: ModelledBackend | None = None
        self.chooser = chooser
        self._checks_order = checks_order
        self.trace = trace

    def make_backend(self, kind: type[Backend] = ModelledBackend, **options: Any) -> Backend:
        backend = kind(self.chooser, checks_order=self._checks_order, trace=self.trace, **options)
        self.backend = backend
        return backend


@dataclass(frozen=True)
class Case:
    """A program on the accelerator.

    Attributes:
        run: raises where something goes wrong.
        is_small: whether it can be run in every way there is; then it makes no choices of its own.
    """

    name: str
    run: Callable[[World], None]
    is_small: bool = False


@dataclass(frozen=True)
class Finding:
    """A schedule in which a case goes wrong."""

    case_name: str
    schedule: Schedule
    message: str

    def __str__(self) -> str:
        replay = f"python -m tests.races --case {shlex.quote(self.case_name)} --replay {self.schedule}"
        return f"{self.case_name}, schedule {self.schedule}: {self.message}\n  replay: {replay}"


@dataclass
class Tally:
    """What came of some schedules of a case."""

    counts: dict[Strategy, int] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)
    seconds: float = 0.0
    is_exhausted: bool = False

    @property
    def schedule_count(self) -> int:
        return sum(self.counts.values())

    def add(self, other: Tally) -> None:
        for strategy, count in other.counts.items():
            self.counts[strategy] = self.counts.get(strategy, 0) + count
        self.findings += other.findings
        self.seconds += other.seconds
        self.is_exhausted |= other.is_exhausted


def attempt(
    case: Case,
    schedule: Schedule,
    *,
    chooser: Chooser | None = None,
    checks_order: bool = True,
    trace: list[str] | None = None,
) -> Finding | None:
    """Run a case once; gives what went wrong."""
    world = World(chooser or schedule.chooser(), schedule.seed, checks_order=checks_order, trace=trace)
    error: Exception | None = None
    try:
        case.run(world)
    except Exception as caught:  # noqa: BLE001  (whatever it is: it is what the search looks for)
        error = caught
    # The program may have taken a violation for something else, such as a failing bank, and gone on.
    if world.backend is not None and world.backend.violation is not None:
        error = world.backend.violation
    if error is None:
        return None
    message = str(error) if isinstance(error, Violation) else f"{type(error).__name__}: {error}"
    return Finding(case.name, schedule, message)


def run_seeds(case: Case, strategy: Strategy, seeds: range, *, checks_order: bool = True) -> Tally:
    """Run a case with each seed, up to the first that finds something."""
    started = time.perf_counter()
    tally = Tally({strategy: 0})
    with _no_collector():
        for seed in seeds:
            tally.counts[strategy] += 1
            if finding := attempt(case, Schedule(strategy, seed), checks_order=checks_order):
                tally.findings.append(finding)
                break
    tally.seconds = time.perf_counter() - started
    return tally


@contextmanager
def _no_collector() -> Iterator[None]:
    """Worlds are small, and collected together: the collector costs a tenth of the time otherwise."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.collect()


def run_paths(case: Case, count_max: int, *, checks_order: bool = True) -> Tally:
    """Run a case in every way there is, up to the first that finds something or to a number of them."""
    started = time.perf_counter()
    tally = Tally({"path": 0})
    path: list[int] | None = []
    while path is not None and tally.counts["path"] < count_max and not tally.findings:
        chooser = PathChooser(path)
        tally.counts["path"] += 1
        if finding := attempt(case, Schedule("path"), chooser=chooser, checks_order=checks_order):
            schedule = Schedule("path", path=tuple(chooser.taken))
            tally.findings.append(Finding(case.name, schedule, finding.message))
        path = path_after(chooser)
    tally.is_exhausted = path is None
    tally.seconds = time.perf_counter() - started
    return tally


#: A share of the work: which case by name, how, and which schedules.
Batch = tuple[str, Strategy, range]


def path_batches(cases: Sequence[Case], schedule_count: int) -> Iterator[Batch]:
    """Small cases in every way there is, as far as their share of the schedules goes."""
    for case in cases:
        if case.is_small:
            yield case.name, "path", range(schedule_count // len(cases))


def seed_batches(cases: Sequence[Case], schedule_count: int, seed: int) -> Iterator[Batch]:
    """All cases with random and bounded schedules, alike; seeds start at `seed`."""
    each, more = divmod(schedule_count, len(cases) * len(_SEEDED))
    for index, (case, strategy) in enumerate(itertools.product(cases, _SEEDED)):
        end = seed + each + (index < more)
        for start in range(seed, end, _BATCH_COUNT):
            yield case.name, strategy, range(start, min(start + _BATCH_COUNT, end))


def run_batch(case: Case, batch: Batch, *, checks_order: bool = True) -> Tally:
    _, strategy, schedules = batch
    if strategy == "path":
        return run_paths(case, len(schedules), checks_order=checks_order)
    return run_seeds(case, strategy, schedules, checks_order=checks_order)


def run_batches(
    todo: Iterable[Batch], run: Callable[[Batch], Tally], executor: Executor | None
) -> Iterator[tuple[str, Tally]]:
    """Run batches, here or in other processes; gives (case name, tally) in their order."""
    if executor is None:
        yield from ((batch[0], run(batch)) for batch in todo)
        return
    under_way = [(batch[0], executor.submit(run, batch)) for batch in todo]
    yield from ((name, future.result()) for name, future in under_way)
