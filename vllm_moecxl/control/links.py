"""What a link has to carry, how fast it is, and when it would have more: load, measured rate and fairness."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vllm_moecxl.types import Cause

if TYPE_CHECKING:
    from vllm_moecxl.control.scheduler import Chunk, Queue

#: A link's rate is averaged over about so many times the bytes that it may have in flight.
#: Source: a planning figure: short enough to leave a slow bank within tens of milliseconds, longer than a hiccup.
RATE_WINDOWS = 4
#: A link that copies nothing is believed to return to its profile's rate, half of the way in this time: a bank that
#: was slow once has lost its work to its replicas, and nothing else would ever show that it is fast again.
#: Source: a planning figure: one slow chunk in some seconds is the price of finding out.
RATE_RECOVERY_S = 1.0
#: Who pays for a transfer that nobody wants by name: together they are one wanter.
_NOBODY = ("",)


@dataclass(frozen=True)
class LinkLimits:
    """What the profile of a bank says about its link.

    Attributes:
        latency_s: of a read from the idle bank, without the bytes' own time.
        bytes_per_s: of reads.
        in_flight_bytes_max: more bytes than this at a time make it no faster.
    """

    latency_s: float
    bytes_per_s: float
    in_flight_bytes_max: int


class Fairness:
    """Start-time fair queueing of one class at one link.

    A packet's tag is the bytes that its payer had queued here before it, or the tag in service where that is later:
    who was idle has saved nothing. Source: Goyal, Vin, Cheng, "Start-time Fair Queuing", SIGCOMM 1996.
    """

    __slots__ = ("clock", "paid_bytes")

    def __init__(self) -> None:
        self.clock = 0
        self.paid_bytes: dict[str, int] = {}

    def enter(self, wanters: Collection[str], byte_count: int) -> int:
        """Tag of a new packet. Of its wanters, the one that was served least pays for it."""
        paid = self.paid_bytes
        payer = min(wanters or _NOBODY, key=lambda wanter: (paid.get(wanter, 0), wanter))
        tag = max(paid.get(payer, 0), self.clock)
        paid[payer] = tag + byte_count
        return tag


class Offer:
    """What one link has to offer to the chunks of one transfer, beside those of them that it was given already."""

    __slots__ = ("ahead_bytes", "chunks", "seconds_per_byte", "start_s")

    def __init__(self, link: Link, cause: Cause, now_s: float) -> None:
        self.ahead_bytes = link.in_flight_bytes + link.queued_up_to(cause)
        self.seconds_per_byte = link.seconds_per_byte(now_s)
        self.start_s = now_s + link.limits.latency_s
        self.chunks: list[Chunk] = []

    def completion_s(self, byte_count: int) -> float:
        return self.start_s + (self.ahead_bytes + byte_count) * self.seconds_per_byte

    def take(self, chunk: Chunk) -> None:
        self.ahead_bytes += chunk.byte_count
        self.chunks.append(chunk)


class Link:
    """Load and rate of one link."""

    def __init__(self, limits: LinkLimits) -> None:
        assert limits.latency_s >= 0 and limits.bytes_per_s > 0 and limits.in_flight_bytes_max > 0
        self.limits = limits
        self.queues: dict[tuple[int, ...], Queue] = {}  # by the links that hold their chunks
        self.queued_bytes = [0 for _ in Cause]
        self.fairness = [Fairness() for _ in Cause]
        self.in_flight_bytes = 0
        #: The time before is accounted for: start of the first chunk in flight, or end of the last that was complete.
        self.busy_since_s = 0.0
        self._seconds_per_byte = self._profiled_seconds_per_byte = 1 / limits.bytes_per_s

    def queued_up_to(self, cause: int) -> int:
        """Bytes queued of `cause` and better classes."""
        return sum(self.queued_bytes[: cause + 1])

    def begin(self, byte_count: int, now_s: float) -> None:
        if not self.in_flight_bytes:
            self._seconds_per_byte = self.seconds_per_byte(now_s)
            self.busy_since_s = now_s
        self.in_flight_bytes += byte_count

    def measure(self, byte_count: int, now_s: float) -> None:
        """Average in the time of `byte_count` bytes: since the link began, or since the bytes before were complete."""
        # By bytes, so that neither a short chunk nor two that are seen complete at once distort the average.
        window_bytes = RATE_WINDOWS * self.limits.in_flight_bytes_max
        busy_s = max(now_s - self.busy_since_s, 0.0)
        self._seconds_per_byte = (self._seconds_per_byte * window_bytes + busy_s) / (window_bytes + byte_count)
        self.busy_since_s = now_s

    def seconds_per_byte(self, now_s: float) -> float:
        since_s = max(now_s - self.busy_since_s, 0.0)
        if self.in_flight_bytes:  # overdue is slow, before it is complete: a bank that stalls gets nothing more
            return max(self._seconds_per_byte, since_s / self.in_flight_bytes)
        excess = self._seconds_per_byte - self._profiled_seconds_per_byte
        return self._profiled_seconds_per_byte + (excess and excess * math.exp2(-since_s / RATE_RECOVERY_S))

    def completion_s(self, byte_count: int, now_s: float) -> float:
        """When `byte_count` bytes would be complete behind those in flight."""
        return now_s + self.limits.latency_s + (self.in_flight_bytes + byte_count) * self.seconds_per_byte(now_s)
