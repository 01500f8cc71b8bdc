"""Which slot makes room: a small protocol and the policies behind it."""

from __future__ import annotations

from collections.abc import Callable

from vllm_moecxl.config import EVICTIONS
from vllm_moecxl.control.eviction.arc import AdaptiveReplacement
from vllm_moecxl.control.eviction.base import Epochs, EvictionPolicy, ExpertIds
from vllm_moecxl.control.eviction.belady import Belady
from vllm_moecxl.control.eviction.frequency import (
    ClassLeastRecentlyUsed,
    LeastFrequentlyRecentlyUsed,
    LeastFrequentlyUsed,
)
from vllm_moecxl.control.eviction.learned import LearnedNextUse
from vllm_moecxl.control.eviction.lru import LeastRecentlyUsed, SecondTouch
from vllm_moecxl.control.eviction.next_use import NextUse
from vllm_moecxl.control.eviction.prefill import PrefillProtecting

__all__ = [
    "POLICIES",
    "Belady",
    "Epochs",
    "EvictionPolicy",
    "ExpertIds",
    "LeastRecentlyUsed",
    "NextUse",
    "PrefillProtecting",
]

#: By name, what makes a layer's policy from its number of slots and of experts.
POLICIES: dict[str, Callable[[int, int], EvictionPolicy]] = {
    "learned": LearnedNextUse,
    "lru": lambda slot_count, expert_count: LeastRecentlyUsed(slot_count),
    "lfu": LeastFrequentlyUsed,
    "lfru": LeastFrequentlyRecentlyUsed,
    "class-lru": ClassLeastRecentlyUsed,
    "arc": AdaptiveReplacement,
    "next-use": NextUse,
    "second-touch": SecondTouch,
    "prefill-protecting": lambda slot_count, expert_count: PrefillProtecting(
        slot_count, expert_count, LeastRecentlyUsed(slot_count)
    ),
}
assert tuple(POLICIES) == EVICTIONS
