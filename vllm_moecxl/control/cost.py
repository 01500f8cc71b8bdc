"""What a forward costs each way it may be run, so that the cheapest can be taken. Pure arithmetic, seconds.

A kernel over few tokens takes as long as it takes to read its experts' weights, so bytes and bandwidths are all that
counts here. For many tokens computing comes on top, the same for every way.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from vllm_moecxl.types import InPlaceMode

#: A pass more costs this much in Python and in the kernel's start. Source: one pass of the toy layer, AMD EPYC core,
#: 2026-11-22.
PASS_OVERHEAD_S = 150e-6

ExpertIds = npt.NDArray[np.int64]


class LayerCosts:
    """Costs of one layer, and what it has learned of the experts that it ran in place.

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
        self._home_s = slab_bytes / home_bytes_per_s
        self._slot_s = slab_bytes / slot_bytes_per_s
        self._may_run_in_place = is_addressable and in_place != "never"
        self.is_always_in_place = self._may_run_in_place and (in_place == "always" or self._home_s <= self._slot_s)
        #: [experts] seconds that forwards in place have lost for want of a slot.
        self._regret_s = np.zeros(expert_count)

    def runs_in_place(self, hit_count: int, missing: ExpertIds, *, is_narrow: bool) -> bool:
        """Whether to run a forward straight from the homes, and note what was decided.

        Copying once and reading from the slots ever after is weighed by what has been lost already: an expert is worth
        its copy when the forwards that ran without it have together lost as much. So neither choice costs more than
        twice what the better one would have.

        Args:
            hit_count: experts of the forward that are in slots.
            missing: those that are not.
            is_narrow: whether they fit the slots; otherwise copying leaves nothing behind for later forwards.

        Source: the rent-or-buy argument of online algorithms (Karlin, Manasse, Rudolph and Sleator 1988).
        """
        if not self._may_run_in_place:
            return False
        distinct_count = hit_count + missing.size
        in_place_s = distinct_count * self._home_s
        copy_s = missing.size * (self._home_s + self._slot_s) + distinct_count * self._slot_s
        if not is_narrow:
            copy_s += 2 * hit_count * self._slot_s  # from the slots into the layer buffer
            return in_place_s < copy_s
        if in_place_s >= copy_s - float(self._regret_s[missing].sum()):
            self._regret_s[missing] = 0.0
            return False
        enough_s = self._home_s + self._slot_s
        self._regret_s[missing] = np.minimum(self._regret_s[missing] + self._home_s - self._slot_s, enough_s)
        return True

    def split_pays(self, first_count: int, rest_count: int, missing_count: int, all_count: int) -> bool:
        """Whether to compute the tokens whose experts are there while those of the others are copied.

        Experts that both parts need are read twice then.

        Args:
            first_count: experts of the tokens that can be computed at once.
            rest_count: experts of the other tokens.
            missing_count: experts that have to be copied.
            all_count: experts of all tokens.
        """
        copy_s = missing_count * self._home_s
        first_s, rest_s, all_s = (count * self._slot_s for count in (first_count, rest_count, all_count))
        return max(copy_s, first_s) + rest_s + PASS_OVERHEAD_S < copy_s + all_s
