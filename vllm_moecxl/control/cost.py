"""What a forward costs each way it may be run, so that the cheapest can be taken. Pure arithmetic, seconds.

A kernel over few tokens takes as long as it takes to read its experts' weights, so bytes and bandwidths are all that
counts here. For many tokens computing comes on top, the same for every way.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from vllm_moecxl.types import InPlaceMode

#: A pass more costs this much in Python and in the kernel's start. Source: one pass of the toy layer, AMD EPYC core,
#: 2026-11-22.
PASS_OVERHEAD_S = 150e-6

#: Weight of the latest kernel call in what is believed of its kind.
_LEARNING_RATE = 0.1

ExpertIds = npt.NDArray[np.int64]


class Step(NamedTuple):
    """One pass, as far as its cost goes."""

    token_count: int
    expert_count: int
    fetch_count: int


class LayerCosts:
    """Costs of one layer, and what it has learned of the experts that it ran in place.

    Attributes:
        fetch_s: seconds that a slab takes from its home, by the profile.

    Args:
        slab_bytes: of one expert.
        home_bytes_per_s: at which the kernel, or a copy, reads a home.
        slot_bytes_per_s: at which slots are read and written.
        in_place: "always" and "never" are the user's word; "auto" compares.
        is_addressable: whether the kernel can read the homes at all.
    """

    def __init__(
        self,
        expert_count: int,
        slab_bytes: int,
        home_bytes_per_s: float,
        slot_bytes_per_s: float,
        in_place: InPlaceMode = "never",
        *,
        is_addressable: bool = False,
    ) -> None:
        assert is_addressable or in_place != "always"
        self.fetch_s = slab_bytes / home_bytes_per_s
        self._slot_s = slab_bytes / slot_bytes_per_s
        #: By the width of a forward (see `_width`), seconds that the kernel takes for an expert, as observed.
        self._kernel_s: dict[int, float] = {}
        self._may_run_in_place = is_addressable and in_place != "never"
        self.is_always_in_place = self._may_run_in_place and (in_place == "always" or self.fetch_s <= self._slot_s)
        #: [experts] seconds that forwards in place have lost for want of a slot.
        self._regret_s = np.zeros(expert_count)

    def runs_in_place(self, hit_count: int, missing: ExpertIds, *, is_narrow: bool, is_joined: bool = False) -> bool:
        """Whether to run a forward straight from the homes, and note what was decided.

        Copying once and reading from the slots ever after is weighed by what has been lost already: an expert is worth
        its copy when the forwards that ran without it have together lost as much. So neither choice costs more than
        twice what the better one would have.

        Args:
            hit_count: experts of the forward that are in slots.
            missing: those that are not.
            is_narrow: whether they fit the slots; otherwise copying leaves nothing behind for later forwards.
            is_joined: whether the kernel reaches the layer buffer through the slots, so that hits need no copy.

        Source: the rent-or-buy argument of online algorithms (Karlin, Manasse, Rudolph and Sleator 1988).
        """
        if not self._may_run_in_place:
            return False
        distinct_count = hit_count + missing.size
        in_place_s = distinct_count * self.fetch_s
        copy_s = missing.size * (self.fetch_s + self._slot_s) + distinct_count * self._slot_s
        if not is_narrow:
            if not is_joined:
                copy_s += 2 * hit_count * self._slot_s  # from the slots into the layer buffer
            return in_place_s < copy_s
        if in_place_s >= copy_s - float(self._regret_s[missing].sum()):
            self._regret_s[missing] = 0.0
            return False
        enough_s = self.fetch_s + self._slot_s
        self._regret_s[missing] = np.minimum(self._regret_s[missing] + self.fetch_s - self._slot_s, enough_s)
        return True

    def observe_kernel(self, token_count: int, expert_count: int, duration_s: float) -> None:
        """Learn from a kernel call that read this many experts for this many tokens."""
        width, expert_s = _width(token_count), duration_s / expert_count
        known_s = self._kernel_s.get(width, expert_s)
        self._kernel_s[width] = known_s + _LEARNING_RATE * (expert_s - known_s)

    def kernel_s(self, token_count: int, expert_count: int) -> float:
        """What a kernel call will take; as long as reading its experts takes where none was observed."""
        return expert_count * self._kernel_s.get(_width(token_count), self._slot_s)

    def passes_s(self, steps: Sequence[Step], slot_count: int, *, overlaps: bool) -> float:
        """What a forward in several passes takes.

        Args:
            steps: in order.
            overlaps: whether the next pass's slabs are copied while a pass computes, into the slots that it leaves.
        """
        total_s, ahead_s = 0.0, 0.0
        for index, step in enumerate(steps):
            total_s += max(step.fetch_count * self.fetch_s - ahead_s, 0.0) + PASS_OVERHEAD_S
            kernel_s = self.kernel_s(step.token_count, step.expert_count)
            total_s += kernel_s
            following = steps[index + 1].fetch_count if overlaps and index + 1 < len(steps) else 0
            ahead_s = min(kernel_s, min(following, slot_count - step.expert_count) * self.fetch_s)
        return total_s


def _width(token_count: int) -> int:
    """Forwards of one power of two are alike."""
    return token_count.bit_length()
