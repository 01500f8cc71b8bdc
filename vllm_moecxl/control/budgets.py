"""How many slots each layer gets out of a common total: where one more removes the most misses.

Source: AdapMoE (Zhong et al., ICCAD 2024), which shares its cache out by dynamic programming; the curves are the stack
distances of Mattson et al., "Evaluation Techniques for Storage Hierarchies", IBM Systems Journal 9 (1970).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt


def miss_curve(visits: npt.NDArray[np.integer], expert_count: int) -> npt.NDArray[np.int64]:
    """LRU's misses at every number of slots, in one walk over a layer's visits.

    Args:
        visits: [visits, k] expert ids, the k of a visit all different.

    Returns:
        [experts + 1] int64, misses with 0, 1, ... slots. What a visit needs is read at once, and not pushed out by it.
    """
    distances = np.zeros(expert_count + 1, dtype=np.int64)
    last_visit = np.full(expert_count, -1, dtype=np.int64)
    for number, expert_ids in enumerate(visits):
        previous = last_visit[expert_ids]
        # An expert is found by as many slots as hold all that were read since, itself included. Of those read together
        # with it, the lower slots are evicted first: here, the lower experts.
        for expert_id, seen in zip(expert_ids[previous >= 0].tolist(), previous[previous >= 0].tolist(), strict=True):
            newer = np.count_nonzero(last_visit > seen) + np.count_nonzero(last_visit[expert_id:] == seen)
            distances[newer] += 1
        last_visit[expert_ids] = number
    misses: npt.NDArray[np.int64] = visits.size - np.cumsum(distances)
    return misses


def budgets(
    curves: Sequence[npt.NDArray[np.integer]], total_slot_count: int, least_slot_count: int
) -> npt.NDArray[np.int64]:
    """The split of `total_slot_count` slots over the layers with the fewest misses in all.

    Args:
        curves: by layer, [experts + 1] misses with 0, 1, ... slots.
        least_slot_count: what every layer gets, at least: its top-k.

    Returns:
        [layers] int64, slots of each layer, no more than it has experts; their sum is the total, or all experts.
    """
    assert curves and least_slot_count >= 1
    assert len(curves) * least_slot_count <= total_slot_count, "every layer needs as many slots as a token has experts"
    spare_count = min(total_slot_count, sum(len(curve) - 1 for curve in curves)) - len(curves) * least_slot_count
    # fewest[s]: misses of the layers so far with s of the spare slots in all; curves need not be convex.
    fewest = np.full(spare_count + 1, np.inf)
    fewest[0] = 0.0
    choices = []
    for curve in curves:
        costs = np.asarray(curve[least_slot_count:], dtype=np.float64)
        totals = np.full((len(costs), spare_count + 1), np.inf)
        for extra_count, cost in enumerate(costs[: spare_count + 1].tolist()):
            totals[extra_count, extra_count:] = fewest[: spare_count + 1 - extra_count] + cost
        choices.append(totals.argmin(axis=0))
        fewest = totals.min(axis=0)
    slot_counts = np.full(len(curves), least_slot_count, dtype=np.int64)
    left = spare_count
    for layer in reversed(range(len(curves))):
        slot_counts[layer] += choices[layer][left]
        left -= int(choices[layer][left])
    return slot_counts
