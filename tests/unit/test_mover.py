"""The mover: slabs come whole and unchanged from wherever they lie, carried by hands or by whoever waits, also when a
bank fails, stalls or is given up.
"""

from __future__ import annotations

import itertools
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import pytest
import torch

from tests.support.homes import (
    PROFILE,
    WHOLE,
    assert_same_bits,
    banks_of,
    bits,
    dram,
    end_hands,
    hands,
    random_bits,
    store,
)
from tests.support.slabfiles import Contents, pack
from tests.unit.test_slabs import EXPERT_COUNT, FILE_ROUTES, ROUTES, banks_of_three, ragged_layer
from vllm_moecxl.config import Verify
from vllm_moecxl.control import chunking
from vllm_moecxl.control.placement import Part, Route
from vllm_moecxl.data import carrier
from vllm_moecxl.data import mover as movers
from vllm_moecxl.data.banks.base import Bank, BankProfile, RowCopy
from vllm_moecxl.data.banks.file import FileBank
from vllm_moecxl.data.banks.memory import DramBank
from vllm_moecxl.data.devices.base import Event, Stream
from vllm_moecxl.data.devices.cpu import CpuBackend
from vllm_moecxl.data.fetch import Fetch
from vllm_moecxl.data.mover import Mover
from vllm_moecxl.data.slabs import Cells, Home, HomeBuilder, Piece, SlabTarget
from vllm_moecxl.errors import IntegrityError, TransferError
from vllm_moecxl.types import Cause
from vllm_moecxl.units import KIB

#: Longer than anything here takes, and short enough to see a test that waits for ever fail.
TIMEOUT_S = 20
CHUNK_BYTES = 8 * KIB


def make_chunks_small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks that the slabs of these tests have many of, and a ring that has fewer cells than that."""
    monkeypatch.setattr(chunking, "CHUNK_BYTES_MIN", CHUNK_BYTES)
    monkeypatch.setattr(chunking, "CHUNK_BYTES_MAX", CHUNK_BYTES)
    monkeypatch.setattr(FileBank, "chunk_bytes", CHUNK_BYTES)
    monkeypatch.setattr(carrier, "_STAGING_CELL_COUNT", 2)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    make_chunks_small(monkeypatch)


class Told:
    """An observer that remembers what it is told, and says so to whoever waits."""

    def __init__(self) -> None:
        self.moved_bytes: Counter[tuple[str, Cause]] = Counter()
        self.causes: list[Cause] = []
        self.durations: list[float] = []
        self.busy: list[tuple[str, float]] = []
        self.failures: list[str] = []
        self.on_failure: Callable[[], None] = lambda: None
        self._told = threading.Condition()

    def moved(self, bank_name: str, byte_count: int, cause: Cause) -> None:
        with self._told:
            self.moved_bytes[bank_name, cause] += byte_count
            self._told.notify_all()

    def was_busy(self, bank_name: str, duration_s: float) -> None:
        self.busy.append((bank_name, duration_s))

    def landed(self, cause: Cause, duration_s: float) -> None:
        with self._told:
            self.causes.append(cause)
            self.durations.append(duration_s)
            self._told.notify_all()

    def failed(self, bank_name: str) -> None:
        self.failures.append(bank_name)
        self.on_failure()

    def of(self, bank_name: str) -> int:
        """Bytes that a bank has given."""
        return sum(count for (name, _), count in self.moved_bytes.items() if name == bank_name)

    @property
    def total_bytes(self) -> int:
        return self.moved_bytes.total()

    def wait_for(self, condition: Callable[[], bool]) -> None:
        """Wait until something that it is told makes `condition` true."""
        with self._told:
            assert self._told.wait_for(condition, TIMEOUT_S)


class Setup:
    """A home, cells for all its experts, and a mover between them."""

    def __init__(
        self,
        home: Home,
        *,
        has_hands: bool = False,
        backend: CpuBackend | None = None,
        banks: Sequence[Bank] | None = None,
        clock: Callable[[], float] | None = None,
    ) -> None:
        self.home = home
        self.backend = backend or CpuBackend()
        self.told = Told()
        self.cells = Cells(home.layout, home.expert_count, self.backend)
        self.banks = banks_of(home) if banks is None else banks
        options = {} if clock is None else {"clock": clock}
        self.mover = Mover(self.banks, self.backend, self.told, has_hands=has_hands, **options)

    def start(self, expert_id: int, cause: Cause = Cause.DEMAND, deadline: float = 0.0, **options: object) -> Fetch:
        target = self.cells.rows(expert_id)
        return self.mover.start(self.home, expert_id, target, cause, deadline, **options)  # type: ignore[arg-type]

    def check(self, originals: dict[str, torch.Tensor], expert_ids: Sequence[int]) -> None:
        """These experts are in their cells, and nothing is in the others."""
        for cell, original in zip(self.cells.tensors, originals.values(), strict=True):
            for expert_id in range(self.home.expert_count):
                if expert_id in expert_ids:
                    assert_same_bits(cell[expert_id], original[expert_id])
                else:
                    assert not bits(cell[expert_id]).any()


@pytest.fixture
def setup() -> Iterator[Callable[..., Setup]]:
    """Makes setups whose hands end with the test."""
    made: list[Setup] = []

    def make(home: Home, **options: object) -> Setup:
        made.append(Setup(home, **options))  # type: ignore[arg-type]
        return made[-1]

    yield make
    for one in made:
        end_hands(one.mover)


MakeSetup = Callable[..., Setup]


class Gated(DramBank):
    """A bank whose reads say that they have begun, wait at a gate, and may fail.

    Attributes:
        gate: closed until a test opens it, unless the bank is made open.
        gated_count: how many reads, from the first on, wait at it; None for all.
    """

    def __init__(self, name: str, error: Exception | None = None, *, gated_count: int | None = None) -> None:
        super().__init__(name, name, None, PROFILE)
        self.error = error
        self.began, self.gate = threading.Event(), threading.Event()
        self.read_count = self.ended_count = 0
        self.gated_count = gated_count

    def read(self, copies: Sequence[RowCopy]) -> None:
        self.read_count += 1
        self.began.set()
        if self.gated_count is None or self.read_count <= self.gated_count:
            assert self.gate.wait(TIMEOUT_S), "nobody opens the gate"
        if self.error is not None:
            self.ended_count += 1
            raise self.error
        super().read(copies)
        self.ended_count += 1


def open_bank(name: str, error: Exception | None = None) -> Gated:
    return Gated(name, error, gated_count=0)


def adopt(folder: Path, originals: dict[str, torch.Tensor], routes: Sequence[Route], verify: Verify) -> Home:
    """A home in two banks of memory and a slab file."""
    file = FileBank(pack(folder / "model.slabs", {"layer": Contents(originals)}), "file", PROFILE)
    return HomeBuilder([dram("a"), dram("b"), file], verify).adopt(file.slabs.layers["layer"], file, routes)


# -- what arrives


@pytest.mark.parametrize("verify", ["off", "load", "fetch"])
@pytest.mark.parametrize("has_hands", [False, True])
@pytest.mark.parametrize("routes", ROUTES.values(), ids=ROUTES)
def test_slabs_arrive_from_any_route(setup: MakeSetup, routes: list[Route], verify: Verify, *, has_hands: bool) -> None:
    check_arrival(setup, routes, verify, has_hands=has_hands)


def check_arrival(
    setup: MakeSetup, routes: list[Route] = ROUTES["of every kind"], verify: Verify = "off", *, has_hands: bool = False
) -> None:
    originals = ragged_layer()
    one = setup(store(dict(originals), routes, banks_of_three(), verify), has_hands=has_hands)
    for expert_ids in ([5, 2], [0], range(EXPERT_COUNT)):
        one.mover.wait([one.start(expert_id) for expert_id in expert_ids])
        one.check(originals, {5, 2} if len(expert_ids) == 2 else {5, 2, 0, *expert_ids})
    assert one.told.total_bytes == (3 + EXPERT_COUNT) * one.home.slab_bytes
    assert one.told.causes == [Cause.DEMAND] * (3 + EXPERT_COUNT)
    assert one.mover.is_idle


@pytest.mark.parametrize("verify", ["off", "load", "fetch"])
@pytest.mark.parametrize("has_hands", [False, True])
@pytest.mark.parametrize("routes", FILE_ROUTES.values(), ids=FILE_ROUTES)
def test_slabs_arrive_from_a_file_and_from_memory_beside_it(
    setup: MakeSetup, tmp_path: Path, routes: list[Route], verify: Verify, *, has_hands: bool
) -> None:
    check_arrival_from_a_file(setup, tmp_path, routes, verify, has_hands=has_hands)


def check_arrival_from_a_file(
    setup: MakeSetup,
    tmp_path: Path,
    routes: list[Route] = FILE_ROUTES["file alone"],
    verify: Verify = "off",
    *,
    has_hands: bool = False,
) -> None:
    originals = ragged_layer()
    one = setup(adopt(tmp_path, originals, routes, verify), has_hands=has_hands)
    one.mover.wait([one.start(expert_id) for expert_id in range(EXPERT_COUNT)])
    one.check(originals, range(EXPERT_COUNT))
    assert one.told.total_bytes == EXPERT_COUNT * one.home.slab_bytes


def test_what_is_waited_for_together_may_be_nothing(setup: MakeSetup) -> None:
    one = setup(store(ragged_layer()))
    one.mover.wait([])
    one.mover.cancel([])
    assert one.mover.is_idle


def test_chunks_are_no_larger_than_a_bank_wants_them_and_cover_a_slab_once() -> None:
    for routes in ROUTES.values():
        home = store(ragged_layer(), routes, banks_of_three())
        for expert_id in range(EXPERT_COUNT):
            covered = [torch.zeros(extent.row_bytes, dtype=torch.int32) for extent in home.layout.extents]
            for piece in home.pieces(expert_id):
                assert 0 < piece.byte_count == sum(stop - start for _, start, stop in piece.spans) <= CHUNK_BYTES
                for extent_id, start, stop in piece.spans:
                    covered[extent_id][start:stop] += 1
            assert all(bool((row == 1).all()) for row in covered)


@pytest.mark.parametrize(("verify", "expected"), [("off", [0, 0]), ("load", [1, 1]), ("fetch", [1, 2])])
@pytest.mark.parametrize("is_host", [True, False])
def test_digests_are_looked_at_when_the_option_says(
    setup: MakeSetup, tmp_path: Path, verify: Verify, expected: list[int], *, is_host: bool
) -> None:
    originals = ragged_layer()
    home = adopt(tmp_path, originals, FILE_ROUTES["file alone"], verify)
    one = setup(home, backend=None if is_host else Deferred())
    checked: list[int] = []
    check = home.check

    def counting(expert_id: int, slab: SlabTarget) -> None:
        checked.append(expert_id)
        check(expert_id, slab)

    home.check = counting  # type: ignore[method-assign]
    for expected_count in expected:
        one.mover.wait([one.start(3)])
        assert checked == [3] * expected_count


@pytest.mark.parametrize("is_host", [True, False])
@pytest.mark.parametrize("has_hands", [False, True])
def test_a_byte_that_has_changed_is_an_error_of_the_one_who_waits(
    setup: MakeSetup, *, is_host: bool, has_hands: bool
) -> None:
    originals = ragged_layer()
    home = store(dict(originals), ROUTES["striped over three"], banks_of_three(), "fetch")
    one = setup(home, has_hands=has_hands, backend=None if is_host else Deferred())
    home.shards[1].rows[-2].as_bytes[2, 0] ^= 1  # type: ignore[union-attr]
    fetches = [one.start(expert_id) for expert_id in (1, 2)]
    with pytest.raises(IntegrityError, match="expert 2 of layer is not what was stored"):
        one.mover.wait(fetches)
    one.mover.cancel(fetches)
    assert set(one.told.failures) == {"a", "b", "c"} and one.mover.is_idle, "any of them may be to blame"
    one.mover.wait([one.start(1)])


# -- errors, and giving up


def fail_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every read end in an error, with the slab half written."""

    def failing(self: Home, piece: Piece, source: int, targets: Sequence[torch.Tensor]) -> None:
        targets[0].fill_(0xFF)
        raise TransferError("gone")

    monkeypatch.setattr(Home, "read_piece", failing)


@pytest.mark.parametrize("place", [0, 1, 2])
def test_an_error_of_one_bank_is_told_at_once_and_giving_up_waits_for_the_copies_of_the_others(
    setup: MakeSetup, monkeypatch: pytest.MonkeyPatch, place: int
) -> None:
    check_giving_up(setup, monkeypatch, place)


def check_giving_up(setup: MakeSetup, monkeypatch: pytest.MonkeyPatch, place: int = 1) -> None:
    monkeypatch.setattr(chunking, "CHUNK_BYTES_MAX", 1 << 20)  # one chunk a bank: nothing is left for whoever waits
    monkeypatch.setattr(chunking, "CHUNK_BYTES_MIN", 1 << 20)
    error = TransferError("gone")
    bad = Gated("bad", error)
    slow = [Gated("b"), Gated("c")]
    banks = [*slow[:place], bad, *slow[place:]]
    one = setup(store(ragged_layer(), ROUTES["striped over three"], banks), has_hands=True)
    fetches = [one.start(4)]
    try:
        assert all(bank.began.wait(TIMEOUT_S) for bank in banks)
        bad.gate.set()
        with pytest.raises(TransferError) as caught:
            one.mover.wait(fetches)
        assert caught.value is error and one.told.failures == ["bad"]
        assert [bank.ended_count for bank in slow] == [0, 0], "nobody has to wait for the others to hear of it"
        wait = one.mover._changed.wait

        def open_gates(timeout_s: float | None = None) -> bool:
            for bank in slow:
                bank.gate.set()
            return wait(timeout_s)

        monkeypatch.setattr(one.mover._changed, "wait", open_gates)
        one.mover.cancel(fetches)
        assert [bank.ended_count for bank in slow] == [1, 1], "something still writes to the cells"
        assert one.mover.is_idle and one.told.causes == []
    finally:
        for bank in banks:
            bank.gate.set()


@pytest.mark.parametrize("has_hands", [False, True])
def test_an_error_in_the_middle_of_a_slab_ends_it_and_leaves_the_bank_usable(
    setup: MakeSetup, *, has_hands: bool
) -> None:
    bank = open_bank("dram")
    originals = ragged_layer()
    one = setup(store(dict(originals), banks=[bank]), has_hands=has_hands)
    bank.error = TransferError("gone")
    fetch = one.start(1)
    with pytest.raises(TransferError):
        one.mover.wait([fetch])
    one.mover.cancel([fetch])
    assert one.told.failures and one.mover.is_idle and fetch.error is bank.error
    bank.error = None
    one.mover.wait([one.start(1)])
    one.check(originals, [1])


def test_a_fetch_that_failed_before_anybody_waited_tells_whoever_joins_it(setup: MakeSetup) -> None:
    check_joining_a_failure(setup)


def check_joining_a_failure(setup: MakeSetup) -> None:
    for layer in (ragged_layer(), {"w": random_bits((2, 100), torch.uint8)}):  # of several chunks, and of one
        bank = open_bank("dram", TransferError("gone"))
        one = setup(store(layer, banks=[bank]))
        fetch = one.start(0, Cause.PREFETCH)
        one.mover.feed()
        assert bank.read_count == 1, "half a slab is of no use"
        assert not one.mover.promote(fetch, Cause.DEMAND, 0.0) and fetch.is_over
        with pytest.raises(TransferError, match="gone"):
            one.mover.wait([fetch])


def test_what_is_given_up_before_it_began_is_never_read(setup: MakeSetup) -> None:
    bank = open_bank("dram")
    one = setup(store(ragged_layer(), banks=[bank]))
    fetches = [one.start(expert_id, Cause.PREFETCH) for expert_id in (0, 1)]
    one.mover.cancel(fetches)
    while not one.mover.is_idle:
        one.mover.feed()
    assert bank.read_count == 0 and one.told.causes == [] and not any(fetch.has_landed for fetch in fetches)


def test_giving_up_waits_for_the_look_at_a_digest_which_reads_the_cell(
    setup: MakeSetup, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_giving_up_while_looking(setup, monkeypatch)


def check_giving_up_while_looking(setup: MakeSetup, monkeypatch: pytest.MonkeyPatch) -> None:
    originals = ragged_layer()
    one = setup(store(dict(originals), verify="fetch"), has_hands=True)
    looking, gate = threading.Event(), threading.Event()
    check = one.home.check

    def gated(expert_id: int, slab: SlabTarget) -> None:
        looking.set()
        assert gate.wait(TIMEOUT_S)
        check(expert_id, slab)

    one.home.check = gated  # type: ignore[method-assign]
    fetch = one.start(2, Cause.PREFETCH)
    try:
        assert looking.wait(TIMEOUT_S)
        wait = one.mover._changed.wait
        monkeypatch.setattr(one.mover._changed, "wait", lambda timeout_s=None: (gate.set(), wait(timeout_s)))
        one.mover.cancel([fetch])
        for row in one.cells.rows(2):
            row.fill_(0)  # the cell is somebody else's now
    finally:
        gate.set()
    end_hands(one.mover)
    assert one.told.failures == [] and fetch.error is None, "another slab's bytes were held against this one's digest"


# -- what is more urgent


def test_a_joined_prefetch_is_carried_at_once_and_once(setup: MakeSetup) -> None:
    originals = ragged_layer()
    one = setup(store(dict(originals)))
    early, late = one.start(0, Cause.PREFETCH, deadline=1.0), one.start(1, Cause.PREFETCH, deadline=2.0)
    one.mover.promote(late, Cause.DEMAND, 0.0)
    one.mover.wait([late])
    one.check(originals, [1])
    assert one.told.moved_bytes == {("dram", Cause.DEMAND): one.home.slab_bytes}, "a waiter carries no prefetch"
    while not early.has_landed:
        one.mover.feed()
    one.check(originals, [0, 1])
    assert one.told.causes == [Cause.DEMAND, Cause.PREFETCH] and one.told.total_bytes == 2 * one.home.slab_bytes


def test_the_earliest_deadline_goes_first(setup: MakeSetup) -> None:
    one = setup(store(ragged_layer()))
    for expert_id, deadline in enumerate((5.0, 1.0, 3.0)):
        one.start(expert_id, Cause.PREFETCH, deadline)
    order = []
    for _ in range(3):
        before = len(one.told.causes)
        while len(one.told.causes) == before:
            one.mover.feed()
        order.append([bool(bits(cell).any()) for cell in one.cells.tensors[-1]][:3])
    assert order[0] == [False, True, False] and order[1] == [False, True, True]


def test_what_only_a_request_that_is_gone_wanted_is_given_up(setup: MakeSetup) -> None:
    originals = ragged_layer()
    one = setup(store(dict(originals)))
    alone = one.start(0, Cause.PREFETCH, wanters=["gone"])
    shared = one.start(1, Cause.PREFETCH, wanters=["gone", "stays"])
    awaited = one.start(2, Cause.DEMAND, wanters=["gone"])
    assert one.mover.forget("gone") == [alone] and one.mover.forget("gone") == []
    while not one.mover.is_idle:
        one.mover.feed()
    one.check(originals, [1, 2])
    assert (alone.has_landed, shared.has_landed, awaited.has_landed) == (False, True, True)


# -- who carries


def test_without_hands_no_thread_is_started_and_whoever_waits_carries_everything(setup: MakeSetup) -> None:
    one = setup(store(ragged_layer(), ROUTES["striped over three"], banks_of_three()))
    before = threading.active_count()
    readers = read_by(one.home)
    one.mover.wait([one.start(0)])
    assert threading.active_count() == before and readers == {threading.current_thread()}


def test_feeding_carries_a_few_chunks_at_a_time(setup: MakeSetup) -> None:
    bank = open_bank("dram")
    one = setup(store(ragged_layer(), banks=[bank]))
    one.start(0, Cause.PREFETCH)
    for feed_count in (1, 2):
        one.mover.feed()
        assert bank.read_count == feed_count * movers._FEED_COUNT


def read_by(home: Home) -> set[threading.Thread]:
    """The threads that read pieces of a home from now on."""
    readers: set[threading.Thread] = set()
    read = home.read_piece

    def noting(piece: Piece, source: int, targets: Sequence[torch.Tensor]) -> None:
        readers.add(threading.current_thread())
        read(piece, source, targets)

    home.read_piece = noting  # type: ignore[method-assign]
    return readers


@pytest.mark.parametrize("cause", Cause)
def test_hands_carry_what_nobody_waits_for(setup: MakeSetup, cause: Cause) -> None:
    originals = ragged_layer()
    one = setup(store(dict(originals), ROUTES["striped over two"], banks_of_three()), has_hands=True)
    readers = read_by(one.home)
    one.start(4, cause)
    one.told.wait_for(lambda: one.told.causes == [cause])
    one.check(originals, [4])
    assert {thread.name for thread in readers} == {"moecxl-a-0", "moecxl-b-0"}
    assert {thread.name for thread in hands(one.mover)} == {"moecxl-a-0", "moecxl-b-0"}, "no bank has idle hands"


def test_two_banks_are_read_at_the_same_time(setup: MakeSetup) -> None:
    """Each bank's first read waits until the other has begun: one after the other never would."""
    banks = [Gated("a", gated_count=1), Gated("b", gated_count=1)]
    for bank, other in itertools.permutations(banks):
        bank.gate = other.began
    originals = ragged_layer()
    one = setup(store(dict(originals), ROUTES["striped over two"], banks), has_hands=True)
    one.mover.wait([one.start(0)])
    one.check(originals, [0])


def test_a_bank_with_several_readers_is_read_by_all_of_them_at_the_same_time(setup: MakeSetup) -> None:
    meeting = threading.Barrier(3, timeout=TIMEOUT_S)
    bank = open_bank("dram")
    bank.reader_count = 3
    originals = ragged_layer()
    one = setup(store(dict(originals), banks=[bank]), has_hands=True)
    read, met = bank.read, threading.local()

    def meet_first(copies: Sequence[RowCopy]) -> None:
        if not hasattr(met, "it"):
            met.it = True
            meeting.wait()
        read(copies)

    bank.read = meet_first  # type: ignore[method-assign]
    one.start(0, Cause.PREFETCH)
    one.told.wait_for(lambda: one.told.causes == [Cause.PREFETCH])
    one.check(originals, [0])


def end_a_hand(monkeypatch: pytest.MonkeyPatch, when: Callable[[], bool]) -> list[threading.Thread]:
    """Raise in hands that read while `when` says so, as the interpreter does to a thread that is to end; who did."""
    read = Home.read_piece
    ended: list[threading.Thread] = []

    def ending(self: Home, piece: Piece, source: int, targets: Sequence[torch.Tensor]) -> None:
        if threading.current_thread().name.startswith("moecxl-") and when():
            targets[0].fill_(0xFF)
            ended.append(threading.current_thread())
            raise SystemExit
        read(self, piece, source, targets)

    monkeypatch.setattr(Home, "read_piece", ending)
    return ended


def test_a_hand_that_is_ended_gives_its_chunk_back_and_whoever_waits_carries_on(
    setup: MakeSetup, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_an_ended_hand(setup, monkeypatch)


def check_an_ended_hand(setup: MakeSetup, monkeypatch: pytest.MonkeyPatch) -> None:
    originals = {"w": random_bits((6, 100), torch.uint8)}  # one chunk
    one = setup(store(dict(originals)), has_hands=True)
    end_a_hand(monkeypatch, lambda: True)
    fetch = one.start(3, Cause.PREFETCH)
    for thread in hands(one.mover):
        thread.join(TIMEOUT_S)
    assert isinstance(one.mover.failure, SystemExit) and not one.mover.is_idle
    one.mover.promote(fetch, Cause.DEMAND, 0.0)
    one.mover.wait([fetch])
    one.check(originals, [3])
    assert one.told.failures == [] and one.told.total_bytes == one.home.slab_bytes and one.mover.is_idle
    one.mover.wait([one.start(5)])
    one.check(originals, [3, 5])


def test_the_other_hands_of_a_bank_take_over_from_one_that_is_ended(
    setup: MakeSetup, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_taking_over(setup, monkeypatch)


def check_taking_over(setup: MakeSetup, monkeypatch: pytest.MonkeyPatch) -> None:
    bank = Gated("dram", gated_count=1)
    bank.reader_count = 2
    originals = {"w": random_bits((2, 100), torch.uint8)}  # one chunk
    one = setup(store(dict(originals), banks=[bank]), has_hands=True)
    ended = end_a_hand(monkeypatch, lambda: bank.read_count == 0 and not bank.began.set() and bank.gate.wait(TIMEOUT_S))
    one.start(0, Cause.PREFETCH)
    assert bank.began.wait(TIMEOUT_S)
    bank.read_count = 1  # the second read passes, in the other hand, which is idle after it
    one.start(1, Cause.PREFETCH)
    one.told.wait_for(lambda: len(one.told.causes) == 1)
    one.mover.poll()
    bank.gate.set()
    one.told.wait_for(lambda: len(one.told.causes) == 2)
    one.check(originals, [0, 1])
    ended[0].join(TIMEOUT_S)
    assert isinstance(one.mover.failure, SystemExit) and len(hands(one.mover)) == len(ended) == 1


def test_a_thread_that_is_ended_while_it_looks_at_a_digest_leaves_that_to_whoever_waits(setup: MakeSetup) -> None:
    check_an_ended_look(setup)


def check_an_ended_look(setup: MakeSetup) -> None:
    originals = ragged_layer()
    one = setup(store(dict(originals), verify="fetch"), has_hands=True)
    check = one.home.check

    def ending(expert_id: int, slab: SlabTarget) -> None:
        if threading.current_thread() is not threading.main_thread():
            raise SystemExit
        check(expert_id, slab)

    one.home.check = ending  # type: ignore[method-assign]
    fetch = one.start(1, Cause.PREFETCH)
    for thread in hands(one.mover):
        thread.join(TIMEOUT_S)
    assert not fetch.is_checking
    one.mover.promote(fetch, Cause.DEMAND, 0.0)
    one.mover.wait([fetch])
    assert fetch.has_landed and one.told.causes == [Cause.PREFETCH]


def test_a_hand_that_cannot_begin_is_told_of(setup: MakeSetup) -> None:
    check_a_hand_that_cannot_begin(setup)


def check_a_hand_that_cannot_begin(setup: MakeSetup) -> None:
    class Forbidding(CpuBackend):
        def adopt_thread(self) -> None:
            raise PermissionError("no affinity here")

    originals = ragged_layer()
    one = setup(store(dict(originals)), has_hands=True, backend=Forbidding())
    fetch = one.start(0)
    for thread in hands(one.mover):
        thread.join(TIMEOUT_S)
    assert isinstance(one.mover.failure, PermissionError)
    one.mover.wait([fetch])
    one.check(originals, [0])


def test_closing_ends_the_hands_once_what_is_in_flight_has_arrived(
    setup: MakeSetup, monkeypatch: pytest.MonkeyPatch
) -> None:
    bank = Gated("dram")
    one = setup(store({"w": random_bits((2, 100), torch.uint8)}, banks=[bank]), has_hands=True)
    fetch = one.start(0)
    assert bank.began.wait(TIMEOUT_S)
    (hand,) = hands(one.mover)
    wait = one.mover._changed.wait
    monkeypatch.setattr(one.mover._changed, "wait", lambda timeout_s=None: (bank.gate.set(), wait(timeout_s)))
    one.mover.close()
    assert fetch.has_landed
    hand.join(TIMEOUT_S)
    assert not hand.is_alive() and one.mover.failure is None


def test_closing_does_not_wait_for_ever_for_a_bank_that_does_not_answer(
    setup: MakeSetup, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(movers, "_CLOSE_S", 0.01)
    bank = Gated("dram")
    one = setup(store({"w": random_bits((2, 100), torch.uint8)}, banks=[bank]), has_hands=True)
    fetch = one.start(0)
    assert bank.began.wait(TIMEOUT_S)
    one.mover.close()
    assert not fetch.has_landed and len(hands(one.mover)) == 1
    bank.gate.set()


# -- slow banks


class Clock:
    """Seconds that a test sets."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def beside_a_file(tmp_path: Path, originals: dict[str, torch.Tensor], memory: DramBank) -> Home:
    """A home in `memory` alone, of which a slow file has a copy."""
    profile = BankProfile(1e-4, 1e9, "published")
    file = FileBank(pack(tmp_path / "model.slabs", {"layer": Contents(originals)}), "file", profile)
    return HomeBuilder([memory, file], "off").adopt(file.slabs.layers["layer"], file, [WHOLE] * EXPERT_COUNT)


def test_a_replica_is_read_when_the_home_does_not_answer(setup: MakeSetup, tmp_path: Path) -> None:
    check_replica(setup, tmp_path)


def check_replica(setup: MakeSetup, tmp_path: Path) -> None:
    originals, memory, clock = ragged_layer(), Gated("memory", gated_count=1), Clock()
    home = beside_a_file(tmp_path, originals, memory)
    one = setup(home, has_hands=True, clock=clock)
    first_bytes = home.pieces(0)[0].byte_count
    fetches = [one.start(0)]
    try:
        assert memory.began.wait(TIMEOUT_S)
        clock.now_s = 5.0
        fetches.append(one.start(1))
        # The second goes to the file at once, and what the first has queued at the memory is stolen.
        one.told.wait_for(lambda: one.told.of("file:model.slabs") == 2 * home.slab_bytes - first_bytes)
        assert fetches[1].has_landed and not fetches[0].has_landed and memory.read_count == 1
    finally:
        memory.gate.set()
    one.mover.wait(fetches)
    one.check(originals, [0, 1])
    assert one.told.of("memory") == first_bytes


def test_a_replica_takes_over_also_when_nothing_new_is_asked_for(setup: MakeSetup, tmp_path: Path) -> None:
    check_taking_over_at_a_tick(setup, tmp_path)


def check_taking_over_at_a_tick(setup: MakeSetup, tmp_path: Path) -> None:
    originals, memory, clock = ragged_layer(), Gated("memory", gated_count=1), Clock()
    home = beside_a_file(tmp_path, originals, memory)
    one = setup(home, has_hands=True, clock=clock)
    file = one.banks[1]
    assert isinstance(file, FileBank)
    file.reader_count = 1
    # Something from the file alone: when that has arrived its hand is idle.
    packed = file.slabs.layers["layer"]
    in_file = HomeBuilder(one.banks, "off").adopt(packed, file, [(Part(1, 1.0),)] * EXPERT_COUNT)
    one.mover.start(in_file, 5, one.cells.rows(5), Cause.PREFETCH, 0.0)
    one.told.wait_for(lambda: one.told.causes == [Cause.PREFETCH])
    one.mover.poll()
    fetch = one.start(0, Cause.PREFETCH)
    try:
        assert memory.began.wait(TIMEOUT_S)
        one.mover.feed()
        one.mover.poll()
        assert one.told.of(file.name) == home.slab_bytes, "nothing is stolen from a bank that is on time"
        clock.now_s = 5.0
        one.mover.feed()  # as the sidecar does
        left_bytes = home.slab_bytes - home.pieces(0)[0].byte_count
        one.told.wait_for(lambda: one.told.of(file.name) == home.slab_bytes + left_bytes)
    finally:
        memory.gate.set()
    one.told.wait_for(lambda: fetch.has_landed)
    one.check(originals, [0, 5])


def test_a_bank_on_time_is_read_although_there_is_a_replica(setup: MakeSetup, tmp_path: Path) -> None:
    originals = ragged_layer()
    one = setup(beside_a_file(tmp_path, originals, dram("memory")), clock=Clock())
    one.mover.wait([one.start(0)])
    one.check(originals, [0])
    assert one.told.of("memory") == one.home.slab_bytes


def test_a_bank_that_does_not_answer_is_told_of_once(
    setup: MakeSetup, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    check_slow_bank(setup, monkeypatch)
    assert caplog.text.count("bank stuck has not answered a read for") == 1


def check_slow_bank(setup: MakeSetup, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(movers, "_SLOW_S", 0.001)
    bank = Gated("stuck")
    one = setup(store({"w": random_bits((2, 100), torch.uint8)}, banks=[bank]), has_hands=True)
    fetch = one.start(0)
    assert bank.began.wait(TIMEOUT_S)
    looks = itertools.count()
    report = one.mover._report_slow_links

    def third_time() -> None:
        report()
        if next(looks) >= 3:
            bank.gate.set()

    monkeypatch.setattr(one.mover, "_report_slow_links", third_time)
    one.mover.wait([fetch])
    assert one.told.failures == ["stuck"]


def test_time_on_the_links_is_counted_from_the_first_chunk_to_the_last(setup: MakeSetup) -> None:
    clock = Clock()
    banks = [open_bank("a"), open_bank("b")]
    for bank, duration_s in zip(banks, (2.0, 3.0), strict=True):
        read = bank.read

        def slow(copies: Sequence[RowCopy], read: Callable[..., None] = read, duration_s: float = duration_s) -> None:
            clock.now_s += duration_s
            read(copies)

        bank.read = slow  # type: ignore[method-assign]
    home = store({"w": random_bits((2, 100), torch.uint8)}, [WHOLE, (Part(1, 1.0),)], banks)
    one = setup(home, clock=clock)
    one.mover.wait([one.start(0)])
    clock.now_s = 100.0
    one.mover.wait([one.start(1)])
    assert one.told.busy == [("a", 2.0), ("b", 3.0)] and one.told.durations == [2.0, 3.0]


# -- a device whose copies are done later


class _Queue(Stream):
    """Work that is done when somebody waits for it, in order."""

    def __init__(self) -> None:
        self.work: list[Callable[[], None]] = []
        self.done_count = 0


class _Point(Event):
    """A place in a queue."""

    def __init__(self, queue: _Queue) -> None:
        self.queue = queue
        self.count = len(queue.work)


class Deferred(CpuBackend):
    """A device that does nothing until somebody waits for it: what is not waited for is not there.

    It copies only from memory that was staged or registered, and looks whether that is still what it was.
    """

    is_host = False

    def __init__(self) -> None:
        super().__init__()
        self.queues: dict[int, _Queue] = {}
        self.sources: list[torch.Tensor] = []
        self.staged: list[torch.Tensor] = []
        self.is_staging = True
        self._lock = threading.RLock()

    def compute_stream(self) -> Stream:
        return self.copy_stream(-1)

    def copy_stream(self, link_id: int) -> Stream:
        with self._lock:
            return self.queues.setdefault(link_id, _Queue())

    def stage(self, byte_count: int) -> torch.Tensor:
        self.staged.append(super().stage(byte_count))
        return self.staged[-1]

    def is_staged(self, source: torch.Tensor) -> bool:
        starts = {cell.data_ptr() for cell in self.staged}
        return any(start <= source.data_ptr() < start + CHUNK_BYTES for start in starts)

    def copy(self, source: torch.Tensor, target: torch.Tensor, stream: Stream) -> None:
        assert isinstance(stream, _Queue) and source.nbytes == target.nbytes
        before = source.clone()

        def later() -> None:
            assert torch.equal(source, before), "host memory has changed before the device copied from it"
            target.copy_(source)

        with self._lock:
            self.sources.append(source)
            stream.work.append(later)

    def record(self, stream: Stream) -> Event:
        assert isinstance(stream, _Queue)
        with self._lock:
            return _Point(stream)

    def wait(self, stream: Stream, event: Event) -> None:
        assert isinstance(stream, _Queue)
        with self._lock:
            stream.work.append(partial(self.synchronize, event))

    def query(self, event: Event) -> bool:
        assert isinstance(event, _Point)
        return event.queue.done_count >= event.count

    def synchronize(self, event: Event) -> None:
        assert isinstance(event, _Point)
        with self._lock:
            while event.queue.done_count < event.count:
                event.queue.work[event.queue.done_count]()
                event.queue.done_count += 1

    def finish_all(self) -> None:
        """Do everything that was queued."""
        for queue in list(self.queues.values()):
            self.synchronize(self.record(queue))

    def finish_kernels(self) -> None:
        """Do what was launched on the compute stream, and what that waits for, and nothing else."""
        self.synchronize(self.record(self.compute_stream()))


def device(setup: MakeSetup, home: Home, registered: Sequence[str] = (), **options: object) -> tuple[Setup, Deferred]:
    backend = Deferred()
    one = setup(home, backend=backend, **options)
    for name in registered:
        one.mover.mark_registered(name)
    return one, backend


@pytest.mark.parametrize("verify", ["off", "load", "fetch"])
@pytest.mark.parametrize("has_hands", [False, True])
@pytest.mark.parametrize("registered", [(), ("a", "b", "c"), ("b",)], ids=str)
@pytest.mark.parametrize("routes", ROUTES.values(), ids=ROUTES)
def test_a_device_is_given_slabs_by_the_ring_or_from_registered_memory(
    setup: MakeSetup, routes: list[Route], registered: tuple[str, ...], verify: Verify, *, has_hands: bool
) -> None:
    check_device(setup, routes, registered, verify, has_hands=has_hands)


def check_device(
    setup: MakeSetup,
    routes: list[Route] = ROUTES["striped over three"],
    registered: tuple[str, ...] = ("b",),
    verify: Verify = "off",
    *,
    has_hands: bool = False,
) -> None:
    originals = ragged_layer()
    home = store(dict(originals), routes, banks_of_three(), verify)
    names = [name for name in registered if name in home.bytes_by_bank(range(EXPERT_COUNT))]
    one, backend = device(setup, home, names, has_hands=has_hands)
    one.mover.wait([one.start(expert_id) for expert_id in (5, 2)])
    backend.finish_kernels()
    one.check(originals, [5, 2])
    one.mover.wait([one.start(expert_id) for expert_id in (2, 0)])
    backend.finish_kernels()
    one.check(originals, [5, 2, 0])
    by_bank = home.bytes_by_bank([5, 2, 2, 0])
    # What is held against its digest is read by the host.
    registered_bytes = 0 if verify == "fetch" else sum(by_bank[name] for name in names)
    staged_bytes = sum(source.nbytes for source in backend.sources if backend.is_staged(source))
    assert staged_bytes == by_bank.total() - registered_bytes
    assert sum(source.nbytes for source in backend.sources) == by_bank.total()
    backend.finish_all()
    assert one.mover.is_idle
    assert one.told.total_bytes == 4 * home.slab_bytes and one.told.causes == [Cause.DEMAND] * 4


@pytest.mark.parametrize("has_hands", [False, True])
@pytest.mark.parametrize("routes", FILE_ROUTES.values(), ids=FILE_ROUTES)
@pytest.mark.parametrize("verify", ["off", "load", "fetch"])
def test_a_device_is_given_slabs_of_a_file_too(
    setup: MakeSetup, tmp_path: Path, routes: list[Route], verify: Verify, *, has_hands: bool
) -> None:
    originals = ragged_layer()
    one, backend = device(setup, adopt(tmp_path, originals, routes, verify), has_hands=has_hands)
    for _ in range(2):  # verified on the way, and once that is done
        one.mover.wait([one.start(expert_id) for expert_id in range(EXPERT_COUNT)])
        backend.finish_kernels()
        one.check(originals, range(EXPERT_COUNT))
        for tensor in one.cells.tensors:
            bits(tensor).zero_()


def test_a_slab_that_is_verified_while_another_copy_of_it_is_asked_for_comes_whole_twice(
    setup: MakeSetup, tmp_path: Path
) -> None:
    check_asked_for_twice(setup, tmp_path)


def check_asked_for_twice(setup: MakeSetup, tmp_path: Path) -> None:
    """As for a slot and for a layer buffer: the second was planned to be verified, and no longer has to be."""
    originals = ragged_layer()
    one, backend = device(setup, adopt(tmp_path, originals, FILE_ROUTES["file alone"], "load"))
    buffer = Cells(one.home.layout, EXPERT_COUNT, backend)
    fetches = [one.start(1), one.mover.start(one.home, 1, buffer.rows(1), Cause.DEMAND, 0.0)]
    one.mover.wait(fetches)
    backend.finish_kernels()
    for cells in (one.cells, buffer):
        for cell, original in zip(cells.tensors, originals.values(), strict=True):
            assert_same_bits(cell[1], original[1])


def test_copies_into_a_cell_wait_for_the_kernel_that_still_reads_it(setup: MakeSetup) -> None:
    check_after(setup)


def check_after(setup: MakeSetup, verify: Verify = "off") -> None:
    originals = ragged_layer()
    home = store(dict(originals), ROUTES["striped over two"], banks_of_three(), verify)
    for registered in ((), ("a", "b")):
        one, backend = device(setup, home, registered)
        old = random_bits(one.cells.rows(1)[-2].shape, torch.uint8, 9)
        one.cells.rows(1)[-2].copy_(old)
        compute, seen = backend.compute_stream(), []
        compute.work.append(lambda seen=seen, one=one: seen.append(one.cells.rows(1)[-2].clone()))
        fetch = one.start(1, after=backend.record(compute))
        one.mover.wait([fetch])
        for stream in (backend.copy_stream(0), backend.copy_stream(1)):
            backend.synchronize(backend.record(stream))
        backend.finish_kernels()
        assert torch.equal(seen[0], old), "a cell was written while a kernel read it"
        one.check(originals, [1])


def test_a_slab_that_is_verified_waits_for_that_kernel_as_well(setup: MakeSetup) -> None:
    check_after(setup, "fetch")


def test_a_kernel_waits_for_the_last_copy_whoever_noted_it_first(setup: MakeSetup) -> None:
    check_late_note(setup)


def check_late_note(setup: MakeSetup) -> None:
    """Two threads copy on one stream, and the one that was first is slow to say so."""

    class Slow(Deferred):
        def __init__(self) -> None:
            super().__init__()
            self.is_first, self.noted, self.gate = True, threading.Event(), threading.Event()

        def record(self, stream: Stream) -> Event:
            event = super().record(stream)
            if self.is_first:
                self.is_first = False
                self.noted.set()
                assert self.gate.wait(TIMEOUT_S)
            return event

    backend = Slow()
    originals = {"w": random_bits((2, 2 * CHUNK_BYTES), torch.uint8)}
    one = setup(store(dict(originals)), backend=backend)
    one.mover.mark_registered("dram")
    fetch = one.start(1)
    helper = threading.Thread(target=one.mover.wait, args=([fetch],))
    helper.start()
    assert backend.noted.wait(TIMEOUT_S)
    one.mover.feed()  # the second half, as the sidecar would
    backend.gate.set()
    helper.join(TIMEOUT_S)
    backend.finish_kernels()
    one.check(originals, [1])


def test_reads_that_fail_use_up_no_staging(setup: MakeSetup) -> None:
    check_failing_reads(setup)


def check_failing_reads(setup: MakeSetup) -> None:
    originals = ragged_layer()
    bank = open_bank("dram", TransferError("gone"))
    one, backend = device(setup, store(dict(originals), banks=[bank]))
    ended = threading.Event()

    def wait() -> None:
        for _ in range(2 * carrier._STAGING_CELL_COUNT):
            fetch = one.start(0)
            with pytest.raises(TransferError):
                one.mover.wait([fetch])
            one.mover.cancel([fetch])
        bank.error = None
        one.mover.wait([one.start(0)])
        ended.set()

    threading.Thread(target=wait, daemon=True).start()
    assert ended.wait(TIMEOUT_S), "a cell of the ring was not given back"
    backend.finish_kernels()
    one.check(originals, [0])


def test_the_link_to_a_device_is_never_fuller_than_it_has_to_be(setup: MakeSetup) -> None:
    one, backend = device(setup, store(ragged_layer()), ["dram"])
    limit_bytes = 2 * CHUNK_BYTES  # for the one reader of memory, and for whoever helps
    for _ in range(3):
        one.start(0, Cause.PREFETCH)
    while not one.mover.is_idle:
        one.mover.feed()
        assert 0 < sum(source.nbytes for source in backend.sources) - one.told.total_bytes <= limit_bytes
        backend.finish_all()
    assert one.told.causes == [Cause.PREFETCH] * 3


def test_what_a_device_has_not_finished_is_not_given_up_before_it_has(setup: MakeSetup) -> None:
    originals = ragged_layer()
    one, backend = device(setup, store(dict(originals)), ["dram"])
    fetch = one.start(0, Cause.PREFETCH)
    one.mover.feed()
    issued_count = len(backend.sources)
    one.mover.cancel([fetch])
    queue = backend.copy_stream(0)
    assert issued_count and isinstance(queue, _Queue) and queue.done_count == len(queue.work) == issued_count
    assert len(backend.sources) == issued_count and one.mover.is_idle and not fetch.has_landed


def test_closing_waits_for_the_device_which_reads_the_banks(setup: MakeSetup) -> None:
    one, backend = device(setup, store(ragged_layer()), ["dram"])
    one.start(0, Cause.PREFETCH)
    one.mover.feed()
    one.mover.close()
    queue = backend.copy_stream(0)
    assert isinstance(queue, _Queue) and queue.done_count == len(queue.work) > 0
