"""How one layer runs a forward that is not a plain hit: in place, in which passes, or through the layer buffer.

Decides, and does nothing: the engine's dispatch and the simulator act on the same plans.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from vllm_moecxl.control.cost import LayerCosts, Step
from vllm_moecxl.control.passes import Ids, Mask, Pass, expert_passes, fetch_counts, split_resident, token_passes
from vllm_moecxl.types import PassKind

#: The next layer is brought ahead only while a forward needs this share of a layer's experts: so much of what is
#: brought is needed, whatever the router says. Source: a planning figure; a prefill needs nearly all.
_AHEAD_SHARE_MIN = 0.75

#: [tokens, k] expert ids.
Routes = npt.NDArray[np.integer]


class ForwardPlanner:
    """Plans the forwards of one layer.

    Args:
        costs: what each way to run a forward costs.
        expert_count: experts of the layer.
        slot_count: its slots.
        pass_kind: how to run what does not fit the slots: TOKEN, EXPERT, or LAYER_BUFFER for kernels whose result
            changes with either.
        has_buffer: whether there is a layer buffer.
        is_joined: whether the kernel reaches the layer buffer through the slots: it costs no copy of what they hold.
    """

    def __init__(
        self,
        costs: LayerCosts,
        expert_count: int,
        slot_count: int,
        pass_kind: PassKind,
        *,
        has_buffer: bool,
        is_joined: bool,
    ) -> None:
        assert costs.is_always_in_place or pass_kind is not PassKind.LAYER_BUFFER or has_buffer
        self._costs = costs
        self._expert_count = expert_count
        self._slot_count = slot_count
        self._pass_kind = pass_kind
        self._has_buffer = has_buffer
        self._is_joined = is_joined

    def plan(
        self, routes: Routes, distinct: Ids, resident: Mask, *, overlaps: bool, is_buffered: bool
    ) -> tuple[PassKind, Sequence[Pass]]:
        """How to run a forward; what is learned of the layer from the decision is noted.

        Args:
            routes: [tokens, k] expert ids.
            distinct: ascending, those that occur in it.
            resident: [experts] bool, experts in slots now.
            overlaps: whether somebody copies the next pass's slabs while one computes.
            is_buffered: whether what is in the layer buffer are this layer's slabs.

        Returns:
            The kind, and the passes from slots: none for IN_PLACE and LAYER_BUFFER.
        """
        missing = distinct[~resident[distinct]]
        is_narrow = distinct.size <= self._slot_count
        hit_count = int(distinct.size - missing.size)
        if self._costs.runs_in_place(hit_count, missing, is_narrow=is_narrow, is_joined=self._is_joined):
            return PassKind.IN_PLACE, []
        if is_narrow and len(routes) == 1:  # a token is never cut
            return PassKind.SINGLE, [Pass(distinct, None)]
        # However few fetches passes would need: a joined buffer costs no copy of what the slots hold, and what was
        # brought ahead is there already.
        prefers_buffer = self._has_buffer and (self._is_joined or is_buffered)
        may_pass = self._pass_kind is PassKind.TOKEN and (is_narrow or not prefers_buffer)
        if may_pass and (passes := self._token_passes(routes, distinct, resident, overlaps=overlaps)):
            return (PassKind.SINGLE if len(passes) == 1 else PassKind.TOKEN), passes
        if is_narrow:
            return PassKind.SINGLE, [Pass(distinct, None)]
        if self._pass_kind is PassKind.EXPERT:
            return PassKind.EXPERT, expert_passes(distinct, resident, self._slot_count)
        return PassKind.LAYER_BUFFER, []

    def fillers(self, routes: Routes, missing: Ids, free_count: int) -> Ids:
        """Which experts of a wide forward go into slots that were never filled: those that most routes go to.

        Args:
            routes: [tokens, k] expert ids.
            missing: ascending, experts of it that are not resident.
            free_count: slots to fill.
        """
        route_counts = np.bincount(routes.ravel(), minlength=self._expert_count)
        return missing[np.argsort(-route_counts[missing], kind="stable")][:free_count]

    def expects_all(self, distinct_count: int) -> bool:
        """See `expects_all`."""
        return expects_all(distinct_count, self._expert_count)

    def _token_passes(self, routes: Routes, distinct: Ids, resident: Mask, *, overlaps: bool) -> Sequence[Pass] | None:
        """The fastest token passes; None where the layer buffer copies less."""
        slot_count, topk = self._slot_count, routes.shape[1]
        plans: list[Sequence[Pass]] = []
        if distinct.size <= slot_count:
            plans.append([Pass(distinct, None)])
        else:
            # The layer buffer copies every expert once: passes that would copy more are not worth their churn.
            limit = int(distinct.size) if self._has_buffer else routes.size
            capacities = [slot_count]
            if overlaps and slot_count >= 2 * topk:
                capacities.append(slot_count // 2)  # leaves slots for the next pass's slabs while one computes
            found = (token_passes(routes, resident, capacity, limit) for capacity in capacities)
            plans += [passes for passes in found if passes is not None]
        if overlaps:
            # The tokens whose experts are there may go first: the others' are copied meanwhile.
            parts = [split_resident(passes[0], routes, resident) for passes in plans]
            plans += [[*two, *passes[1:]] for two, passes in zip(parts, plans, strict=True) if two is not None]
        if len(plans) < 2:
            return plans[0] if plans else None
        return min(plans, key=lambda passes: self._passes_s(passes, len(routes), resident, overlaps=overlaps))

    def _passes_s(self, passes: Sequence[Pass], token_count: int, resident: Mask, *, overlaps: bool) -> float:
        counts = fetch_counts(passes, resident, self._slot_count)
        steps = [
            Step(token_count if part.token_ids is None else part.token_ids.size, part.expert_ids.size, fetch_count)
            for part, fetch_count in zip(passes, counts, strict=True)
        ]
        return self._costs.passes_s(steps, self._slot_count, overlaps=overlaps)


def expects_all(distinct_count: int, expert_count: int) -> bool:
    """Whether a forward that needs so many experts of a layer will very likely need all those of the next one."""
    return distinct_count >= _AHEAD_SHARE_MIN * expert_count
