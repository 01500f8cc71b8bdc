"""Each rule of the transfer scheduler by itself."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest

from vllm_moecxl.control.links import RATE_RECOVERY_S, LinkLimits
from vllm_moecxl.control.scheduler import Chunk, Scheduler, Transfer
from vllm_moecxl.types import Cause

SIZE = 1000
RATE = 1e6
CHUNK_S = SIZE / RATE
DEMAND, PREFETCH, MIGRATION = Cause


def links(count: int = 1, in_flight_chunks: int = 2, rates: Sequence[float] = ()) -> Scheduler:
    rates = rates or [RATE] * count
    return Scheduler([LinkLimits(0.0, rate, in_flight_chunks * SIZE) for rate in rates])


def submit(
    scheduler: Scheduler,
    payload: object = None,
    *,
    chunks: int = 1,
    at: tuple[int, ...] = (0,),
    cause: Cause = PREFETCH,
    deadline: float = 0.0,
    wanters: Sequence[str] = (),
    now_s: float = 0.0,
) -> Transfer:
    return scheduler.submit([(SIZE, at)] * chunks, cause, deadline, wanters, payload, now_s)


def take(scheduler: Scheduler, link_id: int = 0, now_s: float = 0.0, cause_max: Cause = MIGRATION) -> Chunk:
    chunk = scheduler.next(link_id, now_s, cause_max)
    assert chunk is not None
    return chunk


def served(scheduler: Scheduler, link_id: int = 0, now_s: float = 0.0) -> list[object]:
    """Payloads of all that a link still gets, in their order."""
    payloads = []
    while chunk := scheduler.next(link_id, now_s):
        now_s += CHUNK_S
        scheduler.complete(chunk, now_s)
        payloads.append(chunk.transfer.payload)
    return payloads


def run_at(scheduler: Scheduler, link_id: int, chunk_s: float, count: int, now_s: float) -> float:
    """Let a link copy `count` chunks that only it holds, each in `chunk_s`."""
    for _ in range(count):
        submit(scheduler, at=(link_id,), now_s=now_s)
        chunk = take(scheduler, link_id, now_s)
        now_s += chunk_s
        scheduler.complete(chunk, now_s)
    return now_s


# -- order


def test_causes_are_ordered_by_urgency_and_labelled_by_name() -> None:
    assert sorted(Cause) == [Cause.DEMAND, Cause.PREFETCH, Cause.MIGRATION]
    assert [cause.name.lower() for cause in Cause] == ["demand", "prefetch", "migration"]


def test_the_class_goes_before_the_deadline() -> None:
    scheduler = links()
    for cause, deadline in ((MIGRATION, 0.0), (PREFETCH, 1.0), (DEMAND, 2.0)):
        submit(scheduler, cause, cause=cause, deadline=deadline)
    assert served(scheduler) == [DEMAND, PREFETCH, MIGRATION]


def test_a_demand_preempts_a_prefetch_at_the_next_chunk() -> None:
    scheduler = links()
    submit(scheduler, "prefetch", chunks=3)
    scheduler.complete(take(scheduler), CHUNK_S)
    submit(scheduler, "demand", cause=DEMAND, deadline=math.inf)
    assert served(scheduler) == ["demand", "prefetch", "prefetch"]


def test_the_earliest_deadline_goes_first_even_before_who_was_served_less() -> None:
    scheduler = links()
    submit(scheduler, "late", deadline=2.0, wanters=["starved"])
    for _ in range(2):
        submit(scheduler, "early", deadline=1.0, wanters=["sated"])
    assert served(scheduler) == ["early", "early", "late"]


def test_requests_take_turns_however_much_one_of_them_submits() -> None:
    scheduler = links()
    for _ in range(3):
        submit(scheduler, "greedy", wanters=["greedy"])
    for _ in range(2):
        submit(scheduler, "modest", wanters=["modest"])
    assert served(scheduler) == ["greedy", "modest", "greedy", "modest", "greedy"]


def test_turns_are_counted_in_bytes() -> None:
    scheduler = links()
    for _ in range(2):
        submit(scheduler, "large", chunks=3, wanters=["large"])
    for _ in range(4):
        submit(scheduler, "small", wanters=["small"])
    assert served(scheduler) == ["large"] * 3 + ["small"] * 3 + ["large"] * 3 + ["small"]


def test_who_was_idle_has_saved_no_turns() -> None:
    scheduler = links()
    for _ in range(3):
        submit(scheduler, "busy", wanters=["busy"])
    assert served(scheduler) == ["busy"] * 3
    for payload in ("new", "busy", "new", "busy"):
        submit(scheduler, payload, wanters=[payload])
    assert served(scheduler) == ["new", "busy", "new", "busy"]


def test_of_several_wanters_the_one_that_was_served_least_pays() -> None:
    scheduler = links()
    submit(scheduler, "a", wanters=["a"])
    submit(scheduler, "b", wanters=["b"])
    submit(scheduler, "a", wanters=["a"])
    submit(scheduler, "shared", wanters=["a", "c"])
    submit(scheduler, "c", wanters=["c"])
    assert served(scheduler) == ["a", "b", "shared", "a", "c"]


def test_what_nobody_wants_by_name_is_fair_to_what_somebody_wants() -> None:
    scheduler = links()
    for _ in range(3):
        submit(scheduler, "nobody's")
    submit(scheduler, "a", wanters=["a"])
    assert served(scheduler) == ["nobody's", "a", "nobody's", "nobody's"]


def test_a_demand_does_not_pay_for_the_prefetches_of_its_request() -> None:
    scheduler = links()
    submit(scheduler, "prefetch", chunks=9, wanters=["a"])
    for payload in ("a", "b"):
        submit(scheduler, payload, cause=DEMAND, wanters=[payload])
    assert served(scheduler)[:2] == ["a", "b"]


def test_all_else_equal_the_order_of_submission_holds_and_chunks_keep_theirs() -> None:
    scheduler = links(in_flight_chunks=8)
    transfers = [submit(scheduler, chunks=2, wanters=[name]) for name in "ab"]
    chunks = [take(scheduler) for _ in range(4)]
    assert [(chunk.transfer, chunk.index) for chunk in chunks] == [(t, i) for t in transfers for i in (0, 1)]


def test_a_link_is_given_no_class_beyond_the_one_it_asks_for() -> None:
    scheduler = links()
    submit(scheduler, cause=MIGRATION)
    assert scheduler.next(0, 0.0, PREFETCH) is None and not scheduler.has_work(PREFETCH)
    assert scheduler.has_work() and take(scheduler).transfer.cause == MIGRATION
    assert not scheduler.has_work()


# -- bytes in flight


def test_bytes_in_flight_are_bounded() -> None:
    scheduler = links(in_flight_chunks=2)
    submit(scheduler, chunks=3)
    first, _ = take(scheduler), take(scheduler)
    assert scheduler.next(0, 0.0) is None and scheduler.in_flight_bytes(0) == 2 * SIZE
    scheduler.complete(first, CHUNK_S)
    take(scheduler)


def test_an_idle_link_takes_a_chunk_of_any_size() -> None:
    scheduler = Scheduler([LinkLimits(0.0, RATE, 1)])
    submit(scheduler, chunks=2)
    take(scheduler)
    assert scheduler.next(0, 0.0) is None


def test_a_small_chunk_does_not_overtake_one_that_does_not_fit_yet() -> None:
    scheduler = links(in_flight_chunks=2)
    submit(scheduler)
    scheduler.submit([(2 * SIZE, (0,))], PREFETCH, 0.0, (), "large", 0.0)
    submit(scheduler, "small")
    first = take(scheduler)
    assert scheduler.next(0, 0.0) is None
    scheduler.complete(first, CHUNK_S)
    assert take(scheduler, now_s=CHUNK_S).transfer.payload == "large"


# -- replicas


def test_chunks_spread_over_equal_replicas_home_first() -> None:
    scheduler = links(2, in_flight_chunks=4)
    submit(scheduler, chunks=4, at=(1, 0))
    assert [take(scheduler, 1).index for _ in range(2)] == [0, 2]
    assert [take(scheduler, 0).index for _ in range(2)] == [1, 3]


def test_a_replica_gets_work_in_proportion_to_its_rate() -> None:
    scheduler = links(rates=[3 * RATE, RATE], in_flight_chunks=20)
    submit(scheduler, chunks=16, at=(1, 0))
    taken = [0, 0]
    for link_id in (0, 1):
        while (chunk := scheduler.next(link_id, 0.0)) and chunk.link_id == link_id:
            taken[link_id] += 1
    assert taken == [12, 4]


def test_latency_counts_in_the_choice_of_a_replica() -> None:
    scheduler = Scheduler([LinkLimits(10 * CHUNK_S, RATE, SIZE), LinkLimits(0.0, RATE / 5, SIZE)])
    submit(scheduler, at=(0, 1))
    assert take(scheduler, 1).link_id == 1
    assert scheduler.predicted_completion_s(0, SIZE, 7.0, DEMAND) == pytest.approx(7 + 11 * CHUNK_S)


def test_only_work_of_its_class_and_better_delays_a_prediction() -> None:
    scheduler = links(in_flight_chunks=1)
    submit(scheduler, cause=MIGRATION)
    take(scheduler)
    for cause in Cause:
        submit(scheduler, cause=cause)
    for cause, chunk_count in ((DEMAND, 3), (PREFETCH, 4), (MIGRATION, 5)):
        assert scheduler.predicted_completion_s(0, SIZE, 0.0, cause) == pytest.approx(chunk_count * CHUNK_S)


def test_a_bank_that_was_measured_slow_loses_its_work_to_a_replica_and_wins_it_back_by_being_fast() -> None:
    scheduler = links(2)
    now_s = run_at(scheduler, 0, 10 * CHUNK_S, 20, 0.0)
    assert scheduler.bytes_per_s(0, now_s) == pytest.approx(RATE / 10, rel=0.5)
    submit(scheduler, chunks=4, at=(0, 1), now_s=now_s)
    assert [take(scheduler, 1, now_s + i).link_id for i in range(2)] == [1, 1]
    scheduler = links(2)
    now_s = run_at(scheduler, 0, 10 * CHUNK_S, 20, 0.0)
    now_s = run_at(scheduler, 0, CHUNK_S, 60, now_s)
    assert scheduler.bytes_per_s(0, now_s) == pytest.approx(RATE, rel=0.1)
    submit(scheduler, chunks=1, at=(1, 0), now_s=now_s)
    submit(scheduler, chunks=1, at=(1, 0), now_s=now_s)
    assert take(scheduler, 0, now_s).link_id == 0


def test_a_slow_bank_that_nobody_uses_is_tried_again() -> None:
    scheduler = links(2)
    now_s = run_at(scheduler, 0, 10 * CHUNK_S, 20, 0.0)
    slow = scheduler.bytes_per_s(0, now_s)
    halfway = scheduler.bytes_per_s(0, now_s + RATE_RECOVERY_S)
    assert 1 / halfway == pytest.approx((1 / slow + 1 / RATE) / 2)
    assert scheduler.bytes_per_s(0, now_s + 60 * RATE_RECOVERY_S) == pytest.approx(RATE)


def test_chunks_in_flight_together_are_measured_together() -> None:
    scheduler = links(in_flight_chunks=4)
    for round_ in range(20):
        submit(scheduler, chunks=4)
        chunks = [take(scheduler, now_s=round_ * 4 * CHUNK_S) for _ in range(4)]
        for chunk in chunks:  # seen all at once
            scheduler.complete(chunk, (round_ + 1) * 4 * CHUNK_S)
    assert scheduler.bytes_per_s(0, 80 * CHUNK_S) == pytest.approx(RATE, rel=0.15)


def test_a_short_chunk_is_no_evidence_of_a_slow_bank() -> None:
    scheduler = links()
    scheduler.submit([(1, (0,))], DEMAND, 0.0, (), None, 0.0)
    scheduler.complete(take(scheduler), CHUNK_S / 10)
    assert scheduler.bytes_per_s(0, CHUNK_S / 10) == pytest.approx(RATE, rel=0.02)


def test_a_bank_that_stalls_gets_nothing_more_before_it_has_completed_anything() -> None:
    scheduler = links(2)
    submit(scheduler, at=(0,))
    take(scheduler, 0)
    submit(scheduler, "one", at=(0, 1), now_s=9 * CHUNK_S)
    submit(scheduler, "two", at=(0, 1), now_s=9 * CHUNK_S)
    assert served(scheduler, 1, 9 * CHUNK_S) == ["one", "two"]
    assert scheduler.bytes_per_s(0, 9 * CHUNK_S) == pytest.approx(RATE / 9)


def test_an_unused_slow_estimate_does_not_recover_while_a_chunk_hangs() -> None:
    scheduler = links()
    now_s = run_at(scheduler, 0, 10 * CHUNK_S, 20, 0.0)
    slow = scheduler.bytes_per_s(0, now_s)
    submit(scheduler, now_s=now_s)
    take(scheduler, now_s=now_s)
    assert scheduler.bytes_per_s(0, now_s + 100 * RATE_RECOVERY_S) < slow


# -- stealing


def test_an_idle_link_steals_what_it_would_have_sooner() -> None:
    scheduler = links(2, in_flight_chunks=1)
    submit(scheduler, at=(0,), cause=DEMAND)
    take(scheduler, 0)
    transfer = submit(scheduler, chunks=4, at=(0, 1))
    order = []
    while not transfer.is_done:
        chunk = take(scheduler, 1)
        scheduler.complete(chunk, 0.0)
        order.append((chunk.index, chunk.link_id))
    assert order == [(0, 1), (2, 1), (1, 1), (3, 1)], "its own first"


def test_a_thief_takes_the_best_chunk_of_all_that_it_holds() -> None:
    scheduler = links(3, in_flight_chunks=1)
    for link_id, deadline in ((0, 2.0), (1, 1.0)):
        submit(scheduler, at=(link_id,), cause=DEMAND)
        take(scheduler, link_id)
        submit(scheduler, "not held", at=(link_id,), deadline=0.0)
        # Loaded enough to make the owner's link the best at submission.
        blocker = submit(scheduler, at=(2,), chunks=9)
        submit(scheduler, deadline, at=(link_id, 2), deadline=deadline)
        scheduler.cancel(blocker)
    assert take(scheduler, 2).transfer.payload == 1.0


def test_a_slow_thief_leaves_a_chunk_that_its_owner_would_have_sooner() -> None:
    scheduler = links(rates=[RATE, RATE / 3], in_flight_chunks=1)
    submit(scheduler, chunks=2, at=(0, 1))
    assert scheduler.next(1, 0.0) is None
    take(scheduler, 0)
    assert scheduler.next(1, 0.0) is None
    submit(scheduler, chunks=2, at=(0,), cause=DEMAND)
    assert take(scheduler, 1).index == 1


def test_nothing_is_stolen_that_the_thief_does_not_hold() -> None:
    scheduler = links(2)
    submit(scheduler, chunks=9, at=(0,))
    assert scheduler.next(1, 0.0) is None


def test_a_link_with_work_of_its_own_does_not_steal() -> None:
    scheduler = links(2, in_flight_chunks=9)
    submit(scheduler, "own", at=(1,), cause=MIGRATION, deadline=9.0)
    blocker = submit(scheduler, at=(1,), chunks=9)
    submit(scheduler, "other's", at=(0, 1))
    scheduler.cancel(blocker)
    assert take(scheduler, 1).transfer.payload == "own"


def test_a_stolen_chunk_is_paid_for_where_it_is_copied() -> None:
    scheduler = links(2, in_flight_chunks=1)
    submit(scheduler, at=(0,), cause=DEMAND)
    take(scheduler, 0)
    blocker = submit(scheduler, at=(1,), chunks=9)
    submit(scheduler, at=(0, 1), wanters=["a"])
    scheduler.cancel(blocker)
    stolen = take(scheduler, 1)
    submit(scheduler, "a", at=(1,), wanters=["a"])
    submit(scheduler, "b", at=(1,), wanters=["b"])
    scheduler.complete(stolen, CHUNK_S)
    assert served(scheduler, 1) == ["b", "a"]


# -- promotion


def test_a_joined_transfer_is_raised_and_never_lowered() -> None:
    scheduler = links()
    joined = submit(scheduler, "joined", deadline=5.0)
    submit(scheduler, "demand", cause=DEMAND, deadline=2.0)
    scheduler.promote(joined, DEMAND, 1.0, 0.0)
    scheduler.promote(joined, MIGRATION, 9.0, 0.0)
    assert (joined.cause, joined.deadline) == (DEMAND, 1.0)
    assert served(scheduler) == ["joined", "demand"]


def test_an_earlier_deadline_alone_raises_too() -> None:
    scheduler = links()
    submit(scheduler, "first", deadline=3.0)
    joined = submit(scheduler, "joined", deadline=5.0)
    scheduler.promote(joined, MIGRATION, 1.0, 0.0)
    assert joined.cause == PREFETCH and served(scheduler) == ["joined", "first"]


def test_a_raised_chunk_looks_for_the_best_link_again() -> None:
    scheduler = links(2)
    submit(scheduler, chunks=3, at=(1,), cause=PREFETCH)
    joined = submit(scheduler, "joined", at=(0, 1))
    submit(scheduler, chunks=3, at=(0,), cause=DEMAND)
    scheduler.promote(joined, DEMAND, 0.0, 0.0)
    assert take(scheduler, 1).transfer is joined


def test_a_promotion_leaves_what_is_in_flight_alone() -> None:
    scheduler = links()
    joined = submit(scheduler, chunks=2)
    chunk = take(scheduler)
    scheduler.promote(joined, DEMAND, 0.0, 0.0)
    assert joined.in_flight_count == 1
    assert not scheduler.complete(chunk, CHUNK_S)
    assert scheduler.complete(take(scheduler, now_s=CHUNK_S), 2 * CHUNK_S) and joined.is_done


def test_joining_what_is_done_changes_nothing() -> None:
    scheduler = links()
    transfer = submit(scheduler)
    assert scheduler.complete(take(scheduler), CHUNK_S)
    scheduler.promote(transfer, DEMAND, 0.0, CHUNK_S, ["a"])
    assert transfer.cause == PREFETCH and scheduler.forget("a") == [] and not scheduler.has_work()


# -- giving back, cancelling, forgetting


def test_a_chunk_that_was_given_back_is_first_in_line_again() -> None:
    scheduler = links(in_flight_chunks=3)
    for payload in "ab":
        submit(scheduler, payload, wanters=[payload])
    scheduler.complete(take(scheduler), CHUNK_S)
    chunk = take(scheduler, now_s=CHUNK_S)
    submit(scheduler, "new", wanters=["new"])
    submit(scheduler, "urgent", deadline=-1.0)
    scheduler.give_back(chunk, 2 * CHUNK_S)
    assert chunk.transfer.in_flight_count == scheduler.in_flight_bytes(0) == 0
    assert served(scheduler) == ["urgent", "b", "new"]


def test_the_time_of_a_chunk_that_was_given_back_is_not_held_against_the_bank() -> None:
    scheduler = links()
    submit(scheduler)
    scheduler.give_back(take(scheduler), 100 * CHUNK_S)
    assert scheduler.bytes_per_s(0, 100 * CHUNK_S) == RATE


def test_giving_one_back_does_not_shorten_the_time_of_another() -> None:
    scheduler = links()
    submit(scheduler, chunks=2)
    first, second = take(scheduler), take(scheduler)
    scheduler.give_back(second, 9 * CHUNK_S)
    scheduler.complete(first, 10 * CHUNK_S)
    assert scheduler.bytes_per_s(0, 10 * CHUNK_S) < RATE / 1.9


def test_a_cancelled_transfer_is_given_no_more_and_ends_with_what_is_in_flight() -> None:
    scheduler = links()
    transfer = submit(scheduler, chunks=4)
    first, second = take(scheduler), take(scheduler)
    scheduler.cancel(transfer)
    scheduler.cancel(transfer)
    assert transfer.is_cancelled and not scheduler.has_work()
    assert not scheduler.complete(first, CHUNK_S)
    assert scheduler.complete(second, 2 * CHUNK_S) and not transfer.is_done
    assert scheduler.next(0, 2 * CHUNK_S) is None


def test_a_chunk_of_a_cancelled_transfer_is_not_queued_by_giving_it_back() -> None:
    scheduler = links()
    transfer = submit(scheduler)
    chunk = take(scheduler)
    scheduler.cancel(transfer)
    scheduler.give_back(chunk, 0.0)
    assert transfer.in_flight_count == 0 and scheduler.next(0, 0.0) is None and not scheduler.has_work()


def test_a_transfer_that_was_all_in_flight_when_it_was_cancelled_is_done() -> None:
    scheduler = links()
    transfer = submit(scheduler)
    chunk = take(scheduler)
    scheduler.cancel(transfer)
    assert scheduler.complete(chunk, CHUNK_S) and transfer.is_done and transfer.is_cancelled


def test_cancelling_what_is_done_changes_nothing() -> None:
    scheduler = links()
    transfer = submit(scheduler, wanters=["a"])
    scheduler.complete(take(scheduler), CHUNK_S)
    scheduler.cancel(transfer)
    assert not transfer.is_cancelled


def test_a_request_that_is_gone_takes_along_only_what_nobody_else_wants_or_waits_for() -> None:
    scheduler = links()
    shared = submit(scheduler, wanters=["a", "b"])
    own = submit(scheduler, wanters=["a"])
    moved = submit(scheduler, cause=MIGRATION, wanters=["a"])
    waited_for = submit(scheduler, cause=DEMAND, wanters=["a"])
    nobodys = submit(scheduler)
    joined = submit(scheduler, wanters=["a"])
    scheduler.promote(joined, PREFETCH, 0.0, 0.0, ["b"])
    raised = submit(scheduler, wanters=["a"])
    scheduler.promote(raised, DEMAND, 0.0, 0.0)
    assert scheduler.forget("a") == [own, moved]
    assert not any(t.is_cancelled for t in (shared, waited_for, nobodys, joined, raised))
    assert shared.wanters == joined.wanters == {"b"}
    assert scheduler.forget("a") == [] and scheduler.forget("b") == [shared, joined]


def test_what_was_cancelled_or_is_done_is_not_forgotten_again() -> None:
    scheduler = links()
    submit(scheduler, wanters=["a"])
    scheduler.complete(take(scheduler), CHUNK_S)
    scheduler.cancel(submit(scheduler, wanters=["a"]))
    assert scheduler.forget("a") == []


def test_a_chunk_ends_once() -> None:
    scheduler = links()
    submit(scheduler, chunks=2)
    chunk = take(scheduler)
    scheduler.complete(chunk, CHUNK_S)
    with pytest.raises(AssertionError, match="ended before"):
        scheduler.complete(chunk, CHUNK_S)
    with pytest.raises(AssertionError, match="ended before"):
        scheduler.give_back(chunk, CHUNK_S)


@pytest.mark.parametrize(
    ("chunks", "deadline"), [([], 0.0), ([(0, (0,))], 0.0), ([(SIZE, (0,))], math.nan)], ids=["none", "empty", "nan"]
)
def test_a_transfer_that_cannot_be_ordered_is_our_bug(
    chunks: list[tuple[int, tuple[int, ...]]], deadline: float
) -> None:
    with pytest.raises(AssertionError):
        links().submit(chunks, PREFETCH, deadline, (), None, 0.0)
