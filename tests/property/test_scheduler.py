"""Properties of the transfer scheduler, against an oracle that looks through a plain list of chunks."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol, TypeVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_moecxl.control import scheduler as module
from vllm_moecxl.control.links import RATE_RECOVERY_S, RATE_WINDOWS, LinkLimits
from vllm_moecxl.control.scheduler import STALE_ENTRIES_MAX, Chunk, Scheduler, Transfer
from vllm_moecxl.types import Cause

T = TypeVar("T")

#: Bounds and rates at which chunks of a few bytes and steps of a few seconds matter to each other.
LIMITS = [LinkLimits(*figures) for figures in itertools.product((0.0, 0.5), (1.0, 10.0), (3, 5, 9))]
DEADLINES = (1.0, 2.0, math.inf)
WANTERS = [wanters for count in range(4) for wanters in itertools.combinations("abc", count)]


class Choose(Protocol):
    """Hypothesis, or a seeded generator where thousands of runs are wanted rather than the smallest one."""

    def __call__(self, options: Sequence[T]) -> T: ...


class Piece:
    """A chunk as the oracle sees it."""

    def __init__(self, move: Move, index: int, size: int, link_ids: tuple[int, ...], serial: int) -> None:
        self.move = move
        self.index = index
        self.size = size
        self.link_ids = link_ids
        self.serial = serial
        self.link_id = link_ids[0]
        self.tag = 0
        self.state = "queued"
        self.chunk: Chunk | None = None

    def key(self) -> tuple[Cause, float, int, int]:
        return self.move.cause, self.move.deadline, self.tag, self.serial


class Move:
    """A transfer as the oracle sees it: the real one's payload."""

    def __init__(self, cause: Cause, deadline: float, wanters: Iterable[str]) -> None:
        self.cause = cause
        self.deadline = deadline
        self.wanters = set(wanters)
        self.pieces: list[Piece] = []
        self.is_cancelled = False
        self.transfer: Transfer

    def of(self, state: str) -> list[Piece]:
        return [piece for piece in self.pieces if piece.state == state]

    def is_done(self) -> bool:
        return len(self.of("done")) == len(self.pieces)

    def is_over(self) -> bool:
        return self.is_cancelled or self.is_done()


class Accounts:
    """One class of one link: who has paid for how much, and how far it has come."""

    def __init__(self) -> None:
        self.clock = 0
        self.paid: dict[str, int] = {}

    def enter(self, wanters: set[str], size: int) -> int:
        payer = min(sorted(wanters) or [""], key=lambda wanter: self.paid.get(wanter, 0))
        tag = max(self.clock, self.paid.get(payer, 0))
        self.paid[payer] = tag + size
        return tag


class Pace:
    """Seconds that a byte takes on one link."""

    def __init__(self, limits: LinkLimits) -> None:
        self.profiled = self.measured = 1 / limits.bytes_per_s
        self.window = RATE_WINDOWS * limits.in_flight_bytes_max
        self.since_s = 0.0  # when it became busy or idle, or saw a chunk complete

    def now(self, now_s: float, in_flight: int) -> float:
        if in_flight:
            return max(self.measured, (now_s - self.since_s) / in_flight)
        forgotten = 1 - 2 ** (-(now_s - self.since_s) / RATE_RECOVERY_S)
        return self.measured + (self.profiled - self.measured) * forgotten

    def complete(self, size: int, now_s: float) -> None:
        weight = size / (size + self.window)
        self.measured += weight * ((now_s - self.since_s) / size - self.measured)
        self.since_s = now_s


class Run:
    """A scheduler in use: every call is answered by the oracle first, and then the two agree about all there is to see.

    Args:
        choose: decides what happens.
    """

    def __init__(self, choose: Choose) -> None:
        self.choose = choose
        self.link_ids = range(choose((1, 2, 2, 3)))
        self.limits = [choose(LIMITS) for _ in self.link_ids]
        self.scheduler = Scheduler(self.limits)
        self.now_s = 0.0
        self.serial = 0
        self.moves: list[Move] = []
        self.pieces: list[Piece] = []
        self.accounts = {(link_id, cause): Accounts() for link_id in self.link_ids for cause in Cause}
        self.paces = [Pace(limits) for limits in self.limits]

    def go(self, step_count: int) -> None:
        """Some steps, and then what is left: nothing may be lost."""
        steps = (
            *[self.submit, self.next, self.next_of_all, self.complete, self.complete_all] * 2,
            *(self.promote, self.give_back, self.end_again, self.cancel, self.forget, self.time_passes),
        )
        for _ in range(step_count):
            self.choose(steps)()
            self.check()
        self.complete_all()
        for link_id in [*self.link_ids] * 2:
            while piece := self.take(link_id, Cause.MIGRATION):
                self.end(piece)
        self.check()
        assert all(piece.state in ("done", "cancelled") for piece in self.pieces)

    # -- the oracle's view

    def queued(self, link_id: int, causes: Iterable[int]) -> list[Piece]:
        return [p for p in self.pieces if p.state == "queued" and p.link_id == link_id and p.move.cause in causes]

    def in_flight(self, link_id: int) -> list[Piece]:
        return [p for p in self.pieces if p.state == "in flight" and p.link_id == link_id]

    def completion_s(self, link_id: int, ahead: list[Piece], size: int, really_queued: list[Piece]) -> float:
        """When `size` bytes are complete behind `ahead`, in the real scheduler's numbers: so ties are ties here too."""
        difference = bytes_of(ahead) - bytes_of(really_queued)
        return self.scheduler.predicted_completion_s(link_id, size + difference, self.now_s, Cause.MIGRATION)

    def assign(self, move: Move, pieces: list[Piece]) -> None:
        """Find links and tags of pieces that are about to be queued together."""
        really_queued = [self.queued(link_id, Cause) for link_id in self.link_ids]
        ahead = [[p for p in self.queued(at, range(move.cause + 1)) if p not in pieces] for at in self.link_ids]
        for piece in pieces:
            piece.link_id = min(
                piece.link_ids, key=lambda at: self.completion_s(at, ahead[at], piece.size, really_queued[at])
            )
            ahead[piece.link_id].append(piece)
        for link_id in self.link_ids:
            if packet := [piece for piece in pieces if piece.link_id == link_id]:
                tag = self.accounts[link_id, move.cause].enter(move.wanters, bytes_of(packet))
                for piece in packet:
                    piece.tag = tag

    def best(self, link_id: int, cause_max: Cause) -> Piece | None:
        """What a link has to be given: the best of its own, else the best that it would have before its owner."""
        if own := self.queued(link_id, range(cause_max + 1)):
            return min(own, key=Piece.key)
        heads: dict[tuple[int, tuple[int, ...]], Piece] = {}
        for piece in sorted((p for p in self.pieces if p.state == "queued"), key=Piece.key):
            heads.setdefault((piece.link_id, piece.link_ids), piece)
        for (owner_id, link_ids), piece in heads.items():
            if link_id not in link_ids or piece.move.cause > cause_max:
                continue
            here_s = self.completion_s(link_id, [], piece.size, self.queued(link_id, range(cause_max + 1, 3)))
            ahead = self.queued(owner_id, range(piece.move.cause))
            if here_s < self.completion_s(owner_id, ahead, piece.size, self.queued(owner_id, Cause)):
                return piece
        return None

    def piece_of(self, chunk: Chunk) -> Piece:
        move = chunk.transfer.payload
        assert isinstance(move, Move)
        return move.pieces[chunk.index]

    # -- what happens

    def submit(self) -> None:
        move = Move(self.choose(tuple(Cause)), self.choose(DEADLINES), self.choose(WANTERS))
        placements = [p for count in self.link_ids for p in itertools.permutations(self.link_ids, count + 1)]
        chunks = [(self.choose((1, 2, 3, 4)), self.choose(placements)) for _ in range(self.choose((1, 2, 4)))]
        for index, (size, link_ids) in enumerate(chunks):
            move.pieces.append(Piece(move, index, size, link_ids, self.serial))
            self.serial += 1
        self.assign(move, move.pieces)
        self.pieces += move.pieces
        self.moves.append(move)
        move.transfer = self.scheduler.submit(chunks, move.cause, move.deadline, move.wanters, move, self.now_s)
        assert move.transfer.payload is move

    def promote(self) -> None:
        moves = [move for move in self.moves if not move.is_cancelled]
        if not moves:
            return
        move, cause, deadline = self.choose(moves), self.choose(tuple(Cause)), self.choose(DEADLINES)
        wanters = self.choose(WANTERS)
        if not move.is_done():
            move.wanters |= set(wanters)
            if cause < move.cause:
                move.cause = cause
                self.assign(move, move.of("queued"))
            move.deadline = min(deadline, move.deadline)
        self.scheduler.promote(move.transfer, cause, deadline, self.now_s, wanters)

    def next(self) -> None:
        self.take(self.choose(self.link_ids), self.choose(tuple(Cause)))

    def next_of_all(self) -> None:
        for link_id in self.link_ids:
            self.take(link_id, Cause.MIGRATION)

    def take(self, link_id: int, cause_max: Cause) -> Piece | None:
        piece = self.best(link_id, cause_max)
        in_flight = self.in_flight(link_id)
        is_idle = not in_flight
        if piece and not is_idle and bytes_of(in_flight) + piece.size > self.limits[link_id].in_flight_bytes_max:
            piece = None
        chunk = self.scheduler.next(link_id, self.now_s, cause_max)
        if piece is None:
            assert chunk is None
            return None
        assert chunk is not None and self.piece_of(chunk) is piece and chunk.link_id == link_id
        assert (chunk.byte_count, chunk.link_ids) == (piece.size, piece.link_ids)
        accounts = self.accounts[link_id, piece.move.cause]
        if piece.link_id != link_id:
            piece.link_id = link_id
            piece.tag = accounts.enter(piece.move.wanters, piece.size)
        accounts.clock = max(accounts.clock, piece.tag)
        pace = self.paces[link_id]
        if is_idle:
            pace.measured, pace.since_s = pace.now(self.now_s, 0), self.now_s
        piece.state, piece.chunk = "in flight", chunk
        return piece

    def complete(self) -> None:
        if in_flight := [piece for piece in self.pieces if piece.state == "in flight"]:
            self.end(self.choose(in_flight))

    def complete_all(self) -> None:
        for piece in self.pieces:
            if piece.state == "in flight":
                self.end(piece)

    def end(self, piece: Piece) -> None:
        move = piece.move
        piece.state = "done"
        self.paces[piece.link_id].complete(piece.size, self.now_s)
        assert piece.chunk is not None
        is_last = self.scheduler.complete(piece.chunk, self.now_s)
        assert is_last == (not move.of("in flight") and not move.of("queued"))

    def give_back(self) -> None:
        in_flight = [piece for piece in self.pieces if piece.state == "in flight"]
        if not in_flight:
            return
        piece = self.choose(in_flight)
        piece.state = "cancelled" if piece.move.is_cancelled else "queued"
        piece.tag = 0
        if not self.in_flight(piece.link_id):
            self.paces[piece.link_id].since_s = self.now_s
        assert piece.chunk is not None
        self.scheduler.give_back(piece.chunk, self.now_s)

    def end_again(self) -> None:
        if ended := [piece.chunk for piece in self.pieces if piece.state != "in flight" and piece.chunk]:
            end = self.choose((self.scheduler.give_back, self.scheduler.complete))
            with pytest.raises(AssertionError, match="ended before"):
                end(self.choose(ended), self.now_s)

    def cancel(self) -> None:
        if self.moves:
            move = self.choose(self.moves)
            self.withdraw(move)
            self.scheduler.cancel(move.transfer)

    def withdraw(self, move: Move) -> None:
        move.is_cancelled |= not move.is_done()
        for piece in move.of("queued"):
            piece.state = "cancelled"

    def forget(self) -> None:
        wanter = self.choose("abc")
        for account in self.accounts.values():
            account.paid.pop(wanter, None)
        withdrawn = []
        for move in self.moves:
            if wanter in move.wanters and not move.is_over():
                move.wanters.remove(wanter)
                if not move.wanters and move.cause != Cause.DEMAND:
                    self.withdraw(move)
                    withdrawn.append(move.transfer)
        forgotten = self.scheduler.forget(wanter)
        assert len(forgotten) == len(withdrawn) and set(forgotten) == set(withdrawn)

    def time_passes(self) -> None:
        self.now_s += self.choose((0.1, 0.5, 2.0, 30.0))

    # -- what always holds

    def check(self) -> None:
        self.check_bytes_in_flight()
        self.check_transfers()
        self.check_predictions()
        self.check_that_nothing_is_kept()

    def check_bytes_in_flight(self) -> None:
        for link_id in self.link_ids:
            in_flight = self.in_flight(link_id)
            assert self.scheduler.in_flight_bytes(link_id) == bytes_of(in_flight)
            assert len(in_flight) <= 1 or bytes_of(in_flight) <= self.limits[link_id].in_flight_bytes_max

    def check_transfers(self) -> None:
        for move in self.moves:
            transfer = move.transfer
            assert (transfer.is_done, transfer.is_cancelled) == (move.is_done(), move.is_cancelled)
            assert transfer.in_flight_count == len(move.of("in flight"))
            if not move.is_over():
                assert (transfer.cause, transfer.deadline) == (move.cause, move.deadline)
                assert transfer.wanters == move.wanters
                for piece, chunk in zip(move.pieces, transfer._chunks, strict=True):
                    if piece.state == "queued":
                        assert (chunk.link_id, chunk._tag) == (piece.link_id, piece.tag)

    def check_predictions(self) -> None:
        for link_id, (limits, pace) in enumerate(zip(self.limits, self.paces, strict=True)):
            in_flight = bytes_of(self.in_flight(link_id))
            seconds_per_byte = pace.now(self.now_s, in_flight)
            assert self.scheduler.bytes_per_s(link_id, self.now_s) == pytest.approx(1 / seconds_per_byte)
            for cause in Cause:
                is_queued = any(self.queued(link_id, range(cause + 1)) for link_id in self.link_ids)
                assert self.scheduler.has_work(cause) == is_queued
                ahead = in_flight + bytes_of(self.queued(link_id, range(cause + 1)))
                expected = self.now_s + limits.latency_s + (ahead + 1) * seconds_per_byte
                assert self.scheduler.predicted_completion_s(link_id, 1, self.now_s, cause) == pytest.approx(expected)

    def check_that_nothing_is_kept(self) -> None:
        wanted = {w: {m.transfer for m in self.moves if w in m.wanters and not m.is_over()} for w in "abc"}
        assert {w: set(transfers) for w, transfers in self.scheduler._wanted.items()} == {
            wanter: transfers for wanter, transfers in wanted.items() if transfers
        }
        for link_id, link in enumerate(self.scheduler._links):
            for cause in Cause:
                accounts = self.accounts[link_id, cause]
                assert {w: paid for w, paid in link.fairness[cause].paid_bytes.items() if w} == {
                    wanter: paid for wanter, paid in accounts.paid.items() if wanter
                }
            for queue in link.queues.values():
                stale_count = sum(entry[-1]._entry is not entry for entry in queue._entries)
                assert queue._stale_count == stale_count


def bytes_of(pieces: Iterable[Piece]) -> int:
    return sum(piece.size for piece in pieces)


def check_run(choose: Choose, step_count: int) -> None:
    """A run with heaps that are swept early, so that its few chunks are enough for that."""
    with pytest.MonkeyPatch.context() as patches:
        patches.setattr(module, "STALE_ENTRIES_MAX", 1)
        Run(choose).go(step_count)


def check_seeds(seeds: Iterable[int]) -> None:
    for seed in seeds:
        check_run(random.Random(seed).choice, 60)


@settings(max_examples=25)
@given(st.data())
def test_the_scheduler_does_what_the_oracle_says(data: st.DataObject) -> None:
    check_run(lambda options: data.draw(st.sampled_from(options)), 30)


def test_the_scheduler_does_what_the_oracle_says_in_many_runs() -> None:
    check_seeds(range(100))


class CountedDeadline(float):
    """A deadline that counts how often the order of two chunks came down to it."""

    comparison_count = 0

    def __lt__(self, other: float) -> bool:
        CountedDeadline.comparison_count += 1
        return float(self) < float(other)

    __hash__ = float.__hash__


def drive(chunk_count: int) -> dict[str, int]:
    """Work on two replicated banks with much queued; returns what it took, and what was left in the heaps at most."""
    CountedDeadline.comparison_count = 0
    counts = dict.fromkeys(("pushes", "pops", "swept", "entries_max"), 0)

    def count(name: str, function: Callable[..., Any], weight: Callable[..., int]) -> Callable[..., Any]:
        def counted(*arguments: Any) -> Any:
            counts[name] += weight(*arguments)
            return function(*arguments)

        return counted

    with pytest.MonkeyPatch.context() as patches:
        for name, function in (("pushes", "heappush"), ("pops", "heappop")):
            patches.setattr(module, function, count(name, getattr(module, function), lambda *_: 1))
        patches.setattr(module, "heapify", count("swept", module.heapify, len))
        scheduler = Scheduler([LinkLimits(0.0, 1.0, 100)] * 2)
        order = random.Random(0)
        transfers = []
        for index in range(chunk_count // 4):
            link_ids = order.choice([(0,), (1,), (0, 1), (1, 0)])
            deadline = CountedDeadline(order.randrange(1000))
            transfers.append(
                scheduler.submit([(1, link_ids)] * 4, Cause.PREFETCH, deadline, [str(index % 7)], None, 0.0)
            )
        for transfer in transfers[::3]:
            scheduler.promote(transfer, Cause.PREFETCH, CountedDeadline(-1.0), 0.0)
            scheduler.promote(transfer, Cause.DEMAND, CountedDeadline(order.randrange(1000)), 0.0)
        for transfer in transfers[::4]:
            scheduler.cancel(transfer)
        counts["entries_max"] = sum(len(q._entries) for link in scheduler._links for q in link.queues.values())
        given = 0
        while scheduler.has_work():
            for link_id in (0, 1):
                if chunk := scheduler.next(link_id, 0.0):
                    scheduler.complete(chunk, 0.0)
                    given += 1
        assert given == 4 * (len(transfers) - len(transfers[::4]))
    return counts | {"comparisons": CountedDeadline.comparison_count}


def check_work(chunk_count: int) -> None:
    counts = drive(chunk_count)
    # Each chunk is queued once, a third of them twice more.
    assert counts["pushes"] <= 1.7 * chunk_count
    assert counts["pops"] <= counts["pushes"]
    assert counts["swept"] <= 2 * chunk_count, "sweeping is paid for by what was removed since the last time"
    assert counts["entries_max"] <= 2 * chunk_count * 3 // 4 + 8 * STALE_ENTRIES_MAX
    # Pushing, popping and choosing between heads: about a comparison for each level of the heap.
    assert counts["comparisons"] <= chunk_count * math.log2(chunk_count)


def test_a_decision_takes_logarithmic_work_and_what_was_removed_does_not_pile_up() -> None:
    check_work(10_000)


def test_a_transfer_that_is_raised_again_and_again_leaves_no_trail() -> None:
    scheduler = Scheduler([LinkLimits(0.0, 1.0, 1)])
    transfer = scheduler.submit([(1, (0,))] * 4, Cause.PREFETCH, 0.0, (), None, 0.0)
    for step in range(1000):
        scheduler.promote(transfer, Cause.PREFETCH, -float(step), 0.0)
    (queue,) = scheduler._links[0].queues.values()
    assert len(queue._entries) <= 4 + STALE_ENTRIES_MAX + 1
