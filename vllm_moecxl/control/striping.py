"""Cutting rows into the parts of a stripe. Standard library only: it also runs where numpy is not installed."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate


def cut(byte_count: int, weights: Sequence[float], granule: int) -> list[tuple[int, int]]:
    """Cut a row into one contiguous piece for each weight, as long as its share.

    Args:
        byte_count: length of the row.
        weights: positive, in any unit, for example shares or bytes per second.
        granule: bytes; every piece but the last is a multiple of it.

    Returns:
        [start, stop) of each piece, in the order of the weights. Together they cover the row exactly. A piece is off
        its share by less than two granules, so pieces of a short row may be empty.
    """
    assert byte_count >= 0 and granule >= 1 and weights and min(weights) > 0
    whole_count = byte_count // granule
    sums = list(accumulate(weights))
    stops = [min(round(byte_count * part / sums[-1] / granule), whole_count) * granule for part in sums]
    stops[-1] = byte_count
    return list(zip([0, *stops[:-1]], stops, strict=True))
