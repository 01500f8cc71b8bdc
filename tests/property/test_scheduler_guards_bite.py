"""Every guard of the scheduler, seen biting: with it taken out of the source, a property of it fails."""

from __future__ import annotations

import pytest

from tests.property import test_scheduler
from tests.property.test_guards_bite import take_out
from vllm_moecxl.control import scheduler as module
from vllm_moecxl.control.links import Fairness, Link, Offer
from vllm_moecxl.control.scheduler import Queue, Scheduler

#: A type error is two chunks that nothing but their identity tells apart.
_BITES = (AssertionError, IndexError, KeyError, ValueError, TypeError, pytest.fail.Exception)


def test_a_function_that_is_compiled_again_unchanged_bites_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    for owner, name, guard in (
        (Scheduler, "next", "return chunk"),
        (Queue, "head", "return None"),
        (Link, "measure", "window_bytes + byte_count"),
    ):
        take_out(monkeypatch, owner, name, guard, guard)
    test_scheduler.check_seeds(range(5))


@pytest.mark.parametrize(
    ("owner", "name", "guard", "instead"),
    [
        pytest.param(Scheduler, "submit", "len(chunks)\n    for", "0\n    for", id="serial numbers are unique"),
        pytest.param(Scheduler, "promote", "min(cause, cause_before)", "cause", id="a class is never lowered"),
        pytest.param(
            Scheduler, "promote", "min(deadline, transfer.deadline)", "deadline", id="a deadline is never put off"
        ),
        pytest.param(
            Scheduler,
            "promote",
            "cause >= cause_before and deadline >= transfer.deadline",
            "cause >= cause_before",
            id="an earlier deadline raises by itself",
        ),
        pytest.param(Scheduler, "promote", "transfer.wanters.add(wanter)", "pass", id="a joiner is a wanter"),
        pytest.param(
            Scheduler,
            "promote",
            "self._wanted.setdefault(wanter, {})[transfer] = None",
            "pass",
            id="a joiner's transfers are known",
        ),
        pytest.param(Scheduler, "promote", "self._remove(chunk)", "pass", id="a raised chunk is queued once"),
        pytest.param(Scheduler, "promote", "if transfer.is_done:", "if False:", id="what is done has no joiners"),
        pytest.param(
            Scheduler,
            "promote",
            "self._assign(transfer, queued, now_s)",
            "[self._queue(chunk) for chunk in queued]",
            id="a new class is a new choice",
        ),
        pytest.param(Scheduler, "next", "min(heads)", "heads[0]", id="the best of several heads"),
        pytest.param(Scheduler, "next", "link.in_flight_bytes and ", "", id="an idle link takes any chunk"),
        pytest.param(
            Scheduler,
            "next",
            "link.in_flight_bytes + chunk.byte_count > link.limits.in_flight_bytes_max",
            "False",
            id="bytes in flight are bounded",
        ),
        pytest.param(
            Scheduler,
            "next",
            "link.in_flight_bytes + chunk.byte_count > link.limits.in_flight_bytes_max",
            "link.in_flight_bytes > link.limits.in_flight_bytes_max",
            id="by what they will be",
        ),
        pytest.param(Scheduler, "next", "chunk._queue.pop()", "pass", id="nothing is given twice"),
        pytest.param(
            Scheduler,
            "next",
            "chunk._tag = fairness.enter(transfer.wanters, chunk.byte_count)",
            "pass",
            id="theft pays",
        ),
        pytest.param(Scheduler, "next", "chunk.link_id = link_id", "pass", id="a stolen chunk is in flight here"),
        pytest.param(
            Scheduler, "next", "fairness.clock = max(fairness.clock, chunk._tag)", "pass", id="service moves the clock"
        ),
        pytest.param(Scheduler, "next", "max(fairness.clock, chunk._tag)", "chunk._tag", id="it never goes back"),
        pytest.param(
            Scheduler,
            "next",
            "self._links[chunk.link_id].queued_bytes[transfer.cause] -= chunk.byte_count",
            "link.queued_bytes[transfer.cause] -= chunk.byte_count",
            id="a stolen chunk burdens its owner no more",
        ),
        pytest.param(Scheduler, "complete", "self._retire(transfer)", "pass", id="what is done is let go"),
        pytest.param(
            Scheduler, "complete", " and not transfer.is_cancelled", "", id="what was cancelled was let go already"
        ),
        pytest.param(
            Scheduler,
            "complete",
            " or (transfer.is_cancelled and transfer.in_flight_count == 0)",
            "",
            id="the end of a cancelled transfer is told",
        ),
        pytest.param(Scheduler, "complete", " and transfer.in_flight_count == 0", "", id="but not before it"),
        pytest.param(
            Scheduler,
            "complete",
            "self._links[chunk.link_id].measure(chunk.byte_count, now_s)",
            "pass",
            id="links are measured",
        ),
        pytest.param(
            Scheduler, "give_back", "if not chunk.transfer.is_cancelled:", "if True:", id="cancelled is never given"
        ),
        pytest.param(Scheduler, "give_back", "self._queue(chunk)", "pass", id="what is given back is not lost"),
        pytest.param(Scheduler, "give_back", "chunk._tag = 0", "pass", id="it is first in line again"),
        pytest.param(
            Scheduler, "give_back", "if not link.in_flight_bytes:", "if True:", id="others in flight keep their time"
        ),
        pytest.param(
            Scheduler, "give_back", "link.busy_since_s = now_s", "pass", id="an idle link's time starts when it is idle"
        ),
        pytest.param(
            Scheduler,
            "cancel",
            "transfer.is_done or transfer.is_cancelled",
            "False",
            id="what is over cannot be cancelled",
        ),
        pytest.param(Scheduler, "cancel", "self._remove(chunk)", "pass", id="what is cancelled is not queued"),
        pytest.param(Scheduler, "cancel", "self._retire(transfer)", "pass", id="what is cancelled is let go"),
        pytest.param(Scheduler, "forget", "not transfer.wanters and ", "", id="what others want is kept"),
        pytest.param(
            Scheduler, "forget", " and transfer.cause != Cause.DEMAND", "", id="what a forward waits for is kept"
        ),
        pytest.param(Scheduler, "forget", "transfer.wanters.remove(wanter)", "pass", id="it wants nothing any more"),
        pytest.param(Scheduler, "forget", "self.cancel(transfer)", "pass", id="what nobody else wants is cancelled"),
        pytest.param(
            Scheduler, "forget", "fairness.paid_bytes.pop(wanter, None)", "pass", id="its accounts are closed"
        ),
        pytest.param(
            Scheduler, "_assign", "< best_s", "<= best_s", id="the home is preferred where it makes no difference"
        ),
        pytest.param(
            Scheduler,
            "_assign",
            "sum(chunk.byte_count for chunk in offer.chunks)",
            "1",
            id="turns are counted in bytes",
        ),
        pytest.param(Offer, "take", "self.ahead_bytes += chunk.byte_count", "pass", id="a transfer's chunks spread"),
        pytest.param(Offer, "__init__", "link.in_flight_bytes + ", "", id="what is in flight burdens a replica"),
        pytest.param(Offer, "__init__", " + link.queued_up_to(cause)", "", id="what is queued burdens a replica"),
        pytest.param(Scheduler, "_queue", "if link_id != chunk.link_id:", "if False:", id="an idle link steals"),
        pytest.param(Scheduler, "_best_of_others", "sorted(", "reversed(", id="the best is stolen first"),
        pytest.param(
            Scheduler,
            "_best_of_others",
            "self.predicted_completion_s(thief_id, chunk.byte_count, now_s, cause) < owner_s",
            "True",
            id="a thief is faster",
        ),
        pytest.param(
            Scheduler,
            "_best_of_others",
            "queued_up_to(cause - 1)",
            "queued_up_to(cause)",
            id="a head waits for no equals",
        ),
        pytest.param(
            Scheduler,
            "_best_of_others",
            "owner.queued_up_to(cause - 1) + ",
            "",
            id="a head waits for better classes",
        ),
        pytest.param(Scheduler, "_land", "assert chunk._is_in_flight", "assert True", id="a chunk ends once"),
        pytest.param(Scheduler, "_land", "chunk._is_in_flight = False", "pass", id="and is known to have ended"),
        pytest.param(
            module, "_heads", " and entry[0] <= cause_max", "", id="no class beyond the one that is asked for"
        ),
        pytest.param(
            Queue, "head", "if entry[-1]._entry is entry:", "if True:", id="an entry that was removed is not given"
        ),
        pytest.param(Queue, "head", "self._stale_count -= 1", "pass", id="what surfaced is not counted any more"),
        pytest.param(Queue, "remove", "chunk._entry = None", "pass", id="a removed chunk is not queued"),
        pytest.param(Queue, "remove", "self._stale_count = 0", "pass", id="a sweep starts a new count"),
        pytest.param(Queue, "remove", "if entry[-1]._entry is entry", "", id="a sweep removes what it says"),
        pytest.param(
            Queue, "remove", "heapify(self._entries)", "self._entries.reverse()", id="a sweep keeps the order"
        ),
        pytest.param(
            Queue, "push", "chunk._queue = self", "chunk._queue = getattr(chunk, '_queue', self)", id="its heap"
        ),
        pytest.param(Queue, "push", "transfer.cause, ", "0, ", id="the class goes before the deadline"),
        pytest.param(Queue, "push", "transfer.deadline, ", "0, ", id="the deadline goes before fairness"),
        pytest.param(Queue, "push", "chunk._tag, ", "0, ", id="fairness goes before the order of submission"),
        pytest.param(Fairness, "enter", "payer = min(", "payer = max(", id="who was served least pays"),
        pytest.param(Fairness, "enter", "max(paid.get(payer, 0), self.clock)", "paid.get(payer, 0)", id="no savings"),
        pytest.param(Fairness, "enter", "max(paid.get(payer, 0), self.clock)", "self.clock", id="no credit"),
        pytest.param(Fairness, "enter", "paid.get(wanter, 0), wanter)", "wanter)", id="paid bytes decide who pays"),
        pytest.param(Fairness, "enter", "wanters or _NOBODY", "wanters", id="nobody is a wanter"),
        pytest.param(Link, "begin", "if not self.in_flight_bytes:", "if True:", id="a busy link's time goes on"),
        pytest.param(
            Link,
            "begin",
            "self._seconds_per_byte = self.seconds_per_byte(now_s)",
            "pass",
            id="what has recovered stays recovered",
        ),
        pytest.param(Link, "measure", "self.busy_since_s = now_s", "pass", id="no time counts twice"),
        pytest.param(
            Link, "seconds_per_byte", "if self.in_flight_bytes:", "if False:", id="a hanging bank does not recover"
        ),
        pytest.param(
            Link,
            "seconds_per_byte",
            "max(self._seconds_per_byte, since_s / self.in_flight_bytes)",
            "self._seconds_per_byte",
            id="overdue is slow",
        ),
        pytest.param(
            Link, "seconds_per_byte", "math.exp2(-since_s / RATE_RECOVERY_S)", "1.0", id="an idle bank recovers"
        ),
        pytest.param(Link, "queued_up_to", "[: cause + 1]", "", id="only its class and better delay a chunk"),
        pytest.param(Link, "completion_s", "self.limits.latency_s + ", "", id="latency counts"),
    ],
)
def test_the_oracle_notices_a_scheduler_without(
    monkeypatch: pytest.MonkeyPatch, owner: type, name: str, guard: str, instead: str
) -> None:
    take_out(monkeypatch, owner, name, guard, instead)
    with pytest.raises(_BITES):
        test_scheduler.check_seeds(range(300))


@pytest.mark.parametrize(
    ("owner", "name", "guard", "instead"),
    [
        pytest.param(
            Queue,
            "remove",
            "self._stale_count > max(STALE_ENTRIES_MAX, len(self._entries) // 2)",
            "False",
            id="removed entries are swept",
        ),
        pytest.param(Queue, "remove", "len(self._entries) // 2", "0", id="but seldom"),
        pytest.param(
            Queue,
            "push",
            "heappush(self._entries, entry)",
            "self._entries.append(entry); self._entries.sort()",
            id="heap",
        ),
        pytest.param(
            Queue, "head", "entry = entries[0]", "heapify(entries); entry = entries[0]", id="a head is found at once"
        ),
    ],
)
def test_the_counts_notice_a_queue_without(
    monkeypatch: pytest.MonkeyPatch, owner: type, name: str, guard: str, instead: str
) -> None:
    take_out(monkeypatch, owner, name, guard, instead)
    with pytest.raises(_BITES):
        test_scheduler.check_work(2_000)
