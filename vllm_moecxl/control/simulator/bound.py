"""What a cache that knew the future would have hit: the offline bound, on the very visits of a simulation."""

from __future__ import annotations

from collections.abc import Sequence
from heapq import heappop, heappush

import numpy as np
import numpy.typing as npt

_NEVER = np.iinfo(np.int64).max


def belady_hits(visits: Sequence[npt.NDArray[np.int64]], slot_count: int) -> int:
    """Hits of one layer if it always evicted what is needed farthest in the future.

    A visit's experts come in together and none of them makes room for another. A visit with more experts than there
    are slots passes through the layer buffer: of it, the cache takes what it likes.

    Args:
        visits: in order, the distinct experts of each.
        slot_count: of the layer.

    Source: Belady, "A study of replacement algorithms for a virtual-storage computer", 1966.
    """
    next_uses = _next_uses(visits)
    cached: dict[int, int] = {}
    #: (-next use, expert), stale where `cached` says otherwise.
    farthest: list[tuple[int, int]] = []
    hit_count = 0
    for experts, uses in zip(visits, next_uses, strict=True):
        expert_ids, is_wide = experts.tolist(), experts.size > slot_count
        hit_count += sum(expert_id in cached for expert_id in expert_ids)
        for expert_id, use in zip(expert_ids, uses, strict=True):
            if expert_id in cached or not is_wide:
                cached[expert_id] = use
                heappush(farthest, (-use, expert_id))
        if is_wide:
            absent = [(use, e) for use, e in zip(uses, expert_ids, strict=True) if e not in cached]
            for use, expert_id in sorted(absent):
                cached[expert_id] = use
                heappush(farthest, (-use, expert_id))
                _shrink(cached, farthest, slot_count, frozenset())
        else:
            _shrink(cached, farthest, slot_count, frozenset(expert_ids))
    return hit_count


def _shrink(cached: dict[int, int], farthest: list[tuple[int, int]], slot_count: int, kept: frozenset[int]) -> None:
    """Evict until the slots are enough, but nothing of `kept`."""
    passed_over = []
    while len(cached) > slot_count:
        entry = heappop(farthest)
        expert_id = entry[1]
        if cached.get(expert_id) != -entry[0]:
            continue
        if expert_id in kept:
            passed_over.append(entry)
        else:
            del cached[expert_id]
    for entry in passed_over:
        heappush(farthest, entry)


def _next_uses(visits: Sequence[npt.NDArray[np.int64]]) -> list[list[int]]:
    """For each expert of each visit, the number of the visit that needs it next."""
    following: dict[int, int] = {}
    uses: list[list[int]] = []
    for number in range(len(visits) - 1, -1, -1):
        expert_ids = visits[number].tolist()
        uses.append([following.get(expert_id, int(_NEVER)) for expert_id in expert_ids])
        following.update(dict.fromkeys(expert_ids, number))
    uses.reverse()
    return uses
