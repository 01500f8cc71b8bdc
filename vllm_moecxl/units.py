"""Byte quantities as people write them."""

from __future__ import annotations

import re
from decimal import Decimal

KIB = 1 << 10
MIB = 1 << 20
GIB = 1 << 30

_FACTORS = {
    "b": 1,
    "k": 10**3,
    "kb": 10**3,
    "kib": KIB,
    "m": 10**6,
    "mb": 10**6,
    "mib": MIB,
    "g": 10**9,
    "gb": 10**9,
    "gib": GIB,
    "t": 10**12,
    "tb": 10**12,
    "tib": 1 << 40,
}
# Bounded, so that no quantity is beyond what arithmetic with floats can take.
_BYTES = re.compile(r"\s*(\d{1,18}(?:\.\d{1,18})?)\s*([a-zA-Z]+)\s*")


def parse_bytes(text: str) -> int | None:
    """Bytes of a quantity with a unit such as ``24GiB`` or ``512 MB``; None where it is not one."""
    match = _BYTES.fullmatch(text)
    if match is None or (factor := _FACTORS.get(match[2].lower())) is None:
        return None
    return int(Decimal(match[1]) * factor)


def format_bytes(count: int) -> str:
    """`count` bytes in the largest binary unit that keeps at least one digit before the point."""
    for unit, size in (("TiB", 1 << 40), ("GiB", GIB), ("MiB", MIB), ("KiB", KIB)):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return f"{count} B"


def format_seconds(seconds: float) -> str:
    """A duration in the unit that suits it."""
    for unit, factor in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if seconds >= factor:
            return f"{seconds / factor:.3g} {unit}"
    return f"{seconds / 1e-9:.3g} ns"


def format_rate(bytes_per_s: float) -> str:
    """A bandwidth in GB/s, as memory and links are sold."""
    return f"{bytes_per_s / 1e9:.3g} GB/s"
