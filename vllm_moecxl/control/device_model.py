"""A model of a memory device: when a read or write that is submitted now will be complete. Pure, sleeps nowhere."""

from __future__ import annotations

import random
import re
from dataclasses import dataclass
from decimal import Decimal

from vllm_moecxl.errors import ConfigError
from vllm_moecxl.units import parse_bytes

#: The tail of the latency: this share of the requests takes longer, by an exponential time of this many base latencies
#: in the mean. Source: a planning figure, to have a tail at all; published devices differ widely.
TAIL_SHARE = 0.01
TAIL_LATENCIES_MEAN = 4.0

_TIME_FACTORS = {"ns": Decimal("1e-9"), "us": Decimal("1e-6"), "ms": Decimal("1e-3"), "s": Decimal(1)}
_TIME = re.compile(r"(\d{1,18}(?:\.\d{1,18})?)\s*([a-z]+)")


@dataclass(frozen=True)
class DeviceSpec:
    """A device to emulate.

    Attributes:
        latency_s: of a request to the idle device, without its transfer.
        read_bytes_per_s: of reads.
        write_bytes_per_s: of writes.
        capacity_bytes: of the device, where the source names it.
        tail_share: share of requests with a longer latency.
        tail_s_mean: mean of what these take longer, exponentially distributed.
    """

    latency_s: float
    read_bytes_per_s: float
    write_bytes_per_s: float
    capacity_bytes: int | None = None
    tail_share: float = 0.0
    tail_s_mean: float = 0.0

    @classmethod
    def of(
        cls,
        latency_s: float,
        read_bytes_per_s: float,
        write_bytes_per_s: float | None = None,
        capacity_bytes: int | None = None,
    ) -> DeviceSpec:
        """A device with the usual tail; it writes as fast as it reads where nothing else is known."""
        write_bytes_per_s = read_bytes_per_s if write_bytes_per_s is None else write_bytes_per_s
        tail_s_mean = TAIL_LATENCIES_MEAN * latency_s
        return cls(latency_s, read_bytes_per_s, write_bytes_per_s, capacity_bytes, TAIL_SHARE, tail_s_mean)

    @classmethod
    def parse(cls, text: str) -> DeviceSpec:
        """Read a preset's name, ``"LATENCY,BANDWIDTH"`` or ``"LATENCY,READ_BANDWIDTH,WRITE_BANDWIDTH"``.

        A latency is a number with ns, us, ms or s, a bandwidth a byte quantity with ``/s``: ``"300ns,2GB/s"``.

        Raises:
            ConfigError: anything else.
        """
        if text in PRESETS:
            return PRESETS[text]
        latency, *bandwidths = (field.strip() for field in text.split(","))
        latency_s = _parse_seconds(latency)
        rates = [rate for bandwidth in bandwidths if (rate := _parse_rate(bandwidth))]
        if latency_s is None or len(bandwidths) not in (1, 2) or len(rates) != len(bandwidths):
            raise ConfigError(
                f"--moe-offload-config: banks=['emulated:{text}'] is not possible: name one of {', '.join(PRESETS)}, "
                'or a latency and a bandwidth with their units, such as "emulated:300ns,2GB/s"'
            )
        return cls.of(latency_s, *rates)


#: The devices of the MoE-CXL paper. It gives one bandwidth for each: writes are taken to be as fast as reads.
PRESETS = {
    "cxl-a": DeviceSpec.of(214e-9, 32e9),
    "cxl-b": DeviceSpec.of(239e-9, 26e9),
    "cxl-c": DeviceSpec.of(394e-9, 18e9, capacity_bytes=16 * 10**9),
    "cxl-d": DeviceSpec.of(271e-9, 52e9),
}


class Upstream:
    """A link that several devices share, such as a switch's port or a root complex.

    Args:
        bytes_per_s: all devices together move no more than this.
    """

    def __init__(self, bytes_per_s: float) -> None:
        assert bytes_per_s > 0
        self._bytes_per_s = bytes_per_s
        self._free_at_s = 0.0

    def carry(self, start_s: float, byte_count: int) -> float:
        """Queue `byte_count` bytes that arrive from `start_s` on; returns when the last of them is through."""
        self._free_at_s = max(start_s, self._free_at_s) + byte_count / self._bytes_per_s
        return self._free_at_s


class DeviceModel:
    """One device: a FIFO queue in front of one server, which reads and writes share. Not thread-safe.

    A request waits for those before it, moves its bytes at the device's bandwidth, and completes a latency later, while
    the next one's bytes move. A tail delays its own request only, which a later one may overtake. Bytes pass through
    device and upstream at the same time (cut-through), and a device whose upstream is behind is held up with it.

    Args:
        spec: the device.
        seed: of the latency's tail; the same seed and submissions give the same completions.
        upstream: a link that it shares with others.
    """

    def __init__(self, spec: DeviceSpec, *, seed: int, upstream: Upstream | None = None) -> None:
        self.spec = spec
        self._random = random.Random(seed)
        self._upstream = upstream
        self._free_at_s = 0.0

    def submit(self, now_s: float, byte_count: int, write: bool = False) -> float:
        """Queue a request, in the order of time; returns when it will be complete.

        Args:
            now_s: the caller's clock, in the seconds of any epoch at or after 0.
            byte_count: what to move.
            write: into the device rather than out of it.
        """
        assert byte_count >= 0
        start_s = max(now_s, self._free_at_s)
        rate = self.spec.write_bytes_per_s if write else self.spec.read_bytes_per_s
        self._free_at_s = start_s + byte_count / rate
        if self._upstream is not None:
            self._free_at_s = max(self._free_at_s, self._upstream.carry(start_s, byte_count))
        return self._free_at_s + self._latency_s()

    def _latency_s(self) -> float:
        # Both numbers are drawn for every request, so that the seed's sequence does not depend on the share.
        chance, excess = self._random.random(), self._random.expovariate(1.0)
        in_tail = chance < self.spec.tail_share
        return self.spec.latency_s + (excess * self.spec.tail_s_mean if in_tail else 0.0)


def _parse_seconds(text: str) -> float | None:
    match = _TIME.fullmatch(text)
    if match is None or (factor := _TIME_FACTORS.get(match[2])) is None:
        return None
    return float(Decimal(match[1]) * factor)


def _parse_rate(text: str) -> int | None:
    amount, _, per = text.rpartition("/")
    return parse_bytes(amount) if per.strip() == "s" else None
