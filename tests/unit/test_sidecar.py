"""The sidecar: what a tick does, and that its end, whatever ends it, is seen and costs nothing but speed."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Sequence

import pytest
import torch

from tests.property.toy_moe import ToyMoe
from tests.support.homes import PROFILE, assert_same_bits, dram, end_hands, random_bits, store
from tests.unit.test_runtime import EXPERT_COUNT, loaded, start, wide_batch
from vllm_moecxl.data.banks.base import Bank, RowCopy
from vllm_moecxl.data.banks.memory import DramBank, NumaBank
from vllm_moecxl.data.devices.cpu import CpuBackend
from vllm_moecxl.data.fetch import Fetch
from vllm_moecxl.data.mover import Mover
from vllm_moecxl.data.slabs import Cells, Home
from vllm_moecxl.runtime.counters import Counters, Metric
from vllm_moecxl.runtime.runtime import OffloadRuntime
from vllm_moecxl.runtime.sidecar import STALL_S, Sidecar
from vllm_moecxl.runtime.slots import SlotCache
from vllm_moecxl.types import Cause, PassKind

#: A thread that has not done by then what it is asked for never will.
PATIENCE_S = 20.0


class Clock:
    """Shows what the test sets."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


class Node(NumaBank):
    """A bank on a NUMA node whose pages the test sends away."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.astray_bytes = 0
        self.look_count = 0

    def verify_some(self) -> int:
        self.look_count += 1
        return self.astray_bytes


class Rig:
    """A sidecar beside a mover that carries from one bank of DRAM."""

    def __init__(self, *nodes: Node, bank: DramBank | None = None, has_hands: bool = False) -> None:
        banks: Sequence[Bank] = [bank or dram(), *nodes]
        self.backend = CpuBackend()
        self.clock, self.thread_clock = Clock(), Clock()
        self.counters = Counters([one.name for one in banks])
        self.mover = Mover(banks[:1], self.backend, self.counters, has_hands=has_hands)
        self.sidecar = Sidecar(self.mover, banks, self.backend, self.counters, self.clock, self.thread_clock)
        self.slabs = random_bits((3, 5), torch.float32)
        self.home: Home = store({"w": self.slabs.clone()}, banks=banks[:1])
        self.cells = Cells(self.home.layout, 3, self.backend)

    def value(self, metric: Metric, **labels: str) -> float:
        (value,) = (row.value for row in self.counters.rows() if row.metric is metric and row.labels == labels)
        return value

    @property
    def shows_up(self) -> bool:
        return self.value(Metric.SIDECAR_UP) == 1

    def prefetch(self, expert_id: int) -> Fetch:
        return self.mover.start(self.home, expert_id, self.cells.rows(expert_id), Cause.PREFETCH, 0.0)

    def demand(self, fetch: Fetch, expert_id: int) -> None:
        """What a forward does that needs the slab now; the bytes are right then."""
        self.mover.promote(fetch, Cause.DEMAND, 0.0)
        self.mover.wait([fetch])
        assert_same_bits(self.cells.tensors[0][expert_id], self.slabs[expert_id])

    def join(self) -> None:
        """See the sidecar's thread end."""
        self.sidecar._thread.join(PATIENCE_S)
        assert not self.sidecar._thread.is_alive()


@pytest.fixture
def make_rig() -> Iterator[Callable[..., Rig]]:
    rigs: list[Rig] = []

    def make(*nodes: Node, bank: DramBank | None = None, has_hands: bool = False) -> Rig:
        rigs.append(Rig(*nodes, bank=bank, has_hands=has_hands))
        return rigs[-1]

    yield make
    for rig in rigs:
        rig.sidecar.stop()
        end_hands(rig.mover)


class Gate:
    """Stands in for a function: tells of each call, and lets it go on once it is open."""

    def __init__(self, function: Callable[[], None]) -> None:
        self._function = function
        self._calls = threading.Semaphore(0)
        self.is_open = threading.Event()

    def __call__(self) -> None:
        self._calls.release()
        assert self.is_open.wait(PATIENCE_S)
        self._function()

    def await_call(self) -> None:
        assert self._calls.acquire(timeout=PATIENCE_S)


def test_a_tick_carries_what_nobody_waits_for(make_rig: Callable[..., Rig]) -> None:
    rig = make_rig()
    fetches = [rig.prefetch(expert_id) for expert_id in range(3)]
    rig.sidecar.tick(0.0)
    assert all(fetch.has_landed for fetch in fetches) and rig.mover.is_idle
    assert_same_bits(rig.cells.tensors[0], rig.slabs)


def test_a_tick_leaves_to_the_hands_what_would_block_it(make_rig: Callable[..., Rig]) -> None:
    readers: list[str] = []
    has_read = threading.Event()

    class Noting(DramBank):
        def read(self, copies: Sequence[RowCopy]) -> None:
            super().read(copies)
            readers.append(threading.current_thread().name)
            has_read.set()

    rig = make_rig(bank=Noting("dram", "dram", None, PROFILE), has_hands=True)
    # While somebody else has the lock no hand can be the first.
    with rig.mover._lock:
        rig.prefetch(2)
        rig.sidecar.tick(0.0)
        assert not readers
    assert has_read.wait(PATIENCE_S)
    assert readers == ["moecxl-dram-0"]


def test_a_tick_looks_at_one_bank_a_second_each_in_its_turn(make_rig: Callable[..., Rig]) -> None:
    first, second = Node("numa:0"), Node("numa:1")
    rig = make_rig(first, second)
    looks = []
    for now_s in (0.0, 0.99, 1.0, 1.5, 1.99, 2.0, 3.1, 4.0, 4.1):
        rig.sidecar.tick(now_s)
        looks.append((first.look_count, second.look_count))
    assert looks == [(0, 0), (0, 0), (1, 0), (1, 0), (1, 0), (1, 1), (2, 1), (2, 1), (2, 2)]


def test_pages_that_have_gone_astray_are_in_the_metrics(make_rig: Callable[..., Rig]) -> None:
    node = Node("numa:0")
    rig = make_rig(node)
    rig.counters.values[rig.counters.bank_up["numa:0"]] = 1
    shown = []
    for now_s, astray_bytes in ((1.0, 0), (2.0, 8192), (3.0, 4096), (4.0, 0)):
        node.astray_bytes = astray_bytes
        rig.sidecar.tick(now_s)
        shown.append(
            (rig.value(Metric.BANK_UP, bank="numa:0"), rig.value(Metric.BANK_BYTES, bank="numa:0", kind="astray"))
        )
    assert shown == [(1, 0), (0, 8192), (0, 4096), (0, 0)], "a bank that broke its promise once stays down"


def test_it_is_up_from_start_to_stop(make_rig: Callable[..., Rig], caplog: pytest.LogCaptureFixture) -> None:
    rig = make_rig()
    assert not rig.sidecar.is_up and not rig.shows_up
    rig.sidecar.start()
    assert rig.sidecar.watch() and rig.sidecar.is_up and rig.shows_up
    rig.sidecar.stop()
    rig.join()
    assert not rig.sidecar.watch() and not rig.sidecar.is_up and not rig.shows_up
    assert rig.sidecar.failure is None and not caplog.records, "an end that was asked for is no failure"


def test_its_thread_adopts_the_backend_and_ticks_by_its_clock(make_rig: Callable[..., Rig]) -> None:
    rig = make_rig()
    ticks: list[tuple[float, str]] = []
    gate = Gate(lambda: None)
    adopted: list[str] = []
    rig.backend.adopt_thread = lambda: adopted.append(threading.current_thread().name)  # type: ignore[method-assign]
    rig.sidecar.tick = lambda now_s: (ticks.append((now_s, threading.current_thread().name)), gate())  # type: ignore
    rig.clock.now_s = 7.5
    rig.sidecar.start()
    gate.await_call()
    gate.is_open.set()
    assert adopted == ["moecxl-sidecar"] and ticks[0] == (7.5, "moecxl-sidecar")


@pytest.mark.parametrize("error", [ValueError("no good"), SystemExit(), MemoryError()], ids=repr)
@pytest.mark.parametrize("where", ["tick", "adopt_thread"])
def test_whatever_ends_it_is_shown_and_said_once(
    make_rig: Callable[..., Rig], caplog: pytest.LogCaptureFixture, error: BaseException, where: str
) -> None:
    rig = make_rig()

    def fail(*_: float) -> None:
        raise error

    setattr(rig.sidecar if where == "tick" else rig.backend, where, fail)
    rig.sidecar.start()
    rig.join()
    assert rig.sidecar.failure is error and not rig.sidecar.is_up and not rig.shows_up
    for _ in range(3):
        assert not rig.sidecar.watch()
    assert [record.getMessage() for record in caplog.records] == [
        f"MoE offload: the sidecar has ended ({error!r}): serving goes on with demand fetches"
    ]
    rig.demand(rig.prefetch(0), 0)


def test_a_stall_is_seen_and_so_is_its_end(make_rig: Callable[..., Rig], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    rig = make_rig()
    gate = rig.mover.feed = Gate(rig.mover.feed)  # type: ignore[method-assign]
    rig.sidecar.start()
    gate.await_call()
    rig.clock.now_s = STALL_S - 0.001
    assert rig.sidecar.watch() and rig.shows_up
    rig.clock.now_s = STALL_S
    assert [rig.sidecar.watch() for _ in range(2)] == [False, False]
    assert not rig.sidecar.is_up and not rig.shows_up and rig.sidecar.failure is None
    rig.demand(rig.prefetch(2), 2)
    gate.is_open.set()
    gate.await_call()  # the next tick has begun, and beaten
    assert [rig.sidecar.watch() for _ in range(2)] == [True, True]
    assert rig.sidecar.is_up and rig.shows_up
    assert [record.getMessage() for record in caplog.records] == [
        "MoE offload: the sidecar has not been heard of for 5 s: serving goes on with demand fetches",
        "MoE offload: the sidecar is back",
    ]


def test_a_dead_hand_takes_the_sidecars_health_with_it(
    make_rig: Callable[..., Rig], caplog: pytest.LogCaptureFixture
) -> None:
    dying: list[threading.Thread] = []
    has_died = threading.Event()
    forward = threading.current_thread()

    class Deadly(DramBank):
        def read(self, copies: Sequence[RowCopy]) -> None:
            if threading.current_thread() is not forward:
                dying.append(threading.current_thread())
                has_died.set()
                raise SystemExit
            super().read(copies)

    rig = make_rig(bank=Deadly("dram", "dram", None, PROFILE), has_hands=True)
    rig.sidecar.start()
    fetch = rig.prefetch(0)
    assert has_died.wait(PATIENCE_S)
    dying[0].join(PATIENCE_S)
    assert isinstance(rig.mover.failure, SystemExit)
    assert not rig.sidecar.watch() and not rig.sidecar.is_up and not rig.shows_up
    assert [record.getMessage() for record in caplog.records] == [
        "MoE offload: a thread that reads bank dram has ended (SystemExit())"
    ]
    rig.demand(fetch, 0)


def test_its_processor_time_is_counted(make_rig: Callable[..., Rig]) -> None:
    rig = make_rig()
    reads = threading.Semaphore(0)

    def thread_clock() -> float:
        reads.release()
        return 1.5

    rig.sidecar._thread_clock = thread_clock
    rig.sidecar.start()
    for _ in range(2):  # what was read the first time is written by the second
        assert reads.acquire(timeout=PATIENCE_S)
    assert rig.value(Metric.SIDECAR_CPU_SECONDS) == 1.5


@pytest.fixture
def looked_ahead(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """Experts of passes that were begun while the pass before was computed."""
    calls: list[list[int]] = []
    look_ahead = SlotCache.look_ahead

    def noting(self: SlotCache, expert_ids: object, *rest: object) -> None:
        calls.append(list(expert_ids))  # type: ignore[call-overload]
        look_ahead(self, expert_ids, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(SlotCache, "look_ahead", noting)
    return calls


def two_layers(kind: PassKind, **options: object) -> tuple[OffloadRuntime, list[ToyMoe]]:
    runtime = start(EXPERT_COUNT, EXPERT_COUNT, **options)
    toys = [ToyMoe(EXPERT_COUNT, seed) for seed in (1, 2)]
    for index, toy in enumerate(toys):
        runtime.install(loaded(toy, index, kind=kind))
    return runtime, toys


def forward(runtime: OffloadRuntime, toys: Sequence[ToyMoe]) -> None:
    for toy, dispatch in zip(toys, runtime.dispatches.values(), strict=True):
        assert torch.equal(dispatch(*wide_batch()), toy.direct(*wide_batch()))


def prefetched_count(runtime: OffloadRuntime) -> float:
    """Slabs that the next layer's buffer was given ahead, and that it then needed."""
    return sum(
        row.value
        for row in runtime.counters.rows()
        if row.metric is Metric.PREFETCH and row.labels["outcome"] in ("useful", "late")
    )


@pytest.mark.parametrize("end", ["running", "dead", "never started"])
@pytest.mark.parametrize("kind", [PassKind.TOKEN, PassKind.LAYER_BUFFER], ids=lambda kind: kind.value)
def test_a_forward_looks_ahead_only_while_the_sidecar_is_up(
    kind: PassKind, end: str, looked_ahead: list[list[int]]
) -> None:
    layer_buffer = kind is PassKind.LAYER_BUFFER
    runtime, toys = two_layers(kind, sidecar=end != "never started", layer_buffer=layer_buffer)
    sidecar = runtime._sidecar
    looked_ahead.clear()
    try:
        if end == "dead":
            sidecar._mover.feed = Gate(lambda: 1 / 0)  # type: ignore[assignment]
            sidecar._mover.feed.is_open.set()  # type: ignore[attr-defined]
            sidecar._thread.join(PATIENCE_S)
        runtime.watch()
        assert sidecar.is_up is (end == "running")
        forward(runtime, toys)
        looks_ahead = bool(prefetched_count(runtime)) if layer_buffer else bool(looked_ahead)
        assert looks_ahead is (end == "running")
    finally:
        sidecar.stop()
        end_hands(runtime._mover)
