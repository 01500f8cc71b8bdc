"""Threads of which one runs at a time, and a chooser says which: so that a schedule of theirs can be replayed.

A `Crew` takes the place of the module `threading` in the code under test. Its members change over where that code locks
or waits, and wherever else `pause` is called.
"""

from __future__ import annotations

import random
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any, ClassVar

from vllm_moecxl.data.devices.modelled import Chooser

#: Actors beside the accelerator's streams, of which there are fewer.
_FIRST_ID = 1000


class Stuck(AssertionError):
    """Everybody waits for somebody else."""


class Ended(BaseException):
    """Unwinds a member when the schedule is over."""


class _Member:
    """Who may run; `turn` is free for who does."""

    __slots__ = ("is_done", "member_id", "name", "turn", "waits_for")

    def __init__(self, member_id: int, name: str) -> None:
        self.member_id = member_id
        self.name = name
        self.turn = threading.Lock()
        self.turn.acquire()
        self.waits_for: object | None = None
        self.is_done = False


class Crew:
    """See the module.

    Args:
        chooser: decides who runs.
        rng: decides at which pauses there is a choice.
        rate: of the pauses, the share at which there is one.
        trace: gets a line for each change of the thread.

    Attributes:
        error: what ended a member, if something has.
    """

    def __init__(self, chooser: Chooser, rng: random.Random, rate: float, trace: list[str] | None = None) -> None:
        self.error: BaseException | None = None
        self._chooser = chooser
        self._random = rng.random
        self._rate = rate
        self._trace = trace
        self._main = _Member(_FIRST_ID, "main")
        self._members = [self._main]
        self._current = self._main
        self._is_over = False

    # What `threading` has.

    def Lock(self) -> BatonLock:
        return BatonLock(self, is_reentrant=False)

    def RLock(self) -> BatonLock:
        return BatonLock(self, is_reentrant=True)

    def Condition(self, lock: BatonLock | None = None) -> BatonCondition:
        return BatonCondition(self, lock or self.RLock())

    def Thread(
        self, target: Callable[..., None], args: Sequence[Any] = (), name: str = "", daemon: bool = True
    ) -> BatonThread:
        return BatonThread(self, lambda: target(*args), name)

    # What a harness calls.

    @contextmanager
    def replacing(self, *modules: ModuleType) -> Iterator[None]:
        """Be `threading` to some modules, and end all members at the end."""
        for module in modules:
            module.threading = self  # type: ignore[attr-defined]
        try:
            yield
        finally:
            self._end()
            for module in modules:
                module.threading = threading  # type: ignore[attr-defined]

    def __str__(self) -> str:
        return "all others to end"

    def pause(self) -> None:
        """Somebody else may go on here."""
        if len(self._members) > 1 and self._random() < self._rate:
            self.give_way()

    def give_way(self) -> None:
        """Let the chooser say who goes on, perhaps the one who calls."""
        self._go_on()

    def wait_for(self, what: object) -> None:
        """Let others run until one of them wakes who waits for this."""
        self._current.waits_for = what
        self._go_on()

    def wake(self, what: object, count: int | None = None) -> None:
        """Let `count` of those who wait for this go on when it is their turn; all of them if not said."""
        for member in self._members:
            if member.waits_for is what and count != 0:
                member.waits_for = None
                count = count if count is None else count - 1

    def join(self) -> None:
        """Wait until all others are done."""
        while not all(member.is_done or member is self._main for member in self._members):
            self.wait_for(self)

    def _go_on(self) -> None:
        me = self._current
        if not self._is_over and self._pick() is not me:
            self._current.turn.release()
            me.turn.acquire()
        if self.error is not None:
            self._is_over = True
        if self._is_over:
            me.waits_for = None
            raise Ended

    def _pick(self) -> _Member:
        """Say who goes on; the main thread where something went wrong."""
        ready = [member for member in self._members if member.waits_for is None and not member.is_done]
        if not ready and self.error is None:
            waiting = ", ".join(f"{one.name} for {one.waits_for}" for one in self._members if not one.is_done)
            self.error = Stuck(f"everybody waits: {waiting}")
        if self.error is not None:
            self._current = self._main
        elif len(ready) == 1:
            self._current = ready[0]
        else:
            self._current = ready[self._chooser.choose([member.member_id for member in ready])]
        if self._trace is not None:
            self._trace.append(f"thread: {self._current.name}")
        return self._current

    def _start(self, run: Callable[[], None], name: str) -> None:
        member = _Member(_FIRST_ID + len(self._members), name)
        self._members.append(member)

        def work() -> None:
            try:
                if not self._is_over:
                    run()
            except Ended:
                pass
            except BaseException as error:  # noqa: BLE001  (the main thread gets it)
                self.error = self.error or error
            member.is_done = True
            self.wake(self)

        def leave() -> None:
            if self._is_over:
                self._current = self._main
            else:
                self._pick()
            self._current.turn.release()

        _Runner.idle().take(member.turn, work, leave)

    def _end(self) -> None:
        """Unwind who is not done."""
        self._is_over = True
        for member in self._members:
            while not member.is_done and member is not self._main:
                self._current = member
                member.turn.release()
                self._main.turn.acquire()

    @property
    def is_over(self) -> bool:
        return self._is_over

    @property
    def current_name(self) -> str:
        """Name of the thread that runs."""
        return self._current.name


class _Runner(threading.Thread):
    """A thread for one member after the other: to start one for each schedule would cost more than the schedule."""

    _idle: ClassVar[deque[_Runner]] = deque()

    def __init__(self) -> None:
        super().__init__(name="crew", daemon=True)
        self._job = threading.Lock()
        self._job.acquire()
        self._task: tuple[Any, Callable[[], None], Callable[[], None]]

    @classmethod
    def idle(cls) -> _Runner:
        if cls._idle:
            return cls._idle.popleft()
        runner = cls()
        runner.start()
        return runner

    def take(self, turn: Any, work: Callable[[], None], leave: Callable[[], None]) -> None:
        """Work once it is its turn; then be idle, and leave."""
        self._task = turn, work, leave
        self._job.release()

    def run(self) -> None:
        while True:
            self._job.acquire()
            turn, work, leave = self._task
            turn.acquire()
            work()
            self._idle.append(self)
            leave()


class BatonThread:
    """See `threading.Thread`, as far as it is needed."""

    def __init__(self, crew: Crew, run: Callable[[], None], name: str) -> None:
        self._crew = crew
        self._run = run
        self._name = name

    def start(self) -> None:
        self._crew._start(self._run, self._name)


class BatonLock:
    """See `threading.Lock` and `threading.RLock`, as far as they are needed."""

    def __init__(self, crew: Crew, *, is_reentrant: bool) -> None:
        self._crew = crew
        self._is_reentrant = is_reentrant
        self._owner: _Member | None = None
        self._count = 0

    def acquire(self) -> bool:
        crew = self._crew
        crew.pause()
        me = crew._current
        if self._owner is me:
            assert self._is_reentrant or crew.is_over, "a lock is taken twice by the same thread"
        while self._owner is not None and self._owner is not me and not crew.is_over:
            crew.wait_for(self)
        self._owner = me
        self._count += 1
        return True

    def release(self) -> None:
        crew = self._crew
        assert (self._owner is crew._current and self._count) or crew.is_over, "a lock is given up that is not held"
        self._count -= 1
        if not self._count:
            self._owner = None
            crew.wake(self)

    __enter__ = acquire

    def __exit__(self, *_: object) -> None:
        self.release()

    def __str__(self) -> str:
        return f"a lock of {self._owner.name if self._owner else 'nobody'}"


class BatonCondition:
    """See `threading.Condition`. Nobody waits in vain for a timeout: to depend on one counts as being stuck."""

    def __init__(self, crew: Crew, lock: BatonLock) -> None:
        self._crew = crew
        self._lock = lock
        self.acquire, self.release = lock.acquire, lock.release

    def wait(self, timeout: float | None = None) -> bool:
        del timeout
        lock = self._lock
        count, lock._count = lock._count, 1
        lock.release()
        self._crew.wait_for(self)
        lock.acquire()
        lock._count = count
        return True

    def wait_for(self, predicate: Callable[[], bool], timeout: float | None = None) -> bool:
        while not predicate():
            self.wait(timeout)
        return True

    def notify(self, n: int = 1) -> None:
        self._crew.wake(self, n)

    def notify_all(self) -> None:
        self._crew.wake(self)

    def __enter__(self) -> bool:
        return self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    def __str__(self) -> str:
        return "a condition"
