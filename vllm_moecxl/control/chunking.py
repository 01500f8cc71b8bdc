"""How a slab is cut for its way over a link: the size of one copy, and how many bytes of copies are under way."""

from __future__ import annotations

from vllm_moecxl.control.links import LinkLimits
from vllm_moecxl.units import KIB, MIB

#: A demand waits for at most this long behind a chunk that nobody waits for, where the limits below allow it. Many
#: times what a chunk costs: 20 to 40 us in Python, and about 50 us of the forward's time, whenever it takes the
#: interpreter from it. Source: `python -m benchmarks slots` with 0.5, 1.2 and 5 ms, AMD EPYC in a virtual machine,
#: 2026-11-22.
CHUNK_S = 1e-3
CHUNK_BYTES_MIN = 256 * KIB
CHUNK_BYTES_MAX = 8 * MIB


def chunk_bytes_at(read_bytes_per_s: float) -> int:
    """What one copy moves from memory that is read at this rate: about `CHUNK_S` of its time, a power of two."""
    wanted = int(read_bytes_per_s * CHUNK_S)
    return min(max(1 << max(wanted.bit_length() - 1, 0), CHUNK_BYTES_MIN), CHUNK_BYTES_MAX)


def link_limits(
    latency_s: float, read_bytes_per_s: float, reader_count: int, chunk_bytes: int, in_flight_bytes_max: int
) -> LinkLimits:
    """Limits of a bank's link: a chunk in flight for each reader and for whoever helps, or more where that takes.

    Args:
        latency_s: of a read from the idle bank.
        read_bytes_per_s: of large reads.
        reader_count: threads that keep the bank busy.
        chunk_bytes: what one copy moves.
        in_flight_bytes_max: what the device lets be queued.
    """
    pipe_bytes = 2 * int(latency_s * read_bytes_per_s)  # what fills the link for its latency
    wanted_bytes = max((reader_count + 1) * chunk_bytes, pipe_bytes)
    return LinkLimits(latency_s, read_bytes_per_s, min(wanted_bytes, in_flight_bytes_max))
